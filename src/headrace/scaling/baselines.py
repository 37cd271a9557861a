"""What else could decide: the usual ways of choosing a number of workers, for comparison."""

from __future__ import annotations

import math
from collections import deque

import numpy as np

from headrace.scaling.arrivals import TICK, Arrivals
from headrace.scaling.policy import HOURS, Backlog, Bounds, Policy, Schedule, SloBand, Static
from headrace.scaling.simulation import Outcome, Plant, simulate
from headrace.scaling.snapshot import Code, Decision, Reason, Snapshot

_HEADROOM = 0.85
"""How busy workers are to be that a schedule plans."""
_DAY = 24
"""Hours."""
_ENOUGH = 28 * 86_400.0


def static_peak(arrivals: Arrivals, mu: float) -> Static:
    """Return as many workers, always, as the busiest minute of these same arrivals needs."""
    minute = round(60 / TICK)
    peak = np.convolve(arrivals.rows, np.ones(minute) / minute, "valid").max() / TICK
    return Static(math.ceil(peak / mu), name="static peak")


def schedule_of(history: Arrivals, mu: float) -> Schedule:
    """Return a schedule that would have done for 95 % of each hour of `history`.

    Hours of the week are told apart where there are four of each, else only the hours of the day.
    """
    hours, rates = history.hours(), history.rows / TICK
    apart = HOURS if history.seconds >= _ENOUGH else _DAY
    workers = []
    for hour in range(HOURS):
        seen = rates[hours % apart == hour % apart]
        need = float(np.quantile(seen if len(seen) else rates, 0.95))
        workers.append(math.ceil(need / _HEADROOM / mu))
    return Schedule(tuple(workers))


class Cpu:
    """The Horizontal Pod Autoscaler on CPU: so many workers that they are busy for 70 % of their time.

    Its defaults: a tolerance of a tenth, at most twice as many or four more at a time, and fewer only as the
    greatest wish of the last 300 s. It never goes to zero. Unlike a policy of ours it remembers: one object
    for one simulation.
    """

    name = "cpu 70 %"

    def __init__(self, target: float = 0.7) -> None:
        self._target = target
        self._busy = 0.0
        self._wishes: deque[int] = deque(maxlen=round(300 / TICK))

    def decide(self, snapshot: Snapshot) -> Decision:
        """Return the number of workers by the share of their time that they are busy."""
        current = snapshot.desired
        # The metrics pipeline's smoothing: a time constant of ten seconds.
        self._busy += 0.78 * ((snapshot.busy or 0.0) - self._busy)
        ratio = self._busy / self._target
        wanted = current if abs(ratio - 1) <= 0.1 else math.ceil(ratio * snapshot.ready)
        self._wishes.append(wanted)
        wanted = min(max(wanted, min(current, max(self._wishes))), current + max(4, current))
        # Without a worker there is no use of CPU to scale by.
        wanted = max(1, snapshot.limits.min_workers, min(snapshot.limits.max_workers, wanted))
        return Decision(wanted, Reason(Code.THRESHOLD, {"backlog": 0.0, "threshold": 0.0}))

    def bounds(self, snapshot: Snapshot) -> Bounds | None:  # noqa: ARG002 - the protocol's
        """Return None: it counts every tick."""
        return None


def compare(
    arrivals: Arrivals, history: Arrivals, plant: Plant, *, threshold: float = 60.0, fixed: int | None = None
) -> list[Outcome]:
    """Simulate every policy and baseline over the same arrivals; `history` is what a schedule is learned
    from.

    `threshold` is the backlog policy's, in seconds of work for each worker; `fixed` adds a fixed number of
    workers.
    """
    policies: list[Policy] = [
        SloBand(),
        Backlog(threshold=threshold, name=f"backlog {threshold:.0f} s"),
        Cpu(),
        schedule_of(history, plant.mu),
        static_peak(arrivals, plant.mu),
    ]
    if fixed is not None:
        policies.append(Static(fixed, name=f"static {fixed}"))
    return [simulate(arrivals, policy, plant) for policy in policies]
