"""Every engine takes the steps that data parallel training takes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import SHARDED, train_with
from support.ranks import run
from support.toy import lines, toy_config
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from roadwork_dist.trainer.callbacks.averaging import EmaCallback
from roadwork_dist.trainer.checkpoint.callback import Checkpointer
from roadwork_dist.trainer.config import EmaConfig, OptimConfig
from roadwork_dist.trainer.trainer import Trainer


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Detector(nn.Module):
    """A frozen part, repeated blocks, and a branch that some batches do not use."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 17).requires_grad_(False)  # odd: shards of unequal length
        self.blocks = nn.ModuleList(Block(17) for _ in range(3))
        self.metadata = nn.Linear(1, 17)
        self.null = nn.Parameter(torch.randn(17) * 0.1)
        self.head = nn.Linear(17, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.frozen(inputs)
        for block in self.blocks:
            x = block(x)
        known = inputs[:, :1] > 0  # the metadata of half of the batches is missing altogether
        return self.head(x + torch.where(known, self.metadata(inputs[:, :1]), self.null))


def rows(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 6, generator=generator)
    inputs[: count // 2, 0] = -1.0
    return TensorDataset(inputs, (inputs[:, :2].sum(1) > 0).long())


def without_checkpoints(trainer: Trainer) -> Trainer:
    """They have tests of their own, and cost more than the steps."""
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, Checkpointer)]
    return trainer


Whole = dict[str, Tensor]


def fit(run_dir: Path, precision: str, changes: dict[str, Any]) -> tuple[Whole, Whole]:
    """20 steps of 2 micro-batches, the last of an epoch short; weights, and average, whole."""
    torch.manual_seed(7)
    config = toy_config(
        run_dir,
        epochs=4,
        batch_size=4,
        accumulation=2,
        precision=precision,
        patience=0,
        **({"optim": OptimConfig(lr=0.01, clip=0.5, weight_decay=0.1, layer_decay=0.8)} | changes),
    )
    trainer = without_checkpoints(Trainer(Detector(), config, rows(70), rows(23))).fit()
    weights = trainer.engine.whole_state()
    with trainer.averaged():
        average = trainer.engine.whole_state()
    return weights, average


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(
            ours[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.fixture(scope="module")
def data_parallel(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Losses, weights and average of data parallel training, by precision."""
    known: dict[str, Any] = {}

    def get(precision: str) -> Any:
        if precision not in known:
            folder = tmp_path_factory.mktemp(f"ddp-{precision}")
            known[precision] = folder, run(train_with, "ddp", fit, folder, precision, {}, world_size=2)[0]
        return known[precision]

    return get


@pytest.mark.parametrize("engine", SHARDED)
def test_twenty_steps_agree_with_data_parallel(engine: str, tmp_path: Path, data_parallel: Any) -> None:
    folder, (weights, average) = data_parallel("fp32")
    ours = run(train_with, engine, fit, tmp_path, "fp32", {}, world_size=2)[0]
    theirs = lines(folder)
    assert len([line for line in theirs if line["kind"] == "train"]) == 20
    for line, expected in zip(lines(tmp_path), theirs, strict=True):
        assert line["kind"] == expected["kind"]
        for key, value in expected.items():
            if isinstance(value, float):
                assert line[key] == pytest.approx(value, rel=1e-5, abs=1e-6), (expected["step"], key)
    compare(ours[0], weights, 1e-5)
    compare(ours[1], average, 1e-6)
    assert any(line["grad_norm"] > 0.5 for line in theirs if line["kind"] == "train")  # clipping took part
    assert not torch.equal(weights["head.weight"], average["head.weight"])


@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_bf16_agrees_with_data_parallel(engine: str, tmp_path: Path, data_parallel: Any) -> None:
    # Weights, gradients and reductions are fp32 in every engine and only forward passes run in bf16, so
    # what differs is the order of fp32 sums, of which some activations are rounded to the other of two
    # neighbouring bf16 numbers (8 bits: 0.4 %); 20 AdamW steps of 0.01 carry that into the weights.
    folder, (weights, _) = data_parallel("bf16")
    ours = run(train_with, engine, fit, tmp_path, "bf16", {}, world_size=2)[0]
    for line, expected in zip(lines(tmp_path), lines(folder), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=5e-3), expected["step"]
    compare(ours[0], weights, 5e-3)
    fp32 = lines(data_parallel("fp32")[0])
    assert any(a["loss"] != b["loss"] for a, b in zip(lines(tmp_path), fp32, strict=True))


def fit_with_a_bad_row(run_dir: Path, row: int) -> tuple[dict[str, Tensor], int]:
    """One epoch in which one row is not a number."""
    torch.manual_seed(7)
    data = rows(64)
    data.tensors[0][row] = math.nan
    config = toy_config(run_dir, epochs=1, batch_size=4, accumulation=2, patience=0)
    trainer = without_checkpoints(Trainer(Detector(), config, data)).fit()
    return trainer.engine.whole_state(), trainer.state.step


@pytest.mark.parametrize("engine", SHARDED)
def test_a_nan_on_one_rank_is_skipped_by_all(engine: str, tmp_path: Path) -> None:
    expected, _ = run(train_with, "ddp", fit_with_a_bad_row, tmp_path / "ddp", 5, world_size=2)[0]
    weights, step = run(train_with, engine, fit_with_a_bad_row, tmp_path / "ours", 5, world_size=2)[0]
    assert step == 4
    assert [line["kind"] for line in lines(tmp_path / "ours")].count("skip") == 1
    compare(weights, expected, 1e-5)


def shadow_of_a_rank(run_dir: Path) -> dict[str, Any]:
    """How much of the average a rank holds, and the average of the whole weights worked out by hand."""
    torch.manual_seed(7)
    by_hand: dict[str, Tensor] = {}

    class ByHand(EmaCallback):
        def on_step_end(self, run: Any, result: Any) -> None:
            super().on_step_end(run, result)
            whole = run.engine.whole_state()
            decay = min(0.9, run.state.step / (9 + run.state.step))
            for name, tensor in whole.items():
                was = by_hand.get(name, first.get(name))
                by_hand[name] = decay * was + (1 - decay) * tensor.double()

    config = toy_config(run_dir, epochs=1, batch_size=4, ema=EmaConfig(enabled=False), patience=0)
    model = Detector()
    first = {name: tensor.double().clone() for name, tensor in model.state_dict().items()}
    own = ByHand(EmaConfig(decay=0.9))
    trainer = without_checkpoints(Trainer(model, config, rows(64), callbacks=[own])).fit()
    assert own.average is not None
    held = sum(tensor.numel() for tensor in own.average.shadow().values())
    with own.swapped_in():
        average = trainer.engine.whole_state()
    return {"held": held, "average": average, "by hand": by_hand}


@pytest.mark.parametrize("engine", ["ddp", *SHARDED])
def test_each_rank_averages_its_own_shard(engine: str, tmp_path: Path) -> None:
    ranks = run(train_with, engine, shadow_of_a_rank, tmp_path, world_size=2)
    trained = sum(p.numel() for p in Detector().parameters() if p.requires_grad)
    share = 1.0 if engine == "ddp" else 0.5
    for rank in ranks:
        assert rank["held"] == pytest.approx(trained * share, rel=0.06)  # parameters of odd length
        assert all(dtype == torch.float32 for dtype in {t.dtype for t in rank["average"].values()})
    if engine != "ddp":
        assert sum(rank["held"] for rank in ranks) == trained
    compare({n: t.double() for n, t in ranks[0]["average"].items()}, ranks[0]["by hand"], 1e-6)
