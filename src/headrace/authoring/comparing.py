"""Holding the rows that a query returns against those that a test expects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import duckdb

from headrace.authoring.cases import Case
from headrace.cells import json_of, rows_of
from headrace.errors import UserError
from headrace.keys import quoted
from headrace.transform.kind import PLACE
from headrace.transform.nulling import NULLED


def compared(case: Case, types: Mapping[str, str]) -> tuple[str, ...]:
    """Return which output columns a test compares. Raises UserError for one that is not among `types`."""
    names = case.columns or tuple(name for name in types if name not in PLACE | NULLED)
    for name in {*names, *(name for row in case.expect for name in row)} - set(types):
        raise UserError(f"The model has no output column {name}.", f"It has: {', '.join(types)}.")
    return names


def fill(
    db: duckdb.DuckDBPyConnection,
    table: str,
    types: Mapping[str, str],
    what: str,
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Make a table (quoted) of these columns, and insert rows, whose missing cells are null.

    Raises UserError, naming the row as `what`, for one that does not fit the types.
    """
    columns = ", ".join(f"{quoted(name)} {type_}" for name, type_ in types.items())
    db.execute(f"CREATE OR REPLACE TABLE {table} ({columns})")
    marks = ", ".join(f"CAST(? AS {type_})" for type_ in types.values())
    for i, row in enumerate(rows, 1):
        try:
            db.execute(f"INSERT INTO {table} SELECT {marks}", [row.get(name) for name in types])
        except duckdb.Error as error:
            words = str(error).splitlines()[0]
            raise UserError(f"{what} {i} does not fit the model's types: {words}") from error


def differences(
    db: duckdb.DuckDBPyConnection,
    query: str,
    types: Mapping[str, str],
    expect: Sequence[Mapping[str, Any]],
    key: Sequence[str],
) -> Iterator[str]:
    """Yield each way in which the rows of a query, cast to `types`, are not those that are expected.

    Their order does not count; a row that differs is told cell by cell where the columns `key` name it.
    """
    names = tuple(types)
    fill(db, "_hr_expected", types, "expected row", expect)
    fill(db, "_hr_found", types, "found row", ())
    db.execute(f"INSERT INTO _hr_found SELECT {', '.join(map(quoted, names))} FROM ({query})")
    found, expected = (_texts(db, table) for table in ("_hr_found", "_hr_expected"))
    unexpected = list((Counter(found) - Counter(expected)).elements())
    missing = list((Counter(expected) - Counter(found)).elements())
    at = [names.index(name) for name in key if name in names]
    for row in list(missing) if at else ():
        place = [row[i] for i in at]
        other = next((other for other in unexpected if [other[i] for i in at] == place), None)
        if other is None:
            continue
        missing.remove(row)
        unexpected.remove(other)
        cells = (
            f"{name} is {is_}, expected {wanted}"
            for name, is_, wanted in zip(names, other, row, strict=True)
            if is_ != wanted
        )
        yield f"{_shown([names[i] for i in at], place)}: {'; '.join(cells)}"
    yield from (f"missing: {_shown(names, row)}" for row in missing)
    yield from (f"unexpected: {_shown(names, row)}" for row in unexpected)


def _texts(db: duckdb.DuckDBPyConnection, table: str) -> list[tuple[str, ...]]:
    """Return the rows of a table as texts, by which two of the same type are the same value."""
    rows = db.sql(f"FROM {table}").to_arrow_table()
    return [tuple("null" if cell is None else json_of(cell) for cell in row) for row in rows_of(rows)]


def _shown(names: Sequence[str], cells: Sequence[str]) -> str:
    return " ".join(f"{name}={cell}" for name, cell in zip(names, cells, strict=True))
