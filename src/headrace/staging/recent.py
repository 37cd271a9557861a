"""What was just staged, kept in memory: prepare reads it within moments."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

import pyarrow as pa

from headrace.change import Offset

_CACHE_BYTES = 8 << 20


class Recent:
    """The content of files that were just written, up to a bound of bytes; the oldest goes first."""

    def __init__(self) -> None:
        self._tables: OrderedDict[Path, tuple[Offset, pa.Table]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def add(self, path: Path, last: Offset, table: pa.Table) -> None:
        """Keep the content of a file whose last change has the offset `last`."""
        with self._lock:
            self._tables[path] = (last, table)
            self._bytes += table.nbytes
            while self._bytes > _CACHE_BYTES:
                _, (_, oldest) = self._tables.popitem(last=False)
                self._bytes -= oldest.nbytes

    def get(self, path: Path) -> pa.Table | None:
        """Return a file's content, None if it is not kept."""
        known = self._tables.get(path)
        return known[1] if known else None

    def forget(self, through: Offset) -> None:
        """Let go of what holds changes up to an offset."""
        with self._lock:
            for path in [path for path, (last, _) in self._tables.items() if last <= through]:
                self._bytes -= self._tables.pop(path)[1].nbytes
