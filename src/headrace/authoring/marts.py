"""Binding marts without a destination: to empty tables with the columns that models put out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import duckdb

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
            _make(db, name, columns)
        for mart in ordered:
            if dialect != "duckdb":
                yield Bound(mart.name, {}, f"only {dialect} itself can bind its SQL")
                continue
            yield _bind(db, mart)


def _bind(db: duckdb.DuckDBPyConnection, mart: Mart) -> Bound:
    try:
        rows = db.execute(f"DESCRIBE {mart.query}").fetchall()
    except duckdb.CatalogException as error:
        words = _words(error)
        return Bound(mart.name, {}, words, fault=not words.startswith("Catalog Error: Table with name"))
    except duckdb.Error as error:
        return Bound(mart.name, {}, _words(error), fault=True)
    columns = {str(row[0]): str(row[1]) for row in rows}
    _make(db, mart.name, columns)
    return Bound(mart.name, columns)


def _make(db: duckdb.DuckDBPyConnection, name: str, columns: Columns) -> None:
    schema, dot, table = name.partition(".")
    if dot:
        db.execute(f"CREATE SCHEMA IF NOT EXISTS {quoted(schema)}")
    place = f"{quoted(schema)}.{quoted(table)}" if dot else quoted(name)
    listed = ", ".join(f"{quoted(column)} {type_}" for column, type_ in columns.items())
    db.execute(f"CREATE TABLE {place} ({listed})")


def _words(error: duckdb.Error) -> str:
    return str(error).split("\n\nLINE")[0].split("\nDid you mean")[0].strip().replace("\n", " ")
