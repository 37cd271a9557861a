"""Coming to an end in bounded time: what is in hand when a pipeline is to stop may be finished, if that is
soon."""

from __future__ import annotations

import logging
import threading
import time

logger = logging.getLogger("headrace.pipeline")

GRACE = 10.0
"""Seconds for what is in hand."""


class Stopping:
    """Tells whoever works for long when to give up. Safe to share between threads."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._seen = 0.0

    def check(self) -> None:
        """Raise InterruptedError where the end was asked for `GRACE` seconds ago. Its first call after that
        begins to count, so it is called every second or so."""
        if not self._stop.is_set():
            return
        now = time.monotonic()
        if not self._seen:
            self._seen = now
        elif now - self._seen > GRACE:
            raise InterruptedError("what was in hand is left to the next start")

    def gives_up(self, name: str, error: BaseException) -> bool:
        """Whether an error of thread `name` is that of `check`, or came of the end as it does: then nothing
        is wrong, which is logged."""
        if not self._stop.is_set() or not isinstance(error, InterruptedError):
            return False
        logger.info("%s: %s", name, error)
        return True
