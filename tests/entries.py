"""Entries of a log as capture makes them, for tests of what reads it.

A transaction's id is its commit plus 700, it was committed `commit` seconds after 1970, and the LSN of a
change is its commit less 50 plus its ordinal.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import pyarrow as pa

from headrace.change import Column, Entry, Position, TableId, TableSchema
from headrace.keyfilter import key_filter
from headrace.payload import BEFORE, HEAD, UNCHANGED, encode_rows

SECOND = 1_000_000


def shape(table: TableId, *columns: str, key: Sequence[str] = ("id",), version: int = 1) -> TableSchema:
    return TableSchema(table, tuple(Column(name, "text") for name in columns), tuple(key), version)


def schema(commit: int, of: TableSchema) -> Entry:
    at = Position(0, commit, 0)
    return Entry("schema", of.table, at, at, commit * SECOND, 0, of.version, of.to_json().encode())


def rows(of: TableSchema, changes: Sequence[tuple[object, ...]], kind: str = "rows") -> Entry:
    """Make an entry; a change is op, commit, ordinal, cells, maybe unchanged ones and a map before."""
    filled = [(*change, None, None)[:6] for change in changes]
    ops, commits, ordinals, cells, unchanged, before = zip(*filled, strict=True)
    head = [
        pa.array(ops, pa.string()),
        pa.array(commits, pa.int64()),
        pa.array(ordinals, pa.int64()),
        pa.array([commit * SECOND for commit in commits], pa.int64()),
        pa.array([0 if kind == "copy" else commit + 700 for commit in commits], pa.int64()),
        pa.array([commit - 50 + ordinal for commit, ordinal in zip(commits, ordinals, strict=True)]),
    ]
    names = [column.name for column in of.columns]
    columns = [pa.array([row[i] for row in cells], pa.string()) for i in range(len(names))]
    batch = pa.RecordBatch.from_arrays([*head, *columns], names=[*HEAD, *names])
    if any(unchanged):
        batch = batch.append_column("_unchanged", pa.array(unchanged, UNCHANGED))
    if any(before):
        maps = [None if cell is None else list(cell.items()) for cell in before]
        batch = batch.append_column("_before", pa.array(maps, BEFORE))
    first, last = (Position(0, commits[i], ordinals[i]) for i in (0, -1))
    txids = (0, 0) if kind == "copy" else (min(commits) + 700, max(commits) + 700)
    return Entry(
        kind, of.table, first, last, commits[-1] * SECOND, len(filled), of.version, encode_rows(batch), txids,
        filter=key_filter(batch, of.key),
    )  # fmt: skip


def message(commit: int, prefix: str, content: str, ordinal: int = 0) -> Entry:
    at = Position(0, commit, ordinal)
    told = {"prefix": prefix, "content": content, "lsn": commit - 9, "txid": commit + 700}
    payload = json.dumps(told).encode()
    return Entry("message", None, at, at, commit * SECOND, 0, 0, payload, (commit + 700, commit + 700))


def truncate(of: TableSchema, commit: int, ordinal: int = 1) -> Entry:
    at = Position(0, commit, ordinal)
    payload = json.dumps({"lsn": commit - 5, "txid": commit + 700}).encode()
    txids = (commit + 700, commit + 700)
    return Entry("truncate", of.table, at, at, commit * SECOND, 1, of.version, payload, txids)
