"""What people are to be told of: said once, as a line on the logger `headrace.alert` that carries an Alarm.

The line is for whoever reads the log; the alarm is what a running pipeline keeps and delivers (see
`headrace.alerts`). A line on that logger without an alarm is delivered as well, as a notice.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Severity = Literal["info", "warning", "error", "critical"]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "error", "critical")
"""From the least to the greatest."""

_logger = logging.getLogger("headrace.alert")
_EXTRA = "alarm"


class Kind(NamedTuple):
    """How grave a kind of alarm is by itself, and whether it lasts until it is resolved, or is told once."""

    severity: Severity
    lasts: bool = True


KINDS: Mapping[str, Kind] = {
    "issue": Kind("warning"),
    "suspended": Kind("error"),
    "unreadable": Kind("error"),
    "freshness": Kind("error"),
    "progress": Kind("error"),
    "ledger": Kind("critical"),
    "mart": Kind("error"),
    "mart_circle": Kind("error"),
    "slot": Kind("error"),
    "source_down": Kind("error"),
    "waiting": Kind("error"),
    "gap": Kind("critical"),
    "stopped": Kind("critical"),
    "disk": Kind("error"),
    "scaling": Kind("warning"),
    "consumer": Kind("warning"),
    "consumer_lost": Kind("error", lasts=False),
    "anchor": Kind("warning"),
    "copy": Kind("error", lasts=False),
    "undecodable": Kind("error", lasts=False),
    "notice": Kind("info", lasts=False),
}
"""Every kind. The subject of an `issue` is its id; of `suspended`, `unreadable`, `freshness` and `ledger` the
model; of `progress` the model; of `slot` source and what is wrong, `shop.lag`; of `source_down`, `waiting`,
`gap` and `stopped` the thread, `shop.capture`; of `disk` the folder; of `scaling` what is wrong,
`scaling.target`, `scaling.cap`; of `consumer` source and name; of `copy` the table; of `mart` the mart; of
`undecodable` the source and the offset in its log."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """What a line is about. Two of one kind and subject are one, until it is over.

    A higher `grade` of one that lasts is news again, as an issue that escalates.
    """

    kind: str
    subject: str
    source: str = ""
    model: str = ""
    severity: Severity = "info"
    grade: int = 1
    is_over: bool = False

    @property
    def lasts(self) -> bool:
        """Whether it holds until it is resolved."""
        return KINDS[self.kind].lasts


def trigger(
    kind: str,
    subject: str,
    words: str,
    *values: object,
    source: str = "",
    model: str = "",
    severity: Severity | None = None,
    grade: int = 1,
    exc_info: BaseException | None = None,
) -> None:
    """Tell of something: `words` is filled with `values` as a logger does, and quotes no cell value.

    `kind` is one of KINDS, which has the `severity` unless it is given. Whoever tells of what lasts says it
    again in a new process while it holds, and `resolve`s it.
    """
    alarm = Alarm(kind, subject, source, model, severity or KINDS[kind].severity, grade)
    is_grave = SEVERITIES.index(alarm.severity) >= SEVERITIES.index("error")
    level = logging.ERROR if is_grave else logging.WARNING
    _logger.log(level, words, *values, exc_info=exc_info, extra={_EXTRA: alarm})


def trigger_issue(
    issue: str, source: str, model: str, reason: str, columns: str, message: str, count: int, grade: int = 1
) -> None:
    """Tell of an issue, of which there are `count` records."""
    trigger(
        "issue", issue,
        "NEW CAUSE %s in model %s: %s %s: %s (%d so far). %s",
        issue, model, reason, columns, message, count, remedy_of(issue, reason),
        source=source, model=model, grade=grade,
    )  # fmt: skip


def remedy_of(issue: str, reason: str) -> str:
    """Say what to do about an issue."""
    if reason in ("decode.message", "decode.payload"):
        return "Copy its table again: `headrace tables resync TABLE`."
    return f"Mend the model or the data, then run `headrace quarantine redrive --issue {issue}`."


def trigger_suspended(model: str, source: str, why: str, severity: Severity | None = None) -> None:
    """Tell of a model that is suspended."""
    words = "SUSPENDED model %s: %s"
    trigger("suspended", model, words, model, why, source=source, model=model, severity=severity)


def trigger_undecodable(source: str, offset: int) -> None:
    """Tell of messages of a source that do not decode, and of which nobody can say the table."""
    trigger(
        "undecodable", f"{source} {offset}",
        "UNDECODABLE: source %s has sent what does not decode, and does not say of which table. The bytes "
        "are at offset %d of its log (headrace log show %d). `headrace verify` says which tables lack "
        "something, `headrace tables resync TABLE` copies them again.",
        source, offset, offset, source=source,
    )  # fmt: skip


def tell(words: str, *values: object, source: str = "", severity: Severity = "info") -> None:
    """Tell of something that has happened, once: a notice."""
    trigger("notice", words % values, words, *values, source=source, severity=severity)


def resolve(kind: str, subject: str, words: str, *values: object, source: str = "", model: str = "") -> None:
    """Tell that what `trigger` told of is over."""
    alarm = Alarm(kind, subject, source, model, KINDS[kind].severity, is_over=True)
    _logger.warning(words, *values, extra={_EXTRA: alarm})


def alarm_of(record: logging.LogRecord) -> Alarm:
    """Return what a line of the logger is about: a notice, its text the subject, if it does not say."""
    carried: Any = getattr(record, _EXTRA, None)
    if isinstance(carried, Alarm):
        return carried
    severity: Severity = "error" if record.levelno >= logging.ERROR else "info"
    return Alarm("notice", record.getMessage(), severity=severity)
