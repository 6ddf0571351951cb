import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from roadwork_dist.common.errors import CheckpointError, DataError
from roadwork_dist.config.batch import DAYTIME, SCENE, TEXT_WIDTH, WEATHER, Batch, ModelOutput
from roadwork_dist.config.experiment import ModelConfig
from roadwork_dist.detector.detector import RoadworkHead, RoadworkModel
from roadwork_dist.detector.pretrained import read_config

D = 24
CONFIGS = {
    "default": ModelConfig(width=64, layers=2),
    "experts": ModelConfig(width=64, layers=2, experts=4),
    "grouped heads": ModelConfig(width=64, layers=1, kv_heads=2, gate=False),
    "no pruning": ModelConfig(width=64, layers=1, prune_keep=1.0),
    "mean of views": ModelConfig(width=64, layers=1, view_fusion=False, pyramid=False),
    "no metadata": ModelConfig(width=64, layers=0, metadata=False),
}


def _head(name: str, *, mask_head: bool = True) -> RoadworkHead:
    torch.manual_seed(0)
    return RoadworkHead(D, CONFIGS[name], mask_head=mask_head)


def _batch(counts: list[int], *, views: int | None = None, nulls: int = 0b00000) -> Batch:
    """Random rows with so many views each; bit i of ``nulls`` makes field i null in every row."""
    rows, views = len(counts), views or max(counts)
    null = [bool(nulls >> i & 1) for i in range(5)]

    def word(words: tuple[str, ...], absent: bool) -> Tensor:
        return torch.randint(len(words), (rows,)) if not absent else torch.full((rows,), len(words))

    mask = torch.arange(views) < torch.tensor(counts).unsqueeze(1)
    return {
        "features": torch.randn(rows, views, D) * mask.unsqueeze(-1),
        "view_mask": mask,
        "gps": torch.rand(rows, 2) * 90 * (not null[0]),
        "gps_known": torch.full((rows,), not null[0]),
        "weather": word(WEATHER, null[1]),
        "daytime": word(DAYTIME, null[2]),
        "scene": word(SCENE, null[3]),
        "text": torch.randn(rows, TEXT_WIDTH) * (not null[4]),
        "text_known": torch.full((rows,), not null[4]),
    }


def _tensors(output: ModelOutput) -> dict[str, Tensor]:
    return {name: value for name, value in output._asdict().items() if value is not None}


def _total(output: ModelOutput) -> Tensor:
    """Sum of all differentiable outputs, squared so that no gradient is constant."""
    return torch.stack([t.square().sum() for t in _tensors(output).values() if t.requires_grad]).sum()


def test_shapes_of_the_default_head() -> None:
    head = RoadworkHead(1280, ModelConfig(), mask_head=True).eval()
    batch = _batch([12, 1])
    out = head(torch.randn(2, 12, 1280), batch["view_mask"], batch)
    shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(out).items()}
    assert shapes == {
        "logits": (2, 2),
        "view_logits": (2, 8, 2),
        "view_mask": (2, 8),
        "weather_logits": (2, 7),
        "mask_logits": (2, 6, 64, 64),
        "view_gates": (2, 12),
        "kept": (2, 8),
        "fused": (2, 512),
        "balance": (2,),
    }
    assert out.view_mask.sum(dim=1).tolist() == [8, 1]
    assert sum(p.numel() for p in head.parameters()) == 20_978_963


