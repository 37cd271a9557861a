"""What a scaling decision is made of, and what it says.

Backlogs and arrivals are compared in work-seconds: rows divided by the rows that a worker does in a second
with a part in hand. So models of different weight add up, and an arrival rate is a number of workers.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

NO_PRICE = 0.0


@dataclass(frozen=True, slots=True)
class Load:
    """What one model asks of the workers: rows, seconds, rows a second.

    A rate that has not been measured yet is None.
    """

    model: str
    slo: float
    """The freshness target in seconds: from a change's commit to its being visible."""
    backlog_rows: float
    """Rows that are staged and not prepared."""
    oldest_age: float
    """Seconds since the commit of the oldest change that is not applied; 0 where there is none."""
    ewma_30s: float
    """Arrivals, a moving average over 30 s."""
    ewma_300s: float
    max_300s: float
    """The greatest of the larger of both averages in the last 300 s."""
    mu: float | None
    """Rows per second that a worker has a part in hand: its waiting is left out, and what it loses is not."""
    own_rate: float | None = None
    """Rows per second that the main process prepares by itself."""
    handover_rate: float | None = None
    """Rows per second of the main process's time that it hands to workers and takes back."""
    backlog_bytes: float = 0.0
    max_backlog_300s: float = 0.0
    """The greatest backlog in the last 300 s, rows."""
    busy_cores: float | None = None
    """Cores that are busy while the main process prepares it."""
    apply_rate: float | None = None
    """Rows per second of it that apply takes, its waiting left out."""
    worth: bool | None = None
    """Whether it is worth a worker by what has been measured (`headrace.scaling.worth`); None: not judged."""

    @property
    def service_rate(self) -> float | None:
        """`mu`, and until it is measured what the main process does: a worker runs the same code."""
        return self.mu or self.own_rate

    @property
    def work_seconds(self) -> float:
        """Seconds of one worker that the backlog takes; 0 while no rate is known."""
        rate = self.service_rate
        return self.backlog_rows / rate if rate else 0.0

    @property
    def is_worth_a_worker(self) -> bool:
        """Whether it is, as judged, or else whether handing over costs less than doing it."""
        if self.worth is not None:
            return self.worth
        if self.own_rate is None or self.handover_rate is None:
            return True
        return self.handover_rate > self.own_rate


@dataclass(frozen=True, slots=True)
class Limits:
    """What no decision goes beyond."""

    min_workers: int = 0
    max_workers: int = 1
    worker_hours_left: float | None = None
    """What is left of today's `max_worker_hours_per_day`; None without a budget."""
    price: float = NO_PRICE
    """Of a worker-hour, in whatever currency; 0 where it is not known."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All inputs of one decision. A figure that could not be had is None: then nothing is changed."""

    loads: tuple[Load, ...]
    ready: int
    """Workers that take parts."""
    starting: int
    desired: int
    """What the decision before this one said."""
    start_p95: float
    """Seconds from the start of a worker to its first result."""
    limits: Limits
    starting_seconds: float = 0.0
    """Seconds since their start, of all workers that are starting together."""
    parts: int | None = None
    """Parts that wait for a worker or are in the hands of one; None where they are not counted."""
    figures_age: float | None = 0.0
    """Seconds since the figures were taken; None where there are none."""
    apply_rate: float | None = None
    """Rows per second that apply takes while it is busy with whole slices; None until it has been."""
    staged_rate: float | None = None
    """Rows per second that have come to be staged at most, of one source; None until many have come at once.
    Capture and load can do as much."""
    apply_waits: bool = False
    """Whether no source's apply can go on now, as while the destination is away."""
    prepared_parts: int = 0
    """Parts that are prepared and wait for apply."""
    raises_without_gain: int = 0
    """How many raises, one after another, have brought no more throughput (`headrace.scaling.gain`)."""
    busy: float | None = None
    """Share of their time that the ready workers were busy since the figures before."""
    hour: int | None = None
    """The hour of the week, UTC, from 0 (Monday 00:00) to 167."""


