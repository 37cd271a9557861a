"""How many workers there should be: policies, pure functions from a snapshot to a decision.

No clock, no state, no effects: the same snapshot always gives the same decision, so that every decision can
be explained and replayed. What a policy needs to know of the past is in the snapshot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple, Protocol

from headrace.scaling.snapshot import Code, Decision, Limits, Load, Reason, Snapshot
from headrace.scaling.worth import BEGINS

__all__ = [
    "HOURS",
    "Backlog",
    "Bounds",
    "Code",
    "Decision",
    "Limits",
    "Load",
    "Policy",
    "Reason",
    "Schedule",
    "SloBand",
    "Snapshot",
    "Static",
]

HOURS = 168
"""Of a week."""

_AFFORDED_SECONDS = 300.0
"""What is left of a budget must pay all workers for so long, or they are fewer: it is never overdrawn by
much."""
_PARTS_AHEAD = 2
"""Prepared parts per worker that may wait for apply; at so many, apply is the limit."""
_RAISES_IN_VAIN = 2
_MOST_CAUTION = 3.0
"""Workers that take longer to start than one and a half targets cannot be waited for, whatever is
foreseen."""
_APART = 270.0
"""Seconds by which the two moving averages lag differently: their difference over it is the arrivals'
slope."""
_EPSILON = 1e-9
"""So that 3.0000000001 workers of arithmetic are three."""


class Bounds(NamedTuple):
    """Within these, and within the same hour, a policy decides the same again: nothing need be asked of it.

    `backlog + rate_weight * max(ewma_30s, ewma_300s) + rise_weight * max(0, ewma_30s - ewma_300s) <= limit`,
    the oldest age is at most `age`, `max_300s` is above `peak`, and `ewma_30s` is at least `fast`. Rows and
    seconds; for one load, all workers ready, and limits and apply's rate that stay.
    """

    limit: float = math.inf
    rate_weight: float = 0.0
    rise_weight: float = 0.0
    age: float = math.inf
    peak: float = -1.0
    fast: float = -1.0


class Policy(Protocol):
    """Decides. `name` is what the configuration, the journal and tables call it."""

    @property
    def name(self) -> str:
        """The policy's name."""

    def decide(self, snapshot: Snapshot) -> Decision:
        """Return how many workers there should be; pure, and never beyond `snapshot.limits`."""

    def bounds(self, snapshot: Snapshot) -> Bounds | None:
        """Return within which bounds it stays at `snapshot.desired`; None where it has to be asked each
        time."""


class _Demand(NamedTuple):
    """What the arrivals and the backlog ask for; workers and work-seconds."""

    rate: float
    peak: float  # the greatest of the last 300 s
    backlog: float
    workers: float  # that bring every model back into the band
    age: float  # of the worst model, as it will be
    urgency: float  # that age over the target that is worked with
    load: Load  # the worst one
    is_low: bool  # the backlog is below the band for every target


