"""Augmentation and JPEG decoding on a GPU against the CPU's."""

from io import BytesIO

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from support.devices import GPU, needs_gpu, random_views

from roadwork_dist.common.errors import DataError
from roadwork_dist.common.random import generator_for
from roadwork_dist.config.experiment import AugmentConfig
from roadwork_dist.photos.augment import Augmenter
from roadwork_dist.photos.augment.batched import augmented_on_device, prepared
from roadwork_dist.photos.augment.draws import DRAWS
from roadwork_dist.photos.augment.operations import OPERATIONS
from roadwork_dist.photos.nvjpeg import views_on_gpu
from roadwork_dist.photos.photo import views_of_photo
from roadwork_dist.photos.views import ViewGeometry

pytestmark = needs_gpu


def smooth_views(count: int, side: int) -> torch.Tensor:
    """Views with soft edges: the samples of a moved pixel do not hang on a bit of its position."""
    coarse = random_views(count, side // 8).float()
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear").byte()


@pytest.mark.parametrize("name", list(DRAWS))
def test_every_operation_gives_what_it_gives_on_the_cpu(name: str) -> None:
    views = smooth_views(6, 128)
    one_by_one = torch.stack([OPERATIONS[name](view, generator_for(name, k)) for k, view in enumerate(views)])
    draws = [{name: prepared(name, DRAWS[name](generator_for(name, k), 128))} for k in range(len(views))]
    on_gpu = augmented_on_device(views.to(GPU), draws)
    assert on_gpu.device.type == "cuda"
    difference = (on_gpu.cpu().int() - one_by_one.int()).abs()
    assert difference.max() <= 2
    assert (difference > 0).float().mean() <= 0.01


@pytest.mark.parametrize("policy", ["roadwork", "trivial"])
def test_a_whole_policy_gives_what_it_gives_on_the_cpu(policy: str) -> None:
    views = smooth_views(12, 128)
    augmenter = Augmenter(AugmentConfig(policy=policy), 3)  # type: ignore[arg-type]
    for sample in ("a", "b", "c"):
        draws = augmenter.draws(sample, 1, len(views), 128)
        on_gpu = augmented_on_device(views.to(GPU), draws).cpu()
        difference = (on_gpu.int() - augmenter(views, sample, 1).int()).abs()
        assert (difference > 3).float().mean() <= 1e-3
        assert difference.float().mean() <= 0.05


def camera_photo(orientation: int = 1, **options: object) -> bytes:
    """A real photograph as a camera stores it, 4:2:0."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = Image.fromarray(load_sample_image("china.jpg")).resize((2016, 1512), Image.Resampling.LANCZOS)
    file = BytesIO()
    photo.save(file, "JPEG", quality=90, exif=exif, **options)  # type: ignore[arg-type]
    return file.getvalue()


def test_nvjpeg_gives_the_views_of_the_cpu() -> None:
    photos = [camera_photo(orientation) for orientation in (1, 3, 6, 8)] + [camera_photo(progressive=True)]
    on_gpu = views_on_gpu(photos, ViewGeometry(256, decoder="nvjpeg"), device=GPU)
    for data, got in zip(photos, on_gpu, strict=True):
        wanted = views_of_photo(data, ViewGeometry(256, quality="exact"))
        assert got.device.type == "cuda"
        assert got.shape == wanted.shape
        error = (got.cpu().float() - wanted.float()).square().mean((1, 2, 3)).clamp_min(1e-3)
        # nvJPEG takes the nearest colour between pixels, libjpeg-turbo a weighted one.
        assert (10 * torch.log10(255**2 / error)).min() >= 38


def test_a_damaged_jpeg_is_told_on_the_gpu_too() -> None:
    data = camera_photo()
    with pytest.raises(DataError, match="is broken"):
        views_on_gpu([data, data[: len(data) // 2]], ViewGeometry(256), device=GPU)
    assert views_of_photo(data, ViewGeometry(256, decoder="nvjpeg")).device.type == "cpu"
