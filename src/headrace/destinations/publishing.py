"""A copy of the destination's file for readers, renamed into place at an interval.

A process that has a DuckDB file open, even to read, keeps the pipeline from it. So readers open the copy:
any number of them, for as long as they like. A new copy takes the name of the one before; who has that open
keeps what it has until it opens the name again.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import duckdb

from headrace.destinations.duckdb import DuckDBDestination
from headrace.errors import DestinationBusy, DestinationError, DestinationUnavailable
from headrace.failpoints import failpoint

logger = logging.getLogger("headrace.publish")

_PATIENCE, _PUSH = 2.0, 0.5
"""Seconds that a copy waits for a moment in which nobody has the file open, and for which it then keeps
others from opening it: apply waits for at most a fifth of the time that somebody else takes."""
_LATE = 60.0
_SHARE = 10
"""A copy is made at most in this part of the time: apply waits while one is."""

_CLONE = 0x40049409
"""FICLONE: the file's blocks are shared, not copied, where the file system can (XFS, Btrfs, …)."""
_PIECE = 16 << 20
_CANNOT = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What the kernel says where it cannot copy from one file system to the other by itself."""
_LEAST_FREE = 1 << 30
"""Bytes that a copy leaves free on its disk, or a twentieth of it if that is less."""


class Published(NamedTuple):
    """A copy: when it was made (seconds since 1970), and each source's progress in it as a row of
    headrace.progress (offset, commit, committed_at)."""

    made_at: float
    sources: Mapping[str, tuple[int, int, int]]


def read_published(path: Path) -> Published | None:
    """Return what a copy is of, None if there is none. Raises DestinationError where it cannot be read."""
    query = 'SELECT source, "offset", commit, committed_at FROM headrace.progress'
    try:
        made_at = path.stat().st_mtime
        with duckdb.connect(str(path), read_only=True) as db:
            rows = db.execute(query).fetchall()
    except FileNotFoundError:
        return None
    except (duckdb.Error, OSError) as error:
        raise DestinationError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    return Published(made_at, {str(source): (offset, commit, at) for source, offset, commit, at in rows})


class Publisher:
    """Keeps one copy of a destination's file. One thread calls `step`."""

    def __init__(self, destination: DuckDBDestination, path: Path, every: float) -> None:
        """Copy to `path` at most every `every` seconds; what an interrupted copy has left there goes."""
        self._destination = destination
        self._path = path
        self._new = path.with_name(f".{path.name}.new")
        self._every = every
        self._changes: int | None = None
        self._due = 0.0
        self._tried_since: float | None = None
        self._forget()

    def is_current(self) -> bool:
        """Whether nothing has changed in the destination since the copy was made."""
        return self._changes == self._destination.changes

    def step(self, *, now: bool = False) -> bool:
        """Make a copy, if something has changed and it is time, or at once if `now`; says whether it did.

        Raises DestinationUnavailable where it cannot be made: the one before stays.
        """
        if self.is_current() or not self._destination.exists():
            return False
        if not now and time.monotonic() < self._due:
            return False
        try:
            return self._publish()
        except DestinationUnavailable:
            self._forget()
            raise
        except (OSError, duckdb.Error, DestinationError) as error:
            self._forget()
            words = (isinstance(error, OSError) and error.strerror) or str(error).splitlines()[0]
            raise DestinationUnavailable(
                f"{self._path} is not published: {words.rstrip('.')}.",
                "Make room or mend its folder; the copy before stays, and Headrace keeps trying.",
            ) from error

    def _forget(self) -> None:
        with suppress(OSError):
            self._new.unlink()

    def _publish(self) -> bool:
        """In this order, so that the name always stands for a whole copy of one commit:

        1. what its write-ahead log holds is written into it, once more if need be while nobody has the file
           open, and it is copied under a lock that keeps other processes from changing it;
        2. the copy is synced, and opened once to see that it is whole;
        3. it takes the name, and the folder is synced.
        """
        self._destination.checkpoint()  # so that it does not take time while others wait
        with self._destination.gate.alone(_PATIENCE, _PUSH) as is_alone:
            begun = time.monotonic()
            if not is_alone:
                return self._wait(begun)
            self._tried_since = None
            changes = self._destination.changes
            self._copy()
        held = time.monotonic() - begun
        failpoint("publish.copied")
        _sync(self._new)
        read_published(self._new)
        self._refuse_writers()
        failpoint("publish.synced")
        self._new.replace(self._path)
        failpoint("publish.renamed")
        _sync(self._path.parent)
        self._changes = changes
        self._due = begun + max(self._every, _SHARE * held)
        return True

    def _wait(self, now: float) -> bool:
        self._tried_since = self._tried_since or now
        if now - self._tried_since > _LATE:
            raise DestinationBusy(
                f"{self._path} is not published: for {now - self._tried_since:.0f} s there was no moment in "
                f"which {self._destination.name} was not in use.",
                "It waits for long queries and for large transactions to end.",
            )
        return False

    def _copy(self) -> None:
        source = self._destination.path
        log = source.with_name(f"{source.name}.wal")
        self._destination.checkpoint()
        with source.open("rb") as original:
            try:
                # The engine locks so, too. It would lose its own lock on the file as ours is closed, were it
                # open in this process.
                fcntl.lockf(original, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DestinationBusy(f"{source} is held by another process.", "Close it there.") from error
            if log.exists():
                raise DestinationBusy(f"{source} was changed by another process.", "Close it there.")
            with self._new.open("wb") as copy:
                _clone(original, copy, self._new.parent)
                # Who wrote to a copy would lose it, and leave a write-ahead log for the next one to find.
                os.fchmod(copy.fileno(), os.fstat(original.fileno()).st_mode & 0o444)

    def _refuse_writers(self) -> None:
        """Refuse to replace a copy that another process writes to; one that was killed at it may have left
        a log, which must not come to lie beside the new copy."""
        with suppress(FileNotFoundError), self._path.open("rb") as former:
            try:
                fcntl.lockf(former, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DestinationBusy(
                    f"{self._path} is not published: another process has it open to write.",
                    "Open it with read_only=True: what is written to a copy is lost.",
                ) from error
            self._path.with_name(f"{self._path.name}.wal").unlink(missing_ok=True)


def _clone(source: BinaryIO, target: BinaryIO, folder: Path) -> None:
    """Copy a file to a new one in a folder, its blocks shared where the file system can. Raises OSError."""
    with suppress(OSError):
        fcntl.ioctl(target, _CLONE, source.fileno())
        return
    size, disk = os.fstat(source.fileno()).st_size, shutil.disk_usage(folder)
    if disk.free - size < min(_LEAST_FREE, disk.total // 20):
        raise OSError(errno.ENOSPC, f"a copy takes {size} bytes, and {disk.free} are free")
    copied, is_plain = 0, False
    while copied < size:
        failpoint("publish.piece")
        try:  # within the kernel, at a fifth of the processor's time
            copied += 0 if is_plain else os.copy_file_range(source.fileno(), target.fileno(), _PIECE)
        except OSError as error:
            if copied or error.errno not in _CANNOT:
                raise
            is_plain = True
        if is_plain:
            copied += target.write(source.read(_PIECE))


def _sync(path: Path) -> None:
    """Make a file, or what a folder lists, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
