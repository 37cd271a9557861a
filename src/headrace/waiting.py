"""Rows that wait for others, looked after for one source.

A change is refused while what its row refers to is not there, or while another row has its key. Nobody has to
redrive it: whenever rows came to where it could help, what may pass now is folded again. Rows that need each
other are tried together, so that they pass together. A reference that could not be judged for a while, since
one of its two models stood elsewhere, is judged over all rows once both are in sync again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import pyarrow as pa

from headrace.change import Offset
from headrace.decisions import Outcome
from headrace.joining import Joiner
from headrace.prepared import Contested, Prepared, Reference, UniqueKey
from headrace.protocols import Destination
from headrace.rebuilding import folded
from headrace.reference import NOTHING_DECIDED, Key
from headrace.standing import ModelState
from headrace.transform.fold import RECORD
from headrace.transform.model import RowModel, preparing

_AT_ONCE = 100_000
"""Source keys that are folded again in one transaction, unless more need each other."""

_MOST_OFTEN, _LEAST_OFTEN = 0.2, 10.0
"""Seconds between two looks at what has waited for too long."""

_T = TypeVar("_T")
Again = Mapping[str, pa.Array]
"""By model the source keys whose rows are made of their whole histories."""


class Refolding(NamedTuple):
    """What the destination counted of keys that were folded again, and what each model made of them."""

    counts: dict[str, int]
    outcomes: Mapping[str, Prepared]


def settled(
    models: Sequence[RowModel], attempt: Callable[[Sequence[RowModel], Again], _T], again: Again | None = None
) -> _T:
    """Return what an attempt returns, made again with what it found contested refused, and with the rows that
    it left dangling made of their histories, until nothing is contested.

    It comes to an end: of the same changes and histories each attempt refuses more.
    """
    keys = dict(again or {})
    while True:
        try:
            return attempt(models, keys)
        except Contested as contested:
            before = (sum(len(model.refused) for model in models), sum(map(len, keys.values())))
            models = [model.refusing(contested) for model in models]
            for name, more in contested.dangling.items():
                known = keys.get(name, more.slice(0, 0))
                keys[name] = pa.concat_arrays([known, more]).unique()
            if before == (sum(len(model.refused) for model in models), sum(map(len, keys.values()))):
                raise  # of what is contested nothing is at hand


class Waiting:
    """What waits in a destination, for the models of one source."""

    def __init__(
        self, source: str, joiner: Joiner, destination: Destination, recount: Callable[[], None]
    ) -> None:
        """`recount` is called when records have changed that no slice brought."""
        self._source = source
        self._joiner = joiner
        self._destination = destination
        self._recount = recount
        self._stand: object = None
        self._is_due = True
        self._was_apart = True
        self._waits = True
        self._looks_at = 0.0
        self._at_once = _AT_ONCE

    @property
    def is_due(self) -> bool:
        """Whether something may pass, or has to be judged, that was not looked at."""
        return self._is_due

    def note(self, model: RowModel, prepared: Prepared) -> None:
        """Take notice of what is about to be applied: rows come for which others wait, or begin to wait."""
        if model.claims and (len(prepared.removed) or prepared.rows.num_rows or prepared.reset):
            self._is_due = True
        self._waits |= prepared.records["waiting_on"].null_count < prepared.records.num_rows

    def look(self) -> None:
        """Look with the next step for references that were put off: a table is another."""
        self._is_due = self._was_apart = True

    def folded(
        self, models: Sequence[RowModel], through: Mapping[str, Offset], again: Again
    ) -> Iterator[tuple[RowModel, Prepared]]:
        """Yield what the whole histories of some keys come to, by model as of an offset.

        Raises ModelBroken for whatever is wrong with a model.
        """
        for model in models:
            if model.name in again:
                keys = again[model.name]
                with preparing(model.name):
                    prepared = folded(model, self._joiner.history(model, through[model.name], keys), keys)
                self.note(model, prepared)
                yield model, prepared

    def refold(
        self,
        models: Sequence[RowModel],
        stands: Mapping[str, ModelState],
        again: Again,
        references: Collection[Reference] = (),
        *,
        dry_run: bool = False,
        decided: Mapping[str, Outcome] = NOTHING_DECIDED,
    ) -> Refolding:
        """Fold keys of models again, and what their rows leave dangling; see `Waits.refold`."""

        def attempt(models: Sequence[RowModel], again: Again) -> Refolding:
            through = {name: stands[name].offset for name in again}
            outcomes = list(self.folded(models, through, again))
            # What was decided holds here too, though it is taken in elsewhere.
            known = {model.name: _decided(model, again[model.name]) for model in models
                     if model.name in again and model.decisions is not None}  # fmt: skip
            counts = self._destination.waits.refold(
                self._source, outcomes, references, dry_run=dry_run, decided={**known, **decided}
            )
            if not decided:
                counts.pop("discarded", None)
            return Refolding(counts, {model.name: prepared for model, prepared in outcomes})

        refolding = settled(models, attempt, again)
        if not dry_run:
            self._recount()
        return refolding

    def step(
        self,
        models: Sequence[RowModel],
        stands: Mapping[str, ModelState],
        alert: Callable[[Sequence[str]], None],
    ) -> bool:
        """Judge what was put off, redrive what may pass now, and quarantine what has waited for too long;
        True if there may be more to do.

        Raises ModelBroken, and what the destination raises.
        """
        standing = [model for model in models if model.name in stands]
        running = [model for model in standing if model.claims]
        names = {model.name for model in running}
        references = {each for model in running for each in model.references if each.model in names}
        together = [each for each in references if stands[each.model].offset == _offset(each.parent, stands)]
        joined = frozenset((each, stands[each.model].state, stands[each.parent].state) for each in together)
        stand = (joined, {model.name: model.unique for model in standing})
        if stand != self._stand:
            self._stand, self._is_due, self._was_apart = stand, True, True
        if self._is_due and (self._waits or self._was_apart):
            return self._release(standing, together, stands)
        self._is_due = False
        if self._waits and together and time.monotonic() >= self._looks_at:
            after = {model.name: model.orphan_after for model in running}
            self._looks_at = time.monotonic() + min(max(min(after.values()) / 4, _MOST_OFTEN), _LEAST_OFTEN)
            alert(self._destination.waits.expire(self._source, together, after))
        return False

    def _release(
        self, models: Sequence[RowModel], references: Collection[Reference], stands: Mapping[str, ModelState]
    ) -> bool:
        keys = [_key(model, each) for model in models for each in model.unique]
        own = {model.name: model.claimed_names for model in models}
        due = self._destination.waits.due(self._source, references, keys, self._at_once, own)
        self._waits = due.waiting > 0
        if due.lapsed:
            self._destination.waits.forget(self._source, due.lapsed)
        if due.put_off:
            self.refold(models, stands, {}, due.put_off)
            return True
        self._was_apart = False
        if due.ready:
            # What came of it may be what others wait for; where nothing did, it is not tried again by itself,
            # but those are that were too many.
            resolved = self.refold(models, stands, due.ready).counts["resolved"] > 0
            are_more = sum(map(len, due.ready.values())) >= self._at_once
            self._is_due = resolved or are_more
            self._at_once = self._at_once * 2 if are_more and not resolved else _AT_ONCE
            return True
        self._is_due = False
        return False


def _offset(model: str, stands: Mapping[str, ModelState]) -> Offset | None:
    state = stands.get(model)
    return state.offset if state is not None and state.state != "suspended" else None


def _decided(model: RowModel, keys: pa.Array) -> Outcome:
    """Return what was decided of the changes of some source keys."""
    assert model.decisions is not None
    wanted = keys.to_pylist()
    discarded, patched = (model.decisions.about(verb, wanted) for verb in ("discard", "patch"))
    return Outcome(0, discarded, patched, RECORD.empty_table())


def _key(model: RowModel, unique: UniqueKey) -> Key:
    types = model.types()
    return Key(model.name, *unique, tuple(types[name] for name in unique.columns))
