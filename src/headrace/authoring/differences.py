"""Comparing what a model would make with what is live, key by key, in one DuckDB file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import duckdb

from headrace.keys import quoted
from headrace.masking import MASK
from headrace.transform.model import RowModel

LIVE = "headrace_live.rows"
"""The table that holds the live rows: `_source_key` and the live columns."""


@dataclass(frozen=True, slots=True)
class Rows:
    """How many rows differ in one way, with some of their source keys."""

    rows: int
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """What would be other than it is live.

    Rows are compared in the columns that both have; `cells` counts the changed ones by column. Columns are
    (name, type); `retyped` are (name, live type, new type).
    """

    added: Rows
    removed: Rows
    changed: Rows
    cells: Mapping[str, int]
    new_columns: tuple[tuple[str, str], ...]
    gone_columns: tuple[tuple[str, str], ...]
    retyped: tuple[tuple[str, str, str], ...]

    @property
    def nothing(self) -> bool:
        """Whether both are the same."""
        rows = self.added.rows or self.removed.rows or self.changed.rows
        return not (rows or self.new_columns or self.gone_columns or self.retyped)


def compare(
    db: duckdb.DuckDBPyConnection, model: RowModel, target: str, live: Mapping[str, str], examples: int
) -> Difference:
    """Compare a model's table, `target`, with the live rows, whose columns and types are `live`."""
    mine = model.types()
    both = [name for name in mine if name in live]
    cells = {name: f"c{i}" for i, name in enumerate(both)}
    same_type = {name for name in both if mine[name] == live[name]}
    new, old = (_relation(table, cells, same_type, key=_key(model, both)) for table in (target, LIVE))
    differs = [f"a.{cell} IS DISTINCT FROM b.{cell}" for cell in cells.values()]
    flags = "".join(
        f", coalesce({test}, false) AND kind = 'changed' AS d{i}" for i, test in enumerate(differs)
    )
    any_differs = " OR ".join(["a.n <> b.n", *differs])
    db.execute(
        f"""CREATE OR REPLACE TEMP TABLE differing AS
        SELECT coalesce(a.k, b.k) AS k, coalesce(a.n, b.n) AS n,
        CASE WHEN b.k IS NULL THEN 'added' WHEN a.k IS NULL THEN 'removed' ELSE 'changed' END AS kind{flags}
        FROM ({new}) a FULL JOIN ({old}) b ON a.k = b.k
        WHERE a.k IS NULL OR b.k IS NULL OR {any_differs}"""
    )
    sums = "".join(f", count(*) FILTER (d{i})" for i in range(len(both)))
    is_masked = model.masked.key
    counts = db.execute(f"SELECT count(*){sums} FROM differing").fetchall()[0][1:]
    return Difference(
        added=_rows(db, "added", examples, is_masked=is_masked),
        removed=_rows(db, "removed", examples, is_masked=is_masked),
        changed=_rows(db, "changed", examples, is_masked=is_masked),
        cells={name: count for name, count in zip(both, counts, strict=True) if count},
        new_columns=tuple((name, type_) for name, type_ in mine.items() if name not in live),
        gone_columns=tuple((name, type_) for name, type_ in live.items() if name not in mine),
        retyped=tuple((name, live[name], mine[name]) for name in both if name not in same_type),
    )


def _key(model: RowModel, columns: Collection[str]) -> str:
    """Return the expression that tells a row from all others; '' where its content alone does. Of several
    rows of one source key it has the place of each among them."""
    order = [name for name in model.kind.order if name in columns]
    if not order:
        return "_source_key" if model.schema.key else ""
    return f"_source_key || ' #' || row_number() OVER (PARTITION BY _source_key ORDER BY {', '.join(order)})"


def _relation(table: str, cells: Mapping[str, str], same_type: set[str], *, key: str) -> str:
    """Return the query of a table as key `k`, number of rows `n` and cells; what has two types as text."""
    read = {
        cell: quoted(name) if name in same_type else f"{quoted(name)}::VARCHAR"
        for name, cell in cells.items()
    }
    if key:
        columns = "".join(f", {expression} AS {cell}" for cell, expression in read.items())
        return f"SELECT {key} AS k, 1 AS n{columns} FROM {table}"
    # Without a key a source key has so many rows, which are the same.
    columns = "".join(f", any_value({expression}) AS {cell}" for cell, expression in read.items())
    return f"SELECT _source_key AS k, count(*) AS n{columns} FROM {table} GROUP BY _source_key"


def _rows(db: duckdb.DuckDBPyConnection, kind: str, examples: int, *, is_masked: bool) -> Rows:
    ((rows,),) = db.execute(
        f"SELECT coalesce(sum(n), 0)::BIGINT FROM differing WHERE kind = '{kind}'"
    ).fetchall()
    keys = db.execute(f"SELECT k FROM differing WHERE kind = '{kind}' ORDER BY k LIMIT {examples}").fetchall()
    return Rows(int(rows), tuple(MASK if is_masked else str(key) for (key,) in keys))
