"""Small charts as SVG: a scatter plot with a line through some of its points, and bars. No scripts, no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 84, 16, 28, 48
INK, GREY, ACCENT, CHOSEN = "#222", "#999", "#1f77b4", "#d62728"


@dataclass(frozen=True, kw_only=True)
class Dot:
    x: float
    y: float
    label: str
    front: bool = False
    chosen: bool = False


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Up to `most` + 1 round numbers within [low, high]."""
    span = high - low or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / most))
    step *= next(m for m in (1, 2, 5, 10) if span / (m * step) <= most)
    first = math.ceil(low / step) * step
    return [first + i * step for i in range(int((high - first) / step + 1e-9) + 1)]


def form(x: float) -> str:
    if x and abs(x) >= 1e6:
        return f"{x / 1e6:,.4g} M"
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"


def text(x: float, y: float, words: str, *, anchor: str = "middle", size: int = 11, fill: str = INK) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{fill}" '
        f'font-family="sans-serif">{escape(words)}</text>'
    )


def padded(values: Sequence[float]) -> tuple[float, float]:
    """The range of an axis, with some room at both ends."""
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def document(parts: Sequence[str], height: int = HEIGHT) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>{"".join(parts)}</svg>'
    )


def scatter(dots: Sequence[Dot], *, title: str, x_name: str, y_name: str, diagonal: bool = False) -> str:
    """Labelled dots; a line joins those of the front. `diagonal` draws y = x, on equal axes."""
    if not dots:
        return ""
    xs, ys = padded([d.x for d in dots]), padded([d.y for d in dots])
    if diagonal:
        xs = ys = min(xs[0], ys[0]), max(xs[1], ys[1])

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - xs[0]) / (xs[1] - xs[0]) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - ys[0]) / (ys[1] - ys[0]) * (HEIGHT - TOP - BOTTOM)

    parts = [text(WIDTH / 2, 16, title, size=13)]
    for x in ticks(*xs):
        px, _ = at(x, ys[0])
        parts.append(f'<path d="M{px:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#eee"/>')
        parts.append(text(px, HEIGHT - BOTTOM + 16, form(x)))
    for y in ticks(*ys):
        _, py = at(xs[0], y)
        parts.append(f'<path d="M{LEFT} {py:.1f}H{WIDTH - RIGHT}" stroke="#eee"/>')
        parts.append(text(LEFT - 6, py + 4, form(y), anchor="end"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_name))
    parts.append(f'<g transform="rotate(-90 14 {HEIGHT / 2})">{text(14, HEIGHT / 2, y_name)}</g>')
    if diagonal:
        (x0, y0), (x1, y1) = at(xs[0], xs[0]), at(xs[1], xs[1])
        parts.append(f'<path d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}" stroke="{GREY}" stroke-dasharray="4 3"/>')
    front = [at(d.x, d.y) for d in sorted(dots, key=lambda d: d.x) if d.front]
    if len(front) > 1:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in front)
        parts.append(f'<path d="M{path}" fill="none" stroke="{ACCENT}"/>')
    for d in dots:
        x, y = at(d.x, d.y)
        color = CHOSEN if d.chosen else ACCENT if d.front else GREY
        label = f"<title>{escape(d.label)}</title>"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{5 if d.chosen else 4}" fill="{color}">{label}</circle>')
        dx, anchor = (-8, "end") if x > WIDTH - 150 else (8, "start")
        parts.append(text(x + dx, y - 6, d.label, anchor=anchor, size=10, fill=color))
    return document(parts)


def bars(values: Sequence[tuple[str, float]], *, title: str, unit: str) -> str:
    """Horizontal bars from zero, one for each value."""
    if not values:
        return ""
    row, left = 20, 250
    height = TOP + row * len(values) + 12
    low, high = min(0.0, *(v for _, v in values)), max(0.0, *(v for _, v in values))
    scale = (WIDTH - left - 90) / ((high - low) or 1.0)
    parts = [text(WIDTH / 2, 16, title, size=13)]
    for i, (name, v) in enumerate(values):
        y = TOP + row * i
        x = left + (min(v, 0.0) - low) * scale
        parts.append(text(left - 8, y + 13, name, anchor="end"))
        parts.append(f'<rect x="{x:.1f}" y="{y + 3}" width="{abs(v) * scale:.1f}" height="{row - 7}" fill="{ACCENT}"/>')
        parts.append(text(left + (max(v, 0.0) - low) * scale + 5, y + 13, f"{v:.4g} {unit}", anchor="start"))
    return document(parts, height)
