"""Marts without a destination: bound to empty tables with the columns that models put out, and tested over
given rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

import duckdb

from headrace.authoring.cases import Case
from headrace.authoring.comparing import compared, differences, fill
from headrace.errors import UserError
from headrace.keys import quoted
from headrace.mart import Mart
from headrace.transform.mart import in_order

_MAIN = "main"

Columns = Mapping[str, str]
"""The columns of a table, with their types in DuckDB's words."""


class Bound(NamedTuple):
    """A mart: the columns that it puts out, or why it cannot be bound, which may be a `fault` of its own."""

    mart: str
    columns: Columns
    unbound: str = ""
    fault: bool = False


def bind_marts(marts: list[Mart], tables: Mapping[str, Columns], dialect: str) -> Iterator[Bound]:
    """Bind marts in the order of what they read, `tables` being those of models and mirrors by name.

    A mart that reads a table of the user's own cannot be bound, nor one in another engine's SQL: that is no
    fault, and so is none what reads it. Marts in a circle are faults.
    """
    ordered, circles = in_order(marts, _MAIN)
    for mart in marts:
        if mart not in ordered:
            circle = next(found for found in circles if mart.name in found.split(" → "))
            yield Bound(mart.name, {}, f"{mart.name} reads itself: {circle}", fault=True)
    with duckdb.connect() as db:
        for name, columns in tables.items():
            fill(db, _place(db, name), columns, "", ())
        for mart in ordered:
            if dialect != "duckdb":
                yield Bound(mart.name, {}, f"only {dialect} itself can bind its SQL")
                continue
            yield _bind(db, mart)


def judge_mart(case: Case, mart: Mart, tables: Mapping[str, Columns]) -> Iterator[str]:
    """Run one test of a mart; yield each way in which it fails. `tables` are those whose columns are known.

    Raises UserError for a test that names what is not there, and for a query that fails.
    """
    if case.given or case.quarantine:
        raise UserError(
            "The test of a mart gives rows by table, and has no quarantine.",
            "Write given.TABLE = [{ id = 1 }] for each table that it reads.",
        )
    with duckdb.connect() as db:
        db.execute("SET TimeZone = 'UTC'")
        for name in dict.fromkeys([*case.inputs, *(name for name in mart.reads if name in tables)]):
            rows = case.inputs.get(name, ())
            if name not in tables:
                raise UserError(
                    f"The columns of {name} are not known.",
                    f'Give them in the file, tables = {{ "{name}" = {{ id = "BIGINT" }} }}, or record what '
                    "models read: `headrace ci --record`.",
                )
            _check_cells(name, tables[name], rows)
            fill(db, _place(db, name), tables[name], f"given row of {name}", rows)
        try:
            types = {str(row[0]): str(row[1]) for row in db.execute(f"DESCRIBE {mart.query}").fetchall()}
            names = compared(case, types)
            chosen = {name: types[name] for name in names}
            yield from differences(db, mart.query, chosen, case.expect, names[:1])
        except duckdb.Error as error:
            raise UserError(f"{mart.name} fails on these rows: {_words(error)}") from error


def _check_cells(table: str, columns: Columns, rows: Sequence[Mapping[str, Any]]) -> None:
    for name in {name for row in rows for name in row} - set(columns):
        near = get_close_matches(name, columns, 1)
        hint = f'Did you mean "{near[0]}"?' if near else f"It has: {', '.join(columns)}."
        raise UserError(f"Given rows of {table}: it has no column {name}.", hint)


def _bind(db: duckdb.DuckDBPyConnection, mart: Mart) -> Bound:
    try:
        rows = db.execute(f"DESCRIBE {mart.query}").fetchall()
    except duckdb.CatalogException as error:
        words = _words(error)
        return Bound(mart.name, {}, words, fault=not words.startswith("Catalog Error: Table with name"))
    except duckdb.Error as error:
        return Bound(mart.name, {}, _words(error), fault=True)
    columns = {str(row[0]): str(row[1]) for row in rows}
    fill(db, _place(db, mart.name), columns, "", ())
    return Bound(mart.name, columns)


def _place(db: duckdb.DuckDBPyConnection, name: str) -> str:
    """Return the quoted path of a table, whose schema is made if need be."""
    schema, dot, table = name.partition(".")
    if not dot:
        return quoted(name)
    db.execute(f"CREATE SCHEMA IF NOT EXISTS {quoted(schema)}")
    return f"{quoted(schema)}.{quoted(table)}"


def _words(error: duckdb.Error) -> str:
    return str(error).split("\n\nLINE")[0].split("\nDid you mean")[0].strip().replace("\n", " ")
