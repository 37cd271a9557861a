"""Room that a log keeps for its own retention: without any, SQLite can delete nothing."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

RESERVE_BYTES = 32 << 20
"""More than the WAL takes before it is used again, with the largest step of a trim."""


class Reserve:
    """A file that holds nothing but room; it is given up when a trim finds none, and made again after it."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size = size

    def keep(self) -> None:
        """Have the file there, unless there is no room for it."""
        with suppress(OSError):
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(file, 0, self._size)
            except OSError:
                self._path.unlink()
            finally:
                os.close(file)

    def give_up(self) -> bool:
        """Remove the file; say whether there was one."""
        try:
            self._path.unlink()
        except FileNotFoundError:
            return False
        return True