@pytest.mark.parametrize("name", CONFIGS)
@settings(deadline=None, max_examples=8)
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    extra=st.integers(0, 3),
    garbage=st.sampled_from([0.0, 1e30, torch.nan]),
)
def test_a_row_does_not_depend_on_padding_or_on_other_rows(
    name: str, counts: list[int], extra: int, garbage: float
) -> None:
    head = _head(name).double().eval()
    batch = _batch(counts, views=max(counts) + extra)
    features = batch["features"].double().masked_fill(~batch["view_mask"].unsqueeze(-1), garbage)
    together = head(features, batch["view_mask"], batch)
    for row, n in enumerate(counts):
        alone: Batch = {k: v[row : row + 1] for k, v in batch.items()}
        out = head(features[row : row + 1, :n], torch.ones(1, n, dtype=torch.bool), alone)
        for field in ("logits", "weather_logits", "mask_logits", "fused", "balance"):
            torch.testing.assert_close(getattr(together, field)[row], getattr(out, field)[0])
        real = together.view_mask[row]
        torch.testing.assert_close(together.view_logits[row, real], out.view_logits[0])
        assert torch.equal(together.kept[row, real], out.kept[0])
        torch.testing.assert_close(together.view_gates[row, :n], out.view_gates[0])
        assert not together.view_gates[row, n:].any()


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
@settings(deadline=None, max_examples=12)
@given(nulls=st.integers(0, 31), counts=st.lists(st.integers(1, 12), min_size=1, max_size=3))
def test_no_metadata_mix_gives_nan(precision: str, nulls: int, counts: list[int]) -> None:
    head, batch = _head("experts").train(), _batch(counts, nulls=nulls)
    if precision == "bf16":
        head = head.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
        out = head(batch["features"], batch["view_mask"], batch)
    _total(out).backward()
    assert all(t.isfinite().all() for t in _tensors(out).values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert out.logits.dtype == torch.float32


@pytest.mark.parametrize("nulls", [0b00000, 0b11111])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("mask_head", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_gets_a_gradient(name: str, mask_head: bool, mode: str, nulls: int) -> None:
    """What data parallel training without a search for unused parameters needs."""
    model = RoadworkModel(_head(name, mask_head=mask_head), None).train(mode == "train")
    out = model(_batch([1], nulls=nulls))
    _total(out).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert (out.mask_logits is None) != mask_head


def test_every_part_learns() -> None:
    """After one step away from the start (where the view gates are all ½) no gradient is zero."""
    model = RoadworkModel(_head("experts"), None)
    batch = _batch([12, 7, 3])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        _total(model(batch)).backward()
        optimizer.step()
    still = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # Every row's metadata is known and the draw dropped neither field in all rows, or its null learns.
    assert still <= {"head.metadata.gps_null", "head.metadata.text_null"}


@pytest.mark.parametrize("name", CONFIGS)
def test_no_parameter_is_left_uninitialised(name: str) -> None:
    head = _head(name)
    built = {n: p.clone() for n, p in head.named_parameters()}
    for parameter in head.parameters():
        nn.init.constant_(parameter, torch.nan)
    torch.manual_seed(0)
    head.reset_parameters()
    for n, parameter in head.named_parameters():
        assert parameter.isfinite().all(), n
        if parameter.numel() > 200 and parameter.any():  # else the spread is too uncertain
            expected = built[n].std().item()
            assert parameter.std().item() == pytest.approx(expected, rel=0.3), n


def test_nothing_is_read_from_fresh_memory() -> None:
    torch.use_deterministic_algorithms(True)  # torch.empty then gives NaN
    try:
        assert torch.empty(1).isnan()
        head = _head("experts")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(p.isfinite().all() for p in head.parameters())


def test_gates_belong_to_kept_views_only() -> None:
    out = _head("default").eval()((batch := _batch([12, 5]))["features"], batch["view_mask"], batch)
    for row in range(2):
        kept = set(out.kept[row, out.view_mask[row]].tolist())
        assert {v for v in range(12) if out.view_gates[row, v] > 0} == kept
    assert len(kept) == 3  # ⌊0.67 · 5⌋
    mean = _head("mean of views").eval()(batch["features"], batch["view_mask"], batch)
    assert set(mean.view_gates.unique().tolist()) == {0.0, 1.0}


def test_weather_and_masks_are_read_from_vision_only() -> None:
    head, batch = _head("default").eval(), _batch([4])
    other: Batch = {**_batch([4]), "features": batch["features"]}
    a, b = (head(m["features"], m["view_mask"], m) for m in (batch, other))
    assert torch.equal(a.weather_logits, b.weather_logits)
    assert torch.equal(a.mask_logits, b.mask_logits)
    assert not torch.equal(a.logits, b.logits)


def test_compiles_whole_and_once_whatever_the_ids() -> None:
    counter = CompileCounter()
    model = RoadworkModel(_head("experts"), None).eval()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    batches: list[Batch] = [{**_batch([12, 5]), "id": [f"{i}-a", f"{i}-b"]} for i in range(2)]
    for batch in batches:
        torch.testing.assert_close(compiled(batch).logits, model(batch).logits)
    assert counter.frame_count == 1
    torch._dynamo.reset()


class _Backbone(nn.Module):
    """A synthetic backbone whose output depends on its mode: batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(3, D)
        self.seen = 0

    def forward(self, views: Tensor) -> Tensor:
        assert views.dtype == torch.uint8
        self.seen += views.shape[0]
        out: Tensor = self.linear(self.drop(self.norm(views.float() / 255)).mean(dim=(2, 3)))
        return out


def _with_views(counts: list[int]) -> Batch:
    batch = _batch(counts)
    del batch["features"]
    batch["views"] = torch.randint(256, (*batch["view_mask"].shape, 3, 8, 8), dtype=torch.uint8)
    return batch


def test_frozen_backbone_stays_in_eval_mode_and_sees_real_views_only() -> None:
    backbone = _Backbone().requires_grad_(False)
    model = RoadworkModel(_head("default"), backbone).train()
    assert model.head.training
    assert not any(m.training for m in backbone.modules())
    before = {n: t.clone() for n, t in backbone.state_dict().items()}
    batch = _with_views([4, 2, 1])
    features = model.features(batch["views"], batch["view_mask"])
    model(batch)
    assert all(torch.equal(before[n], t) for n, t in backbone.state_dict().items())
    assert backbone.seen == 2 * 7
    assert not features[~batch["view_mask"]].any()
    torch.testing.assert_close(features[1, 1], backbone(batch["views"][1, 1:2])[0])
    without = {k: v for k, v in batch.items() if k != "views"}
    from_features = model.eval()({**without, "features": features})
    assert torch.equal(from_features.logits, model(batch).logits)


def test_trainable_backbone_learns_and_follows_the_mode() -> None:
    model = RoadworkModel(_head("default"), _Backbone()).train()
    assert model.backbone is not None
    assert model.backbone.training
    _total(model(_with_views([4, 2]))).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.backbone.parameters())
    assert not model.eval().backbone.training


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"view_mask": torch.ones(1, 1, dtype=torch.bool)}, "neither features nor views"),
        (_with_views([2]), "no backbone"),
        ({**_batch([2]), "features": torch.randn(1, 2, D + 1)}, rf"expected \[batch, views, {D}\]"),
        ({**_batch([2]), "view_mask": torch.ones(1, 3, dtype=torch.bool)}, r"view_mask has shape \(1, 3\)"),
    ],
)
def test_batches_that_do_not_fit(batch: Batch, message: str) -> None:
    with pytest.raises(DataError, match=message):
        RoadworkModel(_head("default"), None)(batch)


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded_is_the_same(name: str, tmp_path: Path) -> None:
    backbone = _Backbone().requires_grad_(False)
    model = RoadworkModel(_head(name, mask_head=name != "experts"), backbone).eval()
    identity, extra = {"name": "synthetic", "sha256": "0"}, {"step": 3}
    model.save_pretrained(tmp_path / "best", backbone_identity=identity, extra=extra)
    again = RoadworkModel.from_pretrained(tmp_path / "best", backbone=backbone)
    batch = _with_views([12, 3])
    for a, b in zip(_tensors(model(batch)).values(), _tensors(again(batch)).values(), strict=True):
        assert torch.equal(a, b)
    config = read_config(tmp_path / "best")
    assert (config.backbone, config.extra, config.model) == (identity, extra, CONFIGS[name])
    assert not again.training
    head_only = sum(p.numel() for p in model.head.parameters()) * 4
    assert (tmp_path / "best" / "model.safetensors").stat().st_size < head_only + 20_000


def test_what_was_trained_of_a_backbone_is_saved_with_the_head(tmp_path: Path) -> None:
    trained = _Backbone()
    trained.linear.requires_grad_(False)
    nn.init.constant_(trained.norm.weight, 3.0)
    trained.norm.running_mean += 1.0
    model = RoadworkModel(_head("default"), trained)
    model.save_pretrained(tmp_path, backbone_identity={"name": "synthetic"}, extra={})
    fresh = _Backbone()
    RoadworkModel.from_pretrained(tmp_path, backbone=fresh)
    assert torch.equal(fresh.norm.weight, trained.norm.weight)
    assert torch.equal(fresh.norm.running_mean, trained.norm.running_mean)
    assert not torch.equal(fresh.linear.weight, trained.linear.weight)
    with pytest.raises(CheckpointError, match="give from_pretrained the backbone 'synthetic'"):
        RoadworkModel.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="do not fit the backbone"):
        RoadworkModel.from_pretrained(tmp_path, backbone=nn.Linear(1, 1))


def test_folders_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        RoadworkModel.from_pretrained(tmp_path / "nowhere")
    model = RoadworkModel(_head("default"), None)
    model.save_pretrained(tmp_path, backbone_identity={}, extra={})
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    good = config.read_text()

    config.write_text(json.dumps({**json.loads(good), "format": 2}))
    with pytest.raises(CheckpointError, match="format 2, expected 1"):
        RoadworkModel.from_pretrained(tmp_path)
    config.write_text(good[: len(good) // 2])
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        RoadworkModel.from_pretrained(tmp_path)
    config.write_text(json.dumps({**json.loads(good), "mask_head": False}))
    with pytest.raises(CheckpointError, match="do not fit the model"):
        RoadworkModel.from_pretrained(tmp_path)
    config.write_text(good)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        RoadworkModel.from_pretrained(tmp_path)

    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        model.save_pretrained(tmp_path / "file", backbone_identity={}, extra={})
