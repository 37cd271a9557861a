"""Rates that are measured while something runs: moving averages of arrivals, and speeds of work."""

from __future__ import annotations

import math
from collections import deque

_MEMORY = 60.0
"""Seconds of work after which a speed has forgotten most of what was before."""
_BULK = 5_000
"""Rows of a piece from which on its own fixed cost does not matter."""
_LONG = 1.0
"""Seconds that a piece takes from which on it does not, either."""
_ENOUGH = 0.05
"""Seconds of work in small pieces that make a speed, or of any that make a share."""
_LEAST_SHARE = 0.1


class MovingAverage:
    """An exponential moving average of a rate. What was before its first interval is unknown, not 0."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._sum = self._weight = 0.0

    def add(self, amount: float, elapsed: float) -> None:
        """Take in what came in an interval of `elapsed` seconds, which is more than 0."""
        keep = math.exp(-elapsed / self._seconds)
        self._sum = keep * self._sum + (1 - keep) * amount / elapsed
        self._weight = keep * self._weight + (1 - keep)

    @property
    def value(self) -> float | None:
        """A second's amount; None before the first interval."""
        return self._sum / self._weight if self._weight else None


class Greatest:
    """The greatest value of the last `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._values = deque[tuple[float, float]]()  # falling values, each the greatest of what is behind it

    def add(self, at: float, value: float) -> float:
        """Take in a value, and return the greatest; `at` only rises."""
        while self._values and self._values[-1][1] <= value:
            self._values.pop()
        self._values.append((at, value))
        while self._values[0][0] <= at - self._seconds:
            self._values.popleft()
        return self._values[0][1]


class Speed:
    """Rows for each second of work, of the last minute or so of it.

    A small piece of work says little of a large one, since each has a fixed cost: it counts only until there
    has been a large one.
    """

    def __init__(self) -> None:
        self._bulk, self._small = _Ratio(0.0), _Ratio(_ENOUGH)
        self._known: float | None = None

    def note(self, rows: float, seconds: float) -> None:
        """Take in that `rows` took `seconds`."""
        if rows > 0 and seconds > 0:
            is_bulk = rows >= _BULK or seconds >= _LONG
            (self._bulk if is_bulk else self._small).note(rows, seconds)

    def recall(self, value: float | None) -> None:
        """Take what an earlier process has measured for what it is, until this one has measured itself."""
        self._known = value

    @property
    def value(self) -> float | None:
        """Rows a second; None until it is known."""
        return self._bulk.value or self._known or self._small.value

    @property
    def seconds(self) -> float:
        """How long the large pieces took that it is of."""
        return self._bulk.seconds

    @property
    def is_of_bulk(self) -> bool:
        """Whether it is of large pieces that this process has seen."""
        return self._bulk.value is not None


class Share:
    """How much of some time came to something, of the last minute or so of it."""

    def __init__(self) -> None:
        self._kept = _Ratio(_ENOUGH)

    def note(self, kept: float, lost: float) -> None:
        """Take in seconds that did, and seconds that did not."""
        if kept + lost > 0:
            self._kept.note(kept, kept + lost)

    @property
    def value(self) -> float:
        """From a tenth, since less may be chance, to 1; 1 until it is known."""
        kept = self._kept.value
        return 1.0 if kept is None else max(kept, _LEAST_SHARE)


class _Ratio:
    def __init__(self, enough: float) -> None:
        self._enough = enough
        self._rows = self.seconds = 0.0

    def note(self, rows: float, seconds: float) -> None:
        keep = math.exp(-seconds / _MEMORY)
        self._rows = keep * self._rows + rows
        self.seconds = keep * self.seconds + seconds

    @property
    def value(self) -> float | None:
        return self._rows / self.seconds if self.seconds and self.seconds >= self._enough else None


def p95(values: list[float]) -> float | None:
    """Return the value that 95 % are at or below (nearest rank); None of none."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1] if values else None
