"""The alerts of a running pipeline: recorded as they are told of, looked for, grouped, and delivered.

Who tells of something (see `headrace.alarms`) has it on disk when the call returns. One thread repeats
`step`, and one for each channel `deliver`, so that a receiver that hangs keeps nobody else waiting.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from headrace.alarms import SEVERITIES, Alarm, Severity, alarm_of
from headrace.alerts.details import Details, commands, issue_details
from headrace.alerts.grouping import Known, Notice, is_for, muted, notice_due, severity_of
from headrace.alerts.message import Undelivered, time_text
from headrace.alerts.rules import AGAIN_WITHIN, Rules
from headrace.alerts.sending import message_of, pause, send
from headrace.alerts.store import FILE, Alert, AlertStore
from headrace.channels import DEFAULT, AlertSettings, Channel
from headrace.config import Project
from headrace.errors import HeadraceError
from headrace.failpoints import failpoint
from headrace.lane import Lane
from headrace.secret import without_passwords
from headrace.transform.sql import ModelText

logger = logging.getLogger("headrace.alerts")

_TICK = 1.0
_LOOK_EVERY = 10.0
_LOOK_SHARE = 20.0
"""Looking takes at most one part in so many of the time: it is put off where the quarantine is large."""
_PRUNE_EVERY = 3_600.0
_KEEP = 30 * 86_400.0
_LAST_CHANCE = 15.0  # seconds for which the end of a run waits for the channels
_MAX_UNRECORDED = 1_000
_MAX_DETAILED = 20


def origin_of(project: Project) -> str:
    """Return what names a project in what is sent: its folder's name, and its environment."""
    return "/".join(["/headrace", project.root.name, *([project.env] if project.env else [])])


def example_body(now: float) -> dict[str, Any]:
    """Return the data of a test."""
    alert = Alert(
        "test", "notice", "test", "", "", "info", 1, "This is a test of the channel.", False, now, now, now
    )
    described = _described(alert, "firing", None, DEFAULT, {})
    one = {"status": "firing", "severity": "info", "firing": 1, "resolved": 0}
    return {"group": "test", **one, "alerts": [described]}


class _Recorder(logging.Handler):
    """Records every line of the logger headrace.alert, before its caller goes on."""

    def __init__(self, store: AlertStore) -> None:
        super().__init__(logging.WARNING)
        self._store = store
        self._unrecorded = deque[tuple[Alarm, str, float]](maxlen=_MAX_UNRECORDED)

    def emit(self, record: logging.LogRecord) -> None:
        """Record a line; one that cannot be recorded now is kept for `retry`."""
        failpoint("alerts.record")
        words = without_passwords(" ".join(record.getMessage().split()))
        self._unrecorded.append((alarm_of(record), words, record.created))
        self.retry()

    def retry(self) -> None:
        """Record what could not be recorded yet, in its order."""
        with self.lock or threading.RLock():
            while self._unrecorded:
                try:
                    self._store.record(*self._unrecorded[0])
                except Exception as error:  # the caller has something else to do
                    logger.warning("%d alerts are not recorded yet: %s", len(self._unrecorded), error)
                    return
                self._unrecorded.popleft()


