"""A long history of one table, made without a server: staged through the log, as capture would have it.

`orders` (id, customer_id, amount, status, placed_at) has a key of one column. After an empty copy every order
is inserted once, in order; what is left of the changes are updates (nine of ten) and deletes of orders all
over the table, where an update brings an order back. A transaction changes 50 rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import duckdb
import pyarrow as pa

from headrace.change import Column, CopyMark, Entry, Position, TableId, TableSchema
from headrace.config import load_project
from headrace.lane import Lane
from headrace.payload import encode_rows
from headrace.pipeline import open_lanes

COLUMNS = {
    "id": "bigint",
    "customer_id": "integer",
    "amount": "numeric(12,2)",
    "status": "text",
    "placed_at": "timestamp with time zone",
}
TABLE = TableId("public", "orders")
SHAPE = TableSchema(TABLE, tuple(Column(*item) for item in COLUMNS.items()), ("id",))
_ENTRY = 10_000
_GROUP = 10  # entries
_SMALL = 50  # rows of one transaction

_CHANGES = """
SELECT op AS _op, 1000 + (n // {small}) * 100 AS _commit, n % {small} + 1 AS _ordinal,
  1700000000000000 + n * 1000 AS _committed_at, n // {small} + 700 AS _txid, 1000 + n AS _lsn,
  id::VARCHAR AS id,
  CASE WHEN op <> 'd' THEN (id * 7919 % 100000)::VARCHAR END AS customer_id,
  CASE WHEN op <> 'd' THEN ((hash(n + 1) % 10000000) / 100)::DECIMAL(12,2)::VARCHAR END AS amount,
  CASE WHEN op <> 'd' THEN ['new', 'paid', 'sent', 'back'][(hash(n + 2) % 4)::BIGINT + 1] END AS status,
  CASE WHEN op <> 'd' THEN strftime(
    make_timestamp(1600000000000000 + id * 977001), '%Y-%m-%d %H:%M:%S.%f+00') END AS placed_at
FROM (
  SELECT n, CASE WHEN n < {keys} THEN 'c' WHEN n % 10 = 0 THEN 'd' ELSE 'u' END AS op,
    CASE WHEN n < {keys} THEN n ELSE (hash(n) % {keys})::BIGINT END AS id
  FROM range({first}, {last}) r(n))
"""


def make(folder: Path, changes: int, keys: int, models: dict[str, str]) -> Lane:
    """Make a project with this much staged and nothing applied; `models` are its files by their names, of
    SQL where a name has no ending."""
    (folder / "models").mkdir(parents=True)
    (folder / ".headrace" / "log").mkdir(parents=True)
    (folder / "headrace.toml").write_text('[source.shop]\nurl = "postgresql://nobody@127.0.0.1:1/none"\n')
    for name, text in models.items():
        (folder / "models" / (name if "." in name else f"{name}.sql")).write_text(text)
    (lane,) = open_lanes(load_project(folder))
    at = Position(0, 1, 0)
    for mark in (CopyMark("begin", SHAPE), CopyMark("chunk"), CopyMark("end", floor=1, ceiling=1)):
        lane.log.append([Entry("marker", TABLE, at, at, 1, 0, 1, mark.to_json().encode())])
    extend(lane, 0, changes, keys)
    return lane


def extend(lane: Lane, first: int, last: int, keys: int) -> None:
    """Stage further changes: those from number `first` to before `last`."""
    entries = _entries(first, last, keys)
    while group := list(islice(entries, _GROUP)):
        lane.log.append(group)
        while lane.load():
            pass


def _entries(begin: int, end: int, keys: int) -> Iterator[Entry]:
    with duckdb.connect() as db:
        for first in range(begin, end, _ENTRY):
            last = min(first + _ENTRY, end)
            query = _CHANGES.format(keys=keys, small=_SMALL, first=first, last=last)
            made = db.sql(query).to_arrow_table()
            texts = {name: made[name].cast(pa.string()) for name in made.column_names if name in COLUMNS}
            for name, cells in texts.items():
                made = made.set_column(made.schema.get_field_index(name), name, cells)
            (batch,) = made.combine_chunks().to_batches()
            ends = (batch.slice(0, 1).to_pylist()[0], batch.slice(len(batch) - 1, 1).to_pylist()[0])
            of = [Position(0, row["_commit"], row["_ordinal"]) for row in ends]
            at = ends[1]["_committed_at"]
            yield Entry("rows", TABLE, *of, at, len(batch), 1, encode_rows(batch), (1, 1))