class Code(enum.StrEnum):
    """Why a decision is what it is."""

    KEEPS_UP = "keeps_up"
    CATCHING_UP = "catching_up"
    BEHIND = "behind"
    QUIETER = "quieter"
    IDLE = "idle"
    OWN_PROCESS = "own_process"
    FIGURES_MISSING = "figures_missing"
    FIGURES_STALE = "figures_stale"
    NOT_WORTH_IT = "not_worth_it"
    CORES_ARE_BUSY = "cores_are_busy"
    APPLY_IS_SLOWER = "apply_is_slower"
    WORKERS_ARE_SLOWER = "workers_are_slower"
    FEW_PARTS = "few_parts"
    APPLY_IS_THE_LIMIT = "apply_is_the_limit"
    APPLY_WAITS = "apply_waits"
    NO_GAIN = "no_gain"
    BUDGET_SPENT = "budget_spent"
    SLO_INFEASIBLE = "SLO_INFEASIBLE"
    OVER_A_LIMIT = "over_a_limit"
    THRESHOLD = "threshold"
    FIXED = "fixed"
    SCHEDULED = "scheduled"


_SENTENCES: Mapping[Code, str] = {
    Code.KEEPS_UP: "Freshness {age:.0f} s of {slo:.0f} s, and the arrivals keep {rate:.2f} workers busy.",
    Code.CATCHING_UP: "{workers} workers are enough to bring freshness from {age:.0f} s back under "
    "{slo:.0f} s.",
    Code.BEHIND: "Freshness will be {age:.0f} s of {slo:.0f} s when workers ordered now are ready: "
    "arrivals need {rate:.2f} workers, and {backlog:.0f} s of work wait.",
    Code.QUIETER: "The arrivals of the last 300 s need {rate:.2f} workers at most; {backlog:.0f} s of work "
    "wait.",
    Code.IDLE: "Nothing is queued and nothing arrives.",
    Code.OWN_PROCESS: "The main process does it by itself: arrivals take {rate:.0%} of its time.",
    Code.FIGURES_MISSING: "Not measured yet: {what}. Nothing is changed without it.",
    Code.FIGURES_STALE: "The figures are {age:.0f} s old, more than {limit:.0f} s. Nothing is changed until "
    "there are new ones.",
    Code.NOT_WORTH_IT: "Handing over takes the main process longer ({handover:.0f} rows/s) than preparing "
    "({own:.0f} rows/s): workers would not help.",
    Code.CORES_ARE_BUSY: "Preparing {model} in the main process keeps {busy:.1f} cores busy: workers would "
    "take from it what they add.",
    Code.WORKERS_ARE_SLOWER: "A worker has prepared {worker:.0f} rows/s of {model}, the main process "
    "{own:.0f}: as many as this machine has cores for would not be faster.",
    Code.APPLY_IS_SLOWER: "The main process prepares {model} ({own:.0f} rows/s) as fast as apply takes it "
    "({apply:.0f} rows/s): workers would not help.",
    Code.FEW_PARTS: "{wanted} workers would be needed, but there are {parts} parts for them to take.",
    Code.APPLY_IS_THE_LIMIT: "Apply is the limit: {prepared} prepared parts wait for it, and it takes "
    "what {useful} workers do. More of them would not help.",
    Code.APPLY_WAITS: "Apply cannot go on, as while the destination is away: workers would have nothing to "
    "do. Nothing is changed until it does.",
    Code.NO_GAIN: "{raises} raises have brought no more throughput: the source or the destination is the "
    "limit. Freshness is {age:.0f} s of {slo:.0f} s.",
    Code.BUDGET_SPENT: "{wanted} workers are needed; {left:.2f} worker-hours are left of today's budget "
    "(max_worker_hours_per_day). Freshness is {age:.0f} s of {slo:.0f} s.",
    Code.SLO_INFEASIBLE: "SLO_INFEASIBLE(cap={cap}): the target of {slo:.0f} s needs {wanted} workers, "
    "max_workers is {cap}. Meeting it costs {more} worker-hours more an hour{price}.",
    Code.OVER_A_LIMIT: "{desired} workers are more than the limit of {cap}.",
    Code.THRESHOLD: "{backlog:.0f} s of work wait, {threshold:.0f} s for each worker.",
    Code.FIXED: "A fixed number of workers.",
    Code.SCHEDULED: "Hour {hour} of the week.",
}


@dataclass(frozen=True, slots=True)
class Reason:
    """A code for programs, and a sentence with the figures for people."""

    code: Code
    figures: Mapping[str, float | int | str] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """The reason in words; made when it is asked for, since a simulation makes millions of reasons."""
        return _SENTENCES[self.code].format(**self.figures)

    def __str__(self) -> str:
        return self.sentence


@dataclass(frozen=True, slots=True)
class Decision:
    """How many workers there should be, and why."""

    workers: int
    reason: Reason
