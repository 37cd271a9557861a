"""A SQLite file that is durable and whole: synced at every commit, with a checksum on every page.

Durable means WAL with `synchronous=FULL`: a power cut after a commit returned loses nothing (with
NORMAL, 21 of 30 simulated cuts did). The checksums are those of SQLite's own cksumvfs, which comes with
apsw: every flipped bit of the file is found when its page is read, whether it holds anything or not.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import apsw

from headrace.errors import LogBusy, LogDamaged, LogError, LogFull, LogNotDurable

_CHECKPOINT_PAGES = 4096  # 16 MB of WAL before it is copied into the file
_CHECKSUM_BYTES = 8
_BUSY_MS = 10_000

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says where there is no room."""

RESTORE = "Stop the pipeline, keep the files, and restore the state folder from a backup."


class Database:
    """One SQLite file for any number of threads, each with a connection of its own."""

    def __init__(self, path: Path, *, script: str, version: int, read_only: bool = False) -> None:
        """Open the file at `path`; unless `read_only`, create it with the tables of `script`.

        Raises LogError when it is missing, unreadable or not of format `version`, LogDamaged when it is
        not what was written, LogFull without room for what SQLite has beside it.
        """
        self.path = path
        self._read_only = read_only
        self._local = threading.local()
        self._connections: list[apsw.Connection] = []
        try:
            is_there = path.exists()
        except PermissionError as error:
            raise LogError(
                f"{path} cannot be opened: {error.strerror}.", "Check the folder's rights."
            ) from error
        if read_only and not is_there:
            raise LogError(f"There is no log at {path}.", "Start the pipeline once with `headrace run`.")
        if not read_only and path.parent.exists():
            path.touch(0o600)  # before SQLite makes it: the files beside it have its mode
        try:
            with self.told():
                self._prepare(script, version)
        except LogFull as error:
            raise LogFull(str(error), "Make room, and start again.") from error

    def rows(self, sql: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Run one statement and return all its rows: no read transaction is left open.

        Raises LogError with what is wrong.
        """
        try:
            with self.told():
                found: list[tuple[Any, ...]] = self.connection().execute(sql, values).fetchall()
                return found
        except UnicodeDecodeError as error:
            raise _damaged(self.path, error) from error

    def row(self, sql: str, values: Sequence[object] = ()) -> tuple[Any, ...] | None:
        """Return the first row of a statement, or None."""
        found = self.rows(sql, values)
        return found[0] if found else None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Write, with `rows`, in one transaction: committed and synced at the end of the block, undone if it
        raises. What the block raises of its own comes out as it is.

        Raises LogFull, LogNotDurable, or another LogError.
        """
        self.rows("BEGIN IMMEDIATE")
        try:
            yield
            self.rows("COMMIT")
        except BaseException:
            if self.connection().in_transaction:
                self.rows("ROLLBACK")
            raise

    def connection(self) -> apsw.Connection:
        """Return this thread's connection."""
        connection: apsw.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._connect()
            self._local.connection = connection
            self._connections.append(connection)
        return connection

    def close(self) -> None:
        """Close every connection of this object, whichever thread made it; one in use is its thread's."""
        for connection in self._connections:
            with suppress(apsw.ThreadingViolationError):
                connection.close()
        self._connections.clear()
        self._local = threading.local()

    @contextmanager
    def told(self) -> Iterator[None]:
        """Raise SQLite's errors as ours, by what they mean for the log."""
        try:
            yield
        except (apsw.NotADBError, apsw.CorruptError) as error:
            raise _damaged(self.path, error) from error
        except apsw.FullError as error:
            raise no_room(self.path) from error
        except (apsw.BusyError, apsw.LockedError) as error:
            raise LogBusy(
                f"{self.path} is held by another process.", "Find and end it: it goes on by itself."
            ) from error
        except apsw.ReadOnlyError as error:
            raise LogError(
                f"{self.path} can be read by this user only while its pipeline runs, which has files beside "
                "it.",
                "Start the pipeline there, or run as the user that it runs as.",
            ) from error
        except (apsw.CantOpenError, apsw.IOError) as error:
            connection = getattr(self._local, "connection", None)
            raise _io_error(self.path, error, connection.system_errno if connection else 0) from error

    def _connect(self) -> apsw.Connection:
        flags = apsw.SQLITE_OPEN_READONLY
        if not self._read_only:
            flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE
        db = apsw.Connection(str(self.path), flags=flags, vfs=_with_checksums())
        db.set_busy_timeout(_BUSY_MS)
        db.execute(f"PRAGMA synchronous = FULL; PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        return db

    def _prepare(self, script: str, version: int) -> None:
        db = self.connection()
        found = int(db.pragma("user_version"))
        if found > version:
            raise LogError(
                f"{self.path} has format {found}, this Headrace knows {version}.",
                "Use the newer Headrace that wrote it.",
            )
        if found == version:
            return
        if found:
            raise LogError(
                f"{self.path} has format {found}, of a Headrace before its first release.",
                "Move the state folder and the destination away and run again, which copies everything anew.",
            )
        if self._read_only:
            raise LogError(f"{self.path} holds no log yet.", "Start the pipeline once with `headrace run`.")
        db.reserve_bytes(None, _CHECKSUM_BYTES)
        db.execute("PRAGMA auto_vacuum = INCREMENTAL; PRAGMA journal_mode = WAL")
        with db:
            db.execute(script)
            db.execute(f"PRAGMA user_version = {version}")
        sync_folder(self.path.parent)


@cache
def _with_checksums() -> str:
    """Make SQLite know the file layer that checks every page, and return its name."""
    import apsw.sqlite_extra

    # Not for its connection: loading it makes it known to the whole process.
    loader = apsw.Connection(":memory:")
    try:
        apsw.sqlite_extra.load(loader, "cksumvfs")
    except Exception as error:
        raise LogError(
            f"This apsw has no cksumvfs: {error}", "Install apsw from its wheel: pip install apsw."
        ) from error
    finally:
        loader.close()
    return "cksmvfs"


def _damaged(path: Path, error: Exception) -> LogDamaged:
    return LogDamaged(f"{path} is not what was written: {error}.", RESTORE)


def _io_error(path: Path, error: apsw.CantOpenError | apsw.IOError, cause: int) -> LogError:
    """Judge an error by SQLite's code, and by the system's number that was its `cause`."""
    code = getattr(error, "extendedresult", 0)  # which its type stub does not know
    if code == apsw.SQLITE_IOERR_DATA:
        return LogDamaged(f"{path}: the checksum of a page does not hold.", RESTORE)
    if code in (apsw.SQLITE_IOERR_FSYNC, apsw.SQLITE_IOERR_DIR_FSYNC):
        return not_durable(path, error)
    if code == apsw.SQLITE_IOERR_SHMSIZE or cause in FULL:
        return no_room(path)
    if isinstance(error, apsw.CantOpenError):
        return LogError(f"{path} cannot be opened: {error}.", "Check the folder's rights.")
    return LogError(f"{path} cannot be read or written: {error}.", "Mend its disk, then start again.")


def not_durable(path: Path, error: Exception) -> LogNotDurable:
    """Say that a sync of a file failed."""
    return LogNotDurable(
        f"{path} could not be synced to its disk: {error}. Nothing of it is confirmed to the source.",
        "Mend the disk, then start again: what was not synced is written anew.",
    )


def no_room(path: Path) -> LogFull:
    """Say that the disk of a file is full."""
    return LogFull(
        f"There is no room for more on the disk of {path}; the source keeps its changes meanwhile.",
        "Make room; it goes on by itself.",
    )


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
