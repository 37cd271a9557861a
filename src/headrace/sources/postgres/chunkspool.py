"""What a chunk of a copy holds until all of it has been read: encoded batches, on disk past a limit."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator
from typing import IO, NamedTuple

_MEMORY = 16 << 20  # of a chunk's compressed rows; the rest waits on disk


class Encoded(NamedTuple):
    """One batch of rows as the log takes it."""

    rows: int
    payload: bytes
    filter: bytes


class ChunkSpool:
    """The encoded batches of one chunk."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(_MEMORY)  # noqa: SIM115 - lives with the chunk
        weakref.finalize(self, self._file.close)  # a chunk may be dropped at any point of its way
        self._parts: list[tuple[int, int, bytes]] = []

    def add(self, part: Encoded) -> None:
        """Keep one batch."""
        self._parts.append((part.rows, len(part.payload), part.filter))
        self._file.write(part.payload)

    def drain(self) -> Iterator[Encoded]:
        """Yield every batch, in order."""
        self._file.seek(0)
        for rows, size, held in self._parts:
            yield Encoded(rows, self._file.read(size), held)
