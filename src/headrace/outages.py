"""What waits for the world to be mended: said at once, alerted of when it lasts, and over when it works."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from headrace.alarms import resolve, trigger
from headrace.errors import HeadraceError, SourceUnavailable
from headrace.scrub import scrub

logger = logging.getLogger("headrace.pipeline")

ALERT_AFTER = 10.0
"""Seconds that a wait lasts before people are told."""


@dataclass(slots=True)
class _Wait:
    error: BaseException
    why: str
    since: float
    kind: str = ""
    """What was alerted of, '' if nothing was."""


class Outages:
    """The threads of a pipeline that cannot go on now, by name."""

    def __init__(self) -> None:
        self._waiting: dict[str, _Wait] = {}

    def reasons(self) -> dict[str, str]:
        """Return why each of them waits, after `alerted: ` where people were told."""
        waiting = [*self._waiting.items()]
        return {name: f"alerted: {wait.why}" if wait.kind else wait.why for name, wait in waiting}

    def fails(self, name: str, error: BaseException) -> bool:
        """Note that a try failed; returns whether the one before had failed as well."""
        wait, why = self._waiting.get(name), words(error)
        if wait is None:
            logger.warning("%s waits: %s", name, why)
            self._waiting[name] = _Wait(error, why, time.monotonic())
            return False
        wait.error, wait.why = error, why
        lasting = time.monotonic() - wait.since
        if lasting > ALERT_AFTER and not wait.kind:
            wait.kind = "source_down" if isinstance(error, SourceUnavailable) else "waiting"
            told = "%s has been waiting for %.0f s: %s"
            trigger(wait.kind, name, told, name, lasting, why, source=source_of(name))
        return True

    def works(self, name: str, of: type[BaseException] | None = None) -> None:
        """Note that a try succeeded, or that what failed by an error `of` a class does so no more."""
        wait = self._waiting.get(name)
        if wait is not None and (of is None or isinstance(wait.error, of)):
            del self._waiting[name]
            logger.info("%s goes on", name)
            if wait.kind:
                lasting = time.monotonic() - wait.since
                told = "RESOLVED %s goes on after %.0f s"
                resolve(wait.kind, name, told, name, lasting, source=source_of(name))


def source_of(name: str) -> str:
    """Return the source of a thread, '' for one of the whole pipeline."""
    source, dot, _ = name.partition(".")
    return source if dot and source != "alerts" else ""


def words(error: BaseException) -> str:
    """Say what an error is, without the cell values that a library may quote."""
    if isinstance(error, HeadraceError):
        return error.paragraph()
    # A driver's OSError has no number, and may quote a cell.
    is_the_systems = isinstance(error, OSError) and error.errno is not None
    return f"{type(error).__name__}: {error if is_the_systems else scrub(str(error))}"
