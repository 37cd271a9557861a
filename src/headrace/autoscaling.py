"""Scaling of a running pipeline: its settings, sources and pool put together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

from headrace.config import Project
from headrace.handover import Handover, open_pool
from headrace.lane import Lane
from headrace.scale_settings import ScaleConfig
from headrace.scaling.budget import FILE as BUDGET
from headrace.scaling.budget import Budget
from headrace.scaling.controller import LOOK_EVERY, Controller, Unstaffed
from headrace.scaling.endpoint import Endpoint
from headrace.scaling.journal import FILE, Journal, JournalledPolicy
from headrace.scaling.policy import Backlog, Limits, Schedule, SloBand, Static
from headrace.transform.python.process import on_progress


class Autoscaling:
    """Workers of a pipeline, and the decision how many, from when it is made until it is closed."""

    def __init__(
        self, project: Project, lanes: Sequence[Lane], check: Callable[[], None] = lambda: None
    ) -> None:
        """Have lanes hand over parts, where the settings allow for workers. What waits for a part, or for a
        Python model of this process, calls `check`, which may raise what ends that.

        Raises OSError where the pool's folder cannot be had.
        """
        self._lanes = lanes
        self._config = project.scale
        self._endpoint: Endpoint | None = None
        self._pool = open_pool(project.state, project.scale.worker_memory) if project.scale.cap else None
        handover: Handover | None = None
        if self._pool is not None:
            self._pool.resize(_always(project.scale))  # before there is work, so that it is handed over
            handover = Handover(self._pool, self._is_worth_a_worker, check, self._rate_of)
            for lane in lanes:
                lane.joiner.workers.use(handover)
        on_progress(check)
        self._controller = Controller(
            policy_of(project.scale),
            limits_of(project.scale),
            self._pool or Unstaffed(),
            [lane.meter for lane in lanes],
            Journal(project.state / FILE),
            Budget(project.state / BUDGET, project.scale.max_worker_hours_per_day),
            handover,
        )

    def listen(self) -> None:
        """Answer HTTP, where the settings say so. Raises UserError where the address cannot be had."""
        if self._config.listen is not None:
            self._endpoint = Endpoint(self._config.listen, self.report)

    def step(self, stop: threading.Event, waiting: Collection[str]) -> None:
        """Look at what waits, decide every few seconds, and rest; `waiting` names threads that cannot go on
        now."""
        applying = {f"{lane.config.name}.apply" for lane in self._lanes}
        self._controller.step(apply_waits=applying <= set(waiting))
        stop.wait(LOOK_EVERY)

    def _is_worth_a_worker(self, work: str) -> bool:
        return all(lane.meter.is_worth_a_worker(work) for lane in self._lanes)

    def _rate_of(self, model: str) -> float | None:
        return next((rate for lane in self._lanes if (rate := lane.meter.rate(model))), None)

    def report(self) -> dict[str, Any]:
        """See `Controller.report`."""
        return self._controller.report()

    def close(self) -> None:
        """Send the workers home, and answer no more."""
        if self._endpoint is not None:
            self._endpoint.close()
        on_progress(None)
        self._controller.close()
        if self._pool is not None:
            self._pool.close()


def _always(config: ScaleConfig) -> int:
    """Return the workers that there are to be whatever is decided."""
    return config.cap if config.policy == "static" else min(config.min_workers, config.cap)


def policy_of(config: ScaleConfig) -> JournalledPolicy:
    """Return the policy that the settings name."""
    policies: dict[str, JournalledPolicy] = {
        "slo_band": SloBand(),
        "backlog": Backlog(config.threshold),
        "static": Static(config.cap),
    }
    return Schedule(config.schedule) if config.policy == "schedule" else policies[config.policy]


def limits_of(config: ScaleConfig) -> Limits:
    """Return the limits that the settings name; a day's budget is counted down elsewhere."""
    return Limits(config.min_workers, config.cap, config.max_worker_hours_per_day, config.price)
