"""What is recorded of a project for where there is no database: the raw tables' shapes, and models' outputs.

`schemas/SOURCE.toml` has the tables of a source, `schemas/models.lock` the output columns of every model.
Both are TOML with one column per line, in a fixed order, so that version control shows what changed.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.authoring.files import Shapes
from headrace.change import Column, Constraint, TableId, TableSchema
from headrace.config import Project
from headrace.errors import UserError
from headrace.transform.model import RowModel
from headrace.transform.sql import ModelText

FOLDER = "schemas"
LOCK = "models.lock"

_SHAPES_HEAD = "# The tables of {source} as they are captured, written by `headrace ci --record`.\n"
_LOCK_HEAD = (
    "# The output columns of models, written by `headrace ci --record`; `headrace ci` holds to them.\n"
)
_NOT_NULL = " NOT NULL"
_BARE = re.compile("[A-Za-z0-9_-]+")
_Table = tuple[tuple[str, ...], Mapping[str, str], Sequence[Constraint]]
"""Key, columns with their types, and constraints."""


@dataclass(frozen=True, slots=True)
class Promise:
    """The output of a model: its key, and its columns with their types and whether they are never null."""

    key: tuple[str, ...]
    columns: Mapping[str, tuple[str, bool]]

    def types(self) -> dict[str, str]:
        """Return the columns with their types."""
        return {name: type_ for name, (type_, _) in self.columns.items()}


def promise_of(text: ModelText, model: RowModel) -> Promise:
    """Return what a bound model puts out."""
    required = {check.column for check in model.checks if not check.expression}
    return Promise(text.key, {name: (type_, name in required) for name, type_ in model.types().items()})


def promise_of_mart(columns: Mapping[str, str]) -> Promise:
    """Return what a mart puts out that has these columns with their types."""
    return Promise((), {name: (type_, False) for name, type_ in columns.items()})


def breaking(name: str, was: Promise, now: Promise | None) -> Iterator[str]:
    """Yield in words what a query over a model's table can no longer rely on; additions break nothing."""
    if now is None:
        yield f"model {name} is gone"
        return
    for column, (type_, required) in was.columns.items():
        if column not in now.columns:
            yield f"model {name}: column {column} is gone"
            continue
        new_type, still_required = now.columns[column]
        if new_type != type_:
            yield f"model {name}: column {column} is {new_type}, and was {type_}"
        if required and not still_required:
            yield f"model {name}: column {column} may be null now, and was NOT NULL"
    if was.key and now.key != was.key:
        yield f"model {name}: its key is {list(now.key)}, and was {list(was.key)}"


def read_shapes(project: Project, source: str) -> Shapes:
    """Return the recorded shapes of a source's tables, empty where none are recorded. Raises UserError."""
    path = project.root / FOLDER / f"{source}.toml"
    found: Shapes = {}
    for label, raw in _read(path).items():
        schema, dot, name = label.partition(".")
        table = TableId(schema, name) if dot else TableId("public", label)
        key, columns = _table(path, label, raw)
        constraints = _constraints(path, label, raw)
        found[table] = TableSchema(
            table, tuple(Column(*column) for column in columns.items()), key, constraints=constraints
        )
    return found


def write_shapes(project: Project, source: str, shapes: Shapes) -> Path:
    """Write the shapes of a source's tables; returns the file."""
    tables = {
        schema.table.label: (
            schema.key,
            {column.name: column.type for column in schema.columns},
            schema.constraints,
        )
        for schema in shapes.values()
    }
    return _write(project.root / FOLDER / f"{source}.toml", _SHAPES_HEAD.format(source=source), tables)


def read_promises(project: Project) -> dict[str, Promise] | None:
    """Return the recorded outputs by model, None where none are recorded. Raises UserError."""
    path = project.root / FOLDER / LOCK
    if not path.exists():
        return None
    found = {}
    for name, raw in _read(path).items():
        key, columns = _table(path, name, raw)
        found[name] = Promise(
            key,
            {
                column: (type_.removesuffix(_NOT_NULL), type_.endswith(_NOT_NULL))
                for column, type_ in columns.items()
            },
        )
    return found


def write_promises(project: Project, promises: Mapping[str, Promise]) -> Path:
    """Write the outputs of models; returns the file."""
    models = {
        name: (
            promise.key,
            {column: type_ + _NOT_NULL * not_null for column, (type_, not_null) in promise.columns.items()},
            (),
        )
        for name, promise in promises.items()
    }
    return _write(project.root / FOLDER / LOCK, _LOCK_HEAD, models)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error


def _table(path: Path, name: str, raw: object) -> tuple[tuple[str, ...], dict[str, str]]:
    key, columns = (raw.get("key", []), raw.get("columns")) if isinstance(raw, dict) else ([], None)
    fits = isinstance(columns, dict) and all(isinstance(type_, str) for type_ in columns.values())
    if not fits or not isinstance(key, list):
        raise _damaged(path, f"{name} needs columns with types, and a key that is a list")
    assert isinstance(columns, dict)
    return tuple(map(str, key)), columns


def _constraints(path: Path, name: str, raw: Mapping[str, Any]) -> tuple[Constraint, ...]:
    """Read back what `_constraint_lines` wrote."""
    found = []
    try:
        for each in raw.get("constraints", ()):
            schema, dot, parent = each.get("references", "").rpartition(".")
            references = TableId(schema if dot else "public", parent) if parent else None
            expression, beyond, to = each.get("check", ""), each.get("beyond", ""), tuple(each.get("to", ()))
            rule = (each["kind"], each["name"], tuple(each["columns"]), expression, references, to, beyond)
            found.append(Constraint(*rule))
    except (TypeError, AttributeError, KeyError) as error:
        raise _damaged(path, f"a constraint of {name} is not whole") from error
    return tuple(found)


def _constraint_lines(table: str, constraints: Sequence[Constraint]) -> Iterator[str]:
    for each in constraints:
        cells = {
            "kind": each.kind,
            "name": each.name,
            "columns": each.columns,
            "check": each.expression,
            "references": each.references.label if each.references else "",
            "to": each.to,
            "beyond": each.beyond,
        }
        yield f"\n[[{toml_key(table)}.constraints]]\n"
        for key, value in cells.items():
            if value:
                yield f"{key} = {toml_string(value) if isinstance(value, str) else _toml_list(value)}\n"


def _toml_list(names: Sequence[str]) -> str:
    return f"[{', '.join(map(toml_string, names))}]"


def _damaged(path: Path, fault: str) -> UserError:
    return UserError(
        f"{FOLDER}/{path.name} cannot be read: {fault}.", "Record it again: `headrace ci --record`."
    )


def _write(path: Path, head: str, tables: Mapping[str, _Table]) -> Path:
    parts = [head]
    for name in sorted(tables):
        key, columns, constraints = tables[name]
        parts.append(f"\n[{toml_key(name)}]\nkey = {_toml_list(key)}\n\n[{toml_key(name)}.columns]\n")
        parts += [f"{toml_key(column)} = {toml_string(type_)}\n" for column, type_ in columns.items()]
        parts += _constraint_lines(name, constraints)
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(parts), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.", "Mend its rights.") from error
    return path


def toml_key(name: str) -> str:
    """Write a name as a key of TOML."""
    return name if _BARE.fullmatch(name) else toml_string(name)


def toml_string(text: str) -> str:
    """Write a text as a basic string of TOML, which is a double-quoted scalar of YAML too."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else _escape(ord(c)) for c in escaped) + '"'


def _escape(code: int) -> str:
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
