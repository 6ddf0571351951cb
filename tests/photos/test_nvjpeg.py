"""What of the GPU's decoder can be seen without a GPU; tests/gpu compares the pixels."""

from collections.abc import Callable
from io import BytesIO

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.nn import functional as F

from roadwork_dist.common.errors import ConfigError, DataError
from roadwork_dist.config.experiment import ExperimentConfig, ViewsConfig
from roadwork_dist.photos import lanczos, nvjpeg, views
from roadwork_dist.photos.images import decode
from roadwork_dist.photos.jpeg import decode_baseline
from roadwork_dist.photos.photo import views_of_photo
from roadwork_dist.photos.views import ViewGeometry
from roadwork_dist.recipes.preflight import check_recipe

PHOTO = load_sample_image("china.jpg")
CPU = torch.device("cpu")


def encoded(orientation: int = 1, kind: str = "JPEG", **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = BytesIO()
    Image.fromarray(PHOTO).resize((320, 240)).save(file, kind, exif=exif, **options)  # type: ignore[arg-type]
    return file.getvalue()


@pytest.mark.parametrize("size", [(160, 96), (97, 201), (320, 240), (400, 300), (31, 240)])
def test_the_resize_by_matrices_is_torch_s_of_the_cpu(size: tuple[int, int]) -> None:
    image = torch.from_numpy(PHOTO[:240, :320].copy()).permute(2, 0, 1)
    wanted = F.interpolate(image[None], size=size[::-1], mode="lanczos", antialias=True)[0]
    got = lanczos.resize(image, *size)
    assert got.dtype == torch.uint8
    difference = (got.int() - wanted.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.02


def test_weights_of_a_pixel_add_up_to_one() -> None:
    for length, wanted in ((4032, 1280), (100, 300), (7, 7)):
        table = lanczos.weights(length, wanted)
        assert table.shape == (wanted, length)
        torch.testing.assert_close(table.sum(1), torch.ones(wanted))


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The GPU's decoder played by the CPU's; gives the number of photos of each call."""
    calls: list[int] = []

    def decode_all(photos: list[bytes], device: torch.device) -> list[Tensor]:
        calls.append(len(photos))
        found = []
        for data in photos:
            pixels = decode_baseline(data, Image.open(BytesIO(data)).size)
            if pixels is None:
                raise RuntimeError("nvjpeg: bad JPEG")
            found.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous())
        return found

    monkeypatch.setattr(nvjpeg, "_decode_all", decode_all)
    return calls


def test_views_have_the_geometry_of_the_cpu_s_path(decoder: list[int]) -> None:
    geometry = ViewGeometry(64, quality="exact")
    photos = [encoded(orientation) for orientation in range(1, 9)]
    for data, got in zip(photos, nvjpeg.views_on_gpu(photos, geometry, device=CPU), strict=True):
        assert torch.equal(got, views_of_photo(data, geometry))
    assert decoder == [8], "all at once"


def test_what_the_gpu_cannot_decode_goes_the_cpu_s_way(decoder: list[int]) -> None:
    geometry = ViewGeometry(64, quality="exact")
    damaged = bytearray(encoded())
    marker = damaged.index(b"\xff\xda") + 200
    damaged[marker : marker + 2] = b"\xff\xd3"
    photos = [encoded(), encoded(kind="PNG"), encoded(progressive=True), bytes(damaged), encoded(6)]
    for data, got in zip(photos, nvjpeg.views_on_gpu(photos, geometry, device=CPU), strict=True):
        assert torch.equal(got, views_of_photo(data, geometry))
    assert decoder == [3, 1, 1, 1], "one by one where nvJPEG complains of the batch"


def test_a_photo_cut_short_is_told_and_not_decoded(decoder: list[int]) -> None:
    with pytest.raises(DataError, match=r"b\.jpg: is broken"):
        nvjpeg.views_on_gpu(
            [encoded(), encoded()[:-400]], ViewGeometry(64), device=CPU, names=["a.jpg", "b.jpg"]
        )
    assert decoder == [1]


def test_views_are_cut_on_the_device_of_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU, driven on the CPU: the resize by matrices in place of torch's."""
    image = decode(encoded())
    geometry = ViewGeometry(48, policy="all")
    wanted = views.make_views(image, geometry)
    monkeypatch.setattr(views, "_resize", lanczos.resize)
    got = views.make_views(image.contiguous(), geometry)
    assert (got.int() - wanted.int()).abs().max() <= 3
    long = torch.full((3, 60, 600), 9, dtype=torch.uint8)
    assert views.make_views(long, geometry).shape == (12, 3, 48, 48)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    return lambda there: monkeypatch.setattr(torch.cuda, "is_available", lambda: there)


def test_without_a_gpu_one_line_says_what_to_do(gpu: Callable[[bool], None]) -> None:
    gpu(False)
    config = ExperimentConfig(views=ViewsConfig(decoder="nvjpeg"), workers=0)
    with pytest.raises(ConfigError, match=r"torch sees no NVIDIA GPU: set views\.decoder to cpu"):
        check_recipe(config)
    with pytest.raises(ConfigError, match="torch sees no NVIDIA GPU"):
        views_of_photo(encoded(), ViewGeometry(64, decoder="nvjpeg"))


def test_loader_processes_do_not_decode_on_the_gpu(gpu: Callable[[bool], None]) -> None:
    gpu(True)
    nvjpeg.check_nvjpeg()
    with pytest.raises(ConfigError, match="workers is 2, expected 0"):
        nvjpeg.check_nvjpeg(workers=2)


def test_features_of_the_gpu_s_decoder_are_kept_apart() -> None:
    kinds = [ViewGeometry(64), ViewGeometry(64, quality="exact"), ViewGeometry(64, decoder="nvjpeg")]
    assert len({str(geometry.identity()) for geometry in kinds}) == 3
