"""A model's function as its file has it: what it says of itself, and running it over a batch. In the worker.

A row that fails is told with the type of what was raised, its place in the file and the line that stands
there. The words of an exception are told where a library says them, without quoted parts, numbers and cells
of the row; where the model's own code raises, the line says what it says, and the words may be made of cells.
"""

from __future__ import annotations

import inspect
import linecache
import operator
import traceback
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol

import pyarrow as pa

from headrace.definition import Definition, UnknownColumn, definition_of
from headrace.scrub import scrub
from headrace.transform.python.inputs import Inputs, inputs_of
from headrace.transform.python.outputs import (
    Kind,
    Unfit,
    array_of,
    bound_kind,
    name_of,
    outputs_of,
    taken_apart,
)

NUMBER, KEPT = "_hr_i", "_hr_kept"
"""Columns of what comes back: the number of a row in its batch, and whether the model keeps it."""

Fault = tuple[int, str, str, str]
"""A row's number in its batch, and reason, column and message of what is wrong with it."""

_PYTHON, _CAST = "transform.python", "transform.cast"
_LEAST_CELL = 2  # characters of a cell that is looked for in a message


class Broken(Exception):
    """The model cannot run on any row; the message says why, and where."""


class Progress(Protocol):
    """Where it is told which row is in work, for the one who watches."""

    def row(self, number: int) -> None:
        """Say that this row of the batch begins."""
        ...

    def call(self) -> None:
        """Say that a call with many rows begins."""
        ...


@dataclass(slots=True)
class Made:
    """What became of a batch: tables of `_hr_i`, `_hr_kept` and the outputs, and the rows that failed."""

    tables: list[pa.Table] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Description:
    """What a file says of itself: `rules` by output column, `reads` where the input's class tells."""

    kind: str
    function: str
    definition: Definition
    rules: dict[str, list[str]]
    reads: tuple[str, ...] | None


class Function(Protocol):
    """A function over rows or over batches."""

    def describe(self) -> Description:
        """Return what its definition and its annotations say."""
        ...

    def bind(self, types: Mapping[str, str]) -> None:
        """Take over the DuckDB types of its outputs."""
        ...

    def make(self, batch: pa.RecordBatch, progress: Progress) -> Made:
        """Run over a batch. Raises Broken, and MemoryError."""
        ...


def find_function(module: ModuleType) -> Function:
    """Return the model of a file that has been imported. Raises Unfit where it has none that can be."""
    found = {id(item): item for item in vars(module).values() if definition_of(item) is not None}
    if len(found) != 1:
        raise Unfit("it has no function marked with @headrace.model" if not found else "it has two models")
    (function,) = found.values()
    parameters = list(inspect.signature(function).parameters.values())
    if len(parameters) != 1:
        raise Unfit(f"{function.__name__} takes {len(parameters)} arguments; a model takes a row, or a batch")
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception as error:
        raise Unfit(f"the annotations of {function.__name__} cannot be resolved: {error}") from error
    definition = definition_of(function)
    assert definition is not None
    files = {str(module.__file__), *module.__dict__.get("__helpers__", ())}
    annotation = hints.get(parameters[0].name)
    if annotation is pa.RecordBatch:
        return _BatchFunction(function, definition, files)
    return _RowFunction(function, definition, inputs_of(annotation), hints.get("return"), files)


