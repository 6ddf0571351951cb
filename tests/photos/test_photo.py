"""From photos to augmented batches, with the augmentation in the loader or on the device."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device
from PIL import Image
from sklearn.datasets import load_sample_image
from torch.utils.data import DataLoader

from roadwork_dist.config.batch import Batch
from roadwork_dist.config.experiment import AugmentConfig, LossConfig
from roadwork_dist.datasets.dataset import RoadworkDataset, collate
from roadwork_dist.detector.losses.composite import RoadworkLoss
from roadwork_dist.detector.task import RoadworkTask
from roadwork_dist.photos.augment import Augmenter
from roadwork_dist.photos.augment.batched import augmented_on_device, with_augmented_views
from roadwork_dist.photos.images import FileImage
from roadwork_dist.photos.manifest import Manifest, Sample
from roadwork_dist.photos.photo import PhotoViews
from roadwork_dist.photos.views import ViewGeometry
from roadwork_dist.trainer.feed.loader import load_batches

SIDE = 48


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Two photos of twelve views and one, in the middle, of a single view."""
    photo = Image.fromarray(load_sample_image("china.jpg"))
    samples = []
    for k, size in enumerate([(320, 240), (80, 64), (240, 320)]):
        path = tmp_path / f"{k}.jpg"
        photo.resize(size).save(path, quality=95)
        samples.append(Sample(id=f"photo {k}", image=FileImage(path), label=k % 2))
    return Manifest("photos", samples)


@pytest.mark.parametrize("policy", ["roadwork", "trivial"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_is_augmented_alike_in_the_loader_and_on_the_device(
    manifest: Manifest, policy: str, workers: int
) -> None:
    augmenter = Augmenter(AugmentConfig(policy=policy), 5)  # type: ignore[arg-type]
    views = PhotoViews(ViewGeometry(SIDE), augmenter)
    batches = []
    for each in (views, replace(views, on_device=True)):
        rows = RoadworkDataset(manifest, views=each)
        (batch,) = load_batches(rows, [[0, 1, 2]], epoch=1, workers=workers, collate=collate)
        batches.append(batch)
    in_loader, drawn = batches
    assert "augment" not in in_loader
    assert with_augmented_views(in_loader) is in_loader
    on_device = with_augmented_views(send_to_device(drawn, torch.device("cpu"), non_blocking=True))
    assert on_device.keys() == in_loader.keys()
    difference = (on_device["views"].int() - in_loader["views"].int()).abs()
    assert difference.max() <= 3
    assert (difference > 0).float().mean() <= 1e-3
    assert not torch.equal(drawn["views"], in_loader["views"])
    assert (on_device["views"][1, 1:] == 0).all(), "padding stays black"


def test_copies_for_a_feature_store_can_be_made_on_the_device(manifest: Manifest) -> None:
    views = PhotoViews(ViewGeometry(SIDE), Augmenter(AugmentConfig(copies=2), 5))
    sample = manifest[0]
    plain = views.plain(sample.image)
    for copy in views.copies():
        made = augmented_on_device(plain, views.draws(plain, sample.id, copy))
        assert (made.int() - views.augmented(plain, sample.id, copy).int()).abs().max() <= 3
    assert views.draws(plain, sample.id, None) == [{}] * 12
    assert replace(views, augmenter=None).draws(plain, sample.id, 0) == [{}] * 12


def test_views_come_from_a_loader_process_in_memory_it_shares(manifest: Manifest) -> None:
    rows = RoadworkDataset(manifest, views=PhotoViews(ViewGeometry(SIDE)))
    loader = DataLoader(rows, batch_size=3, num_workers=1, collate_fn=_is_shared)  # type: ignore[arg-type]
    assert next(iter(loader)) is True


def _is_shared(rows: list[dict[str, object]]) -> bool:
    return collate(rows)["views"].is_shared()


def test_a_row_without_draws_stands_beside_others(manifest: Manifest) -> None:
    """A photo that a server did not send is a blank row."""
    views = PhotoViews(ViewGeometry(SIDE), Augmenter(AugmentConfig(strength=9), 5), on_device=True)
    rows = [RoadworkDataset(manifest, views=views)[k] for k in (0, 2)]
    blank = {**rows[1], "views": torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8)}
    del blank["draws"]
    for order in ([rows[0], blank], [blank, rows[0]]):
        batch = collate(order)
        augmented = with_augmented_views(batch)["views"]
        alone = augmented_on_device(rows[0]["views"], rows[0]["draws"])
        np.testing.assert_array_equal(augmented[order.index(rows[0])], alone)
        assert (augmented[order.index(blank)] == 0).all()


def test_the_task_augments_a_batch_before_the_model_sees_it(manifest: Manifest) -> None:
    views = PhotoViews(ViewGeometry(SIDE), Augmenter(AugmentConfig(), 5), on_device=True)
    batch = collate([RoadworkDataset(manifest, views=views)[k] for k in range(3)])
    seen: list[Batch] = []

    def forward(batch: Batch) -> None:
        seen.append(batch)
        raise StopIteration  # the rest of the task is of no matter here

    task = RoadworkTask(RoadworkLoss(LossConfig(), with_masks=False))
    with pytest.raises(StopIteration):
        task(forward, batch)
    assert torch.equal(seen[0]["views"], with_augmented_views(batch)["views"])
    assert not torch.equal(seen[0]["views"], batch["views"])
    assert "augment" not in seen[0]
    assert task.count(batch) == task.count(seen[0])
