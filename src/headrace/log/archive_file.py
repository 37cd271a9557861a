"""A file of an archive: the entries of one day as Parquet, and a footer that says what it holds.

It holds all that the log holds of its entries, hashes included, so that it proves itself; and the shapes,
markers and stops from before it, as retention would have left them, so that any file can be the first.

A file is complete in this order: its rows under a temporary name, its footer, their sync, its name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from blake3 import blake3

from headrace.change import Offset
from headrace.errors import LogDamaged, LogError
from headrace.log.database import sync_folder
from headrace.log.entries import HIGH, NO_HASH, NOTHING, Header, High, entry_hash

ARCHIVE_FORMAT = 2
ROW_GROUP_BYTES = 32 << 20
"""How many bytes of payload are in memory at once, unless one payload is larger."""

_ROW_GROUP_ROWS = 20_000
_FACTS, _CHECK = b"headrace", b"headrace.check"
_RESTORE = "Restore the archive from another copy, or export anew if the log still holds it."

_INT, _TEXT, _TIME = pa.int64(), pa.string(), pa.timestamp("us", "UTC")
_TEXTS = ("kind", "table_schema", "table_name")
_TIMES = ("committed_at", "latest_at", "appended_at")
_NAMES = Header._fields
_HIGH = tuple(HIGH.split(", "))
_WIDTH = len(_NAMES)
SCHEMA = pa.schema(
    [
        *((name, _TEXT if name in _TEXTS else _TIME if name in _TIMES else _INT) for name in _NAMES),
        *((name, _INT) for name in _HIGH),
        ("hash", pa.binary()),
        ("previous", pa.binary()),
        ("filter", pa.large_binary()),
        ("payload", pa.large_binary()),
        ("kept", pa.bool_()),
    ]
)
"""A row of a file. `kept`: it is from before the file's first offset, as retention keeps it."""


class Record(NamedTuple):
    """An entry as a file holds it; `high` as the log's database has it."""

    header: Header
    high: High
    hash: bytes
    previous: bytes
    filter: bytes
    payload: bytes
    kept: bool = False

    @property
    def offset(self) -> Offset:
        """The entry's offset."""
        return self.header.offset


class Reached(NamedTuple):
    """How far a chain was followed: the last entry's offset and hash (hex), and the stream's place there."""

    offset: Offset
    hash: str
    high: High

    def then(self, record: Record) -> Reached:
        """Return what an entry makes of it. Raises ValueError, with words, where it does not follow."""
        at = self.offset + 1
        if record.offset != at:
            raise ValueError(f"offset {at} is missing")
        if record.previous.hex() != self.hash:
            raise ValueError(f"offset {at} does not follow the entry before it")
        high = self.high.through(record.header)
        if record.high != high:
            raise ValueError(f"offset {at} has another place in the stream than its entries give")
        return Reached(at, record.hash.hex(), high)


BEFORE_ALL = Reached(0, NO_HASH, NOTHING)


@dataclass(frozen=True, slots=True)
class Part:
    """A file of an archive: what its footer says.

    Entries behind `before` through `reached`, `kept` more from before. `stops` are the rows of the log's
    `stops` up to there, hashes in hex; `notes` are the log's facts at its end, where that was its end.
    """

    path: Path
    log_id: str
    source: str
    day: str
    before: Reached
    reached: Reached
    kept: int
    stops: Sequence[Sequence[Any]]
    notes: dict[str, str]

    @property
    def first(self) -> Offset:
        """The first offset that is not kept from before."""
        return self.before.offset + 1

    def footer(self) -> dict[bytes, bytes]:
        """Return what the file says of itself, with a digest that vouches for it."""
        told = {"format": ARCHIVE_FORMAT, **asdict(self), "first": self.first, "last": self.reached.offset}
        del told["path"]
        text = json.dumps(told, ensure_ascii=False, sort_keys=True).encode()
        return {_FACTS: text, _CHECK: _digest(text)}

    def records(self) -> Iterator[Record]:
        """Yield its entries, first those kept from before. Raises LogDamaged, with file and offset, where one
        is not what was written or does not follow the one before."""
        reached, kept = self.before, 0
        for record in _records_of(self):
            if record.kept:
                kept += 1
            else:
                try:
                    reached = reached.then(record)
                except ValueError as error:
                    raise self.damaged(str(error)) from None
            yield record
        if reached.offset != self.reached.offset:
            raise self.damaged(f"offset {reached.offset + 1} is missing")
        if reached != self.reached:
            raise self.damaged(f"offset {reached.offset} has another hash than the footer says")
        if kept != self.kept:
            raise self.damaged(f"of {self.kept} entries kept from before offset {self.first} it holds {kept}")

    def damaged(self, what: str) -> LogDamaged:
        """Return the error that says what is wrong with the file."""
        return LogDamaged(f"{self.path}: {what}.", _RESTORE)


