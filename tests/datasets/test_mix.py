"""Mixing of photos against naive loops, and the choice of partners."""

import io
from collections import Counter
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from roadwork_dist.common.errors import DataError
from roadwork_dist.config.batch import MASK_CLASSES, MASK_SIDE, UNLABELLED
from roadwork_dist.config.experiment import AugmentConfig, ExperimentConfig
from roadwork_dist.datasets.dataset import collate
from roadwork_dist.datasets.mix import MixedRows, cutmix_features, cutmix_views, draw_box, mixup
from roadwork_dist.datasets.streamed import StreamedDataset
from roadwork_dist.photos.augment import Augmenter
from roadwork_dist.photos.images import BytesImage
from roadwork_dist.photos.manifest import Manifest, Sample
from roadwork_dist.photos.photo import PhotoViews
from roadwork_dist.photos.views import ViewGeometry
from roadwork_dist.recipes.data import training_rows
from roadwork_dist.trainer.feed.loader import load_batches

SIDE = 96  # not a multiple of MASK_SIDE: a box may end inside a cell


def photo(
    seed: int, label: int, *, views: int = 3, cached: bool = False, mask: bool = True
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    row: dict[str, Any] = {"id": f"photo-{seed}", "index": seed, "label": label, "weather": seed % 3}
    if cached:
        row["features"] = torch.randn(views, 5, generator=g).bfloat16()
    else:
        row["views"] = torch.randint(0, 256, (views, 3, SIDE, SIDE), generator=g, dtype=torch.uint8)
    known = torch.rand(len(MASK_CLASSES), MASK_SIDE, MASK_SIDE, generator=g)
    return row | {"mask": known * mask, "mask_known": mask}


class Photos:
    """Rows like those of a data set: pure functions of (epoch, row)."""

    pure = True

    def __init__(self, labels: list[int], views: list[int] | None = None, **kind: bool) -> None:
        self.labels, self.views, self.kind, self.epoch = labels, views or [3] * len(labels), kind, 0
        self.broken: set[int] = set()

    def __len__(self) -> int:
        return len(self.labels)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def sample_id(self, row: int) -> str:
        return f"photo-{row}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.broken:
            raise DataError(f"{index}.jpg: is no picture")
        return photo(index, self.labels[index], views=self.views[index], **self.kind)


def jpeg(colour: tuple[int, int, int]) -> bytes:
    """A photo of one view."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(file, "JPEG")
    return file.getvalue()


def mixed(
    photos: Photos, mix: str = "mixup", *, seed: int = 1, weights: Any = None, **more: Any
) -> MixedRows:
    config = AugmentConfig(mix=mix, **more)  # type: ignore[arg-type]
    return MixedRows(photos, photos.labels, config, seed=seed, weights=weights)


def is_mixed(rows: MixedRows, index: int) -> bool:
    kind = "views" if "views" in rows[index] else "features"
    return not torch.equal(rows[index][kind], rows.dataset[index][kind])


def partner_of(rows: MixedRows, index: int) -> int | None:
    """Whose views stand in a row that exchanged views (CutMix of features), as far as they do."""
    row, own = rows[index], rows.dataset[index]["features"]
    changed = [view for view in range(len(own)) if not torch.equal(row["features"][view], own[view])]
    for other in range(len(rows)) if changed else ():
        if torch.equal(rows.dataset[other]["features"][changed[0]], row["features"][changed[0]]):
            return other
    return None


@pytest.mark.parametrize("keep", [0.5, 0.73, 1.0])
def test_mixup_blends_pixels_labels_and_masks(keep: float) -> None:
    row, partner = photo(0, 1), photo(1, 0)
    result = mixup(row, partner, keep)
    naive = np.rint(keep * row["views"].double().numpy() + (1 - keep) * partner["views"].double().numpy())
    assert np.abs(result["views"].numpy() - naive).max() <= 1  # float32 may round a half the other way
    assert (result["views"].numpy() != naive).mean() < 0.01
    assert result["views"].dtype == torch.uint8
    assert result["soft_label"].item() == pytest.approx(keep)
    torch.testing.assert_close(result["mask"], keep * row["mask"] + (1 - keep) * partner["mask"])
    assert result["mask_known"] is True
    assert mixup(row, photo(1, 0, mask=False), keep)["mask_known"] is False
    assert mixup(photo(1, 1, mask=False), row, keep)["mask_known"] is False


def test_mixup_of_features_is_computed_in_float32() -> None:
    row, partner = photo(0, 0, cached=True), photo(1, 1, cached=True)
    result = mixup(row, partner, 0.7)
    exact = 0.7 * row["features"].double() + 0.3 * partner["features"].double()
    assert torch.equal(result["features"], exact.bfloat16())
    assert result["soft_label"].item() == pytest.approx(0.3)
    assert "views_of_two" not in result  # every view is of both photos


@settings(max_examples=40, deadline=None)
@given(keep=st.floats(0.5, 1.0), seed=st.integers(0, 99))
def test_cutmix_pastes_one_box_and_goes_by_its_area(keep: float, seed: int) -> None:
    row, partner = photo(0, 1), photo(1, 0)
    untouched = row["views"].clone()
    top, bottom, left, right = draw_box(SIDE, keep, np.random.default_rng(seed))
    result = cutmix_views(row, partner, keep, np.random.default_rng(seed))
    inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    for y in range(top, bottom):
        for x in range(left, right):
            inside[y, x] = True
    assert torch.equal(result["views"], torch.where(inside, partner["views"], row["views"]))
    area = inside.double().mean().item()
    assert result["soft_label"].item() == pytest.approx(1 - area)
    assert area <= 1 - keep + 1e-9  # smaller where the box was clipped
    # A cell of the mask is made of 1.5 x 1.5 px: counted in thirds of a pixel, each is 4.5 of them.
    finer = inside.repeat_interleave(2, 0).repeat_interleave(2, 1).double()  # 192 x 192 = 64 x 3
    share = finer.unflatten(0, (MASK_SIDE, 3)).unflatten(2, (MASK_SIDE, 3)).mean((1, 3)).float()
    torch.testing.assert_close(result["mask"], share * partner["mask"] + (1 - share) * row["mask"])
    assert torch.equal(row["views"], untouched)


def test_boxes_have_the_size_of_the_paper_and_reach_every_edge() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([draw_box(SIDE, 0.75, rng) for _ in range(400)])
    heights, widths = boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]
    assert heights.max() == widths.max() == SIDE // 2  # sqrt(1 - 0.75)
    assert boxes[:, [0, 2]].min(0).tolist() == [0, 0]
    assert boxes[:, [1, 3]].max(0).tolist() == [SIDE, SIDE]
    assert (heights < SIDE // 2).mean() == pytest.approx(0.5, abs=0.1)  # a random centre: half are clipped


@pytest.mark.parametrize("views", [1, 2, 3, 12])
@pytest.mark.parametrize("keep", [0.5, 0.6, 0.9, 1.0])
def test_cutmix_of_features_exchanges_views(views: int, keep: float) -> None:
    row, partner = (photo(k, 1 - k, views=views, cached=True) for k in (0, 1))
    result = cutmix_features(row, partner, keep, np.random.default_rng(0))
    foreign = (result["features"] == partner["features"]).all(1)
    assert torch.equal(result["features"][~foreign], row["features"][~foreign])
    assert not foreign[0]  # the global view, which the mask belongs to
    assert abs(int(foreign.sum()) - (1 - keep) * views) <= 0.5 or int(foreign.sum()) == views // 2
    assert int(foreign.sum()) <= views / 2
    assert result["soft_label"].item() == pytest.approx(1 - foreign.double().mean().item())
    assert result["views_of_two"] == bool(foreign.any())
    assert "mask" not in result


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
@pytest.mark.parametrize("cached", [False, True])
def test_rows_do_not_depend_on_batches_workers_or_history(mix: str, cached: bool) -> None:
    rows = mixed(Photos([0, 1] * 4, cached=cached), mix)
    fields = ("features" if cached else "views", "soft_label", "mask", "views_of_two", "label", "weather")

    def rows_of(epoch: int, batches: list[list[int]], workers: int = 0) -> dict[str, list[Tensor]]:
        loader = load_batches(rows, batches, epoch=epoch, workers=workers, collate=collate)
        return {
            name: [batch[field][k] for field in fields]
            for batch in loader
            for k, name in enumerate(batch["id"])
        }

    first = rows_of(3, [[0, 1, 2, 3], [4, 5, 6, 7]])
    again = rows_of(3, [[5], [7, 0], [6, 1, 2], [4, 3, 3]], workers=2)  # sampling may repeat a row
    assert first.keys() == again.keys()
    for index in range(8):
        values = first[f"photo-{index}"]
        assert all(map(torch.equal, values, again[f"photo-{index}"])), index
        assert [int(value) for value in values[-2:]] == [index % 2, index % 3]  # the row's own
    later = rows_of(4, [[0, 1, 2, 3, 4, 5, 6, 7]])
    assert any(not torch.equal(later[name][0], values[0]) for name, values in first.items())


def test_the_seed_of_the_run_decides_too() -> None:
    photos = Photos([0, 1] * 4, cached=True)
    one, other = ([mixed(photos, seed=seed)[k]["features"] for k in range(8)] for seed in (1, 2))
    assert not all(map(torch.equal, one, other))


def test_a_batch_has_the_fields_of_the_loss() -> None:
    rows = mixed(Photos([0, 1, UNLABELLED]), mix_share=0.5)
    batch = collate([rows[k] for k in range(3)])
    assert (batch["soft_label"].dtype, batch["views_of_two"].dtype) == (torch.float32, torch.bool)
    unmixed = mixed(Photos([0, 1, UNLABELLED]), mix_share=0.0)
    assert collate([unmixed[k] for k in range(3)])["soft_label"].tolist() == [0.0, 1.0, 0.0]
    assert not any(is_mixed(unmixed, k) for k in range(3))


def partners(rows: MixedRows, index: int, epochs: int = 200) -> Counter[int | None]:
    found: Counter[int | None] = Counter()
    for epoch in range(epochs):
        rows.set_epoch(epoch)
        found[partner_of(rows, index)] += 1
    return found


def test_partners_are_labelled_rows_drawn_by_weight() -> None:
    photos = Photos([1, 0, UNLABELLED, 0, 1], views=[12] * 5, cached=True)
    found = partners(mixed(photos, "cutmix"), 0)
    assert found.keys() == {None, 1, 3, 4}
    found = partners(mixed(photos, "cutmix", weights=[1, 6, 5, 0, 1]), 0)
    assert found.keys() == {None, 1, 4}
    assert found[1] > 3 * found[4]
    assert partners(mixed(photos, "cutmix"), 2, 20).keys() == {None}  # the row itself is unlabelled
    alone = Photos([1, UNLABELLED], views=[12] * 2, cached=True)
    assert partners(mixed(alone, "cutmix"), 0, 20).keys() == {None}
    unlabelled = Photos([UNLABELLED] * 2, cached=True)
    assert mixed(unlabelled)[0]["soft_label"] == 0


def test_some_partners_leave_a_row_as_it_is() -> None:
    photos = Photos([1, 0, 0], views=[12, 12, 1], cached=True)
    photos.broken = {1}
    rows = mixed(photos, "cutmix")
    assert partners(rows, 0, 30).keys() == {None}  # one cannot be read, one has another number of views
    with pytest.raises(DataError, match=r"1\.jpg"):
        rows[1]
    photos.broken = set()
    assert partners(rows, 0, 30).keys() == {None, 1}


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_a_photo_of_a_server_that_cannot_be_read_is_no_partner(mix: Literal["mixup", "cutmix"]) -> None:
    pictures = [b"\xff\xd8\xff broken", *(jpeg((shade, 40, 90)) for shade in (60, 120, 180))]
    samples = [Sample(f"s{k}", BytesImage(f"s{k}", data), label=k % 2) for k, data in enumerate(pictures)]
    manifest = Manifest("served", tuple(samples))
    photos = StreamedDataset(manifest, views=PhotoViews(ViewGeometry(64)), max_share=0.5)
    rows = MixedRows(photos, manifest.labels.tolist(), AugmentConfig(mix=mix), seed=1)
    for epoch in range(12):
        rows.set_epoch(epoch)
        for row in (rows[k] for k in (1, 2, 3)):
            assert 0 <= row["soft_label"] <= 1
            assert row["views"][:, 0].min() > 40, "black is of no photo"
    assert photos.unreadable == [0]


def test_share_and_strength_of_mixing() -> None:
    photos = Photos([k % 2 for k in range(40)], cached=True)

    def changed(**settings: Any) -> list[int]:
        rows = mixed(photos, **settings)
        return [k for k in range(40) if is_mixed(rows, k)]

    assert len(changed(mix_alpha=100.0)) >= 36  # all that did not draw themselves
    assert 8 <= len(changed(mix_alpha=100.0, mix_share=0.5)) <= 32
    for alpha, distance in ((100.0, 0.5), (0.001, 0.0)):
        rows = mixed(photos, mix_alpha=alpha)
        moved = [abs(float(rows[k]["soft_label"]) - k % 2) for k in range(40)]
        assert max(moved) == pytest.approx(distance, abs=0.05)  # towards partners of the other class
        assert max(moved) <= 0.5  # the larger share is the row's own
    assert (mixed(photos).alpha, mixed(photos, "cutmix").alpha) == (0.2, 1.0)


def test_off_is_the_rows_themselves() -> None:
    photos = Photos([0, 1])
    off = ExperimentConfig()
    disabled = ExperimentConfig(augment=AugmentConfig(mix="mixup", enabled=False))
    on = ExperimentConfig(augment=AugmentConfig(mix="mixup"))
    assert training_rows(photos, [0, 1], off) is photos
    assert training_rows(photos, [0, 1], disabled) is photos
    assert isinstance(training_rows(photos, [0, 1], on), MixedRows)


def test_stored_features_serve_every_way_of_mixing() -> None:
    plain = Augmenter(AugmentConfig(), 3).identity()
    mixing = AugmentConfig(mix="cutmix", mix_alpha=0.4, mix_share=0.3)
    assert Augmenter(mixing, 3).identity() == plain
    assert plain == {"policy": "roadwork", "strength": 1.0, "seed": 3, "version": 1}


def test_tables_must_fit_the_rows() -> None:
    with pytest.raises(ValueError, match="1 labels and 2 weights for 2 rows"):
        MixedRows(Photos([0, 1]), [0], AugmentConfig(mix="mixup"), seed=0)
    with pytest.raises(ValueError, match="2 labels and 3 weights for 2 rows"):
        mixed(Photos([0, 1]), weights=[1.0, 1.0, 1.0])
