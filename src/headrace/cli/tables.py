"""Tables for people and for programs: rich on a terminal, aligned lines elsewhere, JSON and CSV.

Cells come from the user's data: control characters are shown as escapes, so that no value can drive
a terminal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from decimal import Decimal

from headrace.cells import json_of

MAX_ROWS = 10_000
"""Rows that a table shows; JSON lines and CSV show all."""

NULL = "NULL"


def text_of(value: object) -> str:
    """Return a cell as text: `NULL`, `true`, ISO times, nested values as JSON, bytes as hex."""
    if value is None:
        return NULL
    if isinstance(value, str):
        return value
    encoded = json_of(value)
    return str(json.loads(encoded)) if encoded.startswith('"') else encoded


def print_json_lines(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print one JSON object per row."""
    names = [json_of(name) for name in columns]
    for row in rows:
        cells = (f"{name}: {json_of(value)}" for name, value in zip(names, row, strict=True))
        sys.stdout.write("{" + ", ".join(cells) + "}\n")


def print_csv(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print CSV with a header: NULL is empty, an empty text is `""`."""
    sys.stdout.write(",".join(map(_csv, columns)) + "\n")
    for row in rows:
        sys.stdout.write(",".join("" if value is None else _csv(text_of(value)) for value in row) + "\n")


def _csv(text: str) -> str:
    plain = text and not any(character in text for character in ',"\r\n')
    return text if plain else '"' + text.replace('"', '""') + '"'


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table, numbers to the right, and how many rows there were where not all are shown."""
    shown: list[Sequence[object]] = []
    more = 0
    for row in rows:
        if len(shown) < MAX_ROWS:
            shown.append(row)
        else:
            more += 1
    right = [_numeric(row[i] for row in shown) for i in range(len(columns))]
    cells = [[_visible(text_of(value)) for value in row] for row in shown]
    if sys.stdout.isatty():
        _print_rich(columns, cells, right, shown)
    else:
        _print_plain(columns, cells, right)
    if more:
        print(f"… and {more} more rows; --csv and --json print them all.")


def _numeric(values: Iterable[object]) -> bool:
    known = [value for value in values if value is not None]
    return bool(known) and all(
        isinstance(value, int | float | Decimal) and not isinstance(value, bool) for value in known
    )


def _visible(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _print_plain(columns: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[bool]) -> None:
    widths = [max([len(name), *(len(row[i]) for row in cells)]) for i, name in enumerate(columns)]
    for row in (columns, *cells):
        padded = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        print("  ".join(padded).rstrip())


def _print_rich(
    columns: Sequence[str],
    cells: Sequence[Sequence[str]],
    right: Sequence[bool],
    values: Sequence[Sequence[object]],
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, to_right in zip(columns, right, strict=True):
        table.add_column(Text(_visible(name)), justify="right" if to_right else "left", overflow="fold")
    for row, raw in zip(cells, values, strict=True):
        table.add_row(
            *(
                Text(cell, style="dim italic" if value is None else "")
                for cell, value in zip(row, raw, strict=True)
            )
        )
    Console().print(table)
