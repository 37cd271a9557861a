"""Cells as Debezium's Postgres connector writes them to JSON with its default settings.

A column's converter is chosen once, from the name of its type; it takes a column of the source's text
(UTC, ISO dates, intervals in style `postgres`) and gives Python values that `json.dumps` writes. What the
connector leaves out has no converter.

The forms are those of `decimal.handling.mode=precise` and `time.precision.mode=adaptive`: numbers of fixed
scale as their unscaled bytes in base64, dates as days, times without a zone as milli- or microseconds by
their precision, those with a zone as ISO text in UTC, bits as little-endian bytes.
"""

from __future__ import annotations

import base64
import math
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from headrace.change import Column

PLACEHOLDER = "__debezium_unavailable_value"
"""What stands for a large value that the source did not send, since the change left it as it was."""

_ESCAPED = "\0\\x"  # begins a cell that was not UTF-8; its bytes in hex follow
_LONG = 1 << 63
_SECOND, _DAY = 1_000_000, 86_400_000_000
_MONTH = 2_629_800 * _SECOND  # a twelfth of 365.25 days
_NOT_A_NUMBER = {"NaN", "Infinity", "-Infinity"}
_TYPE = re.compile(r"(?P<name>.*?)(\((?P<modifier>[-\d,]+)\))?(?P<zone> with(out)? time zone)?")
_SPAN = re.compile(r"(?P<count>[+-]?\d+) (?P<unit>year|mon|day)s?|(?P<time>[+-]?\d+:\d\d:\d\d(\.\d+)?)")
_SPANS = {"year": 12 * _MONTH, "mon": _MONTH, "day": _DAY}
_OFFSET = re.compile(r"([+-])(\d\d)(?::(\d\d))?(?::(\d\d))?$")
_ELEMENT = re.compile(r'"((?:[^"\\]|\\.)*)"|([^,{}"]+)|([{}])', re.DOTALL)

Cells = Callable[[pa.Array], list[Any]]


@dataclass(frozen=True, slots=True)
class Converter:
    """Turns a column of text into values; `unavailable` is what stands for a value that was not sent."""

    cells: Cells
    unavailable: Any = None


def converter(column: Column, domains: dict[str, str]) -> Converter | None:
    """Return how a column is converted, or None if it is left out.

    `domains` says which type is underneath a domain; one that it does not know is text.
    """
    type_ = column.type
    if column.base == "domain":
        type_ = domains.get(type_, "text")
    if type_.endswith("[]"):
        of = type_.removesuffix("[]")
        return None if of in domains else _array(of)
    if column.base == "enum":
        return _TEXT
    return _scalar(type_)


def bytes_of(cell: str) -> bytes:
    """Return the bytes that a cell had at the source."""
    return bytes.fromhex(cell.removeprefix(_ESCAPED)) if cell.startswith(_ESCAPED) else cell.encode()


def _scalar(type_: str) -> Converter | None:
    name, modifier = _parts(type_)
    if name in _PLAIN or name.rpartition(".")[2] in _EXTENSIONS:
        return _PLAIN.get(name, _TEXT)
    first = modifier[0] if modifier else None
    found: Converter | None = None
    match name:
        case "numeric" if first is None:
            found = _each(_free_decimal)
        case "numeric":
            found = _each(partial(_decimal, modifier[1] if len(modifier) > 1 else 0))
        case "bit" if first == 1:
            found = _each("1".__eq__)
        case "bit" | "bit varying":
            found = _each(_bits)
        case "time without time zone":
            found = _each(partial(_clock, _unit(first)))
        case "timestamp without time zone":
            found = _each(partial(_timestamp, _unit(first)))
        case "timestamp with time zone":
            found = _each(partial(_zoned, 6 if first is None else first))
        case "interval" | "interval year to month":
            found = _each(_interval)
    return found


def _unit(precision: int | None) -> int:
    """Return in how many microseconds a time of so many digits is counted: milliseconds, where those do."""
    return 1 if precision is None or precision > 3 else 1000


def _parts(type_: str) -> tuple[str, list[int]]:
    """Return a type's name and its modifiers: `time(3) without time zone` has the modifier 3."""
    found = _TYPE.fullmatch(type_)
    assert found is not None
    modifier = found["modifier"]
    return found["name"] + (found["zone"] or ""), [int(n) for n in modifier.split(",")] if modifier else []


def _each(convert: Callable[[str], Any], unavailable: Any = None) -> Converter:
    def cells(column: pa.Array) -> list[Any]:
        return [None if cell is None else convert(cell) for cell in column.to_pylist()]

    return Converter(cells, unavailable)


# -- text, numbers, bytes ------------------------------------------------------------------------------


def _texts(column: pa.Array) -> list[Any]:
    if not pc.any(pc.starts_with(column, _ESCAPED)).as_py():
        return list(column.to_pylist())
    return [cell and bytes_of(cell).decode(errors="replace") for cell in column.to_pylist()]


def _integers(column: pa.Array) -> list[Any]:
    return list(column.cast(pa.int64()).to_pylist())


