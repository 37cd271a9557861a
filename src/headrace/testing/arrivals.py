"""Made-up arrivals for judging scaling: the shapes that real ones have and a trace may lack.

Each is the same whenever it is made, and has a mean rate of 1 row a second; `Arrivals.scaled` gives another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from headrace.scaling.arrivals import TICK, Arrivals, Floats

START = datetime(2026, 6, 1, tzinfo=UTC)
"""A Monday."""
DAYS = 14
_DAY = round(86_400 / TICK)
_HOUR = round(3600 / TICK)
_MINUTE = round(60 / TICK)


def flash_crowd() -> Arrivals:
    """Return even days on which, once a day, fifteen times as much comes within two minutes and ebbs in an
    hour."""
    rates = _day_and_night(0.3)
    for day in range(DAYS):
        at = day * _DAY + (9 + day * 5 % 11) * _HOUR
        rates[at : at + 2 * _MINUTE] += np.linspace(0, 15, 2 * _MINUTE)
        ebb = np.arange(3 * _HOUR)
        rates[at + 2 * _MINUTE : at + 2 * _MINUTE + len(ebb)] += 15 * np.exp(-ebb / _HOUR)
    return _made(rates, seed=11)


def nightly_batch() -> Arrivals:
    """Return quiet days, and from two to three at night a batch of twenty times the rate, at once and at
    once over."""
    rates = _day_and_night(0.2)
    for day in range(DAYS):
        at = day * _DAY + 2 * _HOUR
        rates[at : at + _HOUR] += 20.0
    return _made(rates, seed=12)


def huge_transaction() -> Arrivals:
    """Return even arrivals, and once a day a transaction that is three hours of them, in one tick."""
    rates = _day_and_night(0.1)
    for day in range(DAYS):
        rates[day * _DAY + (8 + day) * _HOUR] += 3.0 * _HOUR
    return _made(rates, seed=13)


def mostly_idle() -> Arrivals:
    """Return arrivals of a small shop: nothing at all in 96 of 100 minutes, a few minutes of work in the
    others."""
    random = np.random.default_rng(14)
    minutes = random.random(DAYS * 1440) < 0.04
    sizes = minutes * random.exponential(size=len(minutes))
    return _scaled(np.repeat(sizes, _MINUTE))


def even() -> Arrivals:
    """Return the same rate all the time, without any noise."""
    return _scaled(np.ones(2 * _DAY))


GENERATED: Mapping[str, Callable[[], Arrivals]] = {
    "flash crowd": flash_crowd,
    "nightly batch": nightly_batch,
    "huge transaction": huge_transaction,
    "96 % idle": mostly_idle,
}
"""Loads that no parameter of a policy was chosen on."""


def _day_and_night(swing: float) -> Floats:
    hours = np.arange(DAYS * _DAY) / _HOUR
    rates: Floats = 1 + swing * np.sin((hours - 9) / 24 * 2 * np.pi)
    return rates


def _made(rates: Floats, *, seed: int) -> Arrivals:
    return _scaled(rates * np.random.default_rng(seed).gamma(75, 1 / 75, len(rates)))


def _scaled(rates: Floats) -> Arrivals:
    return Arrivals(START, rates / rates.mean() * TICK)


def read_compact(path: Path) -> str:
    """Return a trace as CSV that is kept more compactly: one line of start and seconds, then values, - for
    none."""
    lines = path.read_text().splitlines()
    start, step = lines[0].split()
    begin = datetime.fromisoformat(start)
    values = " ".join(lines[1:]).split()
    moments = ((begin + timedelta(seconds=i * float(step)), value) for i, value in enumerate(values))
    rows = [f"{moment},{value}" for moment, value in moments if value != "-"]
    return "\n".join(["timestamp,value", *rows, ""])
