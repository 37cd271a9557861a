"""The watch over a source: what endangers its disk or our slot is said before it is too late.

What a reading means is decided by `judge`, which is pure; `Watch` asks the server and logs, once when an
episode begins and once when it is over. It stops nothing and outlives every outage.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from headrace.alarms import resolve, trigger
from headrace.config import SourceConfig
from headrace.errors import HeadraceError
from headrace.keys import literal
from headrace.sources.postgres.health import Holder, Probe, SlotHealth, age_text, size_text

logger = logging.getLogger("headrace.watch")

EVERY = 10.0
"""Seconds between two readings."""

_CALM = 0.8
"""An alarm for a limit is over below this part of it, so that a value near the limit does not ring twice."""
_SAFE, _SAFE_AGAIN = 0.20, 0.25
_SEGMENT = 16 << 20  # WAL is kept in segments: less than one, however old, is nothing
_GRADES = {"extended": 1, "unreserved": 2, "lost": 3}


@dataclass(frozen=True, slots=True)
class Limits:
    """When to ring. `lag` in bytes, the others in seconds."""

    lag: int
    restart_age: float
    stalled: float = 300.0
    unread: float = 60.0


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something to look at: `what` with figures, and `remedy`. A higher `grade` of one kind rings again."""

    kind: str
    what: str
    remedy: str
    grade: int = 1


@dataclass(frozen=True, slots=True)
class Watched:
    """What the readings so far amount to; times in seconds, and only while the slot ought to be read.

    `lag_then` is the lag at the first reading of the position at which `confirmed` stands still.
    """

    alarms: Mapping[str, Alarm] = field(default_factory=dict)
    expected: bool = False
    confirmed: str | None = None
    lag_then: int = 0
    still: float = 0.0
    unread: float = 0.0
    restart: str | None = None
    restart_still: float = 0.0

    def after(self, health: SlotHealth, seconds: float, *, expected: bool) -> Watched:
        """Return what a further reading makes of it, `seconds` after the one before; `expected` says
        whether the slot ought to have been read in between."""
        counted = seconds if expected else 0.0
        moved = not expected or health.confirmed_flush_lsn != self.confirmed
        stands = health.restart_lsn == self.restart
        return replace(
            self,
            expected=expected,
            confirmed=health.confirmed_flush_lsn,
            lag_then=health.lag_bytes or 0 if moved else self.lag_then,
            still=0.0 if moved else self.still + counted,
            unread=0.0 if health.active or not expected else self.unread + counted,
            restart=health.restart_lsn,
            restart_still=self.restart_still + seconds if stands else 0.0,
        )


def judge(health: SlotHealth, limits: Limits, watched: Watched) -> list[Alarm]:
    """Return the alarms that hold at a reading, of which `watched.after` has been told already."""
    if not health.exists:
        return [_gone()] if watched.expected else []
    found = (
        _lag(health, limits, watched),
        _room(health, watched),
        _status(health),
        _restart(health, limits, watched),
        _unread(limits, watched),
        _stalled(health, limits, watched),
    )
    return [alarm for alarm in found if alarm is not None]


def _gone() -> Alarm:
    return Alarm(
        "gone",
        "the slot is gone",
        "What it kept is lost: `headrace run` says what to do. Let nothing else drop it.",
    )


