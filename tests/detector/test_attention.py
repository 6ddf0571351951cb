import math

import pytest
import torch
from torch import Tensor

from roadwork_dist.detector.attention import GatedAttentionBlock, ViewAttention
from roadwork_dist.detector.layers import MixtureOfExperts, SwiGLU


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * weight


def _naive(layer: ViewAttention, x: Tensor, mask: Tensor, value_weight: Tensor | None = None) -> Tensor:
    """The layer as loops over rows, heads, queries and keys."""
    c, out = layer.head_width, torch.zeros_like(x)
    q_w, k_w, v_w = layer.qkv_proj.weight.split(
        [layer.heads * c, layer.kv_heads * c, layer.kv_heads * c], dim=0
    )
    for row in range(x.shape[0]):
        real = [v for v in range(x.shape[1]) if mask[row, v]]
        for i in range(x.shape[1]):
            heads = []
            for head in range(layer.heads):
                shared = head * layer.kv_heads // layer.heads  # the key/value head this one uses
                own, kv = slice(head * c, head * c + c), slice(shared * c, shared * c + c)
                query = _rms(q_w[own] @ x[row, i], layer.q_norm.weight)
                keys = [_rms(k_w[kv] @ x[row, j], layer.k_norm.weight) for j in real]
                values = [v_w[kv] @ x[row, j] for j in real]
                if value_weight is not None:
                    values = [v * value_weight[row, j] for v, j in zip(values, real, strict=True)]
                share = torch.stack([query @ key / math.sqrt(c) for key in keys]).softmax(0)
                read = sum(s * v for s, v in zip(share, values, strict=True))
                if layer.gate_proj is not None:
                    read = read * (layer.gate_proj.weight[own] @ x[row, i]).sigmoid()
                heads.append(read)
            out[row, i] = layer.out_proj.weight @ torch.cat(heads)
    return out


def _inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    mask = torch.tensor([[True, True, True, True], [True, False, True, False]])
    return torch.randn(2, 4, 64, dtype=torch.float64), mask


def _layer(kv_heads: int, *, gate: bool) -> ViewAttention:
    layer = ViewAttention(64, 8, kv_heads, gate=gate).double()
    torch.nn.init.uniform_(layer.q_norm.weight, 0.5, 2.0)
    torch.nn.init.uniform_(layer.k_norm.weight, 0.5, 2.0)
    return layer


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
def test_attention_against_naive_loops(kv_heads: int, gate: bool) -> None:
    x, mask = _inputs()
    layer = _layer(kv_heads, gate=gate)
    torch.testing.assert_close(layer(x, mask), _naive(layer, x, mask))


def test_value_weights_against_naive_loops() -> None:
    x, mask = _inputs()
    layer, weight = _layer(8, gate=False), torch.rand(2, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x, mask, weight), _naive(layer, x, mask, weight))


def test_gradients() -> None:
    x, mask = _inputs()
    layer = _layer(2, gate=True)
    assert torch.autograd.gradcheck(lambda t: layer(t, mask), x[:, :, :].requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("experts", [0, 4])
def test_block_is_two_residual_branches(experts: int) -> None:
    x, mask = _inputs()
    block = GatedAttentionBlock(64, 8, 8, gate=True, hidden=64, experts=experts, layers=2).double()
    one = torch.ones(64, dtype=torch.float64)
    normed = torch.stack([torch.stack([_rms(v, one) for v in row]) for row in x])
    middle = x + _naive(block.attention, normed, mask)
    normed = torch.stack([torch.stack([_rms(v, one) for v in row]) for row in middle])
    out, balance = block(x, mask)
    if isinstance(block.ffn, MixtureOfExperts):
        update, expected_balance = block.ffn(normed, mask)
    else:
        update, expected_balance = block.ffn(normed), torch.zeros(2, dtype=torch.float64)
    torch.testing.assert_close(out, middle + update)
    torch.testing.assert_close(balance, expected_balance, check_dtype=False)


def test_names_that_adapters_target_are_only_in_attention() -> None:
    block = GatedAttentionBlock(64, 8, 8, gate=True, hidden=64, experts=0, layers=2)
    linears = [name for name, m in block.named_modules() if isinstance(m, torch.nn.Linear)]
    assert linears == [
        "attention.qkv_proj",
        "attention.gate_proj",
        "attention.out_proj",
        "ffn.in_proj",
        "ffn.down_proj",
    ]
    assert isinstance(block.ffn, SwiGLU)


def test_no_gate_no_weights_for_it() -> None:
    assert ViewAttention(64, 8, 8, gate=False).gate_proj is None
