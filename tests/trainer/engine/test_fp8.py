"""8-bit products: which layers, and what they do to the figures (emulated: no GPU is needed)."""

from pathlib import Path

import pytest
import torch
from support.toy import toy_config, toy_data
from torch import Tensor, nn

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.trainer.engine import build, fp8
from roadwork_dist.trainer.engine.fp8 import use_fp8
from roadwork_dist.trainer.trainer import Trainer

pytest.importorskip("torchao", reason="torchao is not installed: make test-fp8", exc_type=ImportError)

CPU = torch.device("cpu")
# torchao's own, when Python compiles it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid escape sequence"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao"),
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.odd = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 7)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x))) + self.odd(x).sum(-1, keepdim=True)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.blocks, self.head = (
            nn.Linear(6, 32),
            nn.ModuleList([Block(), Block()]),
            nn.Linear(32, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_large_products_of_repeated_blocks_are_converted_and_no_name_changes() -> None:
    net = Net()
    before = dict(net.named_parameters())
    names = use_fp8(net, CPU, emulate=True)
    assert names == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    after = dict(net.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert after.keys() == before.keys()


def test_products_are_rounded_to_8_bits() -> None:
    inputs = torch.randn(48, 6, generator=torch.Generator().manual_seed(1))
    exact, rounded = Net(), Net()
    use_fp8(rounded, CPU, emulate=True)
    error = (rounded(inputs) - exact(inputs)).abs().max() / exact(inputs).abs().max()
    assert 1e-4 < error < 0.1  # e4m3 keeps 3 bits: 6 % of a factor, averaged out over a sum


def test_training_in_fp8_learns_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "use_fp8", lambda model, device: use_fp8(model, device, emulate=True))

    def fit(folder: str, precision: str, epochs: int) -> Trainer:
        config = toy_config(tmp_path / folder, epochs=epochs, precision=precision, patience=0)
        return Trainer(Net(), config, toy_data(96), toy_data(48, seed=2)).fit()

    ours, bf16 = fit("fp8", "fp8", 6), fit("bf16", "bf16", 6)
    assert ours.state.best is not None
    assert ours.state.best > 0.5
    assert any(
        not torch.equal(p, q) for p, q in zip(ours.model.parameters(), bf16.model.parameters(), strict=True)
    )
    assert fit("fp8", "fp8", 7).state.epoch == 7


def test_without_the_units_or_the_layers_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"capability 8\.9 or newer .* device is a cpu: use bf16"):
        use_fp8(Net(), CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    with pytest.raises(ConfigError, match="the device is NVIDIA A100: use bf16"):
        use_fp8(Net(), torch.device("cuda"))
    assert fp8.LEAST_CAPABILITY == (8, 9)
    with pytest.raises(ConfigError, match="Linear has no repeated block"):
        use_fp8(nn.Linear(32, 32), CPU, emulate=True)
