"""How a pool of workers stands, and what it has done."""

from __future__ import annotations

from dataclasses import dataclass


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
    seconds: float = 0.0
    """Of their time in which they had a part in hand that they finished."""