class Alerting:
    """Alerts of one project while its pipeline runs in this process."""

    def __init__(self, project: Project, lanes: Sequence[Lane]) -> None:
        """Begin to record."""
        self.channels = project.alerts.channels
        self._project = project
        self._lanes = {lane.config.name: lane for lane in lanes}
        self._folder = lanes[0].folder
        self._store = AlertStore(project.state / FILE)
        self._rules = Rules(project, self._lanes, lanes[0].destination)
        self._started: float | None = time.time()
        self._look_at = self._prune_at = 0.0
        self._failing: set[str] = set()
        self._recorder = _Recorder(self._store)
        logging.getLogger("headrace.alert").addHandler(self._recorder)

    def step(self, stop: threading.Event) -> None:
        """Look for what holds when it is time, and write what is to be sent; then pause."""
        now = time.time()
        self._recorder.retry()
        if now >= self._look_at:
            self._look(now)
            self._look_at = now + max(_LOOK_EVERY, _LOOK_SHARE * (time.time() - now))
        if now >= self._prune_at:
            self._store.forget_channels(channel.name for channel in self.channels)
            self._store.prune(now - _KEEP)
            self._prune_at = now + _PRUNE_EVERY
        self.plan(now)
        stop.wait(_TICK)

    def deliver(self, channel: Channel, stop: threading.Event | None = None) -> bool:
        """Send a channel what is due, once; returns whether it has taken it. Pauses where nothing is due."""
        delivery = self._store.due(channel.name, time.time())
        if delivery is None:
            if stop is not None:
                stop.wait(_TICK / 2)
            return False
        try:
            send(channel, message_of(delivery, origin_of(self._project)))
        except Undelivered as error:
            wait = pause(delivery.attempts + 1, error.retry_after)
            self._store.failed(delivery, str(error), time.time() + wait)
            if channel.name not in self._failing:
                logger.warning("alert channel %s fails: %s. It is tried again.", channel.name, error)
            self._failing.add(channel.name)
            return False
        failpoint("alerts.sent")
        self._store.delivered(delivery, time.time())
        if channel.name in self._failing:
            self._failing.remove(channel.name)
            logger.info("alert channel %s works again", channel.name)
        return True

    def finish(self) -> None:
        """Look once more and give each channel one chance, without waiting for what may come besides."""
        try:
            self._look(time.time())
            self.plan(time.time(), waits=False)
        except HeadraceError as error:
            logger.warning("what there was to alert of at the end is not sent: %s", error)
        threads = [
            threading.Thread(target=self._empty, args=(channel,), daemon=True) for channel in self.channels
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + _LAST_CHANCE
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Record nothing any more."""
        logging.getLogger("headrace.alert").removeHandler(self._recorder)
        self._recorder.close()
        self._store.close()

    def plan(self, now: float, *, waits: bool = True) -> None:
        """Write what each channel is to be told now. Raises what the store raises."""
        firing, silences = self._store.firing(), self._store.silences(now)
        settings = self._settings()
        names = [channel.name for channel in self.channels]
        for channel in self.channels:
            known = [
                (alert, told)
                for alert, told in self._store.untold(channel.name, now)
                if is_for(channel, alert, settings, names)
                and (is_over(alert) or not muted(alert, firing, silences))
            ]
            if not known:
                continue
            standings = self._store.standings(channel.name)
            for group, members in _grouped(known):
                standing = standings.get(group)
                notice = notice_due(group, members, standing, self._project.alerts, now, waits=waits)
                if notice is not None:
                    body = json.dumps(self._body(notice, settings), ensure_ascii=False)
                    self._store.enqueue(channel.name, group, body, notice.told(), now)

    def _empty(self, channel: Channel) -> None:
        while self.deliver(channel):
            pass

    def _look(self, now: float) -> None:
        try:
            fired = self._store.firing()
            self._rules.look(fired, self._texts(), now)
            if self._started is not None and now > self._started + AGAIN_WITHIN:
                self._rules.forget_unsaid(fired, self._started)
                self._started = None
        except HeadraceError:
            raise
        except Exception:
            logger.exception("the rules of alerts met what they do not understand")

    def _texts(self) -> dict[str, ModelText]:
        return {text.name: text for text in self._folder.current()}

    def _settings(self) -> dict[str, AlertSettings]:
        """Return what models and marts say of their alerts."""
        models = {text.name: text.alerts for text in self._folder.current()}
        return models | {mart.name: mart.alerts for mart in self._folder.marts()}

    def _body(self, notice: Notice, settings: Mapping[str, AlertSettings]) -> dict[str, Any]:
        texts = self._texts()
        listed = [
            *((alert, "firing") for alert in notice.firing),
            *((alert, "resolved") for alert in notice.over),
        ]
        details = self._details([alert for alert, _ in listed[:_MAX_DETAILED]], texts)
        alerts = [
            _described(
                alert, state, texts.get(alert.model), settings.get(alert.model, DEFAULT),
                details.get(alert.id, {}),
            )
            for alert, state in listed
        ]  # fmt: skip
        grave: list[Severity] = [alert["severity"] for alert in alerts]
        return {
            "group": notice.group,
            "status": "firing" if notice.firing else "resolved",
            "severity": max(grave, key=SEVERITIES.index),
            "firing": len(notice.firing),
            "resolved": len(notice.over),
            "alerts": alerts,
        }

    def _details(self, alerts: Sequence[Alert], texts: Mapping[str, ModelText]) -> dict[str, Details]:
        """Return what is known of issues besides, by the alert's id; the alert goes out without it too."""
        issues = {alert.subject: alert.id for alert in alerts if alert.kind == "issue"}
        if not issues:
            return {}
        try:
            found = issue_details([*issues], self._lanes, texts, self._project)
        except HeadraceError as error:
            logger.debug("the destination does not say more of an issue: %s", error)
            return {}
        return {issues[issue]: details for issue, details in found.items()}


def is_over(alert: Alert) -> bool:
    """Whether an alert lasted, and is over: that is told also while new ones are muted."""
    return alert.lasts and not alert.fires


def _grouped(known: Known) -> list[tuple[str, Known]]:
    def of(pair: Any) -> str:
        group: str = pair[0].group
        return group

    return [(group, [*members]) for group, members in groupby(sorted(known, key=of), of)]


def _summary(alert: Alert, details: Details) -> str:
    """Return the line that told of an alert; of an issue what is the case now."""
    if not details:
        return alert.words
    count = details["quarantined"]
    cause = " ".join(str(details[name]) for name in ("reason", "columns") if details[name])
    return f"{cause}: {details['message']} ({count} open record{'s' * (count != 1)})"


def _described(
    alert: Alert, state: str, text: ModelText | None, settings: AlertSettings, details: Details
) -> dict[str, Any]:
    return {
        "dedup_id": alert.id,
        "status": state,
        "kind": alert.kind,
        "subject": alert.subject,
        "source": alert.source,
        "model": alert.model,
        "severity": severity_of(alert, settings),
        "owner": settings.owner,
        "summary": _summary(alert, details),
        "began_at": time_text(alert.began_at),
        "ended_at": None if alert.fires else time_text(alert.ended_at or alert.began_at),
        "details": details,
        "commands": commands(alert, text, details.get("reason", "")),
    }
