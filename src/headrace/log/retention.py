"""What of a log may be deleted, and what is left of it: decisions only, no I/O.

Deleted is only what is staged durably, has been applied by every model that runs, and is older than the
retention says; and nothing that a named consumer has still to read, unless it holds up more than
`hold_max`: then it is marked as lost, for a consumer never endangers the source.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.change import Offset

STOP_ROWS, STOP_BYTES = 300_000, 64 << 20
"""How far stops are apart at the most, unless a single group is larger."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What must stay of a log for those who work with staging.

    `used` is the last offset that staging, the copies that are under way and every model that runs are
    through with; at `stops` somebody stands, or will.
    """

    used: Offset
    stops: frozenset[Offset]


@dataclass(frozen=True, slots=True)
class Kept:
    """What there is to decide on; offsets are ends of groups, sizes bytes.

    `old` is the last offset that is older than the retention or beyond its size, `used` as `Needs` has it,
    `consumers` the offset through which each has read,
    `held` how many bytes it would hold that are old and used.
    """

    old: Offset
    used: Offset
    consumers: Mapping[str, Offset]
    held: Mapping[str, int]
    hold_max: int


@dataclass(frozen=True, slots=True)
class Trim:
    """What to do: delete through an offset, mark consumers as lost, warn of those that will be."""

    through: Offset
    lost: tuple[str, ...]
    slow: tuple[str, ...]


def decide(kept: Kept) -> Trim:
    """Decide how far the log is trimmed.

    A consumer that holds more than `hold_max` is lost, one that holds more than half of it is slow.
    """
    lost = tuple(sorted(name for name, size in kept.held.items() if size > kept.hold_max))
    slow = tuple(
        sorted(name for name, size in kept.held.items() if size > kept.hold_max // 2 and name not in lost)
    )
    reading = [offset for name, offset in kept.consumers.items() if name not in lost]
    return Trim(min([kept.old, kept.used, *reading]), lost, slow)


Stop = tuple[object, ...]


def thinned(
    ends: Sequence[tuple[Any, ...]],
    former: tuple[Any, ...] | None,
    pinned: Collection[Offset],
) -> tuple[list[Stop], bool]:
    """Choose which ends of groups stay behind as stops.

    `ends` are offset, hash, place in the stream (`High`), and rows and bytes since the former stop, which
    has `former` of rows and bytes itself, or None where it has to stay. Stays what is pinned, the last one,
    and as many in between that no two are further apart than STOP_ROWS and STOP_BYTES. Returns the rows of
    `stops`, and whether the former stop is absorbed by the first of them.
    """
    base_rows, base_bytes = (-former[0], -former[1]) if former else (0, 0)
    stops: list[Stop] = []
    absorbed = False
    for i, (offset, *rest, rows, size) in enumerate(ends):
        following = ends[i + 1] if i + 1 < len(ends) else None
        far = following is not None and (
            following[-2] - base_rows > STOP_ROWS or following[-1] - base_bytes > STOP_BYTES
        )
        if following is not None and offset not in pinned and not far:
            continue
        own_rows, own_bytes = rows - base_rows, size - base_bytes
        if not stops and former:
            absorbed = own_rows <= STOP_ROWS and own_bytes <= STOP_BYTES
            if not absorbed:
                own_rows, own_bytes = rows, size
        stops.append((offset, *rest, own_rows, own_bytes))
        base_rows, base_bytes = rows, size
    return stops, absorbed
