"""Draws small charts as inline SVG, styled by the page (``assets/report.css``).

Colours are CSS classes (``c1`` … ``c6``), so one drawing works for light and dark themes. Lengths are px of
the drawing's own view box; the page scales it. All text from outside is escaped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

WIDTH, HEIGHT = 460.0, 270.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 14.0, 14.0, 42.0

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Scale:
    """A linear map from data to px."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Map a value to px."""
        span = (self.high - self.low) or 1.0
        return self.start + (value - self.low) / span * (self.end - self.start)


@dataclass(frozen=True)
class Line:
    """One curve of a chart; points that are not finite leave a gap."""

    name: str
    points: Points
    colour: str = "c1"
    dots: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """A drawing with its title, legend and note."""

    title: str
    svg: Markup
    legend: list[Line] = field(default_factory=list)
    note: str = ""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) inside [low, high], about ``count`` of them."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low] if math.isfinite(low) else []
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if span / (m * power) <= count * 1.2)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_text(value: float) -> str:
    """Format the number of a tick briefly."""
    size = abs(value)
    if size < 1e-12:
        return "0"
    if size >= 1e4:
        return f"{value / 1000:g}k"
    if size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def finite(points: Points) -> list[tuple[float, float]]:
    """The points whose coordinates are both finite."""
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def thin(points: Points, most: int = 240) -> list[tuple[float, float]]:
    """Reduce to at most ``most`` points, the means of equal runs, to keep the page small."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    runs = [finite(points[i : i + size]) for i in range(0, len(points), size)]
    return [(sum(x for x, _ in r) / len(r), sum(y for _, y in r) / len(r)) for r in runs if r]


def domain(values: Sequence[float], zero: bool = False) -> tuple[float, float]:
    """Axis range for values: slightly wider than they are, from 0 if ``zero``; (0, 1) for no values."""
    known = [v for v in values if math.isfinite(v)]
    if not known:
        return 0.0, 1.0
    low, high = min(known), max(known)
    if zero:
        low = min(low, 0.0)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if zero and low == 0 else low - margin), high + margin


def text(x: float, y: float, content: str, kind: str = "tick", anchor: str = "start") -> str:
    """A piece of text; ``content`` is escaped."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def segment(kind: str, x: tuple[float, float], y: tuple[float, float]) -> str:
    """A straight line between two ends."""
    return f'<line class="{kind}" x1="{x[0]:.1f}" x2="{x[1]:.1f}" y1="{y[0]:.1f}" y2="{y[1]:.1f}"/>'


def axes(x: Scale, y: Scale, x_label: str, y_label: str, y_ticks: int = 4) -> str:
    """Grid lines, ticks and labels of a plot."""
    parts = []
    for value in ticks(y.low, y.high, y_ticks) if y_ticks else []:
        parts.append(segment("grid", (x.start, x.end), (y(value), y(value))))
        parts.append(text(x.start - 7, y(value) + 4, tick_text(value), anchor="end"))
    for value in ticks(x.low, x.high):
        parts.append(text(x(value), y.start + 17, tick_text(value), anchor="middle"))
    parts.append(segment("axis", (x.start, x.end), (y.start, y.start)))
    parts.append(text((x.start + x.end) / 2, y.start + 35, x_label, "label", "middle"))
    if y_label:
        upright = f"translate(12 {(y.start + y.end) / 2:.1f}) rotate(-90)"
        parts.append(f'<g transform="{upright}">{text(0, 0, y_label, "label", "middle")}</g>')
    return "".join(parts)


def path(points: Points, x: Scale, y: Scale) -> str:
    """SVG path data through the points; a point that is not finite leaves a gap."""
    parts, pen_down = [], False
    for px, py in points:
        if not (math.isfinite(px) and math.isfinite(py)):
            pen_down = False
            continue
        parts.append(f"{'L' if pen_down else 'M'}{x(px):.1f},{y(py):.1f}")
        pen_down = True
    return "".join(parts)


def svg(
    content: str, description: str, width: float = WIDTH, height: float = HEIGHT, left: float = 0
) -> Markup:
    """Wrap a drawing in an SVG element with a description for screen readers."""
    return Markup(
        f'<svg class="chart" viewBox="{left:g} 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(description)}" preserveAspectRatio="xMidYMid meet">{content}</svg>'
    )


