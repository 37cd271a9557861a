"""What a model of single rows takes in: a `Row` of texts, or an object of a class that says their types.

Runs in the worker.
"""

from __future__ import annotations

import enum
import json
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from functools import partial
from typing import Any, Protocol
from uuid import UUID

import pyarrow as pa

from headrace.definition import Row
from headrace.transform.python.outputs import Unfit, fields_of, is_pydantic, name_of, taken_apart

META = ("_op", "_epoch", "_commit", "_ordinal", "_offset", "_txid", "_committed_at")
"""Columns beside the raw table's own that a model of a table with a key sees."""

Faults = dict[int, tuple[str, str]]
"""By number of a row the column that is wrong, and what is wrong with it."""


class Inputs(Protocol):
    """How the rows of a batch become what a function takes."""

    @property
    def reads(self) -> tuple[str, ...] | None:
        """The columns that are read, None where they are not known."""
        ...

    def rows(self, batch: pa.RecordBatch) -> tuple[Iterator[Callable[[], Any]], Faults]:
        """Return for each row what makes it, which may raise, and what is wrong with some before."""
        ...


def inputs_of(annotation: Any) -> Inputs:
    """Return how a parameter of this annotation is made. Raises Unfit if it cannot be."""
    if annotation in (None, Any, Row, dict, Mapping) or typing.get_origin(annotation) in (dict, Mapping):
        return _Rows()
    if is_pydantic(annotation):
        return _validated(annotation)
    return _parsed(annotation)


@dataclass(frozen=True, slots=True)
class _Rows:
    reads: None = None

    def rows(self, batch: pa.RecordBatch) -> tuple[Iterator[Callable[[], Any]], Faults]:
        names = [name for name in batch.schema.names if name not in META]
        cells = zip(*(batch[name].to_pylist() for name in names), strict=True)

        def row(at: int, cells: tuple[Any, ...]) -> Row:
            row = Row(zip(names, cells, strict=True))
            row._beside = lambda name: batch[name][at].as_py()
            return row

        return (partial(row, at, cells) for at, cells in enumerate(cells)), {}


@dataclass(frozen=True, slots=True)
class _Validated:
    """An object of a Pydantic model, which reads texts in its lax mode, but for those of `parsers`."""

    model: Any
    reads: tuple[str, ...]
    parsers: Mapping[str, Callable[[str], Any]]

    def rows(self, batch: pa.RecordBatch) -> tuple[Iterator[Callable[[], Any]], Faults]:
        validate = self.model.model_validate
        cells = zip(*(self._column(name, batch[name].to_pylist()) for name in self.reads), strict=True)
        return (lambda row=row: validate(dict(zip(self.reads, row, strict=True))) for row in cells), {}

    def _column(self, name: str, cells: list[Any]) -> list[Any]:
        parse = self.parsers.get(name)
        return [_tried(parse, cell) for cell in cells] if parse else cells


def _tried(parse: Callable[[str], Any], cell: Any) -> Any:
    """Return what a cell says, or the cell: then it is Pydantic that says what is wrong with it."""
    try:
        return parse(cell) if isinstance(cell, str) else cell
    except (ValueError, ArithmeticError):
        return cell


def _validated(row: Any) -> _Validated:
    fields = fields_of(row)
    bare = {name: taken_apart(annotation)[0] for name, annotation in fields.items()}
    parsers = {name: _PARSERS[kind] for name in fields if (kind := _origin(bare[name])) in _NOT_PYDANTICS}
    return _Validated(row, tuple(fields), parsers)


def _origin(bare: Any) -> Any:
    return typing.get_origin(bare) or bare


@dataclass(frozen=True, slots=True)
class _Parsed:
    """An object of a dataclass, its fields parsed from the source's texts column by column."""

    row: Callable[..., Any]
    parsers: Mapping[str, tuple[str, Callable[[str], Any], bool]]

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(self.parsers)

    def rows(self, batch: pa.RecordBatch) -> tuple[Iterator[Callable[[], Any]], Faults]:
        faults: Faults = {}
        columns = [self._column(name, batch[name].to_pylist(), faults) for name in self.parsers]
        names, make = tuple(self.parsers), self.row
        cells = zip(*columns, strict=True)
        return (lambda row=row: make(**dict(zip(names, row, strict=True))) for row in cells), faults

    def _column(self, name: str, cells: Sequence[Any], faults: Faults) -> list[Any]:
        kind, parse, nullable = self.parsers[name]
        try:
            if nullable or None not in cells:
                return [parse(cell) if isinstance(cell, str) else cell for cell in cells]
        except (ValueError, ArithmeticError, KeyError):
            pass
        parsed = list[Any]()
        for i, cell in enumerate(cells):
            value = None
            try:
                value = parse(cell) if isinstance(cell, str) else cell
                if value is None and not nullable:
                    faults.setdefault(i, (name, f"{name} is null, which its type {kind} does not allow"))
            except (ValueError, ArithmeticError, KeyError):
                faults.setdefault(i, (name, f"the text of {name} is no {kind}"))
            parsed.append(value)
        return parsed


def _parsed(row: Any) -> _Parsed:
    parsers = {}
    for name, annotation in fields_of(row).items():
        bare, nullable, _ = taken_apart(annotation)
        try:
            parsers[name] = (name_of(bare), _parser(bare), nullable)
        except Unfit as error:
            raise Unfit(f"{name_of(row)}.{name}: {error}") from error
    return _Parsed(row, parsers)


def _whole(text: str) -> int:
    if "_" in text:  # Python's own spelling, which no database writes
        raise ValueError
    return int(text)


def _bytes(text: str) -> bytes:
    if not text.startswith("\\x"):
        raise ValueError
    return bytes.fromhex(text[2:])


_TRUTH = {"t": True, "true": True, "f": False, "false": False}
_PARSERS: Mapping[Any, Callable[[str], Any]] = {
    str: str,
    Any: str,
    int: _whole,
    float: float,
    Decimal: Decimal,
    bool: _TRUTH.__getitem__,
    date: date.fromisoformat,
    datetime: datetime.fromisoformat,
    time: time.fromisoformat,
    UUID: UUID,
    bytes: _bytes,
    dict: json.loads,
    list: json.loads,
}


_NOT_PYDANTICS = (datetime, time, bytes, dict, list)
"""What Postgres writes otherwise than Pydantic reads: a zone of `+00`, bytes in hex, JSON as a text."""


def _parser(bare: Any) -> Callable[[str], Any]:
    if typing.get_origin(bare) is typing.Literal:
        return {value: value for value in typing.get_args(bare)}.__getitem__
    if isinstance(bare, type) and issubclass(bare, enum.Enum):
        return bare
    parser = _PARSERS.get(dict if typing.get_origin(bare) is dict else bare)
    if parser is None:
        known = ", ".join(name_of(kind) for kind in _PARSERS)
        raise Unfit(f"{name_of(bare)} cannot be read from a text; there are {known}, Literal and Enum")
    return parser
