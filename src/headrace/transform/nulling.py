"""Cells that a check nulls, and what their rows say of them."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

NULLED = {"_nulled": "VARCHAR"}
"""The column (name, DuckDB type) of a model with a check that nulls: the names of the row's columns whose
cells are null for that, as `a, b`; null where none is."""


def null_cells(rows: pa.Table, violations: Iterable[tuple[str, pa.ChunkedArray]]) -> pa.Table:
    """Return rows without the cells of a column that violate something, and with the column of `NULLED`."""
    violated: dict[str, pa.ChunkedArray] = {}
    for column, found in violations:
        violated[column] = pc.or_(violated.get(column, found), found)
    names = pa.repeat(pa.scalar(None, pa.string()), rows.num_rows)
    for column, found in violated.items():
        at, cells = rows.schema.get_field_index(column), rows[column]
        rows = rows.set_column(at, column, pc.if_else(found, pa.scalar(None, cells.type), cells))
        longer = pc.fill_null(pc.binary_join_element_wise(names, column, ", "), column)
        names = pc.if_else(found, longer, names)
    (nulled,) = NULLED
    return rows.append_column(nulled, names)
