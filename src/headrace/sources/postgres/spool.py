"""Where changes wait for the commit of their transaction.

From protocol version 2 on the server sends a large transaction in blocks while it runs, between
blocks of others. Its messages are kept as they came, each with the xid of its own subtransaction, and
are decoded when it commits: only then is it known which of them count. docs/design/streamed-transactions.md
says why.
"""

from __future__ import annotations

import struct
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import pyarrow as pa

from headrace.alarms import tell
from headrace.errors import SourceUnavailable
from headrace.sources.postgres.events import Event

if TYPE_CHECKING:
    from headrace.sources.postgres.pgoutput import Decoder


MEMORY = 8 << 20
"""Bytes that the spools of one source keep in memory before they go to disk."""
ALERT_AT = 0.8
_MAX_TAILS = 16  # MiB at most: where more transactions are open, each block goes to the spool at once

_CODEC = pa.Codec("lz4_raw")
_FRAME = struct.Struct("=qII")  # LSN, xid and length, as `Decoder.replay` reads them
_BEGIN = struct.Struct(">cQqI")
_COMMIT = struct.Struct(">cbQQq")
_EPOCH_2000 = 946_684_800_000_000


class SpoolSpace:
    """The room that all spools of one source share: some memory, then files in a folder, up to a limit.

    The files have no names: a crash gives their room back, and the server sends their content again.
    """

    def __init__(self, source: str, folder: Path, limit: int) -> None:
        """`limit` in bytes, as they are stored: compressed."""
        self._source = source
        self._folder = folder
        self._limit = limit
        self._alerted = False
        self._files: set[IO[bytes]] = set()
        self.used = 0
        self.in_memory = 0

    def take(self, size: int) -> bool:
        """Count `size` bytes more; returns whether they may stay in memory.

        Alerts where 80 % of the limit are used. Raises SourceUnavailable at the limit.
        """
        if self.used + size > self._limit:
            raise SourceUnavailable(
                f"Source {self._source}: transactions that have not committed hold {self.used >> 20} MiB in "
                f"{self._folder}, as much as spool_max allows.",
                f"End the transaction at the source, or raise spool_max in [source.{self._source}]; "
                "then it is read again.",
            )
        self.used += size
        if self.used < ALERT_AT / 2 * self._limit:
            self._alerted = False
        elif self.used >= ALERT_AT * self._limit and not self._alerted:
            self._alerted = True
            tell(
                "SPOOL of source %s holds %d MiB of transactions that have not committed; at %d MiB "
                "(spool_max) reading stops. End them, or raise spool_max.",
                self._source, self.used >> 20, self._limit >> 20, source=self._source, severity="warning",
            )  # fmt: skip
        stays = self.in_memory + size <= MEMORY
        self.in_memory += size if stays else 0
        return stays

    def give_back(self, in_memory: int, on_disk: int, file: IO[bytes] | None) -> None:
        """Count bytes that are gone, and close the file that held some of them."""
        self.used -= in_memory + on_disk
        self.in_memory -= in_memory
        if file is not None:
            self._files.discard(file)
            file.close()

    def open_file(self) -> IO[bytes]:
        """Make a file for what does not fit in memory. Raises SourceUnavailable."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - lives with its spool
        except OSError as error:
            raise self.refused(error) from error
        self._files.add(file)
        return file

    def close(self) -> None:
        """Close every file: what they hold, the server sends again."""
        for file in self._files:
            file.close()
        self._files.clear()

    def refused(self, error: OSError) -> SourceUnavailable:
        """Say what it means that the disk takes no more."""
        return SourceUnavailable(
            f"Source {self._source}: {self._folder} cannot take a transaction that has not committed: "
            f"{error.strerror}.",
            "Make room there, or mend its rights; it is tried again.",
        )


class Spool:
    """A sequence of byte strings, kept in order until it is closed."""

    def __init__(self, space: SpoolSpace) -> None:
        self._space = space
        self._parts: list[bytes | int] = []  # a part in memory, or the size of one in the file
        self._file: IO[bytes] | None = None

    def append(self, data: bytes) -> None:
        """Keep one more. Raises SourceUnavailable where there is no room."""
        if self._space.take(len(data)):
            self._parts.append(data)
            return
        self._parts.append(len(data))
        if self._file is None:
            self._file = self._space.open_file()
        try:
            self._file.write(data)
        except OSError as error:
            raise self._space.refused(error) from error

    def __iter__(self) -> Iterator[bytes]:
        """Yield what was kept, in order."""
        if self._file is not None:
            self._file.seek(0)
        for part in self._parts:
            if isinstance(part, bytes):
                yield part
            else:
                assert self._file is not None
                yield self._file.read(part)

    def close(self) -> None:
        """Give memory and disk back."""
        in_memory = sum(len(part) for part in self._parts if isinstance(part, bytes))
        on_disk = sum(part for part in self._parts if isinstance(part, int))
        self._space.give_back(in_memory, on_disk, self._file)
        self._parts.clear()
        self._file = None


class _Streamed:
    """A transaction that the server streams: its messages in frames, and what of it was rolled back."""

    def __init__(self, space: SpoolSpace) -> None:
        self.tail = bytearray()
        """Frames that the decoder appends; moved to the spool when they are many."""
        self.aborted: set[int] = set()
        self.size = 0
        self._spool = Spool(space)
        self._sizes: list[int] = []

    def flush(self) -> None:
        """Move the tail to the spool. Raises SourceUnavailable."""
        self.size += len(self.tail)
        self._sizes.append(len(self.tail))
        self._spool.append(_CODEC.compress(self.tail, asbytes=True))
        self.tail.clear()

    def frames(self) -> Iterator[bytes]:
        """Yield all frames, some at a time."""
        for data, size in zip(self._spool, self._sizes, strict=True):
            yield _CODEC.decompress(data, decompressed_size=size, asbytes=True)
        yield bytes(self.tail)

    def close(self) -> None:
        self._spool.close()
        self.tail.clear()


class Committed:
    """A streamed transaction that has committed and waits to be decoded.

    `serial` is what the decoder will call it, `commit` the LSN of the end of its commit record,
    `committed_at` in microseconds since 1970 UTC, `size` in bytes of messages.
    """

    def __init__(
        self, streamed: _Streamed, xid: int, serial: int, commit_lsn: int, end_lsn: int, at: int
    ) -> None:
        """`at` is in microseconds since 2000, as the protocol has it."""
        self.serial = serial
        self.xid = xid
        self.commit = end_lsn
        self.committed_at = at + _EPOCH_2000
        self.size = streamed.size + len(streamed.tail)
        self._streamed = streamed
        self._begin = _frame(_BEGIN.pack(b"B", commit_lsn, at, xid))
        self._end = _frame(_COMMIT.pack(b"C", 0, commit_lsn, end_lsn, at))

    def replay(self, decoder: Decoder, max_bytes: int) -> Iterator[Sequence[Event]]:
        """Decode it as if it came whole at its commit; yields all its events in pieces of about `max_bytes`.

        The decoder holds nothing else before and nothing afterwards. Raises MalformedMessage.
        """
        for frames in self._frames():
            at = 0
            while (at := decoder.replay(frames, at, self._streamed.aborted, max_bytes)) < len(frames):
                yield decoder.take()[1]
        self._streamed.close()
        yield decoder.take()[1]

    def replay_whole(self, decoder: Decoder) -> None:
        """Decode it as if it came whole at its commit; the decoder keeps it with what it holds."""
        for frames in self._frames():
            decoder.replay(frames, 0, self._streamed.aborted, sys.maxsize)
        self._streamed.close()

    def _frames(self) -> Iterator[bytes]:
        yield self._begin
        yield from self._streamed.frames()
        yield self._end


class StreamedTransactions:
    """All transactions that the server streams now, by the xid of the top level.

    `Decoder` fills it: a block lies between `start` and `stop`, and after a `commit` it waits until the
    transaction is replayed.
    """

    def __init__(self, space: SpoolSpace) -> None:
        self._space = space
        self._open: dict[int, _Streamed] = {}
        self._current: _Streamed | None = None
        self._committed: Committed | None = None

    def holds(self, xid: int) -> bool:
        """Whether a transaction is known and has not ended."""
        return xid in self._open

    def tails(self) -> list[bytearray]:
        """Return the newest frames of every open transaction, to append to."""
        return [streamed.tail for streamed in self._open.values()]

    def start(self, xid: int) -> bytearray:
        """Begin a block; returns the bytes to which the decoder appends its frames."""
        self._current = self._open.setdefault(xid, _Streamed(self._space))
        return self._current.tail

    def flush(self) -> None:
        """Move what the open block has brought to the spool. Raises SourceUnavailable."""
        assert self._current is not None
        self._current.flush()

    def stop(self) -> None:
        """End the block. Raises SourceUnavailable."""
        if len(self._open) > _MAX_TAILS:
            self.flush()
        self._current = None

    def abort(self, xid: int, subxid: int) -> None:
        """Forget a transaction, or note what part of it was rolled back; one unknown is none of ours."""
        if xid != subxid and xid in self._open:
            self._open[xid].aborted.add(subxid)
        elif xid in self._open:
            self._open.pop(xid).close()

    def take_committed(self) -> Committed | None:
        """Return the transaction whose commit came last, once, to be replayed."""
        committed, self._committed = self._committed, None
        return committed

    def commit(self, xid: int, serial: int, commit_lsn: int, end_lsn: int, at: int) -> None:
        """Hand a transaction over to be replayed, see `Committed`."""
        self._committed = Committed(self._open.pop(xid), xid, serial, commit_lsn, end_lsn, at)


def _frame(message: bytes) -> bytes:
    return _FRAME.pack(0, 0, len(message)) + message
