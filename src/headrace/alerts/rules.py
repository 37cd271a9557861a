"""The rules: what holds now, compared with what fires.

What other parts of the pipeline say of themselves (a thread that stopped, a slot at risk) comes as it is
said. What is to be seen in the destination, the logs and on the disks is looked for here, again and again: so
an alert that a killed process could not record is found by the next one.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.alarms import NEW_CAUSE, resolve, trigger
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
)
"""The kinds that a new process says again while they hold."""
AGAIN_WITHIN = 600.0
"""Seconds after the start within which it does."""

_MODELS = (
    'SELECT model, source, state, reason, "offset", open_records FROM headrace.models '
    "WHERE state <> 'retired' ORDER BY model"
)
_ISSUES = """SELECT issue, min(source) AS source, model, min(reason) AS reason, min(columns) AS columns,
min(message) AS message, count(*) AS records FROM headrace.quarantine
WHERE status = 'quarantined' AND model IN (SELECT model FROM headrace.models WHERE state <> 'retired')
GROUP BY issue, model ORDER BY issue"""
_MARTS = "SELECT mart, reason FROM headrace.marts WHERE state = 'suspended' ORDER BY mart"
_CALM = 1.25
"""A disk is no longer low with so many times what makes it low, so that it does not ring twice."""

Firing = Mapping[tuple[str, str], Alert]


@dataclass(frozen=True, slots=True)
class Holding:
    """Something that holds now, with the line that tells of it, and the one that tells when it is over."""

    kind: str
    subject: str
    words: str
    values: tuple[object, ...]
    source: str = ""
    model: str = ""
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
            for holding in holdings:
                known = firing.get((kind, holding.subject))
                if known is None or known.grade < holding.grade:
                    _tell(holding)
            held = {holding.subject for holding in holdings}
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
            "issue": [_issue(row) for row in issues],
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
                words = (
                    "LOW disk of the %s folder: %s are free (disk_low %s). Make room, or lower [log] keep."
                )
                yield Holding(
                    "disk", name, words, (name, size_text(free), size_text(project.alerts.disk_low))
                )


def _tell(holding: Holding) -> None:
    trigger(
        holding.kind, holding.subject, holding.words, *holding.values,
        source=holding.source, model=holding.model, grade=holding.grade,
    )  # fmt: skip


def _end(alert: Alert) -> None:
    resolve(alert.kind, alert.subject, "RESOLVED %s %s", alert.kind, alert.subject, source=alert.source)


def _issue(row: Mapping[str, Any]) -> Holding:
    named = (row["issue"], row["model"], row["reason"], row["columns"], row["message"], row["records"])
    return Holding("issue", row["issue"], NEW_CAUSE, (*named, row["issue"]), row["source"], row["model"])


def _suspended(row: Mapping[str, Any]) -> Holding:
    values = (row["model"], row["reason"])
    return Holding("suspended", row["model"], "SUSPENDED model %s: %s", values, row["source"], row["model"])


def _suspended_mart(row: Mapping[str, Any]) -> Holding:
    name = row["mart"]
    return Holding("mart", name, "SUSPENDED mart %s: %s", (name, row["reason"]), model=name)


def _stale(model: str, source: str, age: float, target: float) -> Holding:
    words = (
        "STALE model %s: a change that was committed %s ago is not visible yet (freshness %s). "
        "`headrace status` says what waits."
    )
    return Holding("freshness", model, words, (model, age_text(age), age_text(target)), source, model)


def _still(model: str, source: str, offset: int, still: float) -> Holding:
    words = (
        "NO PROGRESS of model %s: it has stood at offset %d for %s, with changes to apply behind it. "
        "`headrace status` says why."
    )
    return Holding("progress", model, words, (model, offset, age_text(still)), source, model)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
