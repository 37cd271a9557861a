"""Which changes a copy contains whose rows were read under several snapshots.

A change between the first and the last snapshot is contained where the copy read its key under a later
snapshot than the change; a change of a key is judged half by half. If the copy has no such key, the row was
gone by then, and so the changes themselves end with its going.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from headrace.change import Copy, TableId
from headrace.keys import key_before, key_of_row, literal, quoted


class _Copies(Protocol):
    def copied_parts(self, table: TableId, copy: Copy, columns: Sequence[str]) -> Iterator[pa.Table]: ...


def not_contained(
    staging: _Copies, table: TableId, key: Sequence[str], copy: Copy, changes: pa.Table
) -> pa.Table:
    """Return those of some changes beyond a copy's floor that none of its snapshots contains.

    What is left of a change of a key may be one half: the old key's row goes (op `d`), or the new one's comes
    (without `_before`). `changes` need no more columns than the key's, `_op`, `_epoch`, `_commit` and
    `_before`; those that they have stay as they are.
    """
    if copy.ceiling <= copy.floor or not key:  # without a key a copy has one snapshot
        return changes
    own = pc.equal(changes["_epoch"], copy.floor.epoch)
    if not pc.any(pc.and_(own, pc.less_equal(changes["_commit"], copy.ceiling.commit))).as_py():
        return changes
    placed = f"CASE WHEN _epoch = {copy.floor.epoch} THEN _commit END AS placed"
    cells = ", ".join(
        f"CASE WHEN _before IS NULL THEN {quoted(name)} ELSE _before[{literal(name)}] END AS b{i}"
        for i, name in enumerate(key)
    )
    held = f"(SELECT {key_of_row(key)} AS k, _commit AS c FROM part) h"
    with duckdb.connect() as db:
        db.register("changes", changes)
        db.execute(
            f"""CREATE TABLE halves AS SELECT row_number() OVER () AS i, {placed}, {cells},
            {key_of_row(key)} AS k, {key_before(key)} AS k_before, false AS came, false AS went
            FROM changes"""
        )
        for part in staging.copied_parts(table, copy, [*key, "_commit"]):
            db.register("part", part)
            db.execute(f"UPDATE halves SET came = true FROM {held} WHERE h.k = halves.k AND placed <= h.c")
            db.execute(f"UPDATE halves SET went = true FROM {held} WHERE h.k = k_before AND placed <= h.c")
        halves = db.sql(
            "SELECT *, k IS DISTINCT FROM k_before AS moved FROM halves ORDER BY i"
        ).to_arrow_table()
    return _without_halves(changes, halves, key)


def _without_halves(changes: pa.Table, halves: pa.Table, key: Sequence[str]) -> pa.Table:
    """Drop changes whose effects are contained in the copy (`came`: on the new key, `went`: on the old);
    of one that changed the key, keep the half that is not."""
    came, went, moved = (halves[name].combine_chunks() for name in ("came", "went", "moved"))
    only_goes = pc.and_(moved, pc.and_not(came, went))
    only_comes = pc.and_(moved, pc.and_not(went, came))
    for i, name in enumerate(key):
        at = changes.schema.get_field_index(name)
        cells = pc.if_else(only_goes, halves[f"b{i}"].combine_chunks(), changes[name].combine_chunks())
        changes = changes.set_column(at, name, cells)
    ops = pc.if_else(only_goes, "d", changes["_op"].combine_chunks())
    changes = changes.set_column(changes.schema.get_field_index("_op"), "_op", ops)
    before = changes["_before"].combine_chunks()
    before = pc.if_else(pc.or_(only_goes, only_comes), pa.scalar(None, before.type), before)
    changes = changes.set_column(changes.schema.get_field_index("_before"), "_before", before)
    return changes.filter(pc.invert(pc.and_(came, pc.or_(pc.invert(moved), went))))