def _lag(health: SlotHealth, limits: Limits, watched: Watched) -> Alarm | None:
    limit = limits.lag
    if health.wal_keep_size is not None:
        limit = min(limit, health.wal_keep_size // 2)
    lag = health.lag_bytes or 0
    if lag <= (limit * _CALM if "lag" in watched.alarms else limit):
        return None
    kept = "the server sets no limit to what it keeps"
    if health.wal_keep_size is not None:
        kept = f"the server keeps {size_text(health.wal_keep_size)} at most"
    return Alarm(
        "lag",
        f"{size_text(lag)} of WAL are not captured yet (lag_alarm {size_text(limit)}); {kept}",
        "See in `headrace status` whether capture stands still, and how fast it goes; give the source's disk "
        "room until it has caught up.",
    )


def _room(health: SlotHealth, watched: Watched) -> Alarm | None:
    if health.safe_wal_size is None or not health.wal_keep_size or health.wal_status == "lost":
        return None
    left = max(health.safe_wal_size, 0) / health.wal_keep_size
    if left >= (_SAFE_AGAIN if "room" in watched.alarms else _SAFE):
        return None
    return Alarm(
        "room",
        f"after {size_text(max(health.safe_wal_size, 0))} more of WAL the server may throw away what the "
        f"slot needs (max_slot_wal_keep_size {size_text(health.wal_keep_size)})",
        _more_room(health),
    )


def _status(health: SlotHealth) -> Alarm | None:
    words = {
        "extended": "the server keeps more WAL for the slot than max_wal_size",
        "unreserved": "the slot is past max_slot_wal_keep_size: the next checkpoint may lose it",
        "lost": "the slot is lost: the server has thrown away WAL that it needed",
    }
    status = health.wal_status or ""
    if status not in words:
        return None
    remedy = "Look at the disk of the source, and at what holds capture up: `headrace status`."
    if status == "unreserved":
        remedy = _more_room(health)
    elif status == "lost":
        remedy = "`headrace run` says how to begin anew. Give max_slot_wal_keep_size more room."
    figures = (
        f"{size_text(health.retained_bytes)} are kept for it, {size_text(health.lag_bytes)} not captured"
    )
    return Alarm("wal_status", f"{words[status]} (wal_status {status}; {figures})", remedy, _GRADES[status])


def _more_room(health: SlotHealth) -> str:
    gigabytes = max(2 * (health.wal_keep_size or 0) >> 30, 1)
    return (
        f"Give it more, if the disk can: ALTER SYSTEM SET max_slot_wal_keep_size = '{gigabytes}GB'; "
        "SELECT pg_reload_conf(); and see in `headrace status` what holds capture up."
    )


def _restart(health: SlotHealth, limits: Limits, watched: Watched) -> Alarm | None:
    age = watched.restart_still if health.restart_age_s is None else health.restart_age_s
    limit = limits.restart_age * (_CALM if "restart" in watched.alarms else 1)
    if age <= limit or (health.retained_bytes or 0) < _SEGMENT:
        return None
    what = (
        f"the server keeps WAL from {age_text(age)} ago on, {size_text(health.retained_bytes)} "
        f"(restart_age_alarm {age_text(limits.restart_age)})"
    )
    if 2 * (health.lag_bytes or 0) > (health.retained_bytes or 0):
        remedy = "Most of it is not captured yet: see in `headrace status` what holds capture up."
        return Alarm("restart", what, remedy)
    if health.holder is None:
        return Alarm(
            "restart", f"{what}; no transaction is open now", "Nothing, if it soon goes on by itself."
        )
    return Alarm("restart", f"{what}; {health.holder}", _release(health.holder))


def _release(holder: Holder) -> str:
    if holder.kind == "transaction":
        return f"End it in its application, or: SELECT pg_terminate_backend({holder.id});"
    gid = literal(holder.id)
    return f"Let its coordinator decide, or: ROLLBACK PREPARED {gid}; or COMMIT PREPARED {gid};"


def _unread(limits: Limits, watched: Watched) -> Alarm | None:
    if watched.unread < limits.unread:
        return None
    return Alarm(
        "unread",
        f"nobody has read the slot for {age_text(watched.unread)}, and the server keeps WAL for it",
        "See in `headrace status` why capture waits or has stopped.",
    )


def _stalled(health: SlotHealth, limits: Limits, watched: Watched) -> Alarm | None:
    lag = health.lag_bytes or 0
    if not health.active or watched.still < limits.stalled or lag <= watched.lag_then:
        return None
    return Alarm(
        "stalled",
        f"the slot has stood at {health.confirmed_flush_lsn} for {age_text(watched.still)} while what waits "
        f"grew from {size_text(watched.lag_then)} to {size_text(lag)}",
        "A very large transaction may be on its way; else see in `headrace status` what capture waits for, "
        "and whether the disk of the state folder keeps up.",
    )


class Watch:
    """Reads how a source's slot fares, and raises and resolves alarms on the logger headrace.alert."""

    def __init__(self, config: SourceConfig, expected: Callable[[], bool], every: float = EVERY) -> None:
        """`expected` tells whether the slot ought to be read now; `every` is in seconds."""
        self._config = config
        self._expected = expected
        self._every = every
        self._limits = Limits(config.lag_alarm, config.restart_age_alarm)
        self._probe = Probe(config.url.reveal(), config.slot)
        self._watched = Watched()

    def run(self, stop: threading.Event) -> None:
        """Watch until `stop` is set."""
        try:
            while not stop.is_set():
                self.step(self._every)
                stop.wait(self._every)
        finally:
            self.close()

    def close(self) -> None:
        """Give the connection back."""
        self._probe.close()

    def step(self, seconds: float) -> None:
        """Take a reading, `seconds` after the one before; a source that does not answer is no news here."""
        try:
            health = self._probe.read()
            watched = self._watched.after(health, seconds, expected=self._expected())
            alarms = {alarm.kind: alarm for alarm in judge(health, self._limits, watched)}
        except HeadraceError as error:
            logger.debug("%s is not watched now: %s", self._config.name, error)
        except Exception:
            logger.exception("the watch over %s met what it does not understand", self._config.name)
        else:
            self._announce(watched.alarms, alarms)
            self._watched = replace(watched, alarms=alarms)

    def alarms(self) -> list[str]:
        """Return the alarms that hold now, a paragraph each."""
        return [f"{alarm.what}. {alarm.remedy}" for alarm in self._watched.alarms.values()]

    def _announce(self, before: Mapping[str, Alarm], now: Mapping[str, Alarm]) -> None:
        name, slot = self._config.name, self._config.slot
        for kind, alarm in now.items():
            if kind not in before or before[kind].grade < alarm.grade:
                words = "ALARM %s.%s: slot %s: %s. %s"
                given = (name, kind, slot, alarm.what, alarm.remedy)
                trigger("slot", f"{name}.{kind}", words, *given, source=name, grade=alarm.grade)
        for kind, alarm in before.items():
            if kind not in now:
                words = "RESOLVED %s.%s: slot %s; it was: %s"
                resolve("slot", f"{name}.{kind}", words, name, kind, slot, alarm.what, source=name)
