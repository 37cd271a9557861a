"""A copy of a log while it is written to and trimmed.

In this order: how far consumers have read, so that none is ahead of the copy; the database, as of one
moment, through SQLite's own backup; the segments it refers to, each up to the last byte it refers to,
synced; and the proof of the copy from end to end. Payloads are durable before the database refers to them
and never change, so that what was copied fits whatever was appended meanwhile. Where retention has removed
a segment meanwhile it begins again, and keeps what it has.
"""

from __future__ import annotations

import os
import shutil
from contextlib import closing, suppress
from pathlib import Path

import apsw

from headrace.change import Mark
from headrace.errors import LogTrimmed, UserError
from headrace.log.archive import Archived, settle, writing_to
from headrace.log.database import sync_folder
from headrace.log.proof import verify
from headrace.log.segments import segment_path, segments_in
from headrace.log.sqlite import SQLiteLog

_ATTEMPTS = 10
_PIECE = 8 << 20  # bytes of a segment that are copied at once
_CHECKSUMS = "cksmvfs"
"""SQLite's file layer that checks every page; known to it once a log is open."""


def backup(log: SQLiteLog, folder: Path) -> Archived:
    """Copy a log into an empty folder, with its consumers, and verify the copy.

    Raises UserError where the folder holds anything, LogDamaged where the copy does not hold, LogFull. Then
    nothing is left behind.
    """
    was_there = folder.exists()
    if was_there and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder.", "Name one that is empty or not there yet.")
    with writing_to(folder):
        try:
            return _copied(log, folder)
        except BaseException:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if not was_there:
                folder.rmdir()
            raise


def _copied(log: SQLiteLog, folder: Path) -> Archived:
    path = folder / log.path.name
    segments = path.with_suffix(".segments")
    segments.mkdir(mode=0o700)
    cursors = log.path.with_suffix(".cursors")
    for _ in range(_ATTEMPTS):
        if cursors.exists():
            _copy_database(cursors, folder / cursors.name)
        _copy_database(log.path, path)
        try:
            _copy_segments(log, path)
            break
        except FileNotFoundError:
            continue
    else:
        raise LogTrimmed(
            f"Retention removes segments of the log of {log.source} faster than they are copied.",
            "Back up to a faster disk, or while nothing is trimmed.",
        )
    with closing(SQLiteLog(path, read_only=True)) as copy:
        proven = verify(copy)
        head = Mark(*proven.end)
    settle(path)
    for changed in (segments, folder, folder.absolute().parent):
        sync_folder(changed)
    files = sum(1 for _ in folder.rglob("*")) - 1
    return Archived(files, proven.entries, proven.rows, proven.bytes, head)


def _copy_database(path: Path, to: Path) -> None:
    """Copy a SQLite database as of one moment; a copy that is there already is replaced."""
    for left in (to, *to.parent.glob(f"{to.name}-*")):
        left.unlink(missing_ok=True)
    os.close(os.open(to, os.O_CREAT | os.O_WRONLY, 0o600))
    flags = apsw.SQLITE_OPEN_READWRITE
    with (
        closing(apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY, vfs=_CHECKSUMS)) as origin,
        closing(apsw.Connection(str(to), flags=flags, vfs=_CHECKSUMS)) as copy,
    ):
        origin.set_busy_timeout(10_000)
        copy.execute("PRAGMA synchronous = FULL")
        with copy.backup("main", origin, "main") as work:
            work.step(-1)  # in one transaction, which keeps no writer from writing


def _copy_segments(log: SQLiteLog, copy: Path) -> None:
    """Bring the segments that a copied database refers to beside it. Raises FileNotFoundError where one
    has been removed."""
    with closing(SQLiteLog(copy, read_only=True)) as copied:
        wanted = copied.raw_rows(
            "SELECT segment, max(start + bytes) FROM entries WHERE segment IS NOT NULL GROUP BY 1 ORDER BY 1"
        )
        folder = copied.segments
    for segment in set(segments_in(folder)) - {int(segment) for segment, _ in wanted}:
        segment_path(folder, segment).unlink()
    for segment, size in wanted:  # the oldest first, which is the first to go
        to = segment_path(folder, segment)
        if not to.exists() or to.stat().st_size != size:
            _copy_bytes(segment_path(log.segments, segment), to, size)


def _copy_bytes(path: Path, to: Path, size: int) -> None:
    """Copy the first `size` bytes of a file, or all it has if that is less, durably."""
    with path.open("rb") as file:
        made = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            at = 0
            while at < size and (sent := os.sendfile(made, file.fileno(), at, min(_PIECE, size - at))):
                at += sent
            os.fsync(made)
        except BaseException:
            with suppress(OSError):
                to.unlink()
            raise
        finally:
            os.close(made)
