"""Line charts as inline SVG, coloured by the page's style sheet."""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 330, 190  # about the pixels of a chart where four stand in a row: text keeps its size
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 18, 8, 24
_TICKS = 6  # at most
_POINTS = 300  # buckets of a curve, each of which keeps its lowest and its highest value

Curve = Sequence[tuple[int, float]]


def line_chart(title: str, curves: Sequence[tuple[int, str, Curve]]) -> str:
    """SVG of `curves`: (number of its colour, name, points with rising iteration and finite value), one or more."""
    steps = [step for _, _, curve in curves for step, _ in curve]
    values = [value for _, _, curve in curves for _, value in curve]
    xs, ys = _Axis(min(steps), max(steps), _LEFT, WIDTH - _RIGHT), _Axis(*_spread(values), HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        *(f'<path class="grid" d="M{_LEFT} {ys(tick):.1f}H{WIDTH - _RIGHT}"/>' for tick in ys.ticks()),
        *(
            f'<text x="{_LEFT - 6}" y="{ys(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>'
            for tick in ys.ticks()
        ),
        *(
            f'<text x="{xs(tick):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{_step(tick)}</text>'
            for tick in xs.ticks(whole=True)
        ),
    ]
    for colour, name, curve in sorted(curves, key=lambda each: -len(each[2])):  # a long one would hide those below it
        points = " ".join(f"{xs(step):.1f},{ys(value):.1f}" for step, value in thinned(curve))
        label = f"{name}: {number(curve[-1][1])} at step {curve[-1][0]}"
        line = f'<polyline class="line c{colour}" points="{points}"/>'
        if len(curve) == 1:
            x, y = points.split(",")
            line = f'<circle class="dot c{colour}" cx="{x}" cy="{y}" r="3"/>'
        parts.append(f"<g><title>{escape(label)}</title>{line}</g>")
    return "".join([*parts, "</svg>"])


def thinned(curve: Curve) -> list[tuple[int, float]]:
    """At most 2 x 300 points: of each stretch of steps the lowest and the highest, so that no spike is lost."""
    if len(curve) <= 2 * _POINTS:
        return list(curve)
    kept = []
    for bucket in range(_POINTS):
        part = curve[bucket * len(curve) // _POINTS : (bucket + 1) * len(curve) // _POINTS]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept


def number(value: float) -> str:
    """Four digits, and a power of ten where that is shorter."""
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.4g}"


def _step(tick: float) -> str:
    """Short, so that six stand beside each other and the last one within the picture."""
    return f"{tick / 1000:g}k" if abs(tick) >= 10_000 else f"{tick:,g}"


class _Axis:
    """Values from `low` to `high` onto pixels from `first` to `last`."""

    def __init__(self, low: float, high: float, first: float, last: float):
        self.low, self.high, self.first, self.last = low, high, first, last

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return self.first + share * (self.last - self.first)

    def ticks(self, *, whole: bool = False) -> list[float]:
        """Round numbers within the axis: three to six of them, if not fewer are whole."""
        if self.high <= self.low:
            return [self.low]
        rough = (self.high - self.low) / _TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
        step = max(1.0, math.ceil(step)) if whole else step
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest with a little room; a constant gets some around it, zero the axis to 1."""
    low, high = min(values), max(values)
    if low == high == 0:
        return 0.0, 1.0
    room = 0.05 * (high - low) or 0.05 * abs(high)
    return low - room, high + room
