"""Batched versions of the fifteen operations, on any device, with the draws of the CPU path.

The views [N, 3, S, S] uint8 are on a device; their draws are small tables. Each operation is applied to
the views that drew it, in the same order as in the CPU path, and its result is rounded to uint8 as there.
So both paths give the same view except for a few values that round the other way. On one device a view is
bitwise independent of the others in its batch: sums are of integers or in a fixed order. Nothing here
synchronises with the device.

n: views that drew the current operation · N: all views
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from roadwork_dist.config.batch import Batch
from roadwork_dist.photos.augment import draws as table
from roadwork_dist.photos.augment.draws import Draws
from roadwork_dist.photos.augment.operations import to_uint8, unit_grid
from roadwork_dist.photos.augment.trivial import trivial_augment
from roadwork_dist.photos.augment.weather import STREAK_COLOUR, SUN_COLOUR, streak_width

ViewDraws = dict[str, Draws]
"""Draws of one view: operation -> :func:`prepared` draws; small enough to pass between processes."""

StackedDraws = dict[str, dict[str, Any]]
"""Draws of N views: operation -> ``view`` [n] int64 (indices of views) and tables of draws [n, …]."""

TRIVIAL = "trivial"
"""Key of TrivialAugment's seed in a view's draws."""

_OUTSIDE = -1e9


def _affine_tables(angle: float, scale: float) -> dict[str, Any]:
    """The inverse of a rotation and scaling about the centre, [2, 3], as in torchvision."""
    turn = np.radians(angle)
    rows = [[np.cos(turn), np.sin(turn), 0.0], [-np.sin(turn), np.cos(turn), 0.0]]
    return {"matrix": np.array(rows) / scale}


def _perspective_tables(drawn: Draws) -> dict[str, Any]:
    """The eight coefficients that map the moved corners to the corners (as in Pillow's transform)."""
    rows, wanted = [], []
    for (x, y), (u, v) in zip(drawn["moved"].tolist(), drawn["corners"].tolist(), strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        wanted += [u, v]
    return {"coefficients": np.linalg.solve(np.array(rows, float), np.array(wanted, float))}


def _rain_tables(drawn: Draws) -> dict[str, Any]:
    """Streaks as tables of equal length for every view; padding streaks are far outside the view."""
    tables: dict[str, Any] = {name: drawn[name] for name in ("length", "slant", "dim")}
    for name in ("top", "left", "light"):
        column = np.full(table.MOST_STREAKS, 0.0 if name == "light" else _OUTSIDE)
        column[: len(drawn[name])] = drawn[name][:, 0]
        tables[name] = column
    return tables


def _noise_tables(drawn: Draws) -> dict[str, Any]:
    """The noise in whole steps, which suffices for an integer view: one byte per value."""
    return {"steps": np.rint(drawn["grain"] * np.float32(drawn["sigma"])).astype(np.int8)}


_TABLES: dict[str, Callable[[Draws], dict[str, Any]]] = {
    "rotate": lambda drawn: _affine_tables(drawn["angle"], 1.0),
    "zoom": lambda drawn: _affine_tables(0.0, drawn["scale"]),
    "perspective": _perspective_tables,
    "rain": _rain_tables,
    "noise": _noise_tables,
}


def prepared(name: str, drawn: Draws) -> Draws:
    """Draws of an operation for a view, in the form that the batched operation expects."""
    return _TABLES.get(name, dict)(drawn)


def stack_draws(views: Sequence[ViewDraws]) -> StackedDraws:
    """Stack the draws of N views into tables that are sent to the device with the views.

    All are tensors except TrivialAugment's seeds, which are needed on the CPU.
    """
    rows: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for number, drawn in enumerate(views):
        for name, values in drawn.items():
            # Kernels of different sizes are separate convolutions.
            key = f"blur{values['kernel']}" if name == "blur" else name
            rows.setdefault(key, []).append((number, values))
    stacked: StackedDraws = {}
    if TRIVIAL in rows:
        stacked[TRIVIAL] = {"seeds": [(number, values["seed"]) for number, values in rows[TRIVIAL]]}
    for name in _APPLY:
        if name in rows:
            numbers, tables = zip(*rows[name], strict=True)
            parts = {part: np.stack([np.asarray(each[part]) for each in tables]) for part in tables[0]}
            stacked[name] = {part: torch.from_numpy(values) for part, values in parts.items()}
            stacked[name]["view"] = torch.tensor(numbers)
    return stacked


def augment_views(views: Tensor, draws: StackedDraws) -> Tensor:
    """Augment views on their device.

    Args:
        views: [N, 3, S, S] uint8; not changed.
        draws: result of :func:`stack_draws`, its tensors on the device of ``views``.

    Returns:
        [N, 3, S, S] uint8.
    """
    augmented = views.clone(memory_format=torch.contiguous_format)
    for name, tables in draws.items():
        if name == TRIVIAL:
            for number, seed in tables["seeds"]:
                augmented[number] = trivial_augment(views[number], seed)
        else:
            chosen = tables["view"]
            augmented.index_copy_(0, chosen, _APPLY[name](augmented.index_select(0, chosen), tables))
    return augmented


def augmented_on_device(views: Tensor, draws: Sequence[ViewDraws]) -> Tensor:
    """Augment views with the draws of each, on their device.

    Args:
        views: [N, 3, S, S] uint8, of one or several photos.
        draws: the draws of each view, from ``Augmenter.draws``.

    Returns:
        [N, 3, S, S] uint8 on the same device.
    """
    return augment_views(views, to_device(stack_draws(draws), views.device))


def with_augmented_views(batch: Batch) -> Batch:
    """Augment the ``views`` of a batch on a device if it holds their draws (``augment``)."""
    if "augment" not in batch:
        return batch
    views = augment_views(batch["views"].flatten(0, 1), batch["augment"]).view(batch["views"].shape)
    rest: Batch = {**batch, "views": views}
    del rest["augment"]
    return rest


def to_device(draws: StackedDraws, device: torch.device) -> StackedDraws:
    """Move the tables to a device; the copy to a GPU is asynchronous."""

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if device.type == "cuda" and value.device.type == "cpu" and not value.is_pinned():
            value = value.pin_memory()
        return value.to(device, non_blocking=True)

    return {name: {part: moved(value) for part, value in tables.items()} for name, tables in draws.items()}


def _per_view(values: Tensor) -> Tensor:
    """[n] -> [n, 1, 1, 1] float32."""
    return values.to(torch.float32).view(-1, 1, 1, 1)


def _blend(views: Tensor, colour: Tensor | float, alpha: Tensor) -> Tensor:
    pixels = views.float()
    return to_uint8(pixels + (colour - pixels) * alpha)


def _truncated(views: Tensor) -> Tensor:
    """Torchvision's colour operations truncate instead of rounding."""
    return views.clamp_(0, 255).to(torch.uint8)


def _exact_mean(values: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Mean of integers in float32, independent of the order of summation; the axes are kept."""
    count = math.prod(values.shape[axis] for axis in axes)
    return (values.sum(axes, keepdim=True, dtype=torch.float64) / count).float()


def _grey(views: Tensor) -> Tensor:
    red, green, blue = views.unbind(1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).unsqueeze(1).floor_()


def _stretch(views: Tensor, factor: Tensor, ground: Tensor) -> Tensor:
    return _truncated(torch.addcmul(views * _per_view(factor), ground, _per_view(1.0 - factor)))


def _flip(views: Tensor, tables: dict[str, Tensor]) -> Tensor:
    return views.flip(-1)


def _brightness(views: Tensor, tables: dict[str, Tensor]) -> Tensor:
    return _truncated(views * _per_view(tables["factor"]))


def _contrast(views: Tensor, tables: dict[str, Tensor]) -> Tensor:
    return _stretch(views, tables["factor"], _exact_mean(_grey(views), (1, 2, 3)))


def _saturation(views: Tensor, tables: dict[str, Tensor]) -> Tensor:
    return _stretch(views, tables["factor"], _grey(views))


def _hue(views: Tensor, tables: dict[str, Tensor]) -> Tensor:
    """Via hue, saturation and value (A. R. Smith, SIGGRAPH 1978), as in torchvision and Pillow."""
    image = views.float() / 255
    low, value = image.aminmax(dim=1)
    span = value - low
    is_grey = span == 0
    saturation = span / torch.where(is_grey, 1.0, value)
    red, green, blue = ((value.unsqueeze(1) - image) / torch.where(is_grey, 1.0, span).unsqueeze(1)).unbind(1)
    is_red, is_green = image[:, 0] == value, image[:, 1] == value
    sixths = torch.where(is_red, blue - green, torch.where(is_green, 2 + red - blue, 4 + green - red))
    hue = torch.where(is_grey, 0.0, sixths / 6 + 1).fmod(1) + tables["turn"].float().view(-1, 1, 1)
    sixths = hue.remainder(1) * 6
    channels = []
    for offset in (5, 3, 1):
        place = (sixths + offset).remainder(6)
        slope = torch.minimum(place, 4 - place).clamp(0, 1)
        channels.append(value * (1 - saturation * slope))
    return torch.stack(channels, 1).clamp_(0, 1).mul_(256 - 1e-3).to(torch.uint8)


def _sampled(views: Tensor, grid: Tensor) -> Tensor:
    """Bilinear samples at ``grid`` [n, S, S, 2] in −1…1; outside is filled with the view's mean colour."""
    fill = _exact_mean(views[:, :, ::4, ::4], (2, 3)).round()
    pixels = F.pad(views.float(), (0, 0, 0, 0, 0, 1), value=1.0)  # fourth channel: 1 inside the view
    sampled = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    colours, inside = sampled[:, :3], sampled[:, 3:]
    return (colours - fill).mul_(inside).add_(fill).round_().to(torch.uint8)


def _affine(views: Tensor, tables: dict[str, Tensor]) -> Tensor:
    side, device = views.shape[-1], views.device
    steps = torch.linspace((1.0 - side) * 0.5, (side - 1.0) * 0.5, steps=side, device=device)
    matrix = (tables["matrix"].float() / (0.5 * side)).view(-1, 2, 3, 1, 1)
    x, y = steps[None, None, :], steps[None, :, None]
    return _sampled(views, (matrix[:, :, 0] * x + matrix[:, :, 1] * y + matrix[:, :, 2]).movedim(1, -1))


def _perspective(views: Tensor, tables: dict[str, Tensor]) -> Tensor:
    side, device = views.shape[-1], views.device
    steps = torch.linspace(0.5, side - 0.5, steps=side, device=device)
    a = tables["coefficients"].float().view(-1, 8, 1, 1)
    x, y = steps[None, None, :], steps[None, :, None]
    depth = a[:, 6] * x + a[:, 7] * y + 1
    across = (a[:, 0] * x + a[:, 1] * y + a[:, 2]) / (0.5 * side)
    down = (a[:, 3] * x + a[:, 4] * y + a[:, 5]) / (0.5 * side)
    return _sampled(views, torch.stack([across / depth - 1, down / depth - 1], dim=-1))


def _rain(views: Tensor, tables: dict[str, Tensor]) -> Tensor:
    """Where streaks cross, the last one shows: the largest number wins, whatever the order of writes."""
    count, side = len(views), views.shape[-1]
    longest = max(3, round(table.STREAK_LENGTH[1] * side))
    steps = torch.arange(longest, dtype=torch.float64, device=views.device)
    rows = torch.floor(tables["top"].unsqueeze(2) + steps)
    columns = torch.floor(tables["left"].unsqueeze(2) + tables["slant"].view(-1, 1, 1) * steps)
    there = (steps < tables["length"].view(-1, 1, 1)) & (rows >= 0) & (rows < side)
    numbers = torch.arange(1, table.MOST_STREAKS + 1, device=views.device).view(1, -1, 1)
    seen = torch.zeros(count, side * side + 1, dtype=torch.int64, device=views.device)
    for shift in range(streak_width(side)):
        inside = there & (columns + shift >= 0) & (columns + shift < side)
        place = torch.where(inside, rows * side + columns + shift, side * side).long()
        rank = (numbers + shift * table.MOST_STREAKS).expand_as(place)
        seen.scatter_reduce_(1, place.flatten(1), rank.flatten(1), "amax")
    seen = seen[:, :-1]
    light = tables["light"].float().gather(1, (seen - 1).clamp_min(0) % table.MOST_STREAKS)
    light = torch.where(seen > 0, light, 0.0).view(count, 1, side, side)
    return _blend(views * _per_view(tables["dim"]), STREAK_COLOUR, light)


def _fog(views: Tensor, tables: dict[str, Tensor]) -> Tensor:
    side = views.shape[-1]
    y, _ = unit_grid(side, views.device)
    patches = tables["patches"].unsqueeze(1)
    patches = F.interpolate(patches, size=(side, side), mode="bilinear", align_corners=True)
    density = _per_view(tables["density"]) * (1 - 0.6 * y) + patches
    return _blend(views, _per_view(tables["grey"]), density.clamp_(0, 1))


def _shadow(views: Tensor, tables: dict[str, Tensor]) -> Tensor:
    y, x = unit_grid(views.shape[-1], views.device)
    angle = tables["angle"]  # float64 until the cosine is taken, as in numpy
    along = (x - 0.5) * _per_view(angle.cos()) + (y - 0.5) * _per_view(angle.sin())
    beyond = _per_view(tables["half_width"]) - (along - _per_view(tables["centre"])).abs()
    inside = torch.sigmoid(beyond / _per_view(tables["softness"]))
    return _blend(views, 0.0, inside * _per_view(tables["darkness"]))


def _sun_glare(views: Tensor, tables: dict[str, Tensor]) -> Tensor:
    y, x = unit_grid(views.shape[-1], views.device)
    distance2 = (x - _per_view(tables["x"])) ** 2 + (y - _per_view(tables["y"])) ** 2
    alpha = _per_view(tables["strength"]) * torch.exp(-distance2 / _per_view(tables["radius"] ** 2))
    colour = torch.tensor(SUN_COLOUR, device=views.device)[:, None, None]
    return _blend(views, colour, alpha)


def _noise(views: Tensor, tables: dict[str, Tensor]) -> Tensor:
    return (views.to(torch.int16) + tables["steps"]).clamp_(0, 255).to(torch.uint8)


def _motion_blur(views: Tensor, tables: dict[str, Tensor]) -> Tensor:
    """Differences of cumulative sums: handles different lengths at once; integers, hence exact."""
    side = views.shape[-1]
    most = max(1, round(table.MOTION_LENGTH[1] * side / 2))
    wide = F.pad(views.float(), (most, most, 0, 0), mode="replicate").to(torch.int32)
    sums = F.pad(wide.cumsum(-1, dtype=torch.int32), (1, 0))
    half = tables["half"].view(-1, 1, 1, 1)
    place = torch.arange(side, device=views.device) + most
    ends, starts = (place + half + 1), (place - half)
    shape = (-1, 3, side, -1)
    total = sums.gather(-1, ends.expand(shape)) - sums.gather(-1, starts.expand(shape))
    return to_uint8(total / (2 * half + 1).float())


def _blurred(kernel: int) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
    """Torchvision's Gaussian for a kernel size, as sums: a GPU's convolutions may round to TF32 (11 bits)."""
    deviation = 0.15 * kernel + 0.35
    places = np.linspace(-1, 1, kernel) * (kernel - 1) / math.sqrt(8)
    weights = np.exp(-((places / deviation) ** 2))
    weights = (weights / weights.sum()).tolist()

    def apply(views: Tensor, tables: dict[str, Tensor]) -> Tensor:
        side, edge = views.shape[-1], kernel // 2
        pixels = F.pad(views.float(), (edge, edge, edge, edge), mode="reflect")
        for axis in (-1, -2):
            parts = [pixels.narrow(axis, start, side) * weight for start, weight in enumerate(weights)]
            pixels = functools.reduce(torch.add, parts)
        return to_uint8(pixels)

    return apply


_APPLY: dict[str, Callable[[Tensor, dict[str, Tensor]], Tensor]] = {
    "flip": _flip,
    "rotate": _affine,
    "perspective": _perspective,
    "zoom": _affine,
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "hue": _hue,
    "rain": _rain,
    "fog": _fog,
    "shadow": _shadow,
    "sun_glare": _sun_glare,
    "noise": _noise,
    "motion_blur": _motion_blur,
    **{f"blur{kernel}": _blurred(kernel) for kernel in table.BLUR_KERNELS},
}
"""In the order of ``PROBABILITIES``, which is the order of application."""
