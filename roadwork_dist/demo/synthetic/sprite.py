"""Sprites: draw an object in metres, then apply lighting, haze and scale for its distance."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from roadwork_dist.demo.synthetic.view import Colour, Light, Point

_MAX_SIDE = 1100
"""Largest side in px at which an object is drawn; nearer ones are scaled up, without visible loss."""


def _ink(colour: Colour) -> tuple[int, int, int, int]:
    r, g, b = (int(min(255, max(0, c))) for c in colour)
    return r, g, b, 255


@lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


class Canvas:
    """Drawing surface in metres: x from the middle, y up from the ground.

    Args:
        width: width of the object in m.
        height: height of the object in m.
        scale: requested pixels per metre; drawn at twice that, within limits.
    """

    def __init__(self, width: float, height: float, scale: float) -> None:
        self.width, self.height = width, height
        self.scale = min(2 * scale, _MAX_SIDE / max(width, height))
        self.size = max(2, round(width * self.scale)), max(2, round(height * self.scale))
        self.image = Image.new("RGBA", self.size, (0, 0, 0, 0))
        self._draw = ImageDraw.Draw(self.image)
        self._lamps: Image.Image | None = None

    def at(self, x: float, y: float) -> Point:
        """Pixel position of a point in metres."""
        return (x + self.width / 2) * self.scale, (self.height - y) * self.scale

    def poly(self, points: Sequence[Point], colour: Colour) -> None:
        """Draw a filled polygon."""
        self._draw.polygon([self.at(*p) for p in points], fill=_ink(colour))

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour, *, radius: float = 0.0) -> None:
        """Draw a filled rectangle with corners rounded by ``radius`` metres."""
        (left, bottom), (right, top) = self.at(min(x0, x1), min(y0, y1)), self.at(max(x0, x1), max(y0, y1))
        if radius:
            self._draw.rounded_rectangle((left, top, right, bottom), radius * self.scale, fill=_ink(colour))
        else:
            self._draw.rectangle((left, top, right, bottom), fill=_ink(colour))

    def oval(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        """Draw a filled ellipse inside a box."""
        (left, bottom), (right, top) = self.at(x0, y0), self.at(x1, y1)
        self._draw.ellipse((left, top, right, bottom), fill=_ink(colour))

    def disc(self, x: float, y: float, radius: float, colour: Colour) -> None:
        """Draw a filled circle."""
        self.oval(x - radius, y - radius, x + radius, y + radius, colour)

    def line(self, points: Sequence[Point], width: float, colour: Colour) -> None:
        """Draw a line of ``width`` metres with round joints."""
        pixels = max(1, round(width * self.scale))
        self._draw.line([self.at(*p) for p in points], fill=_ink(colour), width=pixels, joint="curve")

    def text(self, x: float, y: float, height: float, words: str, colour: Colour) -> None:
        """Draw text of ``height`` metres, centred on a point; a bar if it would be too small to read."""
        size = int(height * self.scale * 1.4)
        if size < 5:
            half = 0.3 * height * len(words)
            self.box(x - half, y - height * 0.3, x + half, y + height * 0.3, colour)
        else:
            self._draw.text(self.at(x, y), words, fill=_ink(colour), font=_font(size), anchor="mm")

    def lamp(self, x: float, y: float, radius: float, colour: Colour) -> None:
        """Draw a luminous disc, which does not depend on the lighting."""
        self.disc(x, y, radius, colour)
        if self._lamps is None:
            self._lamps = Image.new("RGB", self.size)
        (left, bottom), (right, top) = self.at(x - radius, y - radius), self.at(x + radius, y + radius)
        ImageDraw.Draw(self._lamps).ellipse((left, top, right, bottom), fill=_ink(colour)[:3])

    def lit(self, light: Light, z: float, rng: np.random.Generator) -> Image.Image:
        """The drawing (RGBA) as seen at distance ``z``: side light, dirt, exposure and haze."""
        pixels = np.asarray(self.image).astype(np.float32)
        rows, columns = pixels.shape[:2]
        slope = 0.16 * light.contrast * rng.choice((-1.0, 1.0))
        across = np.linspace(1 - slope, 1 + slope, columns, dtype=np.float32)
        down = np.linspace(1.06, 0.84, rows, dtype=np.float32)
        dirt = blotches(rng, rows, columns, cells=9) * np.float32(0.07) + 1
        lit = pixels[..., :3] * (across * down[:, None] * dirt)[..., None] * light.gain_at(z)
        if self._lamps is not None:
            lit = np.maximum(lit, np.asarray(self._lamps))
        t = np.float32(light.fade(z))
        pixels[..., :3] = lit * t + np.asarray(light.haze, dtype=np.float32) * (1 - t)
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8), "RGBA")


Pen = Callable[[float, float], Canvas]
"""Creates the canvas of an object of (width, height) metres, at the scale of its distance."""
Drawer = Callable[[np.random.Generator, Pen], Canvas]
"""Draws one object with its own random details."""


def blotches(rng: np.random.Generator, rows: int, columns: int, *, cells: int) -> NDArray[np.float32]:
    """[rows, columns] smooth noise, roughly standard normal, with ``cells`` blotches on the longer side."""
    long = max(rows, columns)
    small = (max(2, rows * cells // long), max(2, columns * cells // long))
    grid = Image.fromarray(rng.standard_normal(small, dtype=np.float32))
    return np.asarray(grid.resize((columns, rows), Image.Resampling.BICUBIC))


def fractal(
    rng: np.random.Generator, rows: int, columns: int, *, cells: int, octaves: int
) -> NDArray[np.float32]:
    """[rows, columns] noise of ``octaves`` scales, each half the size and strength of the last."""
    total = np.zeros((rows, columns), dtype=np.float32)
    for octave in range(octaves):
        total += blotches(rng, rows, columns, cells=cells * 2**octave) * np.float32(0.5**octave)
    return total
