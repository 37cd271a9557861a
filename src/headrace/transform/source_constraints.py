"""Constraints that a model takes over from the source: which of them hold of its outputs, and as what.

A constraint is of raw columns; it is one of the model where each of these is an output, as it is or cast.
One that cannot be kept is left out, with the reason in words: it never stops a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import duckdb

from headrace.change import Column, Constraint, TableId
from headrace.keys import quoted
from headrace.pgtypes import canonical, cast_keeps_apart, duckdb_type
from headrace.prepared import UniqueKey
from headrace.transform.casts import casts_of_column
from headrace.transform.engine import engine
from headrace.transform.handling import Action
from headrace.transform.kind import LATEST
from headrace.transform.source_checks import Cell, Unlike, duckdb_condition
from headrace.transform.sql import Check

if TYPE_CHECKING:
    from headrace.transform.foreign import ForeignKey
    from headrace.transform.model import RowModel

_NESTED = ("STRUCT", "MAP", "UNION", "JSON", "VARIANT")


@dataclass(frozen=True, slots=True)
class SourceKey:
    """A foreign key of the source: output `columns` of a model refer to the columns `to` of a raw table."""

    name: str
    columns: tuple[str, ...]
    table: TableId
    to: tuple[str, ...]


def take_over(
    model: RowModel, key: Sequence[str] = (), foreign_keys: Collection[ForeignKey] = ()
) -> RowModel:
    """Return a bound model that keeps the constraints of its table, too; `key` and `foreign_keys` are those
    that its file says. Its version is another where there are any."""
    found = _Taken(model, key, foreign_keys)
    left_out = []
    # NOT NULL first: what must not be null is not to be nulled.
    for each in sorted(model.schema.constraints, key=lambda each: each.kind != "not_null"):
        try:
            found.take(each)
        except Unlike as why:
            left_out.append(f"{each.name}: {why}")
    taken = (found.checks, found.unique, found.foreign_keys)
    digest = hashlib.blake2b(repr(taken).encode(), digest_size=4).hexdigest()
    return replace(
        model,
        constraints="source",
        checks=(*model.checks, *found.checks),
        unique=(*model.unique, *found.unique),
        source_keys=tuple(found.foreign_keys),
        left_out=tuple(left_out),
        version=f"{model.version}+{digest}" if any(taken) else model.version,
    )


def held(model: RowModel) -> Mapping[str, Cell]:
    """Return the outputs that are columns of the raw table, as they are or cast, by these columns."""
    types = model.types()
    found = dict[str, Cell]()
    for column in model.schema.columns:
        for name, expression in _outputs(model, column):
            if column.name not in found and casts_of_column(expression, column, model.alias) is not None:
                found[column.name] = Cell(column, name, types[name])
    return found


def held_apart(model: RowModel, columns: Sequence[str]) -> tuple[str, ...]:
    """Return the outputs that hold some columns, with all values told apart. Raises Unlike where there are
    none."""
    cells = held(model)
    if missing := [name for name in columns if name not in cells]:
        raise Unlike(f"no output of {model.name} is {', '.join(missing)}")
    for name in columns:
        cell = cells[name]
        expression = next(text for output, text in _outputs(model, cell.column) if output == cell.output)
        casts = casts_of_column(expression, cell.column, model.alias) or []
        if not all(_keeps_apart(cell.column, type_) for type_ in (*casts, cell.type)):
            raise Unlike(f"{cell.output} does not tell all values of {name} apart")
    return tuple(cells[name].output for name in columns)


def _outputs(model: RowModel, column: Column) -> Iterator[tuple[str, str]]:
    """Yield outputs that may be a column, with their expressions over the raw table.

    Nobody can read from Python code what an output is made of: one stands for the column of its name, and
    those of the key for the table's. A mirror's expressions read each column from its text.
    """
    if model.python:
        yield from ((name, quoted(column.name)) for name in model.holding(column.name))
    if model.python or model.is_mirror:
        yield from ((name, quoted(name)) for name, _, _ in model.outputs if name == column.name)
    else:
        yield from ((name, expression) for name, expression, _ in model.outputs)


def _keeps_apart(column: Column, type_: str) -> bool:
    """Whether different values of a column stay different as a type; its own keeps all that it can hold."""
    own = canonical(duckdb_type(column))
    return type_.replace(" ", "") == own.replace(" ", "") or cast_keeps_apart(column.type, type_)


class _Taken:
    """What of a table's constraints a model keeps."""

    def __init__(self, model: RowModel, key: Sequence[str], foreign_keys: Collection[ForeignKey]) -> None:
        self.checks = list[Check]()
        self.unique = list[UniqueKey]()
        self.foreign_keys = list[SourceKey]()
        self._model = model
        self._cells = held(model)
        self._key = key
        self._own = foreign_keys
        taken = (each.name for each in model.schema.constraints if each.kind == "foreign_key")
        self._foreign_names = {*taken, *(each.name for each in foreign_keys)}
        self._required = {check.column for check in model.checks if not check.expression}

    def take(self, constraint: Constraint) -> None:
        """Take a constraint over. Raises Unlike, in words, for one that cannot be kept."""
        if constraint.beyond:
            raise Unlike(f"it is {constraint.beyond}")
        match constraint.kind:
            case "not_null":
                self._take_not_null(constraint)
            case "check":
                self._take_check(constraint)
            case "unique":
                self._take_unique(constraint)
            case "foreign_key":
                self._take_foreign_key(constraint)

    def _take_not_null(self, constraint: Constraint) -> None:
        (name,) = constraint.columns
        output = self._cell(name).output
        if output in self._required:
            return
        if any(check.column == output and check.on_violation == "null" for check in self._model.checks):
            raise Unlike(f"a rule of the model nulls {output}")
        self._required.add(output)
        self.checks.append(Check(output, "", self._action(output)))

    def _take_check(self, constraint: Constraint) -> None:
        cells = {name: self._cell(name) for name in constraint.columns}
        condition = duckdb_condition(constraint.expression, cells)
        empty = ", ".join(f"NULL::{cell.type} AS {quoted(cell.output)}" for cell in cells.values())
        try:
            with engine() as db:
                db.execute(f"SELECT TRY({{'held': ({condition})}}) FROM (SELECT {empty})")
        except duckdb.Error as error:
            raise Unlike(f"DuckDB does not take it: {str(error).splitlines()[0]}") from None
        outputs = [cell.output for cell in cells.values()]
        self.checks.append(Check(outputs[0], condition, self._action(*outputs)))

    def _take_unique(self, constraint: Constraint) -> None:
        self._refuse_past()
        if set(self._model.schema.key) <= set(constraint.columns):
            return  # the table's key sees to it
        columns = held_apart(self._model, constraint.columns)
        types = self._model.types()
        for name in columns:
            if types[name].endswith("]") or types[name].startswith(_NESTED):
                raise Unlike(f"{name} is {types[name]}, which cannot be held to be unique")
        if set(columns) != set(self._key):
            # The source keeps names of indexes and of foreign keys apart.
            is_taken = constraint.name in self._foreign_names
            self.unique.append(UniqueKey(f"{constraint.name}{' (unique)' * is_taken}", columns))

    def _take_foreign_key(self, constraint: Constraint) -> None:
        self._refuse_past()
        assert constraint.references is not None
        columns = held_apart(self._model, constraint.columns)
        if any(set(each.columns) == set(columns) for each in self._own):
            return  # the model says itself what they refer to
        if any(each.name == constraint.name for each in self._own):
            raise Unlike("the model has another one of this name")
        self.foreign_keys.append(SourceKey(constraint.name, columns, constraint.references, constraint.to))

    def _refuse_past(self) -> None:
        if self._model.kind != LATEST:
            raise Unlike("the model keeps rows of the past")
        if not self._model.schema.key:
            raise Unlike("its table has no key")

    def _cell(self, column: str) -> Cell:
        if column not in self._cells:
            raise Unlike(f"no output of {self._model.name} is {column}")
        return self._cells[column]

    def _action(self, *outputs: str) -> Action:
        """Return what a violation does: what the model says of all, where that can be meant of these."""
        handling = self._model.handling
        if any(name in self._key for name in outputs):
            return handling.on_key_violation
        can_be_null = len(outputs) == 1 and outputs[0] not in self._required
        return "quarantine" if handling.on_violation == "null" and not can_be_null else handling.on_violation
