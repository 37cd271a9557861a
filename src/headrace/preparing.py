"""What becomes of one part: the same in the pipeline's process and in a worker's.

Reads raw tables and nothing else. Where a change's old value is asked for, raw is read back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pyarrow as pa

from headrace.change import Copy, Offset
from headrace.parts import PartSpec, Shares
from headrace.prepared import Prepared
from headrace.recopied import absences, copies_of, gathered, in_share, of_share
from headrace.staging.contained import not_contained
from headrace.staging.copies import beyond, in_source_order
from headrace.staging.delta import DeltaStaging
from headrace.staging.unchanged import fill_unchanged
from headrace.transform.model import RowModel, preparing

_NO_KEYS = pa.array([], pa.string())


def prepare_part(
    staging: DeltaStaging, part: PartSpec, model: RowModel, progress: Callable[[], None] = lambda: None
) -> Prepared:
    """Return what becomes of a part under its model; `progress` is called while much is read for it. Raises
    ModelBroken."""
    with preparing(model.name):
        if part.copy is not None:
            return _beside_copy(staging, part, model, part.copy, progress)
        read = _stretch(part, staging.read(model.table, part.after, part.through))
        return model.prepare(filled(staging, model, read, part.newest))


def _beside_copy(
    staging: DeltaStaging, part: PartSpec, model: RowModel, copy: Copy, progress: Callable[[], None]
) -> Prepared:
    """Return what becomes of a part that a copy counts for."""
    if part.kind == "copy":
        rows = staging.read_copied(model.table, copy, part.after, part.through)
        return model.prepare(_stretch(part, rows))
    if part.kind == "beyond copy":
        read = staging.read(model.table, part.after, part.through)
        return of_missing(staging, model, copy, _stretch(part, read))
    if part.kind == "keys":
        assert part.shares is not None
        return of_keys(staging, model, copy, part.shares, part.after, progress)
    changes = _stretch(part, _chosen(staging, part, model))
    if part.kind == "newest":
        return of_newest(staging, model, changes, part.newest)
    return of_older(staging, model, changes, part.newest, behind=copy if part.kind == "older" else None)


def _stretch(part: PartSpec, rows: pa.Table) -> pa.Table:
    """Return those of a span's rows that the part is about."""
    if part.stretch is None:
        return rows
    number, count = part.stretch
    begin, end = (rows.num_rows * n // count for n in (number, number + 1))
    return rows.slice(begin, end - begin)


def filled(staging: DeltaStaging, model: RowModel, changes: pa.Table, newest: Offset) -> pa.Table:
    """Return changes with their unchanged cells filled from raw, which is read back from `newest`."""
    return fill_unchanged(staging, model.table, model.schema.key, changes, newest=newest)


def not_copied(
    staging: DeltaStaging, model: RowModel, copy: Copy, changes: pa.Table, newest: Offset
) -> pa.Table:
    """Return the changes that a copy does not contain, unchanged cells filled from raw up to `newest`."""
    changes = filled(staging, model, beyond(changes, copy.floor), newest)
    return not_contained(staging, model.table, model.schema.key, copy, changes)


def of_missing(staging: DeltaStaging, model: RowModel, copy: Copy, read: pa.Table) -> Prepared:
    """Return what becomes of those of some changes that the copy does not contain; the others count as
    superseded."""
    changes = not_copied(staging, model, copy, read, copy.end)
    prepared = model.prepare(changes)
    left_out = read.num_rows - changes.num_rows
    counts = prepared.counts
    return replace(
        prepared,
        counts=replace(counts, read=counts.read + left_out, superseded=counts.superseded + left_out),
    )


def of_newest(staging: DeltaStaging, model: RowModel, changes: pa.Table, newest: Offset) -> Prepared:
    """Return what becomes of changes that are each the newest of its key, in a table that has no rows yet."""
    changes = filled(staging, model, changes, newest)
    # Where a row's key changed, what the old key came to is decided by itself.
    at = changes.schema.get_field_index("_before")
    nothing = pa.nulls(changes.num_rows, changes.schema.field(at).type)
    prepared = model.prepare(changes.set_column(at, "_before", nothing))
    return replace(prepared, removed=_NO_KEYS)


def of_older(
    staging: DeltaStaging, model: RowModel, changes: pa.Table, newest: Offset, *, behind: Copy | None
) -> Prepared:
    """Return what becomes of copied rows, or of those of some changes that the copy `behind` which they stand
    does not contain."""
    changes = filled(staging, model, changes, newest)
    if behind is not None:
        changes = not_contained(staging, model.table, model.schema.key, behind, changes)
    return model.prepare(changes)


def of_keys(
    staging: DeltaStaging,
    model: RowModel,
    copy: Copy,
    shares: Shares,
    number: int,
    progress: Callable[[], None] = lambda: None,
) -> Prepared:
    """Return what all of the history through a copy's end comes to, of one share of the keys."""
    in_it = partial(in_share, model.schema, number, shares.count)

    def mine(changes: pa.Table) -> pa.Table:
        progress()
        return in_it(changes)

    copies = copies_of(staging, model, copy)
    whole = model.whole(whole_history(staging, model, copies, shares.began, copy.end, mine))
    return of_share(whole, number, shares.count)


def whole_history(
    staging: DeltaStaging,
    model: RowModel,
    copies: Sequence[Copy],
    began: Sequence[int],
    through: Offset,
    chosen: Callable[[pa.Table], pa.Table],
) -> pa.Table:
    """Return the chosen rows of copies, which `began` then (microseconds), and of the changes that the first
    does not contain, in source order; and deletes of what a later copy has no more."""
    parts = staging.pieces(model.table, copies[0].after, through)
    changes = gathered(staging.read(model.table, through, through), map(chosen, parts))
    changes = not_copied(staging, model, copies[0], changes, through)
    rows = [
        gathered(changes.slice(0, 0), map(chosen, staging.copied_parts(model.table, copy))) for copy in copies
    ]
    gone = list[pa.Table]()
    for i, copy in enumerate(copies[1:], 1):
        # What an earlier copy had no more is gone already.
        before = [changes, *rows[:i], *gone]
        gone.append(absences(model.schema, copy, before, rows[i], began[i]))
    return in_source_order([*rows, changes, *gone])


def _chosen(staging: DeltaStaging, part: PartSpec, model: RowModel) -> pa.Table:
    """Return the changes of a part that has bits for those that are of it."""
    assert part.chosen is not None
    bits, seen, after = pa.py_buffer(part.chosen), 0, part.after
    held = [staging.empty(model.table)]
    while after < part.through:
        group = next(staging.row_groups(model.table, after, part.through), None)
        if group is None:
            break
        whole = group.first > after and group.last <= part.through
        if whole and not _bits(bits, seen, group.rows).true_count:
            seen += group.rows
        else:
            for rows in staging.chunks(model.table, after, min(group.last, part.through)):
                held.append(rows.filter(_bits(bits, seen, rows.num_rows)))
                seen += rows.num_rows
        after = group.last
    if (seen + 7) // 8 != len(part.chosen):
        raise LookupError(f"{model.table} has {seen} changes, and bits for {8 * len(part.chosen)}")
    # A part that was read before a column came lacks it.
    return pa.concat_tables(held, promote_options="default").combine_chunks()


def _bits(bits: pa.Buffer, first: int, count: int) -> pa.Array:
    if first + count > 8 * bits.size:
        raise LookupError(f"there are more than {8 * bits.size} changes")
    return pa.Array.from_buffers(pa.bool_(), count, [None, bits], offset=first)
