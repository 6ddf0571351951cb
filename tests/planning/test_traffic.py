"""Bytes and seconds of a step's traffic, against figures worked out by hand."""

import pytest

from roadwork_dist.planning.jobs import PLANS
from roadwork_dist.planning.links import DGX_H100, LINKS, Cluster
from roadwork_dist.planning.memory import ENGINES, Engine, Job
from roadwork_dist.planning.traffic import (
    Collective,
    bytes_sent,
    collectives,
    communication_seconds,
    compute_seconds,
    efficiency,
)

JOB = Job(trained=100_000_000, frozen=30_000_000, units=4)


def test_rings_send_what_is_known_of_them() -> None:
    assert Collective("all_reduce", 800, 1).sent(8) == 2 * 7 * 100
    assert Collective("all_gather", 800, 1).sent(8) == 7 * 100
    assert Collective("reduce_scatter", 800, 1).sent(1) == 0


# In units of 400 MB (100 M fp32) and 60 MB (30 M frozen in bf16), times 7/8.
@pytest.mark.parametrize(
    ("engine", "accumulation", "trained", "frozen"),
    [
        ("single", 1, 0, 0),
        ("ddp", 1, 2, 0),
        ("ddp", 4, 2, 0),  # accumulation costs nothing
        ("zero1", 4, 2, 0),
        ("zero2", 4, 5, 0),  # four reductions, one gathering
        ("zero3", 1, 3, 1),
        ("zero3", 4, 12, 4),
        ("fsdp2", 4, 9, 4),  # gathered eight times, reduced once
    ],
)
def test_bytes_by_hand(engine: Engine, accumulation: int, trained: int, frozen: int) -> None:
    expected = 7 / 8 * (trained * 400e6 + frozen * 60e6)
    assert bytes_sent(JOB, engine, 8, accumulation) == pytest.approx(expected)


def test_adapters_want_the_frozen_weights_twice() -> None:
    job = Job(trained=0, frozen=30_000_000, frozen_in_backward=True)
    assert bytes_sent(job, "fsdp2", 2) == 2 * 60e6 / 2


def test_a_machine_is_left_through_all_its_cards() -> None:
    assert DGX_H100.bandwidth(8) == 450e9
    assert DGX_H100.bandwidth(9) == 400e9  # eight cards of 400 Gb/s
    assert Cluster(cards=1).bandwidth(16) == 50e9
    assert [DGX_H100.nodes(ranks) for ranks in (1, 8, 9, 64, 1024)] == [1, 1, 2, 8, 128]
    # 64 ranks: 63 hops, 7 of them between machines. A tree of 8 machines is 3 deep.
    assert DGX_H100.ring_latency(64) == pytest.approx(56 * 1.9e-6 + 7 * 4e-6)
    assert DGX_H100.tree_latency(64) == pytest.approx(7 * 1.25e-6 + 3 * 8.5e-6)
    assert DGX_H100.ring_latency(1) == DGX_H100.tree_latency(1) == 0


def test_seconds_by_hand() -> None:
    # 7/4 x 400 MB at 450 GB/s, and 16 buckets of 25 MiB down and up a chain of 7 hops.
    expected = 7 / 4 * 400e6 / 450e9 + 16 * 2 * 7 * 1.25e-6
    assert communication_seconds(JOB, "ddp", 8) == pytest.approx(expected)
    # Weights gathered twice and frozen ones once: 8 messages; gradients scattered: 4; 7 hops each.
    expected = 7 / 8 * (3 * 400e6 + 60e6) / 450e9 + 12 * 7 * 1.9e-6
    assert communication_seconds(JOB, "fsdp2", 8) == pytest.approx(expected)
    host = (2 * 400e6 + 60e6 + 400e6) / 8 / 63e9
    added = communication_seconds(JOB, "zero3_offload", 8) - communication_seconds(JOB, "zero3", 8)
    assert added == pytest.approx(host)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_gpu_talks_to_nobody(engine: Engine) -> None:
    assert sum(each.seconds(1, DGX_H100) for each in collectives(JOB, engine)) == 0


def test_slower_links_take_longer() -> None:
    slow = Cluster(between=LINKS["Ethernet 25G"], cards=1)
    for engine in ENGINES[1:]:
        fast = communication_seconds(JOB, engine, 64)
        assert communication_seconds(JOB, engine, 64, cluster=slow) > 10 * fast


def test_computing_hides_talking() -> None:
    assert compute_seconds(400e12, 1000e12, 0.4) == 1.0
    assert efficiency(1.0, 0.25) == 0.8
    assert efficiency(1.0, 0.5, overlap=2 / 3) == 1.0
    assert efficiency(1.0, 1.0, overlap=0.5) == pytest.approx(2 / 3)


def test_a_photo_is_what_the_specification_says() -> None:
    online = PLANS["head, online features"]
    assert online.operations / 1e12 == pytest.approx(22.8, abs=0.05)
    assert online.step_operations == 32 * online.operations
