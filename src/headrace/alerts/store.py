"""The alerts of a project in a file of its state folder: what fires, who was told, what is still to be sent.

A notification is written here, in one transaction with the note of whom it tells of what, before it is sent
the first time: whatever is killed, it is sent again under the same id until its receiver has taken it. Times
are seconds since 1970 in UTC.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.alarms import Alarm, Severity
from headrace.errors import LogBusy
from headrace.log.database import Database

FILE = "alerts.db"
"""Its name in the state folder."""

_FORMAT = 1
_SCRIPT = """
CREATE TABLE IF NOT EXISTS alerts (
  id TEXT PRIMARY KEY, kind TEXT NOT NULL, subject TEXT NOT NULL, source TEXT NOT NULL, model TEXT NOT NULL,
  severity TEXT NOT NULL, grade INTEGER NOT NULL, words TEXT NOT NULL, lasts INTEGER NOT NULL,
  began_at REAL NOT NULL, said_at REAL NOT NULL, ended_at REAL
) WITHOUT ROWID;
CREATE UNIQUE INDEX IF NOT EXISTS firing ON alerts (kind, subject) WHERE ended_at IS NULL;
CREATE TABLE IF NOT EXISTS told (
  channel TEXT NOT NULL, alert TEXT NOT NULL, grade INTEGER NOT NULL, is_over INTEGER NOT NULL,
  PRIMARY KEY (channel, alert)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS deliveries (
  id TEXT PRIMARY KEY, channel TEXT NOT NULL, "group" TEXT NOT NULL, body TEXT NOT NULL,
  made_at REAL NOT NULL, attempts INTEGER NOT NULL, due_at REAL NOT NULL, failure TEXT NOT NULL, done_at REAL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_channel ON deliveries (channel, "group");
CREATE TABLE IF NOT EXISTS silences (
  subject TEXT PRIMARY KEY, until REAL NOT NULL, reason TEXT NOT NULL, made_at REAL NOT NULL
) WITHOUT ROWID;
"""
_COLUMNS = "id, kind, subject, source, model, severity, grade, words, lasts, began_at, said_at, ended_at"
_DELIVERY = 'id, channel, "group", body, made_at, attempts, due_at, failure, done_at'
_MAX_WORDS = 4096
_CREATE_TRIES = 50  # a pipeline and a command may make the file at once
_ONCE_AGAIN = 4 * 3600.0
"""Seconds in which what does not last is told once, however often it is said."""
_LATE = 86_400.0
"""Seconds for which a channel that is new is told of what does not last."""


@dataclass(frozen=True, slots=True)
class Alert:
    """Something that people are to be told of, from `began_at` to `ended_at`, None while it fires.

    `id` is the same in everything that is sent about it. What does not last has ended when it began.
    """

    id: str
    kind: str
    subject: str
    source: str
    model: str
    severity: Severity
    grade: int
    words: str
    lasts: bool
    began_at: float
    said_at: float
    ended_at: float | None = None

    @property
    def group(self) -> str:
        """What it is told together with."""
        return self.model or self.source or "pipeline"

    @property
    def fires(self) -> bool:
        """Whether it is not over."""
        return self.ended_at is None


@dataclass(frozen=True, slots=True)
class Told:
    """What a channel has been told of an alert: the grade, and whether it is over."""

    grade: int
    is_over: bool


@dataclass(frozen=True, slots=True)
class Delivery:
    """A notification for one channel; `failure` says why the last attempt failed, '' if none did."""

    id: str
    channel: str
    group: str
    body: str
    made_at: float
    attempts: int
    due_at: float
    failure: str
    done_at: float | None


@dataclass(frozen=True, slots=True)
class Silence:
    """A model or an issue of which nobody is told until a time."""

    subject: str
    until: float
    reason: str
    made_at: float


@dataclass(frozen=True, slots=True)
class Standing:
    """How a channel stands with a group: when it was last told, and whether that is still to be sent."""

    told_at: float
    is_outstanding: bool


class AlertStore:
    """The file `alerts.db`, for any number of threads and processes; made with the first alert.

    Its methods raise LogError, LogFull while there is no room.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._opened: Database | None = None
        self._opening = threading.Lock()

    def record(self, alarm: Alarm, words: str, now: float) -> None:
        """Take up an alarm: it begins to fire, goes on firing with other words, or is over."""
        if alarm.is_over:
            self.end(alarm.kind, alarm.subject, now)
            return
        words, db = words[:_MAX_WORDS], self._made()
        with db.transaction():
            again = "ended_at IS NULL" if alarm.lasts else "said_at > ?"
            known = db.row(
                f"SELECT id FROM alerts WHERE kind = ? AND subject = ? AND {again}",
                (alarm.kind, alarm.subject, *([] if alarm.lasts else [now - _ONCE_AGAIN])),
            )
            if known:
                sql = "UPDATE alerts SET words = ?, severity = ?, grade = ?, said_at = ? WHERE id = ?"
                db.rows(sql, (words, alarm.severity, alarm.grade, now, known[0]))
                return
            ended = None if alarm.lasts else now
            about = (alarm.kind, alarm.subject, alarm.source, alarm.model, alarm.severity, alarm.grade)
            db.rows(
                f"INSERT INTO alerts ({_COLUMNS}) VALUES ({', '.join('?' * 12)})",
                (str(uuid.uuid4()), *about, words, int(alarm.lasts), now, now, ended),
            )

    def end(self, kind: str, subject: str, now: float) -> None:
        """Note that what fires is over."""
        sql = "UPDATE alerts SET ended_at = ? WHERE kind = ? AND subject = ? AND ended_at IS NULL"
        self._made().rows(sql, (now, kind, subject))

    def firing(self) -> list[Alert]:
        """Return what fires, the oldest first."""
        return self._alerts("WHERE ended_at IS NULL ORDER BY began_at")

    def recent(self, limit: int) -> list[Alert]:
        """Return the newest alerts, those that fire first."""
        return self._alerts("ORDER BY ended_at IS NOT NULL, began_at DESC LIMIT ?", (limit,))

    def knows(self, subject: str) -> bool:
        """Whether there is, or was, an alert of this subject or model."""
        return bool(self._alerts("WHERE ? IN (subject, model) LIMIT 1", (subject,)))

    def untold(self, channel: str, now: float) -> list[tuple[Alert, Told | None]]:
        """Return what fires, and what is over and a channel does not know, with what it does know."""
        if not self.exists():
            return []
        rows = self._made().rows(
            f"SELECT {_COLUMNS}, t.known, t.is_over FROM alerts LEFT JOIN "
            "(SELECT alert, grade AS known, is_over FROM told WHERE channel = ?) AS t ON t.alert = id "
            "WHERE ended_at IS NULL OR t.is_over = 0 OR (NOT lasts AND t.alert IS NULL AND began_at > ?) "
            "ORDER BY began_at",
            (channel, now - _LATE),
        )
        return [(_alert(row[:-2]), None if row[-1] is None else Told(row[-2], bool(row[-1]))) for row in rows]

    def standings(self, channel: str) -> dict[str, Standing]:
        """Return how a channel stands with each group that it was told of."""
        if not self.exists():
            return {}
        rows = self._made().rows(
            'SELECT "group", max(made_at), max(done_at IS NULL) FROM deliveries WHERE channel = ? '
            'GROUP BY "group"',
            (channel,),
        )
        return {group: Standing(at, bool(outstanding)) for group, at, outstanding in rows}

    def enqueue(self, channel: str, group: str, body: str, told: Mapping[str, Told], now: float) -> str:
        """Write a notification to be sent, and what it tells a channel of each alert; returns its id."""
        id_, db = str(uuid.uuid4()), self._made()
        with db.transaction():
            db.rows(
                f"INSERT INTO deliveries ({_DELIVERY}) VALUES (?, ?, ?, ?, ?, 0, ?, '', NULL)",
                (id_, channel, group, body, now, now),
            )
            for alert, what in told.items():
                values = (channel, alert, what.grade, int(what.is_over))
                db.rows("INSERT OR REPLACE INTO told VALUES (?, ?, ?, ?)", values)
        return id_

    def due(self, channel: str, now: float) -> Delivery | None:
        """Return the notification that a channel is to be sent next, if its time has come."""
        found = self._deliveries(
            "WHERE channel = ? AND done_at IS NULL AND due_at <= ? ORDER BY due_at LIMIT 1", (channel, now)
        )
        return found[0] if found else None

    def delivered(self, delivery: Delivery, now: float) -> None:
        """Note that a receiver has taken a notification."""
        sql = "UPDATE deliveries SET attempts = attempts + 1, failure = '', done_at = ? WHERE id = ?"
        self._made().rows(sql, (now, delivery.id))

    def failed(self, delivery: Delivery, failure: str, due_at: float) -> None:
        """Note why an attempt failed, and when the next one is due."""
        sql = "UPDATE deliveries SET attempts = attempts + 1, failure = ?, due_at = ? WHERE id = ?"
        self._made().rows(sql, (failure, due_at, delivery.id))

    def failing(self) -> list[Delivery]:
        """Return, of each channel that fails, the notification that has waited longest."""
        waiting = self._deliveries("WHERE done_at IS NULL AND failure <> '' ORDER BY made_at DESC")
        return [*{delivery.channel: delivery for delivery in waiting}.values()]

    def deliveries(self, limit: int) -> list[Delivery]:
        """Return the newest notifications, those still to be sent first."""
        return self._deliveries("ORDER BY done_at IS NOT NULL, made_at DESC LIMIT ?", (limit,))

    def forget_channels(self, known: Iterable[str]) -> int:
        """Give up what is to be sent to channels that are no longer known; returns how many notifications."""
        if not self.exists():
            return 0
        names = list(known)
        marks = ", ".join("?" * len(names))
        sql = f"DELETE FROM deliveries WHERE done_at IS NULL AND channel NOT IN ({marks}) RETURNING id"
        return len(self._made().rows(sql, names))

    def silence(self, subject: str, until: float, reason: str, now: float) -> None:
        """Have nobody told of a model or an issue until a time; a time that is past ends the silence."""
        db = self._made()
        with db.transaction():
            db.rows("DELETE FROM silences WHERE subject = ? OR until <= ?", (subject, now))
            if until > now:
                db.rows("INSERT INTO silences VALUES (?, ?, ?, ?)", (subject, until, reason, now))

    def silences(self, now: float) -> list[Silence]:
        """Return the silences in force."""
        if not self.exists():
            return []
        sql = "SELECT subject, until, reason, made_at FROM silences WHERE until > ? ORDER BY subject"
        return [Silence(*row) for row in self._made().rows(sql, (now,))]

    def prune(self, before: float) -> None:
        """Forget what was over, and delivered, before a time."""
        if not self.exists():
            return
        db = self._made()
        with db.transaction():
            db.rows("DELETE FROM deliveries WHERE done_at < ?", (before,))
            db.rows("DELETE FROM alerts WHERE ended_at < ?", (before,))
            db.rows("DELETE FROM told WHERE alert NOT IN (SELECT id FROM alerts)")

    def exists(self) -> bool:
        """Whether there ever was an alert."""
        return self._opened is not None or self._path.exists()

    def close(self) -> None:
        """Close the file."""
        with self._opening:
            if self._opened is not None:
                self._opened.close()
                self._opened = None

    def _alerts(self, rest: str, values: Sequence[object] = ()) -> list[Alert]:
        if not self.exists():
            return []
        return [_alert(row) for row in self._made().rows(f"SELECT {_COLUMNS} FROM alerts {rest}", values)]

    def _deliveries(self, rest: str, values: Sequence[object] = ()) -> list[Delivery]:
        if not self.exists():
            return []
        return [
            Delivery(*row) for row in self._made().rows(f"SELECT {_DELIVERY} FROM deliveries {rest}", values)
        ]

    def _made(self) -> Database:
        with self._opening:
            if self._opened is None:
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._opened = _made(self._path)
            return self._opened


def _made(path: Path) -> Database:
    for left in reversed(range(_CREATE_TRIES)):
        try:
            return Database(path, script=_SCRIPT, version=_FORMAT)
        except LogBusy:
            if not left:
                raise
            time.sleep(0.02)
    raise AssertionError


def _alert(row: Sequence[Any]) -> Alert:
    id_, kind, subject, source, model, severity, grade, words, lasts, *times = row
    return Alert(id_, kind, subject, source, model, severity, grade, words, bool(lasts), *times)
