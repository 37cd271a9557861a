"""What a single setting may be: each parser takes a value of headrace.toml and returns it as it is used.

All raise `Invalid` with what is wrong, which the document puts its place before.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from headrace.document import Invalid, Parser, kind_of, quoted


def string(value: object, example: str = "") -> str:
    """Return a value that is a string; `example` continues the complaint about one that is not."""
    if not isinstance(value, str):
        raise Invalid(f"must be a string{example}, not {kind_of(value)}")
    return value


def only(*allowed: str) -> Parser:
    """Parse one of a few words."""

    def parse(value: object) -> str:
        if string(value) not in allowed:
            names = " or ".join(f'"{name}"' for name in allowed)
            raise Invalid(f"{quoted(string(value))} is not supported; it must be {names}")
        return string(value)

    return parse


_MILLISECONDS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_BYTES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def boolean(value: object) -> bool:
    """Parse true or false."""
    if not isinstance(value, bool):
        raise Invalid(f"must be true or false, not {kind_of(value)}")
    return value


def _scaled(text: str, units: dict[str, int]) -> int | None:
    match = re.fullmatch(r"([0-9]{1,12})([A-Za-z]+)", text)
    return int(match[1]) * units[match[2]] if match and match[2] in units else None


def _ranged(number: int | None, shown: str, units: dict[str, int], least: str, most: str) -> int:
    if number is None:
        what, like = ("duration", '"250ms", "10s", "5m" or "2h"')
        if units is _BYTES:
            what, like = ("size", '"64KiB", "16MiB" or "1GiB", or as an integer of bytes')
        raise Invalid(f"{shown} is not a {what}; write it like {like}")
    if not (_scaled(least, units) or 0) <= number <= (_scaled(most, units) or 0):
        raise Invalid(f'{shown} is out of range; allowed are "{least}" to "{most}"')
    return number


def duration(least: str, most: str) -> Parser:
    """Parse to seconds, within `least` and `most`."""

    def parse(value: object) -> float:
        text = string(value, ' such as "10s"')
        number = _scaled(text, _MILLISECONDS)
        return _ranged(number, quoted(text), _MILLISECONDS, least, most) / 1_000

    return parse


def duration_or_forever(least: str, most: str) -> Parser:
    """Parse to seconds, within `least` and `most`, or None for `"forever"`."""
    limited = duration(least, most)
    return lambda value: None if value == "forever" else limited(value)


def size(least: str, most: str) -> Parser:
    """Parse to bytes, within `least` and `most`."""

    def parse(value: object) -> int:
        if type(value) is int:
            return _ranged(value, "this number of bytes", _BYTES, least, most)
        text = string(value, ' such as "16MiB", or an integer of bytes')
        return _ranged(_scaled(text, _BYTES), quoted(text), _BYTES, least, most)

    return parse


def count(least: int, most: int) -> Parser:
    """Parse an integer within `least` and `most`."""

    def parse(value: object) -> int:
        if type(value) is not int:
            raise Invalid(f"must be an integer, not {kind_of(value)}")
        if not least <= value <= most:
            raise Invalid(f"{value} is out of range; allowed are {least} to {most}")
        return value

    return parse


def share(value: object) -> float:
    """Parse a part of the whole, 0 to 1."""
    if type(value) not in (int, float):
        raise Invalid(f"must be a number from 0 to 1, not {kind_of(value)}")
    number = float(value)  # type: ignore[arg-type]
    if not 0 <= number <= 1:
        raise Invalid(f"{number:g} is out of range; allowed are 0 to 1")
    return number


def web_address(text: str) -> str:
    """Check the address of a webhook."""
    if not re.fullmatch(r"https?://[^\s]+", text):
        raise Invalid("must be an address that begins with http:// or https://")
    return text


def path_in(root: Path, what: str) -> Parser:
    """Parse a local path, relative to `root`, of a file or folder."""

    def parse(value: object) -> Path:
        text = string(value)
        if "${" in text:
            raise Invalid(
                "${…} is filled in only in url, standby_url and hash_salt of a source, in anchor_url and "
                "anchor_key of [log], and in url and secret of a channel of [alerts]"
            )
        if not text.strip() or not text.isprintable() or "://" in text:
            raise Invalid(f"must be the path of a local {what}; addresses are not supported")
        return Path(os.path.normpath(root / home(text)))

    return parse


def home(text: str) -> Path:
    """Return a path with `~` filled in."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise Invalid("begins with ~ and there is no such home folder") from None


