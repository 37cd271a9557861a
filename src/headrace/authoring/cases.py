"""Test files, `tests/*.toml`: what a model is to make of some rows of its raw table.

    model = "sales"

    [schema]                      # may be left out where `headrace ci --record` has recorded it
    key = ["id"]
    columns = { id = "bigint", amount = "text" }

    [[test]]
    name = "amounts are numbers"
    given = [{ id = "1", amount = "9.99" }, { id = "2", amount = "free" }]
    expect = [{ order_id = 1, amount = 9.99 }]
    quarantine = [{ key = "2", reason = "transform.cast", column = "amount" }]

The test of a mart gives rows of the tables that it reads, whose columns are known from the models that make
them, or are named in the file:

    model = "per_customer"
    tables = { their_table = { id = "BIGINT", name = "VARCHAR" } }

    [[test]]
    given.sales = [{ order_id = 1, amount = 9.99 }]
    expect = [{ orders = 1 }]

A cell that is left out is null. In a row model's `given`, `_op` is c (the default), r, u, d or t,
`_unchanged` lists cells that the source did not send, `_before` has the old key's cells where it changes, and
`_committed_at` is a time.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from headrace.change import Column, TableId, TableSchema
from headrace.config import Project
from headrace.errors import UserError

FOLDER = "tests"
MAX_FILE_BYTES = 1 << 20

_FILE_KEYS = ("model", "schema", "tables", "test")
_TEST_KEYS = ("name", "given", "expect", "quarantine", "columns")
_RECORD_KEYS = ("key", "reason", "column")
_SCHEMA_KEYS = ("key", "columns")
_EVENT_KEYS = ("_op", "_unchanged", "_before", "_committed_at")
_OPS = ("c", "r", "u", "d", "t")
_HEADER = re.compile(r"^\s*\[\[\s*\"?test\"?\s*\]\]", re.MULTILINE)
_START = datetime(2000, 1, 1, tzinfo=UTC)

Cell = str | None


@dataclass(frozen=True, slots=True)
class Event:
    """One given change. `cells` are texts by column; what is in neither `cells` nor `unchanged` is null."""

    op: str
    cells: Mapping[str, str]
    unchanged: tuple[str, ...]
    before: Mapping[str, Cell] | None
    committed_at: datetime


@dataclass(frozen=True, slots=True)
class ExpectedRecord:
    """A record of the quarantine; '' where a part is not compared."""

    key: str
    reason: str
    column: str


@dataclass(frozen=True, slots=True)
class Case:
    """One test. Of the output `columns` are compared, all where it is empty. `given` are changes of a row
    model's table, `inputs` rows of the tables that a mart reads."""

    name: str
    line: int
    given: tuple[Event, ...]
    inputs: Mapping[str, Sequence[Mapping[str, Any]]]
    expect: tuple[Mapping[str, Any], ...]
    quarantine: tuple[ExpectedRecord, ...]
    columns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CaseFile:
    """A test file: its model, the raw table's shape if it is given, the columns of tables that a mart reads
    with their types in DuckDB's words, and its tests."""

    path: Path
    model: str
    key: tuple[str, ...]
    columns: tuple[Column, ...]
    tables: Mapping[str, Mapping[str, str]]
    cases: tuple[Case, ...]

    def schema(self, label: str) -> TableSchema | None:
        """Return the given shape as that of the table with a label, None where none is given."""
        if not self.columns:
            return None
        schema, dot, name = label.partition(".")
        return TableSchema(TableId(schema, name) if dot else TableId("public", label), self.columns, self.key)


def case_paths(project: Project) -> list[Path]:
    """Return the test files of a project, by name."""
    return sorted((project.root / FOLDER).glob("*.toml"))


def read_cases(path: Path) -> CaseFile:
    """Read a test file. Raises UserError that names file, test and place of what is wrong."""
    where = f"{FOLDER}/{path.name}"
    try:
        text = path.read_text(encoding="utf-8")
        raw = tomllib.loads(text if len(text) <= MAX_FILE_BYTES else "", parse_float=str)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where} cannot be read: {error}.") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{where}: not valid TOML: {error}.") from error
    if len(text) > MAX_FILE_BYTES:
        raise UserError(f"{where} is larger than {MAX_FILE_BYTES} bytes.", "Cut it into several files.")
    _known(where, raw, _FILE_KEYS)
    model = raw.get("model")
    if not isinstance(model, str) or not model:
        raise UserError(f"{where}: it does not say which model it tests.", 'Begin with: model = "sales"')
    key, columns = _schema(where, raw.get("schema", {}))
    tests = raw.get("test", [])
    if not isinstance(tests, list) or not tests:
        raise UserError(f"{where}: it has no [[test]].", "Write one: [[test]], then given and expect.")
    lines = [text.count("\n", 0, found.end()) + 1 for found in _HEADER.finditer(text)]
    lines += [1] * (len(tests) - len(lines))
    cases = [_case(f"{where}:{line}", line, test) for line, test in zip(lines, tests, strict=False)]
    tables = raw.get("tables", {})
    if not isinstance(tables, dict) or not all(map(_is_columns, tables.values())):
        raise UserError(
            f"{where}: tables has columns of the tables that a mart reads, with their types.",
            'Write tables = { customers = { id = "BIGINT" } }.',
        )
    return CaseFile(path, model, key, columns, tables, tuple(cases))


