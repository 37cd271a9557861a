"""Places in a log: by time and by position, found by bisection; and the shapes that its rows have.

A cut parts a log between two source transactions. As one group holds many, a cut has two parts: the end of
the last group that is wholly before it, and the commit from which on transactions are behind it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from headrace.change import STREAMED, LoggedEntry, Offset, TableId, TableSchema, shape_in
from headrace.errors import LogTrimmed
from headrace.log.sqlite import SQLiteLog
from headrace.payload import decode_rows

_PAGE = 1000


class Cut(NamedTuple):
    """A place between two transactions.

    `offset` is the end of a group; of what stands behind it, only transactions from `commit` on (epoch and
    LSN of the commit) are behind the cut. None: all of it is.
    """

    offset: Offset
    commit: tuple[int, int] | None = None


class Group(NamedTuple):
    """One group of the log: entries in `(after, through]`."""

    after: Offset
    through: Offset


def cut_at_offset(log: SQLiteLog, offset: Offset) -> Cut:
    """Return the cut before the group that holds an entry; at the log's end if there is no such entry.

    Raises LogTrimmed for an entry that has been deleted.
    """
    if offset <= (begin := log.begin().offset) and begin:
        raise _trimmed(log, f"offset {offset}")
    return Cut(log.group_end(min(offset - 1, log.end().offset)))


def cut_at_time(log: SQLiteLog, moment: int) -> Cut:
    """Return the cut before the first transaction that was committed at `moment` (microseconds) or later.

    Raises LogTrimmed when that one has been deleted, which its successors cannot tell from others.
    """
    # The greatest time of what was deleted: that of its last position may be an earlier one.
    newest = log.raw_rows('SELECT at FROM stops ORDER BY "offset" DESC LIMIT 1')
    if newest and newest[0][0] >= moment:
        raise _trimmed(log, "that time")
    first = _first(log, "high_at", lambda row: row[0] >= moment)
    if first is None:
        return Cut(log.group_end(log.end().offset))
    group = group_of(log, first)
    return Cut(group.after, _first_commit(log, group, moment))


def cut_at_commit(log: SQLiteLog, lsn: int) -> Cut:
    """Return the cut before the first transaction whose commit ends at `lsn` or behind it.

    Positions of several epochs cannot be compared: it is looked for in the newest. Raises LogTrimmed when
    that one has been deleted.
    """
    last = log.last_commit()
    wanted = (last[0].epoch if last else 0, lsn)
    begin = log.begin().offset
    if begin and log.place(begin)[0][:2] >= wanted:
        raise _trimmed(log, "that position")
    first = _first(log, "high_epoch, high_commit", lambda row: tuple(row) >= wanted)
    if first is None:
        return Cut(log.group_end(log.end().offset))
    return Cut(group_of(log, first).after, wanted)


def group_of(log: SQLiteLog, offset: Offset) -> Group:
    """Return the group that holds an entry which the log has."""
    ((through,),) = log.raw_rows(
        'SELECT coalesce(min("offset"), ?) FROM (SELECT "offset" FROM entries '
        'WHERE ends_group AND "offset" >= ? ORDER BY "offset" LIMIT 1)',
        (offset, offset),
    )
    return Group(log.group_end(offset - 1), int(through))


def groups(log: SQLiteLog, after: Offset, through: Offset) -> Iterator[Group]:
    """Yield the groups of `(after, through]`; both are ends of groups.

    Raises LogTrimmed where they have been deleted.
    """
    while after < through:
        page = log.raw_rows(
            'SELECT "offset" FROM entries WHERE ends_group AND "offset" > ? AND "offset" <= ? '
            f'ORDER BY "offset" LIMIT {_PAGE}',
            (after, through),
        )
        if log.begin().offset > after:
            raise _trimmed(log, f"offset {after + 1}")
        for (end,) in page:
            yield Group(after, int(end))
            after = int(end)
        if not page:
            return


def lone_commit(item: LoggedEntry) -> tuple[int, int] | None:
    """Return the commit of an entry, or None where its rows are of several."""
    first, last = item.entry.first, item.entry.last
    return last[:2] if first[:2] == last[:2] else None


def parted(batch: pa.RecordBatch, epoch: int, begin: Cut, end: Cut) -> pa.RecordBatch:
    """Return the rows of a batch, all of `epoch`, that stand behind `begin` and not behind `end`."""
    commits = batch.column(1)
    if begin.commit is not None and epoch == begin.commit[0]:
        batch = batch.filter(pc.greater_equal(commits, begin.commit[1]))
        commits = batch.column(1)
    if end.commit is not None and epoch == end.commit[0]:
        batch = batch.filter(pc.less(commits, end.commit[1]))
    return batch


class Shapes:
    """The shapes that rows of a log have, by their table and version."""

    def __init__(self, log: SQLiteLog) -> None:
        self._log = log
        self._known: dict[tuple[TableId, int], TableSchema] = {}
        self._through = -1

    def of(self, table: TableId, version: int) -> TableSchema:
        """Return the shape of a row's entry; raises KeyError when the log does not tell it."""
        if (table, version) not in self._known:
            self._learn()
        return self._known[table, version]

    def newest(self, table: TableId) -> TableSchema | None:
        """Return the newest shape of a table."""
        return max(self.all_of(table), key=lambda shape: shape.version, default=None)

    def all_of(self, table: TableId) -> list[TableSchema]:
        """Return every shape that a table had, the oldest first."""
        self._learn()
        found = [shape for (of, _), shape in self._known.items() if of == table]
        return sorted(found, key=lambda shape: shape.version)

    def tables(self) -> list[TableId]:
        """Return all tables that the log has rows of."""
        self._learn()
        return sorted({table for table, _ in self._known})

    def _learn(self) -> None:
        for offset, kind, payload in self._log.raw_rows(
            "SELECT \"offset\", kind, payload FROM entries WHERE kind IN ('schema', 'marker') "
            'AND table_name IS NOT NULL AND "offset" > ? ORDER BY "offset"',
            (self._through,),
        ):
            self._through = int(offset)
            if (shape := shape_in(str(kind), payload)) is not None:
                self._known[shape.table, shape.version] = shape


