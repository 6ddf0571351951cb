"""Estimate the memory that training takes on each GPU, by engine.

The accounting of ZeRO (Rajbhandari et al., arXiv 1910.02054, §3) for the precision of this package:
trained weights, their gradients, both moments of AdamW and the average are fp32, so 4 + 4 + 8 + 4 = 20
bytes per parameter if nothing is sharded. Only autocast uses bf16; its copies of the weights live from
the forward to the backward pass.
"""

from dataclasses import dataclass
from typing import Literal, get_args

Engine = Literal["single", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"]
ENGINES: tuple[Engine, ...] = get_args(Engine)

WEIGHT = GRADIENT = AVERAGE = 4
MOMENTS = 8
COPY = 2
"""Bytes per parameter: fp32 weights, gradients and average, two fp32 moments, autocast's bf16 copy."""

BUCKET = 50_000_000
"""Elements that ZeRO reduces or fetches at once, as this package configures DeepSpeed."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The sizes of a training job that determine its memory and traffic.

    Attributes:
        trained: trained parameters.
        frozen: frozen parameters.
        frozen_bytes: bytes per frozen parameter: 2 for a backbone in bf16, 4 for the frozen part of a
            partly trained backbone.
        frozen_in_backward: gradients pass through frozen parameters (to trained adapters).
        units: parts that a sharded engine gathers one after the other (blocks).
        activations: bytes kept for the backward pass of a micro-batch on one GPU.
        workspace: bytes allocated temporarily within its forward pass.
        recomputes: activations are recomputed in the backward pass (gradient checkpointing), so
            autocast's copies of a unit are freed before the next unit is computed.
    """

    trained: int
    frozen: int = 0
    frozen_bytes: int = 2
    frozen_in_backward: bool = False
    units: int = 1
    activations: float = 0.0
    workspace: float = 0.0
    recomputes: bool = False


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU, and its share of the machine's memory.

    Attributes:
        weights: all parameters, including frozen ones.
        gradients: gradients of the trained parameters.
        moments: moments of AdamW.
        average: shadow weights of the moving average.
        buffers: copies by engine and autocast: buckets, gathered units, bf16 weights.
        activations: kept for the backward pass, plus workspace.
        host: offloaded to the machine's memory, per GPU.
    """

    weights: float
    gradients: float
    moments: float
    average: float
    buffers: float
    activations: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """Bytes on the GPU, without the 1 to 3 GB that CUDA, cuBLAS and NCCL allocate themselves."""
        state = self.weights + self.gradients + self.moments + self.average
        return state + self.buffers + self.activations


_SHARDED: dict[Engine, frozenset[str]] = {
    "single": frozenset(),
    "ddp": frozenset(),
    "zero1": frozenset({"state"}),
    "zero2": frozenset({"state", "gradients"}),
    "zero3": frozenset({"state", "gradients", "weights"}),
    "zero3_offload": frozenset({"state", "gradients", "weights"}),
    "fsdp2": frozenset({"state", "gradients", "weights"}),
}


def memory(job: Job, engine: Engine, ranks: int) -> Memory:
    """Bytes on each of ``ranks`` GPUs.

    - ``ddp``: nothing is sharded; buckets are a second copy of the gradients (torch's default,
      ``gradient_as_bucket_view=False``).
    - ``zero1``: moments and average in N parts, plus fp32 partitions of the weights that DeepSpeed keeps.
    - ``zero2``: gradients in N parts too, reduced bucket by bucket.
    - ``zero3``: weights in N parts too, including frozen ones; two units are whole at a time.
    - ``zero3_offload``: weights, gradients, moments and average are in the machine's memory.
    - ``fsdp2``: as ``zero3``, with one copy of the weights; gradients of one unit are whole at a time.

    Raises:
        ValueError: ``single`` with more than one rank.
    """
    if engine == "single" and ranks != 1:
        raise ValueError(f"engine single means one GPU, got {ranks}")
    is_zero = engine.startswith("zero")
    weights_in, gradients_in, state_in = (
        ranks if piece in _SHARDED[engine] else 1 for piece in ("weights", "gradients", "state")
    )
    weights = (WEIGHT * job.trained + job.frozen_bytes * job.frozen) / weights_in
    if is_zero:
        weights += WEIGHT * job.trained / ranks  # the optimizer's own copy, besides the one for computing
    gradients = GRADIENT * job.trained / gradients_in
    moments, average = MOMENTS * job.trained / state_in, AVERAGE * job.trained / state_in
    is_offloaded = engine == "zero3_offload"
    kept = 0 if is_offloaded else 1
    return Memory(
        weights=weights * kept,
        gradients=gradients * kept,
        moments=moments * kept,
        average=average * kept,
        buffers=_buffers(job, engine),
        activations=job.activations + job.workspace,
        host=weights + gradients + moments + average if is_offloaded else 0.0,
    )


def _buffers(job: Job, engine: Engine) -> float:
    """Temporary buffers and copies; the same for any number of ranks."""
    copies = COPY * job.trained / (job.units if job.recomputes else 1)
    if engine == "single":
        return copies
    if engine == "ddp":
        return copies + GRADIENT * job.trained
    gathered = 0.0
    if "weights" in _SHARDED[engine]:  # the current unit and the prefetched one
        gathered = 2 * (WEIGHT * job.trained + job.frozen_bytes * job.frozen) / job.units
    if engine == "fsdp2":
        return copies + gathered + GRADIENT * job.trained / job.units
    # One bucket is filled while the other is reduced.
    return copies + gathered + 2 * GRADIENT * min(job.trained, BUCKET)
