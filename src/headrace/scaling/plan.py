"""What a stated load will need: workers, disk, WAL at the source, time to recover, and the price.

All of it is arithmetic on figures, and each answer says what kind of figures it rests on: measured on this
pipeline, given by whoever asks, or assumed. Where an answer goes beyond what was measured, it says that too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Literal

from headrace.errors import UserError
from headrace.scaling.journal import Entry

Basis = Literal["measured", "given", "assumed"]
_ORDER: tuple[Basis, ...] = ("measured", "given", "assumed")
_OWN_SHARE = 0.7
_DAY = 86_400.0
_NOTICED = 1.0
"""Seconds until workers are ordered: with none, what waits is looked at and decided on each second."""
_BURSTY = 1.6
"""Worker-hours over the lower bound on the most uneven of the traces in docs/scaling.md."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A number, and where it comes from."""

    value: float
    basis: Basis


@dataclass(frozen=True, slots=True)
class Figures:
    """What one pipeline can do: rows per second of each hop, and bytes on disk for each byte of a row.

    A rate that nobody knows is None: that hop is left out, and the plan says so. The assumed bytes were
    measured with inserts of a million orders of 80 bytes of text that hardly repeats; wider rows take less,
    and updates more WAL.
    """

    worker: Figure | None = None
    """Rows per second that one worker has a part in hand."""
    own: Figure | None = None
    """Of the main process, while there are no workers."""
    capture: Figure | None = None
    load: Figure | None = None
    apply: Figure | None = None
    start: Figure = Figure(10.0, "assumed")
    """Seconds from the start of a worker to its first result."""
    wal: Figure = Figure(2.8, "assumed")
    log: Figure = Figure(0.95, "assumed")
    raw: Figure = Figure(0.6, "assumed")
    destination: Figure = Figure(0.4, "assumed")
    workers_seen: int = 0
    """The most workers that these figures were measured with; 0 where none were."""
    rate_seen: float = 0.0
    """The highest rate of arrivals that they were measured with."""
    backlog_seen: float = 0.0
    """The most rows that have waited meanwhile."""


@dataclass(frozen=True, slots=True)
class Question:
    """The load that is planned for."""

    rows_per_second: float
    row_bytes: float
    freshness: float = 60.0
    """Seconds from commit to visible."""
    retention: float = 7 * _DAY
    """Seconds for which log and raw tables are kept, and the destination is counted."""
    outage: float = 4 * 3600.0
    """Seconds for which Headrace may be away."""
    peak: float = 1.0
    """The busiest minutes over the mean."""
    burst: float = 0.0
    """Rows that come at once, beside the rest."""
    inserts: float = 1.0
    """Share of the changes that add a row to the destination."""
    max_workers: int = 16
    price: float = 0.0
    """Of a worker-hour."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One line of a plan. `value` is in `unit`; None where it cannot be had, and `note` says why."""

    what: str
    value: float | None
    unit: Literal["workers", "hours a day", "bytes", "seconds", "money a day"]
    basis: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """The answers, and what is wrong with the load: warnings to act on before it comes."""

    answers: tuple[Answer, ...]
    warnings: tuple[str, ...] = field(default=())


def figures_of(entries: Iterable[Entry]) -> Figures:
    """Return what a journal tells: the rates of workers, main process and apply, and the start time.

    Where no worker has worked yet, what the main process does stands for one, which is an assumption.
    """
    workers, likely, own, apply, starts = (list[float]() for _ in range(5))
    seen, rate_seen, backlog_seen, staged = 0, 0.0, 0.0, 0.0
    for entry in entries:
        snapshot = entry.snapshot
        loads = [load for load in snapshot.loads if load.service_rate]
        rows = sum(load.ewma_300s for load in loads)
        if work := sum(load.ewma_300s / (load.service_rate or 1.0) for load in loads):
            (workers if all(load.mu for load in loads) else likely).append(rows / work)
        if all(load.own_rate for load in loads) and rows:
            own.append(rows / sum(load.ewma_300s / (load.own_rate or 1.0) for load in loads))
        if snapshot.apply_rate:
            apply.append(snapshot.apply_rate)
        staged = max(staged, snapshot.staged_rate or 0.0)
        seen, rate_seen = max(seen, snapshot.ready), max(rate_seen, sum(load.max_300s for load in loads))
        backlog_seen = max(backlog_seen, sum(load.backlog_rows for load in loads))
        if seen:
            starts.append(snapshot.start_p95)
    figures = Figures(
        worker=_measured(workers) or (Figure(median(likely), "assumed") if likely else None),
        own=_measured(own),
        apply=_measured(apply),
        capture=Figure(staged, "measured") if staged else None,
        load=Figure(staged, "measured") if staged else None,
        workers_seen=seen,
        rate_seen=rate_seen,
        backlog_seen=backlog_seen,
    )
    return replace(figures, start=_measured(starts[-1:]) or figures.start)


