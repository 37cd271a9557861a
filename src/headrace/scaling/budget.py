"""What is left of a day's worker-hours, over restarts."""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

logger = logging.getLogger("headrace.scaling")

FILE = "scaling-budget.json"
"""Its name in the state folder."""
_SAVE_EVERY = 5.0
"""Seconds of work that a crash forgets at most, of all workers, beside those since the last look."""


class Budget:
    """Adds up what workers have worked on a UTC day, and keeps it in a file.

    It is written every few seconds while there are workers, so that not even a process that dies over and
    over gives the day's hours away.
    """

    def __init__(self, path: Path, hours_per_day: float | None) -> None:
        """Go on with what the file says of today; one that cannot be read is as good as none, and is
        said."""
        self._path = path
        self._hours = hours_per_day
        self._day, self._seconds = self._read()
        self._unsaved = 0.0
        self._is_told = False

    def spend(self, workers: int, seconds: float, at: datetime) -> None:
        """Count so many workers for so many seconds before `at`."""
        self._turn(at)
        if not workers:
            return
        self._seconds += workers * seconds
        self._unsaved += seconds
        if self._unsaved >= _SAVE_EVERY:
            self.save()

    def left(self, at: datetime) -> float | None:
        """Return the worker-hours that are left of the day; None without a budget."""
        self._turn(at)
        return None if self._hours is None else max(0.0, self._hours - self.spent)

    @property
    def spent(self) -> float:
        """The worker-hours of the day so far."""
        return self._seconds / 3600

    def save(self) -> None:
        """Write the file, whole or not at all."""
        self._unsaved = 0.0
        new = self._path.with_name(self._path.name + ".new")
        try:
            with new.open("w") as file:
                json.dump({"day": self._day, "worker_seconds": round(self._seconds, 3)}, file)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._path)
        except OSError as error:
            if not self._is_told:
                logger.warning(
                    "%s cannot be written (%s): a restart forgets today's worker-hours",
                    self._path,
                    error.strerror,
                )
            self._is_told = True
        else:
            self._is_told = False

    def _turn(self, at: datetime) -> None:
        day = at.astimezone(UTC).date().isoformat()
        if day != self._day:
            self._day, self._seconds = day, 0.0

    def _read(self) -> tuple[str, float]:
        with suppress(FileNotFoundError):
            try:
                found = json.loads(self._path.read_text())
                return str(found["day"]), float(found["worker_seconds"])
            except FileNotFoundError:
                raise
            except (OSError, ValueError, TypeError, KeyError) as error:
                logger.warning("%s cannot be read (%s): today's worker-hours count from 0", self._path, error)
        return "", 0.0
