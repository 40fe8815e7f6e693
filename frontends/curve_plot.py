"""Curves as one SVG file that needs nothing else: axes, one line with marks per series, a legend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 190, 40, 52
_COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#7b4b94", "#b8860b", "#444444", "#008b8b", "#a0446e")

Points = Sequence[tuple[float, float]]


def svg(title: str, across: str, up: str, series: Mapping[str, Points]) -> str:
    """One chart; points that are not finite are left out. ValueError where no point is left."""
    kept = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in series.items()}
    everything = [p for points in kept.values() for p in points]
    if not everything:
        raise ValueError("no finite point to plot")
    xs, ys = _ticks([p[0] for p in everything]), _ticks([p[1] for p in everything])

    def place(x: float, y: float) -> tuple[float, float]:
        right = (x - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - _LEFT - _RIGHT)
        high = (y - ys[0]) / (ys[-1] - ys[0]) * (HEIGHT - _TOP - _BOTTOM)
        return round(_LEFT + right, 1), round(HEIGHT - _BOTTOM - high, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(_LEFT, 22, title, 'font-size="15"'),
        _text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 12, across, 'text-anchor="middle"'),
        _text(16, HEIGHT / 2, up, f'text-anchor="middle" transform="rotate(-90 16 {HEIGHT / 2})"'),
    ]
    for x in xs:
        at, low = place(x, ys[0])
        parts += [_line(at, low, at, _TOP), _text(at, low + 16, f"{x:g}", 'text-anchor="middle"')]
    for y in ys:
        left, at = place(xs[0], y)
        parts += [_line(left, at, WIDTH - _RIGHT, at), _text(left - 6, at + 4, f"{y:g}", 'text-anchor="end"')]
    for index, (name, points) in enumerate(kept.items()):
        colour, row = _COLOURS[index % len(_COLOURS)], _TOP + 14 + 20 * index
        path = " ".join(f"{x},{y}" for x, y in (place(*p) for p in sorted(points)))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        marks = [place(*p) for p in points] + [(WIDTH - _RIGHT + 20, row - 4)]
        parts += [f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>' for x, y in marks]
        parts.append(_text(WIDTH - _RIGHT + 32, row, name))
    return "\n".join([*parts, "</svg>", ""])


def _ticks(values: Sequence[float]) -> list[float]:
    """About five round numbers that enclose the values."""
    low, high = min(values), max(values)
    raw = (high - low or abs(high) or 1.0) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * i, 10) for i in range(first, max(last, first + 1) + 1)]


def _line(x: float, y: float, to_x: float, to_y: float) -> str:
    return f'<line x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}" stroke="#ddd"/>'


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x}" y="{y}" {more}>{escape(text)}</text>'
