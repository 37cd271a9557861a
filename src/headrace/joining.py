"""Joining: how a model takes in a table's copy and comes to where the others stand.

A copy's rows are in the log between streamed changes that may be older or newer. So a model reads them
first, then every change that they do not contain, in the log's order, each in slices of bounded size:
whatever dies, it goes on with the next slice. The outcome is that of all history in source order.

A table that is built once more, while it is live, of a history that is long already, takes of each key the
newest change alone, and older ones only of keys whose newest is bad: see `headrace.history`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from headrace.change import Copy, Kind, Offset
from headrace.errors import UserError
from headrace.hands import Hands
from headrace.history import History
from headrace.join import Join, Joins, Phase, Why
from headrace.keys import identity
from headrace.parts import PartKind, Shares
from headrace.prepared import Prepared
from headrace.preparing import filled, of_keys, of_missing, whole_history
from headrace.protocols import LogIndex
from headrace.quarantine.breaker import Breakers
from headrace.rebuilding import PHASES, Rebuilding, newest_decides
from headrace.recopied import began, copies_of, shares, told_at_once
from headrace.scaling.measure import Meter, building
from headrace.staging.delta import DeltaStaging
from headrace.standing import ModelState
from headrace.transform.contested import uncontested
from headrace.transform.engine import engine
from headrace.transform.model import RowModel, preparing
from headrace.undecodable import beyond_copy, of_copy, of_history, of_slice

logger = logging.getLogger("headrace.joining")

_FIRST: tuple[Phase, ...] = ("copy", "newest", "keys")
_STREAMED: tuple[Kind, ...] = ("rows", "truncate", "undecodable")
_SLICES = 3  # of the log, that one step of a rebuild takes: a transaction for each would take longer
_PATIENCE = 0.2  # seconds that a step waits for what is being found: others are to be applied meanwhile
_Slice = tuple[Offset, Iterable[Prepared]]
"""How far a slice goes, and what becomes of it."""
_AT_ONCE = 500_000  # rows; a slice of more is one large transaction, which is prepared as it is taken
Step = Literal["wait", "begin", "prepare", "slice", "attach"]


class Joiner:
    """Takes models of one source through their joins, one slice at a time."""

    def __init__(
        self,
        source: str,
        log: LogIndex,
        staging: DeltaStaging,
        joins: Joins,
        spill: Path | None = None,
        breakers: Breakers | None = None,
        meter: Meter | None = None,
    ) -> None:
        """What does not fit in memory while history is read goes to the folder `spill`; `meter` is told how
        long slices take to be prepared."""
        self.workers = Hands(source, log, staging, meter)
        self._meter = meter
        self._breakers = breakers or Breakers()
        self._source = source
        self._log = log
        self._staging = staging
        self._destination = joins
        self._joins: dict[str, Join] | None = None
        self._asking = threading.Lock()
        self._preparer = ThreadPoolExecutor(1, f"{source}.join")
        self._ahead: tuple[Join, RowModel, Future[_Slice]] | None = None
        self._spill = spill
        self._rebuilding: tuple[Join, RowModel, Rebuilding] | None = None
        self._stopped = threading.Event()

    def close(self) -> None:
        """Let what is prepared ahead come to its end, or stop where it goes on from later."""
        self._stopped.set()
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
        """Whether the model's table was not captured for a while after the copy that it is made of, or its
        rows are known by another key now."""
        copy = self._staging.copy(model.table, join.stands)
        is_of_another_key = copy is not None and copy.key != model.schema.key
        return is_of_another_key or join.stands < self._staging.captured_since(model.table, staged)

    def building(self) -> list[tuple[Join, int | None]]:
        """Return the joins that have not come to their end, and of those that read a history by its newest
        changes how many rows are found and still to be prepared."""
        joins = [join for join in self._all().values() if join.phase != "done"]
        return [(join, self._left(join) if join.phase in PHASES else None) for join in joins]

    def _left(self, join: Join) -> int:
        known = self._rebuilding
        return known[2].left(join.phase, join.offset) if known and known[1].name == join.model else 0

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
            changes = _of(keys, model, self._staging.read(model.table, 0, through))
            return filled(self._staging, model, changes, through)
        copies = copies_of(self._staging, model, copy) if model.kind.remembers else [copy]
        chosen = partial(_of, keys, model)
        return whole_history(self._staging, model, copies, self._began(copies), through, chosen)

    def _began(self, copies: Sequence[Copy]) -> tuple[int, ...]:
        return tuple(began(self._log, copy) for copy in copies)

    def prepared(self, model: RowModel, after: Offset, through: Offset) -> Iterator[Prepared]:
        """Yield what a model makes of its table's changes in a slice, piece by piece."""
        yield from self._streamed(model, after, through)
        yield from of_slice(self._staging, model, after, through)

    def _streamed(self, model: RowModel, after: Offset, through: Offset) -> Iterator[Prepared]:
        reached = after

        def here() -> Iterator[Prepared]:
            nonlocal reached
            for changes in self._staging.pieces(model.table, after, through):
                prepared = model.prepare(filled(self._staging, model, changes, through))
                reached = changes["_offset"][-1].as_py()
                del changes  # not beside what the destination makes of them
                yield prepared
                del prepared

        pieces = here() if self._meter is None else self._meter.own(model.name, here())
        # Workers may come while a large slice is prepared: the rest of it is theirs.
        while (handed := self.workers.slice(model, reached, through)) is None:
            piece = next(pieces, None)
            if piece is None:
                return
            yield piece
            del piece
        yield from handed

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
        """Take one step: begin, one slice, or attach; or wait for the others. Where a slice takes long to be
        prepared, it is left to the next step.

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
        if join.beside and join.phase in _FIRST and stands[model.name].offset < join.target:
            return "wait"  # what lags, after a pause say, runs up to the copy by itself
        return self._advance(join, model, copy, stands, alert)

    def _begin(self, model: RowModel, copy: Copy, stands: Offset, target: Offset, why: Why) -> None:
        join = Join(
            model.name,
            self._source,
            model.version,
            copy.begin,
            copy.end,
            stands,
            "copy",
            copy.begin,
            target,
            why,
        )
        if why != "copy" and newest_decides(model):
            join = replace(join, phase=PHASES[0], offset=_begin_of(copy, target))
        if model.kind.remembers and len(copies_of(self._staging, model, copy)) > 1:
            join = replace(join, phase="keys", offset=0)
        self._destination.start(join, model)
        self._keep(join)
        what = f"joins the copy of {model.table}" if why == "copy" else f"is built once more: {why}"
        logger.info("model %s %s", model.name, what)

    def _advance(
        self,
        join: Join,
        model: RowModel,
        copy: Copy,
        stands: Mapping[str, ModelState],
        alert: Callable[[Sequence[str]], None],
    ) -> Step:
        # The live table goes on meanwhile, until what grows beside it is where it stands.
        live = stands[model.name].offset if join.beside else join.target
        target = join.target if join.phase in PHASES else live
        taken = self._taken(join, model, copy, target)
        if taken is None:
            return "prepare"
        through, pieces = taken
        following, accounts = _following(replace(join, offset=through), copy, live), None
        if join.phase == "keys":
            is_last = through >= shares(self._staging, model.table, copy)
            accounts = told_at_once(self._staging, model, copy, beside=join.beside) if is_last else []
            if is_last:
                following = replace(following, phase="stream", offset=min(copy.end, live))
        if self._may_be_prepared(join, following, model, copy):
            self._submit(following, model, copy, following.target)

        def attempt(model: RowModel) -> Sequence[str]:
            made = self._prepare(join, model, copy, target)[1] if model.refused else pieces
            self._breakers.begin()
            if join.why != "dry run":
                made = self._breakers.admitted(model, made)
            with self._applying(model, made) as taken:
                return self._destination.step(join, following, model, taken, accounts)

        issues = uncontested(model, attempt)
        self._breakers.keep()
        self._keep(following)
        alert(issues)
        return "slice"

    def _taken(self, join: Join, model: RowModel, copy: Copy, target: Offset) -> _Slice | None:
        """Return the next slice's end and outcome: what was prepared ahead, if it is of this step. None while
        what to read is still being found."""
        if self._ahead is None or self._ahead[:2] != (join, model):
            self._submit(join, model, copy, target)
        assert self._ahead is not None
        slice_ = self._ahead[2]
        wait([slice_], _PATIENCE if join.phase in PHASES else None)
        if not slice_.done():
            return None
        self._ahead = None
        return slice_.result()

    def _may_be_prepared(self, join: Join, following: Join, model: RowModel, copy: Copy) -> bool:
        """Whether the next slice is known already while the one before it is applied."""
        if model.unique:
            return False  # the one before may have to be prepared once more
        if following.phase == "stream":
            # The last slice is prepared when it is its turn: it ends where the live table is then.
            return self._slice_end(following, model, copy, following.target) < following.target
        # Which keys have bad changes is known when all of the newest ones are applied.
        return join.phase == following.phase or join.phase != PHASES[0]

    def _submit(self, join: Join, model: RowModel, copy: Copy, target: Offset) -> None:
        slice_ = self._preparer.submit(self._measured, join, model, copy, target)
        self._ahead = (join, model, slice_)

    def _measured(self, join: Join, model: RowModel, copy: Copy, target: Offset) -> _Slice:
        """Prepare a slice; if it is whole, rather than prepared as it is taken, note how long that took."""
        if join.phase in PHASES:
            with preparing(model.name):
                self._rebuilt(join, model, copy).find(join.phase, join.offset, join.target)
        began, used = time.monotonic(), time.process_time()
        through, pieces = self._prepare(join, model, copy, target)
        if self._meter is not None and isinstance(pieces, list):
            rows = sum(piece.counts.read for piece in pieces)
            spent = (time.monotonic() - began, time.process_time() - used)
            self._meter.prepared(building(model.name), rows, *spent)
        return through, pieces

    def _applying(
        self, model: RowModel, pieces: Iterable[Prepared]
    ) -> AbstractContextManager[Iterable[Prepared]]:
        """Have it noted how long the destination takes for pieces."""
        if self._meter is None:
            return nullcontext(pieces)
        work = building(model.name)
        return self._meter.applying(pieces, lambda piece: (work, piece.counts.read), work)

    def _slice_end(self, join: Join, model: RowModel, copy: Copy, target: Offset) -> Offset:
        through, last = join.offset, copy.end if join.phase == "copy" else target
        kinds = ("copy",) if join.phase == "copy" else _STREAMED
        for _ in range(_SLICES if join.why != "copy" else 1):
            through = self._log.table_slice_end(model.table, through, last, kinds)
        return through

    def _prepare(self, join: Join, model: RowModel, copy: Copy, target: Offset) -> _Slice:
        with preparing(model.name):
            if join.phase in PHASES:
                reading = self._rebuilt(join, model, copy)
                again = model if model.refused else None
                through, parts = reading.prepare(join.phase, join.offset, join.target, again)
                is_first = join.phase == PHASES[0] and join.offset == _begin_of(copy, join.target)
                aside = [*of_history(self._staging, model, copy, join.target)] if is_first else []
                return through, _both(parts, aside)
            if join.phase == "keys":
                aside = [] if join.offset else [*of_history(self._staging, model, copy, copy.end)]
                return join.offset + 1, _both(self._share(join, model, copy), aside)
            through = self._slice_end(join, model, copy, target)
            return through, self._prepared_slice(join, model, copy, through)

    def _prepared_slice(self, join: Join, model: RowModel, copy: Copy, through: Offset) -> Iterable[Prepared]:
        """Return what becomes of the next slice of a copy, or of the changes behind it."""
        after, is_copy = join.offset, join.phase == "copy"
        decoded = of_copy if is_copy else partial(beyond_copy, copy=copy)
        aside = [*decoded(self._staging, model, after=after, through=through)]
        kind: PartKind = "copy" if is_copy else "beyond copy"
        if (handed := self.workers.joining(kind, model, copy, after, through)) is not None:
            return chain(handed, aside)
        if is_copy:
            rows = self._staging.read_copied(model.table, copy, after, through)
            return [model.prepare(rows), *aside]
        if self._staging.count(model.table, after, through) > _AT_ONCE:
            return chain(self._pieces(model, copy, after, through), aside)
        read = self._staging.read(model.table, after, through)
        return [of_missing(self._staging, model, copy, read), *aside]

    def _rebuilt(self, join: Join, model: RowModel, copy: Copy) -> Rebuilding:
        """Return what reads a model's history through a join's target; it stays from slice to slice."""
        same = replace(join, phase=PHASES[0], offset=0)
        if self._rebuilding is None or self._rebuilding[:2] != (same, model):
            history = History(
                self._staging, model.table, model.schema.key, copy, join.target,
                spill=self._spill, stopped=self._stopped,
            )  # fmt: skip
            bad_keys = partial(self._destination.bad_keys, join)
            reading = Rebuilding(self._staging, model, copy, history, bad_keys, self.workers)
            self._rebuilding = (same, model, reading)
        return self._rebuilding[2]

    def _share(self, join: Join, model: RowModel, copy: Copy) -> Iterable[Prepared]:
        """Return what all of the history through a copy's end comes to, of the next share of the keys."""
        count = shares(self._staging, model.table, copy)
        parted = Shares(count, self._began(copies_of(self._staging, model, copy)))
        if (handed := self.workers.share(model, copy, parted, join.offset)) is not None:
            return handed
        return [of_keys(self._staging, model, copy, parted, join.offset)]

    def _pieces(self, model: RowModel, copy: Copy, after: Offset, through: Offset) -> Iterator[Prepared]:
        with preparing(model.name):
            for read in self._staging.pieces(model.table, after, through):
                yield of_missing(self._staging, model, copy, read)

    def _attach(self, join: Join, model: RowModel, copy: Copy, reached: Offset) -> Sequence[str]:
        mark = self._log.mark(join.target)
        assert mark is not None, f"offset {join.target} is not in the log"
        position, committed_at = self._log.place(join.target)
        # Behind a gap it is not in sync before its table has been copied again.
        in_sync = join.target >= reached and copy.floor.epoch == position.epoch
        found, issues = self._destination.attach(join, model, mark, position, committed_at, in_sync=in_sync)
        self._keep(replace(join, phase="done", stands=join.end))
        self._rebuilding = None
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


