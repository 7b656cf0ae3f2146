"""Curves as inline SVG: no script, no network, colours from the page's style sheet.

Classes: r0..r7 the colour of a run, d0..d2 the dash of a series within it. Whoever points at a step reads its values
in the chart's top line.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 400, 210
LEFT, RIGHT, TOP, BOTTOM = 56, 384, 26, 180
"""The plot's edges."""
MAX_POINTS = 500
"""Of one line."""
MAX_BANDS = 60
"""Steps whose values can be read by pointing at them."""
NOISY = 60
"""Points from which on a mean is drawn over them."""

Point = tuple[int, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    run: str
    name: str = ""
    """Within its run."""
    colour: int
    dash: int = 0
    points: Sequence[Point]
    """(step, value), finite, in the order of the steps."""
    intervals: Sequence[tuple[float, float]] = ()
    """(low, high) for each point, or nothing."""


@dataclass(frozen=True, slots=True)
class Scale:
    """From values to places on the page: `low` lies at `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def chart(title: str, series: Sequence[Series], share: bool = False) -> Markup:
    """One figure. series: with at least one point between them. share: the axis is [0, 1]."""
    steps = sorted({step for one in series for step, _ in one.points})
    values = [value for one in series for _, value in one.points]
    values += [bound for one in series for pair in one.intervals for bound in pair]
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0] if share else nice(min(values), max(values))
    across = nice(min(0, steps[0]), max(1, steps[-1]))
    x = Scale(across[0], max(steps[-1], across[0] + 1), LEFT, RIGHT)
    y = Scale(ticks[0], ticks[-1], BOTTOM, TOP)
    parts = [_axes([at for at in across if at <= x.high and at == int(at)], ticks, x, y)]
    for one in series:
        parts.append(_line(one, x, y))
    parts.append(_bands(series, steps, x))
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, spoken(title, series), Markup("").join(parts)
    )


def spoken(title: str, series: Sequence[Series]) -> str:
    """The figure for those who do not see it. Example: reward. demo: 0.17 at step 1, 0.66 at step 20."""
    ends = [(f"{one.run} {one.name}".strip(), one.points[0], one.points[-1]) for one in series if one.points]
    told = [f"{name}: {number(a[1])} at step {a[0]}, {number(b[1])} at step {b[0]}" for name, a, b in ends]
    return f"{title}. {'; '.join(told)}."


def number(value: float) -> str:
    """Three digits that count. Examples: 0.668, 12.3k, -2e-05"""
    if abs(value) >= 9999.5:
        power = min(3, int(math.log10(abs(value)) + 1e-3) // 3)
        return f"{value / 1000**power:.3g}{' kMG'[power]}"
    return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def nice(low: float, high: float) -> list[float]:
    """Three to seven round numbers that enclose both."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if high else (0.0, 1.0)
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * size for size in (1, 2, 5, 10) if power * size >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.10g}") for index in range(first, last + 1)]


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` of them, with the lowest and the highest of each part, the first and the last."""
    if len(points) <= limit:
        return list(points)
    parts = (limit - 2) // 2
    kept = {0, len(points) - 1}
    for part in range(parts):
        inside = range(part * len(points) // parts, (part + 1) * len(points) // parts)
        kept |= {min(inside, key=lambda at: points[at][1]), max(inside, key=lambda at: points[at][1])}
    return [points[at] for at in sorted(kept)]


def mean_window(one: Series) -> int:
    """Values in its running mean; 1: none is drawn."""
    return max(5, len(one.points) // 40) if len(one.points) >= NOISY and not one.intervals else 1


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """The mean of the last `window` values at each step."""
    means, total = [], 0.0
    for at, (step, value) in enumerate(points):
        total += value - (points[at - window][1] if at >= window else 0.0)
        means.append((step, total / min(at + 1, window)))
    return means


def _axes(across: Iterable[float], ticks: Iterable[float], x: Scale, y: Scale) -> Markup:
    lines = [
        Markup('<path class="grid" d="M{} {}H{}"/><text x="{}" y="{}" class="tick end">{}</text>').format(
            LEFT, y(tick), RIGHT, LEFT - 6, y(tick) + 4, number(tick)
        )
        for tick in ticks
    ]
    places = [
        Markup('<text x="{}" y="{}" class="tick mid">{}</text>').format(x(at), BOTTOM + 17, f"{at:.0f}")
        for at in across
    ]
    return Markup("").join([*lines, *places])


def _line(one: Series, x: Scale, y: Scale) -> Markup:
    look = f"r{one.colour % 8} d{one.dash % 3}"
    bars = "".join(
        f"M{x(step)} {y(low)}V{y(high)}" for (step, _), (low, high) in zip(one.points, one.intervals, strict=False)
    )
    parts = [Markup('<path class="bar {}" d="{}"/>').format(look, bars)] if bars else []
    if (window := mean_window(one)) > 1:
        parts.append(_path(f"thin {look}", one.points, x, y))
        parts.append(_path(look, smooth(one.points, window), x, y))
    else:
        parts.append(_path(look, one.points, x, y))
    if len(one.points) == 1 or one.intervals:
        parts += [
            Markup('<circle class="{}" cx="{}" cy="{}" r="3"/>').format(look, x(step), y(value))
            for step, value in thin(one.points)
        ]
    return Markup("").join(parts)


def _path(look: str, points: Sequence[Point], x: Scale, y: Scale) -> Markup:
    places = " ".join(f"{x(step):g} {y(value):g}" for step, value in thin(points))
    return Markup('<path class="line {}" d="M{}"/>').format(look, places) if places else Markup("")


def _bands(series: Sequence[Series], steps: Sequence[int], x: Scale) -> Markup:
    """Columns that show the values at one step while the pointer is in them."""
    every = math.ceil(len(steps) / MAX_BANDS)
    shown = [*steps[:-1:every], steps[-1]]
    tables = [dict(one.points) for one in series]
    bands = []
    for at, step in enumerate(shown):
        left = LEFT if at == 0 else (x(shown[at - 1]) + x(step)) / 2
        right = RIGHT if at == len(shown) - 1 else (x(step) + x(shown[at + 1])) / 2
        values = [
            Markup('<tspan class="r{}" dx="6">{}</tspan>').format(one.colour % 8, number(table[step]))
            for one, table in zip(series, tables, strict=True)
            if step in table
        ]
        bands.append(
            Markup(
                '<g class="at"><rect x="{:g}" y="0" width="{:g}" height="{}"/><path d="M{:g} {}V{}"/>'
                '<text x="{}" y="14">step {}{}</text></g>'
            ).format(left, right - left, BOTTOM, x(step), TOP, BOTTOM, LEFT, step, Markup("").join(values))
        )
    return Markup("").join(bands)
