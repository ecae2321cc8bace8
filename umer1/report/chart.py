"""Line charts as inline SVG, coloured by the page's style sheet."""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 330, 190  # about the pixels of a chart where four stand in a row: text keeps its size
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 18, 8, 24  # room around the curves; on the left more where labels are longer
_DIGIT = 7  # pixels of one, in a wide font of the style's size
_TICKS = 6  # at most
_POINTS = 300  # buckets of a curve, each of which keeps its lowest and its highest value

Curve = Sequence[tuple[int, float]]


def line_chart(title: str, curves: Sequence[tuple[int, str, Curve]]) -> str:
    """SVG of `curves`: (number of its colour, name, points with rising iteration and finite value), one or more."""
    steps = [step for _, _, curve in curves for step, _ in curve]
    values = [value for _, _, curve in curves for _, value in curve]
    ys = _Axis(*_spread(values), HEIGHT - _BOTTOM, _TOP)
    labels = ys.labels()
    left = max(_LEFT, 8 + _DIGIT * max(len(text) for _, text in labels))
    xs = _Axis(min(steps), max(steps), left, WIDTH - _RIGHT)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        *(f'<path class="grid" d="M{left} {ys(tick):.1f}H{WIDTH - _RIGHT}"/>' for tick, _ in labels),
        *(f'<text x="{left - 6}" y="{ys(tick) + 4:.1f}" text-anchor="end">{text}</text>' for tick, text in labels),
        *(
            f'<text x="{xs(tick):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{text}</text>'
            for tick, text in xs.labels(whole=True)
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


_UNITS = ((1e9, "G", 1e9), (1e6, "M", 1e6), (1e4, "k", 1e3), (0.0, "", 1.0))  # from this number on: unit, its value


class _Axis:
    """Values from `low` to `high` onto pixels from `first` to `last`."""

    def __init__(self, low: float, high: float, first: float, last: float):
        self.low, self.high, self.first, self.last = low, high, first, last

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return self.first + share * (self.last - self.first)

    def labels(self, *, whole: bool = False) -> list[tuple[float, str]]:
        """Round numbers within the axis, three to six of them if not fewer are `whole`, and each as text.

        Short, with as many digits as tell one from the next: 0.5M, 1.0M; 250; 0.4e-5.
        """
        ticks = self._ticks(whole)
        if len(ticks) == 1:
            return [(ticks[0], number(ticks[0]))]
        largest, step = max(map(abs, ticks)), ticks[1] - ticks[0]
        unit, scale = next(((unit, scale) for least, unit, scale in _UNITS if largest >= least), ("", 0.0))
        if largest < 1e-3 or largest >= 1e12:
            power = math.floor(math.log10(largest))
            unit, scale = f"e{power}", 10.0**power
        digits = max(-math.floor(math.log10(step / scale) + 1e-9), 0)
        return [(tick, f"{tick / scale:,.{digits}f}{unit}" if tick else "0") for tick in ticks]

    def _ticks(self, whole: bool) -> list[float]:
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
