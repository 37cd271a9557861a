"""What is measured of one source while it runs: what waits of each model, what arrives, how fast work goes.

Who prepares and applies notes what it took as it goes; `look`, each second or so, subtracts offsets. Both
cost as much as what has moved since, never as much as what waits. What has not been measured is None, never
0: a decision that lacks a figure changes nothing.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from headrace.change import Kind, Offset, TableId
from headrace.scale_settings import cores as own_cores
from headrace.scaling.rates import Greatest, MovingAverage, Share, Speed
from headrace.scaling.snapshot import Load
from headrace.scaling.worth import Costs, Worth

if TYPE_CHECKING:
    from headrace.prepared import Prepared

_Item = TypeVar("_Item")

STREAMED: tuple[Kind, ...] = ("rows", "truncate", "undecodable")
_COPIED: tuple[Kind, ...] = ("rows", "truncate", "undecodable", "copy")

_WINDOW = 300.0
_WARM = 1.0
"""Seconds of looking before what arrives is known."""
_COMING = 5.0
"""Seconds over which what comes to be staged is looked at."""
_MANY = 100_000
"""Rows within that time from on which they say how fast capture is: fewer say how much the source has."""
_SURE = 5.0
"""Seconds of large pieces that say for certain how fast a worker is."""
_REMEMBERED = 600.0
"""Seconds for which it counts against workers how fast they have been."""
_WHOLE = 20_000
"""Rows from which on a slice tells how fast apply is: a small one is mostly its own fixed cost."""


class Log(Protocol):
    """What is asked of a log: counts that its headers tell."""

    def volume(
        self, table: TableId, after: Offset, through: Offset, kinds: Sequence[Kind] = ()
    ) -> tuple[int, int]:
        """Return rows and bytes of a table in `(after, through]`, of some kinds or all."""
        ...

    def first_commit(self, after: Offset, table: TableId) -> int | None:
        """Return when the first rows of a table after an offset were committed (microseconds)."""
        ...


class Staging(Protocol):
    """What is asked of staging."""

    def through(self) -> Offset:
        """Return the offset through which everything is staged."""
        ...

    def count(self, table: TableId, after: Offset, through: Offset) -> int:
        """Return the rows of a table in `(after, through]`."""
        ...


class HandedFigures(Protocol):
    """What was measured of one model where parts are handed to workers, rows a second; None: not yet."""

    @property
    def own_rate(self) -> float | None:
        """Of parts that the main process has prepared after all."""

    @property
    def handover_rate(self) -> float | None:
        """Of the main process's time for handing over and taking back."""


class Handing(Protocol):
    """What is asked of whoever hands parts to workers."""

    def prepared_parts(self) -> int:
        """Return how many outcomes wait for apply."""
        ...

    def figures(self, model: str) -> HandedFigures:
        """Return what was measured of a model."""
        ...


class Stand(NamedTuple):
    """Where a model stands: what is staged of its table after `after` waits for it.

    Where all of a table is read once more, by a rebuild or for a copy, that is work of its own: `through` is
    where it ends, None for what goes on for ever. `left` are the rows that wait, where that is known; None
    where it is all of them.
    """

    model: str
    table: TableId
    after: Offset
    slo: float
    through: Offset | None = None
    left: int | None = None

    @property
    def work(self) -> str:
        """What its load is called."""
        return self.model if self.through is None else building(self.model)


def building(model: str) -> str:
    """Return what the load is called of making all of a model's table."""
    return f"{model} (all of it)"


@dataclass(slots=True)
class _Waiting:
    """What waits between two offsets, kept by what is added and taken away at both ends."""

    after: Offset
    through: Offset
    rows: int = 0
    bytes: int = 0


class _Work:
    """What is known of one load."""

    def __init__(self) -> None:
        self.own, self.worker, self.apply = Speed(), Speed(), Speed()
        self.share = Share()  # of what workers do
        self.handover: float | None = None
        self.cores: float | None = None
        self.worth = Worth()
        self.fast, self.slow = MovingAverage(30.0), MovingAverage(_WINDOW)
        self.peak, self.most = Greatest(_WINDOW), Greatest(_WINDOW)
        self.waiting: _Waiting | None = None
        self.is_worth: bool | None = None
        self.worked_at: float | None = None

    def comparable(self) -> tuple[float | None, float | None]:
        """Return how fast the main process and a worker are.

        They run the same code. Where only one of them has had large pieces, its speed is that of both: the
        other's, of small ones, would make a worker look many times slower or faster than it is.
        """
        own, worker = self.own, self.worker
        if own.is_of_bulk and not worker.is_of_bulk:
            return own.value, None
        if worker.is_of_bulk and not own.is_of_bulk and own.value is not None:
            return worker.value, worker.value
        return own.value, worker.value