class _RowFunction:
    """`def orders(row: Row) -> Order | None`."""

    def __init__(
        self,
        call: Callable[[Any], Any],
        definition: Definition,
        inputs: Inputs,
        returns: Any,
        files: Collection[str],
    ) -> None:
        bare, _, _ = taken_apart(returns)
        if not isinstance(bare, type) or bare is type(None):
            raise Unfit(f"{call.__name__} does not say what it returns: write -> Order, or -> Order | None")
        if isinstance(definition.contract, type):
            raise Unfit("the return annotation gives its columns; contract adds rules by column")
        self._call = call
        self._definition = definition
        self._inputs = inputs
        self._row = bare
        self._outputs = outputs_of(bare)
        self._kinds = dict[str, Kind]()
        self._files = files

    def describe(self) -> Description:
        rules = {output.name: list(output.rules) for output in self._outputs}
        added = _added(self._definition.contract, rules)
        rules = {name: [*said, *added.get(name, ())] for name, said in rules.items()}
        return Description("row", self._call.__name__, self._definition, rules, self._inputs.reads)

    def bind(self, types: Mapping[str, str]) -> None:
        self._kinds = {output.name: bound_kind(output.kind, types[output.name]) for output in self._outputs}

    def make(self, batch: pa.RecordBatch, progress: Progress) -> Made:
        rows, wrong = self._inputs.rows(batch)
        faults: list[Fault] = [(i, _CAST, *what) for i, what in wrong.items()]
        numbers, made = list[int](), list[Any]()
        call, begin, row = self._call, progress.row, self._row
        for i, take in enumerate(rows):
            if i in wrong:
                continue
            begin(i)
            taken = None
            try:
                taken = take()
                result = call(taken)
            except (MemoryError, UnknownColumn) as error:
                if isinstance(error, MemoryError):
                    raise
                raise Broken(f"{_place(error, self._files)[0]}: {error}") from error
            except BaseException as error:
                reason = _PYTHON if taken is not None else _CAST
                faults.append((i, reason, *_told(error, self._files, batch, i)))
                continue
            if result is not None and not isinstance(result, row):
                faults.append((i, _CAST, "", f"it returned {name_of(type(result))}, not {name_of(row)}"))
                continue
            numbers.append(i)
            made.append(result)
        progress.call()
        table = self._table(numbers, made, faults)
        return Made([table], faults)

    def _table(self, numbers: list[int], made: list[Any], faults: list[Fault]) -> pa.Table:
        """Return the rows as columns; a row with a value of another type than its field's fails."""
        columns: dict[str, Any] = {NUMBER: pa.array(numbers, pa.int64())}
        columns[KEPT] = pa.array([row is not None for row in made], pa.bool_())
        bad = set[int]()
        for name, kind in self._kinds.items():
            get = operator.attrgetter(name)
            try:
                values = [None if row is None else get(row) for row in made]
            except AttributeError:
                values = [getattr(row, name, None) for row in made]
            columns[name], wrong = array_of(kind, values)
            for at, what in wrong.items():
                if at not in bad:
                    bad.add(at)
                    faults.append((numbers[at], _CAST, name, f"{name}: {what}"))
        table = pa.table(columns)
        return table.filter(pa.array([at not in bad for at in range(len(made))])) if bad else table


_BESIDE = {
    "_keep": (pa.bool_(), pa.null()),
    "_error": (pa.string(), pa.large_string(), pa.string_view(), pa.null()),
}
"""The types of the columns that a function of batches may add to its outputs."""


class _BatchFunction:
    """`def orders(batch: pa.RecordBatch) -> pa.Table`: a row out for each row in, in their order.

    A column `_keep` that is not true leaves a row out, text in a column `_error` makes it a bad one.
    """

    def __init__(self, call: Callable[[Any], Any], definition: Definition, files: Collection[str]) -> None:
        self._call = call
        self._definition = definition
        self._files = files
        self._names: tuple[str, ...] = ()

    def describe(self) -> Description:
        contract = self._definition.contract
        if isinstance(contract, type):
            rules = {output.name: list(output.rules) for output in outputs_of(contract)}
        elif contract:
            rules = _added(contract, contract)
        else:
            raise Unfit(
                f"{self._call.__name__} does not say what its columns are: give @headrace.model a contract, "
                "a class or {column: type}"
            )
        return Description("batch", self._call.__name__, self._definition, rules, None)

    def bind(self, types: Mapping[str, str]) -> None:
        self._names = tuple(types)

    def make(self, batch: pa.RecordBatch, progress: Progress) -> Made:
        made = Made()
        self._run(batch, 0, batch.num_rows, progress, made)
        return made

    def _run(self, batch: pa.RecordBatch, begin: int, end: int, progress: Progress, made: Made) -> None:
        """Run over some rows; where it raises, half by half down to the single row."""
        progress.call()
        try:
            table = self._checked(self._call(batch.slice(begin, end - begin)), end - begin)
        except (MemoryError, Broken):
            raise
        except BaseException as error:
            if end - begin == 1:
                made.faults.append((begin, _PYTHON, *_told(error, self._files, batch, begin)))
                return
            if end - begin == batch.num_rows:
                self._refuse_if_no_row_is_needed(batch, error)
            middle = (begin + end) // 2
            self._run(batch, begin, middle, progress, made)
            self._run(batch, middle, end, progress, made)
            return
        made.tables.append(self._settled(table, begin, made))

    def _refuse_if_no_row_is_needed(self, batch: pa.RecordBatch, error: BaseException) -> None:
        """Raise Broken where the function fails at the same place without any row: no row is at fault."""
        place, _ = _place(error, self._files)
        try:
            self._call(batch.slice(0, 0))
        except MemoryError:
            raise
        except BaseException as other:
            if type(other) is type(error) and _place(other, self._files)[0] == place:
                raise Broken(f"{place}: {name_of(type(error))}: {_first_line(other)}") from error

    def _checked(self, result: Any, rows: int) -> pa.Table:
        if isinstance(result, pa.RecordBatch):
            result = pa.Table.from_batches([result])
        function = self._call.__name__
        if not isinstance(result, pa.Table):
            raise Broken(f"{function} returned {name_of(type(result))}, and is to return a pyarrow Table")
        if result.num_rows != rows:
            raise Broken(
                f"{function} returned {result.num_rows} rows for {rows}: it is to return one for each, in "
                "their order, with a column _keep that is false where a row is left out"
            )
        if lacking := [name for name in self._names if name not in result.schema.names]:
            raise Broken(f"{function} returned no column {lacking[0]}, which its contract has")
        for name, types in _BESIDE.items():
            # Not left to a cast: one that fails would quote a cell.
            at = result.schema.get_field_index(name)
            if at >= 0 and (of := result.schema.field(at).type) not in types:
                raise Broken(f"{function} returned {name} as {of}: it is to be {types[0]}")
        return result

    def _settled(self, table: pa.Table, begin: int, made: Made) -> pa.Table:
        """Return the rows that did not fail, and add those that did to the faults."""
        names, count = table.schema.names, table.num_rows
        kept = (
            table["_keep"].cast(pa.bool_()).fill_null(False) if "_keep" in names else pa.repeat(True, count)
        )
        numbers = pa.array(range(begin, begin + count), pa.int64())
        settled = table.select(list(self._names)).append_column(NUMBER, numbers).append_column(KEPT, kept)
        if "_error" not in names or table["_error"].null_count == count:
            return settled
        words = table["_error"].cast(pa.string()).to_pylist()
        made.faults += [
            (begin + i, _PYTHON, "", scrub(word)) for i, word in enumerate(words) if word is not None
        ]
        return settled.filter(table["_error"].is_null())


