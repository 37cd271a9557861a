"""Reading rows of a table as the stream would send them.

The text must be what the stream would send, which is what a type's output function gives. A cast to text
is that for most types, and costs less, but not where Postgres has an explicit cast (`true` for `t`,
`1.2.3.4/32` for `1.2.3.4`) or a user made one (for enums, arrays, composites). `format('%s', …)` always is.
Both take a column that has another type meanwhile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from headrace.change import Column, TableId, TableSchema
from headrace.keys import literal
from headrace.sources.postgres.catalog import Connection, qualified, quoted
from headrace.sources.postgres.columns import HASHED

_SAME_AS_OUTPUT = (
    "smallint", "integer", "bigint", "numeric", "real", "double precision", "text", "character varying",
    "date", "timestamp", "time", "interval", "uuid", "json", "jsonb", "bytea",
)  # fmt: skip


def select_text(schema: TableSchema, partitioned: bool, where: str = "") -> str:
    """Return the query that reads a table with every column as the stream would send it, as captured
    (`Policy.shape`) but for hashing, and the rows that meet the condition `where`.

    A table that others inherit from is read without their rows, which are theirs; a partitioned one
    has none of its own.
    """
    cells = ", ".join(f"{_text(column)} AS {quoted(column.name)}" for column in schema.columns)
    table = f"{'' if partitioned else 'ONLY '}{qualified(schema.table)}"
    return f"SELECT {cells} FROM {table}" + (f" WHERE ({where})" if where else "")


def _text(column: Column) -> str:
    name = quoted(column.name)
    bare = column.type.partition("(")[0].removesuffix(" with time zone").removesuffix(" without time zone")
    if bare in _SAME_AS_OUTPUT and not column.base.startswith(HASHED):  # its type is that of the hash
        return f"{name}::text"
    return f"CASE WHEN {name} IS DISTINCT FROM NULL THEN pg_catalog.format('%s', {name}) END"


def partitioned_tables(cursor: Any) -> set[TableId]:
    """Return the partitioned tables, asked over a bulk connection."""
    cursor.execute(
        "SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE c.relkind = 'p'"
    )
    return {TableId(*row) for row in cursor.fetchall()}


def was_rewritten(cursor: Any, table: TableId) -> bool:
    """Whether a table was rewritten or truncated after the snapshot, which then shows it empty.

    Compares the file that the snapshot knows with the one there is now, of every partition; called in
    the transaction of the read, whose lock keeps the answer true.
    """
    cursor.execute(
        f"SELECT count(*) FROM pg_class c WHERE (c.oid = {_literal(table)} OR c.oid IN (SELECT relid "
        f"FROM pg_partition_tree({_literal(table)}))) AND c.relkind = 'r' "
        "AND c.relfilenode <> pg_relation_filenode(c.oid)"
    )
    return bool(cursor.fetchone()[0])


def files_of(db: Connection, table: TableId) -> str:
    """Return what names the files of a table and its partitions: others once it is rewritten or truncated."""
    row = db.execute(
        f"SELECT string_agg(c.oid || ':' || pg_relation_filenode(c.oid), ' ' ORDER BY c.oid) FROM pg_class c "
        f"WHERE c.relkind = 'r' AND (c.oid = {_literal(table)} OR c.oid IN (SELECT relid FROM "
        f"pg_partition_tree({_literal(table)})))".encode()
    ).fetchone()
    return str(row[0]) if row else ""


def as_changes(batch: pa.RecordBatch, commit: int, after: int, now: int) -> pa.RecordBatch:
    """Return copied rows as changes of op `r`: at `commit`, with ordinals from `after` + 1 on."""
    count = batch.num_rows
    head = {
        "_op": pa.repeat("r", count),
        "_commit": pa.repeat(pa.scalar(commit, pa.int64()), count),
        "_ordinal": pa.array(np.arange(after + 1, after + count + 1, dtype=np.int64)),
        "_committed_at": pa.repeat(pa.scalar(now, pa.int64()), count),
        "_txid": pa.repeat(pa.scalar(0, pa.int64()), count),
    }
    cells = {name: batch.column(i).cast(pa.string()) for i, name in enumerate(batch.schema.names)}
    return pa.RecordBatch.from_pydict({**head, **cells})


def _literal(table: TableId) -> str:
    return literal(qualified(table)) + "::regclass"
