"""What the changes of a Postgres source are, once `pgoutput.Decoder` has read them. No I/O here.

An `lsn` is where a change stands in the WAL, as the server said it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa


@dataclass(frozen=True, slots=True)
class RelationColumn:
    """One column of a relation; `is_key` where it is part of the replica identity."""

    name: str
    type_oid: int
    type_modifier: int
    is_key: bool


@dataclass(frozen=True, slots=True)
class Relation:
    """A table as the server describes it before its first row.

    `replica_identity` is 'd' (default), 'n' (nothing), 'f' (full) or 'i' (index).
    """

    id: int
    schema: str
    name: str
    replica_identity: str
    columns: tuple[RelationColumn, ...]


@dataclass(frozen=True, slots=True)
class Transaction:
    """A committed transaction.

    `commit` is the LSN of the end of its commit record, `committed_at` is in microseconds since
    1970 UTC, `rows` is how many ordinals it used, `origin` names where it was first made if the server
    replicated it from elsewhere.
    """

    serial: int
    commit: int
    xid: int
    committed_at: int
    rows: int
    origin: str = ""


class Dated(Protocol):
    """What is known of a transaction whose commit has come, whether its events have or not."""

    @property
    def serial(self) -> int:
        """See `Transaction`."""
        ...

    @property
    def commit(self) -> int:
        """See `Transaction`."""
        ...

    @property
    def xid(self) -> int:
        """See `Transaction`."""
        ...

    @property
    def committed_at(self) -> int:
        """See `Transaction`."""
        ...


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows of one relation; `Decoder` describes the columns of `batch`."""

    relation: Relation
    batch: pa.RecordBatch


@dataclass(frozen=True, slots=True)
class Truncate:
    """Relations that one statement emptied, with those it reached by CASCADE."""

    relations: tuple[Relation, ...]
    serial: int
    ordinal: int
    cascade: bool
    restart_identity: bool
    lsn: int


@dataclass(frozen=True, slots=True)
class Message:
    """What `pg_logical_emit_message` wrote; outside of a transaction serial is -1 and ordinal 0."""

    serial: int
    ordinal: int
    prefix: str
    content: bytes
    transactional: bool
    lsn: int


@dataclass(frozen=True, slots=True)
class RelationSeen:
    """A relation is new, or no longer what it was; `ordinal` is that of the event before."""

    relation: Relation
    serial: int
    ordinal: int


MALFORMED = pa.schema(
    {
        "_op": pa.string(),
        "_serial": pa.int64(),
        "_ordinal": pa.int64(),
        "_lsn": pa.int64(),
        "kind": pa.string(),
        "relation": pa.int64(),
        "schema": pa.string(),
        "name": pa.string(),
        "why": pa.string(),
        "message": pa.binary(),
    }
)
"""The columns of `Malformed.batch`; `Decoder` describes them."""


@dataclass(frozen=True, slots=True)
class Malformed:
    """Messages that could not be decoded, in order, each a row of `batch`."""

    batch: pa.RecordBatch


Event = Rows | Truncate | Message | RelationSeen | Malformed