def _is_columns(raw: object) -> bool:
    return isinstance(raw, dict) and all(isinstance(type_, str) for type_ in raw.values())


def _known(where: str, raw: object, known: Collection[str]) -> None:
    if not isinstance(raw, dict):
        raise UserError(f"{where}: this is to be a table with {', '.join(known)}.")
    for name in raw:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f'Did you mean "{near[0]}"?' if near else f"Known here: {', '.join(known)}."
            raise UserError(f'{where}: unknown key "{name}".', hint)


def _schema(where: str, raw: object) -> tuple[tuple[str, ...], tuple[Column, ...]]:
    where = f"{where}: [schema]"
    _known(where, raw, _SCHEMA_KEYS)
    assert isinstance(raw, dict)
    key, columns = raw.get("key", []), raw.get("columns", {})
    if not _is_columns(columns):
        raise UserError(
            f"{where}: columns are names with Postgres types.",
            'Write columns = { id = "bigint", name = "text" }',
        )
    if not isinstance(key, list) or not set(map(str, key)) <= set(columns):
        raise UserError(f"{where}: key lists columns of the table.", 'Write key = ["id"], or leave it out.')
    return tuple(map(str, key)), tuple(Column(name, type_) for name, type_ in columns.items())


def _case(where: str, line: int, raw: object) -> Case:
    _known(where, raw, _TEST_KEYS)
    assert isinstance(raw, dict)
    by_table = raw["given"] if isinstance(raw.get("given"), dict) else {}
    inputs = {name: _rows(f"{where}: given", by_table, name) for name in by_table}
    given = [] if by_table else _rows(where, raw, "given")
    expect, quarantine = (_rows(where, raw, name) for name in ("expect", "quarantine"))
    columns = raw.get("columns", [])
    if not isinstance(columns, list):
        raise UserError(f"{where}: columns is a list of output columns.", 'Write columns = ["amount"].')
    name = str(raw.get("name", "")) or f"test at line {line}"
    return Case(
        name=name,
        line=line,
        given=tuple(_event(f"{where}: given row {i}", row) for i, row in enumerate(given, 1)),
        inputs=inputs,
        expect=tuple(expect),
        quarantine=tuple(_record(f"{where}: quarantine row {i}", row) for i, row in enumerate(quarantine, 1)),
        columns=tuple(map(str, columns)),
    )


def _rows(where: str, raw: Mapping[str, Any], name: str) -> Sequence[dict[str, Any]]:
    rows = raw.get(name, [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{where}: {name} is a list of rows.", f'Write {name} = [{{ id = "1" }}].')
    return rows


def _event(where: str, row: Mapping[str, Any]) -> Event:
    cells = {name: value for name, value in row.items() if name not in _EVENT_KEYS}
    op, before = row.get("_op", "c"), row.get("_before")
    if op not in _OPS:
        raise UserError(f"{where}: _op is one of {', '.join(_OPS)}.")
    unchanged = row.get("_unchanged", [])
    if not isinstance(unchanged, list) or set(map(str, unchanged)) & set(cells):
        raise UserError(f"{where}: _unchanged lists columns whose cells the row does not have.")
    if before is not None and not isinstance(before, dict):
        raise UserError(f"{where}: _before has the old cells.", 'Write _before = { id = "1" }.')
    return Event(
        op=op,
        cells={name: _text(where, name, value) for name, value in cells.items()},
        unchanged=tuple(map(str, unchanged)),
        before={name: _text(where, name, value) for name, value in before.items()} if before else None,
        committed_at=_moment(where, row.get("_committed_at", _START)),
    )


def _text(where: str, name: str, value: object) -> str:
    """Return a cell as the source writes it; numbers as they stand in the file."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    hint = '"t" or "f"' if isinstance(value, bool) else "the text as Postgres writes it, in quotes"
    raise UserError(f"{where}: {name} is no text, which all cells of a raw table are.", f"Write {hint}.")


def _moment(where: str, value: object) -> datetime:
    try:
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    except ValueError:
        raise UserError(f"{where}: _committed_at is no time.", "Write 2026-01-31T12:00:00Z.") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _record(where: str, row: Mapping[str, Any]) -> ExpectedRecord:
    _known(where, row, _RECORD_KEYS)
    if "key" not in row:
        raise UserError(
            f"{where}: it needs the row's key.", 'Write key = "1", or ["1", "a"] for two columns.'
        )
    key = row["key"]
    if isinstance(key, list):
        quoted = (_text(where, "key", part).replace("\\", "\\\\").replace('"', '\\"') for part in key)
        key = "[" + ",".join(f'"{part}"' for part in quoted) + "]"
    return ExpectedRecord(_text(where, "key", key), str(row.get("reason", "")), str(row.get("column", "")))
