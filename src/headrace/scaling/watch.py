"""What people are told of scaling: where workers do not start or help, or are too few for the target.

Each lasts until it is over, and has to hold for a while before anybody is told, as has its end.
"""

from __future__ import annotations

from typing import NamedTuple

from headrace.alarms import resolve, trigger
from headrace.scaling.snapshot import Code, Decision, Snapshot

_HOLDS = 60.0
"""Seconds that something holds before it is told, and is over before that is."""
_GROWTH_OVER = 120.0
"""Seconds over which a backlog is seen to grow."""
_GROWTH = 1.02


class Finding(NamedTuple):
    """Something that holds: a word for it, and what there is to say."""

    subject: str
    words: str


_ENDS = {
    "target": "RESOLVED: the freshness target can be met again.",
    "cap": "RESOLVED: at max_workers the backlog no longer grows.",
    "start": "RESOLVED: there are workers again.",
    "gain": "RESOLVED: workers are no longer held up by what they cannot help.",
    "budget": "RESOLVED: there are worker-hours left again.",
}


class ScalingWatch:
    """Tells of what lasts, once, and of its end."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self._clear: dict[str, float] = {}
        self._told: set[str] = set()
        self._backlogs: list[tuple[float, float]] = []

    def note(self, at: float, snapshot: Snapshot, decision: Decision) -> None:
        """Take in one decision; `at` is of a clock that only rises."""
        found = {finding.subject: finding for finding in self._found(at, snapshot, decision)}
        for subject, finding in found.items():
            self._clear.pop(subject, None)
            if at - self._since.setdefault(subject, at) >= _HOLDS and subject not in self._told:
                self._told.add(subject)
                trigger("scaling", f"scaling.{subject}", "SCALING %s", finding.words)
        for subject in self._since.keys() - found.keys():
            if subject not in self._told:
                del self._since[subject]
            elif at - self._clear.setdefault(subject, at) >= _HOLDS:
                self._told.discard(subject)
                del self._since[subject], self._clear[subject]
                resolve("scaling", f"scaling.{subject}", _ENDS[subject])

    def _found(self, at: float, snapshot: Snapshot, decision: Decision) -> list[Finding]:
        cap = snapshot.limits.max_workers
        backlog = sum(load.work_seconds for load in snapshot.loads)
        self._backlogs = [(when, work) for when, work in self._backlogs if when > at - _GROWTH_OVER]
        oldest = self._backlogs[0] if self._backlogs else (at, backlog)
        self._backlogs.append((at, backlog))
        code, sentence = decision.reason.code, decision.reason.sentence
        found = list[Finding]()
        if not cap:
            return found  # nobody wants workers
        # All of a table, as of a rebuild, has no age: it is made beside what people look at.
        is_late = any(load.oldest_age > load.slo / 2 for load in snapshot.loads)
        if code is Code.SLO_INFEASIBLE and is_late:
            found.append(Finding("target", f"cannot meet the target. {sentence}"))
        if code is Code.BUDGET_SPENT:
            found.append(Finding("budget", f"has spent its budget. {sentence}"))
        if snapshot.desired and not snapshot.ready:
            words = f"has no worker, although there should be {snapshot.desired}: they do not start, or die."
            found.append(Finding("start", words))
        if code is Code.NO_GAIN:
            found.append(Finding("gain", f"does not help. {sentence}"))
        grows = at - oldest[0] >= _GROWTH_OVER / 2 and backlog > max(1.0, oldest[1] * _GROWTH)
        if snapshot.ready >= cap and decision.workers >= cap and grows and is_late:
            words = (
                f"is at its cap of {cap} workers and what waits still grows: {backlog:,.0f} s of work, "
                f"{oldest[1]:,.0f} s {at - oldest[0]:.0f} s before. {sentence}"
            )
            found.append(Finding("cap", words))
        return found
