"""Source keys: the identity of a destination row, as one string.

One key column: its text. Several: a JSON array of their texts, which no two keys share. No key: a JSON
array of all cells, in which null is no text; rows that agree in all of them share it.
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.change import TableSchema


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
    return source_key(_cells_before(key))


def identity(schema: TableSchema) -> tuple[str, str]:
    """Return the expressions of a staged change's own source key, and of the one before the change."""
    if schema.key:
        return key_of_row(schema.key), key_before(schema.key)
    names = [column.name for column in schema.columns]
    return _content([quoted(name) for name in names]), _content(_cells_before(names))


def _content(cells: Sequence[str]) -> str:
    # Nulls at the end are left out: a column that is added, null in every row, changes no row's key.
    return f"regexp_replace(to_json([{', '.join(cells)}])::VARCHAR, '(,null)+\\]$', ']')"


def _cells_before(names: Sequence[str]) -> list[str]:
    return [
        f"CASE WHEN _before IS NULL THEN {quoted(name)} ELSE _before[{literal(name)}] END" for name in names
    ]
