"""Handing parts to workers, and taking what comes of them in their order.

Of what follows so much is handed over that every worker has one part in hand and two of its outcomes, at
most, wait for apply. What no worker has begun when its turn comes is prepared here: while workers start, and
when there are none any more, nothing waits. So is what a pool has no outcome of, and whatever is wrong
with it comes up here as it would without workers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pyarrow.compute as pc

from headrace.change import Copy, Offset
from headrace.cutting import Piece, rows_for
from headrace.parts import PartKind, PartSpec, Shares, Staged, fingerprint, rows_of
from headrace.prepared import Prepared
from headrace.scaling.local import LocalPool
from headrace.scaling.measure import building
from headrace.scaling.pool import NoPlace, PartFailed, Pool, TooLarge
from headrace.transform.model import RowModel
from headrace.transform.python.process import environment

logger = logging.getLogger("headrace.workers")

_WAITING = 2
"""Outcomes for each worker that wait for apply."""
_BEGUN_WITHIN = 2.0
"""Seconds in which a worker has time for what is next, when each has parts of one. Sooner this process would
only take its time from apply, for which outcomes wait meanwhile, and workers for these."""
_LOOK_EVERY = 0.01
_TRICKLE = 0.2  # seconds of work that are not worth the way
_FORGOTTEN = 120.0  # seconds after which nobody takes a part any more
_CHECK_EVERY = 1.0  # seconds of waiting for a worker
_REST = 30.0  # seconds without workers, after one that could not write what it had made
_SMALLEST = 64
"""So many times smaller than by their time parts may become, so as to fit into a worker's memory."""
_WEIGHT = 0.3

Here = Callable[[PartSpec, RowModel], Prepared]
"""Prepares a part in this process."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured of one model, in rows per second; None for what there was none of."""

    mu: float | None
    """Per second that a worker has a part in hand which comes to something."""
    own_rate: float | None
    """Of this process preparing by itself."""
    handover_rate: float | None
    """Of this process's time for handing over and taking back."""


class _Rate:
    """A moving average over what was done."""

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, rows: int, seconds: float) -> None:
        if rows and seconds > 0:
            known = self.value
            self.value = rows / seconds if known is None else known + _WEIGHT * (rows / seconds - known)


class _Given(NamedTuple):
    """A part that the pool has, and since when."""

    part: PartSpec
    future: Future[Prepared]
    at: float


class _Expected(NamedTuple):
    """What will be taken of a kind, in order; and by model up to where it is taken by now."""

    parts: Iterator[PartSpec]
    taken: dict[str, Offset]