@dataclass(frozen=True, slots=True)
class SloBand:
    """Keeps freshness inside a band below its target: waiting is free until half of the target is used up.

    More workers are ordered when the age of the oldest change, as it will be once they are ready, leaves the
    band: as many as the arrivals need, and as bring the backlog back in half a target. Fewer when the
    arrivals of the last 300 s need fewer by a tenth. In between nothing changes, which makes for few changes.

    Several targets: work goes by deadline, so the models of a target compete with those of stricter ones
    only, and the demand is the greatest over all targets (the demand bound of earliest-deadline-first
    scheduling).

    Where workers take longer to start than the band is wide, it foresees more and waits less: the target
    that it works with is smaller, and a rise of the arrivals counts for more, by the same factor.
    """

    high: float = 0.5
    """Share of the target at which workers are added."""
    low: float = 0.25
    """Share of the target that a raise aims for, and below which workers may leave."""
    rho: float = 1.0
    """How busy workers may be after a lowering, at the greatest arrival rate of the last 300 s."""
    deadband: float = 0.1
    """Lowerings by a smaller share of the workers are left out."""
    own_share: float = 0.7
    """Share of the main process's time up to which it takes over again from the last workers."""
    stale_after: float = 60.0
    """Seconds after which figures are too old to act on."""
    name: str = "slo_band"

    def decide(self, snapshot: Snapshot) -> Decision:
        """Return the number of workers that keeps every model within its target, if the limits allow."""
        current = snapshot.desired
        if unfit := _unfit(snapshot, self.stale_after):
            return _limited(current, unfit, snapshot, may_rise=False)
        loads = [load for load in snapshot.loads if load.is_worth_a_worker]
        if not loads:
            return _limited(0, _without_workers(snapshot), snapshot)
        own = min((load.own_rate or 0.0) / (load.service_rate or 1.0) for load in loads)
        demand = self._demand(loads, snapshot, own)
        if demand.urgency > self.high:
            wanted, reason = self._raised(demand, snapshot)
        else:
            wanted, reason = self._lowered(demand, current, own, loads)
        useful = _useful_workers(loads, snapshot.apply_rate)
        if useful is not None and wanted - useful >= max(1, self.deadband * current):
            wanted = useful
            if useful <= snapshot.limits.max_workers or reason.code is not Code.BEHIND:
                reason = _apply_is_the_limit(snapshot, useful)
        return _limited(wanted, reason, snapshot)

    def bounds(self, snapshot: Snapshot) -> Bounds | None:
        """Return where neither side of the band is reached: the condition of a raise is linear in the
        figures."""
        workers = snapshot.ready
        if len(snapshot.loads) != 1 or workers != snapshot.desired or snapshot.starting:
            return None
        load, limits, start = snapshot.loads[0], snapshot.limits, snapshot.start_p95
        service = load.service_rate
        if not service or not load.is_worth_a_worker or limits.worker_hours_left is not None:
            return None
        own = (load.own_rate or 0.0) / service
        caution = self._caution(load.slo, start)
        age = self.high * load.slo / caution
        peak = fast = -1.0
        if workers > limits.min_workers:
            least = workers - max(1, math.ceil(self.deadband * workers))
            peak = max(least * self.rho, self.own_share * own) * service
            fast = 1 / load.slo
        limit = (workers or own) * start * service
        return Bounds(limit, start - age, (start / 2 - age) * start * caution / _APART, age, peak, fast)

    def _demand(self, loads: Sequence[Load], snapshot: Snapshot, own: float) -> _Demand:
        """Add up the loads, strictest target first, as they will be when a worker ordered now is ready."""
        start = snapshot.start_p95
        # What will have been done by then: workers on their way count for what is left of the time.
        coming_work = (snapshot.ready or own) * start
        hands = snapshot.ready or own or 1.0  # after hours of quiet, arrivals alone would tell of centuries
        coming_work += min(snapshot.starting_seconds, snapshot.starting * start)
        rate = peak = rise = backlog = workers = age = 0.0
        urgency, worst, is_low = -1.0, loads[0], True
        for load in sorted(loads, key=attrgetter("slo")) if len(loads) > 1 else loads:
            service = load.service_rate or 1.0
            fast, slow = load.ewma_30s / service, load.ewma_300s / service
            caution = self._caution(load.slo, start)
            target = load.slo / caution
            rate += max(fast, slow)
            peak += load.max_300s / service
            rise += max(0.0, fast - slow) / _APART * start * caution
            backlog += load.backlog_rows / service
            coming = rate + rise
            left = max(0.0, backlog + (rate + rise / 2) * start - coming_work)
            excess = max(0.0, left - self.low * target * coming)
            workers = max(workers, coming + excess / (self.high * target))
            is_old = load.oldest_age if load.backlog_rows else 0.0
            will_be = 0.0  # of what is old, but done by then, a worker ordered now would find nothing
            if left:
                wait = left / coming if coming > 0 else load.slo
                will_be = max(is_old, min(wait, max(load.slo, left / hands)))
            if will_be / target > urgency:
                age, urgency, worst = max(is_old, will_be), will_be / target, load
            is_low = is_low and backlog <= self.low * target * rate
        return _Demand(rate, peak, backlog, workers, age, urgency, worst, is_low)

    def _caution(self, slo: float, start: float) -> float:
        return min(_MOST_CAUTION, max(1.0, start / (self.high * slo)))

    def _raised(self, demand: _Demand, snapshot: Snapshot) -> tuple[int, Reason]:
        """Return more workers, unless there are enough already or others would not help."""
        current = snapshot.desired
        wanted = math.ceil(demand.workers - _EPSILON)
        if wanted <= current:
            return current, _reason(Code.CATCHING_UP, demand, workers=current)
        if snapshot.prepared_parts >= _PARTS_AHEAD * max(1, snapshot.ready):
            return current, _apply_is_the_limit(snapshot, current)
        if snapshot.raises_without_gain >= _RAISES_IN_VAIN:
            return current, _reason(Code.NO_GAIN, demand, raises=snapshot.raises_without_gain)
        return wanted, _reason(Code.BEHIND, demand)

    def _lowered(
        self, demand: _Demand, current: int, own: float, loads: Sequence[Load]
    ) -> tuple[int, Reason]:
        """Return fewer workers where these are enough for what has been lately, else as many as there are."""
        wanted = self._enough(demand, current, own, loads)
        if wanted == 0:
            does_itself = own > 0 and demand.rate > 0
            share = demand.rate / own if does_itself else 0.0
            return 0, _reason(Code.OWN_PROCESS if does_itself else Code.IDLE, demand, rate=share)
        if wanted < current:
            return wanted, _reason(Code.QUIETER, demand, rate=demand.peak)
        return current, _reason(Code.KEEPS_UP, demand)

    def _enough(self, demand: _Demand, current: int, own: float, loads: Sequence[Load]) -> int:
        if not demand.is_low:
            return current
        if own and demand.peak <= self.own_share * own:
            return 0
        is_idle = all(load.ewma_30s * load.slo < 1 and load.backlog_rows == 0 for load in loads)
        if is_idle:
            return 0
        wanted = max(1, math.ceil(demand.peak / self.rho - _EPSILON))
        return wanted if current - wanted >= max(1, math.ceil(self.deadband * current)) else current


