"""What is done for a log beside its hops: old entries go, heads are anchored, consumers are watched."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from headrace.change import Offset
from headrace.config import LogConfig
from headrace.lane import Lane
from headrace.log.anchoring import Anchoring
from headrace.log.consumers import Cursors
from headrace.log.retention import Kept, Trim, decide
from headrace.sources.postgres.tables import UNFINISHED, read_states

logger = logging.getLogger("headrace.upkeep")
alerts = logging.getLogger("headrace.alert")

EVERY = 10.0
"""Seconds between two steps."""

_ROLLS = 8  # a segment is closed after this part of the retention, so that it can go as a whole


class Upkeep:
    """Looks after the log of one lane."""

    def __init__(self, lane: Lane, config: LogConfig) -> None:
        self._lane = lane
        self._log = lane.log
        self._config = config
        self._cursors = Cursors(lane.log.path.with_suffix(".cursors"))
        self._slow: frozenset[str] = frozenset()
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
        begin = self._log.begin().offset
        stands = self._lane.stands()
        old = self._old()
        if stands is None or old <= begin:
            return
        running = [offset for offset, runs in stands.values() if runs]
        used = min([self._lane.staging.through(), self._unfinished(), *running])
        consumers = {cursor.name: cursor.offset for cursor in self._cursors.all() if not cursor.lost}
        held = {
            name: self._log.bytes_between(max(offset, begin), min(old, used))
            for name, offset in consumers.items()
        }
        trim = decide(Kept(old, used, consumers, held, self._config.hold_max))
        self._tell(trim, held)
        if trim.through > begin:
            pinned = [offset for offset, _ in stands.values()]
            freed = self._log.trim(trim.through, [*pinned, *consumers.values()])
            if freed:
                through = self._log.begin().offset
                logger.info("%s: entries through offset %d have gone, %d bytes are free again",
                            self._log.source, through, freed)  # fmt: skip

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

    def _unfinished(self) -> Offset:
        """Return the offset behind which copies that are under way look things up in the log."""
        states = read_states(self._log)
        begun: dict[object, Offset] = {}
        for offset, table, _, _, mark in self._log.copy_marks():
            if mark.kind == "begin":
                begun[table] = min(offset - 1, mark.after)
        under_way = [
            begun[table] for table, state in states.items() if state.stage in UNFINISHED and table in begun
        ]
        return min(under_way, default=self._log.end().offset)

    def _tell(self, trim: Trim, held: Mapping[str, int]) -> None:
        for name in trim.lost:
            reason = f"it held {held[name]} bytes of the log, more than hold_max"
            self._cursors.mark_lost(name, reason)
            alerts.error(
                "LOST consumer %s of %s: %s. What it had not read is deleted; it goes on after "
                "`headrace log consumers --reset %s --to OFFSET`.",
                name, self._log.source, reason, name,
            )  # fmt: skip
        for name in sorted(set(trim.slow) - self._slow):
            alerts.warning(
                "SLOW consumer %s of %s holds %d bytes of the log; at hold_max (%d) it is lost. Read it, "
                "or run `headrace log consumers --forget %s`.",
                name, self._log.source, held[name], self._config.hold_max, name,
            )  # fmt: skip
        self._slow = frozenset(trim.slow)
