"""The rules: what holds now, compared with what fires.

What other parts of the pipeline say of themselves (a thread that stopped, a slot at risk) comes as it is
said. What is to be seen in the destination, the logs and on the disks is looked for here, again and again: so
an alert that a killed process could not record is found by the next one.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from headrace.alarms import Severity, resolve, trigger, trigger_issue, trigger_suspended
from headrace.alerts.store import Alert
from headrace.config import Project
from headrace.errors import HeadraceError
from headrace.lane import Lane
from headrace.protocols import Destination
from headrace.sources.postgres.health import age_text, size_text
from headrace.sources.postgres.tables import read_states
from headrace.transform.sql import ModelText

logger = logging.getLogger("headrace.alerts")

SAID = (
    "slot",
    "source_down",
    "waiting",
    "gap",
    "stopped",
    "consumer",
    "anchor",
    "unreadable",
    "mart_circle",
    "ledger",
    "scaling",
)
"""The kinds that a new process says again while they hold."""
GRADES = {"escalating": 2, "regressed": 2}
"""The states of an issue that are news."""
AGAIN_WITHIN = 600.0
"""Seconds after the start within which it does."""

_MODELS = """SELECT m.model, m.source, m.state, m.reason, m."offset", m.open_records, s.suspended_by
FROM headrace.models m LEFT JOIN headrace.suspensions s ON s.model = m.model
WHERE m.state <> 'retired' ORDER BY m.model"""
_ISSUES = """SELECT i.issue, i.source, i.model, i.reason, i.columns, i.message, i.state, q.records
FROM headrace.issues i JOIN (
  SELECT issue, count(*) AS records FROM headrace.quarantine WHERE status = 'quarantined' GROUP BY issue
) q ON q.issue = i.issue
WHERE i.model IN (SELECT model FROM headrace.models WHERE state <> 'retired') ORDER BY i.issue"""
_MARTS = "SELECT mart, reason FROM headrace.marts WHERE state = 'suspended' ORDER BY mart"
_CALM = 1.25
"""A disk is no longer low with so many times what makes it low, so that it does not ring twice."""

Firing = Mapping[tuple[str, str], Alert]


@dataclass(frozen=True, slots=True)
class Holding:
    """Something that holds now, and how it is told: anew, if its `grade` is higher than what fires."""

    kind: str
    subject: str
    tell: Callable[[], None]
    grade: int = 1


class Rules:
    """Looks for what holds in one project. One thread calls `look`."""

    def __init__(self, project: Project, lanes: Mapping[str, Lane], destination: Destination) -> None:
        self._project = project
        self._lanes = lanes
        self._destination = destination
        self._stood: dict[str, tuple[int, float]] = {}
        """Of each model that has something to apply, where it stands and since when it was seen there."""

    def look(self, fired: Iterable[Alert], texts: Mapping[str, ModelText], now: float) -> None:
        """Tell of what holds and does not fire, and of what fires and no longer holds.

        `fired` was read before: what a thread tells of meanwhile is neither told twice nor taken for over.
        """
        firing = {(alert.kind, alert.subject): alert for alert in fired}
        looked = {"disk": list(self._disks(firing))}
        try:
            looked |= self._in_the_destination(texts, now)
        except HeadraceError as error:
            logger.debug("the destination does not say how its models stand: %s", error)
        for kind, holdings in looked.items():
            held = {holding.subject for holding in holdings}
            for holding in holdings:
                known = firing.get((kind, holding.subject))
                if known is None or known.grade < holding.grade:
                    holding.tell()
            for alert in firing.values():
                if alert.kind == kind and alert.subject not in held:
                    _end(alert)

    def forget_unsaid(self, fired: Iterable[Alert], started: float) -> None:
        """End what only a former process has told of."""
        for alert in fired:
            if alert.kind in SAID and alert.said_at < started:
                _end(alert)

    def _in_the_destination(self, texts: Mapping[str, ModelText], now: float) -> dict[str, list[Holding]]:
        if not self._destination.exists():
            return {}
        found, marts = self._destination.read([_MODELS, _MARTS])
        models = found.to_pylist()
        issues: list[dict[str, Any]] = []
        if any(row["open_records"] for row in models):
            (found,) = self._destination.read([_ISSUES])
            issues = found.to_pylist()
        late = [*self._late(models, texts, now)]
        return {
            "issue": [issue_rule(row) for row in issues if row["state"] != "archived"],
            "suspended": [_suspended(row) for row in models if row["state"] == "suspended"],
            "mart": [_suspended_mart(row) for row in marts.to_pylist()],
            "freshness": [holding for holding in late if holding.kind == "freshness"],
            "progress": [holding for holding in late if holding.kind == "progress"],
        }

    def _late(
        self, models: Iterable[Mapping[str, Any]], texts: Mapping[str, ModelText], now: float
    ) -> Iterator[Holding]:
        """Yield what is stale, and what stands still, of the models that have something to apply."""
        stood, self._stood = self._stood, {}
        behind = [row for row in models if row["state"] == "in_sync" and self._is_behind(row)]
        for source in sorted({row["source"] for row in behind}):
            lane = self._lanes[source]
            tables = {table.label: table for table in lane.log.schemas()}
            paused = {table for table, state in read_states(lane.log).items() if state.paused}
            for row in (row for row in behind if row["source"] == source):
                name, offset = row["model"], row["offset"]
                text = texts.get(name)
                table = tables.get(text.table if text else name.removeprefix(f"{source}."))
                commit = lane.log.first_commit(offset, table) if table and table not in paused else None
                if commit is None:
                    continue
                where, since = stood.get(name, (offset, now))
                self._stood[name] = (offset, since if where == offset else now)
                target = text.alerts.freshness if text else None
                age = now - commit / 1e6
                if target is not None and age > target:
                    yield _stale(name, source, age, target)
                if (still := now - self._stood[name][1]) >= self._project.alerts.no_progress:
                    yield _still(name, source, offset, still)

    def _is_behind(self, row: Mapping[str, Any]) -> bool:
        lane = self._lanes.get(row["source"])
        return lane is not None and row["offset"] < lane.log.end().offset

    def _disks(self, firing: Firing) -> Iterator[Holding]:
        project, seen = self._project, set[int]()
        places = {"state": project.state, "staging": project.staging.path}
        if project.destination.url is None:
            places["destination"] = project.destination.path.parent
        for name, path in places.items():
            folder = _existing(path)
            device = folder.stat().st_dev
            if device in seen:
                continue
            seen.add(device)
            low = project.alerts.disk_low * (_CALM if ("disk", name) in firing else 1.0)
            if (free := shutil.disk_usage(folder).free) < low:
                yield _low(name, free, project.alerts.disk_low)


def issue_rule(row: Mapping[str, Any]) -> Holding:
    """Return what holds of an issue with open records: one that escalates, or has come back, is graver."""
    grade = GRADES.get(row["state"], 1)
    facts = (row["issue"], row["source"], row["model"], row["reason"], row["columns"], row["message"])
    return Holding("issue", row["issue"], partial(trigger_issue, *facts, row["records"], grade), grade)


def _suspended(row: Mapping[str, Any]) -> Holding:
    """What a person has suspended explains what else there is of the model, and is no news."""
    name = row["model"]
    severity: Severity | None = "info" if row["suspended_by"] == "hand" else None
    told = partial(trigger_suspended, name, row["source"], row["reason"], severity)
    return Holding("suspended", name, told)


def _suspended_mart(row: Mapping[str, Any]) -> Holding:
    name, words = row["mart"], "SUSPENDED mart %s: %s"
    return Holding("mart", name, partial(trigger, "mart", name, words, name, row["reason"], model=name))


def _stale(model: str, source: str, age: float, target: float) -> Holding:
    words = (
        "STALE model %s: a change that was committed %s ago is not visible yet (freshness %s). "
        "`headrace status` says what waits."
    )
    told = ("freshness", model, words, model, age_text(age), age_text(target))
    return Holding("freshness", model, partial(trigger, *told, source=source, model=model))


def _still(model: str, source: str, offset: int, still: float) -> Holding:
    words = (
        "NO PROGRESS of model %s: it has stood at offset %d for %s, with changes to apply behind it. "
        "`headrace status` says why."
    )
    told = ("progress", model, words, model, offset, age_text(still))
    return Holding("progress", model, partial(trigger, *told, source=source, model=model))


def _low(name: str, free: int, limit: int) -> Holding:
    words = "LOW disk of the %s folder: %s are free (disk_low %s). Make room, or lower [log] keep."
    told = ("disk", name, words, name, size_text(free), size_text(limit))
    return Holding("disk", name, partial(trigger, *told))


def _end(alert: Alert) -> None:
    of = f" of model {alert.model}" if alert.model not in ("", alert.subject) else ""
    about = {"source": alert.source, "model": alert.model}
    resolve(alert.kind, alert.subject, "RESOLVED %s %s%s", alert.kind, alert.subject, of, **about)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
