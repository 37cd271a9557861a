"""Cells of query results, as Python values and as JSON."""

from __future__ import annotations

import datetime as dt
import json
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


_CYCLE_YEARS, _CYCLE_DAYS = 400, 146_097  # after which the Gregorian calendar repeats
_EPOCH = dt.date(1970, 1, 1)
_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


def rows_of(table: pa.Table) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of an Arrow table as Python values; what Python cannot hold comes as text.

    So do dates and times before the year 1 (`0044-03-15 BC`), past 9999 and finer than microseconds, and
    `infinity` and `-infinity`, which DuckDB has as the greatest and least of their integers.
    """
    for batch in table.to_batches(max_chunksize=10_000):
        yield from zip(*(_values(column) for column in batch.columns), strict=True)


def _values(column: pa.Array) -> list[Any]:
    import pyarrow as pa

    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        values = _wide_values(column)
    return values


def _wide_values(column: pa.Array) -> list[Any]:
    """Convert a column in which some value is none of Python's, one by one down to the innermost."""
    import pyarrow as pa
    from pyarrow import types

    kind = column.type
    if types.is_struct(kind):
        fields = [_values(field) for field in column.flatten()]
        names = [field.name for field in kind]
        rows: list[Any] = [dict(zip(names, row, strict=True)) for row in zip(*fields, strict=True)]
        return [
            row if valid else None for row, valid in zip(rows, column.is_valid().to_pylist(), strict=True)
        ]
    if types.is_map(kind):
        return _cut(column, column.keys, column.items)
    if types.is_fixed_size_list(kind):
        column = column.cast(pa.list_(kind.value_type))
        kind = column.type
    if types.is_list(kind) or types.is_large_list(kind):
        return _cut(column, column.values)
    if types.is_timestamp(kind) or types.is_date32(kind):
        numbers = column.cast(pa.int32() if types.is_date32(kind) else pa.int64()).to_pylist()
        return [None if number is None else _moment(number, kind) for number in numbers]
    texts: list[Any] = column.cast(pa.string()).to_pylist()
    return texts


def _cut(column: pa.Array, *inner: pa.Array) -> list[Any]:
    """Give each row of a list or map column its part of what lies behind it; a map's are (key, value)."""
    offsets, valid = column.offsets.to_pylist(), column.is_valid().to_pylist()
    start, end = offsets[0], offsets[-1]
    parts = [_values(array.slice(start, end - start)) for array in inner]
    values = parts[0] if len(parts) == 1 else list(zip(*parts, strict=True))
    bounds = zip(pairwise(offsets), valid, strict=True)
    return [values[a - start : b - start] if there else None for (a, b), there in bounds]


def _moment(number: int, kind: pa.DataType) -> object:
    """Return a date or timestamp as Python has it, else as text."""
    import pyarrow as pa

    try:
        value: object = pa.scalar(number, kind).as_py()
    except (ValueError, OverflowError):
        pass
    else:
        return value
    if abs(number) == (1 << (kind.bit_width - 1)) - 1:
        return "infinity" if number > 0 else "-infinity"
    if pa.types.is_date32(kind):
        return " ".join(_day(number))
    seconds, fraction = divmod(number, _PER_SECOND[kind.unit])
    days, seconds = divmod(seconds, 86_400)
    digits = len(str(_PER_SECOND[kind.unit])) - 1
    minutes = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    rest = f".{fraction:0{digits}}" if fraction else ""
    day, *era = _day(days)
    return " ".join([f"{day}T{minutes}{rest}{'+00:00' if kind.tz else ''}", *era])


def _day(days: int) -> tuple[str, ...]:
    """Return the day so many days after 1970-01-01, with its era where that is not ours."""
    cycles, rest = divmod(days, _CYCLE_DAYS)
    day = _EPOCH + dt.timedelta(rest)
    year = day.year + cycles * _CYCLE_YEARS
    text = f"-{day:%m-%d}"
    return (f"{year:04}{text}",) if year > 0 else (f"{1 - year:04}{text}", "BC")


def json_of(value: object) -> str:
    """Return a cell as JSON: decimals as exact numbers; times, bytes and what JSON lacks as strings."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json_of(str(k))}: {json_of(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return "[" + ", ".join(map(json_of, value)) + "]"
    if isinstance(value, Decimal) and value.is_finite():
        return format(value, "f")
    return json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: object) -> object:
    """Return what the json module can write exactly."""
    if isinstance(value, bytes):
        return "\\x" + value.hex()
    if isinstance(value, dt.datetime | dt.date | dt.time):
        return value.isoformat()
    exact = value is None or isinstance(value, bool | int | str)
    exact = exact or (isinstance(value, float) and math.isfinite(value))
    return value if exact else str(value)


def rows_from_json(text: str | bytes) -> Any:
    """Read what `json_of` wrote, decimals exactly."""
    return json.loads(text, parse_float=_number)


def _number(text: str) -> float | Decimal:
    return float(text) if "e" in text.lower() else Decimal(text)
