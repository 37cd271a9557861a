"""DuckDB's types and values in Postgres, exactly, as the text that COPY takes.

Text, since Postgres reads every type from it: what binary formats have no place for, such as `infinity`
in a driver's timestamps, would arrive as another value and nobody would be told.
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Iterator, Mapping, Sequence

import duckdb
import pyarrow as pa
from pyarrow import csv

from headrace.change import Column
from headrace.keys import literal, quoted
from headrace.pgtypes import mirror_expression

_SAME = {
    "BOOLEAN": "boolean",
    "TINYINT": "smallint",
    "SMALLINT": "smallint",
    "INTEGER": "integer",
    "BIGINT": "bigint",
    "UTINYINT": "smallint",
    "USMALLINT": "integer",
    "UINTEGER": "bigint",
    "FLOAT": "real",
    "DOUBLE": "double precision",
    "VARCHAR": "text",
}
"""Types whose values Arrow writes as Postgres reads them."""

_AS_TEXT = {
    "UBIGINT": "numeric(20,0)",
    "HUGEINT": "numeric(39,0)",
    "UHUGEINT": "numeric(39,0)",
    "UUID": "uuid",
    "DATE": "date",
    "TIME": "time without time zone",
    "TIMESTAMP": "timestamp without time zone",
    "TIMESTAMP_S": "timestamp without time zone",
    "TIMESTAMP_MS": "timestamp without time zone",
    "TIMESTAMP WITH TIME ZONE": "timestamp with time zone",
    "INTERVAL": "interval",
    "BLOB": "bytea",
    "JSON": "json",
    # Finer than a microsecond, which Postgres' own types are not.
    "TIMESTAMP_NS": "text",
    "TIME_NS": "text",
}
_DECIMAL = re.compile(r"DECIMAL\((\d+),(\d+)\)")
_LIST = re.compile(r"(.*)\[\d*\]", re.DOTALL)
_NESTED = re.compile(r"(STRUCT|MAP|UNION|VARIANT)\b.*", re.DOTALL)

_FIRST_DAY, _LAST_DAY = "'4713-11-24 (BC)'", "'5874897-12-31'"
"""Between these are Postgres' dates; its timestamps end later than DuckDB's."""
_local = threading.local()

_BATCH = 32_768
"""Rows that are written to a COPY at a time."""


def postgres_type(type_: str) -> str | None:
    """Return the Postgres type that holds all values of a DuckDB type (but for `limits`), as Postgres
    prints it; None if there is none."""
    if type_ in _SAME or type_ in _AS_TEXT:
        return _SAME.get(type_) or _AS_TEXT[type_]
    if match := _DECIMAL.fullmatch(type_):
        return f"numeric({match[1]},{match[2]})"
    if type_.startswith("ENUM("):
        return "text"
    if match := _LIST.fullmatch(type_):
        element = postgres_type(match[1])
        # The lists in a list may be of different lengths, which an array's dimensions cannot be.
        nested = element is None or element == "json" or element.endswith("[]")
        return "json" if nested and element else element and f"{element}[]"
    return "json" if _NESTED.fullmatch(type_) else None


def limit(cell: str, type_: str) -> str | None:
    """Return the DuckDB condition of the values of a type that Postgres takes; None if it takes all."""
    if type_ == "VARCHAR":
        return f"NOT contains({cell}, chr(0))"
    if type_ == "DATE":
        return f"NOT isfinite({cell}) OR {cell} BETWEEN {_FIRST_DAY}::DATE AND {_LAST_DAY}::DATE"
    if type_ in ("TIMESTAMP", "TIMESTAMP_S", "TIMESTAMP_MS", "TIMESTAMP WITH TIME ZONE"):
        return f"NOT isfinite({cell}) OR {cell} >= {_FIRST_DAY}::TIMESTAMP"
    if (match := _LIST.fullmatch(type_)) and (element := limit("e", match[1])):
        return f"list_bool_and(list_transform({cell}, lambda e: coalesce({element}, true)))"
    return None


def _text(cell: str, type_: str) -> str:
    """Return the DuckDB expression of a value's text as Postgres reads it."""
    if type_ == "BLOB":
        return f"'\\x' || hex({cell})"
    if postgres_type(type_) == "json" and type_ != "JSON":
        return f"to_json({cell})::VARCHAR"
    if match := _LIST.fullmatch(type_):
        element = _text("e", match[1])
        escaped = rf"""replace(replace({element}, '\', '\\'), '"', '\"')"""
        elements = f"""list_transform({cell}, lambda e: coalesce('"' || {escaped} || '"', 'NULL'))"""
        return f"'{{' || array_to_string({elements}, ',') || '}}'"
    if type_ == "DATE":
        return f"replace({cell}::VARCHAR, ' (BC)', ' BC')"
    if type_.startswith("TIMESTAMP"):
        # The era stands behind the day here, and behind all in Postgres.
        return (
            f"CASE WHEN contains({cell}::VARCHAR, ' (BC)') "
            f"THEN replace({cell}::VARCHAR, ' (BC)', '') || ' BC' ELSE {cell}::VARCHAR END"
        )
    return f"{cell}::VARCHAR"


