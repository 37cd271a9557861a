"""Arrivals over time: read from a file, or made."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrace.errors import UserError
from headrace.scaling.policy import HOURS

Floats = NDArray[np.float64]

TICK = 15.0
"""Seconds between two decisions, and the step of a simulation."""
_MAX_TICKS = 20_000_000
_HOW = "A file of arrivals has the columns timestamp,value: the start of an interval, and the rows in it."


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Rows that arrive in each tick of `TICK` seconds from `start` on."""

    start: datetime
    rows: Floats

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return len(self.rows) * TICK

    @property
    def rate(self) -> float:
        """The mean, rows a second."""
        return float(self.rows.mean()) / TICK

    def scaled(self, rate: float) -> Arrivals:
        """Return the same shape with another mean, rows a second."""
        return Arrivals(self.start, self.rows * (rate / self.rate))

    def split(self, seconds: float) -> tuple[Arrivals, Arrivals]:
        """Return what is before and what is after a moment."""
        at = round(seconds / TICK)
        later = datetime.fromtimestamp(self.start.timestamp() + at * TICK, UTC)
        return Arrivals(self.start, self.rows[:at]), Arrivals(later, self.rows[at:])

    def hours(self) -> NDArray[np.int64]:
        """Return the hour of the week, UTC, of each tick."""
        begin = self.start.weekday() * 86400 + self.start.hour * 3600 + self.start.minute * 60
        seconds = begin + self.start.second + np.arange(len(self.rows)) * TICK
        return (seconds // 3600).astype(np.int64) % HOURS


@dataclass(frozen=True, slots=True)
class Averages:
    """What is measured of arrivals at each tick, rows a second; no worker changes it."""

    ewma_30s: Floats
    ewma_300s: Floats
    max_300s: Floats

    @classmethod
    def of(cls, arrivals: Arrivals) -> Averages:
        """Measure arrivals as a running pipeline does."""
        rates = arrivals.rows / TICK
        fast, slow = _ewma(rates, 30.0), _ewma(rates, 300.0)
        window = round(300 / TICK)
        greater = np.maximum(fast, slow)
        padded = np.concatenate([np.full(window - 1, greater[0]), greater])
        return cls(fast, slow, np.lib.stride_tricks.sliding_window_view(padded, window).max(axis=1))


def _ewma(rates: Floats, seconds: float) -> Floats:
    weight = 1 - math.exp(-TICK / seconds)
    smooth = accumulate(rates.tolist(), lambda old, new: old + weight * (new - old))
    return np.fromiter(smooth, dtype=np.float64, count=len(rates))


def read_csv(path: Path, *, noise: float = 0.2, seed: int = 1) -> Arrivals:
    """Read arrivals from a file with the columns `timestamp,value`.

    A value is the number of rows in the interval that starts at its timestamp; in between, the rate goes in
    straight lines. `noise` is the standard deviation of the rate from one 5 s to the next, over its mean:
    what a file of five or thirty minutes does not tell. Timestamps are ISO 8601, UTC unless they say
    otherwise. Raises UserError where the file cannot be read or a line is not what it should be.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            pairs = list(_pairs(path, csv.reader(file)))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", _HOW) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file: {error}.", _HOW) from error
    if len(pairs) < 2:
        raise UserError(f"{path} has {len(pairs)} lines of arrivals; at least two are needed.", _HOW)
    times = np.array([moment for moment, _ in pairs])
    values = np.array([value for _, value in pairs])
    if not values.any():
        raise UserError(f"{path}: all values are 0, so that there is nothing to scale for.", _HOW)
    lengths = np.diff(times)
    # A line that is missing leaves a gap, over which the rate goes in a straight line, too.
    lengths = np.minimum(np.append(lengths, np.inf), np.median(lengths))
    if (ticks := int((times[-1] + lengths[-1] - times[0]) / TICK)) > _MAX_TICKS:
        raise UserError(
            f"{path} covers {ticks * TICK / 86400:,.0f} days, more than the {_MAX_TICKS * TICK / 86400:,.0f} "
            "that are simulated.",
            "Look for a wrong timestamp, or cut the file.",
        )
    grid = times[0] + np.arange(max(1, ticks)) * TICK
    rows = np.interp(grid, times, values / lengths) * TICK
    if noise:
        rows = rows * _noise(len(rows), noise, seed)
    return Arrivals(datetime.fromtimestamp(times[0], UTC), rows)


def _noise(count: int, noise: float, seed: int) -> Floats:
    """Return factors around 1: the mean over a tick of gamma-distributed ones of 5 s each."""
    shape = (TICK / 5.0) / noise**2
    return np.random.default_rng(seed).gamma(shape, 1 / shape, count)


def _pairs(path: Path, lines: Iterator[list[str]]) -> Iterator[tuple[float, float]]:
    """Yield time and value of each line; raises UserError with the line's number."""
    header = [name.strip().lower() for name in next(lines, [])]
    if "timestamp" not in header or "value" not in header:
        found = ", ".join(header) or "nothing"
        raise UserError(f"{path} line 1 must name the columns timestamp and value; it has {found}.", _HOW)
    at, of = header.index("timestamp"), header.index("value")
    before = -math.inf
    for number, line in enumerate(lines, 2):
        if not line:
            continue
        where = f"{path} line {number}"
        if len(line) != len(header):
            raise UserError(f"{where} has {len(line)} cells, line 1 has {len(header)}.", _HOW)
        try:
            moment = datetime.fromisoformat(line[at].strip())
        except ValueError:
            raise UserError(
                f"{where}: {line[at]!r} is no timestamp.", "Write it like 2026-11-29 14:05:00."
            ) from None
        time = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        if time <= before:
            raise UserError(
                f"{where}: {line[at]} is not later than the line before.",
                "Sort the file, and write times in UTC (local ones come twice in autumn).",
            )
        before = time
        yield time, _value(where, line[of])


def _value(where: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UserError(f"{where}: {text!r} is no number of rows.", "Write 0 where nothing arrived.")
    return value
