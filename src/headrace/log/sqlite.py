"""The embedded log: one SQLite file per source.

Durable means WAL with `synchronous=FULL`: a power cut after `append` returned loses nothing (with
NORMAL, 21 of 30 simulated cuts did). Each entry's hash covers its header, its payload and the hash
before it, so an altered, removed or repeated entry breaks the chain from there on.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import apsw

from headrace.change import (
    STREAMED,
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
from headrace.errors import LogDamaged, LogError
from headrace.failpoints import failpoint

FORMAT = 2
MAX_SLICE_ROWS = 100_000
_MAX_SLICE_BYTES = 16 << 20
NO_HASH = "0" * 64
_CHECKPOINT_PAGES = 4096  # 64 MB of WAL before it is copied into the file
# Bytes of a payload that is written page by page: as a parameter SQLite would copy it twice.
_LARGE = 32 << 20

_CREATE = """
CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE entries (
  "offset" INTEGER PRIMARY KEY,
  kind TEXT NOT NULL, table_schema TEXT, table_name TEXT,
  first_epoch INTEGER NOT NULL, first_commit INTEGER NOT NULL, first_ordinal INTEGER NOT NULL,
  last_epoch INTEGER NOT NULL, last_commit INTEGER NOT NULL, last_ordinal INTEGER NOT NULL,
  committed_at INTEGER NOT NULL, rows INTEGER NOT NULL, schema_version INTEGER NOT NULL,
  appended_at INTEGER NOT NULL, ends_group INTEGER NOT NULL,
  hash TEXT NOT NULL, bytes INTEGER NOT NULL, payload BLOB NOT NULL
);
CREATE INDEX by_table ON entries (table_schema, table_name, "offset", rows);
CREATE INDEX sizes ON entries ("offset", rows, bytes, ends_group);
CREATE INDEX markers ON entries ("offset") WHERE kind IN ('schema', 'marker');
CREATE INDEX streamed ON entries ("offset") WHERE ends_group AND kind NOT IN ('copy', 'marker');
"""
_STREAMED_THROUGH = (
    "\"offset\" <= ? AND ends_group AND kind NOT IN ('copy', 'marker') ORDER BY \"offset\" DESC LIMIT 1"
)
_HEADER = (
    '"offset", kind, table_schema, table_name, first_epoch, first_commit, first_ordinal, '
    "last_epoch, last_commit, last_ordinal, committed_at, rows, schema_version, appended_at, ends_group"
)
_COLUMNS = f"{_HEADER}, hash, payload"


def entry_hash(previous: str, header: Sequence[object], payload: bytes) -> str:
    """Hash an entry: BLAKE2b-256 over the previous hash, the header as compact JSON, the payload.

    `header` is the entry's columns from offset to ends_group, in the order of the table.
    """
    digest = hashlib.blake2b(bytes.fromhex(previous), digest_size=32)
    digest.update(json.dumps(list(header), separators=(",", ":")).encode())
    digest.update(payload)
    return digest.hexdigest()


class SQLiteLog:
    """The log of one source in a SQLite file.

    Any number of threads and processes may read; one writes, which the state folder's lock sees to.
    Readers never block the writer.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open the log at `path`, creating it unless `read_only`.

        Raises LogError when the file is missing, unreadable or of a newer format.
        """
        self._path = path
        self._read_only = read_only
        self._local = threading.local()
        self._writing = threading.RLock()
        self._appended = threading.Condition()
        self._connections: list[apsw.Connection] = []
        if read_only and not path.exists():
            raise LogError(f"There is no log at {path}.", "Start the pipeline once with `headrace run`.")
        try:
            self._create()
        except apsw.NotADBError as error:
            raise LogDamaged(f"{path} is not a log: {error}.", "Restore it from a backup.") from error
        self.id = self.note("log.id") or ""
        self._end = self._read_end()

    def append(self, entries: Iterable[Entry]) -> Mark:
        """See `Log.append`. Entries are taken one at a time: a group need not fit in memory."""
        with self._writing:
            return self._append(entries)

    def _append(self, entries: Iterable[Entry]) -> Mark:
        db = self._connection()
        end = self._end
        now = time.time_ns() // 1000
        db.execute("BEGIN IMMEDIATE")
        try:
            for entry, is_last in _with_last(entries):
                end = self._insert(db, end, entry, now, is_last)
            failpoint("log.append.commit")
            db.execute("COMMIT")
            failpoint("log.append.committed")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            self._end = self._read_end()  # a failed commit may have been one all the same
            raise
        with self._appended:
            self._end = end
            self._appended.notify_all()
        return end

    def read(self, after: Offset, max_bytes: int) -> Sequence[LoggedEntry]:
        """See `Log.read`."""
        through = self._reach(after, self._end.offset, max_bytes, MAX_SLICE_ROWS)[0]
        rows = self._connection().execute(
            f'SELECT {_COLUMNS} FROM entries WHERE "offset" > ? AND "offset" <= ? ORDER BY "offset"',
            (after, through),
        )
        return [_from_row(row) for row in rows]

    def table_slice_end(self, table: TableId, after: Offset, limit: Offset, kinds: Sequence[Kind]) -> Offset:
        """Return the last group end up to `limit` that keeps the entries of a table and some kinds in
        `(after, …]` within `MAX_SLICE_ROWS` rows and `_MAX_SLICE_BYTES` of payload, but has one if there is
        one; `limit` if all fit."""
        rows = total = 0
        marks = ", ".join("?" * len(kinds))
        for offset, count, size in self._connection().execute(
            'SELECT "offset", rows, bytes FROM entries WHERE table_schema = ? AND table_name = ? '
            f'AND "offset" > ? AND "offset" <= ? AND kind IN ({marks}) ORDER BY "offset"',
            (*table, after, limit, *kinds),
        ):
            rows += int(count)
            total += int(size)
            if rows > MAX_SLICE_ROWS or total > _MAX_SLICE_BYTES:
                before = self.group_end(int(offset) - 1)
                return before if before > after else min(limit, self._ending(int(offset)))
        return limit

    def _ending(self, offset: Offset) -> Offset:
        row = self._connection().execute(
            'SELECT "offset" FROM entries WHERE ends_group AND "offset" >= ? ORDER BY "offset" LIMIT 1',
            (offset,),
        )
        return int(next(row)[0])

    def slice_end(self, after: Offset, limit: Offset, max_bytes: int, max_rows: int) -> Offset:
        """Return the last group end up to `limit` that keeps `(after, …]` within `max_bytes` of payload
        and `max_rows` rows; at least one group's, if there is one."""
        through, end = self._reach(after, limit, max_bytes, max_rows)
        if end > after or through == limit:
            return end
        row = (
            self._connection()
            .execute(
                'SELECT min("offset") FROM entries WHERE "offset" > ? AND "offset" <= ? AND ends_group',
                (after, limit),
            )
            .fetchone()
        )
        return after if row is None or row[0] is None else int(row[0])

    def _reach(self, after: Offset, limit: Offset, max_bytes: int, max_rows: int) -> tuple[Offset, Offset]:
        """Return the last entry up to `limit` that keeps `(after, …]` within `max_bytes` of payload and
        `max_rows` rows, at least one if there is one, and the last group end up to there."""
        through = end = after
        total = rows = 0
        for offset, count, size, ends in self._connection().execute(
            'SELECT "offset", rows, bytes, ends_group FROM entries '
            'WHERE "offset" > ? AND "offset" <= ? ORDER BY "offset"',
            (after, limit),
        ):
            total += int(size)
            rows += int(count)
            if through > after and (total > max_bytes or rows > max_rows):
                break
            through = int(offset)
            if ends:
                end = through
        return through, end

    def copy_marks(self) -> list[tuple[Offset, TableId, Position, int, CopyMark]]:
        """See `Log.copy_marks`."""
        rows = self._connection().execute(
            'SELECT "offset", table_schema, table_name, first_epoch, first_commit, first_ordinal, '
            "appended_at, payload FROM entries WHERE kind IN ('schema', 'marker') "
            "AND kind = 'marker' ORDER BY \"offset\""  # the first condition is that of the index
        )
        return [
            (int(offset), TableId(schema, name), Position(*place), int(appended), CopyMark.from_json(text))
            for offset, schema, name, *place, appended, text in rows
        ]

    def truncates(self, table: TableId, after: Offset) -> list[int]:
        """See `Log.truncates`."""
        rows = self._connection().execute(
            "SELECT first_commit FROM entries WHERE table_schema = ? AND table_name = ? "
            "AND \"offset\" > ? AND kind = 'truncate'",
            (*table, after),
        )
        return [int(row[0]) for row in rows]

    def place(self, offset: Offset) -> tuple[Position, int]:
        """Return up to which position, and which commit time (microseconds), an offset holds the source.

        These are of the last streamed entry through it, since a copy is read ahead of the stream; before
        the first one of its epoch they are those of the entry itself.
        """
        found: list[Any] = []
        for which in ('"offset" = ?', _STREAMED_THROUGH):
            found += self._connection().execute(
                f"SELECT last_epoch, last_commit, last_ordinal, committed_at FROM entries WHERE {which}",
                (offset,),
            )
        places = [(Position(*row[:3]), int(row[3])) for row in found]
        if not places:
            return Position(0, 0, 0), 0
        return places[-1] if places[-1][0].epoch == places[0][0].epoch else places[0]

    def headers(self, after: Offset, through: Offset) -> Iterator[LoggedEntry]:
        """Yield entries in `(after, through]` without payloads."""
        for row in self._connection().execute(
            f"SELECT {_HEADER}, hash, x'' FROM entries "
            'WHERE "offset" > ? AND "offset" <= ? ORDER BY "offset"',
            (after, through),
        ):
            yield _from_row(row)

    def end(self) -> Mark:
        """See `Log.end`."""
        if self._read_only:
            self._end = self._read_end()
        return self._end

    def wait(self, after: Offset, timeout: float) -> bool:
        """Wait up to `timeout` seconds for an entry after `after`; say whether there is one."""
        with self._appended:
            return self._appended.wait_for(lambda: self._end.offset > after, timeout)

    def mark(self, offset: Offset) -> Mark | None:
        """See `Log.mark`."""
        if offset == 0:
            return Mark(self.id, 0, NO_HASH)
        row = self._connection().execute('SELECT hash FROM entries WHERE "offset" = ?', (offset,)).fetchone()
        return Mark(self.id, offset, str(row[0])) if row else None

    def position(self) -> Position | None:
        """See `Log.position`."""
        last = self.last_commit()
        return last[0] if last else None

    def last_commit(self) -> tuple[Position, int] | None:
        """See `Log.last_commit`."""
        row = (
            self._connection()
            .execute(
                "SELECT last_epoch, last_commit, last_ordinal, committed_at FROM entries "
                "WHERE ends_group AND kind NOT IN ('copy', 'marker') ORDER BY \"offset\" DESC LIMIT 1"
            )
            .fetchone()
        )
        return (Position(*row[:3]), int(row[3])) if row else None

    def schemas(self) -> dict[TableId, TableSchema]:
        """See `Log.schemas`."""
        rows = self._connection().execute(
            "SELECT kind, payload FROM entries WHERE kind IN ('schema', 'marker') ORDER BY \"offset\""
        )
        shapes = (shape_in(str(kind), payload) for kind, payload in rows)
        return {shape.table: shape for shape in shapes if shape}

    def last_offsets(self) -> dict[TableId, Offset]:
        """Return the offset of the last entry of every table."""
        rows = self._connection().execute(
            'SELECT table_schema, table_name, max("offset") FROM entries '
            "WHERE table_name IS NOT NULL GROUP BY 1, 2"
        )
        return {TableId(str(s), str(n)): int(o) for s, n, o in rows}

    def before_unstaged(self, table: TableId, rows_through: Offset, schemas_through: Offset) -> Offset:
        """Return the last group end before a table's first entry that is not staged, or the log's end.

        Its rows are staged through `rows_through`, its schema entries through `schemas_through`.
        """
        row = (
            self._connection()
            .execute(
                'SELECT min("offset") FROM entries WHERE table_schema = ? AND table_name = ? '
                "AND \"offset\" > CASE WHEN kind IN ('schema', 'marker') THEN ? ELSE ? END",
                (*table, schemas_through, rows_through),
            )
            .fetchone()
        )
        return self.end().offset if row is None or row[0] is None else self.group_end(int(row[0]) - 1)

    def group_end(self, offset: Offset) -> Offset:
        """Return the last group end at or before `offset`."""
        row = (
            self._connection()
            .execute(
                'SELECT "offset" FROM entries WHERE ends_group AND "offset" <= ? '
                'ORDER BY "offset" DESC LIMIT 1',
                (offset,),
            )
            .fetchone()
        )
        return int(row[0]) if row else 0

    def note(self, key: str) -> str | None:
        """See `Log.note`."""
        row = self._connection().execute("SELECT value FROM facts WHERE key = ?", (key,)).fetchone()
        return str(row[0]) if row else None

    def set_note(self, key: str, value: str) -> None:
        """See `Log.set_note`."""
        with self._writing:
            self._connection().execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, value))

    def writing(self) -> AbstractContextManager[object]:
        """See `Log.writing`."""
        return self._writing

    def backlog(self, after: Offset, table: TableId | None = None) -> tuple[int, int, int | None]:
        """Return rows, payload bytes and the oldest append time (microseconds) after `after`, of one
        table or of all."""
        mine = "" if table is None else " AND table_schema = ? AND table_name = ?"
        row = (
            self._connection()
            .execute(
                "SELECT coalesce(sum(rows), 0), coalesce(sum(bytes), 0), min(appended_at) "
                f'FROM entries WHERE "offset" > ?{mine}',
                (after, *(table or ())),
            )
            .fetchone()
        )
        assert row is not None
        return int(row[0]), int(row[1]), row[2]

    def changes_of(self, table: TableId, after: Offset) -> Iterator[bytes]:
        """See `Log.changes_of`."""
        for (payload,) in self._connection().execute(
            "SELECT payload FROM entries WHERE kind = 'rows' AND table_schema = ? AND table_name = ? "
            'AND "offset" > ? ORDER BY "offset"',
            (*table, after),
        ):
            yield bytes(payload)

    def copied_rows(self, table: TableId, after: Offset) -> int:
        """Return how many rows of a table copies have read after an offset."""
        ((rows,),) = self._connection().execute(
            "SELECT coalesce(sum(rows), 0) FROM entries WHERE kind = 'copy' AND table_schema = ? "
            'AND table_name = ? AND "offset" > ?',
            (*table, after),
        )
        return int(rows)

    def verify(self) -> Mark:
        """Walk the whole chain as it stands now and return its end.

        Raises LogDamaged with the first bad offset: a hash, a missing or repeated offset, positions
        that go back from one group to the next, or a last group that has no end.
        """
        remedy = "Stop the pipeline, keep the file, and restore the state folder from a backup."
        previous, expected, last, ended = NO_HASH, 1, Position(0, 0, 0), True
        for row in self._connection().execute(f'SELECT {_COLUMNS} FROM entries ORDER BY "offset"'):
            item = _from_row(row)
            if item.offset != expected:
                raise LogDamaged(f"{self._path}: offset {expected} is missing.", remedy)
            if entry_hash(previous, row[:15], item.entry.payload) != item.hash:
                raise LogDamaged(f"{self._path}: the hash of offset {item.offset} does not hold.", remedy)
            if item.entry.kind in STREAMED:
                if ended and item.entry.last < last:
                    raise LogDamaged(f"{self._path}: offset {item.offset} goes back in the source.", remedy)
                last = max(last, item.entry.last)
            previous, expected, ended = item.hash, expected + 1, item.ends_group
        if not ended:
            raise LogDamaged(f"{self._path}: the group at offset {expected - 1} has no end.", remedy)
        return Mark(self.id, expected - 1, previous)

    def close(self) -> None:
        """Close every connection of this object, whichever thread made it."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()

    def _insert(self, db: apsw.Connection, end: Mark, entry: Entry, now: int, is_last: bool) -> Mark:
        table = entry.table or (None, None)
        header = (
            end.offset + 1, entry.kind, *table, *entry.first, *entry.last,
            entry.committed_at, entry.rows, entry.schema_version, now, int(is_last),
        )  # fmt: skip
        digest = entry_hash(end.hash, header, entry.payload)
        size = len(entry.payload)
        db.execute(
            f"INSERT INTO entries ({_HEADER}, hash, bytes, payload) VALUES ({', '.join('?' * 18)})",
            (*header, digest, size, entry.payload if size < _LARGE else apsw.zeroblob(size)),
        )
        if size >= _LARGE:
            with db.blob_open("main", "entries", "payload", end.offset + 1, True) as blob:
                blob.write(entry.payload)
        return Mark(self.id, end.offset + 1, digest)

    def _read_end(self) -> Mark:
        row = (
            self._connection()
            .execute('SELECT "offset", hash FROM entries ORDER BY "offset" DESC LIMIT 1')
            .fetchone()
        )
        return Mark(self.id, int(row[0]), str(row[1])) if row else Mark(self.id, 0, NO_HASH)

    def _connection(self) -> apsw.Connection:
        connection: apsw.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            flags = (
                apsw.SQLITE_OPEN_READONLY
                if self._read_only
                else (apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE)
            )
            try:
                connection = apsw.Connection(str(self._path), flags=flags)
            except apsw.CantOpenError as error:
                raise LogError(
                    f"{self._path} cannot be opened: {error}.", "Check the folder's rights."
                ) from error
            connection.set_busy_timeout(10_000)
            if not self._read_only:
                connection.execute("PRAGMA page_size = 16384; PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA synchronous = FULL; PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
            self._local.connection = connection
            self._connections.append(connection)
        return connection

    def _create(self) -> None:
        db = self._connection()
        version = int(db.pragma("user_version"))
        if version > FORMAT:
            raise LogError(
                f"{self._path} has format {version}, this Headrace knows {FORMAT}.",
                "Use the newer Headrace that wrote it.",
            )
        if version == FORMAT:
            return
        if version:
            raise LogError(
                f"{self._path} has format {version}, of a Headrace before its first release.",
                "Move the state folder and the destination away and run again, which copies everything anew.",
            )
        if self._read_only:
            raise LogError(f"{self._path} holds no log yet.", "Start the pipeline once with `headrace run`.")
        with db:
            db.execute(_CREATE)
            db.execute("INSERT INTO facts VALUES ('log.id', ?)", (uuid.uuid4().hex,))
            db.execute(f"PRAGMA user_version = {FORMAT}")
        self._path.chmod(0o600)
        folder = os.open(self._path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def _with_last(entries: Iterable[Entry]) -> Iterator[tuple[Entry, bool]]:
    iterator = iter(entries)
    current = next(iterator, None)
    while current is not None:
        following = next(iterator, None)
        yield current, following is None
        current = following


def _from_row(row: Sequence[Any]) -> LoggedEntry:
    offset, kind, schema, name, *places, at, rows, version, appended, ends, digest, payload = row
    table = TableId(schema, name) if name is not None else None
    first, last = Position(*places[:3]), Position(*places[3:])
    entry = Entry(kind, table, first, last, at, rows, version, payload)
    return LoggedEntry(offset, entry, appended, bool(ends), digest)
