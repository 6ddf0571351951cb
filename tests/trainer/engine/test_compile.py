"""Compilation by region, under the engines."""

from pathlib import Path

import pytest
import torch
from support.engines import train_with
from support.ranks import run
from support.toy import toy_config, toy_data
from torch import Tensor, nn

from roadwork_dist.trainer.engine.blocks import compile_model, repeated_blocks, repeated_classes
from roadwork_dist.trainer.trainer import Trainer


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.inner = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(self.linear(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.alone = nn.ModuleList([Block()])
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.blocks, *self.alone]:
            x = block(x)
        return self.head(x)


def test_repeated_blocks_are_found_and_nothing_inside_or_beside_them() -> None:
    net = Net()
    assert repeated_blocks(net) == list(net.blocks)
    assert repeated_classes(net) == {Block}
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.GELU())) == []


def compiled(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if module._compiled_call_impl is not None]


def test_regions_are_compiled_in_place_or_the_whole() -> None:
    regional, whole, plain = Net(), Net(), nn.Linear(2, 2)
    compile_model(regional, "default")
    assert compiled(regional) == ["blocks.0", "blocks.1", "blocks.2"]
    compile_model(whole, "default", regional=False)
    assert compiled(whole) == [""]
    compile_model(plain, "default")
    assert compiled(plain) == [""]
    assert regional.state_dict().keys() == Net().state_dict().keys()


def fit(run_dir: Path, mode: str) -> dict[str, Tensor]:
    torch._dynamo.config.cache_size_limit = 64
    torch.manual_seed(3)
    config = toy_config(run_dir, epochs=1, batch_size=8, compile=mode)
    return Trainer(Net(), config, toy_data(32), toy_data(16, seed=2)).fit().engine.whole_state()


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_compiled_blocks_train_alike_and_load_uncompiled(engine: str, tmp_path: Path) -> None:
    plain = run(train_with, engine, fit, tmp_path / "plain", "off", world_size=2)[0]
    ours = run(train_with, engine, fit, tmp_path / "compiled", "default", world_size=2)[0]
    for name, tensor in plain.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5)
    # Started again uncompiled, the finished run is taken up from its compiled checkpoint.
    again = run(train_with, engine, fit, tmp_path / "compiled", "off", world_size=2)[0]
    assert all(torch.equal(again[name], ours[name]) for name in ours)
