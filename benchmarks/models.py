"""A model's expressions through prepare, against the same SELECT in DuckDB.

`casts8`: eight casts of text cells. Ours is what a slice goes through between staging and the destination:
the last change of each key, rows that fail set apart, checks, counts. The rival is DuckDB alone: its settings
as they come, the plain casts, which one bad cell would make fail as a whole. Both read the same Arrow tables
in memory and return Arrow tables, slice by slice.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from rig import Case, by_turns

from headrace.change import Column, TableId, TableSchema
from headrace.transform.model import RowModel, bind
from headrace.transform.sql import read_model

CASES = ("casts8",)
SLICE = 300_000
_CASTS = {
    "id": "BIGINT",
    "customer_id": "INTEGER",
    "amount": "DECIMAL(12,2)",
    "weight": "DOUBLE",
    "placed_on": "DATE",
    "placed_at": "TIMESTAMPTZ",
    "gift": "BOOLEAN",
    "units": "SMALLINT",
}
_OUTPUTS = ", ".join(f"{name}::{type_} AS {name}" for name, type_ in _CASTS.items())
_SELECT = f"SELECT {_OUTPUTS} FROM {{}}"


def run(*, quick: bool, case: str | None = None) -> dict[str, Any]:
    slices, times = (1, 2) if quick else (7, 5)
    measured = _casts(slices, times)
    return {"unit": "rows/s", "cases": {name: measured for name in CASES if case in (None, name)}}


def _casts(slices: int, times: int) -> Case:
    changes = [changes_of(n * SLICE, SLICE) for n in range(slices)]
    model = eight_casts()
    made = model.prepare(changes[0])
    assert made.rows.drop_columns("_source_key").equals(_plain(changes[0])), "they make different rows"
    runs = by_turns(
        times,
        {
            "ours": lambda: {"ours": _speed(changes, lambda part: model.prepare(part).rows)},
            "rival": lambda: {"rival": _speed(changes, _plain)},
        },
    )
    return "the same SELECT in DuckDB, plain casts", runs, {"rows": slices * SLICE}


def _speed(changes: list[pa.Table], work: Any) -> float:
    begin = time.monotonic()
    rows = sum(work(part).num_rows for part in changes)
    assert rows == sum(part.num_rows for part in changes)
    return float(rows / (time.monotonic() - begin))


def _plain(changes: pa.Table) -> pa.Table:
    with duckdb.connect() as db:
        db.execute("SET TimeZone = 'UTC'")
        db.register("changes", changes)
        return db.sql(_SELECT.format("changes")).to_arrow_table()


def eight_casts() -> RowModel:
    """Return a model of eight casts."""
    shape = TableSchema(TableId("public", "orders"), tuple(Column(name, "text") for name in _CASTS), ("id",))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "orders.sql"
        path.write_text(_SELECT.format("raw.shop.orders"))
        return bind(read_model(path), shape)


def changes_of(first: int, rows: int) -> pa.Table:
    """Inserts of so many orders, as staging has them."""
    made = duckdb.sql(
        f"""SELECT i::VARCHAR AS id, (i % 1000)::VARCHAR AS customer_id,
        ((hash(i) % 10000000) / 100)::DECIMAL(12,2)::VARCHAR AS amount,
        (hash(i) % 100000 / 7)::VARCHAR AS weight,
        (DATE '2020-01-01' + (i % 2000)::INTEGER)::VARCHAR AS placed_on,
        strftime(make_timestamp(1600000000000000 + i * 977001), '%Y-%m-%d %H:%M:%S.%f+00') AS placed_at,
        CASE WHEN i % 3 = 0 THEN 't' ELSE 'f' END AS gift, (i % 90)::VARCHAR AS units,
        'c' AS _op, 0::BIGINT AS _epoch, i AS _commit, 1::BIGINT AS _ordinal, i AS _offset,
        1700000000000000 + i AS _committed_at, i AS _txid
        FROM range({first}, {first + rows}) r(i)"""
    ).to_arrow_table()
    made = made.append_column("_unchanged", pa.nulls(rows, pa.list_(pa.string())))
    return made.append_column("_before", pa.nulls(rows, pa.map_(pa.string(), pa.string())))
