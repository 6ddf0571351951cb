"""Render a photo from its facts: JPEG bytes with EXIF, and the exact six-class mask as PNG bytes."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from roadwork_dist.common.random import generator_for
from roadwork_dist.demo.synthetic.layout import Thing, arrange
from roadwork_dist.demo.synthetic.metadata import Facts
from roadwork_dist.demo.synthetic.scene import add_everywhere, paint_background
from roadwork_dist.demo.synthetic.sprite import Canvas
from roadwork_dist.demo.synthetic.street import random_street
from roadwork_dist.demo.synthetic.view import Light, View, light_for, random_view

JPEG_QUALITY = 90
_ATTEMPTS = 20
_UPRIGHT_TO_STORED = {
    3: Image.Transpose.ROTATE_180,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True)
class Picture:
    """A rendered photo and its mask, both upright (as a viewer shows the photo)."""

    photo: Image.Image  # RGB
    mask: Image.Image  # L, bit i of a pixel = class i of MASK_CLASSES is visible there


def render(facts: Facts, seed: int, size: tuple[int, int]) -> Picture:
    """Render one photo, a pure function of the arguments.

    Args:
        facts: content of the photo.
        seed: seed of the set.
        size: width and height in px, landscape.
    """
    for attempt in range(_ATTEMPTS):  # a distant work zone may be hidden: try another layout
        picture = _attempt(facts, generator_for(seed, facts.id, "scene", attempt), size)
        if bool(facts.label) == (picture.mask.getbbox() is not None):
            return picture
    raise RuntimeError(f"photo {facts.id} does not show its label {facts.label} in {_ATTEMPTS} layouts")


def _attempt(facts: Facts, rng: np.random.Generator, size: tuple[int, int]) -> Picture:
    view = random_view(rng, *size)
    light = light_for(facts.daytime, facts.weather, rng)
    dry = facts.longitude < -103 and facts.latitude < 41 and rng.random() < 0.8
    street = random_street(rng, facts.scene, dry)
    things = arrange(rng, street, facts.label)
    background, sprites, air = (np.random.default_rng(rng.integers(2**62)) for _ in range(3))
    photo = paint_background(view, light, street, facts.weather, background)
    mask = Image.new("L", size)
    for thing in things:
        _place(photo, mask, thing, view, light, np.random.default_rng(sprites.integers(2**62)))
    _precipitation(photo, facts.weather, light, air)
    _sensor_noise(photo, facts.daytime, air)
    return Picture(photo, mask)


def _place(
    photo: Image.Image, mask: Image.Image, thing: Thing, view: View, light: Light, rng: np.random.Generator
) -> None:
    """Draw one object over what is behind it, in the photo and in the mask."""
    scale = view.scale(thing.z)
    canvas = thing.draw(rng, lambda width, height: Canvas(width, height, scale))
    width, height = (max(1, round(side * scale)) for side in (canvas.width, canvas.height))
    column, row = view.pixel(thing.x, 0.0, thing.z)
    left, top = round(column - width / 2), round(row) - height
    if left >= view.width or left + width <= 0 or top >= view.height:
        return
    _shadow(photo, column, row, width, light)
    sprite = canvas.lit(light, thing.z, rng).resize((width, height), Image.Resampling.HAMMING)
    alpha = sprite.getchannel("A")
    photo.paste(sprite, (left, top), alpha)
    solid = alpha.point([255 * (a >= 128) for a in range(256)])
    mask.paste(0 if thing.mask_class < 0 else 1 << thing.mask_class, (left, top), solid)


def _shadow(photo: Image.Image, column: float, row: float, width: int, light: Light) -> None:
    """Draw a soft dark patch under an object, longer where the sun casts shadows."""
    reach = 1.0 + 0.5 * light.contrast
    wide, high = max(2, round(width * 1.1 * reach)), max(2, round(width * 0.13 * reach))
    strength = 90 + 70 * light.contrast
    y, x = np.mgrid[-1:1:24j, -1:1:48j]
    soft = np.clip(1.25 - np.hypot(x, y) * 1.25, 0, 1) * strength
    patch = Image.fromarray(soft.astype(np.uint8)).resize((wide, high), Image.Resampling.BILINEAR)
    shift = 0.18 * width * light.contrast
    photo.paste((14, 14, 18), (round(column - wide / 2 + shift), round(row - high * 0.6)), patch)


def _precipitation(photo: Image.Image, weather: str, light: Light, rng: np.random.Generator) -> None:
    """Draw streaks of rain or flakes of snow, in place."""
    if weather not in ("rainy", "snowy"):
        return
    width, height = photo.size
    draw = ImageDraw.Draw(photo, "RGBA")
    unit = width / 1000
    tone = int(np.clip(130 + 110 * light.gain[1], 0, 255))
    slant = rng.uniform(-0.25, 0.25)
    for x, y, depth in zip(rng.random(700) * width, rng.random(700) * height, rng.random(700), strict=True):
        if weather == "rainy":
            length = unit * (8 + 34 * depth * depth)
            ends = (x, y, x + slant * length, y + length)
            draw.line(
                ends, fill=(tone, tone, tone, int(40 + 60 * depth)), width=max(1, round(unit * depth * 1.3))
            )
        else:
            r = unit * (0.6 + 2.6 * depth**3)
            draw.ellipse((x - r, y - r, x + r, y + r), fill=(tone, tone, tone, int(220 - 90 * depth)))


def _sensor_noise(photo: Image.Image, daytime: str, rng: np.random.Generator) -> None:
    """Add sensor noise, stronger at night, in place."""
    sigma = {"night": 5.0, "dusk": 3.5, "dawn": 3.0}.get(daytime, 2.2)
    side = 1024
    noise = rng.standard_normal((min(side, photo.height), min(side, photo.width), 3), dtype=np.float32)
    stamp = Image.fromarray(np.clip(noise * np.float32(sigma) + 128, 0, 255).astype(np.uint8))
    add_everywhere(photo, stamp, (0, 0, photo.width, photo.height))


def _degrees(value: float) -> tuple[float, float, float]:
    minutes, seconds = divmod(abs(value) * 3600, 60)
    degrees, minutes = divmod(minutes, 60)
    return degrees, minutes, round(seconds, 3)


def _exif(facts: Facts) -> Image.Exif:
    """EXIF with date, orientation, camera model ``synthetic`` and, unless the row hides it, the place."""
    exif = Image.Exif()
    exif[0x010F] = "roadwork_dist"  # Make
    exif[0x0110] = "synthetic"  # Model
    exif[0x0112] = facts.orientation
    exif[0x0132] = facts.taken
    exif.get_ifd(0x8769)[0x9003] = facts.taken  # DateTimeOriginal
    if "gps" not in facts.null:
        exif.get_ifd(0x8825).update(
            {
                1: "N" if facts.latitude >= 0 else "S",
                2: _degrees(facts.latitude),
                3: "E" if facts.longitude >= 0 else "W",
                4: _degrees(facts.longitude),
            }
        )
    return exif


def photo_bytes(picture: Picture, facts: Facts) -> bytes:
    """The photo as a JPEG, with pixels stored rotated according to its EXIF Orientation."""
    stored = picture.photo
    if facts.orientation in _UPRIGHT_TO_STORED:
        stored = stored.transpose(_UPRIGHT_TO_STORED[facts.orientation])
    buffer = io.BytesIO()
    stored.save(buffer, "JPEG", quality=JPEG_QUALITY, exif=_exif(facts))
    return buffer.getvalue()


def mask_bytes(picture: Picture) -> bytes:
    """The mask as an 8-bit PNG with the size of the upright photo."""
    buffer = io.BytesIO()
    picture.mask.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