@dataclass(frozen=True, slots=True)
class Backlog:
    """KEDA's rule through a Horizontal Pod Autoscaler: a worker for each `threshold` seconds of work that
    wait.

    The HPA's defaults: no change within a tenth of what is there, at most twice as many (or four more) at a
    time, and fewer only when the greatest backlog of the last 300 s asks for fewer. For comparison: it has
    no target, and somebody has to find the threshold.
    """

    threshold: float = 60.0
    """Work-seconds for each worker; KEDA's lagThreshold over a worker's rate."""
    tolerance: float = 0.1
    stale_after: float = 60.0
    name: str = "backlog"

    def decide(self, snapshot: Snapshot) -> Decision:
        """Return the number of workers that the backlog alone asks for."""
        current = snapshot.desired
        if unfit := _unfit(snapshot, self.stale_after):
            return _limited(current, unfit, snapshot, may_rise=False)
        backlog = peak = 0.0
        for load in snapshot.loads:
            work = load.work_seconds
            backlog += work
            peak += max(work, load.max_backlog_300s / (load.service_rate or 1.0))
        wanted = math.ceil(backlog / self.threshold - _EPSILON)
        if current and abs(backlog / (self.threshold * current) - 1) <= self.tolerance:
            wanted = current
        if wanted < current:
            wanted = min(current, math.ceil(peak / self.threshold - _EPSILON))
        wanted = min(wanted, current + max(4, current))
        reason = Reason(Code.THRESHOLD, {"backlog": backlog, "threshold": self.threshold})
        return _limited(wanted, reason, snapshot)

    def bounds(self, snapshot: Snapshot) -> Bounds | None:  # noqa: ARG002 - the protocol's
        """Return None: every backlog may ask for another number."""
        return None


@dataclass(frozen=True, slots=True)
class Static:
    """Always so many."""

    workers: int
    name: str = "static"

    def decide(self, snapshot: Snapshot) -> Decision:
        """Return the fixed number."""
        return _limited(self.workers, Reason(Code.FIXED), snapshot, needs_parts=False)

    def bounds(self, snapshot: Snapshot) -> Bounds | None:
        """Return no bounds: no figure matters."""
        return Bounds() if snapshot.limits.worker_hours_left is None else None


@dataclass(frozen=True, slots=True)
class Schedule:
    """So many in each hour of the week, for loads that are known beforehand; for comparison."""

    workers: tuple[int, ...]
    """168 numbers, UTC, the first for Monday 00:00 to 01:00."""
    name: str = "schedule"

    def __post_init__(self) -> None:
        if len(self.workers) != HOURS:
            raise ValueError(f"a schedule has {HOURS} hours, not {len(self.workers)}")

    def decide(self, snapshot: Snapshot) -> Decision:
        """Return the number of the snapshot's hour."""
        if snapshot.hour is None:
            reason = Reason(Code.FIGURES_MISSING, {"what": "the hour"})
            return _limited(snapshot.desired, reason, snapshot, may_rise=False)
        reason = Reason(Code.SCHEDULED, {"hour": snapshot.hour})
        return _limited(self.workers[snapshot.hour % HOURS], reason, snapshot, needs_parts=False)

    def bounds(self, snapshot: Snapshot) -> Bounds | None:
        """Return no bounds: no figure matters."""
        return Bounds() if snapshot.limits.worker_hours_left is None else None


