"""LSNs: places in a server's WAL, as numbers and as Postgres prints them."""

from __future__ import annotations


def format_lsn(value: int) -> str:
    """Return an LSN as Postgres prints it."""
    return f"{value >> 32:X}/{value & 0xFFFFFFFF:X}"


def parse_lsn(text: str) -> int:
    """Read an LSN as Postgres prints it."""
    high, _, low = text.partition("/")
    return (int(high, 16) << 32) + int(low, 16)
