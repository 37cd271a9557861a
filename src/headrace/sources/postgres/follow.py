"""Following a slot: by its stream near the head, in bulk far behind, and with copies beside both."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psycopg

from headrace.change import Entry, TableId
from headrace.config import SourceConfig
from headrace.protocols import LogIndex
from headrace.sources.postgres.assembly import Assembler
from headrace.sources.postgres.bulk import Bulk
from headrace.sources.postgres.catalog import Connection
from headrace.sources.postgres.catalog_watch import announced_shape
from headrace.sources.postgres.columns import Policy
from headrace.sources.postgres.continuity import Continuity
from headrace.sources.postgres.copier import Copier
from headrace.sources.postgres.fingerprint import amend_own, captured_oids
from headrace.sources.postgres.groups import GroupBuilder
from headrace.sources.postgres.identity import Server
from headrace.sources.postgres.lsn import parse_lsn
from headrace.sources.postgres.partitions import changed_partitions
from headrace.sources.postgres.recovery import heard_entry, in_recovery
from headrace.sources.postgres.roster import Roster
from headrace.sources.postgres.shapes import OnRewrite, Shapes
from headrace.sources.postgres.slot import Slot, durable_commit, epoch_of
from headrace.sources.postgres.spool import SpoolSpace
from headrace.sources.postgres.stream import Stream, StreamingFailed
from headrace.sources.postgres.tables import captured_tables, read_states
from headrace.sources.postgres.watchman import WATCH_EVERY, Watchman, on_one_timeline

logger = logging.getLogger("headrace.capture")

_IDLE = 0.2
_COPYING = 0.01  # how long a wait for the stream may hold up what a copy has ready
_YIELD_EVERY = 0.4
_NUDGE_EVERY = 0.5
_LOOK_EVERY = 5.0


@dataclass(slots=True)
class Progress:
    """What `PostgresSource` and the one who follows share: the LSN that may be confirmed, and one that a
    caller waits for."""

    confirmed: int = 0
    sought: int = 0


class Follower:
    """One connection's life: everything between a start's checks and the next failure."""

    def __init__(
        self,
        config: SourceConfig,
        log: LogIndex,
        db: Connection,
        copier: Copier,
        limits: Limits,
        progress: Progress,
        take_requests: Callable[[], None],
        on_rewrite: OnRewrite,
        look_at_catalog: Callable[[], None],
        moved: Callable[[TableId, TableId], None],
    ) -> None:
        """`take_requests` is called between groups, `look_at_catalog` there from time to time; `on_rewrite`
        see `Shapes`, `moved` see `Roster`."""
        self._config = config
        self._log = log
        self._db = db
        self._copier = copier
        self._limits = limits
        self._progress = progress
        self._take_requests = take_requests
        self._on_rewrite = on_rewrite
        self._standby = in_recovery(db)
        self._beat = _Every(config.heartbeat)
        self._nudge = _Every(_NUDGE_EVERY)
        self._look_at_catalog = look_at_catalog
        self._moved = moved
        self._looks = _Every(WATCH_EVERY, at_once=True)

    def groups(self, server: Server, slot: Slot) -> Iterator[Iterable[Entry]]:
        """Yield groups, of the slot and of copies, for ever. Each is durable when the next is asked for."""
        groups = self._groups(server, slot)
        yield from on_one_timeline(groups, self._config, self._log, server) if self._standby else groups

    def _groups(self, server: Server, slot: Slot) -> Generator[Iterable[Entry]]:
        bulk = Bulk(self._config, self._limits.max_bytes)
        run = f"{server.system} {server.started}"
        continuity = Continuity(self._config, self._log, run, slot.confirmed)
        streaming = True
        while True:
            self._progress.confirmed = durable_commit(self._log)
            if not continuity.is_open:
                yield from self._catch_up(bulk)
            try:
                yield from self._stream(server, bulk, continuity, streaming=streaming)
            except StreamingFailed as error:
                logger.warning("%s; large transactions are now awaited as a whole", error)
                streaming = False

    def _catch_up(self, bulk: Bulk) -> Iterator[Iterable[Entry]]:
        """Read in bulk while that is faster than a stream."""
        space = self._space()
        try:
            builder = self._builder(space)
            # Closed at once whatever ends this: a peek that goes on holds the slot.
            with closing(bulk.read(self._db, builder, lambda: self._progress.confirmed)) as groups:
                for group in groups:
                    yield group
                    yield from self._between(builder)
        finally:
            space.close()

    def _stream(
        self, server: Server, bulk: Bulk, continuity: Continuity, *, streaming: bool
    ) -> Iterator[Iterable[Entry]]:
        """Stream from where the log ends; return when it is far behind."""
        after = durable_commit(self._log)
        stream = Stream(self._config, continuity.confirmable(after), streaming=streaming)
        space = self._space()
        try:
            watchman = Watchman(self._db, self._config, self._log, server, stream)
            builder = self._builder(space)
            limits = self._limits
            assembler = Assembler(
                self._config, builder, space, limits.max_bytes, limits.linger, after, continuity.check
            )
            breath, look = _Every(_YIELD_EVERY), _Every(_LOOK_EVERY)
            while True:
                more, asked = assembler.pump(stream)
                yield from assembler.groups()
                yield from self._between(builder)
                watchman.check_if_due()
                if not more and assembler.idle:
                    continuity.check_heard(stream.heard)
                    yield from self._heard(stream, after)
                rests = not more or breath.due()
                if rests:
                    yield ()
                if asked or rests:
                    stream.report(continuity.confirmable(self._progress.confirmed), always=asked)
                # While it is open whether the server has all that the log holds, only a stream can tell.
                may_look = not continuity.is_open and look.due()
                if may_look and bulk.worthwhile(self._db, self._progress.confirmed):
                    return
                if not more:
                    stream.wait(assembler.pause(_COPYING if self._copier.busy else _IDLE))
        finally:
            # The slot of a project that only ever runs once at a time would never move otherwise.
            with suppress(psycopg.Error):
                stream.report(continuity.confirmable(self._progress.confirmed), always=False)
            stream.close()
            space.close()

    def _between(self, builder: GroupBuilder) -> Iterator[Iterable[Entry]]:
        """Serve what is due beside the slot's changes: requests, copies, heartbeats."""
        self._take_requests()
        if self._looks.due():
            self._look_at_catalog()
            for table, reason in changed_partitions(self._db, self._log, captured_tables(self._log)):
                self._on_rewrite(table, reason, False)
        for group in self._copier.ready(self._progress.confirmed):
            yield group.entries
            group.appended()
            if group.shape:
                builder.adopt(group.shape)
        if self._standby:
            return
        if self._beat.due():
            emit(self._db, "heartbeat")
        if self._copier.waits_for_stream and self._nudge.due():
            emit(self._db, "copied")

    def _heard(self, stream: Stream, after: int) -> Iterator[Iterable[Entry]]:
        """Log how far an idle standby has sent everything, in place of heartbeats."""
        reached = max(self._progress.confirmed, after)
        if not self._standby or stream.heard <= reached:
            return
        sought = reached <= self._progress.sought < stream.heard
        waited_for = self._copier.waits_for_stream and self._nudge.due()
        if sought or waited_for or self._beat.due():
            yield [heard_entry(self._db, stream.heard, epoch_of(self._log))]

    def _space(self) -> SpoolSpace:
        return SpoolSpace(self._config.name, self._limits.spool, self._config.spool_max)

    def _builder(self, space: SpoolSpace) -> GroupBuilder:
        log, config = self._log, self._config
        waiting = [table for table, state in read_states(log).items() if state.stage == "requested"]
        announced = partial(announced_shape, log)
        amend = partial(amend_own, self._db, config, log)
        shapes = Shapes(log.schemas(), self._db, config, self._on_rewrite, waiting, announced, amend)
        known = partial(read_states, log)
        roster = Roster(config.name, captured_tables(log), partial(captured_oids, log), known, self._moved)
        return GroupBuilder(shapes, roster, Policy(config), space, epoch_of(log))


@dataclass(frozen=True, slots=True)
class Limits:
    """`max_bytes` bounds what is decoded before it becomes a group, `linger` (seconds) how long a group
    waits for more while changes keep coming; `spool` is the folder for what has not committed."""

    max_bytes: int
    linger: float
    spool: Path


class _Every:
    """A timer that is due once per interval, first after one interval or `at_once`."""

    def __init__(self, seconds: float, *, at_once: bool = False) -> None:
        self._seconds = seconds
        self._last = -math.inf if at_once else time.monotonic()

    def due(self) -> bool:
        if time.monotonic() - self._last < self._seconds:
            return False
        self._last = time.monotonic()
        return True


def emit(db: Connection, content: str) -> int:
    """Write a message of ours into the source's WAL; returns its LSN."""
    row = db.execute("SELECT pg_logical_emit_message(true, 'headrace', %s)::text", [content]).fetchone()
    return parse_lsn(str(row[0])) if row else 0
