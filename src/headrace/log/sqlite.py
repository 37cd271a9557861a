"""The embedded log of one source: headers in a SQLite database, payloads in segments beside it.

An append is durable in this order, and over only after the last step:

1. payloads of rows into the segment that is written to;
2. their sync;
3. the commit of headers, with the notes that belong to them: from here on the group is there.

Each entry's hash covers its header, its payload and the hash before it, so that an altered, removed or
repeated entry breaks the chain from there on. Hashes are compared whenever a payload is read.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from headrace.change import Entry, LoggedEntry, Mark, Offset, TableId
from headrace.errors import LogDamaged, LogFull, LogNotDurable, LogTrimmed
from headrace.failpoints import failpoint
from headrace.log.database import RESTORE, Database
from headrace.log.entries import (
    COLUMNS,
    FORMAT,
    HIGH,
    INLINE,
    INSERT,
    INSERT_STOP,
    SCRIPT,
    High,
    Row,
    entry_hash,
    header_of,
    row_of,
)
from headrace.log.index import MAX_SLICE_ROWS, Index
from headrace.log.reserve import RESERVE_BYTES, Reserve
from headrace.log.retention import thinned
from headrace.log.segments import (
    Place,
    SegmentReader,
    SegmentWriter,
    committed_behind,
    segment_path,
    segments_in,
)
from headrace.turns import held

SEGMENT_BYTES = 128 << 20
_TRIM_STEP = 5000  # entries that one transaction deletes
_VACUUM_PAGES = 5000  # 20 MB that one trim gives back of the database at the most: appends wait meanwhile
_ENDS = f"""
SELECT "offset", hash, {HIGH}, sum_rows, sum_bytes FROM (
  SELECT *, sum(rows) OVER so_far AS sum_rows, sum(bytes) OVER so_far AS sum_bytes FROM entries
  WHERE "offset" > ? AND "offset" <= ? WINDOW so_far AS (ORDER BY "offset")
) WHERE ends_group ORDER BY "offset"
"""


class SQLiteLog(Index):
    """The log of one source, in `path` and the folder of segments beside it.

    Any number of threads and processes may read; one writes, which the state folder's lock sees to.
    Readers never block the writer, and leave no transaction open.
    """

    def __init__(self, path: Path, *, read_only: bool = False, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Open the log at `path`, creating it unless `read_only`; its source is the file's name.

        A segment is closed when it has `segment_bytes`. What an append left behind that did not come to
        its end is removed by the next one. Raises LogError when the file is missing, unreadable or of a newer
        format, LogDamaged where the database is missing or older than its segments.
        """
        self.source = path.stem
        self.path = path
        self.segments = path.with_suffix(".segments")
        self._read_only = read_only
        self._writing = threading.RLock()
        self._appended = threading.Condition()
        if not read_only:
            self._check_not_lost()
        self._broken: LogNotDurable | None = None
        self._is_known = True
        self._reserve = Reserve(path.with_suffix(".reserve"), min(RESERVE_BYTES, segment_bytes // 4))
        self._db = self._opened()
        if not read_only and self.note("log.id") is None:
            self.set_note("log.id", uuid.uuid4().hex)
        self.id = self.note("log.id") or ""
        self._reader = SegmentReader(self.segments)
        self._writer: SegmentWriter | None = None
        self._end = self._read_end()
        self._high = self._read_high()
        if not read_only:
            self._check_newest()
            self._writer = SegmentWriter(self.segments, segment_bytes, self._behind_payloads())
            self._keep_reserve()
            with suppress(LogFull):  # it can be read, and trimmed, all the same
                self._db.rows("PRAGMA wal_checkpoint(TRUNCATE)")

    def _opened(self) -> Database:
        """Open the database, on a full disk in the room of the reserve."""
        try:
            return Database(self.path, script=SCRIPT, version=FORMAT, read_only=self._read_only)
        except LogFull:
            if self._read_only or not self._reserve.give_up():
                raise
        return Database(self.path, script=SCRIPT, version=FORMAT)

    def append(self, entries: Iterable[Entry]) -> Mark:
        """See `Log.append`. Entries are taken one at a time: a group need not fit in memory.

        Raises LogFull while there is no room, and LogNotDurable once a sync has failed, from then on.
        """
        with self._sound():
            return self._append(entries)

    @contextmanager
    def _sound(self) -> Iterator[None]:
        """Keep every other thread from writing, and everyone once a sync has failed: what it would stand on
        may not be on the disk. Where an append left open what is committed, that is found out before."""
        with self._writing:
            if self._broken is not None:
                raise self._broken
            try:
                if not self._is_known:
                    self._recover()
                yield
            except LogNotDurable as error:
                self._broken = error
                raise

    def _append(self, entries: Iterable[Entry]) -> Mark:
        assert self._writer is not None, "the log is open to read only"
        end, high = self._end, self._high
        now = time.time_ns() // 1000
        try:
            with self._db.transaction():
                for entry, is_last in _with_last(entries):
                    end, high = self._insert(end, high, entry, (now, is_last))
                failpoint("log.append.commit")
        except LogNotDurable:
            raise
        except BaseException:
            self._recover()
            raise
        self._advance(end, high)
        failpoint("log.append.committed")
        return end

    def _insert(self, end: Mark, high: High, entry: Entry, fate: tuple[int, bool]) -> tuple[Mark, High]:
        """Write one entry; `fate` is the time of its append and whether it ends its group."""
        assert self._writer is not None
        offset, previous = end.offset + 1, bytes.fromhex(end.hash)
        header = header_of(offset, entry, *fate)
        high = high.through(header)
        inline = entry.kind in INLINE
        place = (None, None) if inline else self._writer.write(offset, entry.payload)
        if fate[1]:
            self._writer.sync()
        digest = entry_hash(previous, self.source, header, entry.filter, entry.payload)
        body = entry.payload if inline else None
        self._db.rows(INSERT, (*header, *high, digest, previous, len(entry.payload), *place, body))
        if entry.filter:
            self._db.rows("INSERT INTO filters VALUES (?, ?)", (offset, entry.filter))
        return Mark(self.id, offset, digest.hex()), high

    def _recover(self) -> None:
        """Come back to what is committed; a failed commit may have been one all the same."""
        assert self._writer is not None
        self._is_known = False
        end, high = self._read_end(), self._read_high()
        if end == self._end:
            self._writer.undo()
        else:
            self._advance(end, high)
        self._is_known = True

    def _advance(self, end: Mark, high: High) -> None:
        """Take over what has been committed."""
        assert self._writer is not None
        if self._writer.commit(end.offset):
            self._keep_reserve()
        with self._appended:
            self._end, self._high = end, high
            self._appended.notify_all()

    def _check_not_lost(self) -> None:
        """See that no database is made for the segments of another. Raises LogDamaged."""
        is_there = self.path.exists() and self.path.stat().st_size
        if not is_there and (segments := segments_in(self.segments)):
            raise LogDamaged(
                f"{self.path} is missing, and {self.segments} holds {len(segments)} segments of it.",
                f"Put {self.path.name} back, or restore a backup; to begin anew, move {self.segments} away.",
            )

    def _check_newest(self) -> None:
        """See that no newer database has been at the segments. Raises LogDamaged."""
        found = committed_behind(self.segments, self._end.offset)
        if found is not None:
            raise LogDamaged(
                f"{self.path} ends at offset {self._end.offset}, and a newer one committed {found} beyond.",
                f"Put the newest {self.path.name} back; to go on from this one, restore a backup as a whole, "
                f"after moving {self.path.name} and {self.segments.name} away.",
            )

    def _behind_payloads(self) -> Place | None:
        row = self._db.row(
            "SELECT segment, start + bytes FROM entries WHERE segment IS NOT NULL "
            'ORDER BY "offset" DESC LIMIT 1'
        )
        if row is None:
            return None
        path = segment_path(self.segments, int(row[0]))
        if not path.exists() or path.stat().st_size < int(row[1]):
            raise LogDamaged(f"{path} is missing or shorter than what was written.", RESTORE)
        return Place(int(row[0]), int(row[1]))

    def read(self, after: Offset, max_bytes: int) -> Sequence[LoggedEntry]:
        """See `Log.read`."""
        end = self.end().offset
        self.check_held(after, end)
        through = self.reach(after, end, max_bytes, MAX_SLICE_ROWS)[0]
        return list(self.entries(after, through))

    def entries(
        self, after: Offset, through: Offset, *, table: TableId | None = None, kinds: Sequence[str] = ()
    ) -> Iterator[LoggedEntry]:
        """Yield the entries of `(after, through]` in order, of one table and of some kinds if given.

        Raises LogTrimmed where they have been deleted, LogDamaged where one is not what was written.
        """
        self.check_held(after, through)
        chosen = ["1"]
        values: list[object] = []
        if table is not None:
            chosen.append("table_schema = ? AND table_name = ?")
            values += table
        if kinds:
            chosen.append(f"kind IN ({', '.join('?' * len(kinds))})")
            values += kinds
        where = " AND ".join(chosen)
        while True:
            page = self._db.rows(
                f'SELECT {COLUMNS}, filter FROM entries LEFT JOIN filters USING ("offset") WHERE {where} '
                'AND "offset" > ? AND "offset" <= ? ORDER BY "offset" LIMIT 100',
                (*values, after, through),
            )
            self.check_held(after, through)  # after the page was read: none of it was missing
            for found in page:
                row, key_filter = row_of(found[:-1]), found[-1] or b""
                after = row.offset
                yield row.logged(self.payload(row, key_filter), key_filter)
            if len(page) < 100:
                return

    def check_held(self, after: Offset, through: Offset) -> None:
        """See that nothing of `(after, through]` has been deleted. Raises LogTrimmed."""
        if after < (begin := self.begin().offset) and after < through:
            raise LogTrimmed(
                f"The log of {self.source} begins behind offset {begin}: what is asked for, from {after + 1} "
                "on, has been deleted by retention.",
                "Ask from there on, read staging, or import an export.",
            )

    def entry(self, offset: Offset) -> LoggedEntry | None:
        """Return one entry, or None if the log has no such entry."""
        if not self.begin().offset < offset <= self.end().offset:
            return None
        return next(self.entries(offset - 1, offset), None)

    def payload(self, row: Row, key_filter: bytes) -> bytes:
        """Return the payload of a row of the database, which its hash vouches for.

        Raises LogDamaged when it is not what was written, LogTrimmed when it was deleted meanwhile.
        """
        body = row.inline
        if body is None:
            assert row.place is not None
            try:
                body = self._reader.read(row.place, row.size)
            except FileNotFoundError:
                if row.offset <= self.begin().offset:
                    words = f"Offset {row.offset} of the log of {self.source} has been deleted meanwhile."
                    raise LogTrimmed(words, "Ask from its beginning on.") from None
                path = segment_path(self.segments, row.place.segment)
                raise LogDamaged(f"{path} is missing (offset {row.offset}).", RESTORE) from None
        if entry_hash(row.previous, self.source, row.header, key_filter, body) != row.hash:
            raise LogDamaged(f"{self.path}: the hash of offset {row.offset} does not hold.", RESTORE)
        return body

    def end(self) -> Mark:
        """See `Log.end`."""
        if self._read_only:
            self._end = self._read_end()
        return self._end

    def wait(self, after: Offset, timeout: float) -> bool:
        """See `Log.wait`."""
        with self._appended:
            return self._appended.wait_for(lambda: self._end.offset > after, timeout)

    def note(self, key: str) -> str | None:
        """See `Log.note`."""
        row = self._db.row("SELECT value FROM facts WHERE key = ?", (key,))
        return str(row[0]) if row else None

    def set_note(self, key: str, value: str) -> None:
        """See `Log.set_note`."""
        with self._sound():
            self._db.rows("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, value))

    def writing(self, patience: float | None = None) -> AbstractContextManager[bool]:
        """See `Log.writing`."""
        return held(self._writing, patience)

    def raw_rows(self, sql: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Ask the database itself, as `headrace.log.proof` and the archive do."""
        return self._db.rows(sql, values)

    def check_structure(self) -> None:
        """Have SQLite look at all of its pages and indexes. Raises LogDamaged."""
        faults = [str(row[0]) for row in self._db.rows("PRAGMA integrity_check(5)")]
        if faults != ["ok"]:
            raise LogDamaged(f"{self.path}: {'; '.join(faults)}.", RESTORE)

    def changes_of(self, table: TableId, after: Offset) -> Iterator[bytes]:
        """See `Log.changes_of`."""
        for item in self.entries(after, self.end().offset, table=table, kinds=("rows",)):
            yield item.entry.payload

    def size(self) -> int:
        """Return the bytes that the log takes on its disk, without those of unfinished appends."""
        total = 0
        segments = [segment_path(self.segments, segment) for segment in self._own_segments()]
        for file in [*self.path.parent.glob(f"{self.path.name}*"), *segments]:
            with suppress(FileNotFoundError):  # retention may remove it meanwhile
                total += file.stat().st_size
        return total

    def roll(self) -> None:
        """Have the next payload begin a segment, so that the one before can go once all of it is old."""
        assert self._writer is not None
        with self._writing:
            self._writer.roll()

    def beyond(self, limit: int) -> Offset:
        """Return the last offset that would have to go for the log to take no more than `limit` bytes.

        A group that has to go in part goes as a whole.
        """
        excess, last = self.size() - limit, 0
        for segment, following in pairwise(self._own_segments()):
            if excess <= 0:
                break
            excess -= segment_path(self.segments, segment).stat().st_size
            last = following - 1
        return last if last <= self.begin().offset else self._ending(last) or last

    def _own_segments(self) -> list[int]:
        end = self.end().offset
        return [segment for segment in segments_in(self.segments) if segment <= end]

    def trim(self, through: Offset, pinned: Iterable[Offset] = ()) -> int:
        """See `Log.trim`. On a full disk it takes the room of the reserve, and keeps every append from it
        meanwhile.
        """
        through, pins = self.group_end(through), set(pinned)
        try:
            freed = self._trim(through, pins)
        except LogFull:
            with self.reserve_given_up() as is_given_up:
                if not is_given_up:
                    raise
                return self._trim(through, pins)
        self._keep_reserve()
        return freed

    @contextmanager
    def reserve_given_up(self) -> Iterator[bool]:
        """Have the room of the reserve, if it is there, and keep every append from it meanwhile."""
        with self._writing:
            try:
                yield self._reserve.give_up()
            finally:
                self._keep_reserve()

    def _trim(self, through: Offset, pinned: set[Offset]) -> int:
        with self._sound():
            if (begin := self.begin().offset) < through:
                step = min(through, self._ending(min(begin + _TRIM_STEP, through)) or through)
                self._trim_to(begin, step, pinned)
                failpoint("log.trim.committed")
            freed = self._remove_segments()  # also those that a killed trim has left
            self._db.rows(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})")
        return freed

    def _remove_segments(self) -> int:
        """Remove the segments that no entry refers to any more; returns their bytes."""
        assert self._writer is not None
        row = self._db.row('SELECT segment FROM entries WHERE segment IS NOT NULL ORDER BY "offset" LIMIT 1')
        kept = int(row[0]) if row else self._end.offset + 1
        freed = self._writer.remove_before(kept)
        self._reader.close(before=kept)
        return freed

    def _keep_reserve(self) -> None:
        """Keep room for a trim, once there is a segment that one could give back."""
        if len(segments_in(self.segments)) > 1:
            self._reserve.keep()

    def _trim_to(self, begin: Offset, through: Offset, pinned: set[Offset]) -> None:
        """Delete entries in `(begin, through]` in one transaction; stops and markers of tables stay."""
        span = (begin, through)
        with self._db.transaction():
            known = 'SELECT rows, bytes FROM stops WHERE "offset" = ?'
            former = None if begin in pinned else self._db.row(known, (begin,))
            stops, absorbed = thinned(self._db.rows(_ENDS, span), former, pinned)
            if absorbed:
                self._db.rows('DELETE FROM stops WHERE "offset" = ?', (begin,))
            for stop in stops:
                self._db.rows(INSERT_STOP, stop)
            self._db.rows(
                'DELETE FROM entries WHERE "offset" > ? AND "offset" <= ? AND NOT '
                "(kind IN ('schema', 'marker', 'decision') AND table_name IS NOT NULL)",
                span,
            )
            self._db.rows('DELETE FROM filters WHERE "offset" <= ?', (through,))

    def close(self) -> None:
        """Close every file of this object, whichever thread opened it."""
        self._reader.close()
        if self._writer is not None:
            self._writer.close()
        self._db.close()

    def _read_end(self) -> Mark:
        row = self._db.row('SELECT "offset", hash FROM entries ORDER BY "offset" DESC LIMIT 1')
        begin = self.begin()
        # Markers that retention has kept stand before the beginning.
        return Mark(self.id, int(row[0]), row[1].hex()) if row and row[0] > begin.offset else begin


def _with_last(entries: Iterable[Entry]) -> Iterator[tuple[Entry, bool]]:
    iterator = iter(entries)
    current = next(iterator, None)
    while current is not None:
        following = next(iterator, None)
        yield current, following is None
        current = following
