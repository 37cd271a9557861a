"""Room that a log keeps for its own retention: without any, SQLite can open and delete nothing."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

RESERVE_BYTES = 32 << 20
"""More than the WAL takes before it is used again, with the largest step of a trim."""

_PARTS = 8


class Reserve:
    """A file that holds nothing but room; it is given up where there is none, and made again after that."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size = size

    def keep(self) -> None:
        """Have the file there, as large as there is room for, unless that is less than half of it.

        Smaller it is where something else has needed room of it, such as what SQLite has beside a file.
        """
        with suppress(OSError):
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                self._allocate(file)
            finally:
                os.close(file)

    def _allocate(self, file: int) -> None:
        had = os.fstat(file).st_size
        for size in (self._size * part // _PARTS for part in range(_PARTS, _PARTS // 2 - 1, -1)):
            if size <= had:
                return
            try:
                os.posix_fallocate(file, 0, size)
            except OSError:
                os.ftruncate(file, had)  # it may have got a part
            else:
                return
        if not had:
            self._path.unlink()

    def give_up(self) -> bool:
        """Remove the file; say whether there was one."""
        try:
            self._path.unlink()
        except FileNotFoundError:
            return False
        return True
