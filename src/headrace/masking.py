"""Columns marked `pii`: their values are in the log, in staging and in the destination's tables, and nowhere
else.

Whatever shows cells for people to look at (previews of records, differences, entries of the log) passes them
through here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

    from headrace.change import TableId, TableSchema

MASK = "***"
"""Stands for a value that is not shown; a null is shown as one."""


@dataclass(frozen=True, slots=True)
class Masked:
    """What of a model is not shown: `cells` of its raw table and `outputs`, by column, and the source's
    `key`, where it holds such a cell."""

    cells: frozenset[str] = frozenset()
    outputs: frozenset[str] = frozenset()
    key: bool = False


NOTHING = Masked()


def marked_in(patterns: Iterable[str], table: TableId, columns: Iterable[str]) -> frozenset[str]:
    """Return the columns of a table that patterns `table.column` or `schema.table.column` mark; a pattern
    without a schema is of `public`."""
    found = set()
    for pattern in patterns:
        first, *middle, column = pattern.split(".")
        schema, name = (first, ".".join(middle)) if middle else ("public", first)
        if fnmatchcase(table.schema, schema) and fnmatchcase(table.name, name):
            found |= {each for each in columns if fnmatchcase(each, column)}
    return frozenset(found)


def masks_key(schema: TableSchema, cells: Collection[str]) -> bool:
    """Whether a table's source keys hold one of some cells; without a key they hold all."""
    return any(name in cells for name in schema.key or (column.name for column in schema.columns))


def mask_columns(table: pa.Table, names: Collection[str]) -> pa.Table:
    """Return a table with the values of some columns masked: as text, nulls as they are."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for i, name in enumerate(table.column_names):
        if name in names:
            text = pc.if_else(pc.is_null(table[name]), pa.scalar(None, pa.string()), MASK)
            table = table.set_column(i, name, text)
    return table


def mask_cells(cells: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return cells by column with those of some columns masked."""
    return {name: MASK if name in names and cell is not None else cell for name, cell in cells.items()}
