"""GPU decoding of JPEGs (nvJPEG), and views cut on the GPU with the same geometry as on the CPU.

The GPU decodes every pixel (it has no reduced decode) and upsamples chroma differently from
libjpeg-turbo. Its views are therefore not bitwise equal to the CPU's, and their features are stored
separately. Files that are not plain JPEGs, are truncated or are rejected by nvJPEG fall back to the CPU
decoder, which reports what is wrong with them.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.photos.images import MAX_PIXELS, open_picture, orientation_of
from roadwork_dist.photos.jpeg import decode_for_views, is_plain_jpeg, upright
from roadwork_dist.photos.views import ViewGeometry, make_views

END_OF_IMAGE = b"\xff\xd9"
TAIL = 1 << 16
"""Bytes at a file's end that are searched for the marker; cameras may append a small preview after it."""


def check_nvjpeg(workers: int = 0) -> None:
    """Reject ``views.decoder: nvjpeg`` where it cannot work.

    Args:
        workers: number of loader processes; these cannot use the GPU.

    Raises:
        ConfigError: there is no GPU that torch can use, or photos would be decoded in loader processes.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "views.decoder is 'nvjpeg', but torch sees no NVIDIA GPU: set views.decoder to cpu, or fix the "
            "driver (python -c 'import torch; print(torch.cuda.is_available())' has to print True)"
        )
    if workers > 0 or get_worker_info() is not None:
        raise ConfigError(
            f"views.decoder is 'nvjpeg' and workers is {workers}, expected 0: the GPU decodes in the process "
            "that trains; set workers to 0, or views.decoder to cpu"
        )


def views_on_gpu(
    photos: Sequence[bytes],
    geometry: ViewGeometry,
    *,
    device: torch.device,
    names: Sequence[str] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> list[Tensor]:
    """Decode photos as one batch on a GPU and cut their views there.

    Args:
        photos: encoded photos; larger batches use more of the GPU's decoders.
        geometry: which views.
        device: the GPU.
        names: names of the photos in messages.
        max_pixels: photos with more pixels are refused.

    Returns:
        Views [V, 3, S, S] uint8 of each photo, on the GPU.

    Raises:
        DataError: a photo cannot be read; the message names it.
    """
    names = names or ["photo"] * len(photos)
    plain: dict[int, int] = {}  # index of the photo -> EXIF orientation
    for number, (data, name) in enumerate(zip(photos, names, strict=True)):
        image = open_picture(data, name, max_pixels=max_pixels)
        if is_plain_jpeg(image) and END_OF_IMAGE in data[-TAIL:]:
            plain[number] = orientation_of(image)
    decoded = _decoded({number: photos[number] for number in plain}, device)
    views = []
    for number, (data, name) in enumerate(zip(photos, names, strict=True)):
        if number in decoded:
            pixels, orientation = decoded[number], plain[number]
            size = upright((pixels.shape[2], pixels.shape[1]), orientation)
            views.append(make_views(pixels, geometry, size, orientation))
        else:
            stored = decode_for_views(data, geometry, name=name, max_pixels=max_pixels)
            cut = make_views(stored.pixels, geometry, stored.photo_size, stored.orientation)
            views.append(cut.to(device))
    return views


def _decoded(photos: dict[int, bytes], device: torch.device) -> dict[int, Tensor]:
    """[3, H, W] uint8 on the GPU of each photo that nvJPEG can decode: in one batch, or else one by one."""
    try:
        return dict(zip(photos, _decode_all(list(photos.values()), device), strict=True)) if photos else {}
    except RuntimeError:  # it does not say which photo failed
        found: dict[int, Tensor] = {}
        for number, data in photos.items():
            try:
                (found[number],) = _decode_all([data], device)
            except RuntimeError:
                continue
        return found


def _decode_all(photos: list[bytes], device: torch.device) -> list[Tensor]:
    from torchvision.io import ImageReadMode, decode_jpeg

    encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in photos]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from torchvision's decoders, since 0.29
        decoded: list[Tensor] = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)
    return decoded
