"""The example of a model that `headrace init` writes: proved to work before it is written."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import duckdb

from headrace.change import Column, TableSchema
from headrace.errors import HeadraceError
from headrace.keys import quoted
from headrace.pgtypes import cast_keeps_apart, duckdb_type
from headrace.transform.model import bind
from headrace.transform.sql import read_model

_TEXT = """\
/* headrace
{header}*/
-- An example of a model, not in use: to use it, rename this file to {name}.sql.
--
-- While no model reads it, the table is mirrored as {source}.{table}: each column with the source's own
-- type. Once this model does, it takes the mirror's place, and its table in the destination is called
-- as its file is: {name}.
--
-- raw.{source} holds every value as the source's text: cast what should be more. A row for which a cast, the
-- contract (NOT NULL, CHECK) or WHERE fails goes to the quarantine, and all others go on.
SELECT
{outputs}
FROM raw.{source_sql}.{table_sql}
-- WHERE {first} IS NOT NULL
"""


class Example(NamedTuple):
    """A model file: its name without the suffix, its text, and that of a test of it where there is one."""

    name: str
    text: str
    test: str | None = None


def write_example(source: str, schema: TableSchema) -> Example | None:
    """Write a model of a table that reads and binds; None where its names or types are too odd."""
    columns = [column for column in schema.columns if not column.name.startswith("_")]
    if not columns or not set(schema.key) <= {column.name for column in columns}:
        return None
    name = re.sub("[^a-z0-9_]+", "_", schema.table.label.lower()).strip("_") + "_clean"
    for cast in (True, False):
        example = Example(name, _text(name, source, schema, columns, cast=cast))
        if _works(example, schema):
            return example
    return None


def _text(name: str, source: str, schema: TableSchema, columns: Sequence[Column], *, cast: bool) -> str:
    keywords = _keywords()
    types = {column.name: _type(column, schema.key) if cast else "VARCHAR" for column in columns}
    cells = {column.name: _identifier(column.name, keywords) for column in columns}
    outputs = [
        f"  {cells[n]}::{type_} AS {cells[n]}" if type_ != "VARCHAR" else f"  {cells[n]} AS {cells[n]}"
        for n, type_ in types.items()
    ]
    return _TEXT.format(
        name=name,
        source=source,
        table=schema.table.label,
        source_sql=_identifier(source, keywords),
        table_sql=_identifier(schema.table.label, keywords),
        header=_header(schema, types),
        outputs=",\n".join(outputs),
        first=cells[schema.key[0] if schema.key else columns[0].name],
    )


def _header(schema: TableSchema, types: dict[str, str]) -> str:
    if not schema.key:
        return ""
    contract = "\n".join(f'{_toml(key)} = "{types[key]} NOT NULL"' for key in schema.key)
    return f"key = [{', '.join(map(_toml, schema.key))}]\n[contract]\n{contract}\n"


def _type(column: Column, key: Sequence[str]) -> str:
    """Choose a type that a plain cast of the text gives; what needs more than that stays text."""
    type_ = duckdb_type(column)
    if type_ == "BLOB" or type_.endswith("[]"):
        return "VARCHAR"
    return type_ if column.name not in key or cast_keeps_apart(column.type, type_) else "VARCHAR"


def _works(example: Example, schema: TableSchema) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{example.name}.sql"
        path.write_text(example.text, encoding="utf-8")
        try:
            text = read_model(path)
            bind(text, schema)
        except HeadraceError:
            return False
    return text.table == schema.table.label


def _identifier(name: str, keywords: set[str]) -> str:
    plain = re.fullmatch("[a-z][a-z0-9_]*", name) and name not in keywords
    return name if plain else quoted(name)


def _keywords() -> set[str]:
    with duckdb.connect() as db:
        rows = db.execute("SELECT keyword_name FROM duckdb_keywords() WHERE keyword_category <> 'unreserved'")
        return {str(row[0]) for row in rows.fetchall()}


def _toml(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
