"""Token merging against loops, hand calculations and the network without it."""

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.config.experiment import BackboneConfig
from roadwork_dist.detector.backbone import build_random, load_backbone
from roadwork_dist.detector.backbone.base import Backbone
from roadwork_dist.detector.backbone.token_merging import (
    Match,
    Merging,
    Tokens,
    apply_match,
    match_tokens,
    merge_tokens,
    merged_by,
    proportional_bias,
)
from roadwork_dist.trainer.engine.blocks import repeated_classes

CPU = torch.device("cpu")
KINDS = ("dinov3", "dinov2", "dinov2_with_registers")
SIDE = {"dinov3": 80, "dinov2": 70, "dinov2_with_registers": 70}
"""Five patches a side: 25, an odd number."""


def network(kind: str) -> Any:
    import transformers as t

    torch.manual_seed(0)
    tiny: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    tiny["layerscale_value"] = 0.5
    old: dict[str, Any] = {"image_size": 56, "patch_size": 14}
    net: Any
    if kind == "dinov3":
        gated: dict[str, Any] = {"intermediate_size": 64, "num_register_tokens": 4, "use_gated_mlp": True}
        net = t.DINOv3ViTModel(t.DINOv3ViTConfig(**tiny, **gated))
    elif kind == "dinov2":
        net = t.Dinov2Model(t.Dinov2Config(**tiny, **old))
    else:
        net = t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**tiny, **old))
    with torch.no_grad():  # fresh weights are so small that attention would be even
        for name, parameter in net.named_parameters():
            if "_proj.weight" in name:
                parameter.mul_(8)
    return net.eval()


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    network(request.param).save_pretrained(path)
    return path


def load(folder: Path, merging: float = 0.0, **settings: Any) -> Backbone:
    return load_backbone(
        BackboneConfig(**{"name": str(folder), "dtype": "fp32", "token_merging": merging, **settings}),
        device=CPU,
    )


def views(count: int = 3, side: int = 70) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def side_of(backbone: Backbone) -> int:
    return 5 * (backbone.patch or 0)


def test_the_schedule_takes_as_many_from_every_block() -> None:
    assert [merged_by(0.5, 1024, 12, block) for block in (0, 1, 11)] == [42, 85, 512]
    assert [merged_by(0.4, 25, 4, block) for block in range(4)] == [2, 5, 7, 10]
    assert [merged_by(0.0, 25, 4, block) for block in range(4)] == [0] * 4
    assert merged_by(0.29, 100, 1, 0) == 29  # 0.29 * 100 is 28.999999999999996


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_has_the_tokens_that_were_counted_by_hand(kind: str) -> None:
    net = network(kind)
    prefix = {"dinov3": 5, "dinov2": 1, "dinov2_with_registers": 5}[kind]
    merge_tokens(net, 0.4, kind)
    merging = Merging()
    pixels = torch.randn(2, 3, SIDE[kind], SIDE[kind])
    with torch.no_grad():
        left = net(pixel_values=pixels, merging=merging).last_hidden_state
    # 25 patches, of which 2, 5, 7, 10 are gone behind the four blocks
    sizes = [merging.entering[block].sizes for block in range(5)]
    assert sizes[0] is None
    assert [s.shape[1] - prefix for s in sizes[1:] if s is not None] == [23, 20, 18, 15]
    assert left.shape[1] == prefix + 15
    for size in sizes[1:]:
        assert size is not None
        assert size.sum(dim=1).tolist() == [prefix + 25] * 2  # no patch is lost or counted twice
        assert bool((size[:, :prefix] == 1).all())  # CLS and registers stand for themselves
    if kind == "dinov3":
        rotation = merging.entering[4].rotation
        assert rotation is not None
        assert [part.shape for part in rotation] == [(2, 1, 15, 16)] * 2


def test_off_is_the_network_itself_and_too_little_to_merge_changes_no_bit(folder: Path) -> None:
    off, plain = load(folder, 0.0), load(folder)
    pixels = views(3, side_of(off))
    assert torch.equal(off(pixels), plain(pixels))
    assert off.identity == plain.identity
    # 3 % of 25 patches are none, so the wrapped blocks merge nothing.
    wrapped = load(folder, 0.03)
    assert torch.equal(wrapped(pixels), plain(pixels))
    assert wrapped.identity != plain.identity


