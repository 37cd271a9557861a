"""From decoded transactions to groups of log entries."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import IO

import numpy as np
import pyarrow as pa

from headrace.change import RESERVED, Column, Entry, Position, TableId, TableSchema
from headrace.errors import SourceGap
from headrace.payload import decode_rows, encode_rows
from headrace.sources.postgres.catalog import Connection, filled_columns, name_types, read_shapes
from headrace.sources.postgres.ddl import rewritten
from headrace.sources.postgres.events import (
    Event,
    Message,
    Relation,
    RelationSeen,
    Rows,
    Transaction,
    Truncate,
)
from headrace.sources.postgres.undecodable import Undecodable, text_of

logger = logging.getLogger("headrace.capture")
alerts = logging.getLogger("headrace.alert")

_SPOOL_MEMORY = 32 << 20
_HEAD = 3  # the decoder's own columns before the source's: _op, _serial, _ordinal


class Spool:
    """Rows of a transaction that has not committed yet, compressed; on disk past a limit."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(_SPOOL_MEMORY)  # noqa: SIM115 - lives with the spool
        self._parts: list[tuple[Relation, int, int]] = []

    def add(self, relation: Relation, batch: pa.RecordBatch) -> None:
        """Keep one batch."""
        data = encode_rows(batch)
        self._parts.append((relation, self._file.tell(), len(data)))
        self._file.write(data)

    def drain(self) -> Iterator[Rows]:
        """Yield what was kept, in order, and forget it."""
        for relation, start, size in self._parts:
            self._file.seek(start)
            yield Rows(relation, decode_rows(self._file.read(size)))
        self._parts.clear()
        self._file.seek(0)
        self._file.truncate()

    def __bool__(self) -> bool:
        return bool(self._parts)

    def close(self) -> None:
        """Give the disk back."""
        self._file.close()


def alert_rewrite(table: TableId, reason: str) -> None:
    """Say that the rows at rest of a table are not what the source has now."""
    alerts.warning(
        "SCHEMA of %s changed: %s. Rows that no later change touches do not show it: `headrace verify`.",
        table,
        reason,
    )


