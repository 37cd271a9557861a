"""Postgres types as DuckDB types, and the expression that reads one from its text.

Only faithful conversions: what DuckDB cannot hold exactly (numeric without a scale, intervals,
times with a zone, ranges, composites) stays the source's own text.
"""

from __future__ import annotations

import re

from headrace.change import Column
from headrace.keys import quoted

_PLAIN = {
    "smallint": "SMALLINT",
    "integer": "INTEGER",
    "bigint": "BIGINT",
    "oid": "UINTEGER",
    "real": "FLOAT",
    "double precision": "DOUBLE",
    "boolean": "BOOLEAN",
    "uuid": "UUID",
    "json": "JSON",
    "jsonb": "JSON",
    "date": "DATE",
}
_INTEGRAL = ("smallint", "integer", "bigint", "oid")
_NUMERIC = re.compile(r"numeric\((\d+),(-?\d+)\)")
_TIMESTAMP = re.compile(r"timestamp(\(\d\))? with(out)? time zone")
_TIME = re.compile(r"time(\(\d\))? without time zone")

# An array's text is {a,"b c",NULL}: elements are quoted strings or runs without a comma. More than
# one dimension, or bounds that do not start at 1, fit no DuckDB list: they fail like any bad cast.
_ELEMENTS = (
    "CASE WHEN starts_with({c}, '{{{{') OR starts_with({c}, '[') THEN CAST({c} AS INTEGER[])::VARCHAR[] "
    'ELSE list_transform(regexp_extract_all({c}[2:-2], \'"(?:[^"\\\\]|\\\\.)*"|[^,]+\'), '
    "lambda e: CASE WHEN e = 'NULL' THEN NULL "
    "WHEN e[1] = '\"' THEN regexp_replace(e[2:-2], '\\\\(.)', '\\1', 'g') ELSE e END) END"
)


def duckdb_type(column: Column) -> str:
    """Return the DuckDB type that a mirror gives to a source column."""
    if column.type.endswith("[]"):
        element = Column(column.name, column.type[:-2])
        return f"{duckdb_type(element)}[]" if element.type != "bytea" else "VARCHAR"
    if column.type == "bytea":
        return "BLOB"
    if column.type in _PLAIN:
        return _PLAIN[column.type]
    if match := _NUMERIC.fullmatch(column.type):
        precision, scale = int(match[1]), int(match[2])
        return f"DECIMAL({precision},{scale})" if precision <= 38 and 0 <= scale <= precision else "VARCHAR"
    if match := _TIMESTAMP.fullmatch(column.type):
        return "TIMESTAMP" if match[2] else "TIMESTAMPTZ"
    return "TIME" if _TIME.fullmatch(column.type) else "VARCHAR"


def canonical(type_: str) -> str:
    """Return a type as DuckDB itself prints it."""
    return type_.replace("TIMESTAMPTZ", "TIMESTAMP WITH TIME ZONE")


def mirror_expression(column: Column) -> str:
    """Return the DuckDB expression that reads a source column's text as its mirror type."""
    cell, type_ = quoted(column.name), duckdb_type(column)
    if type_ == "VARCHAR":
        return cell
    if type_ == "BLOB":
        return f"unhex({cell}[3:])"
    if type_.endswith("[]"):
        elements = _ELEMENTS.format(c=cell)
        return elements if type_ == "VARCHAR[]" else f"({elements})::{type_}"
    if type_ == "DATE":
        return f"replace({cell}, ' BC', ' (BC)')::DATE"
    if type_.startswith("TIMESTAMP"):
        years = rf"regexp_replace({cell}, '^(\S+) (.*) BC$', '\1 (BC) \2')"
        return f"(CASE WHEN ends_with({cell}, ' BC') THEN {years} ELSE {cell} END)::{type_}"
    return f"{cell}::{type_}"


def is_whole(source_type: str) -> bool:
    """Whether the values of a source type are whole numbers, each written in one way."""
    return source_type in _INTEGRAL


def cast_keeps_apart(source_type: str, target: str) -> bool:
    """Whether two different source texts of a type always stay different when cast to `target`."""
    if target in {"VARCHAR", "TEXT", "STRING"}:
        return True
    if source_type in _INTEGRAL:
        return target in {"BIGINT", "HUGEINT", "INT8", "LONG"} or target == _PLAIN[source_type]
    return source_type == "uuid" and target == "UUID"