class Handover:
    """What one pipeline has in the hands of its pool. For one thread of each source and kind at a time."""

    def __init__(
        self,
        pool: Pool,
        worth: Callable[[str], bool] = lambda _: True,
        check: Callable[[], None] = lambda: None,
        rate: Callable[[str], float | None] = lambda _: None,
    ) -> None:
        """`worth` says whether work, as it is called where it is measured, is worth a worker, and `rate` how
        many rows of a model are done in a second, as far as it is known. `check` is called while an outcome
        is waited for, and ends that by raising."""
        self._pool = pool
        self._worth = worth
        self._check = check
        self._known_rate = rate
        self._rests_until = 0.0
        self._smaller: dict[str, int] = {}
        self._lock = threading.RLock()
        self._given: dict[str, _Given] = {}
        self._expected: dict[tuple[str, PartKind], _Expected] = {}
        self._taking: dict[tuple[str, PartKind], Sequence[PartSpec]] = {}
        self._cuts: dict[tuple[str, PartKind, Copy | None, str, Offset, Offset], list[PartSpec]] = {}
        self._own: dict[str, _Rate] = {}
        self._giving: dict[str, _Rate] = {}

    def takes(self, kind: PartKind, model: RowModel, after: Offset, through: Offset) -> bool:
        """Whether workers prepare a model's changes in a span now: not those that processes have died of."""
        work = model.name if kind == "slice" else building(model.name)
        if not self._has_workers() or not self._worth(work):
            return False
        attempts = model.attempts
        return attempts is None or not attempts.suspects(model.name, model.version, after, through)

    def rows_for(self, model: RowModel, of: int | None = None) -> int:
        """Return how many rows one part of a model should have, where no more than `of` are known at once:
        then every worker is to have one of them."""
        wanted = rows_for(self._rate_of(model)) // self._smaller.get(model.name, 1)
        return wanted if of is None else min(wanted, of // max(self._pool.state().desired, 1) + 1)

    def _rate_of(self, model: RowModel) -> float | None:
        figures = self.figures(model.name)
        return self._known_rate(model.name) or figures.mu or figures.own_rate

    def parts(
        self,
        kind: PartKind,
        staged: Staged,
        model: RowModel,
        span: tuple[Offset, Offset],
        pieces: Callable[[], Iterable[tuple[Piece, bytes | None]]],
        copy: Copy | None = None,
        shares: Shares | None = None,
        selection: str = "",
    ) -> Sequence[PartSpec]:
        """Return the parts of a span, the same when it is asked for again before they are taken.

        `pieces` cuts it, with bits for what is chosen of each piece by the selection with this id, if any is.
        Raw is read back from where both the span and the copy, where one counts, have ended.
        """
        sent = replace(model, attempts=None) if model.attempts is not None else model
        model_id = fingerprint(sent)
        newest = max(copy.end, span[1]) if copy else span[1]
        key = (model_id, kind, copy, selection, *span)
        with self._lock:
            if (known := self._cuts.get(key)) is not None:
                return known
            parts = [
                PartSpec(
                    kind, staged, sent, model_id, piece.after, piece.through, newest, self._pool.epoch,
                    piece.rows, copy, chosen, piece.stretch, shares,
                )
                for piece, chosen in pieces()
            ]  # fmt: skip
            if parts:  # of none nobody tells when it is behind
                self._cuts[key] = parts
            return parts

    def is_trickle(self, model: RowModel, parts: Sequence[PartSpec]) -> bool:
        """Whether parts are so little that this process has done them sooner than it has asked for them; then
        nobody takes them."""
        rows, rate = sum(part.rows for part in parts), self._rate(self._own, model.name).value
        with self._lock:
            begun = any(part.id in self._given for part in parts)
            if begun or len(parts) > 1 or rows >= (rate or rows_for(None) / 2) * _TRICKLE:
                return False
            for key in [key for key, cut in self._cuts.items() if cut is parts]:
                del self._cuts[key]
        return True

    def expect(
        self,
        source: str,
        kind: PartKind,
        parts: Iterator[PartSpec],
        models: Collection[str] | None = None,
    ) -> None:
        """Have workers that would have nothing to do begin with what will be taken of a kind in a source, in
        this order. Where `models` are named, nobody will come for what others have of it."""
        with self._lock:
            self._expected[source, kind] = _Expected(parts, {})
            if models is not None:
                given = [part for part, _, _ in self._given.values() if _key(part) == (source, kind)]
                for part in given:
                    if part.model.name not in models:
                        self._drop(part.id)

    def begin(self, parts: Sequence[PartSpec]) -> None:
        """Have workers begin with parts that will be taken later, as far as there is room: what is taken now
        comes first."""
        with self._lock:
            taken = tuple(self._taking.get(_key(parts[0]), ()))  # another thread takes from it
            now = [part for part in taken if part.id not in self._given]
        if not now:
            self._give_all(parts)

    def _give_all(self, parts: Iterable[PartSpec]) -> None:
        for part in parts:
            if not self._has_room():
                return
            self._give(part)

    def take(self, model: RowModel, parts: Sequence[PartSpec], here: Here) -> Iterator[Prepared]:
        """Yield the outcomes of a model's parts in their order. What is not taken, when this is closed, is
        forgotten. Raises what `here` and `check` raise."""
        todo = deque(parts)
        self._forget_before(model, parts)
        if not parts:
            return
        with self._lock:
            self._taking[_key(parts[0])] = todo
            if expected := self._expected.get(_key(parts[0])):
                expected.taken[model.name] = parts[-1].through
        try:
            while todo:
                self._hand_out(todo)
                prepared = self._outcome(todo[0], model, here)
                todo.popleft()
                yield prepared
                del prepared
        finally:
            with self._lock:
                self._taking.pop(_key(parts[0]), None)
            for part in todo:
                self._drop(part.id)

    def prepared_parts(self) -> int:
        """Return how many outcomes wait for apply, not counting those that it has not come for in a long
        time: they are forgotten."""
        self._forget_old()
        with self._lock:
            return sum(1 for given in self._given.values() if given.future.done())

    def figures(self, model: str) -> Figures:
        """Return what was measured of a model."""
        done = self._pool.service().get(model)
        own, giving = self._rate(self._own, model).value, self._rate(self._giving, model).value
        if done is None or not done.all_rows or not giving:
            return Figures(None, own, None)
        mu = done.rows / done.seconds if done.rows else None
        return Figures(mu, own, 1 / (1 / giving + done.taking / done.all_rows))

    def _rate(self, rates: dict[str, _Rate], model: str) -> _Rate:
        with self._lock:
            return rates.setdefault(model, _Rate())

    def _has_workers(self) -> bool:
        return self._pool.state().desired > 0 and time.monotonic() >= self._rests_until

    def _has_room(self) -> bool:
        room = (1 + _WAITING) * self._pool.state().desired if self._has_workers() else 0
        with self._lock:
            if len(self._given) >= room:
                self._forget_old()
            return len(self._given) < room

    def _forget_old(self) -> None:
        """Forget what nobody has come for: of a model that is gone or suspended, say."""
        before = time.monotonic() - _FORGOTTEN
        with self._lock:
            for id_ in [id_ for id_, given in self._given.items() if given.at < before]:
                self._drop(id_)

    def _hand_out(self, todo: Sequence[PartSpec]) -> None:
        """Give what is next, then what will follow."""
        self._give_all(todo)
        with self._lock:
            expected = self._expected.get(_key(todo[0]))
        try:
            while expected and self._has_room() and (part := next(expected.parts, None)) is not None:
                if part.through > expected.taken.get(part.model.name, -1):
                    self._give(part)
        except Exception as error:  # what is wrong is met when it is its turn
            logger.info("what follows is not handed over: %s", type(error).__name__)

    def _give(self, part: PartSpec) -> None:
        began = time.perf_counter()
        with self._lock:
            if part.id in self._given:
                return
            self._given[part.id] = _Given(part, self._pool.submit(part), time.monotonic())
        self._rate(self._giving, part.model.name).add(part.rows, time.perf_counter() - began)

    def _outcome(self, part: PartSpec, model: RowModel, here: Here) -> Prepared:
        with self._lock:
            given = self._given.get(part.id)
        deaths = 0
        if given is not None:
            future = given.future
            self._await_begin(future, model)
            try:
                if future.done() or not future.cancel():
                    while wait([future], _CHECK_EVERY).not_done:
                        self._check()
                    return future.result()
            except PartFailed as error:
                deaths = error.deaths
                self._learn(model, error)
            except CancelledError:
                pass
            finally:
                self._drop(part.id)
        self._check()
        began = time.perf_counter()
        prepared = here(part, replace(model, suspect=True) if deaths else model)
        if deaths and model.attempts is not None:
            fatal = prepared.records.filter(pc.equal(prepared.records["stage"], "crash"))
            model.attempts.blame(model.name, model.version, pc.unique(fatal["offset"]).to_pylist())
        self._rate(self._own, model.name).add(rows_of(part, prepared), time.perf_counter() - began)
        return prepared

    def _await_begin(self, future: Future[Prepared], model: RowModel) -> None:
        """Wait until a worker has a part, if there are workers that will have time for it soon.

        Those that are starting count for a model of which nobody knows how long a part of it takes: minutes,
        maybe, and what comes meanwhile would wait for this process.
        """
        deadline, is_known = time.monotonic() + _BEGUN_WITHIN, self._rate_of(model) is not None
        while not (future.running() or future.done()):
            state = self._pool.state()
            if time.monotonic() > deadline or not (state.ready or (state.starting and not is_known)):
                return
            self._check()
            time.sleep(_LOOK_EVERY)

    def _learn(self, model: RowModel, failed: PartFailed) -> None:
        """Hand over otherwise what would fail as this part has."""
        logger.info("a part of model %s is prepared here: %s", model.name, failed)
        if isinstance(failed, NoPlace):
            self._rests_until = time.monotonic() + _REST
            logger.warning("workers rest for %.0f s, since what they make has no place: %s", _REST, failed)
        elif isinstance(failed, TooLarge):
            times = min(2 * self._smaller.get(model.name, 1), _SMALLEST)
            self._smaller[model.name] = times
            logger.warning(
                "parts of model %s are %d times as small from now on: %s (scale.worker_memory)",
                model.name, times, failed,
            )  # fmt: skip

    def _forget_before(self, model: RowModel, parts: Sequence[PartSpec]) -> None:
        """Forget what was given of a model and is behind what is taken now: it was cut or bound otherwise."""
        if not parts:
            return
        taken, through = {part.id for part in parts}, parts[-1].through
        kind, source = parts[0].kind, parts[0].staged.source
        with self._lock:
            gone = [
                id_
                for id_, (part, _, _) in self._given.items()
                if part.model.name == model.name
                and (part.kind, part.staged.source) == (kind, source)
                and id_ not in taken
                and (part.through <= through or part.model_id != parts[0].model_id)
            ]
            for id_ in gone:
                self._drop(id_)
            for key in [key for key, cut in self._cuts.items() if _is_behind(cut[-1], parts[-1])]:
                del self._cuts[key]

    def _drop(self, id_: str) -> None:
        with self._lock:
            given = self._given.pop(id_, None)
        if given is not None:
            given.future.cancel()


def _key(part: PartSpec) -> tuple[str, PartKind]:
    return part.staged.source, part.kind


def _is_behind(part: PartSpec, other: PartSpec) -> bool:
    same = (part.kind, part.staged.source, part.model.name)
    return same == (other.kind, other.staged.source, other.model.name) and part.through < other.through


def open_pool(state: Path, worker_memory: int) -> LocalPool:
    """Return the pool of a pipeline, in its state folder; it has no workers, of so many bytes each at most.
    Raises OSError."""
    return LocalPool(state / "workers", "headrace.worker", environment(), memory=worker_memory)
