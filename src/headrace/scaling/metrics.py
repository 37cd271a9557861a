"""Gauges of scaling in Prometheus' text format: all that decisions are made of, and what they say.

What has not been measured has no sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_POOL = {
    "desired": ("desired_workers", "Workers that there should be."),
    "ready": ("ready_workers", "Workers that take parts."),
    "starting": ("starting_workers", "Workers that have been started and take no parts yet."),
    "busy": ("busy_workers", "Workers that have a part in hand."),
    "queued": ("queued_parts", "Parts that wait for a worker."),
    "worker_hours_today": ("worker_hours_today", "Worker-hours of this UTC day."),
}
_SNAPSHOT = {
    "start_p95": ("start_seconds", "From a worker's start to its first result, 95th percentile."),
    "starting_seconds": ("starting_seconds", "Since their start, of all workers that are starting together."),
    "parts": ("parts", "Parts that wait for a worker or are in the hands of one."),
    "figures_age": ("figures_age_seconds", "Age of the figures that were decided on."),
    "apply_rate": ("apply_rows_per_second", "What apply takes while it is busy."),
    "staged_rate": ("staged_rows_per_second", "What capture and load have brought at most."),
    "apply_waits": ("apply_waits", "Whether apply cannot go on now, 0 or 1."),
    "prepared_parts": ("prepared_parts", "Prepared parts that wait for apply, at least."),
    "raises_without_gain": ("raises_without_gain", "Raises that have brought no more throughput."),
    "busy": ("busy_share", "Share of their time that ready workers were busy."),
}
_LIMITS = {
    "min_workers": ("min_workers", "The least that there may be."),
    "max_workers": ("max_workers", "The most that there may be."),
    "worker_hours_left": ("worker_hours_left", "Of this UTC day's budget."),
    "price": ("worker_hour_price", "Of a worker-hour; 0 where it is not known."),
}
_LOAD = {
    "slo": ("freshness_target_seconds", "From commit to visible."),
    "backlog_rows": ("backlog_rows", "Rows that are staged and not applied."),
    "work_seconds": ("backlog_work_seconds", "What they take one worker."),
    "backlog_bytes": ("backlog_bytes", "Bytes of them in the log."),
    "max_backlog_300s": ("backlog_rows_max", "The greatest backlog in the last 300 s."),
    "oldest_age": ("oldest_age_seconds", "Since the commit of the oldest change that is not applied."),
    "ewma_30s": ("arrival_rows_per_second_30s", "Arrivals, moving average over 30 s."),
    "ewma_300s": ("arrival_rows_per_second_300s", "Arrivals, moving average over 300 s."),
    "max_300s": ("arrival_rows_per_second_max", "The greatest of both averages in the last 300 s."),
    "mu": ("worker_rows_per_second", "Of a worker, its waiting left out."),
    "own_rate": ("own_rows_per_second", "That the main process prepares by itself."),
    "handover_rate": ("handover_rows_per_second", "Of the main process's time for handing over."),
    "busy_cores": ("busy_cores", "Cores that are busy while the main process prepares."),
    "apply_rate": ("model_apply_rows_per_second", "Of it that apply takes."),
    "worth": ("worth_a_worker", "Whether the work is worth a worker, 0 or 1."),
}


def exposition(report: Mapping[str, Any]) -> str:
    """Return the gauges of a report of `Controller.report`."""
    return "".join(f"{line}\n" for line in _lines(report))


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    for key, named in _POOL.items():
        yield from _gauge(*named, [({}, report[key])])
    if (entry := report["decision"]) is None:
        return
    snapshot, decision = entry["snapshot"], entry["decision"]
    why = {"policy": entry["policy"], "code": decision["code"]}
    yield from _gauge("decision", "The decision in force, by policy and reason.", [(why, 1)])
    for key, named in _SNAPSHOT.items():
        yield from _gauge(*named, [({}, snapshot[key])])
    for key, named in _LIMITS.items():
        yield from _gauge(*named, [({}, snapshot["limits"][key])])
    for key, named in _LOAD.items():
        yield from _gauge(*named, [({"model": load["model"]}, load[key]) for load in snapshot["loads"]])


def _gauge(name: str, about: str, samples: list[tuple[dict[str, str], float | None]]) -> Iterator[str]:
    known = [(labels, value) for labels, value in samples if value is not None]
    if not known:
        return
    yield f"# HELP headrace_scale_{name} {about}"
    yield f"# TYPE headrace_scale_{name} gauge"
    for labels, value in known:
        text = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
        yield f"headrace_scale_{name}{f'{{{text}}}' if text else ''} {float(value):.10g}"


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
