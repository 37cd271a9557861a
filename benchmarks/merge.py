"""A slice of 10,000 changes applied to a table of 30 million rows, against the same to one of a million.

`recent`: to keys among the newest 1 %; `scattered`: over all. Each slice changes rows that are there, and is
one transaction with its progress and its ledger. What arrived is compared, outside of the time. The ratio is
how much longer a change takes as the table grows; `seconds` are those of the large table.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from rig import Case, Rig, open_rig

from headrace.cells import rows_of
from headrace.change import Column, Counts, Mark, Position, TableId, TableSchema
from headrace.destinations.database import Database
from headrace.destinations.duckdb import DuckDBDestination
from headrace.destinations.postgres import PostgresDestination
from headrace.protocols import Part, Prepared, Slice
from headrace.secret import Secret
from headrace.transform.fold import RECORD
from headrace.transform.model import mirror

CASES = ("duckdb_recent", "duckdb_scattered", "postgres_recent", "postgres_scattered")
LARGE, SMALL = 30_000_000, 1_000_000
CHANGES = 10_000
_QUICK = 10  # times smaller, tables and slices
_FILL = 1_000_000  # rows that the table is filled with at a time
_LOG = "l" * 32
_COLUMNS = {
    "id": "bigint",
    "customer_id": "integer",
    "status": "text",
    "amount": "numeric(12,2)",
    "placed_at": "timestamp with time zone",
}
_MODEL = mirror(
    "shop",
    TableSchema(TableId("public", "orders"), tuple(Column(*item) for item in _COLUMNS.items()), ("id",)),
)


def run(*, quick: bool, case: str | None = None) -> dict[str, Any]:
    divisor, times = (_QUICK, 3) if quick else (1, 7)
    cases: dict[str, Case] = {}
    with open_rig() as rig:
        for name in CASES:
            if case in (None, name):
                cases[name] = measure(
                    rig, name, LARGE // divisor, SMALL // divisor, CHANGES // divisor, times
                )
    return {"unit": "s", "cases": cases}


def measure(rig: Rig, case: str, large: int, small: int, changes: int, times: int) -> Case:
    """Return the runs of a case: tables of `large` and `small` rows, slices of so many `changes`."""
    engine, _, where = case.partition("_")
    seconds: dict[int, list[float]] = {}
    for size in (small, large):
        with _filled(rig, engine, size) as destination:
            seconds[size] = _Applying(destination, size).times(where, changes, times)
    runs = [
        {"ours": ours, "rival": rival} for ours, rival in zip(seconds[large], seconds[small], strict=True)
    ]
    extra = {"rows": large, "changes": changes, "seconds": round(statistics.median(seconds[large]), 3)}
    return f"the same to {small:,} rows", runs, extra


class _Applying:
    """A table of `size` rows, ids 0 to size - 1, and slices of changes to it."""

    def __init__(self, destination: Database, size: int) -> None:
        self._destination, self._size = destination, size
        self._after = destination.progress("shop")
        self._chance = np.random.default_rng(1)

    def times(self, where: str, changes: int, times: int) -> list[float]:
        """Return the seconds of so many slices; one more before them is not counted."""
        first = self._size - self._size // 100 if where == "recent" else 0
        measured = []
        for turn in range(times + 1):
            ids = self._chance.choice(
                np.arange(first, self._size), min(changes, self._size - first), replace=False
            )
            assert self._after is not None
            work = _slice(self._after, _rows(ids, f"turn {turn}"))
            begin = time.monotonic()
            self._destination.apply(work)
            measured.append(time.monotonic() - begin)
            self._after = work.through
            self._compare(f"turn {turn}", len(ids))
        return measured[1:]

    def _compare(self, status: str, changed: int) -> None:
        target = self._destination.table_of(_MODEL.name)
        query = f"SELECT count(*), count(*) FILTER (WHERE status = '{status}') FROM {target}"
        (found,) = self._destination.read([query])
        assert next(rows_of(found)) == (self._size, changed)


@contextmanager
def _filled(rig: Rig, engine: str, size: int) -> Iterator[Database]:
    """Give a destination whose table came by slices, as a copy does, and that has come to rest."""
    name = f"{engine}_{size}"
    path = rig.folder / f"{name}.duckdb"
    destination: Database
    if engine == "duckdb":
        destination = DuckDBDestination(path, spill=rig.folder / "spill")
    else:
        rig.db.execute(f"CREATE DATABASE {name}")
        destination = PostgresDestination(Secret(f"{rig.server.url.removesuffix('postgres')}{name}"))
    try:
        after = Mark(_LOG, 0, "0")
        for first in range(0, size, _FILL):
            work = _slice(after, _rows(np.arange(first, min(first + _FILL, size)), "new"), new=True)
            destination.apply(work)
            after = work.through
        if engine == "postgres":
            with destination.open() as db:
                db.execute("VACUUM ANALYZE")
                db.execute("CHECKPOINT")
        yield destination
    finally:
        destination.close()
        path.unlink(missing_ok=True)
        if engine == "postgres":
            rig.db.execute(f"DROP DATABASE {name} WITH (FORCE)")


def _rows(ids: np.ndarray[Any, Any], status: str) -> pa.Table:
    """Orders as a mirror makes them, in the order of `ids`."""
    _given = pa.table({"i": ids})  # the engine finds it by its name
    return duckdb.sql(
        f"""SELECT i::BIGINT AS id, (i % 1000)::INTEGER AS customer_id, '{status}' AS status,
        ((i % 100000) / 7.0)::DECIMAL(12,2) AS amount,
        TIMESTAMPTZ '2024-01-01 00:00:00+00' + to_seconds(i) AS placed_at FROM _given"""
    ).to_arrow_table()


def _slice(after: Mark, rows: pa.Table, *, new: bool = False) -> Slice:
    keys = rows["id"].cast(pa.string())
    prepared = Prepared(
        reset=False,
        removed=(keys.slice(0, 0) if new else keys).combine_chunks(),
        rows=rows.add_column(0, "_source_key", keys),
        records=RECORD.empty_table(),
        counts=Counts(read=rows.num_rows, applied=rows.num_rows),
    )
    through = Mark(_LOG, after.offset + 1, str(after.offset + 1))
    position = Position(0, through.offset, 1)
    return Slice("shop", after, through, position, 0, (Part(_MODEL, prepared, True),))
