"""The nouns: places in a source, places in our log, and what the log's records hold. No I/O here.

`Position` is a place in the source, `Offset` a place in our log. `after` is exclusive and
`through` inclusive wherever they occur.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

Offset = int
"""A place in our log: dense integers from 1. 0 stands before the first entry."""

Op = Literal["c", "u", "d", "r", "t"]
"""Debezium's letters: create, update, delete, read by the copy, truncate."""

Kind = Literal["rows", "copy", "schema", "truncate", "message", "marker", "decision", "undecodable"]

ADDED = "added"
"""The reason of a copy of a table that was not captured until then: of before, there is only a fragment."""

STREAMED = ("rows", "schema", "truncate", "message", "undecodable")
"""Kinds of entries in the order of the source's commits; a copy's rows, markers and decisions stand between
them."""

EVENTS = ("schema", "marker", "decision")
"""Kinds of entries which, where they are of a table, stay in the log when what is around them goes."""

RESERVED = (
    "_op",
    "_epoch",
    "_commit",
    "_ordinal",
    "_offset",
    "_committed_at",
    "_txid",
    "_unchanged",
    "_before",
    "_lsn",
    "_source",
    "_source_key",
)
"""Column names that staging and destinations add to the source's own."""


class Position(NamedTuple):
    """A place in the source; compares in the order in which the source committed.

    `commit` grows with each source transaction (Postgres: the LSN of the end of its commit record);
    `ordinal` numbers the rows inside it, from 1; `epoch` rises only where positions before and
    after cannot be compared.
    """

    epoch: int
    commit: int
    ordinal: int


START = Position(0, 0, 0)


class TableId(NamedTuple):
    """A source table by its schema and its own name, as the source spells them."""

    schema: str
    name: str

    @property
    def label(self) -> str:
        """What a project calls the table: `orders` in the schema public, else `sales.orders`."""
        return self.name if self.schema == "public" else f"{self.schema}.{self.name}"

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"


class Mark(NamedTuple):
    """How far a sink got: a log's identity, the last offset it holds, and that entry's hash (hex)."""

    log_id: str
    offset: Offset
    hash: str


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a source table.

    `type` is the source's own name for it, with modifiers (`numeric(12,2)`); `base` says what a type
    is underneath where its name does not: `enum`, `array`, `domain`, `composite`, `range`, or ''.
    """

    name: str
    type: str
    base: str = ""
    not_null: bool = False


@dataclass(frozen=True, slots=True)
class Constraint:
    """A rule that the source itself keeps of a table's rows.

    `columns` are those of the table that it is of. A check has an `expression`, in the source's SQL; a
    foreign key refers to the columns `to` of the table `references`. `beyond` says in words what of the rule
    is not in that (`of a part of the rows`), '' if nothing.
    """

    kind: Literal["not_null", "unique", "foreign_key", "check"]
    name: str
    columns: tuple[str, ...]
    expression: str = ""
    references: TableId | None = None
    to: tuple[str, ...] = ()
    beyond: str = ""

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Constraint:
        """Read back what `asdict` gave."""
        parent = raw["references"] and TableId(*raw["references"])
        columns, to = tuple(raw["columns"]), tuple(raw["to"])
        return cls(raw["kind"], raw["name"], columns, raw["expression"], parent, to, raw["beyond"])


@dataclass(frozen=True, slots=True)
class TableSchema:
    """The shape of a source table from one position on.

    `key` names the columns that identify a row; `version` counts the shapes of this table from 1;
    `constraints` are what else the source keeps of its rows, in a fixed order.
    """

    table: TableId
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    version: int = 1
    constraints: tuple[Constraint, ...] = ()

    def to_json(self) -> str:
        """Render as one line of JSON, the payload of a schema entry."""
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> TableSchema:
        """Read back what `to_json` wrote."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> TableSchema:
        """Read back what `asdict` gave."""
        return cls(
            table=TableId(*raw["table"]),
            columns=tuple(Column(**c) for c in raw["columns"]),
            key=tuple(raw["key"]),
            version=raw["version"],
            constraints=tuple(map(Constraint.from_dict, raw.get("constraints", ()))),
        )

    def same_shape(self, other: TableSchema) -> bool:
        """Whether columns and key agree, whatever the version and the constraints."""
        return self.columns == other.columns and self.key == other.key

    def agrees(self, other: TableSchema) -> bool:
        """Whether all but the version is the same."""
        return self.same_shape(other) and self.constraints == other.constraints


