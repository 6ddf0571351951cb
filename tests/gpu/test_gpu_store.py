"""Features computed on a GPU go to the store as they are, and come from its memory as from the disk."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.devices import GPU, needs_gpu
from torch import Tensor

from roadwork_dist.datasets.dataset import RoadworkDataset, collate
from roadwork_dist.features.content_hashes import content_hashes
from roadwork_dist.features.extract import Extraction, extract
from roadwork_dist.features.store import FeatureSpace, FeatureStore
from roadwork_dist.photos.images import BytesImage
from roadwork_dist.photos.manifest import Manifest, Sample
from roadwork_dist.photos.photo import PhotoViews
from roadwork_dist.photos.views import ViewGeometry
from roadwork_dist.trainer.feed.loader import load_batches

pytestmark = needs_gpu

VIEWS = PhotoViews(ViewGeometry(48))


def mean_colours(views: Tensor) -> Tensor:
    """Sums of whole numbers, which are exact: [N, 3, S, S] uint8 -> [N, 6] on the GPU."""
    on_gpu = views.to(GPU, non_blocking=True).float()
    return torch.cat([on_gpu.sum((2, 3)) / 2**12, on_gpu.amax((2, 3))], dim=1)


def jpeg(seed: int) -> bytes:
    size = (70, 64) if seed % 3 == 2 else (120, 90)
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_gpu_computes_is_stored_and_read_from_its_memory(tmp_path: Path, workers: int) -> None:
    samples = tuple(Sample(str(k), BytesImage(f"{k}.jpg", jpeg(k)), label=k % 2) for k in range(40))
    hashes = content_hashes([sample.image for sample in samples])
    store = FeatureStore(tmp_path, FeatureSpace(VIEWS.geometry.identity(), None, "means", "fp32"))
    # Some sixty batches: every page-locked buffer is filled again and again.
    done = extract(
        samples, hashes, views=VIEWS, store=store, encode=mean_colours, batch_views=6, workers=workers
    )
    assert done == Extraction(40, 0, {})
    on_disk, on_gpu = (
        RoadworkDataset(Manifest("photos", samples), views=VIEWS, store=store, hashes=hashes)
        for _ in range(2)
    )
    for row, sample in enumerate(samples):
        expected = mean_colours(VIEWS.plain(sample.image)).cpu()
        assert torch.equal(on_disk[row]["features"], expected)
    assert on_gpu.make_resident(GPU)
    batches = [list(range(12)), [5, 5, 0], [2], list(range(39, 0, -1))]
    resident = load_batches(on_gpu, batches, workers=2, pin_memory=True, collate=collate)
    for rows, batch in zip(batches, resident, strict=True):
        expected_batch = collate([on_disk[row] for row in rows])
        assert batch["features"].device.type == "cuda"
        assert torch.equal(batch["features"].cpu(), expected_batch["features"])
        assert torch.equal(batch["view_mask"], expected_batch["view_mask"])
        assert batch["label"].tolist() == expected_batch["label"].tolist()
