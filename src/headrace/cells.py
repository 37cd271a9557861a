"""Cells of query results, as Python values and as JSON."""

from __future__ import annotations

import datetime as dt
import json
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


def rows_of(table: pa.Table) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of an Arrow table as Python values; what Python cannot hold comes as text."""
    for batch in table.to_batches(max_chunksize=10_000):
        yield from zip(*(_values(column) for column in batch.columns), strict=True)


def _values(column: pa.Array) -> list[Any]:
    import pyarrow as pa

    # Python's datetimes end at microseconds and at the year 9999.
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        values = column.cast(pa.string()).to_pylist()
    return values


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