@dataclass(frozen=True, slots=True)
class CopyMark:
    """What a marker in the log says of a table's copy.

    - `begin`: a copy starts; everything of an earlier one that did not end is void. `schema` is the
      table's shape, `bounds` the keys (texts) at which it is cut into chunks, `after` the offset behind
      which every change that the copy does not contain stands, `reason` why it is made, `files` the
      table's files at the source, others once it was rewritten.
    - `chunk`: chunk number `chunk` is whole: its `rows` are the entries before it in its group.
    - `end`: all chunks are, and the stream has passed the last of their snapshots: the table is live.
      Its snapshots were taken at commits from `floor` to `ceiling`, all the same if it took only one.
    """

    kind: Literal["begin", "chunk", "end"]
    schema: TableSchema | None = None
    bounds: tuple[tuple[str, ...], ...] = ()
    after: Offset = 0
    reason: str = ""
    files: str = ""
    chunk: int = 0
    floor: int = 0
    ceiling: int = 0
    rows: int = 0

    def to_json(self) -> str:
        """Render as one line of JSON, the payload of a marker."""
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> CopyMark:
        """Read back what `to_json` wrote."""
        raw = json.loads(text)
        schema = raw.pop("schema")
        raw["bounds"] = tuple(tuple(cells) for cells in raw["bounds"])
        return cls(schema=TableSchema.from_dict(schema) if schema else None, **raw)


@dataclass(frozen=True, slots=True)
class Copy:
    """A table's newest complete copy, as of some offset.

    Its rows are the copied ones in `(begin, end)`. Changes through `floor` are contained in it; those
    beyond `ceiling` are not, and stand behind the offset `after`; in between it is the position of a
    key's copied row that tells. `key` names the columns by which the table's rows were known then.
    """

    begin: Offset
    end: Offset
    after: Offset
    floor: Position
    ceiling: Position
    key: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SourceMark:
    """What a marker without a table says of the source as a whole.

    - `gap`: changes that the log does not hold are gone from the source; `reason` says which.
    - `resync`: the source begins anew; positions behind this marker are of another epoch.
    """

    kind: Literal["gap", "resync"]
    reason: str = ""

    def to_json(self) -> str:
        """Render as one line of JSON, the payload of a marker."""
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> SourceMark:
        """Read back what `to_json` wrote."""
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class Entry:
    """One record of the log before it has an offset.

    `payload` by kind: rows, copy: see `headrace.payload`; schema: `TableSchema` as JSON; message: JSON of
    prefix, content, lsn and txid; truncate: JSON of lsn and txid; marker: `CopyMark` as JSON, or
    `SourceMark` where it has no table; decision: `headrace.decisions.Decision` as JSON; undecodable: see
    `headrace.payload`, without a table where the source's message does not tell of which it is.
    """

    kind: Kind
    table: TableId | None
    first: Position
    last: Position
    committed_at: int
    """Source commit time of the last change, microseconds since 1970 in UTC."""
    rows: int
    schema_version: int
    payload: bytes
    txids: tuple[int, int] = (0, 0)
    """The least and the greatest id of the source transactions in it; zeros where it is of none."""
    latest_at: int = 0
    """The greatest commit time in it, where that is not the last change's: times are not in commit order."""
    filter: bytes = b""
    """Which keys its rows may have, see `headrace.keyfilter`; empty where the table has no key."""


def source_marker(at: Position, mark: SourceMark) -> Entry:
    """Return the entry of a marker that is of no table."""
    return Entry("marker", None, at, at, time.time_ns() // 1000, 0, 0, mark.to_json().encode())


@dataclass(frozen=True, slots=True)
class LoggedEntry:
    """An entry as the log holds it; `appended_at` is in microseconds since 1970 in UTC."""

    offset: Offset
    entry: Entry
    appended_at: int
    ends_group: bool
    hash: str


def shape_in(kind: str, payload: bytes | str) -> TableSchema | None:
    """Return the shape that a table's schema entry, or the marker of its copy's begin, brings; else None."""
    if kind == "schema":
        return TableSchema.from_json(payload)
    return CopyMark.from_json(payload).schema if kind == "marker" else None


@dataclass(frozen=True, slots=True)
class Counts:
    """Where the changes of a slice went, for one model. `read` is the sum of the next six."""

    read: int = 0
    applied: int = 0
    superseded: int = 0
    filtered: int = 0
    quarantined: int = 0
    waiting: int = 0
    blocked: int = 0
    warned: int = 0
    """Of those applied, how many violate a check that only warns."""
    nulled: int = 0
    """Of those applied, how many have a cell nulled since it violates a check."""

    def closes(self) -> bool:
        """Whether every change that was read is accounted for."""
        parts = self.applied + self.superseded + self.filtered + self.quarantined
        return self.read == parts + self.waiting + self.blocked

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))
