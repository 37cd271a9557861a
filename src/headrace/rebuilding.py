"""Making a table of all of its history: first by the newest change of every key, then, for the keys whose
newest change is bad, by all of their others in the source's order.

So a change that a later good one of its key has overtaken is never converted, and hardly read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from headrace.change import Copy, Offset
from headrace.hands import Hands, Reading
from headrace.history import History, Selection
from headrace.join import Phase
from headrace.prepared import Claims, Prepared
from headrace.preparing import of_newest, of_older
from headrace.staging.delta import DeltaStaging
from headrace.transform.kind import LATEST
from headrace.transform.model import RowModel

PHASES: tuple[Literal["newest", "older copy", "older"], ...] = ("newest", "older copy", "older")
"""In this order, each from the history's begin through its end."""

MAX_KEYS = 1_000_000
"""Of so many keys with bad changes the older ones are read by key; of more, all history is."""

_NO_PLACES = pa.table(
    {"_source_key": pa.array([], pa.string())}
    | {name: pa.array([], pa.int64()) for name in ("epoch", "commit", "ordinal")}
    | {"sole": pa.array([], pa.bool_())}
)
_NO_KEYS = pa.array([], pa.string())


def newest_decides(model: RowModel) -> bool:
    """Whether what becomes of a key is what its newest good change says, so that others need not be read.

    Not so where rows are only told apart by their content, or a table shows more than the present.
    """
    return bool(model.schema.key) and model.kind == LATEST


