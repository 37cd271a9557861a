"""The in-memory double of a log: lists, and nothing that is clever.

For tests of what reads or writes a log. It keeps the contract of `headrace.testing.log_suite`, durability
excepted: it is gone with its process.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from headrace.change import (
    EVENTS,
    START,
    CopyMark,
    Entry,
    Kind,
    LoggedEntry,
    Mark,
    Offset,
    Position,
    TableId,
    TableSchema,
    shape_in,
)
from headrace.errors import LogDamaged, LogNotDurable, LogTrimmed
from headrace.failpoints import failpoint
from headrace.log.entries import NO_HASH, NOTHING, High, entry_hash, header_of
from headrace.turns import held

MAX_SLICE_ROWS = 100_000
_MAX_SLICE_BYTES = 16 << 20


class MemoryLog:
    """The log of one source, in lists. Any number of threads may read; one writes."""

    def __init__(self, source: str = "log", log_id: str | None = None) -> None:
        """`log_id` is the id of another log whose place this one takes."""
        self.source = source
        self.id = log_id or uuid.uuid4().hex
        self._items: list[LoggedEntry] = []  # of offset n at n - 1; those that are trimmed without payload
        self._begin: Offset = 0
        self._notes: dict[str, str] = {}
        self._broken: LogNotDurable | None = None
        self._writing = threading.RLock()
        self._appended = threading.Condition()

    # -- writing

    def append(self, entries: Iterable[Entry]) -> Mark:
        """See `Log.append`."""
        with self._writing:
            if self._broken is not None:
                raise self._broken
            notes = dict(self._notes)
            try:
                added = self._added(entries)
                failpoint("log.append.commit")
            except BaseException:
                self._notes = notes
                raise
            with self._appended:
                self._items += added
                self._appended.notify_all()
            failpoint("log.append.committed")
            return self.end()

    def _added(self, entries: Iterable[Entry]) -> list[LoggedEntry]:
        group = list(entries)
        if group:
            try:
                failpoint("log.segment.sync")
            except OSError as error:
                self._broken = LogNotDurable("The log could not be synced.")
                raise self._broken from error
        end, now, added = self.end(), time.time_ns() // 1000, []
        previous = bytes.fromhex(end.hash)
        for offset, entry in enumerate(group, end.offset + 1):
            ends = offset == end.offset + len(group)
            header = header_of(offset, entry, now, ends)
            previous = entry_hash(previous, self.source, header, entry.filter, entry.payload)
            added.append(LoggedEntry(offset, entry, now, ends, previous.hex()))
        return added

    def set_note(self, key: str, value: str) -> None:
        """See `Log.set_note`."""
        with self._writing:
            self._notes[key] = value

    def writing(self, patience: float | None = None) -> AbstractContextManager[bool]:
        """See `Log.writing`."""
        return held(self._writing, patience)

    def trim(self, through: Offset, pinned: Iterable[Offset] = ()) -> int:
        """See `Log.trim`. Every end of a group stays as a stop, whether pinned or not."""
        del pinned
        with self._writing:
            before, through = self.size(), self.group_end(through)
            for item in self._items[self._begin : through]:
                if not _is_kept(item.entry):
                    self._items[item.offset - 1] = replace(
                        item, entry=replace(item.entry, payload=b"", filter=b"")
                    )
            self._begin = max(self._begin, through)
            failpoint("log.trim.committed")
            return before - self.size()

    # -- reading

    def read(self, after: Offset, max_bytes: int) -> Sequence[LoggedEntry]:
        """See `Log.read`."""
        taken: list[LoggedEntry] = []
        total = rows = 0
        for item in self.entries(after, self.end().offset):
            total += len(item.entry.payload)
            rows += item.entry.rows
            if taken and (total > max_bytes or rows > MAX_SLICE_ROWS):
                break
            taken.append(item)
        return taken

    def entries(
        self, after: Offset, through: Offset, *, table: TableId | None = None, kinds: Sequence[str] = ()
    ) -> Iterator[LoggedEntry]:
        """Yield the entries of `(after, through]`, of one table and of some kinds if given."""
        for offset in range(after + 1, min(through, len(self._items)) + 1):
            item = self._items[offset - 1]
            if offset <= self._begin:
                raise LogTrimmed(f"The log begins behind offset {self._begin}.")
            if table in (None, item.entry.table) and (not kinds or item.entry.kind in kinds):
                yield item

    def entry(self, offset: Offset) -> LoggedEntry | None:
        """Return one entry, or None if the log has no such entry."""
        return self._items[offset - 1] if self._begin < offset <= len(self._items) else None

    def headers(self, after: Offset, through: Offset) -> Iterator[LoggedEntry]:
        """See `Log.headers`."""
        for item in self._items[after:through]:
            if item.offset > self._begin or _is_kept(item.entry):
                yield replace(item, entry=replace(item.entry, payload=b"", filter=b""))

    def changes_of(self, table: TableId, after: Offset) -> Iterator[bytes]:
        """See `Log.changes_of`."""
        for item in self.entries(after, self.end().offset, table=table, kinds=("rows",)):
            yield item.entry.payload

    def note(self, key: str) -> str | None:
        """See `Log.note`."""
        return self._notes.get(key)

    def wait(self, after: Offset, timeout: float) -> bool:
        """See `Log.wait`."""
        with self._appended:
            return self._appended.wait_for(lambda: len(self._items) > after, timeout)

    def size(self) -> int:
        """Return the bytes of all payloads and filters."""
        return sum(len(item.entry.payload) + len(item.entry.filter) for item in self._items)

    def close(self) -> None:
        """Do nothing: there is nothing to close."""

    def reopened(self) -> MemoryLog:
        """Return the log as another process would find it: the same store, whatever had failed."""
        again = MemoryLog(self.source, self.id)
        again._items, again._begin, again._notes = self._items, self._begin, self._notes
        return again

    # -- places

    def end(self) -> Mark:
        """See `Log.end`."""
        last = self._items[-1:]
        return Mark(self.id, last[0].offset, last[0].hash) if last else Mark(self.id, 0, NO_HASH)

    def begin(self) -> Mark:
        """See `Log.begin`."""
        mark = self.mark(self._begin)
        assert mark is not None
        return mark

    def mark(self, offset: Offset) -> Mark | None:
        """See `Log.mark`."""
        if offset == 0:
            return Mark(self.id, 0, NO_HASH)
        if not 0 < offset <= len(self._items):
            return None
        item = self._items[offset - 1]
        is_held = offset > self._begin or item.ends_group or _is_kept(item.entry)
        return Mark(self.id, offset, item.hash) if is_held else None

    def place(self, offset: Offset) -> tuple[Position, int]:
        """See `Log.place`."""
        high = self._high(offset)
        if not 0 < offset <= len(self._items):
            return START, 0
        own = self._items[offset - 1].entry
        is_of_its_epoch = high.committed_at and high.epoch == own.last.epoch
        return (high.position, high.committed_at) if is_of_its_epoch else (own.last, own.committed_at)

    def last_commit(self) -> tuple[Position, int] | None:
        """See `Log.last_commit`."""
        high = self._high(len(self._items))
        return (high.position, high.committed_at) if high.at else None

    def position(self) -> Position | None:
        """See `Log.position`."""
        last = self.last_commit()
        return last[0] if last else None

    def _high(self, through: Offset) -> High:
        high = NOTHING
        for item in self._items[:through]:
            high = high.through(header_of(item.offset, item.entry, item.appended_at, item.ends_group))
        return high

    def group_end(self, offset: Offset) -> Offset:
        """See `Log.group_end`."""
        return max((item.offset for item in self._items[:offset] if item.ends_group), default=0)

    def slice_end(self, after: Offset, limit: Offset, max_bytes: int, max_rows: int) -> Offset:
        """See `Log.slice_end`."""
        return self._slice_end(self._items[after:limit], after, max_bytes, max_rows)

    def table_slice_end(self, table: TableId, after: Offset, limit: Offset, kinds: Sequence[Kind]) -> Offset:
        """See `Log.table_slice_end`."""
        items = [
            item if item.entry.table == table and item.entry.kind in kinds else _empty(item)
            for item in self._items[after:limit]
        ]
        end = self._slice_end(items, after, _MAX_SLICE_BYTES, MAX_SLICE_ROWS)
        return limit if end == self.group_end(limit) or end == after else end

    def _slice_end(self, items: list[LoggedEntry], after: Offset, max_bytes: int, max_rows: int) -> Offset:
        end, rows, total = after, 0, 0
        for item in items:
            if item.offset <= self._begin and item.ends_group:
                return item.offset
            rows += item.entry.rows
            total += len(item.entry.payload)
            if end > after and (rows > max_rows or total > max_bytes):
                break
            end = item.offset if item.ends_group else end
        return end

    # -- what the headers tell

    def backlog(self, after: Offset, table: TableId | None = None) -> tuple[int, int, int | None]:
        """See `Log.backlog`."""
        items = list(self.entries(max(after, self._begin), len(self._items), table=table))
        rows, size = sum(i.entry.rows for i in items), sum(len(i.entry.payload) for i in items)
        return rows, size, min((i.appended_at for i in items), default=None)

    def schemas(self) -> dict[TableId, TableSchema]:
        """See `Log.schemas`."""
        entries = [i.entry for i in self._items if i.entry.table and i.entry.kind in ("schema", "marker")]
        shapes = (shape_in(entry.kind, entry.payload) for entry in entries)
        return {shape.table: shape for shape in shapes if shape}

    def copy_marks(self) -> list[tuple[Offset, TableId, Position, int, CopyMark]]:
        """See `Log.copy_marks`."""
        return [
            (i.offset, i.entry.table, i.entry.first, i.appended_at, CopyMark.from_json(i.entry.payload))
            for i in self._items
            if i.entry.kind == "marker" and i.entry.table is not None
        ]

    def truncates(self, table: TableId, after: Offset) -> list[int]:
        """See `Log.truncates`."""
        after = max(after, self._begin)
        found = self.entries(after, len(self._items), table=table, kinds=("truncate",))
        return [item.entry.first.commit for item in found]

    def last_offsets(self) -> dict[TableId, Offset]:
        """See `Log.last_offsets`."""
        return {i.entry.table: i.offset for i in self.headers(0, len(self._items)) if i.entry.table}

    def before_unstaged(
        self, table: TableId, rows_through: Offset, schemas_through: Offset, aside: Sequence[Offset] = ()
    ) -> Offset:
        """See `Log.before_unstaged`."""
        for item in self.headers(0, len(self._items)):
            through = schemas_through if item.entry.kind in EVENTS else rows_through
            if item.entry.table == table and item.offset > through and item.offset not in aside:
                return self.group_end(item.offset - 1)
        return self.end().offset

    def verify(self) -> Mark:
        """Walk the chain. Raises LogDamaged where it breaks."""
        previous = bytes.fromhex(self.begin().hash)
        for item in self._items[self._begin :]:
            header = header_of(item.offset, item.entry, item.appended_at, item.ends_group)
            previous = entry_hash(previous, self.source, header, item.entry.filter, item.entry.payload)
            if previous.hex() != item.hash:
                raise LogDamaged(f"The hash of offset {item.offset} does not hold.")
        return self.end()


def _is_kept(entry: Entry) -> bool:
    """Whether an entry outlives retention."""
    return entry.table is not None and entry.kind in EVENTS


def _empty(item: LoggedEntry) -> LoggedEntry:
    return replace(item, entry=replace(item.entry, rows=0, payload=b""))
