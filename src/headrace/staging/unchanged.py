"""Filling cells that the source did not send because they had not changed (TOAST).

Resolved from raw only, never from the destination, whose value may be older because a change was
quarantined. A cell's value is that of the newest earlier change of the row that carries the cell;
where the row's key changed on the way, the search goes on under its old key. Where a change of the table that
could not be decoded stands between, it may have been of this row and this cell: then nobody can tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.change import Offset, TableId
from headrace.keys import key_before, key_of_row, literal, quoted

_FIRST_LOOK = 200_000
_HISTORY = ("_op", "_epoch", "_commit", "_ordinal", "_offset", "_unchanged", "_before")


class _History(Protocol):
    def read_back(
        self, table: TableId, before: Offset, columns: Sequence[str], rows: int
    ) -> tuple[pa.Table, Offset]: ...

    def undecodable(self, table: TableId, after: Offset, through: Offset) -> pa.Table: ...


def fill_unchanged(
    history: _History, table: TableId, key: Sequence[str], changes: pa.Table, *, newest: Offset = 0
) -> pa.Table:
    """Return `changes` with every unchanged cell filled that raw can tell.

    A row with a cell that raw cannot tell keeps its `_unchanged`. Reads raw backwards from the newest of
    `changes`, or from `newest` (where a copy ends whose rows are older than they), twice as far each
    time, and no further than needed. Without a key no cell can be told: such a table sends its old rows
    whole, so that none is unchanged.
    """
    lists = changes["_unchanged"]
    if lists.null_count == changes.num_rows or not key:
        return changes
    names = pc.unique(pc.list_flatten(lists)).to_pylist()
    through = max(newest, pc.max(changes["_offset"]).as_py())
    aside = history.undecodable(table, 0, through)
    with duckdb.connect() as db:
        db.register("changes", changes)
        db.register("aside", aside.select(["_epoch", "_commit", "_ordinal"]))
        db.execute("CREATE TABLE numbered AS SELECT row_number() OVER () - 1 AS _hr_i, * FROM changes")
        found = np.zeros(changes.num_rows, dtype=np.int64)
        for name in names:
            cells = _find(db, history, table, key, name, through)
            changes = _fill(changes, name, cells)
            found[cells["i"].to_numpy()] += 1
    return _without_found(changes, found)


def _find(
    db: duckdb.DuckDBPyConnection,
    history: _History,
    table: TableId,
    key: Sequence[str],
    name: str,
    before: Offset,
) -> pa.Table:
    """Return the columns `i`, `value` of every cell of column `name` that was found, ordered by i."""
    db.execute(
        f"""CREATE OR REPLACE TEMP TABLE pending AS
        SELECT _hr_i AS i, {key_before(key)} AS k, (_epoch, _commit, _ordinal) AS place FROM numbered
        WHERE list_contains(_unchanged, {literal(name)})"""
    )
    db.execute(
        "CREATE OR REPLACE TEMP TABLE found AS SELECT i, NULL::VARCHAR AS value, place FROM pending LIMIT 0"
    )
    columns = list(dict.fromkeys([*key, name, *_HISTORY]))
    rows = _FIRST_LOOK
    while before > 0 and _number(db, "SELECT count(*) FROM pending"):
        chunk, before = history.read_back(table, before, columns, rows)
        rows *= 2
        db.register("chunk", chunk)
        db.execute(
            f"""CREATE OR REPLACE TEMP VIEW past AS
            SELECT {key_of_row(key)} AS k, {key_before(key)} AS old_k, (_epoch, _commit, _ordinal) AS place,
                   {quoted(name)} AS value,
                   _op <> 'd' AND NOT coalesce(list_contains(_unchanged, {literal(name)}), false) AS known
            FROM chunk"""
        )
        while _step(db):
            pass
    return db.sql(
        """SELECT f.i, f.value FROM found f JOIN numbered n ON n._hr_i = f.i WHERE NOT EXISTS (
          SELECT 1 FROM aside a WHERE (a._epoch, a._commit, a._ordinal) > f.place
          AND (a._epoch, a._commit, a._ordinal) < (n._epoch, n._commit, n._ordinal)) ORDER BY f.i"""
    ).to_arrow_table()


def _step(db: duckdb.DuckDBPyConnection) -> bool:
    """Look every pending cell up once; True while one moved to an older key and must look again."""
    db.execute(
        """CREATE OR REPLACE TEMP TABLE hits AS
        SELECT i, arg_max(
          {'known': known, 'value': value, 'k': old_k, 'place': past.place}, past.place) AS hit
        FROM pending JOIN past ON past.k = pending.k AND past.place < pending.place
        WHERE known OR old_k IS DISTINCT FROM past.k GROUP BY i"""
    )
    db.execute("INSERT INTO found SELECT i, hit.value, hit.place FROM hits WHERE hit.known")
    db.execute("DELETE FROM pending WHERE i IN (SELECT i FROM hits WHERE hit.known)")
    db.execute(
        """UPDATE pending SET k = hit.k, place = hit.place FROM hits
        WHERE hits.i = pending.i AND NOT hit.known"""
    )
    return _number(db, "SELECT count(*) FROM hits WHERE NOT hit.known") > 0


def _fill(changes: pa.Table, name: str, cells: pa.Table) -> pa.Table:
    mask = np.zeros(changes.num_rows, dtype=bool)
    mask[cells["i"].to_numpy()] = True
    values = cells["value"].combine_chunks().cast(pa.string())
    filled = pc.replace_with_mask(_one(changes[name]), pa.array(mask), values)
    return changes.set_column(changes.schema.get_field_index(name), name, filled)


def _without_found(changes: pa.Table, found: npt.NDArray[np.int64]) -> pa.Table:
    """Clear `_unchanged` where every cell was found; a row that still lacks one keeps its whole list."""
    lists = _one(changes["_unchanged"])
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    known = pa.array(found == lengths)
    at = changes.schema.get_field_index("_unchanged")
    return changes.set_column(at, "_unchanged", pc.if_else(known, pa.scalar(None, lists.type), lists))


def _one(cells: pa.Array | pa.ChunkedArray) -> pa.Array:
    return cells.combine_chunks() if isinstance(cells, pa.ChunkedArray) else cells


def _number(db: duckdb.DuckDBPyConnection, query: str) -> int:
    return int(db.execute(query).fetchall()[0][0])
