"""What is done for a log beside its hops: old entries go, heads are anchored, consumers are watched."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from contextlib import suppress

from headrace.alarms import resolve, trigger
from headrace.change import Offset
from headrace.config import LogConfig
from headrace.errors import ConsumersUnknown, LogError, LogFull
from headrace.lane import Lane
from headrace.log.anchoring import Anchoring
from headrace.log.consumers import Cursors
from headrace.log.readers import Readers
from headrace.log.retention import Kept, Trim, decide

logger = logging.getLogger("headrace.upkeep")

EVERY = 10.0
"""Seconds between two steps."""

_PATIENCE, _PAUSE = 0.1, 0.5  # seconds for which a trim waits for an append with apply, and without
_ROLLS = 8  # a segment is closed after this part of the retention, so that it can go as a whole


class Upkeep:
    """Looks after the log of one lane."""

    def __init__(self, lane: Lane, config: LogConfig, stop: threading.Event) -> None:
        self._lane = lane
        self._log = lane.log
        self._config = config
        self._stop = stop
        self._cursors = Cursors(lane.log.path.with_suffix(".cursors"))
        self._readers = Readers(lane.log.path)
        self._slow: frozenset[str] = frozenset()
        self._unmarked: dict[str, tuple[Offset, str]] = {}  # lost, to be marked once there is room
        self._anchoring = Anchoring(lane.log, config)
        self._rolled = time.monotonic()

    def step(self) -> None:
        """Anchor the head when it is time, and trim what may go.

        Raises what log and destination raise. The anchor is first: it does not wait for what holds
        retention.
        """
        self._anchoring.step(time.monotonic())
        self._trim()

    def close(self) -> None:
        """Close the file of the consumers."""
        self._cursors.close()

    def _trim(self) -> None:
        for name, (offset, reason) in [*self._unmarked.items()]:
            self._mark_lost(name, offset, reason)
        old = self._old()
        begin = self._log.begin()
        if old <= begin.offset:
            with suppress(LogError, OSError):  # what was planned and not done holds nobody any longer
                if self._cursors.planned(begin.log_id) > begin.offset:
                    self._cursors.plan(*begin[:2])
            return
        self._find_consumers()
        freed, through = 0, None
        while not self._stop.is_set():
            # While no slice is in flight: where it began and where it will end must stay.
            with self._lane.applying:
                needs = self._lane.needs()
                if needs is None:
                    return
                if through is None:
                    through = self._decide(old, needs.used)
                with self._log.writing(_PATIENCE) as is_free:
                    if is_free:
                        self._plan(self._log.group_end(through))
                        consumers = self._consumers().values()
                        through = min([through, needs.used, *consumers])
                        if self._log.group_end(through) <= self._log.begin().offset:
                            break
                        freed += self._log.trim(
                            through, needs.stops.union(consumers, self._readers.pinned(self._log.id))
                        )
            if not is_free:
                self._stop.wait(_PAUSE)
        if freed:
            logger.info("%s: entries through offset %d have gone, %d bytes are free again",
                        self._log.source, self._log.begin().offset, freed)  # fmt: skip

    def _find_consumers(self) -> None:
        """Have the file of the consumers open, on a full disk in the room of the log's reserve."""
        try:
            self._cursors.all()
        except ConsumersUnknown as error:
            if not isinstance(error.__cause__, LogFull):
                raise
            with self._log.reserve_given_up():
                self._cursors.all()

    def _plan(self, through: Offset) -> None:
        """Let no consumer begin before an offset, on a full disk in the room of the log's reserve."""
        if self._cursors.planned(self._log.id) == through:
            return
        try:
            self._cursors.plan(self._log.id, through)
        except LogFull:
            with self._log.reserve_given_up():
                self._cursors.plan(self._log.id, through)

    def _consumers(self) -> dict[str, Offset]:
        """Return through where each consumer has read that the log still holds everything for."""
        begin = self._log.begin()
        return {
            cursor.name: cursor.offset
            for cursor in self._cursors.all()
            if not cursor.lost
            and cursor.log_id == begin.log_id
            and cursor.offset >= begin.offset
            and self._unmarked.get(cursor.name, (None,))[0] != cursor.offset
        }

    def _decide(self, old: Offset, used: Offset) -> Offset:
        """Return through which offset to trim, and tell of the consumers that this leaves behind."""
        consumers = self._consumers()
        held = {name: self._log.bytes_between(offset, min(old, used)) for name, offset in consumers.items()}
        trim = decide(Kept(old, used, consumers, held, self._config.hold_max))
        self._tell(trim, consumers, held)
        return trim.through

    def _old(self) -> Offset:
        """Return the last offset that is older than `keep`, or beyond `keep_bytes`."""
        config, old = self._config, 0
        if config.keep is not None:
            old = self._log.appended_before(int((time.time() - config.keep) * 1e6))
            if time.monotonic() - self._rolled > config.keep / _ROLLS:
                self._rolled = time.monotonic()
                self._log.roll()
        if config.keep_bytes:
            old = max(old, self._log.beyond(config.keep_bytes))
        return old

    def _tell(self, trim: Trim, consumers: Mapping[str, Offset], held: Mapping[str, int]) -> None:
        source = self._log.source
        for name in trim.lost:
            reason = f"it held {held[name]} bytes of the log, more than hold_max"
            if not self._mark_lost(name, consumers[name], reason):
                continue  # it has moved meanwhile
            trigger(
                "consumer_lost", f"{source}.{name}",
                "LOST consumer %s of %s: %s. What it had not read is deleted; it goes on after "
                "`headrace log consumers --reset %s --to OFFSET`.",
                name, source, reason, name, source=source,
            )  # fmt: skip
        for name in sorted(set(trim.slow) - self._slow):
            trigger(
                "consumer", f"{source}.{name}",
                "SLOW consumer %s of %s holds %d bytes of the log; at hold_max (%d) it is lost. Read it, "
                "or run `headrace log consumers --forget %s`.",
                name, source, held[name], self._config.hold_max, name, source=source,
            )  # fmt: skip
        for name in sorted(self._slow - set(trim.slow)):
            words = "RESOLVED consumer %s of %s holds the log no more"
            resolve("consumer", f"{source}.{name}", words, name, source, source=source)
        self._slow = frozenset(trim.slow)

    def _mark_lost(self, name: str, offset: Offset, reason: str) -> bool:
        """Mark a consumer as lost, later where there is no room: the trim that makes some is not to wait for
        it. One that has moved meanwhile is not lost: returns whether it is."""
        self._unmarked.pop(name, None)
        try:
            return self._cursors.mark_lost(name, offset, reason)
        except LogFull:
            self._unmarked[name] = (offset, reason)
            return True
