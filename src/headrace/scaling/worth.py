"""Which work is worth a worker: what preparing costs in the main process, against handing it over.

Three things bound what workers can bring. Apply: the main process prepares while it applies, so where it
prepares faster than that, nothing waits for workers; so it is with plain SQL. Handing over: the main process
has to describe a part and to take its result back, which for cheap work takes longer than the work. And the
cores: where preparing in the main process keeps all of them busy already, a worker only takes from one what
it gives to another. What workers have done, once they have, bounds it as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

BEGINS = 1.4
"""So many times the throughput of the main process alone must be within reach for work to go to workers."""
_ENDS = 1.15
"""And at least so many for it to stay with them."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What has been measured of one model's work. None: not yet."""

    own_rate: float | None
    """Rows per second that the main process prepares by itself."""
    handover_rate: float | None
    """Rows per second of the main process's time that it hands over and takes back."""
    busy_cores: float | None
    """Cores that are busy while the main process prepares, in whichever process."""
    cores: int
    """That there are."""
    apply_rate: float | None = None
    """Rows per second that apply takes."""
    worker_rate: float | None = None
    """Rows per second that one worker has a part in hand."""


def reachable_gain(costs: Costs) -> float | None:
    """Return how many times the throughput of the main process alone workers can reach at most; None while
    too little is known to say."""
    if costs.own_rate is None or costs.busy_cores is None:
        return None
    apply = math.inf if costs.apply_rate is None else costs.apply_rate
    handover = math.inf if costs.handover_rate is None else costs.handover_rate
    most = costs.own_rate * costs.cores / max(1.0, costs.busy_cores)
    workers = math.inf if costs.worker_rate is None else costs.worker_rate * costs.cores
    return min(most, workers, handover, apply) / min(costs.own_rate, apply)


class Worth:
    """Whether one model's work is worth a worker, without wavering between two figures that are close."""

    def __init__(self) -> None:
        self._is_worth: bool | None = None

    def judge(self, costs: Costs) -> bool | None:
        """Return whether it is; None while nothing has been measured, and what it was before where a figure
        is missing."""
        gain = reachable_gain(costs)
        if gain is not None:
            self._is_worth = gain >= (_ENDS if self._is_worth else BEGINS)
        return self._is_worth
