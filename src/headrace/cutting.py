"""Cutting what is to be prepared into parts, from what the raw tables' files tell without being read.

A part takes a worker `SECONDS`, as far as it is known how fast it is: long enough that handing it over counts
for little, and short enough that one of them is no wait and one that dies is no loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

from headrace.change import Offset
from headrace.staging.table import RowGroup

SECONDS = 1.0
_FIRST_ROWS = 10_000
"""Of a part while nothing is known: a model that is slow has several of them by then."""
_LEAST_ROWS, _MOST_ROWS = 2_000, 500_000
MOST_BYTES = 48 << 20
"""Of one part, as its rows stand in raw."""
_UNEVEN = 1.5
"""A row group is cut where it has so many times the rows that a part should have."""


class Piece(NamedTuple):
    """The changes in `(after, through]`, or one stretch of them: about so many rows."""

    after: Offset
    through: Offset
    rows: int
    stretch: tuple[int, int] | None = None
    """Which one, from 0 on, of how many equal stretches of the rows; None for all of them."""


def rows_for(rate: float | None) -> int:
    """Return how many rows a part should have of a model that a worker does so many of in a second."""
    wanted = _FIRST_ROWS if rate is None else int(rate * SECONDS)
    return min(max(wanted, _LEAST_ROWS), _MOST_ROWS)


def cut(groups: Iterable[RowGroup], after: Offset, through: Offset, rows: int) -> list[Piece]:
    """Cut `(after, through]` into pieces of about so many rows, in order; none where there are no rows.

    Between entries: a row group ends with one, and inside of it any offset is an end of one or none. What
    is too large then is for `stretched`.
    """
    pieces = list[Piece]()
    begin, held, size, last = after, 0, 0, after
    for group in _evened(groups, after, through, rows):
        if held and (held + group.rows > rows or size + group.bytes > MOST_BYTES):
            pieces.append(Piece(begin, last, held))
            begin, held, size = last, 0, 0
        held, size, last = held + group.rows, size + group.bytes, group.last
    return [*pieces, Piece(begin, through, held)] if held else pieces


def stretched(piece: Piece, rows: int) -> list[Piece]:
    """Cut a piece that has many times the rows that it should have, since one entry has, into stretches."""
    count = round(piece.rows / rows) if piece.rows > _UNEVEN * rows else 1
    if count == 1:
        return [piece]
    return [piece._replace(rows=piece.rows // count, stretch=(number, count)) for number in range(count)]


def _evened(groups: Iterable[RowGroup], after: Offset, through: Offset, rows: int) -> Iterator[RowGroup]:
    """Yield row groups as far as they are in `(after, through]`, large ones in shares of their offsets."""
    for group in groups:
        first, last = max(group.first, after + 1), min(group.last, through)
        if first > last:
            continue
        after = last  # files that were merged meanwhile may tell of what is before again
        inside, whole = last - first + 1, group.last - group.first + 1
        left = max(group.rows * inside // whole, 1)
        bytes_ = group.bytes * inside // whole
        count = max(left / rows, bytes_ / MOST_BYTES)
        shares = min(round(count), inside) if count > _UNEVEN else 1
        ends = [first - 1 + inside * i // shares for i in range(shares + 1)]
        for begin, end in pairwise(ends):
            yield RowGroup(begin + 1, end, max(left // shares, 1), bytes_ // shares)
