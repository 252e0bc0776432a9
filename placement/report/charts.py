"""Line, scatter and bar charts as SVG text: no library, no script, nothing from outside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import floor, log10

WIDTH, HEIGHT = 560, 320
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 14, 46
COLOURS = ("var(--a)", "var(--b)", "var(--c)", "var(--d)", "var(--e)", "var(--f)")

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points in order of x. `line` False: dots only."""

    name: str
    points: Sequence[Point]
    line: bool = True
    labels: Sequence[str] = ()  # a tooltip a point


@dataclass(frozen=True, kw_only=True)
class Axis:
    label: str
    low: float
    high: float
    percent: bool = False

    def text(self, value: float) -> str:
        if self.percent:
            return f"{value:.0%}"
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:g}"


def line_chart(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    across: float | None = None,
    down: float | None = None,
) -> str:
    """`across` and `down` are marked by dashed lines: a target share, a chosen rate."""

    def at(point: Point) -> tuple[float, float]:
        px = LEFT + (point[0] - x.low) / (x.high - x.low) * (WIDTH - LEFT - RIGHT)
        py = HEIGHT - BOTTOM - (point[1] - y.low) / (y.high - y.low) * (HEIGHT - TOP - BOTTOM)
        return round(px, 1), round(py, 1)

    parts = _frame(x, y, at)
    if across is not None:
        (x0, y0), (x1, _) = at((x.low, across)), at((x.high, across))
        parts.append(f'<line class="mark" x1="{x0}" y1="{y0}" x2="{x1}" y2="{y0}"/>')
    if down is not None and x.low <= down <= x.high:
        (x0, y0), (_, y1) = at((down, y.low)), at((down, y.high))
        parts.append(f'<line class="mark" x1="{x0}" y1="{y0}" x2="{x0}" y2="{y1}"/>')
    for colour, one in zip(COLOURS, series, strict=False):
        places = [at(point) for point in one.points]
        if one.line and places:
            path = " ".join(f"{px},{py}" for px, py in places)
            parts.append(f'<polyline class="line" style="stroke:{colour}" points="{path}"/>')
        for i, (px, py) in enumerate(places):
            tip = one.labels[i] if one.labels else f"{x.text(one.points[i][0])}"
            title = f"<title>{escape(one.name)}: {escape(tip)}</title>"
            radius = 2.6 if one.line else 4
            parts.append(
                f'<circle cx="{px}" cy="{py}" r="{radius}" style="fill:{colour}">{title}</circle>'
            )
    label = escape(f"{y.label} against {x.label}")
    picture = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        + "".join(parts)
        + "</svg>"
    )
    return picture + _legend([one.name for one in series])


def bar_chart(groups: Sequence[tuple[str, Sequence[tuple[str, float, str]]]]) -> str:
    """Groups of (name, value, text); bars are relative to the largest of their group."""
    parts, top = [], 8.0
    for title, bars in groups:
        parts.append(f'<text class="group" x="0" y="{top + 12}">{escape(title)}</text>')
        top += 22
        most = max((value for _, value, _ in bars), default=1.0) or 1.0
        for colour, (name, value, text) in zip(COLOURS, bars, strict=False):
            width = round(300 * value / most, 1)
            parts.append(
                f'<text class="tick" x="0" y="{top + 13}">{escape(name)}</text>'
                f'<rect x="120" y="{top}" width="{width}" height="18" rx="3" '
                f'style="fill:{colour}"/>'
                f'<text class="value" x="{128 + width}" y="{top + 13}">{escape(text)}</text>'
            )
            top += 24
        top += 10
    return f'<svg viewBox="0 0 {WIDTH} {top:.0f}" role="img">{"".join(parts)}</svg>'


def _frame(x: Axis, y: Axis, at: Callable[[Point], Point]) -> list[str]:
    parts = []
    for value in ticks(y.low, y.high):
        (x0, y0), (x1, _) = at((x.low, value)), at((x.high, value))
        parts.append(
            f'<line class="grid" x1="{x0}" y1="{y0}" x2="{x1}" y2="{y0}"/>'
            f'<text class="tick" x="{x0 - 8}" y="{y0 + 4}" text-anchor="end">{y.text(value)}</text>'
        )
    for value in ticks(x.low, x.high):
        px, py = at((value, y.low))
        parts.append(
            f'<text class="tick" x="{px}" y="{py + 18}" text-anchor="middle">{x.text(value)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{escape(x.label)}</text>"
        f'<text class="label" transform="translate(13 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(y.label)}</text>'
    )
    return parts


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers within [low, high]."""
    span = high - low
    step = 10 ** floor(log10(span / most))
    step = next(step * k for k in (1, 2, 2.5, 5, 10) if span / (step * k) <= most)
    first = -(-low // step)
    return [round((first + i) * step, 10) for i in range(int((high - first * step) / step) + 1)]


def _legend(names: Sequence[str]) -> str:
    items = "".join(
        f'<span><i style="background:{colour}"></i>{escape(name)}</span>'
        for colour, name in zip(COLOURS, names, strict=False)
    )
    return f'<div class="legend">{items}</div>'
