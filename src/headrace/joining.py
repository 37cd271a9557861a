"""Joining: how a model takes in a table's copy and comes to where the others stand.

A copy's rows are in the log between streamed changes that may be older or newer. So a model reads them
first, then every change that they do not contain, in the log's order, each in slices of bounded size:
whatever dies, it goes on with the next slice. The outcome is that of all history in source order.

A change between the first and the last snapshot of a copy is contained in it where the copy read its
key under a later snapshot than the change; a change of a key is judged half by half. If the copy has
no such key, the row was gone by then, and so the changes themselves end with its going.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Literal

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from headrace.change import Copy, Kind, Offset
from headrace.errors import UserError
from headrace.history import absences, began, gathered, in_share, of_share, shares, told_at_once
from headrace.join import Account, Join, Joins, Why
from headrace.keys import identity, key_before, key_of_row, literal, quoted
from headrace.prepared import Prepared
from headrace.protocols import LogIndex, ModelState
from headrace.staging.copies import beyond, in_source_order
from headrace.staging.delta import DeltaStaging
from headrace.staging.unchanged import fill_unchanged
from headrace.transform.model import RowModel, preparing

logger = logging.getLogger("headrace.joining")

_STREAMED: tuple[Kind, ...] = ("rows", "truncate")
_SLICES = 3  # of the log, that one step of a rebuild takes: a transaction for each would take longer
Step = Literal["wait", "begin", "slice", "attach"]


class Joiner:
    """Takes models of one source through their joins, one slice at a time."""

    def __init__(self, source: str, log: LogIndex, staging: DeltaStaging, joins: Joins) -> None:
        self._source = source
        self._log = log
        self._staging = staging
        self._destination = joins
        self._joins: dict[str, Join] | None = None
        self._asking = threading.Lock()
        self._preparer = ThreadPoolExecutor(1, f"{source}.join")
        self._ahead: tuple[Join, RowModel, Future[tuple[Offset, Prepared]]] | None = None

    def close(self) -> None:
        """Let what is prepared ahead come to its end."""
        self._preparer.shutdown()

    def know(self, joins: dict[str, Join] | None) -> None:
        """Take over where the joins stand; None to ask the destination when it is needed."""
        with self._asking:
            self._joins = joins

    def stands_on(self, model: RowModel) -> Copy | None:
        """Return the copy that a model's table is made of, or None before it has joined one."""
        join = self._all().get(model.name)
        return self._staging.copy(model.table, join.stands) if join else None

    def runs(self, model: RowModel, staged: Offset) -> bool:
        """Whether a model takes slices like the others: it has joined, or what grows beside it is not yet
        where it stands itself."""
        join = self._all().get(model.name)
        if join is None or self._is_void(join, model, staged):
            return False
        return join.phase == "done" or (join.beside and not _is_there(join))

    def _is_void(self, join: Join, model: RowModel, staged: Offset) -> bool:
        """Whether the model's table was not captured for a while after the copy that it is made of."""
        return join.stands < self._staging.captured_since(model.table, staged)

    def joined_at(self, model: RowModel) -> Offset:
        """Return the offset at which a model joined last."""
        return self._all()[model.name].target

    def targets(self) -> list[Offset]:
        """Return the offsets at which models join, or have joined last."""
        return [join.target for join in self._all().values()]

    def history(self, model: RowModel, through: Offset, keys: pa.Array | None = None) -> pa.Table:
        """Return all that made a model's table what it is as of an offset, in source order, unchanged cells
        filled: the rows of the copy that it stands on, and every change that they do not contain.

        With `keys`, of these source keys alone, with the table-wide changes among them.
        """
        copy = self.stands_on(model)
        if copy is None:
            return self.filled(model, _of(keys, model, self._staging.read(model.table, 0, through)), through)
        copies = self._staging.copies(model.table, copy.end) if model.kind.remembers else [copy]
        return self._history(model, copies, through, partial(_of, keys, model))

    def _history(
        self, model: RowModel, copies: Sequence[Copy], through: Offset, chosen: Callable[[pa.Table], pa.Table]
    ) -> pa.Table:
        """Return the chosen rows of copies and changes that the first does not contain, in source order; and
        deletes of what a later copy has no more."""
        parts = self._staging.pieces(model.table, copies[0].after, through)
        changes = gathered(self._staging.read(model.table, through, through), map(chosen, parts))
        changes = self._not_copied(model, copies[0], changes, through)
        rows = [
            gathered(changes.slice(0, 0), map(chosen, self._staging.copied_parts(model.table, copy)))
            for copy in copies
        ]
        gone = [
            absences(model.schema, copy, [changes, *rows[:i]], rows[i], began(self._log, copy))
            for i, copy in enumerate(copies[1:], 1)
        ]
        return in_source_order([*rows, changes, *gone])

    def folded(self, model: RowModel, through: Offset, keys: pa.Array) -> Prepared:
        """Return what a model makes of all of the history of some source keys: their rows go, and what they
        came to takes their place."""
        prepared = model.whole(self.history(model, through, keys))
        rows = prepared.rows.filter(pc.is_in(prepared.rows["_source_key"], value_set=keys))
        records = prepared.records.filter(pc.is_in(prepared.records["key"], value_set=keys))
        return Prepared(reset=False, removed=keys, rows=rows, records=records, counts=prepared.counts)

    def pending(self, model: RowModel, staged: Offset) -> Copy | None:
        """Return the copy that a model has still to join, if there is one."""
        copy = self._staging.copy(model.table, staged)
        join = self._all().get(model.name)
        stands = join is not None and copy is not None and join.phase == "done" and join.end == copy.end
        return None if stands else copy

    def rebuild(self, model: RowModel, stand: Offset, *, dry_run: bool) -> None:
        """Have a model that stands at an offset made once more from all of its history, beside itself.

        One that is being rebuilt so already goes on. Raises UserError while it still takes in a copy, or is
        being rebuilt in the other way.
        """
        why: Why = "dry run" if dry_run else "rebuild"
        join, copy = self._all().get(model.name), self.stands_on(model)
        is_done = join is not None and join.phase == "done"
        newest = self._staging.copy(model.table, self._staging.through())
        if join is None or copy is None or copy != newest or not (is_done or join.why != "copy"):
            raise UserError(
                f"Model {model.name} still takes in its table's copy.", "Wait; `headrace status` tells."
            )
        if is_done:
            self._begin(model, copy, copy.end, stand, why)
        elif join.why != why:
            raise UserError(f"Model {model.name} is being rebuilt already ({join.why}).", "Wait for its end.")

    def step(
        self,
        model: RowModel,
        copy: Copy,
        stands: Mapping[str, ModelState],
        others: Sequence[Offset],
        reached: Offset,
        alert: Callable[[Sequence[str]], None],
    ) -> Step:
        """Take one step: begin, one slice, or attach; or wait for the others.

        `others` are the offsets of the models that run, `reached` the source's progress. Raises
        ModelBroken, and what the destination raises.
        """
        join = self._all().get(model.name)
        if join is None or join.end != copy.end or (join.phase != "done" and join.version != model.version):
            if others and reached < copy.end:
                return "wait"
            beside = join and model.name in stands and not self._is_void(join, model, copy.end)
            live = join.stands if join and beside else 0
            why = join.why if join and beside and join.end == copy.end else "copy"
            self._begin(model, copy, live, max(copy.end, reached), why)
            return "begin"
        if _is_there(join):
            alert(self._attach(join, model, copy, reached))
            return "attach"
        if join.beside and join.phase != "stream" and stands[model.name].offset < join.target:
            return "wait"  # what lags, after a pause say, runs up to the copy by itself
        alert(self._advance(join, model, copy, stands))
        return "slice"

    def _begin(self, model: RowModel, copy: Copy, stands: Offset, target: Offset, why: Why) -> None:
        span = (copy.begin, copy.end)
        join = Join(model.name, self._source, model.version, *span, stands, "copy", copy.begin, target, why)
        if model.kind.remembers and len(self._staging.copies(model.table, copy.end)) > 1:
            join = replace(join, phase="keys", offset=0)
        self._destination.start(join, model)
        self._keep(join)
        what = f"joins the copy of {model.table}" if why == "copy" else f"is built once more: {why}"
        logger.info("model %s %s", model.name, what)

    def _advance(
        self, join: Join, model: RowModel, copy: Copy, stands: Mapping[str, ModelState]
    ) -> Sequence[str]:
        # The live table goes on meanwhile, until what grows beside it is where it stands.
        target = stands[model.name].offset if join.beside else join.target
        through, prepared = self._taken(join, model, copy, target)
        following = replace(join, offset=through, target=target)
        accounts: Sequence[Account] | None = None
        if join.phase == "copy" and through >= copy.end:
            following = replace(following, phase="stream", offset=min(copy.after, target))
        elif join.phase == "keys":
            accounts = ()
            if through >= shares(self._staging, model.table, copy):
                following = replace(following, phase="stream", offset=min(copy.end, target))
                accounts = told_at_once(self._staging, model.table, copy, beside=join.beside)
        if not _is_there(following):
            self._ahead = (
                following,
                model,
                self._preparer.submit(self._prepare, following, model, copy, target),
            )
        issues = self._destination.step(join, following, model, prepared, accounts)
        self._keep(following)
        return issues

    def _taken(self, join: Join, model: RowModel, copy: Copy, target: Offset) -> tuple[Offset, Prepared]:
        """Return the next slice's end and outcome: what was prepared ahead, if it is of this step."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[:2] == (join, model):
            return ahead[2].result()
        return self._prepare(join, model, copy, target)

    def _prepare(self, join: Join, model: RowModel, copy: Copy, target: Offset) -> tuple[Offset, Prepared]:
        if join.phase == "keys":
            return join.offset + 1, self._share(join, model, copy)
        through, last = join.offset, copy.end if join.phase == "copy" else target
        kinds = ("copy",) if join.phase == "copy" else _STREAMED
        for _ in range(_SLICES if join.why != "copy" else 1):
            through = self._log.table_slice_end(model.table, through, last, kinds)
        with preparing(model.name):
            if join.phase == "copy":
                return through, model.prepare(
                    self._staging.read_copied(model.table, copy, join.offset, through)
                )
            return through, self._missing(model, copy, join.offset, through)

    def _share(self, join: Join, model: RowModel, copy: Copy) -> Prepared:
        """Return what all of the history through a copy's end comes to, of the next share of the keys."""
        count, copies = shares(self._staging, model.table, copy), self._staging.copies(model.table, copy.end)
        with preparing(model.name):
            mine = partial(in_share, model.schema, join.offset, count)
            whole = model.whole(self._history(model, copies, copy.end, mine))
            return of_share(whole, join.offset, count)

    def _missing(self, model: RowModel, copy: Copy, after: Offset, through: Offset) -> Prepared:
        """Prepare the changes of a span that the copy does not contain."""
        read = self._staging.read(model.table, after, through)
        changes = self._not_copied(model, copy, read, copy.end)
        prepared = model.prepare(changes)
        left_out = read.num_rows - changes.num_rows
        counts = prepared.counts
        return replace(
            prepared,
            counts=replace(counts, read=counts.read + left_out, superseded=counts.superseded + left_out),
        )

    def _not_copied(self, model: RowModel, copy: Copy, changes: pa.Table, newest: Offset) -> pa.Table:
        """Return the changes that a copy does not contain, unchanged cells filled from raw up to `newest`."""
        changes = self.filled(model, beyond(changes, copy.floor), newest)
        if copy.ceiling > copy.floor and model.schema.key:  # without a key a copy has one snapshot
            changes = self._not_copied_later(model, copy, changes)
        return changes

    def filled(self, model: RowModel, changes: pa.Table, newest: Offset) -> pa.Table:
        """Return changes with their unchanged cells filled from raw, which is read back from `newest`."""
        return fill_unchanged(self._staging, model.table, model.schema.key, changes, newest=newest)

    def _not_copied_later(self, model: RowModel, copy: Copy, changes: pa.Table) -> pa.Table:
        """Leave out what a later snapshot of the copy contains, each half of a key's change by itself."""
        key = model.schema.key
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
            for part in self._staging.copied_parts(model.table, copy, [*key, "_commit"]):
                db.register("part", part)
                db.execute(
                    f"UPDATE halves SET came = true FROM {held} WHERE h.k = halves.k AND placed <= h.c"
                )
                db.execute(
                    f"UPDATE halves SET went = true FROM {held} WHERE h.k = k_before AND placed <= h.c"
                )
            halves = db.sql(
                "SELECT *, k IS DISTINCT FROM k_before AS moved FROM halves ORDER BY i"
            ).to_arrow_table()
        return _without_halves(changes, halves, key)

    def _attach(self, join: Join, model: RowModel, copy: Copy, reached: Offset) -> Sequence[str]:
        mark = self._log.mark(join.target)
        assert mark is not None, f"offset {join.target} is not in the log"
        position, committed_at = self._log.place(join.target)
        # Behind a gap it is not in sync before its table has been copied again.
        in_sync = join.target >= reached and copy.floor.epoch == position.epoch
        found, issues = self._destination.attach(join, model, mark, position, committed_at, in_sync=in_sync)
        self._keep(replace(join, phase="done", stands=join.end))
        what = "has joined" if join.why == "copy" else f"is built ({join.why})"
        how = (
            f": {found.added} added, {found.removed} removed, {found.changed} changed" if join.beside else ""
        )
        logger.info("model %s %s at offset %d%s", model.name, what, join.target, how)
        return issues

    def _all(self) -> dict[str, Join]:
        # Whether a lane is idle is asked from another thread: what that has read must not come behind a step.
        with self._asking:
            if self._joins is None:
                self._joins = self._destination.of(self._source)
            return self._joins

    def _keep(self, join: Join) -> None:
        self._all()[join.model] = join


def _is_there(join: Join) -> bool:
    """Whether what a join builds is where it will be attached."""
    return join.phase == "stream" and join.offset >= join.target


def _of(keys: pa.Array | None, model: RowModel, changes: pa.Table) -> pa.Table:
    """Return the changes of some source keys, or all; a change of the key is one of both."""
    if keys is None:
        return changes
    own, before = identity(model.schema)
    with duckdb.connect() as db:
        db.register("changes", changes)
        found = db.sql(f"SELECT {own} AS own, {before} AS before FROM changes").to_arrow_table()
    mine = pc.equal(changes["_op"], "t")
    for column in found.columns:
        mine = pc.or_(mine, pc.is_in(column, value_set=keys))
    return changes.filter(mine)


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
