"""From log entries to staged rows: the columns that every raw table has, beside the source's own."""

from __future__ import annotations

import pyarrow as pa

from headrace.change import LoggedEntry, TableId, TableSchema
from headrace.payload import BEFORE, HEAD, UNCHANGED, decode_rows
from headrace.staging.naming import logical_name

HISTORY = TableId("", "_history")
"""The internal table that holds the entries which are not rows: shapes, markers of copies, decisions."""

META = {
    "_op": pa.string(),
    "_epoch": pa.int64(),
    "_commit": pa.int64(),
    "_ordinal": pa.int64(),
    "_offset": pa.int64(),
    "_committed_at": pa.int64(),
    "_txid": pa.int64(),
    "_unchanged": UNCHANGED,
    "_before": BEFORE,
}


def staged(item: LoggedEntry) -> pa.Table:
    """Turn one log entry into staged rows, without `_lsn`, which is for who reads the log.

    A truncate is one row of op `t`: everything before it is over.
    """
    entry = item.entry
    if entry.kind in ("rows", "copy"):
        batch = pa.Table.from_batches([decode_rows(entry.payload)])
    else:
        head = ["t", entry.last.commit, entry.last.ordinal, entry.committed_at, 0, 0]
        batch = pa.table({name: [value] for name, value in zip(HEAD, head, strict=True)})
    batch = batch.drop_columns(["_lsn"])
    constant = pa.array([entry.first.epoch, item.offset], pa.int64())
    for name, value in zip(("_epoch", "_offset"), constant, strict=True):
        batch = batch.append_column(name, pa.repeat(value, batch.num_rows))
    return batch


def with_columns(part: pa.Table, columns: dict[str, pa.DataType]) -> pa.Table:
    """Return a part with just these columns; those that it lacks are null."""
    known = set(part.schema.names)
    cells = [
        part[name] if name in known else pa.nulls(part.num_rows, type_) for name, type_ in columns.items()
    ]
    return pa.table(cells, schema=pa.schema(list(columns.items())))


def as_the_source_says(table: pa.Table) -> pa.Table:
    """Return a raw table's columns under the names that the source gave them."""
    return table.rename_columns([logical_name(name) for name in table.column_names])


def no_rows(shape: TableSchema) -> pa.Table:
    """Return a table's columns without a row: the raw table has them from its schema entry on."""
    columns = [(column.name, pa.string()) for column in shape.columns]
    return pa.schema([*columns, *META.items()]).empty_table()


def event_row(item: LoggedEntry) -> pa.Table:
    """Return the row of an entry that is no change: a shape, or a marker of a copy."""
    entry = item.entry
    assert entry.table is not None
    cells = {"kind": entry.kind, "table_schema": entry.table.schema, "table_name": entry.table.name}
    row = staged(item)
    for name, text in {**cells, "content": entry.payload.decode()}.items():
        row = row.append_column(name, pa.array([text]))
    return row