def draw_line(line: Line, x: Scale, y: Scale) -> str:
    """One curve, with dots if requested or if it is a single point."""
    dashed = " dashed" if line.dashed else ""
    parts = [f'<path class="line {line.colour}{dashed}" d="{path(line.points, x, y)}"/>']
    known = finite(line.points)
    if line.dots or len(known) == 1:
        parts += [
            f'<circle class="dot {line.colour}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3"/>' for a, b in known
        ]
    return "".join(parts)


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str = "",
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    under: str = "",
    note: str = "",
) -> Chart:
    """Curves over a common axis.

    Args:
        title: heading, and start of the description.
        lines: the curves; those without a finite point are skipped.
        x_label: text below the axis.
        y_label: text left of the axis.
        x_range: lowest and highest x; None = those of the data.
        y_range: lowest and highest y; None = those of the data.
        under: SVG drawn below the curves.
        note: sentence below the chart.
    """
    shown = [line for line in lines if finite(line.points)]
    known = [point for line in shown for point in finite(line.points)]
    x_low, x_high = x_range or (min((p[0] for p in known), default=0), max((p[0] for p in known), default=1))
    y_low, y_high = y_range or domain([p[1] for p in known])
    x, y = Scale(x_low, x_high, LEFT, WIDTH - RIGHT), Scale(y_low, y_high, HEIGHT - BOTTOM, TOP)
    content = axes(x, y, x_label, y_label) + under + "".join(draw_line(line, x, y) for line in shown)
    ends = "; ".join(f"{line.name} ends at {tick_text(finite(line.points)[-1][1])}" for line in shown)
    return Chart(
        title, svg(content, f"{title}: {ends or 'no values'}"), shown if len(shown) > 1 else [], note
    )


UNIT = (Scale(0, 1, LEFT, WIDTH - RIGHT), Scale(0, 1, HEIGHT - BOTTOM, TOP))
"""Scales of a plot with both axes from 0 to 1."""


def diagonal() -> str:
    """Dashed line from (0, 0) to (1, 1) of a plot with both axes from 0 to 1."""
    x, y = UNIT
    return f'<path class="reference" d="M{x(0):.1f},{y(0):.1f}L{x(1):.1f},{y(1):.1f}"/>'


def histogram(title: str, above: Sequence[int], below: Sequence[int], threshold: float) -> Chart:
    """Histogram of the predicted probability, class 1 upwards and class 0 downwards.

    Args:
        title: heading.
        above: counts of class 1 in equal bins of [0, 1].
        below: counts of class 0 in the same bins.
        threshold: decision threshold, drawn as a line.
    """
    top = max([*above, *below, 1])
    x, y = UNIT[0], Scale(-top * 1.1, top * 1.1, HEIGHT - BOTTOM, TOP)
    parts = [axes(x, Scale(0, 1, HEIGHT - BOTTOM, TOP), "predicted probability of roadwork", "", y_ticks=0)]
    for value in ticks(0, top, 2):
        for signed in {value, -value}:
            parts.append(segment("grid", (x.start, x.end), (y(signed), y(signed))))
            parts.append(text(x.start - 7, y(signed) + 4, tick_text(value), anchor="end"))
    step = (x.end - x.start) / max(len(above), 1)
    for counts, colour, sign in ((above, "c2", 1), (below, "c1", -1)):
        for index, count in enumerate(counts):
            a, b = sorted((y(0), y(sign * count)))
            parts.append(
                f'<rect class="bar {colour}" x="{x.start + index * step + 1:.1f}" width="{step - 2:.1f}" '
                f'y="{a:.1f}" height="{b - a:.1f}"/>'
            )
    parts.append(segment("axis", (x.start, x.end), (y(0), y(0))))
    parts.append(threshold_line(x(threshold), threshold))
    legend = [Line("roadwork (up)", [], "c2"), Line("no roadwork (down)", [], "c1")]
    description = (
        f"{title}: {sum(above)} photos with roadwork, {sum(below)} without, threshold {threshold:.3f}"
    )
    return Chart(title, svg("".join(parts), description), legend)


def threshold_line(at: float, threshold: float) -> str:
    """A vertical line at the decision threshold, with its number."""
    side, shift = ("end", -5) if threshold > 0.5 else ("start", 5)
    line = segment("threshold", (at, at), (TOP, HEIGHT - BOTTOM))
    return line + text(at + shift, TOP + 9, f"threshold {threshold:.2f}", "label", side)


def reliability(title: str, bins: Sequence[tuple[float, float, int]]) -> Chart:
    """Share of roadwork against predicted probability, with 95 % Wilson intervals and counts.

    Args:
        title: heading.
        bins: mean probability, share of positives and count of each non-empty bin.
    """
    x, y = UNIT
    most = max((n for *_, n in bins), default=1)
    parts = [axes(x, y, "predicted probability of roadwork", "share with roadwork"), diagonal()]
    for mean, share, count in bins:
        low, high = wilson(share, count)
        at, radius = x(mean), 3 + 6 * math.sqrt(count / most)
        parts.append(
            segment("whisker c1", (at, at), (y(low), y(high)))
            + f'<circle class="dot c1" cx="{at:.1f}" cy="{y(share):.1f}" r="{radius:.1f}"/>'
            + text(at + radius + 3, y(share) + (12 if share > 0.1 else -4), str(count), "count")
        )
    said = "; ".join(f"at {mean:.2f} {share:.2f} of {count}" for mean, share, count in bins)
    note = "Number and size: photos in the bin. Bars: 95 % Wilson interval. Dashed: perfect calibration."
    return Chart(title, svg("".join(parts), f"{title}: {said or 'no values'}"), [], note)


def wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share (Wilson, JASA 22, 1927, p. 209)."""
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max((centre - spread) / scale, 0.0), min((centre + spread) / scale, 1.0)