def _measured(values: list[float]) -> Figure | None:
    return Figure(median(values), "measured") if values else None


def plan(question: Question, figures: Figures) -> Plan:
    """Answer what a load needs. Raises UserError where the rate of a worker is not known."""
    if figures.worker is None:
        raise UserError(
            "How many rows a worker does in a second is not known: nothing has measured it yet.",
            "Let the pipeline run under load first, or give --worker-rate.",
        )
    planner = _Planner(question, figures, figures.worker)
    answers = (*planner.workers(), *planner.disk(), *planner.recovery())
    return Plan(answers, tuple(planner.warnings()))


class _Planner:
    def __init__(self, question: Question, figures: Figures, worker: Figure) -> None:
        self._asked, self._figures, self._worker = question, figures, worker
        own = figures.own.value if figures.own else 0.0
        rate = question.rows_per_second
        self._alone = rate * question.peak <= _OWN_SHARE * own
        self._mean = 0 if self._alone else math.ceil(rate / worker.value)
        self._peak = 0 if self._alone else math.ceil(rate * question.peak / worker.value)

    def workers(self) -> Iterator[Answer]:
        """Say how many workers, for how long, at what price."""
        asked = self._asked
        alone = "the main process does it by itself" if self._alone else ""
        yield self._answer("workers at the mean", self._mean, "workers", self._worker, note=alone)
        yield self._answer("workers at the peak", self._peak, "workers", self._worker)
        hours, note = 24.0 * self._mean, ""
        if asked.peak > 1 and not self._alone:
            least = 24 * asked.rows_per_second / self._worker.value
            hours = max(hours, least * _BURSTY)
            note = f"at least {least:,.1f}, whatever decides; as much as this where the load is very uneven"
        yield self._answer("worker-hours", hours, "hours a day", self._worker, note=note)
        if asked.price:
            yield self._answer("price of workers", hours * asked.price, "money a day", self._worker)

    def disk(self) -> Iterator[Answer]:
        """Say what log, raw tables and destination take, and what the source keeps meanwhile."""
        asked, figures = self._asked, self._figures
        rate = asked.rows_per_second * asked.row_bytes
        kept = f"after {asked.retention / _DAY:,.1f} days"
        for name, figure in (("log", figures.log), ("raw tables", figures.raw)):
            yield self._answer(
                f"disk: {name}", rate * asked.retention * figure.value, "bytes", figure, note=kept
            )
        grown = rate * asked.inserts * asked.retention * figures.destination.value
        note = f"{kept}, with {asked.inserts:.0%} of the changes as new rows"
        yield self._answer("disk: destination", grown, "bytes", figures.destination, note=note)
        wal = rate * asked.peak * asked.outage * figures.wal.value
        note = "at the peak rate; max_slot_wal_keep_size and the source's disk must have it"
        yield self._answer(
            f"WAL at the source, {_time(asked.outage)} away", wal, "bytes", figures.wal, note=note
        )

    def recovery(self) -> Iterator[Answer]:
        """Say how long until freshness is back: after an outage, and after a burst."""
        asked = self._asked
        missed = asked.rows_per_second * asked.outage
        yield self._catch_up(f"recovery after {_time(asked.outage)} away", missed)
        if asked.burst:
            what = f"recovery after {asked.burst:,.0f} rows at once"
            yield self._catch_up(what, asked.burst, asked.burst)

    def warnings(self) -> Iterator[str]:
        """Say what will not work, and what to do."""
        asked, figures = self._asked, self._figures
        busiest = asked.rows_per_second * asked.peak
        for name in ("capture", "load", "apply"):
            rate: Figure | None = getattr(figures, name)
            if rate is None:
                yield f"The rate of {name} is not known and left out; give --{name}-rate."
            elif rate.value <= busiest:
                yield (
                    f"{name.capitalize()} does {rate.value:,.0f} rows/s, the peak is {busiest:,.0f}: no "
                    "number of workers helps. Split the source, or the destination."
                )
        if self._peak > asked.max_workers:
            more = self._peak - asked.max_workers
            yield (
                f"SLO_INFEASIBLE(cap={asked.max_workers}): the peak needs {self._peak} workers. {more} more "
                f"cost {more} worker-hours for each hour of peak. Raise max_workers, or let freshness suffer."
            )
        if not self._alone and figures.start.value > asked.freshness / 2:
            yield (
                f"A worker takes {figures.start.value:,.0f} s to start, more than half of the target of "
                f"{asked.freshness:,.0f} s: from no workers it is missed. Keep min_workers = "
                f"{max(1, self._mean)}."
            )

    def _catch_up(self, what: str, backlog: float, whole: float = 0.0) -> Answer:
        """Return how long a backlog takes: with workers, who have to start first, or without.

        Of `whole` rows in one transaction none is prepared before all are staged; workers start meanwhile.
        """
        asked, figures = self._asked, self._figures
        rate = asked.rows_per_second
        useful = math.ceil((rate + backlog / (asked.freshness / 2)) / self._worker.value)
        workers = max(1, min(asked.max_workers, useful))
        hops = [hop for hop in (figures.capture, figures.load, figures.apply) if hop]
        most = min([hop.value for hop in hops], default=math.inf)
        speed = min(workers * self._worker.value, most)
        own = min(figures.own.value, most) if figures.own else 0.0
        used = [self._worker, figures.start, *hops, *([figures.own] if figures.own else [])]
        brought = [hop.value for hop in (figures.capture, figures.load) if hop]
        coming = whole / min(brought) if brought else 0.0
        start = max(0.0, _NOTICED + figures.start.value - coming)
        after = f", after {coming:,.0f} s until all is staged" if coming else ""
        if own > rate and (own >= speed or backlog / (own - rate) <= start):
            note = f"at {own:,.0f} rows/s, by the main process itself{after}"
            seconds = coming + backlog / (own - rate)
            return self._answer(what, seconds, "seconds", *used, note=note, workers=0, waiting=backlog)
        if speed <= rate:
            note = f"never: {speed:,.0f} rows/s with {workers} workers"
            return self._answer(what, None, "seconds", *used, note=note, workers=workers)
        # Until workers have started, the main process goes on by itself.
        seconds = coming + start + (backlog - (own - rate) * start) / (speed - rate)
        note = f"at {speed:,.0f} rows/s with {workers} workers{after}"
        return self._answer(what, seconds, "seconds", *used, note=note, workers=workers, waiting=backlog)

    def _answer(
        self,
        what: str,
        value: float | None,
        unit: Literal["workers", "hours a day", "bytes", "seconds", "money a day"],
        *used: Figure,
        note: str = "",
        workers: int | None = None,
        waiting: float = 0.0,
    ) -> Answer:
        """Return an answer that rests on the weakest of the figures used."""
        basis: str = max((figure.basis for figure in used), key=_ORDER.index)
        beyond = []
        figures = self._figures
        count = (self._peak if unit != "bytes" else 0) if workers is None else workers
        if figures.workers_seen and count > figures.workers_seen:
            beyond.append(f"{count} workers, {figures.workers_seen} measured")
        if figures.rate_seen and self._asked.rows_per_second > figures.rate_seen:
            beyond.append(f"{self._asked.rows_per_second:,.0f} rows/s, {figures.rate_seen:,.0f} measured")
        if figures.backlog_seen and waiting > figures.backlog_seen:
            beyond.append(f"{waiting:,.0f} rows that wait, {figures.backlog_seen:,.0f} measured")
        if beyond:
            basis += f"; extrapolated ({'; '.join(beyond)})"
        return Answer(what, value, unit, basis, note)


def _time(seconds: float) -> str:
    for unit, length in (("d", _DAY), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"