def slot(value: object) -> str:
    """Parse the name of a replication slot."""
    if not re.fullmatch("[a-z0-9_]{1,63}", string(value)):
        raise Invalid(f"{quoted(string(value))} cannot name a slot; allowed are 1 to 63 of a-z, 0-9 and _")
    return string(value)


def publication(value: object) -> str:
    """Parse the name of a publication."""
    if not 0 < len(string(value).encode()) <= 63 or not string(value).isprintable():
        raise Invalid("must be a name of 1 to 63 bytes without control characters")
    return string(value)


def patterns(value: object) -> tuple[str, ...]:
    """Parse patterns of tables, see `select_tables`."""
    example = 'such as ["public.*", "!public.audit"]'
    if not isinstance(value, list):
        raise Invalid(f"must be an array of patterns {example}, not {kind_of(value)}")
    wrong = [fault for pattern in value if (fault := pattern_fault(pattern))]
    if not wrong and all(pattern.startswith("!") for pattern in value):
        wrong = [f"includes no table; begin with what to include, {example}"]
    if wrong:
        raise Invalid(*wrong)
    return tuple(value)


def pattern_fault(pattern: object) -> str:
    """Say what is wrong with a pattern of tables; '' if nothing is."""
    if not isinstance(pattern, str):
        return f"a pattern must be a string, not {kind_of(pattern)}"
    schema, _, name = pattern.removeprefix("!").partition(".")
    clean = pattern.isprintable() and "://" not in pattern
    if not (schema and name and clean) or schema != schema.strip() or name != name.strip():
        return f'{quoted(pattern)} is not a pattern schema.table, such as "public.orders" or "!public.tmp_*"'
    return ""


def columns(value: object) -> tuple[str, ...]:
    """Parse patterns `schema.table.column`."""
    return _columns(value, 3, "schema.table.column", '["public.users.email", "public.*.password"]')


def marked_columns(value: object) -> tuple[str, ...]:
    """Parse patterns `table.column` or `schema.table.column`."""
    return _columns(value, 2, "table.column", '["users.email", "crm.*.phone"]')


def _columns(value: object, least: int, form: str, examples: str) -> tuple[str, ...]:
    example = f"such as {examples}"
    if not isinstance(value, list):
        raise Invalid(f"must be an array of patterns of columns {example}, not {kind_of(value)}")
    wrong = [fault for pattern in value if (fault := _column_fault(pattern, least, form, examples))]
    if wrong:
        raise Invalid(*wrong)
    return tuple(value)


def _column_fault(pattern: object, least: int, form: str, examples: str) -> str:
    if not isinstance(pattern, str):
        return f"a pattern must be a string, not {kind_of(pattern)}"
    parts = pattern.split(".")
    clean = pattern.isprintable() and "://" not in pattern and not pattern.startswith("!")
    if len(parts) < least or not clean or any(part != part.strip() for part in parts) or not all(parts):
        return f"{quoted(pattern)} is not a pattern {form}, such as {examples[1:].partition(',')[0]}"
    return ""


def condition(value: object) -> str:
    """Parse a condition in SQL."""
    text = string(value, " with a condition in SQL")
    if not text.strip() or "\0" in text:
        raise Invalid("must be a condition in SQL, such as \"created_at >= '2024-01-01'\"")
    return text.strip()