def test_merged_features_are_others_and_have_another_identity(folder: Path) -> None:
    plain, some, more = load(folder), load(folder, 0.2), load(folder, 0.5)
    pixels = views(3, side_of(plain))
    a, b, c = plain(pixels), some(pixels), more(pixels)
    near, far = (1 - F.cosine_similarity(a, x).mean() for x in (b, c))
    assert 1e-6 < near < far < 0.5
    assert len({plain.identity, some.identity, more.identity}) == 3
    assert load(folder, 0.2).identity == some.identity
    assert list(more.state_dict()) == list(plain.state_dict())
    assert more._blocks() == plain._blocks()


def test_blocks_stay_one_kind_and_can_be_copied(folder: Path) -> None:
    """Engines wrap and compile the classes that repeat; a deep copy is a network of its own."""
    backbone = load(folder, 0.5)
    names = {kind.__name__ for kind in repeated_classes(load(folder))}
    assert {kind.__name__ for kind in repeated_classes(backbone)} == names != set()
    copy = deepcopy(backbone)
    pixels = views(2, side_of(backbone))
    assert torch.equal(copy(pixels), backbone(pixels))
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.zero_()
    assert copy(pixels).abs().sum() > 0


def test_a_view_does_not_depend_on_its_batch_and_bf16_works(folder: Path) -> None:
    backbone = load(folder, 0.5)
    pixels = views(3, side_of(backbone))
    together = backbone(pixels)
    alone = torch.cat([backbone(view[None]) for view in pixels])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    rounded = load(folder, 0.5, dtype="bf16")(pixels)
    assert F.cosine_similarity(together, rounded).min() > 0.98


