"""Values that are said twice are compared, and all that differ are told at once."""

import os
from pathlib import Path

import pytest
from support.engines import choose
from support.ranks import spawn
from support.toy import toy_config, toy_data, toy_model

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.trainer.config import OptimConfig, ScheduleConfig, TrainConfig
from roadwork_dist.trainer.engine.accelerator import build_accelerator
from roadwork_dist.trainer.engine.conflicts import check_agreement, of_deepspeed
from roadwork_dist.trainer.trainer import Trainer


def test_a_launcher_that_says_nothing_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("MIXED_PRECISION", "no"),
        ("DYNAMO_BACKEND", "NO"),
        ("GRADIENT_ACCUMULATION_STEPS", "1"),
    ):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    check_agreement(TrainConfig(precision="bf16", accumulation=4), build_accelerator(device="cpu"))


def test_everything_that_differs_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    with pytest.raises(ConfigError) as error:
        check_agreement(TrainConfig(precision="fp32", accumulation=2), build_accelerator(device="cpu"))
    text = str(error.value)
    assert "mixed_precision is 'bf16', the experiment's precision is 'fp32': write 'no' in the former" in text
    assert "dynamo_backend is 'inductor', the experiment's compile is 'off'" in text
    assert "gradient_accumulation_steps is '8', the experiment's accumulation is 2: write 1" in text


DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 32,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "train_batch_size": "auto",
    "bf16": {"enabled": "auto"},
}


def told(**changes: object) -> list[str]:
    config = TrainConfig(batch_size=32, accumulation=2, optim=OptimConfig(clip=1.0))
    return list(of_deepspeed(config, DEEPSPEED | changes, 2))


def test_deepspeed_may_repeat_the_experiment() -> None:
    assert told() == []
    assert told(train_batch_size=128) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, the experiment's optim.clip is 1.0"),
        ({"train_batch_size": 64}, "train_batch_size is 64, the experiment's batch_size x accumulation x 2"),
        ({"train_micro_batch_size_per_gpu": 8}, "the experiment's batch_size is 32"),
        ({"gradient_accumulation_steps": 3}, "the experiment's accumulation is 2"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is true, but weights stay in fp32"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is true"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer is 'Lamb', the experiment's optim.name is 'adamw'"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is 'WarmupLR', the experiment's schedule.name"),
    ],
)
def test_each_value_of_deepspeed(changes: dict[str, object], expected: str) -> None:
    assert len(told(**changes)) == 1
    assert expected in told(**changes)[0]


def start(run_dir: Path) -> None:
    choose("zero2")
    os.environ["ACCELERATE_GRADIENT_CLIPPING"] = "0.25"
    Trainer(toy_model(), toy_config(run_dir, schedule=ScheduleConfig(warmup_steps=1)), toy_data(32))


def test_a_real_start_is_refused_on_all_ranks(tmp_path: Path) -> None:
    exits = spawn(start, tmp_path, world_size=2)
    assert any("DeepSpeed's gradient_clipping is 0.25" in exit.error for exit in exits)
    assert all(exit.code for exit in exits)
