"""A small line chart as SVG text: the same bytes on every machine, colours from the page's style sheet."""

import math
from collections.abc import Sequence
from html import escape

from common.visualize import Curve

COLOURS = 8  # classes c0 ... c7 of the style sheet; from the ninth curve on they repeat, dashed
WIDTH, HEIGHT = 264, 168
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 8, 30


def chart(curves: Sequence[Curve], x_label: str, y_label: str) -> str:
    """One panel: y over x, at least one point, and a band y +- error. Curves of one name share a colour; those of the
    paper are dashed."""
    points = [
        (float(x), float(y)) for curve in curves for line in (curve.y, *_band(curve)) for x, y in zip(curve.x, line)
    ]
    x_low, x_high, x_ticks = _axis([x for x, _ in points], 4, whole=all(x.is_integer() for x, _ in points))
    marks = sorted({x for x, _ in points})
    x_ticks = marks if 1 < len(marks) <= 6 else x_ticks
    y_low, y_high, y_ticks = _axis([y for _, y in points], 4)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x_low) / (x_high - x_low) * (right - LEFT),
            bottom - (y - y_low) / (y_high - y_low) * (bottom - TOP),
        )

    parts = []
    for y in y_ticks:
        _, height = place(x_low, y)
        parts.append(f'<path class="grid" d="M{LEFT} {height:.1f}H{right}"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{height + 3:.1f}" text-anchor="end">{_tick(y, y_ticks)}</text>')
    for x in x_ticks:
        across, _ = place(x, y_low)
        label = f"{x:g}".replace("-", "−")
        parts.append(f'<text x="{across:.1f}" y="{bottom + 12}" text-anchor="middle">{label}</text>')
    names = list(dict.fromkeys(curve.name for curve in curves))
    for curve in curves:
        number = names.index(curve.name)
        dashed = " dashed" if curve.paper or number >= COLOURS else ""
        places = [place(float(x), float(y)) for x, y in zip(curve.x, curve.y)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        low, high = ([place(float(x), y) for x, y in zip(curve.x, line)] for line in _band(curve) or ([], []))
        around = "L".join(f"{x:.1f} {y:.1f}" for x, y in [*low, *reversed(high)])
        band = f'<path class="band" d="M{around}Z"/>' if len(low) > 1 else ""
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>' for x, y in places) if len(places) <= 12 else ""
        parts.append(f'<g class="c{number % COLOURS}{dashed}">{band}<path d="M{path}"/>{dots}</g>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>')
    parts.append(f'<text x="{(LEFT + right) / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    text = escape(f"{y_label} by {x_label}", quote=True)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{text}">'
        + "".join(parts)
        + "</svg>"
    )


def _band(curve: Curve) -> tuple[list[float], ...]:
    """The lower and the upper edge of the error of a curve; () without one."""
    if curve.error is None:
        return ()
    return tuple([y + side * error for y, error in zip(curve.y, curve.error)] for side in (-1, 1))


def _axis(values: list[float], number: int, whole: bool = False) -> tuple[float, float, list[float]]:
    """Ends of an axis that shows the values, and about `number` round ticks within them."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (0.5 if whole else abs(low) / 10 or 1), high + (0.5 if whole else abs(high) / 10 or 1)
    rough = (high - low) / number
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    ticks = [index * step for index in range(first, last + 1)] or [(low + high) / 2]
    margin = (high - low) * 0.04
    return low - margin, high + margin, ticks


def _tick(value: float, ticks: list[float]) -> str:
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(value) or 1
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}".replace("-", "−")
