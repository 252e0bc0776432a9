"""Live runs as dots and their twins as lines, over the rate: an SVG of its own."""

from __future__ import annotations

from collections.abc import Sequence

from live.comparison import Row

WIDTH, HEIGHT = 300, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 24, 30
PANELS = (
    ("TTFT, ms", ("ttft_mean", "ttft_p90")),
    ("TPOT, ms", ("tpot_mean", "tpot_p90")),
    ("attainment", ("attainment",)),
)
COLOURS = ("#1f6fb4", "#c8501e")
STYLE = "font-family:sans-serif;font-size:11px"


def figure(rows: Sequence[Row]) -> str:
    """A line of panels a case; blue is the mean (or the share), red the 90th percentile."""
    cases = list(dict.fromkeys(row.case for row in rows))
    width, height = WIDTH * len(PANELS), HEIGHT * len(cases) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" style="{STYLE}">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for line, case in enumerate(cases):
        own = [row for row in rows if row.case == case]
        for place, (title, names) in enumerate(PANELS):
            at = f"translate({place * WIDTH},{line * HEIGHT})"
            parts.append(f'<g transform="{at}">{_panel(own, f"{case}: {title}", names)}</g>')
    words = "dots: live; lines: twin; blue: mean or share, red: p90; below: requests a second"
    parts.append(f'<text x="{LEFT}" y="{height - 6}">{words}</text></svg>')
    return "\n".join(parts) + "\n"


def _panel(rows: Sequence[Row], title: str, names: Sequence[str]) -> str:
    high_x = max(row.rate_rps for row in rows) * 1.1
    both = [getattr(side, name) for row in rows for side in (row.live, row.twin) for name in names]
    high_y = 1.0 if names == ("attainment",) else max(both) * 1.1

    def at(x: float, y: float) -> tuple[float, float]:
        px = LEFT + x / high_x * (WIDTH - LEFT - RIGHT)
        return round(px, 1), round(HEIGHT - BOTTOM - y / high_y * (HEIGHT - TOP - BOTTOM), 1)

    (x0, y0), (x1, y1) = at(0, 0), at(high_x, high_y)
    parts = [
        f'<text x="{LEFT}" y="{TOP - 8}">{title}</text>',
        f'<path d="M{x0},{y1}V{y0}H{x1}" fill="none" stroke="#888"/>',
        f'<text x="{x0 - 4}" y="{y1 + 4}" text-anchor="end">{high_y:.3g}</text>',
        f'<text x="{x0 - 4}" y="{y0}" text-anchor="end">0</text>',
    ]
    for row in rows:
        px, _ = at(row.rate_rps, 0)
        parts.append(f'<text x="{px}" y="{y0 + 14}" text-anchor="middle">{row.rate_rps:g}</text>')
    for colour, name in zip(COLOURS, names, strict=False):
        line = [at(row.rate_rps, getattr(row.twin, name)) for row in rows]
        path = " ".join(f"{px},{py}" for px, py in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        for row in rows:
            px, py = at(row.rate_rps, getattr(row.live, name))
            parts.append(f'<circle cx="{px}" cy="{py}" r="3.5" fill="{colour}"/>')
    return "".join(parts)