def _booleans(column: pa.Array) -> list[Any]:
    return list(pc.equal(column, "t").to_pylist())


def _float(cell: str) -> float | str:
    value = float(cell)
    return value if math.isfinite(value) else cell


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytea(cell: str) -> str:
    return _base64(bytes.fromhex(cell.removeprefix("\\x")))


def _unscaled(number: int) -> str:
    """Return the shortest big-endian two's complement of a number."""
    size = (number if number >= 0 else ~number).bit_length() // 8 + 1
    return _base64(number.to_bytes(size, "big", signed=True))


def _decimal(scale: int, cell: str) -> str | None:
    if cell in _NOT_A_NUMBER:
        return None
    whole, _, fraction = cell.partition(".")
    scale %= 2048  # the connector does not know negative ones: -2 is 2046 to it
    # Not int(text), which takes no more than 4300 digits.
    return _unscaled(int(Decimal(whole + fraction)) * 10 ** (scale - len(fraction)))


def _free_decimal(cell: str) -> dict[str, Any] | None:
    if cell in _NOT_A_NUMBER:
        return None
    whole, _, fraction = cell.partition(".")
    fraction = fraction.rstrip("0")
    return {"scale": len(fraction), "value": _unscaled(int(Decimal(whole + fraction)))}


def _money(cell: str) -> str:
    cents = int("".join(filter(str.isdigit, cell)))
    return _unscaled(-cents if "-" in cell or "(" in cell else cents)


