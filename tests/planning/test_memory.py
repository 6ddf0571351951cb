"""Memory on paper, against hand-worked figures and against real tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.ranks import run
from support.toy import toy_model
from torch import Tensor, nn

from roadwork_dist.config.experiment import BackboneConfig, ModelConfig
from roadwork_dist.detector.backbone import build_random
from roadwork_dist.detector.backbone.flops import VIT_H_PLUS, VisionTransformer, count_operations
from roadwork_dist.detector.detector import RoadworkHead
from roadwork_dist.planning.jobs import HEAD_ACTIVATIONS, HEAD_OPERATIONS, HEAD_PARAMETERS, PLANS, VIEWS
from roadwork_dist.planning.memory import ENGINES, Engine, Job, memory
from roadwork_dist.trainer.config import EmaConfig
from roadwork_dist.trainer.optim.ema import ExponentialMovingAverage

JOB = Job(trained=80_000_000, frozen=40_000_000, frozen_bytes=2, units=10, activations=1e9, workspace=5e8)


# By hand, in MB. 80 M x 4 bytes = 320; frozen 80; a unit is (320 + 80) / 10 = 40; bf16 copies 160;
# two buckets of 50 M x 4 bytes = 400.
@pytest.mark.parametrize(
    ("engine", "ranks", "weights", "gradients", "moments", "average", "buffers"),
    [
        ("single", 1, 400, 320, 640, 320, 160),
        ("ddp", 8, 400, 320, 640, 320, 160 + 320),
        ("zero1", 8, 400 + 40, 320, 80, 40, 160 + 400),
        ("zero2", 8, 400 + 40, 40, 80, 40, 160 + 400),
        ("zero3", 8, 50 + 40, 40, 80, 40, 160 + 80 + 400),
        ("zero3_offload", 8, 0, 0, 0, 0, 160 + 80 + 400),
        ("fsdp2", 8, 50, 40, 80, 40, 160 + 80 + 32),
    ],
)
def test_parts_by_hand(
    engine: Engine, ranks: int, weights: int, gradients: int, moments: int, average: int, buffers: int
) -> None:
    found = memory(JOB, engine, ranks)
    got = (found.weights, found.gradients, found.moments, found.average, found.buffers)
    assert [value / 1e6 for value in got] == [weights, gradients, moments, average, buffers]
    assert found.activations == 1.5e9
    assert found.total == sum(got) + 1.5e9
    assert found.host == (250e6 if engine == "zero3_offload" else 0)


def test_zero_shards_what_the_paper_says() -> None:
    # arXiv 1910.02054, §3, with K = 16 (fp32 weights, two moments, average) and fp32 in place of fp16:
    # stage 3 needs (4 + 4 + K) / N bytes a parameter, stage 1 (4 + 4 + K / N).
    job = Job(trained=64_000_000)
    for ranks in (1, 8, 64):
        parts = [memory(job, engine, ranks) for engine in ("zero1", "zero2", "zero3")]
        bytes_each = [(p.weights + p.gradients + p.moments + p.average) / job.trained for p in parts]
        assert bytes_each == [8 + 16 / ranks, 4 + 20 / ranks, 24 / ranks]


def test_recomputing_keeps_the_copies_of_one_unit() -> None:
    job = Job(trained=10_000_000, units=10, recomputes=True)
    assert memory(job, "single", 1).buffers == 2_000_000


def test_one_process_is_one_gpu() -> None:
    with pytest.raises(ValueError, match="single means one GPU, got 8"):
        memory(JOB, "single", 8)


def nbytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def moments_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [t for state in optimizer.state.values() for key, t in state.items() if key != "step"]


def test_one_process_holds_what_is_on_paper() -> None:
    model = toy_model()
    average = ExponentialMovingAverage(dict(model.named_parameters()), EmaConfig())
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    expected = memory(Job(trained=sum(p.numel() for p in model.parameters())), "single", 1)
    assert nbytes(model.parameters()) == expected.weights
    assert nbytes(p.grad for p in model.parameters()) == expected.gradients
    assert nbytes(moments_of(optimizer)) == expected.moments
    assert nbytes(average.shadow().values()) == expected.average


def shards() -> tuple[int, int, int]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 32)).sum().backward()
    optimizer.step()
    local: Callable[[Any], Tensor] = lambda t: t.to_local()  # noqa: E731
    return (
        nbytes(map(local, model.parameters())),
        nbytes(local(p.grad) for p in model.parameters()),
        nbytes(map(local, moments_of(optimizer))),
    )


def test_two_processes_hold_the_shards_that_are_on_paper() -> None:
    expected = memory(Job(trained=32 * 64 + 64 + 64 * 32 + 32), "fsdp2", 2)
    for found in run(shards, world_size=2):
        assert found == (expected.weights, expected.gradients, expected.moments)


def saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that autograd keeps of a forward pass, each storage once, without weights and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # or another tensor might get its address
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        forward()
    return sum(storages.values())


@pytest.mark.parametrize(("name", "gated"), [("dinov3_vits16plus", True), ("dinov3_vits16", False)])
def test_activations_are_what_autograd_keeps(name: str, gated: bool) -> None:
    backbone = build_random(name, device=torch.device("cpu"), dtype=torch.float32, attention="sdpa")
    backbone.apply_config(BackboneConfig(trainable="all", dtype="fp32"), torch.device("cpu")).train()
    weights = sum(p.numel() for p in backbone.parameters())
    one, two = (
        saved_bytes(backbone, lambda n=n: backbone(torch.zeros(n, 3, 64, 64, dtype=torch.uint8)))
        for n in (1, 2)
    )
    size = VisionTransformer(
        width=384, blocks=12, hidden=1536, gated=gated, patch=16, extra_tokens=5, parameters=weights
    )
    # The rest are statistics of norms and attention: a few fp32 numbers a token.
    assert two - one == pytest.approx(size.activation_bytes(64), rel=0.03)
    assert 2 * one - two == pytest.approx(2 * weights, rel=0.02)  # autocast's bf16 copies of the weights


def test_the_block_of_the_large_backbone() -> None:
    # 4 x 1280² of attention and 3 x 1280 x 5120 of the gated part; times 32 nearly all there is.
    assert VIT_H_PLUS.block_parameters == 26_214_400
    assert VIT_H_PLUS.block_parameters * 32 / VIT_H_PLUS.parameters == pytest.approx(0.998, abs=0.001)
    # 1,029 tokens x (32 x 1280 + 8 x 5120) bytes a block
    assert VIT_H_PLUS.activation_bytes(512, blocks=1) == 1029 * 81_920
    assert VIT_H_PLUS.activation_bytes(512, recomputes=True) == 1029 * (32 * 4 * 1280 + 81_920)


def head_inputs(photos: int) -> tuple[Tensor, Tensor, Any]:
    mask = torch.ones(photos, VIEWS, dtype=torch.bool)
    known = torch.zeros(photos, dtype=torch.bool)
    words = dict.fromkeys(("weather", "daytime", "scene"), torch.zeros(photos, dtype=torch.int64))
    batch = {"view_mask": mask, "gps": torch.zeros(photos, 2), "gps_known": known, **words}
    batch |= {"text": torch.zeros(photos, 384), "text_known": known}
    return torch.randn(photos, VIEWS, 1280), mask, batch


def test_the_head_is_as_large_as_it_is_written_down() -> None:
    head = RoadworkHead(1280, ModelConfig(), mask_head=True)
    assert sum(p.numel() for p in head.parameters()) == HEAD_PARAMETERS
    assert count_operations(lambda: head(*head_inputs(1))) == HEAD_OPERATIONS
    two, four = (saved_bytes(head, lambda n=n: head(*head_inputs(n))) for n in (2, 4))
    assert (four - two) / 2 == pytest.approx(HEAD_ACTIVATIONS, rel=0.02)


@pytest.mark.parametrize("name", sorted(PLANS))
def test_every_plan_fits_an_80_gb_card(name: str) -> None:
    plan = PLANS[name]
    for ranks in (1, 8, 64):
        for engine in ENGINES:
            if engine != "single" or ranks == 1:
                assert memory(plan.job, engine, ranks).total < 75e9
        # DDP fits, and is the fastest.
    assert plan.engine == "ddp"
