"""Engines as a launcher asks for them: through environment variables, with real processes over gloo."""

import os
from typing import Any

ENVIRONMENTS: dict[str, dict[str, str]] = {
    "ddp": {},
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
    },
    **{
        f"zero{stage}": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
        for stage in (1, 2, 3)
    },
}
OFFLOAD = {
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu",
}
ENVIRONMENTS["zero2_offload"] = ENVIRONMENTS["zero2"] | {
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"
}
ENVIRONMENTS["zero3_offload"] = ENVIRONMENTS["zero3"] | OFFLOAD
SHARDED = [name for name in ENVIRONMENTS if name != "ddp"]


def choose(engine: str) -> None:
    """Set the environment of this process as ``accelerate launch`` would."""
    os.environ.update(ENVIRONMENTS[engine])


def train_with(engine: str, train: Any, *arguments: Any) -> Any:
    """Call ``train(*arguments)`` under an engine; for :func:`support.ranks.run`."""
    choose(engine)
    return train(*arguments)