class GroupBuilder:
    """Turns what the decoder took into entries with positions, and knows every table's shape."""

    def __init__(
        self,
        schemas: dict[TableId, TableSchema],
        catalog: Connection,
        on_rewrite: Callable[[TableId, str], None] = alert_rewrite,
    ) -> None:
        """`on_rewrite` is called with a table and a reason when it has rows that are not what the log says,
        because the source changed them without a word in the stream or because they were never copied. It
        is called before the group with that change is out, and again if that group is built again."""
        self._schemas = dict(schemas)
        self._catalog = catalog
        self._on_rewrite = on_rewrite
        self._spool = Spool()
        self._deferred: list[Event] = []
        self._undecodable = Undecodable()

    def build(
        self, transactions: Sequence[Transaction], events: Sequence[Event], after: int
    ) -> Iterator[Entry]:
        """Yield the entries of complete transactions with a commit beyond `after`, ordered by their
        last position; rows of a transaction still open are spooled until it commits."""
        done = transactions[-1].serial if transactions else -1
        entries: list[Entry] = []
        times = _Times(transactions, after)
        if done >= 0:
            for event in self._deferred:
                self._add(event, done, times, entries)
            for rows in self._spool.drain():
                self._resolve(rows, times, entries)
            self._deferred.clear()
        for event in events:
            self._add(event, done, times, entries)
        yield from sorted(entries, key=lambda entry: entry.last)

    def close(self) -> None:
        """Drop what is spooled: the server sends it again."""
        self._spool.close()

    def _add(self, event: Event, done: int, times: _Times, entries: list[Entry]) -> None:
        if isinstance(event, Rows):
            serials = event.batch.column(1).to_numpy()
            complete = int(np.searchsorted(serials, done, side="right"))
            if complete:
                self._resolve(Rows(event.relation, event.batch.slice(0, complete)), times, entries)
            if complete < event.batch.num_rows:
                self._spool.add(event.relation, event.batch.slice(complete))
            return
        serial = event.serial
        if serial > done:
            self._deferred.append(event)
        elif isinstance(event, RelationSeen):
            entries += self._seen(event, times)
        elif isinstance(event, Truncate) and times.fresh(serial):
            at = times.position(serial, event.ordinal)
            for relation in event.relations:
                table = _table(relation)
                version = self._version(relation, serial, event.ordinal, times, entries)
                entries.append(Entry("truncate", table, at, at, times.at(serial), 1, version, b""))
        elif isinstance(event, Message) and serial >= 0 and times.fresh(serial):
            at = times.position(serial, event.ordinal)
            content = {"prefix": event.prefix, "content": text_of(event.content)}
            payload = json.dumps(content, ensure_ascii=False)
            entries.append(Entry("message", None, at, at, times.at(serial), 0, 0, payload.encode()))

    def _resolve(self, rows: Rows, times: _Times, entries: list[Entry]) -> None:
        """Give rows their commit, time and transaction id, and drop those that the log holds."""
        batch = times.keep_fresh(rows.batch)
        if not batch.num_rows:
            return
        table = _table(rows.relation)
        serials = batch.column(1).to_numpy()
        commits, moments, xids = times.of(serials)
        columns = [batch.column(0), commits, batch.column(2), moments, xids, *batch.columns[_HEAD:]]
        names = ["_op", "_commit", "_ordinal", "_committed_at", "_txid", *batch.schema.names[_HEAD:]]
        ordinals = batch.column(2)
        first = Position(0, commits[0].as_py(), ordinals[0].as_py())
        last = Position(0, commits[-1].as_py(), ordinals[-1].as_py())
        whole = self._undecodable.escape(table, pa.RecordBatch.from_arrays(columns, names=names))
        payload = encode_rows(whole)
        version = self._version(rows.relation, int(serials[0]), first.ordinal, times, entries)
        entries.append(
            Entry("rows", table, first, last, moments[-1].as_py(), batch.num_rows, version, payload)
        )

    def _seen(self, event: RelationSeen, times: _Times) -> list[Entry]:
        """Compare a relation with the shape that the log knows; log it only if it differs.

        One that the log does not know waits for its first row: the server describes a partition too,
        whose rows then come under the name of its root.
        """
        known = self._schemas.get(_table(event.relation))
        return [] if known is None else self._log_shape(event, known, times)

    def _version(
        self, relation: Relation, serial: int, ordinal: int, times: _Times, entries: list[Entry]
    ) -> int:
        """Return the version of the shape that a row has; a table's first row logs its shape before it."""
        table = _table(relation)
        if table not in self._schemas:
            entries += self._log_shape(RelationSeen(relation, serial, ordinal - 1), None, times)
        return self._schemas[table].version

    def _log_shape(self, event: RelationSeen, known: TableSchema | None, times: _Times) -> list[Entry]:
        table = _table(event.relation)
        shape = self._shape(event.relation, known)
        if known is not None and known.same_shape(shape):
            return []
        if known is None:
            self._on_rewrite(table, "its first change came through the stream, rows from before it did not")
        else:
            self._say_what_changed(known, shape)
        self._schemas[table] = shape
        at = times.position(event.serial, event.ordinal)
        payload = shape.to_json().encode()
        return [Entry("schema", table, at, at, times.at(event.serial), 0, shape.version, payload)]

    def _shape(self, relation: Relation, known: TableSchema | None) -> TableSchema:
        types = name_types(self._catalog, [(c.type_oid, c.type_modifier) for c in relation.columns])
        columns = tuple(
            Column(column.name, type_, base)
            for column, (type_, base) in zip(relation.columns, types, strict=True)
        )
        table = _table(relation)
        key = tuple(column.name for column in relation.columns if column.is_key)
        if relation.replica_identity == "f":
            key = self._key_of_full(table, key, known)
        if not key:
            raise SourceGap(
                f"Table {table} has lost its key: its changes cannot be told apart.",
                f'Give it a primary key again, or exclude it with "!{table}" and start from scratch.',
            )
        taken = [column.name for column in columns if column.name.lower() in RESERVED]
        if taken:
            raise SourceGap(
                f"Table {table} has a column called {taken[0]}, a name that Headrace uses itself.",
                "Rename the column at the source, or exclude the table.",
            )
        return TableSchema(table, columns, key, known.version + 1 if known else 1)

    def _key_of_full(
        self, table: TableId, columns: tuple[str, ...], known: TableSchema | None
    ) -> tuple[str, ...]:
        """Return the key of a table whose replica identity is all of its `columns`: the catalog knows the
        primary key; where the table is gone, it is the whole row."""
        if known is not None and set(known.key) <= set(columns):
            return known.key
        shape = read_shapes(self._catalog, [table]).get(table)
        return shape.key if shape is not None and set(shape.key) <= set(columns) else columns

    def _say_what_changed(self, known: TableSchema, shape: TableSchema) -> None:
        """Stop at a change that would make one row two; report one that changed rows at rest.

        Raises SourceGap when the key is another: rows already applied are known by the old one.
        """
        if known.key != shape.key:
            raise SourceGap(
                f"The key of table {shape.table} changed from {list(known.key)} to {list(shape.key)}.",
                "Move the state folder and the destination away and run again, which copies everything anew.",
            )
        reason = rewritten(known, shape, filled_columns(self._catalog, shape.table))
        if reason:
            self._on_rewrite(shape.table, reason)
        else:
            logger.info("table %s has another shape now, version %d", shape.table, shape.version)


class _Times:
    """Commit, time and id of transactions by serial."""

    def __init__(self, transactions: Sequence[Transaction], after: int) -> None:
        self._base = transactions[0].serial if transactions else 0
        self._commits = np.array([t.commit for t in transactions], dtype=np.int64)
        self._moments = np.array([t.committed_at for t in transactions], dtype=np.int64)
        self._xids = np.array([t.xid for t in transactions], dtype=np.int64)
        self._after = after
        self._all_fresh = bool((self._commits > after).all())

    def of(self, serials: np.ndarray) -> tuple[pa.Array, pa.Array, pa.Array]:
        """Return commits, commit times (microseconds) and ids, one per serial."""
        at = serials - self._base
        return pa.array(self._commits[at]), pa.array(self._moments[at]), pa.array(self._xids[at])

    def at(self, serial: int) -> int:
        return int(self._moments[max(serial - self._base, 0)])

    def position(self, serial: int, ordinal: int) -> Position:
        return Position(0, int(self._commits[max(serial - self._base, 0)]), ordinal)

    def fresh(self, serial: int) -> bool:
        """Whether the log does not hold this transaction yet."""
        return int(self._commits[serial - self._base]) > self._after

    def keep_fresh(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        if self._all_fresh:
            return batch
        mask = self._commits[batch.column(1).to_numpy() - self._base] > self._after
        return batch.filter(pa.array(mask))


def _table(relation: Relation) -> TableId:
    return TableId(relation.schema, relation.name)
