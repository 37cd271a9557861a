"""Deciding live: measures, decides, has the pool follow, writes down why, and tells of what people must know.

One thread calls `step` again and again. Nothing here fails because of a figure that is missing: then nothing
is changed, and the journal says what was missing.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Protocol

from headrace.scaling.budget import Budget
from headrace.scaling.gain import GainWatch
from headrace.scaling.journal import Entry, Journal, JournalledPolicy, as_object
from headrace.scaling.measure import Handing, Meter
from headrace.scaling.pool import PoolState, Service
from headrace.scaling.rates import p95
from headrace.scaling.snapshot import Limits, Load, Snapshot
from headrace.scaling.watch import ScalingWatch

logger = logging.getLogger("headrace.scaling")

LOOK_EVERY = 1.0
"""Seconds between two looks at what waits."""
DECIDE_EVERY = 5.0
_JOURNAL_EVERY = 60.0
_ASSUMED_START = 10.0
"""Seconds from a worker's start to its first result, until one has been seen."""
_PART_SECONDS = 5.0
"""Of work in a part, where parts are not cut yet."""
_FEW = 1_000
"""Rows that wait, or come in a minute, of a load whose rate is not known: fewer are soon done, or tell it."""
_RECALLED = 7 * 86_400.0
"""Seconds for which rates of an earlier process are taken for what they are."""


class Workers(Protocol):
    """What a decision needs of a pool."""

    def resize(self, workers: int) -> None:
        """Have so many workers from now on. Does not wait."""
        ...

    def state(self) -> PoolState:
        """Return what there is now."""
        ...

    def service(self) -> Mapping[str, Service]:
        """Return by model what was done."""
        ...


class Unstaffed:
    """No workers, for a project that wants none: the main process does the work."""

    def __init__(self) -> None:
        self._desired = 0

    def resize(self, workers: int) -> None:
        """Remember how many there should be."""
        self._desired = workers

    def state(self) -> PoolState:
        """Return that there are none."""
        return PoolState(self._desired, 0, 0, 0.0, 0, 0, ())

    def service(self) -> Mapping[str, Service]:
        """Return that nothing was done."""
        return {}


@dataclass(frozen=True, slots=True)
class Clock:
    """The time: of day, and of a clock that only rises. A test has one of its own."""

    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    monotonic: Callable[[], float] = time.monotonic


