"""Prepared slices applied to a Postgres destination, against a bulk load of the same rows from a file.

Three slices of 300,000 orders, each one transaction with its progress and its ledger. `insert`: new rows;
the rival is COPY from a CSV file into a table with a primary key. `update`: all of them again with other
values; the rival is COPY into a temporary table and INSERT … ON CONFLICT DO UPDATE. Both by psql, each slice
one transaction too. What arrived is compared, outside of the time.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from pyarrow import csv
from rig import TIMEOUT, Case, Rig, by_turns, open_rig

from headrace.cells import rows_of
from headrace.change import Column, Counts, Mark, Position, TableId, TableSchema
from headrace.destinations.postgres import PostgresDestination
from headrace.protocols import Part, Prepared, Slice
from headrace.secret import Secret
from headrace.testing.postgres import clean_environment
from headrace.transform.fold import RECORD
from headrace.transform.model import mirror

CASES = ("insert", "update")
SLICE = 300_000
_LOG = "l" * 32
_COLUMNS = {
    "id": "bigint",
    "customer_id": "integer",
    "status": "text",
    "amount": "numeric(12,2)",
    "note": "text",
    "placed_at": "timestamp with time zone",
}
_MODEL = mirror(
    "shop",
    TableSchema(TableId("public", "orders"), tuple(Column(*item) for item in _COLUMNS.items()), ("id",)),
)
_TABLE = ", ".join(f"{name} {type_}" for name, type_ in _COLUMNS.items())
_SET = ", ".join(f"{name} = EXCLUDED.{name}" for name in _COLUMNS if name != "id")
_FOUND = "SELECT count(*), count(DISTINCT id), min(status), max(status) FROM {}"


def run(*, quick: bool, case: str | None = None) -> dict[str, Any]:
    slices, times = (1, 2) if quick else (3, 5)
    with open_rig() as rig:
        inserted, updated = ([_rows(n, status) for n in range(slices)] for status in ("new", "paid"))
        files = {
            name: [_file(rig.folder / f"{name}{n}.csv", rows) for n, rows in enumerate(made)]
            for name, made in (("insert", inserted), ("update", updated))
        }
        bench = _Bench(rig, {"insert": inserted, "update": updated}, files)
        cases = {name: bench.case(name, times) for name in CASES if case in (None, name)}
    return {"unit": "rows/s", "cases": cases}


class _Bench:
    def __init__(self, rig: Rig, rows: dict[str, list[pa.Table]], files: dict[str, list[Path]]) -> None:
        self._rig, self._rows, self._files = rig, rows, files
        self._made = 0

    def case(self, name: str, times: int) -> Case:
        rival = {
            "insert": "COPY from CSV by psql, with a primary key",
            "update": "COPY from CSV to a temporary table and INSERT … ON CONFLICT, by psql",
        }[name]
        runs = by_turns(
            times,
            {"ours": lambda: {"ours": self._ours(name)}, "rival": lambda: {"rival": self._rival(name)}},
        )
        return rival, runs, {"rows": SLICE * len(self._rows[name])}

    def _ours(self, name: str) -> float:
        self._made += 1
        self._rig.db.execute(f"CREATE DATABASE w{self._made}")
        url = f"{self._rig.server.url.removesuffix('postgres')}w{self._made}"
        destination = PostgresDestination(Secret(url))
        try:
            destination.progress("shop")
            steps = ["insert", name] if name == "update" else [name]
            after = 0
            for step in steps:
                begin = time.monotonic()
                for rows in self._rows[step]:
                    destination.apply(_slice(after, rows))
                    after += 1
                took = time.monotonic() - begin
            (found,) = destination.read([_FOUND.format(destination.table_of(_MODEL.name))])
            self._compare(name, next(rows_of(found)))
        finally:
            destination.close()
            self._rig.db.execute(f"DROP DATABASE w{self._made} WITH (FORCE)")
        return SLICE * len(self._rows[name]) / took

    def _compare(self, name: str, found: tuple[object, ...]) -> None:
        expected = (SLICE * len(self._rows[name]), "paid" if name == "update" else "new")
        assert found == (expected[0], expected[0], expected[1], expected[1]), found

    def _rival(self, name: str) -> float:
        self._rig.db.execute("DROP TABLE IF EXISTS orders")
        self._rig.db.execute(f"CREATE TABLE orders ({_TABLE}, PRIMARY KEY (id))")
        if name == "update":
            self._psql(self._copies("orders", "insert"))
        begin = time.monotonic()
        if name == "insert":
            self._psql(self._copies("orders", name))
        else:
            merge = f"INSERT INTO orders SELECT * FROM fresh ON CONFLICT (id) DO UPDATE SET {_SET};"
            make = "CREATE TEMP TABLE fresh (LIKE orders) ON COMMIT DROP;"
            self._psql([f"BEGIN;\n{make}\n{copy}\n{merge}\nCOMMIT;" for copy in self._copies("fresh", name)])
        return SLICE * len(self._rows[name]) / (time.monotonic() - begin)

    def _copies(self, table: str, name: str) -> list[str]:
        return [rf"\copy {table} FROM '{path}' (FORMAT csv)" for path in self._files[name]]

    def _psql(self, statements: list[str]) -> None:
        subprocess.run(
            [self._rig.server.bin / "psql", "-qX", "-v", "ON_ERROR_STOP=1", "-d", self._rig.server.url],
            input="\n".join(statements),
            text=True,
            check=True,
            timeout=TIMEOUT,
            env=clean_environment(),
        )


def _rows(number: int, status: str) -> pa.Table:
    """Orders as a mirror makes them."""
    first = number * SLICE
    return duckdb.sql(
        f"""SELECT i::BIGINT AS id, (i % 1000)::INTEGER AS customer_id, '{status}' AS status,
        ((i % 100000) / 7.0)::DECIMAL(12,2) AS amount, 'note for order number ' || i AS note,
        TIMESTAMPTZ '2024-01-01 00:00:00+00' + to_seconds(i) AS placed_at
        FROM range({first}, {first + SLICE}) r(i)"""
    ).to_arrow_table()


def _file(path: Path, rows: pa.Table) -> Path:
    csv.write_csv(rows, path, csv.WriteOptions(include_header=False))
    return path


def _slice(after: int, rows: pa.Table) -> Slice:
    keys = rows["id"].cast(pa.string())
    prepared = Prepared(
        reset=False,
        removed=keys.combine_chunks(),
        rows=rows.add_column(0, "_source_key", keys),
        records=RECORD.empty_table(),
        counts=Counts(read=rows.num_rows, applied=rows.num_rows),
    )
    marks = Mark(_LOG, after, str(after)), Mark(_LOG, after + 1, str(after + 1))
    return Slice("shop", *marks, Position(0, after + 1, 1), 0, (Part(_MODEL, prepared, True),))
