"""Checks that the launcher, DeepSpeed's configuration and the experiment agree on shared settings."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.trainer.config import TrainConfig

_FREE = (None, "", "auto", "none", "no")
"""Values that leave a setting to the experiment (``no`` is the launcher's default precision)."""


def check_agreement(config: TrainConfig, accelerator: Accelerator) -> None:
    """Compare every setting that is given twice.

    Raises:
        ConfigError: some differ; lists all of them, with both values and which to change.
    """
    found = list(_of_launcher(config, os.environ))
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # Accelerate has put the launcher's values into it; its own additions agree with ours.
        deepspeed = accelerator.state.deepspeed_plugin.deepspeed_config
        found += of_deepspeed(config, deepspeed, accelerator.num_processes)
    if found:
        raise ConfigError(
            "the launcher's configuration and the experiment's disagree:\n"
            + "\n".join(f"  - {each}" for each in found)
        )


def _of_launcher(config: TrainConfig, environment: Mapping[str, str]) -> Iterator[str]:
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in (*_FREE, config.precision):
        yield _line("mixed_precision", precision, "precision", config.precision, "'no'")
    compiler = environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if compiler not in _FREE:
        yield _line("dynamo_backend", compiler, "compile", config.compile, "'no'")
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false") != "true":
        steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
        if steps not in (*_FREE, "1", str(config.accumulation)):
            yield _line("gradient_accumulation_steps", steps, "accumulation", config.accumulation, "1")


def of_deepspeed(config: TrainConfig, deepspeed: Mapping[str, Any], processes: int) -> Iterator[str]:
    """Differences between DeepSpeed's configuration and the experiment, one line each."""
    ours = {
        "train_micro_batch_size_per_gpu": ("batch_size", config.batch_size),
        "gradient_accumulation_steps": ("accumulation", config.accumulation),
        "gradient_clipping": ("optim.clip", config.optim.clip),
        "train_batch_size": (
            f"batch_size x accumulation x {processes} processes",
            config.batch_size * config.accumulation * processes,
        ),
    }
    for key, (setting, value) in ours.items():
        theirs = deepspeed.get(key)
        if theirs not in _FREE and float(theirs) != float(value):
            yield _line(f"DeepSpeed's {key}", theirs, setting, value, "'auto'")
    for kind in ("fp16", "bf16"):
        if deepspeed.get(kind, {}).get("enabled") is True:
            yield (
                f"DeepSpeed's {kind}.enabled is true, but weights stay in fp32 here and precision is "
                f"{config.precision!r}: write 'auto' in the former, and use --precision bf16"
            )
    for kind in ("optimizer", "scheduler"):
        if kind in deepspeed:
            setting = "optim" if kind == "optimizer" else "schedule"
            yield (
                f"DeepSpeed's {kind} is {deepspeed[kind].get('type')!r}, the experiment's {setting}.name is "
                f"{getattr(config, setting).name!r}: remove the former"
            )


def _line(theirs: str, their_value: object, ours: str, our_value: object, neutral: str) -> str:
    return (
        f"{theirs} is {their_value!r}, the experiment's {ours} is {our_value!r}: write {neutral} in the "
        "former, or change the latter"
    )
