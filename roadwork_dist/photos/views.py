"""Cuts a photo into up to 12 square views (S = side of a view in px, V = number of views).

All views come from one **shared image**, the photo resized so that its long side is ``scale`` · S. The
views are: the whole photo squeezed to a square, a grid of tiles that are slices of the shared image, the
centre square, and the rightmost square (portrait: the bottom one). Long photos (aspect above
``scale``) have their short side scaled to S instead. Above ``grid`` the long side is ``grid`` · S and
the short side is padded, so the tiles always cover every pixel.

Positions are (x, y) and sizes (width, height) in px. Tensors are [3, H, W] uint8 RGB; the code is fastest
with the strides of an interleaved image (channels last), which decoders produce.
"""

import math
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.config.experiment import ViewsConfig
from roadwork_dist.photos import lanczos

GLOBAL_ONLY_BELOW = 1.5
"""Under policy ``auto`` a photo whose short side is below this many S gets the global view only."""

VERSION = 2
"""Incremented whenever the same photo would give other views, so that stored features are not mixed."""

REDUCTIONS = (8, 4, 2)
"""Divisors of the size at which a JPEG can be decoded more cheaply than at full size (DCT scaling)."""

# Value of the EXIF tag (EXIF 2.32, 0x0112) -> operations that turn stored pixels upright:
# (first swap the axes?, then flip these axes of [..., H, W]).
_TURNS: dict[int, tuple[bool, tuple[int, ...]]] = {
    1: (False, ()),
    2: (False, (-1,)),
    3: (False, (-2, -1)),
    4: (False, (-2,)),
    5: (True, ()),
    6: (True, (-1,)),
    7: (True, (-2, -1)),
    8: (True, (-2,)),
}


class Box(NamedTuple):
    """A rectangle of the photo, in px of the upright photo."""

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class ViewGeometry:
    """Which views are cut from a photo.

    Args:
        size: side S of a view in px.
        grid: tiles per axis.
        scale: long side of the shared image in units of S.
        policy: ``auto`` (global view only for small photos), ``all`` or ``global``.
        pad_colour: RGB 0…255 that pads very long photos; the backbone's mean colour.
        quality: ``fast`` cuts from a reduced decode of large JPEGs, ``exact`` from every pixel.
        decoder: decoder of JPEGs: ``cpu``, or ``nvjpeg``, which always decodes every pixel.

    Raises:
        ConfigError: the tiles would leave gaps (``scale`` > ``grid``).
    """

    size: int
    grid: int = 3
    scale: float = 2.5
    policy: Literal["auto", "all", "global"] = "auto"
    pad_colour: tuple[int, int, int] = (124, 116, 104)
    quality: Literal["fast", "exact"] = "fast"
    decoder: Literal["cpu", "nvjpeg"] = "cpu"

    def __post_init__(self) -> None:
        if self.scale > self.grid:
            raise ConfigError(
                f"views.scale is {self.scale} but views.grid is {self.grid}: {self.grid} tiles of 1 S cannot "
                f"cover {self.scale} S; set views.grid to {math.ceil(self.scale)} or more"
            )

    @property
    def max_views(self) -> int:
        """Largest number of views of a photo: global, tiles and two squares."""
        return 1 if self.policy == "global" else self.grid**2 + 3

    def identity(self) -> dict[str, object]:
        """Everything that determines the pixels of the views, for keys of stored features."""
        return {**asdict(self), "pad_colour": list(self.pad_colour), "filter": "lanczos", "version": VERSION}


@dataclass(frozen=True)
class Layout:
    """Positions of the views of one photo; made by :func:`layout_of`."""

    shared: tuple[int, int]
    """Size of the resized photo; S × S if only the global view is cut."""
    padded: tuple[int, int]
    """Size after padding: the shared image that tiles are slices of."""
    origin: tuple[int, int]
    """Position of the resized photo in the padded image."""
    tiles: tuple[tuple[int, int], ...]
    """Positions of the tiles in the padded image; empty if only the global view is cut."""
    squares: tuple[tuple[int, int], ...]
    """Positions of the two squares in the resized photo; their side is its short side."""


def geometry_for(config: ViewsConfig, size: int, pad_colour: tuple[int, int, int]) -> ViewGeometry:
    """The geometry for a configuration.

    Args:
        config: the settings; ``config.size`` is used unless it is ``auto``.
        size: side that ``auto`` stands for (the input size of the backbone).
        pad_colour: the backbone's mean colour, RGB 0…255.
    """
    side = size if config.size == "auto" else config.size
    return ViewGeometry(
        side, config.grid, config.scale, config.policy, pad_colour, config.quality, config.decoder
    )


