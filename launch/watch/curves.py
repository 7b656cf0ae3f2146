"""Curves in text: a line of blocks for each figure, its value now, its interval and its range."""

from rich.table import Table
from rich.text import Text

from launch.watch.figures import Curve

BARS = "".join(chr(0x2581 + height) for height in range(8))
ASCII_BARS = "_.-:=+*#"
TALL = 3
"""Curves that are drawn larger where there is room: reward, accuracy, held out."""


def curve_table(curves: list[Curve], width: int, bars: str, rows: int = 1) -> Table:
    """A row for each curve under a heading; `rows` of them for each of the first `TALL`."""
    table = Table.grid(padding=(0, 1))
    for justify in ("left", "right", "left", "left", "left"):
        table.add_column(justify=justify, no_wrap=True)
    notes = ["[{:.2f}, {:.2f}]".format(*curve.interval) if curve.interval else "" for curve in curves]
    spans = [f"{short(min(values))}..{short(max(values))}" for values in ([v for _, v in c.points] for c in curves)]
    taken = 10 + 7 + max(map(len, notes), default=0) + max(map(len, spans), default=0) + 5
    last = max((curve.points[-1][0] for curve in curves), default=1)
    if curves:
        table.add_row(*(Text(word, "dim") for word in ("", "now", "95 %", f"steps 1 to {last}", "range")))
    for index, (curve, note, span) in enumerate(zip(curves, notes, spans, strict=True)):
        lines = spark(curve.points, last, max(8, width - taken), bars, rows if index < TALL else 1)
        drawn = Text("\n".join(lines), "cyan")
        table.add_row(curve.name, Text(short(curve.now), "bold"), Text(note, "dim"), drawn, Text(span, "dim"))
    return table


def spark(points: list[tuple[int, float]], last: int, width: int, bars: str, rows: int = 1) -> list[str]:
    """Lines from the top; one column for each part of the steps up to `last`: the mean of its points, or what was
    before it."""
    values = [value for _, value in points]
    low, high = min(values), max(values)
    columns: list[list[float]] = [[] for _ in range(width)]
    for step, value in points:
        columns[max(0, step - 1) * width // max(1, last)].append(value)
    levels: list[int | None] = [None]
    for column in columns:
        mean = sum(column) / len(column) if column else None
        top = len(bars) * rows - 2  # a full block would touch the curve above
        level = levels[-1] if mean is None else round((mean - low) / (high - low) * top) if high > low else 0
        levels.append(level)
    return ["".join(bar(level, row, bars) for level in levels[1:]) for row in reversed(range(rows))]


def bar(level: int | None, row: int, bars: str) -> str:
    """The part of a column in one of its rows, counted from the bottom."""
    over = -1 if level is None else level - row * len(bars)
    return " " if over < 0 else bars[min(over, len(bars) - 1)]


def short(value: float) -> str:
    """Four digits or so: 0.003, 0.62, 14.3, 512, 1.2e-06."""
    size = abs(value)
    if size >= 1e5 or 0 < size < 1e-3:
        return f"{value:.1e}"
    return f"{value:.{3 if size < 0.1 else 2 if size < 10 else 1 if size < 100 else 0}f}" if size else "0"
