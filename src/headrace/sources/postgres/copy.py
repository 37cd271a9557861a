"""What is asked of the source for the copy of a table, and what becomes of its rows."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from headrace.change import TableId, TableSchema
from headrace.keys import literal
from headrace.sources.postgres.catalog import Connection, qualified, quoted


def select_rows(schema: TableSchema, partitioned: bool, where: str = "") -> str:
    """Return the query that reads a table's columns that are captured (`Policy.shape`), before hashing, of
    the rows that meet the condition `where`.

    A table that others inherit from is read without their rows, which are theirs; a partitioned one
    has none of its own.
    """
    cells = ", ".join(quoted(column.name) for column in schema.columns)
    table = f"{'' if partitioned else 'ONLY '}{qualified(schema.table)}"
    return f"SELECT {cells} FROM {table}" + (f" WHERE ({where})" if where else "")


def is_partitioned(db: Connection, table: TableId) -> bool:
    """Whether a table has its rows in partitions; one that is gone has not."""
    query = f"SELECT relkind = 'p' FROM pg_class WHERE oid = to_regclass({literal(qualified(table))})"
    row = db.execute(query.encode()).fetchone()
    return row is not None and bool(row[0])


def was_rewritten(db: Connection, table: TableId) -> bool:
    """Whether a table was rewritten or truncated after the snapshot, which then shows it empty.

    Compares the file that the snapshot knows with the one there is now, of every partition; called in
    the transaction of the read, whose lock keeps the answer true.
    """
    query = (
        f"SELECT count(*) FROM pg_class c WHERE (c.oid = {_literal(table)} OR c.oid IN (SELECT relid "
        f"FROM pg_partition_tree({_literal(table)}))) AND c.relkind = 'r' "
        "AND c.relfilenode <> pg_relation_filenode(c.oid)"
    )
    row = db.execute(query.encode()).fetchone()
    return row is not None and bool(row[0])


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
        "_lsn": pa.repeat(pa.scalar(commit, pa.int64()), count),
    }
    return pa.RecordBatch.from_pydict({**head, **dict(zip(batch.schema.names, batch.columns, strict=True))})


def _literal(table: TableId) -> str:
    return literal(qualified(table)) + "::regclass"