def told(payload: bytes) -> dict[str, Any]:
    """Return what a message's or a truncate's payload says."""
    found: dict[str, Any] = json.loads(payload)
    return found


def _first(log: SQLiteLog, columns: str, reached: Callable[[Sequence[Any]], bool]) -> Offset | None:
    """Return the first entry whose `columns`, which only grow, have reached something."""
    low, high = log.begin().offset + 1, log.end().offset + 1
    end = high
    while low < high:
        middle = (low + high) // 2
        rows = log.raw_rows(f'SELECT {columns} FROM entries WHERE "offset" = ?', (middle,))
        if not rows:
            raise _trimmed(log, f"offset {middle}")
        if reached(rows[0]):
            high = middle
        else:
            low = middle + 1
    return low if low < end else None


def _first_commit(log: SQLiteLog, group: Group, moment: int) -> tuple[int, int] | None:
    """Return the first commit of a group that was made at `moment` or later.

    An entry of several commits tells only the time of its last one: it has to be read.
    """
    best: tuple[int, int] | None = None
    for item in log.headers(*group):
        entry = item.entry
        if entry.kind not in STREAMED or (best is not None and entry.first[:2] >= best):
            continue
        found = lone_commit(item)
        if found is None:
            payload = next(log.entries(item.offset - 1, item.offset)).entry.payload
            batch = decode_rows(payload)
            late = batch.filter(pc.greater_equal(batch["_committed_at"], moment))
            if late.num_rows:
                found = (entry.first.epoch, pc.min(late["_commit"]).as_py())
        elif entry.committed_at < moment:
            found = None
        if found is not None and (best is None or found < best):
            best = found
    return best


def _trimmed(log: SQLiteLog, what: str) -> LogTrimmed:
    begin = log.begin().offset
    return LogTrimmed(
        f"The log of {log.source} begins behind offset {begin}: {what} has been deleted by retention.",
        "Ask from its beginning on (start), read staging, or import an export.",
    )
