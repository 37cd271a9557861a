"""The workers as a decision sees them: how many there are, and how many there should be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class PoolState:
    """How a pool stands at one moment."""

    desired: int
    ready: int
    """Workers that take parts."""
    starting: int
    starting_seconds: float
    """Seconds since their start, of all workers that are starting together."""
    busy: int
    """Workers that have a part in hand."""
    queued: int
    """Parts that wait for a worker."""
    start_times: Sequence[float] = ()
    """Seconds from start to first result, of the last workers that were started."""


class Pool(Protocol):
    """Workers that can be more or fewer."""

    def resize(self, workers: int) -> None:
        """Have so many workers: start what lacks, and have those leave that are too many once their part is
        done. Returns at once."""
        ...

    def state(self) -> PoolState:
        """Return how the pool stands."""
        ...


class Unstaffed:
    """A pool that has no workers, for a project that wants none, or whose workers run elsewhere and follow
    `GET /scale`: what is decided is remembered, and the main process does the work."""

    def __init__(self) -> None:
        self._desired = 0

    def resize(self, workers: int) -> None:
        """Remember how many there should be."""
        self._desired = workers

    def state(self) -> PoolState:
        """Return that there are none."""
        return PoolState(self._desired, 0, 0, 0.0, 0, 0)