def _both(made: Iterable[Prepared], aside: Sequence[Prepared]) -> Iterable[Prepared]:
    """Return one behind the other: a list, if all is made already, so that it is known how long that took."""
    return [*made, *aside] if isinstance(made, list) else chain(made, aside)


def _begin_of(copy: Copy, target: Offset) -> Offset:
    """Return the offset behind which all history through a target begins, copied rows among it."""
    return min(copy.begin, copy.after, target)


def _following(join: Join, copy: Copy, live: Offset) -> Join:
    """Return a join whose phase has come to `offset`, in the next phase if it is at its end; `live` is where
    the live table stands."""
    if join.phase in PHASES:
        if join.offset < join.target:
            return join
        if join.phase == PHASES[-1]:
            return replace(join, phase="stream", target=live)
        following = PHASES[PHASES.index(join.phase) + 1]
        return replace(join, phase=following, offset=_begin_of(copy, join.target))
    if join.phase == "copy" and join.offset >= copy.end:
        return replace(join, phase="stream", offset=min(copy.after, live), target=live)
    return replace(join, target=live)


def _is_there(join: Join) -> bool:
    """Whether what a join builds is where it will be attached."""
    return join.phase == "stream" and join.offset >= join.target


def _of(keys: pa.Array | None, model: RowModel, changes: pa.Table) -> pa.Table:
    """Return the changes of some source keys, or all; a change of the key is one of both."""
    if keys is None:
        return changes
    key, (own, before) = model.schema.key, identity(model.schema)
    if len(key) == 1 and changes["_before"].null_count == changes.num_rows:
        found = changes.select(key)
    else:
        with engine() as db:
            db.register("changes", changes)
            found = db.sql(f"SELECT {own} AS own, {before} AS before FROM changes").to_arrow_table()
    mine = pc.equal(changes["_op"], "t")
    for column in found.columns:
        mine = pc.or_(mine, pc.is_in(column, value_set=keys))
    return changes.filter(mine)