class Rebuilding:
    """The history of one model, prepared piece by piece. Not for two threads at once."""

    def __init__(
        self,
        staging: DeltaStaging,
        model: RowModel,
        copy: Copy,
        history: History,
        bad_keys: Callable[[int], pa.Array | None],
        workers: Hands | None = None,
    ) -> None:
        """`bad_keys` tells the keys with bad changes among what was applied, None if they are more than
        so many; it is asked once all of `newest` is applied."""
        self._staging = staging
        self._model = model
        self._copy = copy
        self._history = history
        self._bad_keys = bad_keys
        self._workers = workers
        self._keys: pa.Array | None = _NO_KEYS
        self._older: tuple[Selection, Selection] | None = None
        self._pieces: Iterator[tuple[pa.Table, Offset]] = iter(())
        self._next: tuple[Phase, Offset] | None = None
        self._selection: Selection | None = None
        self._selected_for: Phase | None = None
        self._last: tuple[Phase, Offset, Offset, pa.Table | None] | None = None

    def find(self, phase: Phase, after: Offset, through: Offset) -> None:
        """Find what a phase has to read behind `after`, if reading does not stand there: which takes as long
        as reading all keys."""
        if self._next != (phase, after):
            self._pieces = self._begin(phase, after, through)
            self._next = (phase, after)

    def left(self, phase: Phase, after: Offset) -> int:
        """Return how many rows of a phase are still to be prepared, as far as they are found by now."""
        return self._selection.left(after) if self._selection and self._selected_for == phase else 0

    def prepare(
        self, phase: Phase, after: Offset, through: Offset, model: RowModel | None = None
    ) -> tuple[Offset, Iterable[Prepared]]:
        """Return what becomes of the next piece of a phase behind `after`, in parts, and the offset through
        which the phase has come; it is at its end with `through`, the history's end.

        Reading goes on where it stands; where it stands elsewhere, as after a restart, it is found again.
        `model` refuses changes of the piece that was prepared last: that one is prepared again.
        """
        if model is not None and self._last is not None and self._last[:2] == (phase, after):
            *_, reached, changes = self._last
            if changes is not None:
                return reached, [self._prepared(phase, changes, model)]
            assert self._workers is not None
            assert self._selection is not None
            again = self._workers.again(self._reading(phase, model, self._selection), after, through)
            return reached, self._of_keys(phase, again)
        self.find(phase, after, through)
        self._next = None  # whatever fails from here on is read again
        if model is None and (handed := self._handed(phase, after, through)) is not None:
            return handed
        changes, reached = next(self._pieces)
        prepared = self._prepared(phase, changes, model or self._model)
        self._next = (phase, reached)
        if self._model.unique:
            self._last = (phase, after, reached, changes)
        return reached, [prepared]

    def _handed(
        self, phase: Phase, after: Offset, through: Offset
    ) -> tuple[Offset, Iterable[Prepared]] | None:
        """Return what workers make of the next piece; None where it is made here."""
        if self._workers is None or self._selection is None:
            return None
        reading = self._reading(phase, self._model, self._selection)
        handed = self._workers.chosen(reading, after, through)
        if handed is None:
            return None
        reached, made = handed
        self._next = (phase, reached)
        self._last = (phase, after, reached, None)
        self._pieces = self._selection.pieces(reached, through)
        return reached, self._of_keys(phase, made)

    def _reading(self, phase: Phase, model: RowModel, selection: Selection) -> Reading:
        kind = PHASES[PHASES.index(phase)]  # a phase of a rebuild is a kind of part, too
        return Reading(kind, model, self._copy, selection)

    def _of_keys(self, phase: Phase, made: Iterator[Prepared]) -> Iterator[Prepared]:
        """Yield what outcomes say of the keys that the phase is about."""
        keys = None if phase == "newest" else self._keys
        return made if keys is None else (only(prepared, keys) for prepared in made)

    def _begin(self, phase: Phase, after: Offset, through: Offset) -> Iterator[tuple[pa.Table, Offset]]:
        self._selection, self._selected_for = self._selected(phase, after), phase
        if self._selection is None:
            return iter([(self._staging.empty(self._model.table), through)])
        return self._selection.pieces(after, through)

    def _selected(self, phase: Phase, after: Offset) -> Selection | None:
        """Return what a phase reads; None for nothing."""
        if phase == "newest":
            return self._history.newest(going_on=after)
        if self._older is None or after > self._history.begin:
            self._keys = self._with_decided(self._bad_keys(MAX_KEYS))
            if self._keys is not None and not len(self._keys):
                return None
            self._older = self._history.of(self._keys, going_on=after)
        return self._older[PHASES.index(phase) - 1]

    def _with_decided(self, keys: pa.Array | None) -> pa.Array | None:
        """Add the keys whose newest change may be one that was discarded."""
        if keys is None or self._model.decisions is None:
            return keys
        return pc.unique(pa.concat_arrays([keys, pa.array(self._model.decisions.keys(), pa.string())]))

    def _prepared(self, phase: Phase, changes: pa.Table, model: RowModel) -> Prepared:
        if phase == "newest":
            return of_newest(self._staging, model, changes, self._copy.end)
        behind = self._copy if phase == "older" else None
        prepared = of_older(self._staging, model, changes, self._copy.end, behind=behind)
        return prepared if self._keys is None else only(prepared, self._keys)


def only(prepared: Prepared, keys: pa.Array) -> Prepared:
    """Return what an outcome says of some source keys; a change of a key is one of two."""
    return replace(
        prepared,
        reset=False,
        removed=prepared.removed.filter(pc.is_in(prepared.removed, value_set=keys)),
        rows=prepared.rows.filter(pc.is_in(prepared.rows["_source_key"], value_set=keys)),
        records=prepared.records.filter(pc.is_in(prepared.records["key"], value_set=keys)),
        claims=_claims_only(prepared.claims, keys),
    )


def folded(model: RowModel, history: pa.Table, keys: pa.Array) -> Prepared:
    """Return what a model makes of all of the history of some source keys: their rows go, and what they came
    to takes their place."""
    whole = only(model.settled(history), keys)
    claims = whole.claims
    if model.claims and claims is None:  # nothing is left of it, which others may have referred to
        claims = Claims(model.name, model.unique, _NO_PLACES, model.references)
    # A truncate in it is of all other keys, too.
    return replace(whole, removed=keys, deleted=None, claims=claims)


def _claims_only(claims: Claims | None, keys: pa.Array) -> Claims | None:
    if claims is None:
        return None
    return replace(
        claims, places=claims.places.filter(pc.is_in(claims.places["_source_key"], value_set=keys))
    )
