"""Source keys: the identity of a destination row, as one string.

One key column: its text. Several: a JSON array of their texts, which no two keys share.
"""

from __future__ import annotations

from collections.abc import Sequence


def quoted(name: str) -> str:
    """Quote an identifier for SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """Quote a string for SQL."""
    return "'" + text.replace("'", "''") + "'"


def source_key(cells: Sequence[str]) -> str:
    """Return the DuckDB expression of a source key over expressions of text cells."""
    if len(cells) == 1:
        return cells[0]
    return f"to_json([{', '.join(cells)}])::VARCHAR"


def key_of_row(key: Sequence[str]) -> str:
    """Return the expression of a staged change's own key."""
    return source_key([quoted(name) for name in key])


def key_before(key: Sequence[str]) -> str:
    """Return the expression of the key that a staged change's row had before it."""
    cells = [
        f"CASE WHEN _before IS NULL THEN {quoted(name)} ELSE _before[{literal(name)}] END" for name in key
    ]
    return source_key(cells)
