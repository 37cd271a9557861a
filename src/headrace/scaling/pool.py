"""The seam between who has parts to be done and who does them."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from headrace.parts import PartSpec
from headrace.prepared import Prepared


class PartFailed(Exception):
    """A pool has no outcome of a part: who asked for it prepares it itself, and meets whatever is wrong.

    `deaths` counts the workers that have died of it: from one on, some of its changes may end whoever judges
    them.
    """

    def __init__(self, what: str, deaths: int = 0) -> None:
        super().__init__(what)
        self.deaths = deaths


class NoPlace(PartFailed):
    """An outcome could not be written, on a full disk say: nor would others be."""


class TooLarge(PartFailed):
    """Workers have taken more memory for a part than they may."""


@dataclass(frozen=True, slots=True)
class PoolState:
    """A pool as of now, in workers, parts and seconds."""

    desired: int
    ready: int
    """Workers that take parts, those with one in hand among them."""
    starting: int
    starting_seconds: float
    """Since their start, of all that are starting together."""
    busy: int
    queued: int
    """Parts that no worker has yet."""
    start_times: tuple[float, ...]
    """Of the last workers: from its start to its first result, without its waiting for a part."""


@dataclass(frozen=True, slots=True)
class Service:
    """What workers have done of a model's parts since the pool began."""

    rows: int = 0
    """Of all parts but first ones."""
    seconds: float = 0.0
    """Of their time in which they had these in hand."""
    taking: float = 0.0
    """Seconds of the pool's own process for taking the outcomes of all."""
    first: int = 0
    """Rows of first parts: a worker has still to start what a model runs in."""
    kept: float = 0.0
    """Seconds of all parts."""
    lost: float = 0.0
    """Seconds with a part in hand that came to nothing, since the worker died of whatever."""

    @property
    def all_rows(self) -> int:
        """Rows of all parts."""
        return self.rows + self.first


class Pool(Protocol):
    """Workers that prepare parts. Safe to share between threads.

    It decides nothing: how many workers there are is said by `resize`, and what it cannot do comes back.
    A part is done at least once; the first outcome by a lease that is still in force counts, and no other.
    """

    epoch: str
    """The run that it is of: it takes parts of no other."""

    def submit(self, part: PartSpec) -> Future[Prepared]:
        """Queue a part; the first in is the first that is begun. With no workers it waits for some.

        A future that is cancelled before a worker has its part is never begun. Its exception is PartFailed.
        The trap: an outcome is in no order with others, that is the caller's.
        """
        ...

    def resize(self, workers: int) -> None:
        """Have so many workers from now on: starts them, or lets those go that are too many, each when it has
        finished what it has in hand. Does not wait."""
        ...

    def state(self) -> PoolState:
        """Return what there is now."""
        ...

    def service(self) -> Mapping[str, Service]:
        """Return by model what was done."""
        ...

    def close(self) -> None:
        """End all workers at once; what they have in hand is lost work only. Parts that have no outcome fail
        with PartFailed."""
        ...
