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


class Whole:
    """What the last part was a stretch of. The next one mostly is of the same, and reading that again for it
    would take as long as preparing thousands of its rows. Held until the last stretch, or another part."""

    def __init__(self) -> None:
        self._of: tuple[object, ...] = ()
        self._rows: pa.Table | None = None

    def rows_of(self, staging: DeltaStaging, part: PartSpec, model: RowModel) -> pa.Table:
        """Return the rows that a part is about."""
        of = (part.staged, part.model_id, part.kind, part.after, part.through, part.copy, part.chosen)
        if self._rows is None or of != self._of:
            self.forget()  # lest there be both while the other is read
            self._rows, self._of = _read(staging, part, model), of
        number, count = part.stretch or (0, 1)
        begin, end = (self._rows.num_rows * n // count for n in (number, number + 1))
        rows = self._rows.slice(begin, end - begin)
        if end == self._rows.num_rows:
            self.forget()  # stretches come in order
        return rows

    def forget(self) -> None:
        """Hold nothing."""
        self._rows = None


def prepare_part(
    staging: DeltaStaging,
    part: PartSpec,
    model: RowModel,
    whole: Whole | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Prepared:
    """Return what becomes of a part under its model; `whole` may be that of the part before, and
    `progress` is called while much is read. Raises ModelBroken."""
    with preparing(model.name):
        if part.kind == "keys":
            assert part.copy is not None
            assert part.shares is not None
            if whole is not None:
                whole.forget()
            return of_keys(staging, model, part.copy, part.shares, part.after, progress)
        rows = (whole or Whole()).rows_of(staging, part, model)
        if part.copy is None:
            return model.prepare(filled(staging, model, rows, part.newest))
        if part.kind == "copy":
            return model.prepare(rows)
        if part.kind == "beyond copy":
            return of_missing(staging, model, part.copy, rows)
        if part.kind == "newest":
            return of_newest(staging, model, rows, part.newest)
        behind = part.copy if part.kind == "older" else None
        return of_older(staging, model, rows, part.newest, behind=behind)


def _read(staging: DeltaStaging, part: PartSpec, model: RowModel) -> pa.Table:
    """Return the rows of a part, or of all of which it is a stretch."""
    if part.kind in ("newest", "older copy", "older"):
        return _chosen(staging, part, model)
    if part.kind == "copy":
        assert part.copy is not None
        return staging.read_copied(model.table, part.copy, part.after, part.through)
    return staging.read(model.table, part.after, part.through)


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
