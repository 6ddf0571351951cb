"""Sizes of this project's training jobs: a detector on DINOv3 ViT-H+, 12 views of 512 px per photo."""

from collections.abc import Mapping
from dataclasses import dataclass

from roadwork_dist.detector.backbone.flops import VIT_H_PLUS, training_operations
from roadwork_dist.planning.memory import Engine, Job

VIEWS, SIDE = 12, 512
"""Views per photo, and their side in px."""

HEAD_PARAMETERS = 20_978_963
"""Parameters of the detector's head with its mask head, at the default settings."""
HEAD_OPERATIONS = 342_787_584
"""Operations of its forward pass for one photo."""
HEAD_ACTIVATIONS = 2_093_194
"""Bytes that it keeps per photo for the backward pass under bf16 autocast."""

LAST_BLOCKS = 2
ADAPTER_RANK = 16
ADAPTER_PARAMETERS = 4 * VIT_H_PLUS.blocks * VIT_H_PLUS.width * (2 * ADAPTER_RANK + 1)
"""DoRA on the four attention matrices of every block: each has two factors of rank r and a magnitude."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A training job of this project and how to run it.

    Attributes:
        title: what is trained.
        job: sizes for ``batch_size`` photos.
        batch_size: photos per micro-batch on one GPU.
        accumulation: micro-batches per optimizer step.
        operations: operations to train on one photo, including recomputation.
        engine: the fastest engine on GPUs of 80 GB, where it fits.
        sharded: an engine that takes less memory; None = nothing to gain.
        settings: command line settings; None = not in this version.
    """

    title: str
    job: Job
    batch_size: int
    accumulation: int
    operations: float
    engine: Engine
    sharded: Engine | None
    settings: str | None

    @property
    def step_operations(self) -> float:
        """Operations of an optimizer step on one GPU."""
        return self.operations * self.batch_size * self.accumulation


def _head(photos: int) -> float:
    return photos * HEAD_ACTIVATIONS


def _views(photos: int) -> int:
    return photos * VIEWS


_FORWARD = VIEWS * VIT_H_PLUS.forward_operations(SIDE)
_HEAD = training_operations(HEAD_OPERATIONS, 1.0)
_UNITS = VIT_H_PLUS.blocks + 1
_BLOCK = VIT_H_PLUS.block_parameters

PLANS: Mapping[str, Plan] = {
    "head, cached features": Plan(
        title="frozen backbone + head, features from the store",
        job=Job(trained=HEAD_PARAMETERS, activations=_head(32)),
        batch_size=32,
        accumulation=1,
        operations=_HEAD,
        engine="ddp",
        sharded=None,
        settings="--batch_size 32",
    ),
    "head, online features": Plan(
        title="frozen backbone + head, features computed in every step",
        job=Job(
            trained=HEAD_PARAMETERS,
            frozen=VIT_H_PLUS.parameters,
            units=_UNITS,
            activations=_head(32),
            workspace=_views(32) * VIT_H_PLUS.workspace_bytes(SIDE),
        ),
        batch_size=32,
        accumulation=1,
        operations=_FORWARD + _HEAD,
        engine="ddp",
        sharded=None,
        settings="--features.mode online --batch_size 32",
    ),
    "last blocks": Plan(
        title=f"last {LAST_BLOCKS} blocks of the backbone + head",
        job=Job(
            trained=HEAD_PARAMETERS + LAST_BLOCKS * _BLOCK,
            frozen=VIT_H_PLUS.parameters - LAST_BLOCKS * _BLOCK,
            frozen_bytes=4,  # a partly trained backbone is fp32 as a whole
            units=_UNITS,
            activations=_head(8) + _views(8) * VIT_H_PLUS.activation_bytes(SIDE, blocks=LAST_BLOCKS),
            workspace=_views(8) * VIT_H_PLUS.workspace_bytes(SIDE),
        ),
        batch_size=8,
        accumulation=4,
        operations=training_operations(_FORWARD, LAST_BLOCKS / VIT_H_PLUS.blocks) + _HEAD,
        engine="ddp",
        sharded="fsdp2",
        settings="--features.mode online --backbone.trainable last_n --backbone.last_n 2 "
        "--batch_size 8 --accumulation 4",
    ),
    "peft": Plan(
        title=f"adapters (DoRA, rank {ADAPTER_RANK}) on the backbone + head",
        job=Job(
            trained=HEAD_PARAMETERS + ADAPTER_PARAMETERS,
            frozen=VIT_H_PLUS.parameters,
            frozen_in_backward=True,
            units=_UNITS,
            activations=_head(8) + _views(8) * VIT_H_PLUS.activation_bytes(SIDE, recomputes=True),
            recomputes=True,
        ),
        batch_size=8,
        accumulation=4,
        operations=training_operations(_FORWARD, 1.0, weights_learn=False) + _FORWARD + _HEAD,
        engine="ddp",
        sharded="fsdp2",
        settings=None,
    ),
    "full": Plan(
        title="the whole backbone + head",
        job=Job(
            trained=HEAD_PARAMETERS + VIT_H_PLUS.parameters,
            units=_UNITS,
            activations=_head(8) + _views(8) * VIT_H_PLUS.activation_bytes(SIDE, recomputes=True),
            recomputes=True,
        ),
        batch_size=8,
        accumulation=4,
        operations=training_operations(_FORWARD, 1.0) + _FORWARD + _HEAD,
        engine="ddp",
        sharded="fsdp2",
        settings="--features.mode online --backbone.trainable all --backbone.gradient_checkpointing true "
        "--batch_size 8 --accumulation 4",
    ),
}
"""Plans by name."""