def _reason(code: Code, demand: _Demand, **figures: float) -> Reason:
    """Return a reason with the figures that all of them have."""
    load = demand.load
    return Reason(
        code,
        {
            "model": load.model,
            "age": demand.age,
            "slo": load.slo,
            "rate": demand.rate,
            "backlog": demand.backlog,
            **figures,
        },
    )


def _unfit(snapshot: Snapshot, stale_after: float) -> Reason | None:
    """Return why the figures are nothing to act on, None where they are."""
    if snapshot.apply_waits:
        return Reason(Code.APPLY_WAITS)
    age = snapshot.figures_age
    if age is None:
        return Reason(Code.FIGURES_MISSING, {"what": "backlog and arrivals"})
    if age > stale_after:
        return Reason(Code.FIGURES_STALE, {"age": age, "limit": stale_after})
    for load in snapshot.loads:
        if not load.service_rate:
            return Reason(Code.FIGURES_MISSING, {"what": f"the service rate of {load.model}"})
    return None


def _without_workers(snapshot: Snapshot) -> Reason:
    if not snapshot.loads:
        return Reason(Code.IDLE)
    load = max(snapshot.loads, key=attrgetter("backlog_rows"))
    handover, own, apply = load.handover_rate, load.own_rate or 0.0, load.apply_rate
    if load.worth is False and apply is not None and apply < BEGINS * own:
        return Reason(Code.APPLY_IS_SLOWER, {"apply": apply, "own": own, "model": load.model})
    if load.worth is False and load.mu is not None and load.mu < own / 2:
        return Reason(Code.WORKERS_ARE_SLOWER, {"worker": load.mu, "own": own, "model": load.model})
    if load.worth is False and (handover is None or handover > 2 * own):
        return Reason(Code.CORES_ARE_BUSY, {"busy": load.busy_cores or 0.0, "model": load.model})
    return Reason(Code.NOT_WORTH_IT, {"handover": handover or 0.0, "own": own, "model": load.model})


def _useful_workers(loads: Sequence[Load], apply_rate: float | None) -> int | None:
    """Return how many workers apply keeps up with, if it is known: of those on the slowest model."""
    if not apply_rate:
        return None
    return math.ceil(apply_rate / min(load.service_rate or 1.0 for load in loads) - _EPSILON)


def _apply_is_the_limit(snapshot: Snapshot, useful: int) -> Reason:
    return Reason(Code.APPLY_IS_THE_LIMIT, {"prepared": snapshot.prepared_parts, "useful": useful})


def _limited(
    wanted: int, reason: Reason, snapshot: Snapshot, *, may_rise: bool = True, needs_parts: bool = True
) -> Decision:
    """Return a decision within the limits; its reason tells which one bound it, and what that costs.

    Unless it `may_rise`, not even `min_workers` adds any; where workers are wanted for what waits, and not
    beforehand, they `needs_parts` to take.
    """
    limits, current = snapshot.limits, snapshot.desired
    figures = reason.figures
    if may_rise:
        wanted = max(wanted, limits.min_workers)
    workers = wanted
    if workers > limits.max_workers:
        workers = limits.max_workers
        if reason.code is Code.BEHIND:
            more = wanted - workers
            price = f", {more * limits.price:.2f} in money" if limits.price else ""
            more_figures: dict[str, float | int | str] = {
                **figures,
                "cap": workers,
                "wanted": wanted,
                "more": more,
                "price": price,
            }
            reason = Reason(Code.SLO_INFEASIBLE, more_figures)
        else:
            reason = Reason(Code.OVER_A_LIMIT, {"desired": wanted, "cap": workers})
    left = limits.worker_hours_left
    if left is not None and workers > (afforded := int(max(0.0, left) * 3600 / _AFFORDED_SECONDS)):
        workers = afforded
        told: dict[str, float | int | str] = {
            "age": 0.0,
            "slo": 0.0,
            **figures,
            "wanted": wanted,
            "left": left,
        }
        reason = Reason(Code.BUDGET_SPENT, told)
    parts = snapshot.parts if needs_parts else None
    if parts is not None and workers > current and workers > max(parts, limits.min_workers):
        workers = max(current, parts, min(limits.min_workers, workers))
        reason = Reason(Code.FEW_PARTS, {**figures, "wanted": wanted, "parts": parts})
    return Decision(workers, reason)
