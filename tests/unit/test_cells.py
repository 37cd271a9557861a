"""Cells of query results, against DuckDB's own words for them."""

from __future__ import annotations

import datetime as dt
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cells import json_of, rows_of

ENGINE = duckdb.connect()


def said_by_duckdb(what: str, cells: pa.Table) -> tuple[Any, ...]:
    ENGINE.register("cells", cells)
    (row,) = ENGINE.execute(f"SELECT {what} FROM cells").fetchall()
    return row


def values(expression: str, more: str = "") -> list[Any]:
    with duckdb.connect() as db:
        db.execute("SET TimeZone = 'UTC'")
        return [row[0] for row in rows_of(db.sql(f"SELECT {expression} AS v {more}").to_arrow_table())]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("'infinity'::TIMESTAMP", "infinity"),
        ("'-infinity'::TIMESTAMPTZ", "-infinity"),
        ("'infinity'::DATE", "infinity"),
        ("'-infinity'::DATE", "-infinity"),
        ("'infinity'::TIMESTAMP_NS", "infinity"),
        ("'infinity'::TIMESTAMP_S", "infinity"),
        ("['-infinity'::DATE, NULL, '2024-01-01']", ["-infinity", None, dt.date(2024, 1, 1)]),
        ("{'a': 'infinity'::TIMESTAMP, 'b': 1}", {"a": "infinity", "b": 1}),
        ("MAP {'a': 'infinity'::TIMESTAMP}", [("a", "infinity")]),
        ("['infinity'::DATE]::DATE[1]", ["infinity"]),
        ("'0044-03-15 (BC)'::DATE", "0044-03-15 BC"),
        ("'0001-12-31 (BC)'::DATE", "0001-12-31 BC"),
        ("'5874897-12-31'::DATE", "5874897-12-31"),
        ("'0044-03-15 (BC) 12:00:00.5'::TIMESTAMP", "0044-03-15T12:00:00.500000 BC"),
        ("'0044-03-15 (BC) 12:00:00+00'::TIMESTAMPTZ", "0044-03-15T12:00:00+00:00 BC"),
        ("'294247-01-10 04:00:54.775806+00'::TIMESTAMPTZ", "294247-01-10T04:00:54.775806+00:00"),
        ("'2024-01-01 00:00:00.000000001'::TIMESTAMP_NS", "2024-01-01T00:00:00.000000001"),
        ("'2024-01-01'::TIMESTAMP", dt.datetime(2024, 1, 1)),
        ("NULL::TIMESTAMP", None),
    ],
)
def test_what_python_cannot_hold_comes_as_text(expression: str, expected: object) -> None:
    found = values(expression)
    assert found == [expected]
    # Beside a value that makes the whole column take the long way, too.
    beside = (
        values(expression, f"UNION ALL SELECT {expression.replace('2024', '20240')}")
        if "NS" not in expression
        else found
    )
    assert beside[0] == expected


def test_rows_past_the_first_batch_have_their_own_parts() -> None:
    found = values(
        "CASE WHEN n % 3 = 0 THEN NULL ELSE [NULL, 'infinity'::DATE, '2024-01-01'::DATE + n::INTEGER] END",
        "FROM range(25_000) r(n)",
    )
    assert [None if v is None else (v[1], v[2]) for v in found] == [
        None if n % 3 == 0 else ("infinity", dt.date(2024, 1, 1) + dt.timedelta(n)) for n in range(25_000)
    ]


@given(st.integers(-(2**31) + 2, 2**31 - 2))
def test_every_date_is_what_duckdb_says(days: int) -> None:
    cells = pa.table({"v": pa.array([days], pa.int32()).cast(pa.date32())})
    expected = said_by_duckdb("v::VARCHAR", cells)
    (row,) = rows_of(cells)
    assert str(row[0]).replace(" BC", " (BC)") == expected[0]


@given(st.integers(-(2**62), 2**63 - 2))
def test_every_moment_is_what_duckdb_says(micros: int) -> None:
    cells = pa.table({"v": pa.array([micros]).cast(pa.timestamp("us"))})
    expected = said_by_duckdb("strftime(v, '%f'), v::VARCHAR", cells)
    (row,) = rows_of(cells)
    text = json_of(row[0]).strip('"')
    day, time, *era = text.replace("T", " ").split(" ")
    clock, _, fraction = time.partition(".")
    assert [day, *(f"({e})" for e in era), clock] == expected[1].partition(".")[0].split(" ")
    assert (fraction or "000000") == expected[0]
