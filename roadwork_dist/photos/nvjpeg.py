"""JPEGs decoded by an NVIDIA GPU (nvJPEG), and their views cut there, with the geometry of the CPU's path.

The GPU decodes every pixel (it has no reduced decode) and adds colour between pixels in another way than
libjpeg-turbo, so its views are not the CPU's to the last bit and their features are kept apart. What is no
plain JPEG, ends early or is refused by nvJPEG goes the CPU's way, which tells what is wrong with it.
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
"""Bytes at a file's end that are searched for the marker; cameras put previews behind it, not megabytes."""


def check_nvjpeg(workers: int = 0) -> None:
    """Refuse the setting where it cannot work.

    Args:
        workers: loader processes, which have no GPU of their own.

    Raises:
        ConfigError: there is no GPU that torch can use, or photos would be decoded in loader processes.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "views.decoder is 'nvjpeg', but torch sees no NVIDIA GPU: set views.decoder to cpu, or mend the "
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
    """Decode photos together on a GPU and cut their views there.

    Args:
        photos: encoded photos; the more at once, the more of the GPU's decoders are busy.
        geometry: which views.
        device: the GPU.
        names: what messages call them.
        max_pixels: photos with more pixels are refused.

    Returns:
        Views [V, 3, S, S] uint8 of each photo, on the GPU.

    Raises:
        DataError: a photo cannot be read; the message names it.
    """
    names = names or ["photo"] * len(photos)
    plain: dict[int, int] = {}  # number of the photo -> EXIF orientation
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
    """[3, H, W] uint8 on the GPU of those photos that nvJPEG decodes: all at once, or one by one."""
    try:
        return dict(zip(photos, _decode_all(list(photos.values()), device), strict=True)) if photos else {}
    except RuntimeError:  # it does not say of which photo it complains
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
        warnings.simplefilter("ignore", DeprecationWarning)  # of torchvision's decoders, since 0.29
        decoded: list[Tensor] = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)
    return decoded