def _engine() -> duckdb.DuckDBPyConnection:
    """Return a session of this thread's DuckDB, which takes longer to make than a small slice to write."""
    connection: duckdb.DuckDBPyConnection | None = getattr(_local, "connection", None)
    if connection is None:
        connection = _local.connection = duckdb.connect()
    cursor = connection.cursor()
    cursor.execute("SET TimeZone = 'UTC'")
    return cursor


def as_csv(rows: pa.Table, types: Mapping[str, str], constants: Mapping[str, str]) -> Iterator[bytes]:
    """Yield a table as CSV without a header in pieces, columns in the table's order behind `constants`.

    `types` are DuckDB's, of those columns that may be none of Arrow's own; an empty field is null.
    """
    foreign = {name for name in rows.column_names if types.get(name, "VARCHAR") not in _SAME}
    typed = {name: f"CAST({quoted(name)} AS {types[name]})" for name in foreign}
    cells = ", ".join(
        [f"{literal(value)} AS {quoted(name)}" for name, value in constants.items()]
        + [
            f"{_text(typed[name], types[name])} AS {quoted(name)}" if name in foreign else quoted(name)
            for name in rows.column_names
        ]
    )
    options = csv.WriteOptions(include_header=False)
    with _engine() as db:
        # Piece by piece: while the server takes one, the next is made.
        for start in range(0, rows.num_rows, _BATCH):
            db.register("rows", rows.slice(start, _BATCH))
            sink = io.BytesIO()
            csv.write_csv(db.sql(f"SELECT {cells} FROM rows").to_arrow_table(), sink, options)
            yield sink.getvalue()


def from_csv(data: bytes, names: Sequence[str], types: Sequence[str]) -> pa.Table:
    """Return what a COPY … TO STDOUT (FORMAT csv) wrote, with DuckDB's types for Postgres' (`types`)."""
    places = [f"c{i}" for i in range(len(names))]
    if data:
        rows = csv.read_csv(
            pa.py_buffer(data),
            csv.ReadOptions(column_names=places, block_size=min(len(data) + 1, (1 << 31) - 1)),
            csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=False),
            csv.ConvertOptions(
                column_types=dict.fromkeys(places, pa.string()),
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )
    else:
        rows = pa.table({place: pa.array([], pa.string()) for place in places})
    cells = [f"{_value(place, type_)} AS {place}" for place, type_ in zip(places, types, strict=True)]
    with _engine() as db:
        db.register("rows", rows)
        return db.sql(f"SELECT {', '.join(cells)} FROM rows").to_arrow_table().rename_columns(list(names))


def _value(column: str, type_: str) -> str:
    if type_ == "interval":
        # A sign that says the same as none, which Postgres writes behind a negative part.
        return f"replace({column}, '+', '')::INTERVAL"
    return mirror_expression(Column(column, type_))
