"""Segments: the files that hold the payloads of rows, one after the other, and nothing else.

Where a payload stands is in the log's database, whose commit comes after the segment's sync; what is
behind the last committed payload is torn, and is written over. So payloads are written once, retention
is the removal of files, and a reader needs no lock.

An append may be of any size, so that a killed one may leave any number of segments. They are told from those
of a newer database by an empty file, `OFFSET.committed`: when it was named, a database was durable through
that offset. It is not synced: where it is missing or old nothing is refused.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from headrace.failpoints import failpoint
from headrace.log.database import FULL, no_room, not_durable, sync_folder

_OPEN_FILES = 2  # of one reader: the room of one that was removed is free only when it is closed


class Place(NamedTuple):
    """Where a payload stands: a segment, by the offset of its first entry, and the first byte in it."""

    segment: int
    start: int


def segment_path(folder: Path, segment: int) -> Path:
    """Return the file of a segment; the names sort as the offsets do."""
    return folder / f"{segment:020d}.segment"


def segments_in(folder: Path) -> list[int]:
    """Return the segments of a folder, oldest first."""
    return sorted(int(path.stem) for path in folder.glob("*.segment"))


def committed_behind(folder: Path, offset: int) -> Path | None:
    """Return a segment behind an offset that has been committed for certain, or None."""
    through = max((int(path.stem) for path in folder.glob("*.committed")), default=0)
    found = next((segment for segment in segments_in(folder) if offset < segment <= through), None)
    return None if found is None else segment_path(folder, found)


class SegmentWriter:
    """Appends payloads; one writer. Nothing counts before `sync` has returned and its place is committed."""

    def __init__(self, folder: Path, limit: int, end: Place | None) -> None:
        """`limit` is how large a segment grows (bytes), `end` the place behind the last committed payload.

        What stands behind it stays until the first `write`: whoever only opens a log destroys nothing.
        """
        self._folder = folder
        self._limit = limit
        self._end = self._committed = end
        self._file: int | None = None
        self._full = False
        self._unsynced: list[int] = []
        self._made = False
        self._is_cut = False
        folder.mkdir(mode=0o700, exist_ok=True)

    def write(self, offset: int, payload: bytes) -> Place:
        """Write the payload of the entry that will have `offset`, and return its place.

        Raises LogFull where there is no room.
        """
        if not self._is_cut:
            self._cut()
        if self._end is None or self._file is None or self._full or self._end.start >= self._limit:
            self._roll(offset)
        assert self._file is not None
        assert self._end is not None
        place, rest = self._end, memoryview(payload)
        if not self._unsynced or self._unsynced[-1] != self._file:
            self._unsynced.append(self._file)
        try:
            while rest:
                rest = rest[os.pwrite(self._file, rest, place.start + len(payload) - len(rest)) :]
        except OSError as error:
            if error.errno in FULL:
                raise no_room(self._folder) from error
            raise
        self._end = Place(place.segment, place.start + len(payload))
        return place

    def sync(self) -> None:
        """Make all that was written durable. Raises LogNotDurable."""
        if not self._unsynced:
            return
        try:
            failpoint("log.segment.sync")
            for file in self._unsynced:
                os.fdatasync(file)
            if self._made:
                sync_folder(self._folder)
        except OSError as error:
            raise not_durable(self._folder, error) from error

    def commit(self, through: int) -> bool:
        """Keep what was written: its places are durable, and the log is, through an offset.

        Says whether a segment has begun with it.
        """
        self._close_all_but_current()
        self._committed = self._end
        made, self._made = self._made, False
        if made:
            self._note_committed(through)
        return made

    def undo(self) -> None:
        """Forget what was written since the last `commit`."""
        if not self._unsynced and not self._made:
            return
        self.close()
        self._made = self._is_cut = False
        self._end = self._committed
        self._cut()

    def roll(self) -> None:
        """Begin a new segment with the next payload."""
        self._full = True

    def remove_before(self, segment: int) -> int:
        """Remove the segments before one, but never the one that is written to; returns their bytes."""
        current = self._end.segment if self._end else segment
        freed = 0
        for old in segments_in(self._folder):
            if old < min(segment, current):
                path = segment_path(self._folder, old)
                freed += path.stat().st_size
                path.unlink()
        return freed

    def close(self) -> None:
        """Close the files."""
        self._close_all_but_current()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _roll(self, offset: int) -> None:
        path = segment_path(self._folder, offset)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno in FULL:
                raise no_room(self._folder) from error
            raise
        if self._file is not None and self._file not in self._unsynced:
            os.close(self._file)
        self._made = True
        self._file, self._end, self._full = file, Place(offset, 0), False

    def _cut(self) -> None:
        """Remove what stands behind the end, and open the segment that it is in."""
        for segment in segments_in(self._folder):
            if self._end is None or segment > self._end.segment:
                segment_path(self._folder, segment).unlink()
        if self._end is not None:
            path = segment_path(self._folder, self._end.segment)
            os.truncate(path, self._end.start)
            self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._is_cut = True

    def _note_committed(self, through: int) -> None:
        path = self._folder / f"{through:020d}.committed"
        with suppress(OSError):  # it only tells more
            former = next(self._folder.glob("*.committed"), None)
            former.rename(path) if former else path.touch(0o600)

    def _close_all_but_current(self) -> None:
        for file in self._unsynced:
            if file != self._file:
                os.close(file)
        self._unsynced.clear()


class SegmentReader:
    """Reads payloads; safe to use from any thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, place: Place, size: int) -> bytes:
        """Return the payload at a place; shorter than `size` where the file ends before.

        Raises FileNotFoundError when the segment was removed.
        """
        if size == 0:
            return b""
        with self._lock:
            return self._read(place, size)

    def close(self, before: int | None = None) -> None:
        """Close the files, or those of the segments before one."""
        with self._lock:
            for segment in [s for s in self._files if before is None or s < before]:
                os.close(self._files.pop(segment))

    def _read(self, place: Place, size: int) -> bytes:
        file = self._files.get(place.segment)
        if file is None:
            file = os.open(segment_path(self._folder, place.segment), os.O_RDONLY | os.O_CLOEXEC)
            self._files[place.segment] = file
            if len(self._files) > _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(place.segment)
        data = os.pread(file, size, place.start)
        while len(data) < size and (more := os.pread(file, size - len(data), place.start + len(data))):
            data += more
        return data
