"""The test that `headrace init` writes for its example of a model: it passes before it is written."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from headrace.authoring.cases import read_cases
from headrace.authoring.judging import judge, prepare_given
from headrace.authoring.recorded import toml_key, toml_string
from headrace.cells import json_of, rows_of
from headrace.change import Column, TableSchema
from headrace.cli.example import Example
from headrace.errors import HeadraceError
from headrace.transform.model import RowModel, bind
from headrace.transform.sql import read_model

_SHOWN = 3  # columns beside the key
_UNREADABLE = "?"

# The text that Postgres writes for some value of a type.
_CELLS = (
    (r"smallint|integer|bigint|oid|numeric.*", ("1", "2")),
    (r"real|double precision", ("1.5", "2.5")),
    (r"text|character varying.*|character\(.*", ("a", "b")),
    (r"boolean", ("t", "f")),
    (r"date", ("2026-01-31", "2026-02-28")),
    (r"timestamp(\(\d\))? without time zone", ("2026-01-31 12:00:00", "2026-02-28 12:00:00")),
    (r"timestamp(\(\d\))? with time zone", ("2026-01-31 12:00:00+00", "2026-02-28 12:00:00+00")),
    (r"uuid", ("11111111-1111-1111-1111-111111111111", "22222222-2222-2222-2222-222222222222")),
)

_TEXT = """\
# A test of models/{name}.sql, which runs also while that is not in use: headrace test
#
# A test gives rows of the raw table, each cell as Postgres writes it, and says which rows the model makes of
# them and which go to the quarantine. A cell that is left out is null.
model = "{name}"

[schema]
key = [{key}]

[schema.columns]
{columns}

[[test]]
name = "{what}"
columns = [{shown}]  # of the output; without this line all are compared
given = [
{given}
]
expect = [
{expect}
]
quarantine = [
{quarantine}
]
"""


def write_example_test(example: Example, schema: TableSchema) -> str | None:
    """Write a test of an example that passes; None where its table is too odd for one."""
    rows = _given(schema)
    if not rows:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / example.name
        try:
            path.write_text(example.text, encoding="utf-8")
            model = bind(read_model(path), schema)
            # The file is read twice: first for what comes of its rows, then to see that it says so.
            for expected in (False, True):
                text = _text(example.name, model, schema, rows, path if expected else None)
                path.write_text(text, encoding="utf-8")
            (case,) = read_cases(path).cases
            passes = not list(judge(case, model, ()))
        except HeadraceError:
            return None
    return text if passes else None


def _given(schema: TableSchema) -> list[dict[str, str]]:
    """Choose two rows of a few columns, the second with a cell that no cast reads; empty where none fits."""
    key = [column for column in schema.columns if column.name in schema.key]
    others = [column for column in schema.columns if column.name not in schema.key and _cells(column)]
    # What is text takes any value, so a column that is not goes first.
    others.sort(key=lambda column: column.type == "text" or column.type.startswith("character"))
    chosen = key + others[:_SHOWN]
    if not key or not others or not all(_cells(column) for column in chosen):
        return []
    good, bad = ({column.name: _cells(column)[i] for column in chosen} for i in (0, 1))
    return [good, {**bad, others[0].name: _UNREADABLE}]


def _text(
    name: str, model: RowModel, schema: TableSchema, rows: list[dict[str, str]], given: Path | None
) -> str:
    """Write the test; what is expected comes of the rows of the draft `given`, if there is one."""
    shown = [column for column in rows[0] if column in model.types()]
    expect, quarantine = list[str](), list[str]()
    if given is not None:
        prepared = prepare_given(read_cases(given).cases[0].given, model)
        for row in rows_of(prepared.rows.select(shown)):
            known = {n: json_of(cell) for n, cell in zip(shown, row, strict=True) if cell is not None}
            expect.append(_inline(known))
        for record in prepared.records.to_pylist():
            cells = {"key": record["key"], "reason": record["reason"], "column": record["columns"]}
            quarantine.append(_inline({n: toml_string(cell) for n, cell in cells.items()}))
    return _TEXT.format(
        name=name,
        key=", ".join(map(toml_string, schema.key)),
        columns="\n".join(
            f"{toml_key(column.name)} = {toml_string(column.type)}" for column in schema.columns
        ),
        what="good values get their types" + (", a bad one is quarantined" if quarantine else ""),
        shown=", ".join(map(toml_string, shown)),
        given=_lines([_inline({n: toml_string(cell) for n, cell in row.items()}) for row in rows]),
        expect=_lines(expect),
        quarantine=_lines(quarantine),
    )


def _lines(rows: list[str]) -> str:
    return "\n".join(f"  {row}," for row in rows)


def _inline(cells: Mapping[str, str]) -> str:
    return "{ " + ", ".join(f"{toml_key(name)} = {cell}" for name, cell in cells.items()) + " }"


def _cells(column: Column) -> tuple[str, ...]:
    return next((cells for types, cells in _CELLS if re.fullmatch(types, column.type)), ())
