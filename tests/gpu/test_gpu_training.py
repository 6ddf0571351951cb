"""The Trainer on a GPU."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from support.devices import CPU, GPU, deterministic, needs_gpu, random_batch
from support.toy import (
    NoisyData,
    Stop,
    StopAt,
    assert_same_tensors,
    lines,
    newest_tensors,
    toy_config,
    toy_data,
    toy_model,
)
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from roadwork_dist.common.random import capture_rng, restore_rng
from roadwork_dist.config.experiment import LossConfig, ModelConfig
from roadwork_dist.detector.detector import RoadworkHead, RoadworkModel
from roadwork_dist.detector.losses.composite import RoadworkLoss
from roadwork_dist.detector.task import RoadworkTask
from roadwork_dist.trainer.callbacks.averaging import EmaCallback
from roadwork_dist.trainer.config import OptimConfig
from roadwork_dist.trainer.events.callback import Callback
from roadwork_dist.trainer.tracking import figures
from roadwork_dist.trainer.tracking.figures import MemoryGauge, peak_memory_mb
from roadwork_dist.trainer.trainer import Trainer

pytestmark = [
    needs_gpu,
    # Loader workers are forked while CUDA's threads run; they never touch the GPU.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


def test_trains_in_bf16_with_fp32_weights_and_average(tmp_path: Path) -> None:
    model, seen = toy_model(0.1), set()
    model[0].register_forward_hook(
        lambda module, inputs, output: seen.add((output.dtype, output.device.type))
    )
    config = toy_config(tmp_path, device="auto", precision="bf16", epochs=12)
    trainer = Trainer(model, config, toy_data(64), toy_data(32)).fit()

    assert trainer.accelerator.device.type == GPU.type
    assert seen == {(torch.bfloat16, GPU.type)}
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, GPU.type)}
    (average,) = [c.average for c in trainer.callbacks if isinstance(c, EmaCallback)]
    assert average is not None
    state = average.state_dict()
    assert {(t.dtype, t.device.type) for n, t in state.items() if n != "__updates__"} == {
        (torch.float32, GPU.type)
    }
    losses = [line["loss"] for line in lines(tmp_path) if line["kind"] == "train"]
    assert len(losses) == 48
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])
    mccs = [line["mcc"] for line in lines(tmp_path) if line["kind"] == "val"]
    assert mccs[-1] > 0.5
    assert {tensor.device.type for tensor in newest_tensors(tmp_path).values()} == {"cpu"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stop", [3, 5])
def test_a_run_that_was_cut_short_goes_on_exactly(tmp_path: Path, precision: str, stop: int) -> None:
    def fit(run_dir: Path, *callbacks: Callback) -> None:
        config = toy_config(
            run_dir, device="auto", precision=precision, batch_size=4, accumulation=2, workers=1
        )
        data = NoisyData(29), toy_data(11)  # 4 steps an epoch, the last one short
        Trainer(toy_model(0.3), config, *data, callbacks=callbacks).fit()

    with deterministic():
        with pytest.raises(Stop):
            fit(tmp_path / "cut", StopAt(stop))
        torch.rand(7, device=GPU)  # whatever else the process draws
        fit(tmp_path / "cut")
        fit(tmp_path / "whole")
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert_same_tensors(newest_tensors(tmp_path / "cut"), newest_tensors(tmp_path / "whole"))


def test_random_state_of_the_gpu_is_captured_and_restored() -> None:
    state = capture_rng()
    first = torch.rand(5, device=GPU)
    restore_rng(state)
    assert torch.equal(torch.rand(5, device=GPU), first)


def test_a_loss_that_is_not_finite_skips_the_step(tmp_path: Path) -> None:
    inputs, labels = toy_data(32).tensors
    inputs[5] = float("nan")
    config = toy_config(tmp_path, device="auto", precision="bf16", epochs=1)
    model = toy_model()
    Trainer(model, config, TensorDataset(inputs, labels)).fit()
    assert sorted(line["kind"] for line in lines(tmp_path)) == ["skip", "train"]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_gpu_agrees_with_the_cpu(tmp_path: Path) -> None:
    losses = []
    for device in ("auto", "cpu"):  # one process, first on the GPU and then on the CPU
        config = toy_config(tmp_path / device, device=device, batch_size=8, optim=OptimConfig(eps=1e-4))
        trainer = Trainer(toy_model(), config, toy_data(40), toy_data(9)).fit()
        assert trainer.accelerator.device.type == (GPU if device == "auto" else CPU).type
        losses.append([line["loss"] for line in lines(tmp_path / device)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


class Allocates(Callback):
    """Holds 64 MiB of the device for a moment."""

    def on_fit_start(self, run: Any) -> None:
        torch.zeros(16 * 2**20, device=run.accelerator.device)


def test_peak_memory_is_that_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_gauge", MemoryGauge())  # another test's figure is up to a second old
    torch.cuda.reset_peak_memory_stats()
    config = toy_config(tmp_path, device="auto", epochs=1)
    trainer = Trainer(toy_model(), config, toy_data(32), callbacks=[Allocates()]).fit()
    peak = torch.cuda.max_memory_allocated() / 2**20
    assert peak >= 64
    assert peak_memory_mb(trainer) == peak
    told = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert told[-1]["kind"] == "health"
    assert told[-1]["memory_reserved_mb"] >= told[-1]["memory_allocated_mb"]
    told = [line["memory_mb"] for line in told if line["kind"] == "train"]
    assert all(64 <= value <= math.ceil(peak * 10) / 10 for value in told)


def test_the_gauge_looks_at_the_device_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(toy_model(), toy_config(tmp_path, device="auto"), toy_data(8))
    now = [100.0]
    monkeypatch.setattr(figures, "time", SimpleNamespace(monotonic=lambda: now[0]))
    gauge = MemoryGauge()
    before = gauge.peak_mb(trainer)
    more = torch.zeros(int(before * 2**20) + 64 * 2**20, dtype=torch.uint8, device=GPU)
    assert gauge.peak_mb(trainer) == before
    now[0] += 1.0
    assert gauge.peak_mb(trainer) >= before + 64
    del more


# --- The detector ---------------------------------------------------------------------------------

WIDTH = 96


def detector(**settings: Any) -> RoadworkModel:
    torch.manual_seed(0)
    config = ModelConfig(width=64, heads=4, layers=1, dropout=0.0, metadata_dropout=0.0, **settings)
    return RoadworkModel(RoadworkHead(WIDTH, config, mask_head=True), None)


def losses_and_gradients(model: RoadworkModel, device: torch.device) -> tuple[dict[str, float], Tensor]:
    """Loss parts, and the norm of each parameter's gradient, in bf16 autocast."""
    task = RoadworkTask(
        RoadworkLoss(LossConfig(), with_masks=True, with_experts=model.head.config.experts > 0)
    )
    batch = send_to_device(random_batch(6, WIDTH), device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        sums = task(model.to(device).train(), batch).sums
    torch.stack([sums[part] for part in task.weights]).sum().backward()
    norms = torch.stack([p.grad.norm().cpu() for p in model.parameters() if p.grad is not None])
    assert len(norms) == len(list(model.parameters()))
    return {part: float(value) for part, value in sums.items()}, norms


# What compilers and their parts warn of is not this package's business.
@pytest.mark.filterwarnings("default")
def test_detector_forward_and_backward_compiled_and_not() -> None:
    # All views: a near tie between two scores may fall either way, and the losses with it.
    plain, plain_norms = losses_and_gradients(detector(prune_keep=1.0), GPU)
    on_cpu, _ = losses_and_gradients(detector(prune_keep=1.0), CPU)
    model = detector(prune_keep=1.0)
    model.compile()
    compiled, compiled_norms = losses_and_gradients(model, GPU)
    assert plain == pytest.approx(on_cpu, rel=0.05, abs=0.02)
    assert compiled == pytest.approx(plain, rel=0.05, abs=0.02)
    torch.testing.assert_close(compiled_norms.norm(), plain_norms.norm(), rtol=0.1, atol=1e-3)


@pytest.mark.parametrize(
    "settings", [{}, {"experts": 4}, {"kv_heads": 2}], ids=["default", "experts", "grouped"]
)
def test_every_part_of_the_detector_learns_on_the_gpu(settings: dict[str, Any]) -> None:
    losses, norms = losses_and_gradients(detector(**settings), GPU)
    assert all(math.isfinite(value) for value in losses.values())
    assert norms.isfinite().all()


class FeatureRows:
    """Rows of random features and metadata."""

    pure = True

    def __init__(self, rows: int) -> None:
        self.batch: dict[str, Any] = dict(random_batch(rows, WIDTH))

    def __len__(self) -> int:
        return len(self.batch["id"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: value[index] for name, value in self.batch.items()}


@pytest.mark.filterwarnings("default")
def test_the_detector_trains_compiled_in_bf16(tmp_path: Path) -> None:
    def fit(run_dir: Path, compile_mode: str) -> tuple[nn.Module, list[dict[str, Any]]]:
        config = toy_config(
            run_dir, device="auto", precision="bf16", compile=compile_mode, batch_size=8, accumulation=2
        )
        task = RoadworkTask(RoadworkLoss(LossConfig(), with_masks=True))
        model = detector(prune_keep=1.0)
        Trainer(model, config, FeatureRows(32), FeatureRows(8), task=task).fit()
        return model, [line for line in lines(run_dir) if line["kind"] == "train"]

    plain, plain_lines = fit(tmp_path / "plain", "off")
    compiled, compiled_lines = fit(tmp_path / "compiled", "default")
    assert [line["loss"] for line in compiled_lines] == pytest.approx(
        [line["loss"] for line in plain_lines], rel=0.1
    )
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    best = RoadworkModel.from_pretrained(tmp_path / "compiled" / "best")
    batch = random_batch(3, WIDTH)
    with torch.no_grad():
        assert best(batch).logits.isfinite().all()
