"""Changes that could not be decoded: what they come to for a model of their table.

Nothing is known of them but where they stand: not their key, not their cells. So each is a record without a
key, which no later change of a key overtakes. What does is that the table is emptied, or copied again: the
copy has the state that the change led to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from headrace.change import Copy, Counts, Offset
from headrace.decisions import PLACE
from headrace.prepared import MESSAGE, PAYLOAD, Prepared
from headrace.sources.postgres.lsn import format_lsn
from headrace.staging.copies import beyond
from headrace.transform.fold import NO_ROWS, RECORD

if TYPE_CHECKING:
    from headrace.staging.delta import DeltaStaging
    from headrace.transform.model import RowModel

_NO_KEYS = pa.array([], pa.string())
_PLACE = [f"_{name}" for name in PLACE]


def of_slice(staging: DeltaStaging, model: RowModel, after: Offset, through: Offset) -> Iterator[Prepared]:
    """Yield what those in a slice of the stream come to, if there are any."""
    rows = _streamed(staging.undecodable(model.table, after, through))
    if rows.num_rows:
        yield _prepared(staging, model, rows, rows, (after, through))


def of_copy(staging: DeltaStaging, model: RowModel, after: Offset, through: Offset) -> Iterator[Prepared]:
    """Yield what copied rows in a slice come to that cannot be decoded, if there are any."""
    rows = _copied(staging.undecodable(model.table, after, through))
    if rows.num_rows:
        yield _prepared(staging, model, rows, rows, (through, through))


def beyond_copy(
    staging: DeltaStaging, model: RowModel, copy: Copy, after: Offset, through: Offset
) -> Iterator[Prepared]:
    """Yield what those in a slice of the stream come to where a model's table is made of a copy, if there
    are any: those that the copy contains are superseded."""
    rows = _streamed(staging.undecodable(model.table, after, through))
    if rows.num_rows:
        yield _prepared(staging, model, rows, beyond(rows, copy.floor), (after, through))


def of_history(
    staging: DeltaStaging, model: RowModel, copy: Copy | None, through: Offset
) -> Iterator[Prepared]:
    """Yield what all of them come to, through an offset, that a table has which is made of a copy."""
    if copy is None:
        yield from of_slice(staging, model, 0, through)
        return
    yield from of_copy(staging, model, copy.begin, min(copy.end, through))
    yield from beyond_copy(staging, model, copy, copy.after, through)


def _streamed(rows: pa.Table) -> pa.Table:
    return rows.filter(pc.fill_null(pc.not_equal(rows["_op"], "r"), fill_value=True))


def _copied(rows: pa.Table) -> pa.Table:
    return rows.filter(pc.equal(rows["_op"], "r"))


def _prepared(
    staging: DeltaStaging, model: RowModel, rows: pa.Table, left: pa.Table, span: tuple[Offset, Offset]
) -> Prepared:
    """Return what `rows` come to, of which those `left` are not in a copy; `span` is where the table may have
    been emptied since."""
    left = _not_emptied(staging, model, left, span)
    discarded = model.decisions.about("discard", [None]) if model.decisions else None
    kept = left
    if discarded is not None and discarded.num_rows:
        places = discarded.select(list(PLACE)).rename_columns(_PLACE)
        kept = left.join(places, _PLACE, join_type="left anti").sort_by(
            [(name, "ascending") for name in _PLACE]
        )
    records = _records(kept)
    changes, of_left, of_kept = (pc.sum(each["changes"]).as_py() or 0 for each in (rows, left, kept))
    counts = Counts(
        read=changes,
        superseded=changes - of_left,
        filtered=of_left - of_kept,
        quarantined=records.num_rows,
        blocked=of_kept - records.num_rows,
    )
    return Prepared(False, _NO_KEYS, NO_ROWS, records, counts)


def _not_emptied(
    staging: DeltaStaging, model: RowModel, rows: pa.Table, span: tuple[Offset, Offset]
) -> pa.Table:
    """Leave out what stands before the table was emptied, if nothing of it stays then."""
    if model.kind.materialize != "latest" or not rows.num_rows:
        return rows
    emptied = [
        part.filter(pc.equal(part["_op"], "t")).select(_PLACE)
        for part in staging.chunks(model.table, *span, ["_op", *_PLACE])
    ]
    places = [tuple(row.values()) for part in emptied for row in part.to_pylist()]
    if not places:
        return rows
    last = max(places)
    later = [tuple(row.values()) > last for row in rows.select(_PLACE).to_pylist()]
    return rows.filter(pa.array(later, pa.bool_()))


def _records(rows: pa.Table) -> pa.Table:
    count = rows.num_rows
    is_message = pc.invert(pc.is_in(rows["kind"], value_set=pa.array(["rows", "copy"])))
    words = pc.binary_join_element_wise("a message of the source does not decode", rows["why"], ": ")
    cells: dict[str, pa.Array | pa.ChunkedArray] = {
        "stage": pa.repeat("decode", count),
        "reason": pc.if_else(is_message, MESSAGE, PAYLOAD),
        "columns": pa.repeat("", count),
        "message": pc.if_else(is_message, words, rows["why"]),
        "op": rows["_op"],
        "is_partial": pa.repeat(False, count),
        **{name: rows[f"_{name}"] for name in (*PLACE, "txid", "committed_at", "offset")},
        "preview": _previews(rows),
        "blocked": pc.subtract(rows["changes"], 1),
        "key_is_masked": pa.repeat(False, count),
    }
    columns = [cells.get(name, pa.nulls(count, RECORD.field(name).type)) for name in RECORD.names]
    return pa.table(columns, schema=RECORD)


def _previews(rows: pa.Table) -> pa.Array:
    """Return as JSON what is known: where the change stands in the source, and what it is."""
    named = zip(rows["kind"].to_pylist(), rows["_lsn"].to_pylist(), rows["changes"].to_pylist(), strict=True)
    return pa.array(
        [
            f'{{"message": "{kind}", "lsn": "{format_lsn(lsn)}"}}'
            if len(kind) == 1
            else f'{{"entry": "{kind}", "changes": {changes}}}'
            for kind, lsn, changes in named
        ],
        pa.string(),
    )
