"""One photo becomes up to 12 square views (S = side of a view in px, V = number of views).

All views come from one **shared image**, the photo resized so that its long side is ``scale`` · S:
the whole photo squeezed to a square, a grid of tiles that are slices of the shared image, the
centre square, and the rightmost square (portrait: the bottom one). Long photos (aspect above
``scale``) have their short side scaled to S instead; above ``grid`` the long side is ``grid`` · S and
the short side is padded, so that the tiles always cover every pixel.

Positions are (x, y) and sizes (width, height) in px; tensors are [3, H, W] uint8 RGB.
"""

import math
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.config.experiment import ViewsConfig

GLOBAL_ONLY_BELOW = 1.5
"""Under policy ``auto`` a photo whose short side is below this many S gets the global view only."""


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

    Raises:
        ConfigError: the tiles would leave gaps (``scale`` > ``grid``).
    """

    size: int
    grid: int = 3
    scale: float = 2.5
    policy: Literal["auto", "all", "global"] = "auto"
    pad_colour: tuple[int, int, int] = (124, 116, 104)

    def __post_init__(self) -> None:
        if self.scale > self.grid:
            raise ConfigError(
                f"views.scale is {self.scale} but views.grid is {self.grid}: {self.grid} tiles of 1 S cannot "
                f"cover {self.scale} S; set views.grid to {math.ceil(self.scale)} or more"
            )

    @property
    def max_views(self) -> int:
        """Most views a photo can have: global, tiles and two squares."""
        return 1 if self.policy == "global" else self.grid**2 + 3

    def identity(self) -> dict[str, object]:
        """All that decides the pixels of the views, for keys of stored features."""
        return {**asdict(self), "pad_colour": list(self.pad_colour), "filter": "lanczos", "version": 1}


@dataclass(frozen=True)
class Layout:
    """Where the views of one photo lie; made by :func:`layout_of`."""

    shared: tuple[int, int]
    """Size of the resized photo; S × S where only the global view is cut."""
    padded: tuple[int, int]
    """Size after padding: the shared image that tiles are slices of."""
    origin: tuple[int, int]
    """Position of the resized photo in the padded image."""
    tiles: tuple[tuple[int, int], ...]
    """Positions of the tiles in the padded image; empty where only the global view is cut."""
    squares: tuple[tuple[int, int], ...]
    """Positions of the two squares in the resized photo; their side is its short side."""


def geometry_for(config: ViewsConfig, size: int, pad_colour: tuple[int, int, int]) -> ViewGeometry:
    """The geometry of a configuration.

    Args:
        config: the settings; ``config.size`` wins unless it is ``auto``.
        size: side that ``auto`` stands for (what the backbone takes).
        pad_colour: the backbone's mean colour, RGB 0…255.
    """
    side = size if config.size == "auto" else config.size
    return ViewGeometry(side, config.grid, config.scale, config.policy, pad_colour)


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
    """What each view shows, in px of the upright photo and in the order of the views.

    A tile of a padded photo reaches over the photo's edge; its box is cut there.
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


def _resize(image: Tensor, width: int, height: int) -> Tensor:
    """Antialiased Lanczos resize of [3, H, W] uint8; the memory layout is kept (no repacking)."""
    if image.shape[-2:] == (height, width):
        return image
    return F.interpolate(image[None], size=(height, width), mode="lanczos", antialias=True)[0]


def _pad(image: Tensor, layout: Layout, colour: tuple[int, int, int]) -> Tensor:
    width, height = layout.padded
    if layout.padded == layout.shared:
        return image
    canvas = torch.tensor(colour, dtype=torch.uint8)[:, None, None].repeat(1, height, width)
    x, y = layout.origin
    canvas[:, y : y + layout.shared[1], x : x + layout.shared[0]] = image
    return canvas


def make_views(image: Tensor, geometry: ViewGeometry, photo_size: tuple[int, int] | None = None) -> Tensor:
    """Cut the views of one photo: global, tiles row by row (portrait: column by column), two squares.

    Args:
        image: [3, H, W] uint8 RGB, upright; may be a reduced decode of the photo.
        geometry: which views.
        photo_size: (width, height) of the photo where ``image`` is a reduced decode of it: the
            layout is that of the photo, not of the decode.

    Returns:
        [V, 3, S, S] uint8, contiguous.
    """
    size = geometry.size
    layout = layout_of(geometry, *(photo_size or (image.shape[2], image.shape[1])))
    shared = _resize(image, *layout.shared)
    if not layout.tiles:
        return shared[None].contiguous()
    views = torch.empty((geometry.max_views, 3, size, size), dtype=torch.uint8)
    views[0] = _resize(shared, size, size)
    padded = _pad(shared, layout, geometry.pad_colour)
    for view, (x, y) in zip(views[1:-2], layout.tiles, strict=True):
        view.copy_(padded[:, y : y + size, x : x + size])
    side = min(layout.shared)
    for view, (x, y) in zip(views[-2:], layout.squares, strict=True):
        view.copy_(_resize(shared[:, y : y + side, x : x + side], size, size))
    return views


def draft_long_side(geometry: ViewGeometry, width: int, height: int) -> int:
    """Least long side of a reduced decode from which the views lose no detail, in px."""
    layout = layout_of(geometry, width, height)
    long, short = max(width, height), min(width, height)
    needed = max(layout.shared) / long
    if not layout.tiles:  # the photo is squeezed: its short side must still have S px
        needed = geometry.size / short
    return min(long, math.ceil(needed * long))
