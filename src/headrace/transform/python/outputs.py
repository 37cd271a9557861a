"""The columns that a class of rows has, and their values as Arrow. Runs in the worker.

Values are held strictly to what the class says, and travel as what DuckDB casts without loss: a Decimal as
its text, which DuckDB reads as it would in a SQL model.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import numbers
import operator
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any
from uuid import UUID

import pyarrow as pa

from headrace.definition import Contract

_INT64 = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER"}
_AWARE, _NAIVE = "TIMESTAMP WITH TIME ZONE", "TIMESTAMP"
_REFUSED = (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, ValueError)


class Unfit(Exception):
    """A class, or a function's signature, that no model can have; the message says why."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How values of one Python type become a column.

    `duckdb` is its type, '' where Python's does not say it. Values whose type is in `plain` need no
    conversion; `convert` raises TypeError or ValueError for one that is not of the kind.
    """

    name: str
    duckdb: str
    arrow: pa.DataType
    convert: Callable[[Any], Any]
    plain: frozenset[type] = frozenset()


@dataclass(frozen=True, slots=True)
class Output:
    """A column: the kind of its values, and its rules as a contract writes them, later ones over earlier."""

    name: str
    kind: Kind
    rules: tuple[str, ...]


def fields_of(row: type) -> dict[str, Any]:
    """Return the fields of a dataclass or a Pydantic model with their annotations, in order.

    Raises Unfit for any other class, and for annotations that cannot be resolved.
    """
    if dataclasses.is_dataclass(row):
        names = [field.name for field in dataclasses.fields(row) if field.init]
    elif is_pydantic(row):
        names = list(row.model_fields)  # type: ignore[attr-defined]
    else:
        raise Unfit(f"{name_of(row)} is neither a dataclass nor a Pydantic model")
    try:
        hints = typing.get_type_hints(row, include_extras=True)
    except Exception as error:
        raise Unfit(f"the annotations of {name_of(row)} cannot be resolved: {error}") from error
    return {name: hints[name] for name in names}


def is_pydantic(row: object) -> bool:
    """Whether a class is a Pydantic model, without importing Pydantic."""
    return isinstance(row, type) and hasattr(row, "model_fields") and hasattr(row, "model_validate")


def outputs_of(row: type) -> list[Output]:
    """Return the columns that the rows of a class have.

    Raises Unfit for a field whose type is no column's.
    """
    outputs = []
    for name, annotation in fields_of(row).items():
        bare, nullable, extras = taken_apart(annotation)
        if is_pydantic(row):
            extras = [*extras, *row.model_fields[name].metadata]  # type: ignore[attr-defined]
        try:
            kind = _kind(bare)
        except Unfit as error:
            raise Unfit(f"{name_of(row)}.{name}: {error}") from error
        said = [extra.rule for extra in extras if isinstance(extra, Contract)]
        type_ = kind.duckdb or next(filter(None, map(_decimal_of, extras)), "")
        rules = [type_, "" if nullable else "NOT NULL", *said]
        outputs.append(Output(name, kind, tuple(filter(None, rules))))
    return outputs


def bound_kind(kind: Kind, type_: str) -> Kind:
    """Return how values travel to a column of this DuckDB type."""
    if kind.name == "int" and type_ not in _INT64:
        return Kind(kind.name, type_, pa.string(), lambda value: str(_int(value)))
    if kind.name == "datetime" and type_ == _NAIVE:
        return Kind(kind.name, type_, pa.timestamp("us"), _naive)
    return kind


def taken_apart(annotation: Any) -> tuple[Any, bool, list[Any]]:
    """Return a type without `Annotated` and `None`, whether it had the latter, and what `Annotated` adds."""
    extras: list[Any] = []
    nullable = False
    while True:
        origin = typing.get_origin(annotation)
        if origin is typing.Annotated:
            annotation, *more = typing.get_args(annotation)
            extras += more
        elif origin in (typing.Union, types.UnionType):
            parts = typing.get_args(annotation)
            rest = [part for part in parts if part is not types.NoneType]
            if len(rest) == len(parts) or len(rest) != 1:
                return annotation, types.NoneType in parts, extras
            annotation, nullable = rest[0], True
        else:
            return annotation, nullable, extras


def array_of(kind: Kind, values: Sequence[Any]) -> tuple[pa.Array, dict[int, str]]:
    """Return values as Arrow, and by number what is wrong with those not of the kind (null there)."""
    faults: dict[int, str] = {}
    if not set(map(type, values)) <= kind.plain | {types.NoneType}:
        values = list(_converted(kind, values, faults))
    try:
        return pa.array(values, kind.arrow), faults
    except _REFUSED:
        cells = list(values)
    for i, value in enumerate(cells):
        try:
            pa.array([value], kind.arrow)
        except _REFUSED:
            faults[i], cells[i] = f"the {kind.name} does not fit {kind.arrow}", None
    return pa.array(cells, kind.arrow), faults


def _converted(kind: Kind, values: Sequence[Any], faults: dict[int, str]) -> Iterator[Any]:
    for i, value in enumerate(values):
        try:
            yield None if value is None else kind.convert(value)
        except (TypeError, ValueError) as error:
            faults[i] = (
                str(error) if isinstance(error, _Said) else f"{name_of(type(value))} is no {kind.name}"
            )
            yield None


# ------------------------------------------------------------------------------ kinds of values


class _Said(ValueError):
    """What is wrong with a value, in words that do not hold it."""


def _int(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError
    return float(value)


def _exactly(kind: type, but: type | None = None) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if not isinstance(value, kind) or (but is not None and isinstance(value, but)):
            raise TypeError
        return value

    return convert


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return str(value.value) if isinstance(value, enum.Enum) else str.__str__(value)


def _decimal(value: Any) -> str:
    return str(value) if isinstance(value, Decimal) else str(_int(value))


def _aware(value: Any) -> datetime:
    if not isinstance(value, datetime):
        raise TypeError
    if value.utcoffset() is None:
        raise _Said("the datetime has no time zone")
    return value


def _naive(value: Any) -> datetime:
    if not isinstance(value, datetime):
        raise TypeError
    if value.utcoffset() is not None:
        raise _Said("the datetime has a time zone, which TIMESTAMP has not")
    return value


def _time(value: Any) -> time:
    if not isinstance(value, time) or value.tzinfo is not None:
        raise TypeError
    return value


def _bytes(value: Any) -> bytes:
    if not isinstance(value, bytes | bytearray | memoryview):
        raise TypeError
    return bytes(value)


def _uuid(value: Any) -> str:
    if not isinstance(value, UUID):
        raise TypeError
    return str(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _plain(*kinds: type) -> frozenset[type]:
    return frozenset(kinds)


_KINDS: Mapping[Any, Kind] = {
    bool: Kind("bool", "BOOLEAN", pa.bool_(), _exactly(bool), _plain(bool)),
    int: Kind("int", "BIGINT", pa.int64(), _int, _plain(int)),
    float: Kind("float", "DOUBLE", pa.float64(), _float, _plain(float)),
    str: Kind("str", "VARCHAR", pa.string(), _text, _plain(str)),
    bytes: Kind("bytes", "BLOB", pa.binary(), _bytes, _plain(bytes)),
    Decimal: Kind("Decimal", "", pa.string(), _decimal),
    date: Kind("date", "DATE", pa.date32(), _exactly(date, datetime), _plain(date)),
    datetime: Kind("datetime", _AWARE, pa.timestamp("us", "UTC"), _aware),
    time: Kind("time", "TIME", pa.time64("us"), _time),
    UUID: Kind("UUID", "UUID", pa.string(), _uuid),
    dict: Kind("JSON", "JSON", pa.string(), _json),
    Any: Kind("JSON", "JSON", pa.string(), _json),
}


def _kind(bare: Any) -> Kind:
    """Return the kind of a type, raise Unfit if there is none."""
    origin = typing.get_origin(bare)
    if origin is typing.Literal:
        return _one_of(typing.get_args(bare))
    if isinstance(bare, type) and issubclass(bare, enum.Enum):
        inner = _kind_of_values([member.value for member in bare])
        return Kind(bare.__name__, inner.duckdb, inner.arrow, lambda value: inner.convert(bare(value).value))
    if origin is list and typing.get_args(bare):
        element, _, _ = taken_apart(typing.get_args(bare)[0])
        return _list_of(_kind(element))
    known = _KINDS.get(dict if origin is dict else bare)
    if known is None:
        said = ", ".join(name_of(kind) for kind in _KINDS)
        raise Unfit(
            f"{name_of(bare)} is no type of a column; there are {said}, list of these, Literal and Enum"
        )
    return known


def _one_of(values: Sequence[Any]) -> Kind:
    inner, allowed = _kind_of_values(values), set(values)

    def convert(value: Any) -> Any:
        if value not in allowed:
            raise _Said("the value is none of its Literal")
        return inner.convert(value)

    return Kind("Literal", inner.duckdb, inner.arrow, convert)


def _list_of(element: Kind) -> Kind:
    if not element.duckdb:
        raise Unfit("a list of Decimals has no type in DuckDB; let it hold str, and cast it with a contract")

    def convert(value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise TypeError
        return [None if item is None else element.convert(item) for item in value]

    return Kind(f"list of {element.name}", f"{element.duckdb}[]", pa.list_(element.arrow), convert)


def _kind_of_values(values: Sequence[Any]) -> Kind:
    found = {type(value) for value in values}
    if len(found) != 1 or (kind := _KINDS.get(found.pop())) is None:
        raise Unfit("its values are not all of one type of a column")
    return kind


def _decimal_of(extra: Any) -> str:
    """Return the type that Pydantic's `max_digits` and `decimal_places` say, '' if there are none."""
    for part in (extra, *getattr(extra, "metadata", ())):
        digits, places = getattr(part, "max_digits", None), getattr(part, "decimal_places", None)
        if digits is not None and places is not None:
            return f"DECIMAL({digits},{places})"
    return ""


def name_of(kind: Any) -> str:
    """Return what a person calls a type."""
    return getattr(kind, "__name__", None) or str(kind)
