"""The held-out loss by round as a picture: in a terminal with braille signs, or as a PNG."""

import math
from collections.abc import Sequence
from itertools import count, pairwise
from pathlib import Path

Points = Sequence[tuple[int, float]]  # (round, loss); a loss that is no number is left out

# The dots of a braille cell, by row (from the top) and column, as bits of U+2800.
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
ROWS, COLUMNS = len(DOTS), len(DOTS[0])
MARK, AXIS = "●", "round"
NARROWEST, LOWEST = 16, 3  # characters; below, there is no room for a curve


def loss_chart(points: Points, width: int, height: int, last: int | None = None) -> str:
    """A curve over `height` lines of `width` characters, axes included; each round is a dot.

    `last` is the round at the right edge, for a chart that grows; else it is the last point's.
    """
    known = finite(points)
    if not known:
        return "no loss has been measured yet"
    low, high = _scale(known)
    labels = _labels(low, high, max(height, LOWEST) - 2)
    margin = max(*map(len, labels), len(AXIS) - 1) + 2  # a blank and the axis
    grid = _Grid(max(width, NARROWEST) - margin, max(height, LOWEST) - 2)
    first, right = known[0][0], max(known[-1][0], last or 0)
    places = [
        (_at(x, first, right, grid.width), _at(high - y + low, low, high, grid.height))
        for x, y in known
    ]
    for start, end in pairwise(places):
        grid.line(start, end)
    for place in places:
        grid.mark(place)
    lines = [
        f"{label:>{margin - 2}} {'┤' if label else '│'}{row}"
        for label, row in zip(labels, grid.rows(), strict=True)
    ]
    lines.append(" " * (margin - 1) + "└" + "─" * (grid.width // COLUMNS))
    lines.append(f"{AXIS:>{margin - 1}} " + _ticks(first, right, grid.width // COLUMNS))
    return "\n".join(line.rstrip() for line in lines)


def save_loss_png(path: Path, points: Points, title: str) -> None:
    """The same curve for a report, 960 x 600 pixels.

    Raises:
        OSError: the file cannot be written.
    """
    # Here, because it takes half a second; without pyplot, which would look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    known = finite(points)
    axes.plot([x for x, _ in known], [y for _, y in known], marker="o", color="#0b7285")
    axes.set_title(title)
    axes.set_xlabel("rounds averaged")
    axes.set_ylabel("held-out loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png")


def finite(points: Points) -> list[tuple[int, float]]:
    """The points that can be drawn, by round; the later of two for one round."""
    return sorted({x: y for x, y in points if math.isfinite(y)}.items())


class _Grid:
    """Braille dots and marks; x from the left and y from the top, in dots."""

    def __init__(self, columns: int, rows: int) -> None:
        self.width, self.height = columns * COLUMNS, rows * ROWS
        self._bits = [[0] * columns for _ in range(rows)]
        self._marks: set[tuple[int, int]] = set()

    def line(self, start: tuple[int, int], end: tuple[int, int]) -> None:
        (x0, y0), (x1, y1) = start, end
        steps = max(abs(x1 - x0), abs(y1 - y0), 1)
        for i in range(steps + 1):
            x, y = x0 + round(i * (x1 - x0) / steps), y0 + round(i * (y1 - y0) / steps)
            self._bits[y // ROWS][x // COLUMNS] |= DOTS[y % ROWS][x % COLUMNS]

    def mark(self, place: tuple[int, int]) -> None:
        self._marks.add((place[0] // COLUMNS, place[1] // ROWS))

    def rows(self) -> list[str]:
        return [
            "".join(
                MARK if (x, y) in self._marks else chr(0x2800 + bits) if bits else " "
                for x, bits in enumerate(row)
            )
            for y, row in enumerate(self._bits)
        ]


def _scale(known: Points) -> tuple[float, float]:
    """The losses at the lower and upper edge; a constant loss lies in the middle."""
    low, high = min(y for _, y in known), max(y for _, y in known)
    if high - low < 1e-6:
        room = max(abs(high), 1.0) * 0.05
        return low - room, high + room
    return low, high


def _labels(low: float, high: float, rows: int) -> list[str]:
    """What stands left of each row: the loss at its middle, on every second or third row."""
    digits = min(max(2, 1 - math.floor(math.log10(high - low))), 4)
    every = 2 if rows < 8 else 3
    step = (high - low) / max(rows - 1, 1)
    return [
        f"{high - row * step:.{digits}f}" if row % every == 0 or row == rows - 1 else ""
        for row in range(rows)
    ]


def _at(value: float, low: float, high: float, dots: int) -> int:
    if high == low:
        return 0
    return round((value - low) / (high - low) * (dots - 1))


def _ticks(first: int, last: int, columns: int) -> str:
    """`0    2    4 ...`, each number under its dot."""
    closest = (last - first) * (len(str(last)) + 3) / columns  # leaves three blanks between two
    every = next(n for e in count() for m in (1, 2, 5) if (n := m * 10**e) >= closest)
    line = ""
    for tick in range(-(-first // every) * every, last + 1, every):
        at = min(_at(tick, first, last, columns), columns - len(str(tick)))
        line = line.ljust(at) + str(tick)
    return line
