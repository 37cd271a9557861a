"""The initial copy: every row of every table under one snapshot, as text.

The text must be what the stream would send, which is what a type's output function gives. A cast to text
is that for most types, and costs less, but not where Postgres has an explicit cast (`true` for `t`,
`1.2.3.4/32` for `1.2.3.4`) or a user made one (for enums, arrays, composites). `format('%s', …)` always is.
Both take a column that has another type meanwhile.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from headrace.change import Column, Entry, Position, TableId, TableSchema
from headrace.errors import SourceUnavailable
from headrace.failpoints import failpoint
from headrace.payload import encode_rows
from headrace.sources.postgres.catalog import qualified, quoted
from headrace.sources.postgres.undecodable import Undecodable

_SAME_AS_OUTPUT = (
    "smallint", "integer", "bigint", "numeric", "real", "double precision", "text", "character varying",
    "date", "timestamp", "time", "interval", "uuid", "json", "jsonb", "bytea",
)  # fmt: skip


def select_text(schema: TableSchema, partitioned: bool) -> str:
    """Return the query that reads a table with every column as the stream would send it.

    A table that others inherit from is read without their rows, which are theirs; a partitioned one
    has none of its own.
    """
    cells = ", ".join(f"{_text(column)} AS {quoted(column.name)}" for column in schema.columns)
    return f"SELECT {cells} FROM {'' if partitioned else 'ONLY '}{qualified(schema.table)}"


def _text(column: Column) -> str:
    name = quoted(column.name)
    bare = column.type.partition("(")[0].removesuffix(" with time zone").removesuffix(" without time zone")
    if bare in _SAME_AS_OUTPUT:
        return f"{name}::text"
    return f"CASE WHEN {name} IS DISTINCT FROM NULL THEN pg_catalog.format('%s', {name}) END"


def partitioned_tables(cursor: Any) -> set[TableId]:
    """Return the partitioned tables, asked over a bulk connection."""
    cursor.execute(
        "SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE c.relkind = 'p'"
    )
    return {TableId(*row) for row in cursor.fetchall()}


def copy_tables(bulk: Any, shapes: Sequence[TableSchema], commit: int) -> Iterator[Sequence[Entry]]:
    """Yield groups that hold every row of the tables as of the snapshot that `bulk` has adopted.

    Each table begins with a marker, before which nothing of it counts any more: an interrupted copy
    is made good by the next one. `commit` is the snapshot's consistent point; rows take the
    positions (0, commit, n).
    """
    now = time.time_ns() // 1000
    ordinal = 0
    undecodable = Undecodable()
    with bulk.cursor() as cursor:
        partitioned = partitioned_tables(cursor)
        for shape in shapes:
            at = Position(0, commit, ordinal)
            begin = json.dumps({"marker": "copy_begin"}).encode()
            yield [
                Entry("schema", shape.table, at, at, now, 0, shape.version, shape.to_json().encode()),
                Entry("marker", shape.table, at, at, now, 1, shape.version, begin),
            ]
            cursor.execute(select_text(shape, shape.table in partitioned))
            for batch in cursor.fetch_record_batch():
                if batch.num_rows:
                    batch = undecodable.escape(shape.table, batch)  # noqa: PLW2901
                    yield [_rows(shape.table, shape.version, batch, commit, ordinal, now)]
                    ordinal += batch.num_rows
                    failpoint("source.copy.batch")
            _was_not_rewritten(cursor, shape.table)
        end = Position(0, commit, ordinal)
        payload = json.dumps({"marker": "copy_end"}).encode()
        yield [Entry("marker", None, end, end, now, 0, 0, payload)]


def _was_not_rewritten(cursor: Any, table: TableId) -> None:
    """Refuse a table that was rewritten or truncated after the snapshot, which shows it empty then.

    Compares the file that the snapshot knows with the one there is now, while the lock of the read
    still holds. Raises SourceUnavailable: the copy begins again.
    """
    name = "'" + qualified(table).replace("'", "''") + "'::regclass"
    cursor.execute(
        f"SELECT count(*) FROM pg_class c WHERE (c.oid = {name} OR c.oid IN (SELECT relid FROM "
        f"pg_partition_tree({name}))) AND c.relkind = 'r' AND c.relfilenode <> pg_relation_filenode(c.oid)"
    )
    if cursor.fetchone()[0]:
        raise SourceUnavailable(f"Table {table} was rewritten during its copy.", "The copy begins again.")


def _rows(table: TableId, version: int, batch: pa.RecordBatch, commit: int, after: int, now: int) -> Entry:
    count = batch.num_rows
    head = {
        "_op": pa.repeat("r", count),
        "_commit": pa.repeat(pa.scalar(commit, pa.int64()), count),
        "_ordinal": pa.array(range(after + 1, after + count + 1), pa.int64()),
        "_committed_at": pa.repeat(pa.scalar(now, pa.int64()), count),
        "_txid": pa.repeat(pa.scalar(0, pa.int64()), count),
    }
    cells = {name: batch.column(i).cast(pa.string()) for i, name in enumerate(batch.schema.names)}
    full = pa.RecordBatch.from_pydict({**head, **cells})
    first, last = Position(0, commit, after + 1), Position(0, commit, after + count)
    return Entry("rows", table, first, last, now, count, version, encode_rows(full))
