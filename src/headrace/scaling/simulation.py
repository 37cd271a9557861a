"""What a policy would have done: arrivals against workers, and what it costs.

The plant is a fluid queue, first in first out, in steps of `TICK`: workers are ordered, cost from then on,
take parts after the start time, and everyone pauses for a moment when one joins or leaves. Arrivals and
their averages are columns; only the queue goes step by step, and a policy is asked only where its bounds are
left, so that months take seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from headrace.scaling.arrivals import TICK, Arrivals, Averages, Floats
from headrace.scaling.gain import GainWatch
from headrace.scaling.policy import Bounds, Limits, Load, Policy, Snapshot

_WINDOW = round(300 / TICK)
_PART_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Plant:
    """What the workers are; seconds, and rows a second."""

    mu: float
    """Rows a second of one worker."""
    slo: float = 120.0
    start: float = 60.0
    """From ordering a worker to its taking parts."""
    pause: float = 3.0
    """All stand still for so long when the set of workers changes."""
    drain: float = 10.0
    """For which a worker that leaves is still paid."""
    own_rate: float = 0.0
    """Rows a second of the main process while there is no worker."""
    apply_rate: float | None = None
    """Rows a second at most, however many workers; None for no bound."""
    believed: float = 1.0
    """What the policy takes `mu` for, over what it is."""
    limits: Limits = field(default_factory=lambda: Limits(1, 64))
    hours_per_day: float | None = None
    """Worker-hours that may be spent from midnight to midnight, UTC; None for no budget."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a policy. The columns have one value for each tick."""

    policy: str
    worker_hours: float
    bound_hours: float
    """The lower bound: the time of the work itself. Not even who knows the future needs less."""
    minutes_over: float
    """In which the oldest change was older than the target."""
    p99_freshness: float
    """Seconds that 99 % of the rows waited at most."""
    max_freshness: float
    actions_per_day: float
    """Changes of the number of workers."""
    price: float
    workers: NDArray[np.int32] = field(repr=False)
    """Workers that are paid: those that start, and those that are ready."""
    ages: Floats = field(repr=False)

    @property
    def ratio(self) -> float:
        """Worker-hours over the lower bound."""
        return self.worker_hours / self.bound_hours if self.bound_hours else math.nan


def simulate(arrivals: Arrivals, policy: Policy, plant: Plant) -> Outcome:
    """Let a policy see arrivals, and tell what it did. Deterministic."""
    return _Simulation(arrivals, policy, plant).run()