class Meter:
    """Measures one source. Whatever prepares and applies calls from threads of its own; one thread looks."""

    def __init__(self, log: Log, staging: Staging, cores: int | None = None) -> None:
        """`cores` are those of this machine that may be used."""
        self._log, self._staging = log, staging
        self._cores = own_cores() if cores is None else cores
        self._lock = threading.Lock()
        self._works: dict[str, _Work] = {}
        self._stands: Sequence[Stand] | None = None
        self._apply = Speed()
        self._looked: tuple[float, Offset] | None = None
        self._began: float | None = None
        self._loads: tuple[Load, ...] | None = None
        self._served = Counter[str]()
        self._came = deque[tuple[float, int]]()
        self._staged_rate: float | None = None
        self._handing: Handing | None = None

    def use(self, handing: Handing) -> None:
        """Ask from now on what handing over takes."""
        self._handing = handing

    # ---------------------------------------------------------------- noted by whoever does the work

    def stand(self, stands: Sequence[Stand]) -> None:
        """Take over where all models stand that have, or may have, something to do."""
        self._stands = stands

    def own(self, work: str, pieces: Iterator[Prepared]) -> Iterator[Prepared]:
        """Yield pieces that the main process prepares as they are taken, and note how long each took."""
        while True:
            began, used = time.monotonic(), time.process_time()
            piece = next(pieces, None)
            if piece is None:
                return
            self.prepared(work, piece.counts.read, time.monotonic() - began, time.process_time() - used)
            yield piece
            del piece

    def prepared(self, work: str, rows: int, seconds: float, cpu: float) -> None:
        """Note that the main process has prepared rows, and spent `cpu` seconds on all cores meanwhile."""
        if not rows or seconds <= 0:
            return
        with self._lock:
            found = self._of(work)
            found.own.note(rows, seconds)
            if rows >= _WHOLE // 4:
                keep = 0.8 if found.cores is not None else 0.0
                found.cores = keep * (found.cores or 0.0) + (1 - keep) * cpu / seconds

    def worked(self, model: str, rows: int, seconds: float) -> None:
        """Note that a worker has prepared rows of a model in `seconds`, without its waiting."""
        if not rows:
            return
        with self._lock:
            for work in (self._of(model), self._of(building(model))):  # it does the same with them
                work.worker.note(rows, seconds)
                work.worked_at = self.looked_at

    def lost(self, model: str, kept: float, lost: float) -> None:
        """Note for how many seconds workers had parts of a model in hand that came to something, and to
        nothing."""
        with self._lock:
            for work in (self._of(model), self._of(building(model))):
                work.share.note(kept, lost)

    @contextmanager
    def applying(
        self, parts: Iterable[_Item], counted: Callable[[_Item], tuple[str, int]], work: str = ""
    ) -> Generator[Iterator[_Item]]:
        """Give parts to apply, and note how long it took for them, without its waiting for the next one.

        `counted` says what work a part is of, and how many rows of it. A slice is of all models; what is
        applied of one by itself is named."""
        waited, rows = 0.0, 0

        def taken() -> Iterator[_Item]:
            nonlocal waited, rows
            rest = iter(parts)
            while True:
                began = time.monotonic()
                part = next(rest, None)
                waited += time.monotonic() - began
                if part is None:
                    return
                of, count = counted(part)
                rows += count
                with self._lock:
                    self._served[of] += count
                yield part
                del part

        began = time.monotonic()
        yield taken()
        if rows >= _WHOLE:
            with self._lock:
                apply = self._of(work).apply if work else self._apply
                apply.note(rows, time.monotonic() - began - waited)

    # ------------------------------------------------------------------------------------------ looks

    def look(self, now: float) -> None:
        """See what waits and what has arrived since the look before; `now` is of a clock that only rises."""
        stands, staged = self._stands, self._staging.through()
        if stands is None:
            return
        self._began = now if self._began is None else self._began
        before = self._looked
        elapsed = now - before[0] if before else 0.0
        loads = []
        for stand in stands:
            end = staged if stand.through is None else min(staged, stand.through)
            with self._lock:
                work = self._of(stand.work)
            work.waiting = self._waiting(stand, work.waiting, end)
            if before and elapsed > 0:
                arrived = self._arrived(stand, before[1], staged)
                work.fast.add(arrived, elapsed)
                work.slow.add(arrived, elapsed)
            handed = self._handing.figures(stand.model) if self._handing else None
            age = self._age(stand) if work.waiting.rows else 0.0
            with self._lock:
                loads.append(self._measured(work, stand, age, handed, now))
        if before and elapsed > 0:
            self._note_what_came(elapsed, {stand.table for stand in stands}, before[1], staged)
        with self._lock:
            self._looked = (now, staged)
            for gone in self._works.keys() - {stand.work for stand in stands}:
                self._works[gone].waiting = None
            self._loads = tuple(loads) if now - self._began >= _WARM else None

    def loads(self) -> tuple[Load, ...] | None:
        """Return the loads as of the last look; None before what arrives is known."""
        return self._loads

    @property
    def looked_at(self) -> float | None:
        """When the last look was."""
        return self._looked[0] if self._looked else None

    @property
    def apply_rate(self) -> float | None:
        """Rows per second of apply alone; None until it has had a large slice."""
        with self._lock:
            return self._apply.value

    @property
    def staged_rate(self) -> float | None:
        """Rows per second that have come to be staged at most; None until many have come at once."""
        return self._staged_rate

    def rate(self, work: str) -> float | None:
        """Return the rows per second that a worker, what it loses counted, or else the main process, does of
        some work."""
        with self._lock:
            found = self._of(work)
            own, worker = found.comparable()
            return worker * found.share.value if worker else own

    def is_worth_a_worker(self, work: str) -> bool:
        """Whether work is to go to workers, where there are any; so it is until it has been measured."""
        with self._lock:
            return self._of(work).is_worth is not False

    def take_served(self) -> Mapping[str, int]:
        """Return how many rows of each work apply has taken since this was asked before."""
        with self._lock:
            served, self._served = self._served, Counter()
        return served

    def recall(self, loads: Iterable[Load], apply_rate: float | None) -> None:
        """Take rates that an earlier process has measured for what they are, until this one has measured
        them."""
        with self._lock:
            for load in loads:
                found = self._of(load.model)
                found.own.recall(load.own_rate)
                found.worker.recall(load.mu)
                found.apply.recall(load.apply_rate)
                found.handover = load.handover_rate
            self._apply.recall(apply_rate)

    def _of(self, work: str) -> _Work:
        return self._works.setdefault(work, _Work())

    def _waiting(self, stand: Stand, known: _Waiting | None, end: Offset) -> _Waiting:
        if stand.left is not None:
            return _Waiting(stand.after, end, stand.left)
        kinds = STREAMED if stand.through is None else _COPIED
        if known is None or not known.after <= stand.after or not known.through <= end:
            rows, size = self._log.volume(stand.table, stand.after, end, kinds)
            if stand.through is not None:
                # Of history the log may have let go what staging keeps.
                whole = self._staging.count(stand.table, stand.after, end)
                size = int(size * whole / rows) if rows else 0
                rows = whole
            return _Waiting(stand.after, end, rows, size)
        if (known.after, known.through) == (stand.after, end):
            return known  # at rest nothing is asked of the log
        came, came_bytes = self._log.volume(stand.table, known.through, end, kinds)
        if stand.through is None:
            went, went_bytes = self._log.volume(stand.table, known.after, min(stand.after, end), kinds)
        else:
            went = self._staging.count(stand.table, known.after, min(stand.after, end))
            went_bytes = known.bytes * went // known.rows if known.rows else 0
        rows, size = known.rows + came - went, known.bytes + came_bytes - went_bytes
        return _Waiting(stand.after, end, max(0, rows), max(0, size))

    def _arrived(self, stand: Stand, before: Offset, staged: Offset) -> int:
        if stand.through is not None or staged <= before:
            return 0
        return self._log.volume(stand.table, before, staged, STREAMED)[0]

    def _note_what_came(
        self, elapsed: float, tables: Collection[TableId], before: Offset, staged: Offset
    ) -> None:
        came = 0
        if staged > before:
            came = sum(self._log.volume(table, before, staged, _COPIED)[0] for table in tables)
        self._came.append((elapsed, came))
        while sum(seconds for seconds, _ in self._came) - self._came[0][0] >= _COMING:
            self._came.popleft()
        seconds, rows = map(sum, zip(*self._came, strict=True))
        if rows >= _MANY and seconds >= _COMING:
            self._staged_rate = max(self._staged_rate or 0.0, rows / seconds)

    def _age(self, stand: Stand) -> float:
        """Return the age of the oldest change that waits; 0 where all of a table is made."""
        if stand.through is not None:
            return 0.0
        commit = self._log.first_commit(stand.after, stand.table)
        return 0.0 if commit is None else max(0.0, time.time() - commit / 1e6)

    def _measured(
        self, work: _Work, stand: Stand, age: float, handed: HandedFigures | None, now: float
    ) -> Load:
        fast, slow = work.fast.value or 0.0, work.slow.value or 0.0
        waiting = work.waiting or _Waiting(stand.after, stand.after)
        own, worker = work.comparable()
        if worker is not None:
            worker *= work.share.value
        if own is None and stand.through is not None:
            # All of a table is made by the same code as what arrives of it.
            alike = self._of(stand.model)
            own, work.cores = alike.own.value, alike.cores if work.cores is None else work.cores
        if handed is not None:
            own, work.handover = own or handed.own_rate, handed.handover_rate or work.handover
        apply = self._apply.value if stand.through is None else work.apply.value
        # What workers have done long ago is no reason to do without them for ever.
        is_fresh = work.worked_at is not None and now - work.worked_at < _REMEMBERED
        is_sure = is_fresh and work.worker.seconds >= _SURE
        costs = Costs(own, work.handover, work.cores, self._cores, apply, worker if is_sure else None)
        work.is_worth = work.worth.judge(costs)
        return Load(
            model=stand.work,
            slo=stand.slo,
            backlog_rows=waiting.rows,
            oldest_age=age,
            ewma_30s=fast,
            ewma_300s=slow,
            max_300s=work.peak.add(now, max(fast, slow)),
            mu=worker,
            own_rate=costs.own_rate,
            handover_rate=costs.handover_rate,
            backlog_bytes=waiting.bytes,
            max_backlog_300s=work.most.add(now, waiting.rows),
            busy_cores=work.cores,
            apply_rate=apply,
            worth=work.is_worth,
        )
