"""Estimate the bytes sent between GPUs in an optimizer step and their minimum time, by engine.

This package gathers weights and reduces gradients in fp32; frozen weights are sent in their own dtype.
Rings: in an all-reduce of S bytes over N ranks each rank sends 2 (N-1)/N S, in a reduce-scatter or an
all-gather (N-1)/N S (Patarasuk and Yuan 2009; ZeRO, arXiv 1910.02054, §7).
"""

from dataclasses import dataclass
from typing import Literal

from roadwork_dist.planning.links import DGX_H100, Cluster
from roadwork_dist.planning.memory import BUCKET, GRADIENT, WEIGHT, Engine, Job

DDP_BUCKET = 25 * 2**20
"""Bytes that DistributedDataParallel reduces at once (its default ``bucket_cap_mb``)."""


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a step.

    Attributes:
        kind: operation.
        size: bytes of the whole (unsharded) data, summed over the collectives.
        messages: number of collectives.
    """

    kind: Literal["all_reduce", "all_gather", "reduce_scatter"]
    size: float
    messages: int

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends."""
        rounds = 2 if self.kind == "all_reduce" else 1
        return rounds * (ranks - 1) / ranks * self.size

    def seconds(self, ranks: int, cluster: Cluster) -> float:
        """Time at the links' published speeds; NCCL reaches 80 to 95 % of them on large messages.

        For an all-reduce NCCL uses a tree instead of a ring where the tree's latency is lower; gathering
        and scattering always use the ring.
        """
        latency = cluster.ring_latency(ranks)
        if self.kind == "all_reduce":
            latency = 2 * min(latency, cluster.tree_latency(ranks))
        return self.sent(ranks) / cluster.bandwidth(ranks) + self.messages * latency


def collectives(job: Job, engine: Engine, accumulation: int = 1) -> list[Collective]:
    """Collectives of an optimizer step of ``accumulation`` micro-batches.

    - ``ddp``: one all-reduce of the gradients, in the last backward pass.
    - ``zero1``: gradients reduced at the end of the step, updated weights gathered.
    - ``zero2``: gradients reduced in every backward pass, since no rank keeps them whole.
    - ``zero3``: as ``zero2``, and weights gathered for every forward and every backward pass.
    - ``fsdp2``: weights gathered as in ``zero3``; gradients accumulate unsharded and are reduced once.
    """
    gradients, weights = GRADIENT * job.trained, WEIGHT * job.trained
    frozen = job.frozen_bytes * job.frozen
    buckets = -(-job.trained // BUCKET)
    if engine == "single":
        return []
    if engine == "ddp":
        return [Collective("all_reduce", gradients, -(-gradients // DDP_BUCKET))]
    if engine in ("zero1", "zero2"):
        reductions = accumulation if engine == "zero2" else 1
        return [
            Collective("reduce_scatter", reductions * gradients, reductions * buckets),
            Collective("all_gather", weights, buckets),
        ]
    whole = 2 * weights + (2 if job.frozen_in_backward else 1) * frozen
    gathered = Collective("all_gather", accumulation * whole, 2 * accumulation * job.units)
    reductions = 1 if engine == "fsdp2" else accumulation
    return [gathered, Collective("reduce_scatter", reductions * gradients, reductions * job.units)]


def bytes_sent(job: Job, engine: Engine, ranks: int, accumulation: int = 1) -> float:
    """Bytes that each GPU sends to others in an optimizer step."""
    return sum(each.sent(ranks) for each in collectives(job, engine, accumulation))


def communication_seconds(
    job: Job, engine: Engine, ranks: int, accumulation: int = 1, cluster: Cluster = DGX_H100
) -> float:
    """Time of an optimizer step's traffic, if none of it overlaps with computing.

    With offload this includes each GPU's transfers of its own shard from and to the machine's memory.
    """
    seconds = sum(each.seconds(ranks, cluster) for each in collectives(job, engine, accumulation))
    if engine == "zero3_offload":
        weights = (2 * WEIGHT * job.trained + job.frozen_bytes * job.frozen) / ranks
        gradients = GRADIENT * job.trained / ranks
        seconds += accumulation * (weights + gradients) / cluster.host.bandwidth
    return seconds


def compute_seconds(operations: float, peak: float, utilisation: float = 0.4) -> float:
    """Compute time on one GPU.

    Args:
        operations: operations of the step on one GPU.
        peak: peak of the GPU in operations per second.
        utilisation: reached share of the peak (MFU); a run measures it as ``backbone_mfu``.
    """
    return operations / (peak * utilisation)


def efficiency(compute: float, communication: float, overlap: float = 0.0) -> float:
    """Share of a step spent computing.

    Args:
        compute: seconds.
        communication: seconds.
        overlap: share of computing that communication can overlap with: at most the backward pass, 2/3.
    """
    exposed = max(0.0, communication - overlap * compute)
    return compute / (compute + exposed) if compute else 0.0