def tile_offsets(side: int, tile: int, count: int) -> tuple[int, ...]:
    """``count`` positions evenly spaced from 0 to ``side - tile``."""
    if count == 1:
        return (0,)
    return tuple(round(k * (side - tile) / (count - 1)) for k in range(count))


def layout_of(geometry: ViewGeometry, width: int, height: int) -> Layout:
    """Positions of all views of a photo of ``width`` × ``height`` px (upright)."""
    if height > width:
        return _transposed(layout_of(geometry, height, width))
    size, aspect = geometry.size, width / height
    small = geometry.policy == "auto" and height < GLOBAL_ONLY_BELOW * size
    if small or geometry.policy == "global":
        return Layout((size, size), (size, size), (0, 0), (), ())
    if aspect <= geometry.scale:
        long = round(geometry.scale * size)
        short = max(size, round(long / aspect))
    elif aspect <= geometry.grid:
        long, short = min(round(size * aspect), geometry.grid * size), size
    else:
        long, short = geometry.grid * size, max(1, round(geometry.grid * size / aspect))
    padded_short = max(short, size)
    columns = tile_offsets(long, size, geometry.grid)
    rows = tile_offsets(padded_short, size, geometry.grid)
    return Layout(
        shared=(long, short),
        padded=(long, padded_short),
        origin=(0, (padded_short - short) // 2),
        tiles=tuple((x, y) for y in rows for x in columns),
        squares=((round((long - short) / 2), 0), (long - short, 0)),
    )


def _transposed(layout: Layout) -> Layout:
    return Layout(
        shared=layout.shared[::-1],
        padded=layout.padded[::-1],
        origin=layout.origin[::-1],
        tiles=tuple((x, y) for y, x in layout.tiles),
        squares=tuple((x, y) for y, x in layout.squares),
    )


def photo_boxes(geometry: ViewGeometry, width: int, height: int) -> list[Box]:
    """The box of each view, in px of the upright photo and in the order of the views.

    A tile of a padded photo extends beyond the photo's edge; its box is clipped there.
    """
    layout = layout_of(geometry, width, height)
    x_scale, y_scale = width / layout.shared[0], height / layout.shared[1]
    side = min(layout.shared)
    in_shared = [(x - layout.origin[0], y - layout.origin[1], geometry.size) for x, y in layout.tiles]
    in_shared += [(x, y, side) for x, y in layout.squares]
    boxes = [Box(0.0, 0.0, float(width), float(height))]
    for x, y, extent in in_shared:
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + extent, layout.shared[0]), min(y + extent, layout.shared[1])
        boxes.append(Box(left * x_scale, top * y_scale, (right - left) * x_scale, (bottom - top) * y_scale))
    return boxes


def reduction_of(geometry: ViewGeometry, width: int, height: int) -> int:
    """The divisor (1, 2, 4 or 8) at which a JPEG of ``width`` × ``height`` px may be decoded.

    The largest one that requires no upscaling and divides both sides. Decoding an odd width at half size
    pads it by a column, which would shift the others.
    """
    if geometry.quality == "exact":
        return 1
    shared = layout_of(geometry, width, height).shared
    for reduction in REDUCTIONS:
        divides = width % reduction == 0 and height % reduction == 0
        if divides and width // reduction >= shared[0] and height // reduction >= shared[1]:
            return reduction
    return 1


def turn_upright(image: Tensor, orientation: int) -> Tensor:
    """Apply EXIF's orientation, 1 to 8, to stored pixels [..., H, W]."""
    swaps, flipped = _TURNS[orientation]
    if swaps:
        image = image.transpose(-2, -1)
    return image.flip(flipped) if flipped else image


def _resize(image: Tensor, width: int, height: int) -> Tensor:
    """Antialiased Lanczos resize of [3, H, W] uint8; the memory layout is kept (no repacking)."""
    if image.shape[-2:] == (height, width):
        return image
    if image.device.type != "cpu":
        return lanczos.resize(image, width, height)
    # image[None] has a stride that torch does not recognise as channels last, so it would repack the image.
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return F.interpolate(batch, size=(height, width), mode="lanczos", antialias=True)[0]


def _resize_axis(image: Tensor, axis: int, length: int) -> Tensor:
    """Resize one axis: -1 = horizontal, -2 = vertical."""
    height, width = image.shape[-2:]
    return _resize(image, length, height) if axis == -1 else _resize(image, width, length)


