"""Reading another project's staging: the place at which this one stands is made known there."""

from __future__ import annotations

import logging
import time

from headrace.config import Project
from headrace.lane import Lane
from headrace.log.readers import Readers

logger = logging.getLogger("headrace.upstream")

PIN_EVERY = 1.0
"""Seconds between two steps."""

_AGAIN = 3600.0  # seconds after which a place that has not moved is written once more


class ReadingPlace:
    """The places at which the models of a lane stand, pinned in the log of the project that it reads.

    That project neither waits for this one nor keeps anything for it but a row of its log for each of the
    places, so that this one finds there where it was, however long it stood still.
    """

    def __init__(self, project: Project, lane: Lane) -> None:
        self._project = project
        self._lane = lane
        self._readers = Readers(lane.log.path)
        self._pinned: frozenset[int] = frozenset()
        self._at = 0.0
        self._is_told = False

    def step(self) -> None:
        """Pin where the models stand now, if that has changed. Raises what the destination raises.

        Where the other project's folder cannot be written, that is told once, and nothing is pinned.
        """
        with self._lane.applying:
            needs = self._lane.needs()
        if needs is None or (needs.stops == self._pinned and time.monotonic() - self._at < _AGAIN):
            return
        try:
            self._readers.pin(self._project.state, self._lane.log.id, needs.stops)
        except OSError as error:
            if not self._is_told:
                logger.warning(
                    "%s: its place is not pinned, since %s cannot be written (%s): should retention there "
                    "pass it while this project stands still, the destination has to be built anew",
                    self._lane.config.name, self._readers.folder, error.strerror,
                )  # fmt: skip
            self._is_told = True
        self._pinned, self._at = needs.stops, time.monotonic()