class PartWriter:
    """A Parquet file that is being written, under a temporary name until it is finished."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._kept = self._size = 0
        self._buffer: list[Record] = []
        self._temporary = part.path.with_name(part.path.name + ".tmp")
        self._temporary.unlink(missing_ok=True)
        os.close(os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        self._file = pa.OSFile(str(self._temporary), "wb")  # to which Arrow writes without a copy
        self._writer = pq.ParquetWriter(
            self._file,
            SCHEMA,
            compression={name: "none" if name in ("hash", "previous") else "zstd" for name in SCHEMA.names},
            compression_level={name: 1 for name in SCHEMA.names if name not in ("hash", "previous")},
            use_dictionary=list(_TEXTS),
            write_statistics=[name for name in SCHEMA.names if SCHEMA.field(name).type in (_INT, _TIME)],
            write_page_checksum=True,
        )

    def add(self, record: Record) -> None:
        """Add an entry."""
        size = len(record.payload) + len(record.filter)
        if self._size + size > ROW_GROUP_BYTES or len(self._buffer) == _ROW_GROUP_ROWS:
            self._flush()
        self._buffer.append(record)
        self._size += size
        self._kept += record.kept

    def finish(self, reached: Reached, notes: dict[str, str]) -> None:
        """Give the file its footer and its name, durably."""
        self._flush()
        told = replace(self._part, reached=reached, kept=self._kept, notes=notes)
        self._writer.add_key_value_metadata(told.footer())
        self._writer.close()
        self._file.close()
        with self._temporary.open("rb") as written:
            os.fsync(written.fileno())
        self._temporary.replace(self._part.path)
        sync_folder(self._part.path.parent)

    def abandon(self) -> None:
        """Remove it, unless it is finished."""
        with suppress(Exception):
            self._writer.close()
        with suppress(Exception):
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._buffer:
            return
        columns = zip(*((*r.header, *r.high, *r[2:]) for r in self._buffer), strict=True)
        arrays = [_array(field, values) for field, values in zip(SCHEMA, columns, strict=True)]
        self._buffer.clear()
        self._size = 0
        table = pa.Table.from_arrays(arrays, schema=SCHEMA)
        self._writer.write_table(table, row_group_size=table.num_rows)


def _array(field: pa.Field, values: Sequence[Any]) -> pa.Array:
    if field.type == pa.large_binary() and len(values) == 1:  # which may be very large: without a copy
        ends = pa.py_buffer(bytes(8) + len(values[0]).to_bytes(8, "little"))
        return pa.LargeBinaryArray.from_buffers(field.type, 1, [None, ends, pa.py_buffer(values[0])])
    return pa.array(values, field.type)


def file_name(source: str, day: str) -> str:
    """Return the name of a day's file."""
    return f"{source}-{day}.parquet"


def read_part(path: Path) -> Part:
    """Read what a file says of itself. Raises LogDamaged, or LogError where it is of a newer format."""
    with _told(path, "it cannot be opened"), pq.ParquetFile(path) as file:
        facts, schema = file.metadata.metadata or {}, file.schema_arrow
    text = facts.get(_FACTS, b"")
    if _CHECK not in facts or facts[_CHECK] != _digest(text):
        raise LogDamaged(f"{path}: its footer is not what `headrace log export` wrote.", _RESTORE)
    told = json.loads(text)
    if told["format"] != ARCHIVE_FORMAT:
        raise LogError(
            f"{path} has format {told['format']}, this Headrace knows {ARCHIVE_FORMAT}.",
            "Use the Headrace that wrote it.",
        )
    ends = (told["before"], told["reached"])
    before, reached = (Reached(at, digest, High(*high)) for at, digest, high in ends)
    known = {name: told[name] for name in ("log_id", "source", "day", "kept", "stops", "notes")}
    part = Part(path=path, before=before, reached=reached, **known)
    if path.name != (name := file_name(part.source, part.day)):
        raise part.damaged(f"it is {name}, from offset {part.first} on, renamed or swapped")
    if not schema.equals(SCHEMA):
        raise part.damaged(f"its columns, from offset {part.first} on, are not those of an export")
    return part


def _records_of(part: Part) -> Iterator[Record]:
    """Yield the entries of a file, each compared with its own hash."""
    offset = part.first
    with pq.ParquetFile(part.path, page_checksum_verification=True) as file:
        for group in range(file.num_row_groups):
            for record in _rows(part, file, group, offset):
                offset = record.offset
                own = entry_hash(record.previous, part.source, record.header, record.filter, record.payload)
                if own != record.hash:
                    raise part.damaged(f"the hash of offset {offset} does not hold")
                if record.kept and offset >= part.first:
                    raise part.damaged(f"offset {offset} stands among those from before")
                yield record


def _rows(part: Part, file: pq.ParquetFile, group: int, offset: Offset) -> Iterator[Record]:
    with _told(part.path, f"it cannot be read behind offset {offset}"):
        table = file.read_row_group(group)
        columns = [
            (column.cast(_INT) if column.type == _TIME else column).to_pylist() for column in table.columns
        ]
    for row in zip(*columns, strict=True):
        yield Record(Header(*row[:_WIDTH]), High(*row[_WIDTH : _WIDTH + 5]), *row[_WIDTH + 5 :])


@contextmanager
def _told(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise LogError(f"There is no file {path}.", "Name files of an export, or their folder.") from None
    except (pa.ArrowException, OSError, ValueError, TypeError, MemoryError) as error:
        words = " ".join(str(error).split())
        raise LogDamaged(f"{path}: {what}: {words}.", _RESTORE) from error


def _digest(text: bytes) -> bytes:
    return blake3(text).hexdigest().encode()
