"""From log entries to staged rows: the columns that every raw table has, beside the source's own."""

from __future__ import annotations

import pyarrow as pa

from headrace.change import LoggedEntry, TableId, TableSchema
from headrace.payload import BEFORE, HEAD, UNCHANGED, decode_rows
from headrace.payload import UNDECODABLE as MESSAGES
from headrace.staging.naming import logical_name

HISTORY = TableId("", "_history")
"""The internal table that holds the entries which are not rows: shapes, markers of copies, decisions."""

UNDECODABLE = TableId("", "_undecodable")
"""The internal table of what could not be decoded, as bytes, of all tables: see `undecodable`."""

INTERNAL = (HISTORY, UNDECODABLE)
"""Tables that the source does not have."""

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


def undecodable(item: LoggedEntry) -> pa.Table:
    """Turn an entry that cannot be decoded into rows of the internal table: the source's messages, each
    a row, or the payload of changes, all of them one row, whose columns are as in `headrace.payload`, and:

        table_schema, table_name   string
        changes                    int64    how many changes of the log's count it stands for
    """
    entry = item.entry
    assert entry.table is not None
    if entry.kind == "undecodable":
        messages = pa.Table.from_batches([decode_rows(entry.payload)])
        changes = pa.repeat(pa.scalar(1, pa.int64()), messages.num_rows)
    else:
        place = {"_commit": entry.first.commit, "_ordinal": entry.first.ordinal}
        what = {"kind": entry.kind, "why": "an entry of the log does not decode", "message": entry.payload}
        row = {"_op": "r" if entry.kind == "copy" else None, **place, **what, "_lsn": 0}
        row |= {"_committed_at": entry.committed_at, "_txid": entry.txids[1]}
        messages = pa.Table.from_pylist([row], MESSAGES)
        changes = pa.array([entry.rows], pa.int64())
    count = messages.num_rows
    table = {"table_schema": entry.table.schema, "table_name": entry.table.name}
    place = {"_epoch": entry.first.epoch, "_offset": item.offset}
    for name, value in {**table, **place}.items():
        messages = messages.append_column(name, pa.repeat(value, count))
    return messages.append_column("changes", changes)


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
