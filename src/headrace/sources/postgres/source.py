"""Postgres as a source: slot, stream, and copies beside it.

Facts that outlive the process are notes in the log: `slot` (its name, written before it is created),
`point` (the position from which it delivers, an LSN as a number), `epoch`, `resync` (asked for, not yet
begun), and those of `tables`, `identity`, `continuity` and `fingerprint`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from typing import Literal

import psycopg

from headrace.change import Entry, Position, TableId
from headrace.config import SourceConfig, select_tables
from headrace.errors import SourceUnavailable, UserError
from headrace.protocols import Log
from headrace.sources.postgres.catalog import Connection, list_tables
from headrace.sources.postgres.connection import connect, connect_replication, place, without_password
from headrace.sources.postgres.continuity import Continuity
from headrace.sources.postgres.copier import Copier
from headrace.sources.postgres.fingerprint import captured_oids, check_publication, expect_publication
from headrace.sources.postgres.groups import GroupBuilder
from headrace.sources.postgres.identity import Server, check_server, forget_server, refuse_standby
from headrace.sources.postgres.lsn import format_lsn, parse_lsn
from headrace.sources.postgres.pgoutput import Decoder
from headrace.sources.postgres.publication import amend, capturable_shapes, chosen_tables, publish, withdraw
from headrace.sources.postgres.roster import Roster
from headrace.sources.postgres.slot import (
    POINT,
    Slot,
    check_resumable,
    create_slot,
    drop_unfinished,
    durable_commit,
    epoch_of,
)
from headrace.sources.postgres.stream import Stream
from headrace.sources.postgres.tables import Stage, TableStates, captured_tables, read_states
from headrace.sources.postgres.takeover import Takeover
from headrace.sources.postgres.watchman import Watchman

logger = logging.getLogger("headrace.capture")

Request = Literal["add", "remove", "resync", "pause", "resume"]

_RESYNC = "resync"

_IDLE = 0.2
_COPYING = 0.01  # how long a wait for the stream may hold up what a copy has ready
_FEEDBACK_EVERY = 10.0
_NUDGE_EVERY = 0.5


class PostgresSource:
    """One Postgres database, read through one logical replication slot."""

    def __init__(self, config: SourceConfig, max_bytes: int, linger: float) -> None:
        """`max_bytes` bounds what is decoded before it becomes a group, `linger` (seconds) how long
        a group waits for more while changes keep coming."""
        self.name = config.name
        self._config = config
        self._url = config.url.reveal()
        self._max_bytes = max_bytes
        self._linger = linger
        self._confirmed = 0
        self._takeover = Takeover(config)
        self._stream: Stream | None = None
        self._requests: deque[TableId] = deque()
        self._resync = threading.Event()
        self._plain: Connection | None = None

    def read(self, log: Log) -> Iterator[Iterable[Entry]]:
        """See `Source.read`."""
        try:
            self._plain = connect(self._url)
            if log.note(_RESYNC):
                self._start_anew(log)
            server = check_server(self._plain, self._config, log)
            if log.note("slot") == self._config.slot:
                self._takeover.consider(self._plain)
            with closing(Copier(self._config, log, epoch_of(log))) as copier:
                if not log.note(POINT):
                    self._begin(log, copier)
                slot = check_resumable(self._plain, self._config, log)
                check_publication(self._plain, self._config, log)
                self._publish(log)
                self._say_what_is_new(log)
                copier.resume()
                yield from self._follow(log, copier, server, slot)
        except (psycopg.OperationalError, psycopg.InterfaceError) as error:
            raise SourceUnavailable(
                f"{place(self._url)} broke off: {without_password(str(error)).strip()}"
            ) from error
        finally:
            self.close()

    def confirm(self, through: Position) -> None:
        """See `Source.confirm`."""
        self._confirmed = max(self._confirmed, through.commit)

    def head(self) -> int:
        """Return an LSN that every change committed until now lies before, and make sure that the
        stream will pass it: a logical message is written behind it."""
        with connect(self._url) as db:
            refuse_standby(db, self._config)
            return _emit(db, "head")

    def close(self) -> None:
        """See `Source.close`."""
        for connection in (self._stream, self._plain):
            if connection is not None:
                connection.close()
        self._stream = self._plain = None

    def _catalog(self) -> Connection:
        assert self._plain is not None
        return self._plain

    def change_tables(self, log: Log, tables: Sequence[TableId], what: Request) -> None:
        """Add tables to those that are captured, remove them, copy them again, pause or resume them.

        Durable when it returns; a running `read` takes it up within a second. Raises UserError for a
        table that the source does not have, or that is not captured.
        """
        states = TableStates(log)
        if what == "add":
            with connect(self._url) as db:
                known = list_tables(db)
                if missing := [str(table) for table in tables if table not in known]:
                    raise UserError(
                        f"{place(self._url)} has no table {', '.join(missing)}.", "Check the names."
                    )
                capturable_shapes(db, self._config, tables)
        elif missing := [str(table) for table in tables if table not in captured_tables(log)]:
            raise UserError(
                f"Source {self.name} does not capture {', '.join(missing)}.", "See `headrace tables list`."
            )
        if what in ("pause", "resume"):
            states.pause(tables, what == "pause")
            return
        stage: Stage = "removed" if what == "remove" else "requested"
        captured = captured_tables(log)
        tables = [table for table in tables if what != "add" or table not in captured]
        states.move(tables, stage, {"add": "added", "resync": "resync", "remove": ""}[what])
        self._requests.extend(tables)

    def request_resync(self, log: Log) -> None:
        """Begin anew: with a new slot, and every table copied again.

        Durable when it returns; a running `read` ends with SourceUnavailable, the next one takes it up.
        """
        log.set_note(_RESYNC, "requested")
        self._resync.set()

    def _start_anew(self, log: Log) -> None:
        """Forget the slot and the server; positions from here on belong to a new epoch."""
        if log.note(POINT):
            log.set_note("epoch", str(epoch_of(log) + 1))
            log.set_note(POINT, "")
        forget_server(log)
        log.set_note(_RESYNC, "")
        self._resync.clear()

    def _take_requests(self, log: Log, copier: Copier) -> None:
        """Carry out what `change_tables` and `request_resync` have made durable."""
        if self._resync.is_set():
            raise SourceUnavailable(f"Source {self.name} begins anew, as it was asked to.")
        while self._requests:
            table = self._requests.popleft()
            state = read_states(log)[table]
            if state.stage == "removed":
                copier.drop(table)
                withdraw(self._catalog(), self._config, table)
                expect_publication(self._catalog(), self._config, log)
                logger.info("%s is no longer captured", table)
            elif state.stage == "requested":
                self._publish(log)
                copier.start(table, state.reason, after=log.end().offset)

    def _publish(self, log: Log) -> None:
        """Publish what is to be captured, and expect to find that from now on."""
        captured = captured_tables(log)
        amended = amend(self._catalog(), self._config, captured)
        if publish(self._catalog(), self._config, captured) or amended:
            expect_publication(self._catalog(), self._config, log)

    def _say_what_is_new(self, log: Log) -> None:
        """Name tables that the patterns select but that are not captured."""
        known = read_states(log)
        selected = select_tables(self._config.tables, list_tables(self._catalog()))
        if new := [str(table) for table in selected if table not in known]:
            logger.warning(
                "not captured, since made after the first copy: %s; `headrace tables add` takes them in",
                ", ".join(new),
            )

    def _begin(self, log: Log, copier: Copier) -> None:
        """Make publication and slot, and have every table copied under the slot's own snapshot."""
        db = self._catalog()
        states = TableStates(log)
        tables = captured_tables(log) or chosen_tables(db, self._config)
        publish(db, self._config, tables)
        expect_publication(db, self._config, log)
        drop_unfinished(db, self._config, log)
        log.set_note("slot", self._config.slot)
        again = log.end().offset > 0
        with connect_replication(self._url) as maker:
            point, snapshot = create_slot(maker, self._config)
            copier.snapshots.adopt(point, snapshot)
        states.move(tables, "requested", "resync" if again else "")
        log.set_note(POINT, str(point))
        logger.info("copy of %d tables begins at %s", len(tables), format_lsn(point))
        for table in tables:
            copier.start(table, "resync" if again else "", after=log.end().offset, under_current=True)

    def _follow(self, log: Log, copier: Copier, server: Server, slot: Slot) -> Iterator[Iterable[Entry]]:
        after = self._confirmed = durable_commit(log)
        continuity = Continuity(self._config, log, f"{server.system} {server.started}", slot.confirmed)
        stream = self._stream = Stream(self._config, continuity.after)
        watchman = Watchman(self._catalog(), self._config, log, server, stream)
        decoder = Decoder(max_batch_bytes=self._max_bytes)
        roster = Roster(self.name, captured_tables(log), captured_oids(log))
        builder = GroupBuilder(log.schemas(), self._catalog(), self._config, roster, epoch_of(log))
        beat = _Every(self._config.heartbeat)
        feedback = _Every(_FEEDBACK_EVERY)
        nudge = _Every(_NUDGE_EVERY)
        collected_since: float | None = None
        try:
            while True:
                more, asked = stream.pump(decoder, self._max_bytes)
                if decoder.pending_bytes and collected_since is None:
                    collected_since = time.monotonic()
                waited = time.monotonic() - (collected_since or time.monotonic())
                too_big = decoder.pending_bytes >= self._max_bytes
                if too_big or (waited >= self._linger and not decoder.in_transaction):
                    transactions, events = decoder.take()
                    continuity.check(transactions)
                    if entries := list(builder.build(transactions, events, after)):
                        yield entries
                    collected_since = None
                self._take_requests(log, copier)
                if copier.waits_for_stream and nudge.due():
                    _emit(self._catalog(), "copied")
                for group in copier.ready(self._confirmed):
                    yield group.entries
                    group.appended()
                    if group.shape:
                        builder.adopt(group.shape)
                if asked or feedback.due():
                    stream.report(continuity.confirmable(self._confirmed))
                watchman.check_if_due()
                if beat.due():
                    _emit(self._catalog(), "heartbeat")
                if not more:
                    yield ()
                    stream.report(continuity.confirmable(self._confirmed), always=False)
                    idle = _IDLE if collected_since is None else max(0.0, self._linger - waited)
                    stream.wait(min(idle, _COPYING) if copier.busy else idle)
        finally:
            builder.close()
            # The slot of a project that only ever runs once at a time would never move otherwise.
            with suppress(psycopg.Error):
                stream.report(continuity.confirmable(self._confirmed), always=False)


class _Every:
    """A timer that is due once per interval, first after one interval."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last = time.monotonic()

    def due(self) -> bool:
        if time.monotonic() - self._last < self._seconds:
            return False
        self._last = time.monotonic()
        return True


def _emit(db: Connection, content: str) -> int:
    row = db.execute("SELECT pg_logical_emit_message(true, 'headrace', %s)::text", [content]).fetchone()
    return parse_lsn(str(row[0])) if row else 0
