"""What the log's database holds of an entry, and the hash that chains it to the one before."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from blake3 import blake3

from headrace.change import START, STREAMED, Entry, Kind, LoggedEntry, Offset, Position, TableId
from headrace.log.segments import Place

FORMAT = 5
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
  committed_at INTEGER NOT NULL, latest_at INTEGER NOT NULL,
  rows INTEGER NOT NULL, schema_version INTEGER NOT NULL,
  appended_at INTEGER NOT NULL, ends_group INTEGER NOT NULL,
  previous BLOB NOT NULL, hash BLOB NOT NULL, bytes INTEGER NOT NULL,
  segment INTEGER, start INTEGER, payload BLOB,
  high_epoch INTEGER NOT NULL, high_commit INTEGER NOT NULL, high_ordinal INTEGER NOT NULL,
  high_at INTEGER NOT NULL, high_committed_at INTEGER NOT NULL
);
CREATE INDEX by_table ON entries (table_schema, table_name, "offset", kind, rows, bytes);
CREATE INDEX markers ON entries ("offset") WHERE kind IN ('schema', 'marker');
CREATE TABLE filters ("offset" INTEGER PRIMARY KEY, filter BLOB NOT NULL);
CREATE TABLE stops (
  "offset" INTEGER PRIMARY KEY, hash BLOB NOT NULL,
  epoch INTEGER NOT NULL, "commit" INTEGER NOT NULL, ordinal INTEGER NOT NULL,
  at INTEGER NOT NULL, committed_at INTEGER NOT NULL, rows INTEGER NOT NULL, bytes INTEGER NOT NULL
);
"""
"""`high_*` is how far the stream has come through an entry, see `High`. `stops` are ends of groups that
retention has deleted: where a consumer of staging may still stop."""


class Header(NamedTuple):
    """What an entry tells of its payload, column by column of `entries`: the hash covers it in this order."""

    offset: Offset
    kind: Kind
    table_schema: str | None
    table_name: str | None
    first_epoch: int
    first_commit: int
    first_ordinal: int
    last_epoch: int
    last_commit: int
    last_ordinal: int
    min_txid: int
    max_txid: int
    committed_at: int
    latest_at: int
    rows: int
    schema_version: int
    appended_at: int
    ends_group: int

    @property
    def last(self) -> Position:
        """The position of the last change."""
        return Position(self.last_epoch, self.last_commit, self.last_ordinal)

    def entry(self, payload: bytes, key_filter: bytes) -> Entry:
        """Return the entry with its payload."""
        table = None if self.table_schema is None else TableId(self.table_schema, str(self.table_name))
        first = Position(self.first_epoch, self.first_commit, self.first_ordinal)
        return Entry(
            self.kind, table, first, self.last, self.committed_at, self.rows, self.schema_version, payload,
            (self.min_txid, self.max_txid), self.latest_at, key_filter,
        )  # fmt: skip


HEADER = ", ".join(f'"{name}"' for name in Header._fields)
COLUMNS = f"{HEADER}, hash, previous, bytes, segment, start, payload"
_SIZE = len(Header._fields)
HIGH = "high_epoch, high_commit, high_ordinal, high_at, high_committed_at"
INSERT = (
    f"INSERT INTO entries ({HEADER}, {HIGH}, hash, previous, bytes, segment, start, payload) "
    f"VALUES ({', '.join('?' * (_SIZE + 11))})"
)
INSERT_STOP = f"INSERT INTO stops VALUES ({', '.join('?' * 9)})"
INLINE = ("schema", "marker", "message", "truncate", "decision")
"""Kinds whose payloads, all small, stand in the database, where retention can keep them."""


class High(NamedTuple):
    """How far the stream has come: the greatest position of a streamed entry, and the greatest commit time.

    Both only grow, so that a place in the source is found by bisection. `committed_at` is the commit time of
    that position's own transaction, which is not always the greatest: Postgres takes the time before it
    gives the place, a clock may be set back, and another server has another one.
    """

    epoch: int
    commit: int
    ordinal: int
    at: int
    committed_at: int

    @property
    def position(self) -> Position:
        """The greatest position."""
        return Position(*self[:3])

    def through(self, header: Header) -> High:
        """Return how far it has come behind an entry."""
        if header.kind not in STREAMED:
            return self
        at = max(self.at, header.committed_at, header.latest_at)
        if header.last < self.position:
            return self._replace(at=at)
        return High(*header.last, at, header.committed_at)


NOTHING = High(*START, 0, 0)


class Row(NamedTuple):
    """A row of `entries`, as `COLUMNS` selects it."""

    header: Header
    hash: bytes
    previous: bytes
    size: int
    place: Place | None
    inline: bytes | None

    @property
    def offset(self) -> Offset:
        """The entry's offset."""
        return self.header.offset

    def logged(self, payload: bytes, key_filter: bytes = b"") -> LoggedEntry:
        """Return the entry with its payload."""
        entry = self.header.entry(payload, key_filter)
        return LoggedEntry(
            self.offset, entry, self.header.appended_at, bool(self.header.ends_group), self.hash.hex()
        )


def row_of(found: Sequence[Any]) -> Row:
    """Take a row apart."""
    digest, previous, size, segment, start, payload = found[_SIZE:]
    place = Place(segment, start) if segment is not None else None
    return Row(Header(*found[:_SIZE]), digest, previous, size, place, payload)


def header_of(offset: Offset, entry: Entry, appended_at: int, ends_group: bool) -> Header:
    """Return an entry's header."""
    schema, name = entry.table or (None, None)
    return Header(
        offset, entry.kind, schema, name, *entry.first, *entry.last, *entry.txids,
        entry.committed_at, entry.latest_at, entry.rows, entry.schema_version, appended_at, int(ends_group),
    )  # fmt: skip


def entry_hash(previous: bytes, source: str, header: Header, key_filter: bytes, body: bytes) -> bytes:
    """Hash an entry: BLAKE3 over the hash before it, then a compact JSON array of the source, the header and
    the filter's length, then filter and payload."""
    digest = blake3(previous)
    head = [source, *header, len(key_filter)]
    digest.update(json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode())
    digest.update(key_filter)
    digest.update(body)
    return digest.digest()