def test_gradients_are_the_same_with_and_without_checkpointing(folder: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        backbone = load(folder, 0.5, trainable="all", gradient_checkpointing=checkpointing).train()
        pixels = views(4, side_of(backbone))
        # Two passes before one backward pass: each must find its own tokens again.
        (backbone(pixels[:2]).square().sum() + backbone(pixels[2:]).square().sum()).backward()
        gradients.append({name: p.grad for name, p in backbone.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    first = next(iter(gradients[0]))
    assert any("k_proj" in name for name in gradients[0])
    assert gradients[0][first].abs().sum() > 0
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_equal_patches_merge_without_a_trace() -> None:
    """Where positions are not told apart either, a merged token must count as all that it stands for."""
    net = network("dinov2")
    with torch.no_grad():
        net.embeddings.position_embeddings.zero_()
    pixels = torch.zeros(1, 3, 70, 70)
    pixels[:, :, :28] = 1.0  # two kinds of patches: 10 and 15
    with torch.no_grad():
        expected = net(pixel_values=pixels).last_hidden_state[:, 0]
        merge_tokens(net, 0.8, "tiny")
        merging = Merging()
        merged = net(pixel_values=pixels, merging=merging).last_hidden_state[:, 0]
    sizes = merging.entering[4].sizes
    assert sizes is not None
    assert sizes.shape[1] == 1 + 5
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-5)


def test_attention_to_a_merged_token_by_hand() -> None:
    """Scores 0 and ln 2; the second token stands for three: weights 1 : 2 · 3, not 1 : 2."""
    sizes = torch.tensor([[1.0, 3.0]])
    query, key = torch.ones(1, 1, 2, 1), torch.tensor([[[[0.0], [math.log(2)]]]])
    value = torch.tensor([[[[0.0], [7.0]]]])
    bias = proportional_bias(sizes, torch.float32)
    read = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
    torch.testing.assert_close(read, torch.full((1, 1, 2, 1), 7 * 6 / 7))


def test_merging_by_hand() -> None:
    """Prefix p; patches 0 to 4, so A = 0, 2, 4 and B = 1, 3. Of A, 0 and 4 go into 3."""
    x = torch.tensor([[100.0, 1.0, 2.0, 3.0, 4.0, 5.0]]).unsqueeze(-1)
    sizes = torch.tensor([[1.0, 2.0, 1.0, 1.0, 3.0, 1.0]])
    turn = torch.tensor([10.0, 11.0, 12.0, 13.0, 14.0])[:, None]
    match = Match(kept=torch.tensor([[1]]), gone=torch.tensor([[2, 0]]), into=torch.tensor([[1, 1]]))
    merged, tokens = apply_match(x, Tokens(sizes, (turn, -turn)), match, prefix=1)
    # kept of A: patch 2; B: patch 1, and patch 3 as (1·2 + 4·3 + 5·1) / 6
    torch.testing.assert_close(merged.flatten(), torch.tensor([100.0, 3.0, 2.0, 19 / 6]))
    assert tokens.sizes is not None
    assert tokens.sizes.tolist() == [[1.0, 1.0, 1.0, 6.0]]
    assert tokens.rotation is not None
    assert tokens.rotation[0].flatten().tolist() == [12.0, 11.0, 13.0]  # the position of what it went into
    assert tokens.rotation[1].shape == (1, 1, 3, 1)


@pytest.mark.parametrize(("patches", "pairs"), [(25, 6), (8, 4), (2, 1), (9, 1)])
def test_the_match_against_a_loop(patches: int, pairs: int) -> None:
    generator = torch.Generator().manual_seed(patches)
    similar = torch.randn(3, patches, 6, generator=generator)
    match = match_tokens(similar, pairs)
    for row in range(3):
        a, b = range(0, patches, 2), range(1, patches, 2)
        joins = []
        for place, i in enumerate(a):
            cosines = [float(F.cosine_similarity(similar[row, i], similar[row, j], dim=0)) for j in b]
            joins.append((max(cosines), place, cosines.index(max(cosines))))
        best = sorted(joins, key=lambda join: -join[0])[:pairs]
        assert match.gone[row].tolist() == [place for _, place, _ in best]
        assert match.into[row].tolist() == [into for *_, into in best]
        stay = [place for place in range(len(a)) if place not in match.gone[row].tolist()]
        assert match.kept[row].tolist() == stay


def test_fewer_operations_are_counted() -> None:
    whole, merged = (
        build_random("dinov3_vits16", device=torch.device("meta"), token_merging=share)
        for share in (0.0, 0.5)
    )
    ratio = merged.forward_operations(128) / whole.forward_operations(128)
    assert 0.6 < ratio < 0.8  # tokens fall evenly from all to half, so about a quarter less


@pytest.mark.parametrize("name", ["convnextv2_base", "efficientnet_lite0"])
def test_networks_without_such_blocks_refuse(name: str) -> None:
    with pytest.raises(ConfigError, match=f"token_merging is 0.5, but {name} is not a vision transformer"):
        build_random(name, device=torch.device("meta"), token_merging=0.5)


def test_other_networks_of_transformers_and_flash_attention_refuse(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    tiny: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    ViTModel(ViTConfig(**tiny, image_size=64)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is not a DINOv2 or DINOv3 of transformers: set it to 0"):
        load(tmp_path, 0.5)
    with pytest.raises(ConfigError, match=r"set backbone\.attention to auto or sdpa"):
        BackboneConfig(attention="flash", token_merging=0.5)
    with pytest.raises(ConfigError, match=r"backbone.token_merging.*0\.95"):
        BackboneConfig(token_merging=0.95)


def test_cells_of_merged_tokens_stand_where_their_patches_were() -> None:
    """Four flat quarters of a view: its patches merge, and each quarter is still seen in its place."""
    net = network("dinov2")
    with torch.no_grad():
        net.embeddings.position_embeddings.zero_()
    from roadwork_dist.detector.backbone.transformers_backbone import wrap_transformers

    backbone = wrap_transformers("tiny", net).apply_config(BackboneConfig(dtype="fp32"), CPU)
    pixels = torch.zeros(2, 3, 84, 84, dtype=torch.uint8)
    pixels[:, :, :42, 42:], pixels[:, :, 42:, :42], pixels[1, :, 42:, 42:] = 80, 160, 240
    features, cells = backbone.forward_cells(pixels)
    assert torch.equal(features, backbone(pixels))
    backbone.merge_tokens(0.8)
    merged_features, merged = backbone.forward_cells(pixels)
    torch.testing.assert_close(merged_features, features, atol=1e-5, rtol=1e-5)
    assert merged.shape == (2, 6, 6, 32)
    torch.testing.assert_close(merged, cells, atol=1e-4, rtol=1e-4)
    assert (cells[1, 0, 0] - cells[1, 5, 5]).abs().max() > 0.1


def test_places_follow_patches_through_two_merges_by_hand() -> None:
    x = torch.arange(5.0)[None, :, None]
    first = Match(kept=torch.tensor([[1]]), gone=torch.tensor([[2, 0]]), into=torch.tensor([[1, 1]]))
    y, tokens = apply_match(x, Tokens(None, None), first, prefix=0)  # left: 2 | 1, mean of 3, 4 and 0
    assert tokens.places is not None
    assert tokens.places.tolist() == [[2, 1, 0, 2, 2]]
    second = Match(kept=torch.tensor([[1]]), gone=torch.tensor([[0]]), into=torch.tensor([[0]]))
    z, tokens = apply_match(y, tokens, second, prefix=0)  # 2 goes into 1; left: the three | 1 and 2
    assert tokens.places is not None
    assert tokens.places.tolist() == [[0, 1, 1, 0, 0]]
    torch.testing.assert_close(z.flatten(), torch.tensor([7 / 3, 1.5]))