def _added(contract: object, known: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the rules of a definition's contract. Raises Unfit for what is none."""
    if not isinstance(contract, Mapping) or not all(isinstance(rule, str) for rule in contract.values()):
        raise Unfit('contract is to be rules by column, such as {"amount": "DECIMAL(12,2)"}')
    for name in contract:
        if name not in known:
            raise Unfit(f"the contract names {name}, which is no output column")
    return {name: [rule] for name, rule in contract.items()}


# ------------------------------------------------------------------------------ what went wrong


def _told(error: BaseException, files: Collection[str], batch: pa.RecordBatch, i: int) -> tuple[str, str]:
    """Return the column and the message of a row that raised, without values."""
    if (validation := _validation(error)) is not None:
        column, words = validation
    else:
        column, words = "", _words(error, files, _cells(batch, i))
    place, code = _place(error, files)
    told = f"{name_of(type(error))}{': ' if words else ''}{words}"
    return column, f"{told} ({place}: {code})" if place else told


def _words(error: BaseException, files: Collection[str], cells: Iterator[str]) -> str:
    """Return an exception's words where they are a library's, scrubbed of values."""
    innermost = list(traceback.walk_tb(error.__traceback__))[-1][0].f_code.co_filename
    line = linecache.getline(innermost, _line(error)).lstrip()
    if innermost in files and line.startswith(("raise ", "assert ")):
        return ""
    words = scrub(str(error))
    for cell in cells:
        words = words.replace(cell, "…")
    return words


def _line(error: BaseException) -> int:
    return list(traceback.walk_tb(error.__traceback__))[-1][1]


def _cells(batch: pa.RecordBatch, i: int) -> Iterator[str]:
    """Yield the texts of a row, the longest first."""
    cells = {cell for column in batch.columns if isinstance(cell := column[i].as_py(), str)}
    return iter(sorted((cell for cell in cells if len(cell) >= _LEAST_CELL), key=len, reverse=True))


def _validation(error: BaseException) -> tuple[str, str] | None:
    """Return column and words of a Pydantic error, None for any other; its codes hold no values."""
    if name_of(type(error)) != "ValidationError" or not callable(getattr(error, "errors", None)):
        return None
    found = error.errors(include_url=False, include_context=False, include_input=False)  # type: ignore[attr-defined]
    first = found[0]
    return (str(first["loc"][0]) if first["loc"] else ""), str(first["type"])


def _place(error: BaseException, files: Collection[str]) -> tuple[str, str]:
    """Return the innermost place in the model's own files, `models/orders.py:12`, and the line there."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if frame.f_code.co_filename in files:
            return f"{frame.f_code.co_filename}:{line}", linecache.getline(
                frame.f_code.co_filename, line
            ).strip()
    return "", ""


def _first_line(error: BaseException) -> str:
    return scrub(str(error))
