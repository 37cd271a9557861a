"""All of a table's history in staging, over more than one copy of it.

What a table keeps of earlier states cannot come from its newest copy. So it is the fold of every copy and
every change in the order of their positions, where a copy says two things: its rows stand where they were
read, and what it has no more was gone by then. A table that was copied once joins its copy as any other does;
of several copies and the changes between them, whole histories are folded, those of a share of the keys at a
time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pyarrow as pa

from headrace.change import Copy, Counts, Offset, Position, TableId, TableSchema
from headrace.join import Account
from headrace.keys import identity, quoted
from headrace.prepared import Prepared
from headrace.protocols import LogIndex
from headrace.staging.delta import DeltaStaging
from headrace.transform.engine import engine
from headrace.transform.model import RowModel
from headrace.undecodable import beyond_copy, of_copy

_SHARE_ROWS = 500_000
"""Changes and copied rows of the keys that are folded at once, about."""

_LAST = (1 << 62) - 1
"""An ordinal behind those of every change of a commit."""


def gathered(none: pa.Table, parts: Iterable[pa.Table]) -> pa.Table:
    """Return parts as one table, with the columns of `none`, a table without rows."""
    return pa.concat_tables([none, *(part for part in parts if part.num_rows)], promote_options="default")


def copies_of(staging: DeltaStaging, model: RowModel, newest: Copy) -> list[Copy]:
    """Return the copies of a model's table through its newest, the oldest first: those since its rows are
    known by the key that they have now."""
    copies = staging.copies(model.table, newest.end)
    others = [i for i, copy in enumerate(copies) if copy.key != newest.key]
    return copies[others[-1] + 1 :] if others else copies


def began(log: LogIndex, copy: Copy) -> int:
    """Return when a copy began, in microseconds."""
    return next(moment for offset, _, _, moment, _ in log.copy_marks() if offset == copy.begin)


def absences(
    schema: TableSchema, copy: Copy, before: Sequence[pa.Table], rows: pa.Table, moment: int
) -> pa.Table:
    """Return a delete, at a copy's floor, of each key that was there `before` and is not among its rows.

    Where a change of the key stands between the copy's snapshots, the stream itself tells how it ends.
    """
    own, other = identity(schema)
    floor, ceiling = (f"({at.epoch}, {at.commit})" for at in (copy.floor, copy.ceiling))
    key = ", ".join(map(quoted, schema.key))
    cells = ", ".join(f"any_value({quoted(name)}) AS {quoted(name)}" for name in schema.key)
    with engine() as db:
        db.register("before_it", pa.concat_tables(before, promote_options="default"))
        db.register("in_it", rows)
        db.execute(
            f"""CREATE TEMP TABLE earlier AS SELECT *, (_epoch, _commit) AS _hr_place,
            (_epoch, _commit, _ordinal) AS _hr_whole FROM (
              SELECT {own} AS _hr_k, _op IN ('d', 't') AS _hr_gone, _op = 't' AS _hr_every,
                _epoch, _commit, _ordinal, {key} FROM before_it UNION ALL BY NAME
              SELECT {other} AS _hr_k, true AS _hr_gone, false AS _hr_every, _epoch, _commit, _ordinal
              FROM before_it WHERE _before IS NOT NULL AND {other} <> {own})"""
        )
        missing = db.sql(
            f"""SELECT {cells} FROM earlier
            WHERE NOT _hr_every AND _hr_k NOT IN (SELECT {own} FROM in_it) AND _hr_k NOT IN (
              SELECT _hr_k FROM earlier
              WHERE NOT _hr_every AND _hr_place > {floor} AND _hr_place <= {ceiling})
            AND _hr_place <= {floor} GROUP BY _hr_k
            HAVING NOT arg_max(_hr_gone, _hr_whole) AND max(_hr_whole) > coalesce(
              (SELECT max(_hr_whole) FROM earlier WHERE _hr_every AND _hr_place <= {floor}), (-1, 0, 0))"""
        ).to_arrow_table()
    return _deletes(missing, Position(*copy.floor[:2], _LAST), copy.end, moment)


def _deletes(keys: pa.Table, at: Position, offset: Offset, moment: int) -> pa.Table:
    columns = {"_epoch": at.epoch, "_commit": at.commit, "_ordinal": at.ordinal, "_offset": offset}
    columns |= {"_committed_at": moment, "_txid": 0}
    deletes = keys.append_column("_op", pa.repeat("d", keys.num_rows))
    for name, value in columns.items():
        deletes = deletes.append_column(name, pa.repeat(pa.scalar(value, pa.int64()), keys.num_rows))
    return deletes


def shares(staging: DeltaStaging, table: TableId, copy: Copy) -> int:
    """Return in how many shares of its keys a table's history through a copy's end is folded."""
    return 1 + staging.count(table, 0, copy.end) // _SHARE_ROWS


def in_share(schema: TableSchema, share: int, count: int, changes: pa.Table) -> pa.Table:
    """Return the changes of one share of the keys; a change of the key is one of both."""
    own, other = (_share_of(key, count) for key in identity(schema))
    with engine() as db:
        db.register("changes", changes)
        mine = db.sql(
            f"SELECT coalesce(_op = 't' OR {own} = {share} OR {other} = {share}, false) FROM changes"
        )
        return changes.filter(mine.to_arrow_table().column(0))


def of_share(whole: Prepared, share: int, count: int) -> Prepared:
    """Return what whole histories come to, of one share of the keys, for a table in which nothing is yet."""

    def mine(rows: pa.Table, key: str) -> pa.Table:
        with engine() as db:
            db.register("keyed", rows.select([key]))
            found = db.sql(f"SELECT {_share_of(key, count)} = {share} FROM keyed").to_arrow_table()
        return rows.filter(found.column(0))

    nothing = pa.array([], pa.string())
    rows, records = mine(whole.rows, "_source_key"), mine(whole.records, "key")
    return Prepared(False, nothing, rows, records, Counts())


def _share_of(key: str, count: int) -> str:
    # A digest that no version of an engine changes: a join goes on after an update.
    return f"md5_number_lower({key}) % {count}"


def told_at_once(staging: DeltaStaging, model: RowModel, copy: Copy, *, beside: bool) -> list[Account]:
    """Return what the ledger says of histories that were folded whole: all that was read is in them. A live
    table has accounted for what was before the copy."""
    table, copies = model.table, copies_of(staging, model, copy)
    counted = copies[-1:] if beside else copies
    told = []
    for each in counted:
        aside = _sum(of_copy(staging, model, each.begin, each.end))
        if each != copy:  # what of it does not decode is in the newest
            aside = Counts(read=aside.read, superseded=aside.read)
        told.append(Account("copy", each.begin, each.end, _applied(_copied(staging, table, each)) + aside))
    if not beside:
        after = copies[0].after
        aside = _sum(beyond_copy(staging, model, copy, after, copy.end))
        rows = staging.streamed_rows(table, after, copy.end)
        told.append(Account("apply", after, copy.end, _applied(rows) + aside))
    return told


def _applied(rows: int) -> Counts:
    return Counts(read=rows, applied=rows)


def _sum(parts: Iterable[Prepared]) -> Counts:
    return sum((each.counts for each in parts), Counts())


def _copied(staging: DeltaStaging, table: TableId, copy: Copy) -> int:
    return sum(part.num_rows for part in staging.copied_parts(table, copy, ["_op"]))