def _bits(cell: str) -> str:
    return _base64(int(cell or "0", 2).to_bytes(len(cell) // 8 + 1, "little").rstrip(b"\0"))


def _point(cell: str) -> dict[str, Any]:
    x, y = cell.strip("()").split(",")
    # Well-known binary of OGC: little-endian, type 1, both coordinates.
    binary = struct.pack("<BIdd", 1, 1, float(x), float(y))
    return {"x": _float(x), "y": _float(y), "wkb": _base64(binary), "srid": None}


# -- time ----------------------------------------------------------------------------------------------


def _year(cell: str) -> tuple[str, int]:
    """Return what follows the year, without the era, and the year, in which 0 is 1 BC."""
    year, _, rest = cell.partition("-")
    era = rest.endswith(" BC")
    return rest.removesuffix(" BC"), 1 - int(year) if era else int(year)


def _days(cell: str) -> int:
    """Return the days from 1970-01-01, in the calendar of today at all times."""
    rest, year = _year(cell)
    month, day = int(rest[:2]), int(rest[3:5])
    # Counted in years that begin in March, so that the leap day is the last; 400 years are 146097 days.
    year -= month < 3
    cycle, of_cycle = divmod(year, 400)
    of_year = (153 * (month - 3 if month > 2 else month + 9) + 2) // 5 + day - 1
    return cycle * 146_097 + of_cycle * 365 + of_cycle // 4 - of_cycle // 100 + of_year - 719_468


def _date(infinite: tuple[int, int], cell: str) -> int:
    if cell.endswith("infinity"):
        return infinite[cell.startswith("-")]
    return _days(cell)


def _micros(cell: str) -> int:
    """Return the microseconds of `hours:minutes:seconds[.fraction]`."""
    hours, minutes, seconds = cell.split(":")
    whole, _, fraction = seconds.partition(".")
    return ((int(hours) * 60 + int(minutes)) * 60 + int(whole)) * _SECOND + int(fraction.ljust(6, "0"))


def _clock(unit: int, cell: str) -> int:
    return _micros(cell) // unit


def _timestamp(unit: int, cell: str) -> int:
    if cell.endswith("infinity"):
        return (9_223_372_036_825_200_000 if cell[0] == "i" else -9_223_372_036_832_400_000) // unit
    date, _, time = cell.partition(" ")
    time, _, era = time.partition(" ")
    days = _days(f"{date} {era}" if era else date)
    whole, fraction = divmod(_micros(time), _SECOND)
    # Past the year 294246 the connector's seconds saturate, and what is added wraps around.
    seconds = min((days * 86_400 + whole) * _SECOND, _LONG - 1)
    return ((seconds + fraction + _LONG) % (2 * _LONG) - _LONG) // unit


def _zoned(digits: int, cell: str) -> str:
    if cell.endswith("infinity"):
        return cell
    rest, year = _year(cell)
    month_and_day, _, time = rest.partition(" ")
    whole, _, fraction = time.partition("+")[0].partition(".")
    sign = "-" if year < 0 else "+" if year > 9999 else ""
    part = "." + fraction.ljust(digits, "0") if digits else ""
    return f"{sign}{abs(year):04}-{month_and_day}T{whole}{part}Z"


def _clock_of_zone(cell: str) -> int:
    """Return the microseconds since midnight in UTC."""
    found = _OFFSET.search(cell)
    assert found is not None
    hours, minutes, seconds = (int(part or 0) for part in found.groups()[1:])
    east = (hours * 3600 + minutes * 60 + seconds) * (1 if found[1] == "+" else -1)
    return (_micros(cell[: found.start()]) - east * _SECOND) % _DAY


def _zoned_time(unit: int, cell: str) -> str:
    seconds, fraction = divmod(_clock_of_zone(cell) // unit * unit, _SECOND)
    part = f".{fraction:06}".rstrip("0") if fraction else ""
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{part}Z"


def _interval(cell: str) -> int:
    """Return microseconds, in which a month is 30.4375 days; as many as fit in 64 bits."""
    total = 0
    for part in _SPAN.finditer(cell):
        if time := part["time"]:
            total += _micros(time.lstrip("+-")) * (-1 if time[0] == "-" else 1)
        else:
            total += int(part["count"]) * _SPANS[part["unit"]]
    return max(-_LONG, min(total, _LONG - 1))


# -- arrays --------------------------------------------------------------------------------------------


def _array(type_: str) -> Converter | None:
    """Return how an array is converted, one dimension; of more, the connector gives a null for each part.

    An element whose type has a schema, which the server's own do not show, is taken for an enum.
    """
    name, modifier = _parts(type_)
    if name in _NO_ELEMENTS:
        return None
    if name == "bit":
        return Converter(lambda column: [None] * len(column))
    element = _ELEMENTS.get(name) or _scalar(type_)
    if name == "time without time zone":
        element = _each(partial(_element_clock, _unit(modifier[0] if modifier else None)))
    if element is None and "." in name:
        element = _TEXT
    if element is None:
        return None
    strict = name == "numeric"
    return Converter(partial(_lists, element.cells, strict), _UNAVAILABLE_ELEMENTS.get(name))


def _element_clock(unit: int, cell: str) -> int:
    """Return a time as it comes out of an array: in milliseconds, and 24:00 is 0."""
    return _micros(cell) % _DAY // 1000 * 1000 // unit


def _lists(cells: Cells, strict: bool, column: pa.Array) -> list[Any]:
    """Convert the elements of all arrays at once; `strict` if one NaN makes its whole array null."""
    rows = [None if cell is None else _elements(cell) for cell in column.to_pylist()]
    flat = iter(cells(pa.array([part for row in rows if row is not None for part in row], pa.string())))
    found: list[Any] = []
    for row in rows:
        if row is None:
            found.append(None)
            continue
        values = [next(flat) for _ in row]
        lost = strict and any(part in _NOT_A_NUMBER for part in row)
        found.append(None if lost else values)
    return found


def _elements(cell: str) -> list[str | None]:
    """Return the elements of an array literal; a nested array is None."""
    found: list[str | None] = []
    depth = 0
    for part in _ELEMENT.finditer(cell, cell.index("{")):
        quoted, plain, brace = part.groups()
        if brace:
            depth += 1 if brace == "{" else -1
            if depth == 2 and brace == "{":
                found.append(None)
        elif depth == 1:
            found.append(
                re.sub(r"\\(.)", r"\1", quoted, flags=re.DOTALL)
                if plain is None
                else None
                if plain == "NULL"
                else plain
            )
    return found


def _of(names: Sequence[str], converter: Converter) -> dict[str, Converter]:
    return dict.fromkeys(names, converter)


_TEXT = Converter(_texts, PLACEHOLDER)
_PLAIN = {
    **_of(["text", "character varying", "character", "bpchar", "name", '"char"', "uuid", "json"], _TEXT),
    **_of(["jsonb", "xml", "inet", "cidr", "macaddr", "macaddr8", "tsvector"], _TEXT),
    **_of(["int4range", "int8range", "numrange", "tsrange", "tstzrange", "daterange"], _TEXT),
    **_of(["smallint", "integer", "bigint", "oid"], Converter(_integers)),
    **_of(["real", "double precision"], _each(_float)),
    "boolean": Converter(_booleans),
    "bytea": _each(_bytea, _base64(PLACEHOLDER.encode())),
    "money": _each(_money),
    "point": _each(_point),
    # What the server's 32 bits hold at either end, counted from 2000, as the connector counts on from 1970.
    "date": _each(partial(_date, (-2_147_472_692, -2_147_472_691))),
    "time with time zone": _each(partial(_zoned_time, 1)),
}
_ELEMENTS = {
    "date": _each(partial(_date, (-622_191_234, -625_821_272))),
    "time with time zone": _each(partial(_zoned_time, _SECOND)),
}
_EXTENSIONS = {"citext", "ltree"}
_NO_ELEMENTS = {"money", "point", "xml", "name", "bit varying", "interval", "interval year to month"}
_UNAVAILABLE_ELEMENTS: dict[str, Any] = {
    **{name: [PLACEHOLDER] for name in ("text", "character varying", "character", "json", "jsonb")},
    **{name: list(PLACEHOLDER.encode()) for name in ("integer", "bigint", "date")},
    "bytea": [_base64(PLACEHOLDER.encode())],
    "uuid": ["b68a35a7-17ad-35b3-af2a-ae46edb4545a"],  # made of the placeholder's bytes
}