class _Simulation:
    def __init__(self, arrivals: Arrivals, policy: Policy, plant: Plant) -> None:
        averages = Averages.of(arrivals)
        self._arrivals, self._policy, self._plant = arrivals, policy, plant
        self._fast: list[float] = averages.ewma_30s.tolist()
        self._slow: list[float] = averages.ewma_300s.tolist()
        self._peak: list[float] = averages.max_300s.tolist()
        self._hours = arrivals.hours().tolist()
        self._arrived = np.cumsum(arrivals.rows).tolist()
        limits = plant.limits
        first = math.ceil(self._peak[0] / plant.mu)
        self._desired = self._ready = min(limits.max_workers, max(limits.min_workers, first))
        self._starting: list[float] = []  # when each will be ready, soonest first
        self._paused = 0.0  # seconds of the step to come in which nobody works
        self._done = 0.0
        self._oldest = 0  # the tick in which the oldest row that waits arrived
        self._actions = 0
        self._extra = 0.0  # worker-seconds of those that leave
        self._spent = 0.0  # worker-hours, today
        self._gain = GainWatch()
        self._raises = 0
        self._backlogs: list[float] = []

    def run(self) -> Outcome:
        ages: list[float] = []
        served: list[float] = []
        paid: list[int] = []
        backlogs, serve = self._backlogs, self._serve
        fast, peak = self._fast, self._peak
        bounds: Bounds | None = None
        pressed = fast  # the part of a raise's condition that the arrivals alone make
        weights = None
        hours, hour, day = self._hours, -1, -1
        for tick in range(len(fast)):
            paid.append(self._ready + len(self._starting))
            self._spent = paid[-1] * TICK / 3600 + (self._spent if hours[tick] // 24 == day else 0.0)
            day = hours[tick] // 24
            before = self._done
            backlog, age = serve(tick)
            served.append(self._done - before)
            ages.append(age)
            backlogs.append(backlog)
            if (
                bounds is not None
                and age <= bounds.age
                and backlog + pressed[tick] <= bounds.limit
                and peak[tick] > bounds.peak
                and fast[tick] >= bounds.fast
                and hours[tick] == hour
            ):
                continue
            hour = hours[tick]
            bounds = self._decide(tick, backlog, age, served[-1])
            if bounds is not None and weights != (bounds.rate_weight, bounds.rise_weight):
                weights = (bounds.rate_weight, bounds.rise_weight)
                pressed = self._pressed(bounds)
        return self._outcome(np.array(ages), np.array(served), np.array(paid, dtype=np.int32))

    def _pressed(self, bounds: Bounds) -> list[float]:
        fast, slow = np.array(self._fast), np.array(self._slow)
        rate, rise = np.maximum(fast, slow), np.maximum(0.0, fast - slow)
        pressed: list[float] = (bounds.rate_weight * rate + bounds.rise_weight * rise).tolist()
        return pressed

    def _serve(self, tick: int) -> tuple[float, float]:
        """Let the workers of a tick work; return rows that wait, and the age of the oldest."""
        plant, now = self._plant, (tick + 1) * TICK
        if self._starting and self._starting[0] < now:
            room = self._joined(now)
        elif self._ready:
            room = self._ready * plant.mu * (TICK - self._paused)
        else:
            room = plant.own_rate * TICK
        self._paused = 0.0
        if plant.apply_rate is not None:
            room = min(room, plant.apply_rate * TICK)
        arrived = self._arrived
        waiting = arrived[tick] - self._done
        if waiting <= room:
            self._done, self._oldest = arrived[tick], tick + 1
            return 0.0, 0.0
        self._done += room
        done, oldest = self._done, self._oldest
        while arrived[oldest] <= done:
            oldest += 1
        self._oldest = oldest
        start = arrived[oldest - 1] if oldest else 0.0
        since = oldest + (done - start) / (arrived[oldest] - start)
        return waiting - room, now - since * TICK

    def _joined(self, now: float) -> float:
        """Make workers ready whose time has come within the tick; return the rows that all can do in it."""
        plant = self._plant
        late = 0.0
        while self._starting and self._starting[0] < now:
            late += max(0.0, self._starting.pop(0) - (now - TICK))
            self._ready += 1
        self._paused = plant.pause
        worked: float = self._ready * (TICK - self._paused) - late
        return plant.mu * max(0.0, worked)

    def _decide(self, tick: int, backlog: float, age: float, served: float) -> Bounds | None:
        plant = self._plant
        self._raises = self._gain.note(
            tick * TICK,
            self._ready,
            served / TICK / plant.mu,
            is_behind=backlog > 0,
            own=plant.own_rate / plant.mu,
        )
        snapshot = self._snapshot(tick, backlog, age, served)
        workers = self._policy.decide(snapshot).workers
        change = workers - self._desired
        if change == 0:
            return None if self._gain.is_watching else self._policy.bounds(snapshot)
        self._actions += 1
        self._desired = workers
        if change > 0:
            self._starting += [(tick + 1) * TICK + plant.start] * change
            return None
        cancelled = min(-change, len(self._starting))
        del self._starting[len(self._starting) - cancelled :]
        if leaving := -change - cancelled:
            self._ready -= leaving
            self._extra += leaving * plant.drain
            self._paused = plant.pause
        return None

    def _snapshot(self, tick: int, backlog: float, age: float, served: float) -> Snapshot:
        plant = self._plant
        mu = plant.mu * plant.believed
        limits = plant.limits
        if plant.hours_per_day is not None:
            limits = replace(limits, worker_hours_left=plant.hours_per_day - self._spent)
        load = Load(
            model="all",
            slo=plant.slo,
            backlog_rows=backlog,
            oldest_age=age,
            ewma_30s=self._fast[tick],
            ewma_300s=self._slow[tick],
            max_300s=self._peak[tick],
            mu=mu,
            own_rate=plant.own_rate * plant.believed or None,
            max_backlog_300s=max(self._backlogs[-_WINDOW:]),
        )
        is_full = backlog > 0 and plant.apply_rate is not None and self._ready * plant.mu > plant.apply_rate
        return Snapshot(
            loads=(load,),
            ready=self._ready,
            starting=len(self._starting),
            desired=self._desired,
            start_p95=plant.start,
            starting_seconds=len(self._starting) * (plant.start + (tick + 1) * TICK) - sum(self._starting),
            limits=limits,
            parts=self._ready + math.ceil(backlog / (mu * _PART_SECONDS)),
            apply_rate=plant.apply_rate,
            prepared_parts=2 * self._ready if is_full else 0,
            raises_without_gain=self._raises,
            busy=served / (self._ready * plant.mu * TICK) if self._ready else 1.0,
            hour=self._hours[tick],
        )

    def _outcome(self, ages: Floats, served: Floats, paid: NDArray[np.int32]) -> Outcome:
        plant = self._plant
        hours = (float(paid.sum()) * TICK + self._extra) / 3600
        order = np.argsort(ages)
        total = np.cumsum(served[order])
        p99 = ages[order][min(len(ages) - 1, int(np.searchsorted(total, 0.99 * total[-1])))]
        return Outcome(
            policy=self._policy.name,
            worker_hours=hours,
            bound_hours=float(self._arrivals.rows.sum()) / plant.mu / 3600,
            minutes_over=float((ages > plant.slo).sum()) * TICK / 60,
            p99_freshness=float(p99),
            max_freshness=float(ages.max()),
            actions_per_day=self._actions / (self._arrivals.seconds / 86400),
            price=hours * plant.limits.price,
            workers=paid,
            ages=ages,
        )