class Controller:
    """Decides how many workers a project has, from what the meters of its sources say."""

    def __init__(
        self,
        policy: JournalledPolicy,
        limits: Limits,
        pool: Workers,
        meters: Sequence[Meter],
        journal: Journal,
        budget: Budget,
        handing: Handing | None = None,
        clock: Clock = Clock(),
    ) -> None:
        """Take over from the journal what an earlier process has measured of how fast work goes."""
        self._policy, self._limits, self._pool = policy, limits, pool
        self._meters, self._journal, self._budget, self._clock = meters, journal, budget, clock
        self._handing = handing
        if handing is not None:
            for meter in meters:
                meter.use(handing)
        self._gain, self._watch = GainWatch(), ScalingWatch()
        self._rates: dict[str, float] = {}
        self._stepped = self._decided = clock.monotonic()
        self._busy: list[float] = []
        self._service: Mapping[str, Service] = {}
        self._written: tuple[float, Entry] | None = None
        self._last: Entry | None = None
        self._start = _ASSUMED_START
        self._apply_waits = False
        self._recall()

    def step(self, *, apply_waits: bool = False) -> None:
        """Look, and every few seconds decide; `apply_waits` as in a Snapshot."""
        self._apply_waits = apply_waits
        at = self._clock.monotonic()
        state = self._pool.state()
        self._budget.spend(state.ready + state.starting, at - self._stepped, self._clock.now())
        self._stepped = at
        if state.ready:
            self._busy.append(state.busy / state.ready)
        self._take_service()
        for meter in self._meters:
            meter.look(at)
        # With no worker each look decides: nobody else would do what has come.
        if at - self._decided >= (DECIDE_EVERY if state.desired else LOOK_EVERY):
            self._decide(at, state)
            self._decided = at

    def report(self) -> dict[str, Any]:
        """Return how scaling stands: `desired`, `ready`, `starting` and `busy` workers, `queued` parts,
        `worker_hours_today`, and the `decision` in force as the journal has it, None before the first."""
        state, last = self._pool.state(), self._last
        return {
            "desired": last.decision.workers if last else state.desired,
            **{name: getattr(state, name) for name in ("ready", "starting", "busy", "queued")},
            "worker_hours_today": round(self._budget.spent, 4),
            "decision": as_object(last) if last else None,
        }

    def close(self) -> None:
        """Have no more workers, and keep what they have cost and what was measured last."""
        self._pool.resize(0)
        self._budget.save()
        self._write(math.inf)

    def _take_service(self) -> None:
        """Tell the meters what workers have done since the step before."""
        service = self._pool.service()
        for model, done in service.items():
            before = self._service.get(model, Service())
            for meter in self._meters if done != before else ():
                meter.worked(model, done.rows - before.rows, done.seconds - before.seconds)
                meter.lost(model, done.kept - before.kept, done.lost - before.lost)
        self._service = dict(service)

    def _decide(self, at: float, state: PoolState) -> None:
        snapshot = self._snapshot(at, state)
        decision = self._policy.decide(snapshot)
        if decision.workers != state.desired:
            logger.info("%d workers, before %d: %s", decision.workers, state.desired, decision.reason)
            self._pool.resize(decision.workers)
        self._last = Entry(self._clock.now(), self._policy, snapshot, decision)
        self._write(at)
        self._watch.note(at, snapshot, decision)

    def _snapshot(self, at: float, state: PoolState) -> Snapshot:
        now = self._clock.now()
        elapsed = at - self._decided
        loads, age = self._loads(at)
        shared = [load for load in loads if load.is_worth_a_worker]
        work = sum(load.work_seconds for load in shared)
        own = max(((load.own_rate or 0.0) / (load.service_rate or 1.0) for load in shared), default=0.0)
        done = self._work_done(shared) / elapsed if elapsed else 0.0
        raises = self._gain.note(at, state.ready, done, is_behind=work > 1.0, own=own)
        if not self._gain.is_watching:
            self._rates = {load.model: load.service_rate for load in shared if load.service_rate}
        rates = [rate for meter in self._meters if (rate := meter.apply_rate) is not None]
        self._start = p95(list(state.start_times)) or self._start
        busy = sum(self._busy) / len(self._busy) if self._busy else None
        self._busy.clear()
        return Snapshot(
            loads=loads,
            ready=state.ready,
            starting=state.starting,
            desired=state.desired,
            start_p95=self._start,
            starting_seconds=state.starting_seconds,
            limits=replace(self._limits, worker_hours_left=self._budget.left(now)),
            parts=state.busy + max(state.queued, math.ceil(work / _PART_SECONDS)),
            figures_age=age,
            apply_rate=sum(rates) if rates else None,
            staged_rate=max((meter.staged_rate for meter in self._meters if meter.staged_rate), default=None),
            apply_waits=self._apply_waits,
            prepared_parts=self._handing.prepared_parts() if self._handing else 0,
            raises_without_gain=raises,
            busy=busy,
            hour=now.weekday() * 24 + now.hour,
        )

    def _loads(self, at: float) -> tuple[tuple[Load, ...], float | None]:
        """Return the loads of all sources, and how old the oldest figures are; None where some lack.

        A model that has had nothing to do yet needs no workers, and no figures.
        """
        found = [(meter.loads(), meter.looked_at) for meter in self._meters]
        loads = tuple(
            load for each, _ in found for load in each or () if load.service_rate or _is_active(load)
        )
        if any(each is None or looked is None for each, looked in found):
            return loads, None
        return loads, max((at - (looked or 0.0) for _, looked in found), default=0.0)

    def _work_done(self, loads: Sequence[Load]) -> float:
        """Return the work-seconds of some loads that have been done since this was asked before.

        From a raise on a row counts what it did before: of workers that take from each other each does less,
        and all look busy.
        """
        for load in loads:
            if rate := load.service_rate:
                self._rates.setdefault(load.model, rate)
        served = [each for meter in self._meters for each in meter.take_served().items()]
        return sum(rows / self._rates[work] for work, rows in served if work in self._rates)

    def _write(self, at: float) -> None:
        """Journal the decision in force if it, or its reason, is another than before, or a minute is over."""
        if self._last is None:
            return
        if self._written is not None:
            when, before = self._written
            if before is self._last or (at - when < _JOURNAL_EVERY and _gist(before) == _gist(self._last)):
                return
        try:
            self._journal.append(self._last)
        except OSError as error:
            logger.warning("a scaling decision cannot be journalled: %s", error.strerror)
        self._written = (at, self._last)

    def _recall(self) -> None:
        entry = self._journal.last()
        if entry is None or (self._clock.now() - entry.at).total_seconds() > _RECALLED:
            return
        self._start = entry.snapshot.start_p95
        share = entry.snapshot.apply_rate if len(self._meters) == 1 else None
        for meter in self._meters:
            meter.recall(entry.snapshot.loads, share)


def _gist(entry: Entry) -> tuple[object, ...]:
    """Return what makes a decision another one than that before it."""
    reason = entry.decision.reason
    return entry.decision.workers, reason.code, reason.figures.get("what")


def _is_active(load: Load) -> bool:
    """Whether a load has so much to do that nothing can be decided without its rate."""
    return load.backlog_rows >= _FEW or load.ewma_30s >= _FEW / 60
