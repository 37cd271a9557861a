"""A budget for reading."""

from __future__ import annotations

import threading
import time


class Pace:
    """A budget of bytes per second, shared by all workers; 0 sets none."""

    def __init__(self, rate: int, stop: threading.Event) -> None:
        """`stop` ends every wait."""
        self._rate = rate
        self._stop = stop
        self._lock = threading.Lock()
        self._free_at = time.monotonic()

    def spend(self, size: int) -> None:
        """Wait until so many bytes fit the budget."""
        if not self._rate:
            return
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + size / self._rate
            wait = self._free_at - time.monotonic()
        self._stop.wait(max(0.0, wait))