def _pad(image: Tensor, layout: Layout, colour: tuple[int, int, int]) -> Tensor:
    width, height = layout.padded
    if layout.padded == layout.shared:
        return image
    background = torch.tensor(colour, dtype=torch.uint8, device=image.device)
    canvas = background[:, None, None].repeat(1, height, width)
    x, y = layout.origin
    canvas[:, y : y + layout.shared[1], x : x + layout.shared[0]] = image
    return canvas


def _interleaved(image: Tensor) -> Tensor:
    return image.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def shared_image(image: Tensor, layout: Layout, orientation: int = 1) -> Tensor:
    """The photo resized to the shared image, upright; not padded.

    Args:
        image: [3, H, W] uint8 as stored; may be a reduced decode.
        layout: layout of the upright photo at full size.
        orientation: EXIF's, 1 to 8. Only the resized image is rotated, which takes a millisecond or two.

    Returns:
        [3, H, W] uint8 with the strides of an interleaved image.
    """
    width, height = layout.shared[::-1] if orientation >= 5 else layout.shared
    return _interleaved(turn_upright(_resize(image, width, height), orientation))


def _shared_and_strip(
    image: Tensor, layout: Layout, geometry: ViewGeometry, orientation: int
) -> tuple[Tensor, Tensor]:
    """The shared image, and the photo with the same long side and a short side of S px.

    The global view and the two squares share the short side, so it is resized once for all three: from the
    shared image, or with quality ``exact`` from the photo's own rows (resizing edges twice loses 1 dB).
    Resizing the short side first is faster: torch is faster along columns than along rows.
    """
    size, sides = geometry.size, (max(layout.shared), min(layout.shared))
    long_is_across = (layout.shared[0] >= layout.shared[1]) == (orientation < 5)  # in the stored image
    long, short = (-1, -2) if long_is_across else (-2, -1)
    if geometry.quality == "exact":
        half_way = _resize_axis(image, long, sides[0])
        shared, strip = _resize_axis(half_way, short, sides[1]), _resize_axis(half_way, short, size)
    else:
        shared = _resize_axis(_resize_axis(image, short, sides[1]), long, sides[0])
        strip = _resize_axis(shared, short, size)
    return _interleaved(turn_upright(shared, orientation)), _interleaved(turn_upright(strip, orientation))


def make_views(
    image: Tensor,
    geometry: ViewGeometry,
    photo_size: tuple[int, int] | None = None,
    orientation: int = 1,
) -> Tensor:
    """Cut the views of one photo: global, tiles row by row (portrait: column by column), two squares.

    Args:
        image: [3, H, W] uint8 RGB, on any device; may be a reduced decode of the photo.
        geometry: which views.
        photo_size: (width, height) of the upright photo if ``image`` is a reduced decode of it; the layout
            is the one of the photo, not of the decode.
        orientation: EXIF's orientation of ``image``, 1 (upright) to 8.

    Returns:
        [V, 3, S, S] uint8, contiguous, on the device of ``image``.
    """
    size = geometry.size
    own_size = (image.shape[2], image.shape[1])
    layout = layout_of(geometry, *(photo_size or (own_size[::-1] if orientation >= 5 else own_size)))
    if not layout.tiles:
        return shared_image(image, layout, orientation)[None].contiguous()
    shared, strip = _shared_and_strip(image, layout, geometry, orientation)
    views = image.new_empty((geometry.max_views, 3, size, size))
    # Torch copies between planes fast, but interleaved to planes slowly unless made contiguous as a whole.
    padded = _pad(shared.contiguous(), layout, geometry.pad_colour)
    for view, (x, y) in zip(views[1:-2], layout.tiles, strict=True):
        view.copy_(padded[:, y : y + size, x : x + size])
    _cut_squares(strip, layout, views)
    return views


def _cut_squares(strip: Tensor, layout: Layout, views: Tensor) -> None:
    """Write the global view and two squares into ``views``, from the strip of :func:`_shared_and_strip`."""
    size, (width, height) = views.shape[-1], layout.shared
    axis = -1 if width >= height else -2
    starts = [max(position) for position in layout.squares]  # along the short side they start at 0
    cuts = [(0, max(width, height)), *((start, min(width, height)) for start in starts)]
    for view, (start, extent) in zip((views[0], *views[-2:]), cuts, strict=True):
        view.copy_(_resize_axis(strip.narrow(axis, start, extent), axis, size).contiguous())
