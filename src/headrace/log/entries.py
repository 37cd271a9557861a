"""What the log's database holds of an entry, and the hash that chains it to the one before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from headrace.change import Entry, LoggedEntry, Offset, Position, TableId
from headrace.log.segments import Place

FORMAT = 3
NO_HASH = "0" * 64
"""What stands in the place of the hash before the first entry."""

SCRIPT = """
CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE entries (
  "offset" INTEGER PRIMARY KEY,
  kind TEXT NOT NULL, table_schema TEXT, table_name TEXT,
  first_epoch INTEGER NOT NULL, first_commit INTEGER NOT NULL, first_ordinal INTEGER NOT NULL,
  last_epoch INTEGER NOT NULL, last_commit INTEGER NOT NULL, last_ordinal INTEGER NOT NULL,
  min_txid INTEGER NOT NULL, max_txid INTEGER NOT NULL,
  committed_at INTEGER NOT NULL, rows INTEGER NOT NULL, schema_version INTEGER NOT NULL,
  appended_at INTEGER NOT NULL, ends_group INTEGER NOT NULL,
  previous BLOB NOT NULL, hash BLOB NOT NULL, bytes INTEGER NOT NULL,
  segment INTEGER, start INTEGER, payload BLOB,
  high_epoch INTEGER NOT NULL, high_commit INTEGER NOT NULL, high_ordinal INTEGER NOT NULL,
  high_at INTEGER NOT NULL
);
CREATE INDEX by_table ON entries (table_schema, table_name, "offset", kind, rows, bytes);
CREATE INDEX markers ON entries ("offset") WHERE kind IN ('schema', 'marker');
CREATE TABLE filters ("offset" INTEGER PRIMARY KEY, filter BLOB NOT NULL);
CREATE TABLE stops (
  "offset" INTEGER PRIMARY KEY, hash BLOB NOT NULL,
  epoch INTEGER NOT NULL, "commit" INTEGER NOT NULL, ordinal INTEGER NOT NULL, at INTEGER NOT NULL,
  rows INTEGER NOT NULL, bytes INTEGER NOT NULL
);
"""
"""`high_*` is how far the stream has come through an entry: the greatest position of a streamed entry, and
the greatest commit time. Both only grow, so that a place in the source is found by bisection. `stops` are
ends of groups that retention has deleted: where a consumer of staging may still stop."""

HEADER = (
    '"offset", kind, table_schema, table_name, first_epoch, first_commit, first_ordinal, '
    "last_epoch, last_commit, last_ordinal, min_txid, max_txid, committed_at, rows, schema_version, "
    "appended_at, ends_group"
)
COLUMNS = f"{HEADER}, hash, previous, bytes, segment, start, payload"
_SIZE = 17
INLINE = ("schema", "marker", "message", "truncate")
"""Kinds whose payloads, all small, stand in the database, where retention can keep them."""


class Row(NamedTuple):
    """A row of `entries`, as `COLUMNS` selects it."""

    header: tuple[Any, ...]
    hash: bytes
    previous: bytes
    size: int
    place: Place | None
    inline: bytes | None

    @property
    def offset(self) -> Offset:
        """The entry's offset."""
        return int(self.header[0])

    def logged(self, payload: bytes, key_filter: bytes = b"") -> LoggedEntry:
        """Return the entry with its payload."""
        _, kind, schema, name, *places, low, high, at, rows, version, appended, ends = self.header
        table = TableId(schema, name) if name is not None else None
        first, last = Position(*places[:3]), Position(*places[3:])
        entry = Entry(kind, table, first, last, at, rows, version, payload, (low, high), key_filter)
        return LoggedEntry(self.offset, entry, appended, bool(ends), self.hash.hex())


def row_of(found: Sequence[Any]) -> Row:
    """Take a row apart."""
    digest, previous, size, segment, start, payload = found[_SIZE:]
    place = Place(segment, start) if segment is not None else None
    return Row(tuple(found[:_SIZE]), digest, previous, size, place, payload)


def header_of(offset: Offset, entry: Entry, appended_at: int, ends_group: bool) -> tuple[Any, ...]:
    """Return the values of `HEADER`."""
    table = entry.table or (None, None)
    return (
        offset, entry.kind, *table, *entry.first, *entry.last, *entry.txids,
        entry.committed_at, entry.rows, entry.schema_version, appended_at, int(ends_group),
    )  # fmt: skip


def entry_hash(
    previous: bytes, source: str, header: Sequence[object], key_filter: bytes, body: bytes
) -> bytes:
    """Hash an entry: BLAKE2b-256 over the hash before it, then a compact JSON array of the source, the header
    and the filter's length, then filter and payload."""
    digest = hashlib.blake2b(previous, digest_size=32)
    head = [source, *header, len(key_filter)]
    digest.update(json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode())
    digest.update(key_filter)
    digest.update(body)
    return digest.digest()
