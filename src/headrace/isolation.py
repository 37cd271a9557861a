"""The single changes on which a destination fails each time, though it is well: found by halves.

A fault of the world is waited for, however long it lasts. But a step that fails three times, while after
each of them the destination takes as many bytes of no meaning, may be held up by one change: a value that a
defect of the server dies of, or a trigger. So, model by model, the step's changes are written and taken back
by halves, down to single ones. One that fails alone, three times, while the destination takes others, is bad
from then on: it is quarantined, and its record is how it is known again. Nothing else is. While the
destination does not take what has no meaning, where others hold what is needed, and where more than a few
changes would be to blame, the step is tried again, as ever.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import pyarrow as pa

from headrace.decisions import PLACE
from headrace.errors import (
    CommitUnknown,
    DestinationBusy,
    DestinationError,
    LogError,
    SourceError,
    Verdict,
    verdict_of,
)
from headrace.keys import literal
from headrace.prepared import UNWRITABLE, Unwritable
from headrace.protocols import Destination
from headrace.transform.model import RowModel

logger = logging.getLogger("headrace.lane")

_TRIES = 3
_PAUSE = 0.2  # seconds between two of them
_MOST = 20
"""Changes of one step that may be to blame; of more it is no record's fault."""
_LEAST_ROOM, _MOST_ROOM = 64 << 10, 64 << 20
"""Bytes of no meaning that a destination has to take, at least and at most: twice what the changes are."""
_IN_VAIN = 600.0
"""Seconds for which nothing is sought after nothing was found."""

_T = TypeVar("_T")
_Changes = Callable[[RowModel], Iterable[pa.Table]]


class Isolation:
    """What is known of changes on which a destination fails, for the models of one source.

    Not for two threads at once.
    """

    def __init__(self, source: str, destination: Destination) -> None:
        self._source = source
        self._destination = destination
        self._known: dict[str, frozenset[Unwritable]] = {}
        self._rests_until = 0.0

    def know(self) -> None:
        """Add what open records tell. Raises what the destination raises."""
        (found,) = self._destination.read(
            [
                "SELECT model, epoch, commit, ordinal, key, message FROM headrace.quarantine "
                f"WHERE source = {literal(self._source)} AND reason = '{UNWRITABLE}' "
                "AND status IN ('quarantined', 'waiting', 'blocked')"
            ]
        )
        for model, *change in zip(*found.to_pydict().values(), strict=True):
            self._add(model, [Unwritable(*change)])

    def marked(self, model: RowModel) -> RowModel:
        """Return a model with what is known of its changes."""
        known = self._known.get(model.name)
        return replace(model, unwritable=model.unwritable | known) if known else model

    def lifted(self, model: RowModel, keys: pa.Array) -> RowModel:
        """Return a model whose changes of some source keys are to be tried once more, and forget them."""
        mine = set(keys.to_pylist())
        left = frozenset(each for each in model.unwritable if each.key not in mine)
        self._known[model.name] = left
        return replace(model, unwritable=left)

    def isolated(
        self, models: Sequence[RowModel], attempt: Callable[[Sequence[RowModel]], _T], changes: _Changes
    ) -> _T:
        """Return what an attempt to write something of some models returns, made again as long as changes are
        found on which alone the destination fails, with these as bad.

        `changes` gives those of a model that it is about, in pieces. Raises what the attempt raises.
        """
        while True:
            try:
                return self._tried(models, attempt)
            except Exception as error:
                if not _is_the_destinations(error) or not self._find(models, changes):
                    raise
                models = [self.marked(model) for model in models]

    def _tried(self, models: Sequence[RowModel], attempt: Callable[[Sequence[RowModel]], _T]) -> _T:
        """Return what an attempt returns. Raises its error, after as many tries as make it a suspicion where
        the destination is well."""
        first: Exception | None = None
        for tried in range(1, _TRIES + 1):
            try:
                return attempt(models)
            except Exception as error:
                if first is not None and isinstance(error, DestinationError) and not _passes(error):
                    raise first from error  # what it stumbles over may be the first try, done after all
                if not models or not _is_the_destinations(error):
                    raise
                self._destination.rehearse(models[0], _LEAST_ROOM)
                if tried == _TRIES:
                    raise
                first = first or error
                time.sleep(_PAUSE)
        raise AssertionError

    def _find(self, models: Sequence[RowModel], changes: _Changes) -> bool:
        """Find changes to blame that were not known; False if there are none, or too many."""
        if time.monotonic() < self._rests_until:
            return False
        found = dict[str, list[Unwritable]]()
        for model in models:
            for piece in changes(model):
                found.setdefault(model.name, []).extend(self._culprits(model, piece))
                if sum(map(len, found.values())) > _MOST:
                    logger.warning("model %s: %s fails on too many of its changes to blame one",
                                   model.name, self._destination.name)  # fmt: skip
                    found.clear()
                    break
        new = [self._add(name, each) for name, each in found.items()]
        if not any(new):
            self._rests_until = time.monotonic() + _IN_VAIN
        return any(new)

    def _add(self, model: str, changes: Iterable[Unwritable]) -> bool:
        known = self._known.get(model, frozenset())
        places = {each[:3] for each in known}
        self._known[model] = known.union(each for each in changes if each[:3] not in places)
        return len(self._known[model]) > len(known)

    def _culprits(self, model: RowModel, changes: pa.Table) -> Iterable[Unwritable]:
        """Yield the changes that fail alone."""
        parts = deque([changes])
        while parts:
            part = parts.popleft()
            if self._fault(model, part) is None:
                continue
            if part.num_rows > 1:
                middle = part.num_rows // 2
                parts.extendleft((part.slice(middle), part.slice(0, middle)))
                continue
            faults = [self._fault(model, part) for _ in range(_TRIES - 1)]
            if None not in faults and part["_op"][0].as_py() != "t":
                yield self._blamed(model, part, str(faults[-1]))

    def _fault(self, model: RowModel, part: pa.Table) -> str | None:
        """Say what the destination has against some changes while it is well, None if nothing. Raises what it
        has against everything."""
        prepared = model.prepare(part)
        try:
            self._destination.rehearse(model, prepared)
        except Exception as error:
            if not _is_the_destinations(error):
                raise
            self._destination.rehearse(model, min(max(2 * part.nbytes, _LEAST_ROOM), _MOST_ROOM))
            return _words(error)
        return None

    def _blamed(self, model: RowModel, change: pa.Table, words: str) -> Unwritable:
        epoch, commit, ordinal = (change[f"_{name}"][0].as_py() for name in PLACE)
        found = Unwritable(epoch, commit, ordinal, None, "")
        # Its record has the key by which a redrive finds it.
        records = replace(model, unwritable=frozenset([found])).prepare(change).records
        key = records["key"][0].as_py() if records.num_rows else None
        message = f"the destination fails each time it is written alone, and takes others: {words}"
        return found._replace(key=key, message=message)


def _passes(error: BaseException) -> bool:
    return verdict_of(error) is Verdict.RETRY


def _is_the_destinations(error: Exception) -> bool:
    """Whether an error may be what a destination has against what it is given."""
    return _passes(error) and not isinstance(error, DestinationBusy | CommitUnknown | LogError | SourceError)


def _words(error: Exception) -> str:
    """Say what an error is, the same for each change: no values, and no numbers but a SQLSTATE."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    state = getattr(cause, "sqlstate", None)
    return f"SQLSTATE {state}" if state else type(cause).__name__
