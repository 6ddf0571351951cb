"""The loop against hand-written loops and against itself on other numbers of processes."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.ranks import run
from support.toy import (
    assert_same_tensors,
    lines,
    newest_tensors,
    toy_config,
    toy_data,
    toy_model,
    weights,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from roadwork_dist.common.random import derive_seed, seed_everything
from roadwork_dist.metrics.classification import _warn_once
from roadwork_dist.trainer.config import CheckpointConfig, OptimConfig
from roadwork_dist.trainer.events.callback import Callback
from roadwork_dist.trainer.task import TaskOutput
from roadwork_dist.trainer.trainer import Trainer


def test_weights_are_bit_identical_to_a_hand_written_loop(tmp_path: Path) -> None:
    data, config = toy_data(48), toy_config(tmp_path, epochs=3)
    trainer = Trainer(toy_model(dropout=0.2), config, data).fit()

    model = toy_model(dropout=0.2)
    seed_everything(config.seed)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2]
    vectors = [p for n, p in model.named_parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}], lr=0.01
    )
    step, total_steps, warmup = 0, 9, 0  # a tenth of 9 steps: no warm-up
    for epoch in range(3):
        order = np.random.default_rng(derive_seed(config.seed, "order", epoch)).permutation(48)
        for start in range(0, 48, 16):
            inputs, labels = data[order[start : start + 16].tolist()]
            for group in optimizer.param_groups:
                progress = (step - warmup) / (total_steps - warmup)
                group["lr"] = 0.01 * 0.5 * (1 + math.cos(math.pi * progress))
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
    assert_same_tensors(weights(trainer), dict(model.state_dict()))


class TwoPartTask:
    """A main part on every row and an auxiliary one on the few rows whose target is not -1."""

    weights: Mapping[str, float] = {"main": 0.7, "rare": 0.3}
    figures: tuple[str, ...] = ("rows",)

    def count(self, batch: Any) -> dict[str, int]:
        return {"main": len(batch[1]), "rare": int((batch[2] >= 0).sum())}

    def __call__(self, model: nn.Module, batch: Any) -> TaskOutput:
        logits = model(batch[0])
        rare = F.cross_entropy(logits, batch[2], ignore_index=-1, reduction="sum")
        sums = {"main": F.cross_entropy(logits, batch[1], reduction="sum"), "rare": rare}
        return TaskOutput(sums, {"row": batch[3], "logits": logits})

    def metrics(self, rows: Any) -> dict[str, float]:
        return {"rows": float(len(rows["row"].unique()))}


def two_part_data(rows: int) -> TensorDataset:
    inputs, labels = toy_data(rows).tensors
    rare = torch.full((rows,), -1)
    rare[::9] = labels[::9]  # few enough that a rank or a micro-batch often has none
    return TensorDataset(inputs, labels, rare, torch.arange(rows))


def train_two_parts(
    run_dir: Path, rows: int, batch_size: int, accumulation: int, precision: str = "fp32"
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    config = toy_config(
        run_dir,
        batch_size=batch_size,
        accumulation=accumulation,
        precision=precision,
        monitor="-loss",
        optim=OptimConfig(lr=0.01, name="adamw", eps=1e-4),
        checkpoint=CheckpointConfig(),
    )
    data = two_part_data(rows)
    trainer = Trainer(toy_model(), config, data, two_part_data(13), task=TwoPartTask()).fit()
    return weights(trainer), lines(run_dir) if trainer.accelerator.is_main_process else []


@pytest.mark.parametrize(
    ("world_size", "batch_size", "accumulation"),
    [(1, 16, 2), (2, 16, 1), (2, 8, 2)],
)
# 64 = two full steps; 84 ends with 20 rows; 65 with one row, so that one of two ranks has none.
@pytest.mark.parametrize("rows", [64, 84, 65])
def test_same_effective_batch_same_training(
    tmp_path: Path, world_size: int, batch_size: int, accumulation: int, rows: int
) -> None:
    expected, expected_lines = train_two_parts(tmp_path / "whole", rows, 32, 1)
    results = run(train_two_parts, tmp_path / "parts", rows, batch_size, accumulation, world_size=world_size)
    for got, _ in results:
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-6, msg=name)
    got_lines = results[0][1]
    assert len(got_lines) == len(expected_lines)
    for got_line, line in zip(got_lines, expected_lines, strict=True):
        # Losses and their parts are means over all ranks' rows; the rate knows nothing of processes.
        assert got_line["step"] == line["step"]
        assert got_line.get("lr") == line.get("lr")
        for name in ("loss", "loss/main", "loss/rare"):
            assert got_line.get(name) == pytest.approx(line.get(name), abs=1e-6), (name, line)


def test_parts_without_any_target_contribute_nothing(tmp_path: Path) -> None:
    inputs, labels, _, row = two_part_data(32).tensors
    data = TensorDataset(inputs, labels, torch.full((32,), -1), row)
    Trainer(toy_model(), toy_config(tmp_path, monitor="-loss"), data, task=TwoPartTask()).fit()
    for line in lines(tmp_path):
        if line["kind"] == "health":
            continue
        assert line["loss"] == pytest.approx(0.7 * line["loss/main"])
        assert "loss/rare" not in line


class KeepRows(Callback):
    """Remembers what validation counted."""

    def __init__(self) -> None:
        self.counts: list[float] = []

    def on_validation_end(self, run: Any, metrics: dict[str, float], improved: bool) -> None:
        self.counts.append(metrics["rows"])
        self.loss = metrics["loss"]


def validate(run_dir: Path, rows: int) -> tuple[list[float], float]:
    keep = KeepRows()
    config = toy_config(run_dir, epochs=1, monitor="-loss")
    Trainer(
        toy_model(), config, two_part_data(16), two_part_data(rows), task=TwoPartTask(), callbacks=[keep]
    ).fit()
    return keep.counts, keep.loss


@pytest.mark.parametrize("rows", [1, 2, 16, 33])
def test_validation_counts_every_sample_once(tmp_path: Path, rows: int) -> None:
    (alone,) = run(validate, tmp_path / "one", rows)
    assert alone[0] == [rows]
    for world_size in (2, 3):
        for counts, loss in run(validate, tmp_path / str(world_size), rows, world_size=world_size):
            assert counts == [rows]
            assert loss == pytest.approx(alone[1], abs=1e-6)


def test_single_class_validation_is_zero_and_warned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _warn_once.cache_clear()  # another test of this process may have had such labels
    inputs, _ = toy_data(8).tensors
    val = TensorDataset(inputs, torch.ones(8, dtype=torch.long))
    Trainer(toy_model(), toy_config(tmp_path, epochs=1), toy_data(16), val).fit()
    assert [line["mcc"] for line in lines(tmp_path) if line["kind"] == "val"] == [0.0]
    assert caplog.text.count("all labels are of class 1: MCC is defined as 0") == 1


def test_bf16_and_compile_train_close_to_fp32(tmp_path: Path) -> None:
    plain = Trainer(toy_model(), toy_config(tmp_path / "a", epochs=1), toy_data(32)).fit()
    bf16 = Trainer(toy_model(), toy_config(tmp_path / "b", epochs=1, precision="bf16"), toy_data(32)).fit()
    for name, tensor in weights(plain).items():
        assert weights(bf16)[name].dtype == torch.float32
        torch.testing.assert_close(weights(bf16)[name], tensor, rtol=0, atol=0.03)
    assert any(not torch.equal(weights(bf16)[n], t) for n, t in weights(plain).items())
    compiled = Trainer(
        toy_model(), toy_config(tmp_path / "c", epochs=1, compile="default"), toy_data(32)
    ).fit()
    # A checkpoint knows nothing of compilation, and one goes on from it without.
    names = [name.split("/", 1)[1] for name in newest_tensors(tmp_path / "c") if name.startswith("step-")]
    assert names == [name.split("/", 1)[1] for name in newest_tensors(tmp_path / "a") if "step-" in name]
    assert "model/0.weight" in names
    Trainer(toy_model(), toy_config(tmp_path / "c", epochs=2), toy_data(32)).fit()
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(compiled)[name], tensor, rtol=0, atol=1e-5)
