"""Named consumers: how far each has read, in a file beside the log, so that none takes its writer's lock.

A cursor names the entry through which its consumer is done, and that entry's hash: a log that is another
one, or was computed anew, is noticed. What a cursor has not read yet is kept by retention until it holds
more than `hold_max`; then the cursor is lost, and stays so until it is reset.

The file also says through where retention is about to delete: it is written before the cursors are looked
at, so that each is either seen by retention, or begins behind what goes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import apsw

from headrace.change import Mark, Offset
from headrace.errors import ConsumersUnknown, CursorLost, LogBusy, LogError, LogFull, LogTrimmed, UserError
from headrace.log.database import Database

_FORMAT = 2
_SCRIPT = """
CREATE TABLE IF NOT EXISTS cursors (
  name TEXT PRIMARY KEY, log_id TEXT NOT NULL, "offset" INTEGER NOT NULL, hash TEXT NOT NULL,
  created_at INTEGER NOT NULL, updated_at INTEGER NOT NULL, lost INTEGER NOT NULL, reason TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS planned (
  id INTEGER PRIMARY KEY CHECK (id = 1), log_id TEXT NOT NULL, "offset" INTEGER NOT NULL
)
"""
_COLUMNS = 'name, log_id, "offset", hash, created_at, updated_at, lost, reason'
_MAX_NAME = 200
_CREATE_TRIES = 50  # two processes may make the file at once


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a consumer has read: through `offset`, whose hash is `hash`, of the log `log_id`.

    Times are microseconds since 1970 in UTC. One that is `lost` has a `reason`.
    """

    name: str
    log_id: str
    offset: Offset
    hash: str
    created_at: int
    updated_at: int
    lost: bool
    reason: str

    @property
    def mark(self) -> Mark:
        """The mark through which the consumer has read."""
        return Mark(self.log_id, self.offset, self.hash)


class Marked(Protocol):
    """A log as a cursor needs it."""

    id: str
    source: str

    def begin(self) -> Mark:
        """See `Log.begin`."""
        ...

    def end(self) -> Mark:
        """See `Log.end`."""
        ...

    def mark(self, offset: Offset) -> Mark | None:
        """See `LogIndex.mark`."""
        ...


class Cursors:
    """The consumers of one log, in a file of their own, for any number of threads and processes.

    The file is made with the first cursor, or the first trim.
    """

    def __init__(self, path: Path) -> None:
        """`path` is the file beside the log, `<source>.cursors`; it need not exist."""
        self._path = path
        self._opened: Database | None = None
        self._file: tuple[int, int] | None = None  # device and inode of what was opened last
        self._opening = threading.Lock()

    def get(self, name: str) -> Cursor | None:
        """Return a consumer's cursor, or None if there is no such one. Raises ConsumersUnknown."""
        found = self._rows("WHERE name = ?", (name,))
        return found[0] if found else None

    def all(self) -> list[Cursor]:
        """Return every cursor, by name. Raises ConsumersUnknown when the file cannot be read."""
        return self._rows("ORDER BY name")

    def commit(self, name: str, mark: Mark, *, joins: bool = False) -> Cursor:
        """Record durably that a consumer is done through `mark`; makes its cursor if there is none.

        Raises CursorLost for one that is lost, UserError for a mark behind the cursor or of another log; for
        one that `joins`, LogTrimmed where what follows is about to be deleted.
        """
        _check_name(name)
        now = time.time_ns() // 1000
        db = self._made()
        with db.transaction():
            if joins:
                _check_stays(db, mark)
            row = db.row(f"SELECT {_COLUMNS} FROM cursors WHERE name = ?", (name,))
            known = _cursor(row) if row else None
            if known is not None:
                _check_next(known, mark)
            since = known.created_at if known else now
            values = (name, mark.log_id, mark.offset, mark.hash, since, now, 0, "")
            db.rows("INSERT OR REPLACE INTO cursors VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
        return Cursor(name, *mark, since, now, lost=False, reason="")

    def reset(self, name: str, mark: Mark) -> Cursor:
        """Put a consumer's cursor at `mark`, wherever it was and whether or not it is lost.

        Raises UserError when there is no such one, LogTrimmed where what follows is about to be deleted.
        """
        now = time.time_ns() // 1000
        known = self._known(name)
        sql = (
            "UPDATE cursors SET log_id = ?, \"offset\" = ?, hash = ?, updated_at = ?, lost = 0, reason = '' "
            "WHERE name = ?"
        )
        db = self._made()
        with db.transaction():
            _check_stays(db, mark)
            db.rows(sql, (*mark, now, name))
        return Cursor(name, *mark, known.created_at, now, lost=False, reason="")

    def forget(self, name: str) -> None:
        """Remove a consumer: it holds nothing of the log any more. Raises UserError for an unknown one."""
        self._known(name)
        self._made().rows("DELETE FROM cursors WHERE name = ?", (name,))

    def mark_lost(self, name: str, offset: Offset, reason: str) -> bool:
        """Record that the log will be deleted beyond a consumer that has read through `offset`.

        It does not hold the log any more. One that has moved meanwhile is not lost: returns whether it is.
        """
        if self.get(name) is None:
            return False
        sql = 'UPDATE cursors SET lost = 1, reason = ? WHERE name = ? AND "offset" = ? RETURNING name'
        return bool(self._made().rows(sql, (reason, name, offset)))

    def plan(self, log_id: str, through: Offset) -> None:
        """Let no consumer begin before an offset from now on: what is there is about to be deleted."""
        self._made().rows("INSERT OR REPLACE INTO planned VALUES (1, ?, ?)", (log_id, through))

    def planned(self, log_id: str) -> Offset:
        """Return through where a log is about to be deleted, or has been; 0 where that is not known."""
        if self._opened is None and not self._path.exists():
            return 0
        return _planned(self._made(), log_id)

    def close(self) -> None:
        """Close the file."""
        with self._opening:
            if self._opened is not None:
                self._opened.close()
                self._opened = None

    def _known(self, name: str) -> Cursor:
        known = self.get(name)
        if known is None:
            names = ", ".join(cursor.name for cursor in self.all()) or "none"
            raise UserError(f"There is no consumer {name}.", f"There are: {names}.")
        return known

    def _rows(self, where: str, values: Sequence[object] = ()) -> list[Cursor]:
        try:
            if self._file is None and not self._path.exists():
                return []
            rows = self._made().rows(f"SELECT {_COLUMNS} FROM cursors {where}", values)
        except (LogError, OSError, apsw.Error) as error:
            with self._opening:
                self._opened = None  # what is restored is not seen through files that are open
            why = str(error).rstrip(".") if isinstance(error, LogError) else f"{self._path}: {error}"
            remedy = (
                "Make room"
                if isinstance(error, LogFull)
                else "Let the user that Headrace runs as read and write that file and those beside it, or "
                "restore it from a backup"
            )
            raise ConsumersUnknown(
                f"It is not known who reads the log: {why}. Nothing of the log is deleted meanwhile.",
                f"{remedy}; retention then goes on by itself.",
            ) from error
        return [_cursor(row) for row in rows]

    def _made(self) -> Database:
        """Return the file that is there now: the one that was open may have been moved away.

        Raises LogError while there is none any more: without cursors, retention would delete what they hold.
        """
        with self._opening:
            now = _file_at(self._path)
            if now is None and self._file is not None:
                raise LogError(
                    f"{self._path} is missing, and was there before.",
                    "Put it back; where no consumer is wanted any more, start the pipeline again.",
                )
            if self._opened is None or now != self._file:
                self._opened = _opened(self._path)  # the former one closes when no thread uses it any more
                self._file = now or _file_at(self._path)
            return self._opened


def check(cursor: Cursor, log: Marked) -> None:
    """See that a log holds what a cursor has read, and what it is to read next.

    Raises CursorLost when that was deleted, LogError when it is another log than the cursor's.
    """
    mark = log.mark(cursor.offset)  # before the beginning, which may pass it meanwhile
    if cursor.lost or (cursor.log_id == log.id and cursor.offset < log.begin().offset):
        raise lost(cursor, log)
    where = f"Consumer {cursor.name} has read the log {cursor.log_id} through offset {cursor.offset}"
    remedy = (
        "See that it is the right project; to read this log from its beginning: "
        f"headrace log consumers --reset {cursor.name} --to start"
    )
    if cursor.log_id != log.id:
        raise LogError(f"{where}; this log of {log.source} is another, {log.id}.", remedy)
    if cursor.offset > (end := log.end().offset):
        raise LogError(f"{where}; it now ends at {end}: it was restored or cut off.", remedy)
    if mark is None or mark.hash != cursor.hash:
        raise LogError(f"{where}; that entry has another hash now: the log is another.", remedy)


def lost(cursor: Cursor, log: Marked) -> CursorLost:
    """Say what a consumer has lost, and what to do."""
    begin = log.begin().offset
    why = f" ({cursor.reason})" if cursor.reason else ""
    gone = (
        f"offsets {cursor.offset + 1} to {begin} have been deleted"
        if begin > cursor.offset
        else "what follows may be deleted at any time"
    )
    return CursorLost(
        f"Consumer {cursor.name} of {log.source} is lost: it has read through offset {cursor.offset}, and "
        f"{gone}{why}.",
        "Import an export of those, or read them from staging, and go on behind them: "
        f"headrace log consumers --reset {cursor.name} --to {max(begin, cursor.offset)}",
    )


def _planned(db: Database, log_id: str) -> Offset:
    row = db.row('SELECT "offset" FROM planned WHERE log_id = ?', (log_id,))
    return int(row[0]) if row else 0


def _check_stays(db: Database, mark: Mark) -> None:
    planned = _planned(db, mark.log_id)
    if mark.offset < planned:
        raise LogTrimmed(
            f"What follows offset {mark.offset} is being deleted by retention.",
            f"Take {planned}, or a later one.",
        )


def _check_next(known: Cursor, mark: Mark) -> None:
    if known.lost:
        raise CursorLost(
            f"Consumer {known.name} is lost since offset {known.offset}: {known.reason}.",
            f"Make up for what it lacks, then: headrace log consumers --reset {known.name} --to OFFSET",
        )
    if known.log_id != mark.log_id or (known.offset == mark.offset and known.hash != mark.hash):
        raise UserError(
            f"Consumer {known.name} reads another log, {known.log_id}.",
            f"Take another name, or: headrace log consumers --reset {known.name} --to start",
        )
    if mark.offset < known.offset:
        raise UserError(
            f"Consumer {known.name} has committed offset {known.offset} already; {mark.offset} is behind it.",
            f"To read again: headrace log consumers --reset {known.name} --to {mark.offset}",
        )


def _check_name(name: str) -> None:
    if not name or len(name) > _MAX_NAME or not name.isprintable():
        raise UserError(
            "This is no name of a consumer.", f"Take 1 to {_MAX_NAME} printable characters, such as reports."
        )


def _cursor(row: Sequence[Any]) -> Cursor:
    name, log_id, offset, digest, created_at, updated_at, is_lost, reason = row
    return Cursor(name, log_id, offset, digest, created_at, updated_at, bool(is_lost), reason)


def _file_at(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _opened(path: Path) -> Database:
    for left in reversed(range(_CREATE_TRIES)):
        try:
            return Database(path, script=_SCRIPT, version=_FORMAT)
        except LogBusy:
            if not left:
                raise
            time.sleep(0.02)
    raise AssertionError
