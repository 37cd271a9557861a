"""Postgres as a source: slot, copy, stream.

Facts that outlive the process are notes in the log: `system` (the server's identity), `slot` (its
name, written before it is created), `publication` (its name, if we made it), `copied` (its consistent
point, once the copy is in the log), `torn_down` (when, once `headrace teardown` began to drop them).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence

import psycopg

from headrace.change import Entry, Position, TableId, TableSchema
from headrace.config import SourceConfig, select_tables
from headrace.errors import SourceUnavailable
from headrace.protocols import Log
from headrace.sources.postgres.catalog import Connection, list_tables
from headrace.sources.postgres.connection import (
    connect,
    connect_bulk,
    connect_replication,
    place,
    without_password,
)
from headrace.sources.postgres.copy import copy_tables
from headrace.sources.postgres.failover import keep_failover, wants_failover
from headrace.sources.postgres.groups import GroupBuilder
from headrace.sources.postgres.lsn import format_lsn, parse_lsn
from headrace.sources.postgres.pgoutput import Decoder
from headrace.sources.postgres.publication import capturable_shapes, chosen_tables, publish
from headrace.sources.postgres.recovery import heard_entry, in_recovery, replayed
from headrace.sources.postgres.slot import check_resumable, create_slot, drop_unfinished, same_server
from headrace.sources.postgres.stream import Stream
from headrace.sources.postgres.teardown import refuse_torn_down

logger = logging.getLogger("headrace.capture")

_IDLE = 0.2
_FEEDBACK_EVERY = 10.0


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
        self._sought = 0
        self._stream: Stream | None = None
        self._plain: Connection | None = None

    def read(self, log: Log) -> Iterator[Iterable[Entry]]:
        """See `Source.read`."""
        refuse_torn_down(self._config, log)
        try:
            self._plain = connect(self._url)
            same_server(self._plain, self._config, log)
            if log.note("copied") is None:
                yield from self._copy(log)
            else:
                self._say_what_is_new(log)
            check_resumable(self._plain, self._config, log)
            keep_failover(self._plain, self._config)
            yield from self._follow(log)
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
        stream will pass it: a logical message is written behind it, or on a standby what the server says."""
        with connect(self._url) as db:
            self._sought = replayed(db) if in_recovery(db) else _emit(db, "head")
            return self._sought

    def close(self) -> None:
        """See `Source.close`."""
        for connection in (self._stream, self._plain):
            if connection is not None:
                connection.close()
        self._stream = self._plain = None

    def _catalog(self) -> Connection:
        assert self._plain is not None
        return self._plain

    def _say_what_is_new(self, log: Log) -> None:
        """Name tables that the patterns select but that are not captured."""
        selected = select_tables(self._config.tables, list_tables(self._catalog()))
        if new := [str(table) for table in selected if table not in log.schemas()]:
            logger.warning("not captured, since made after the copy: %s", ", ".join(new))

    def _copy(self, log: Log) -> Iterator[Sequence[Entry]]:
        """Create publication and slot, then copy every table under the slot's own snapshot."""
        db = self._catalog()
        tables = chosen_tables(db, self._config)
        if publish(db, self._config, tables):
            log.set_note("publication", self._config.publication)
        drop_unfinished(db, self._config, log)
        log.set_note("slot", self._config.slot)
        with connect_replication(self._url) as holder, connect_bulk(self._url) as bulk:
            failover = wants_failover(db, self._config)
            point, snapshot = yield from create_slot(db, holder, self._config, failover=failover)
            with bulk.cursor() as cursor:
                cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                cursor.execute(f"SET TRANSACTION SNAPSHOT '{snapshot}'")
            known = log.schemas()
            shapes = [_next_version(shape, known) for shape in capturable_shapes(db, self._config, tables)]
            logger.info("copy of %d tables begins at %s", len(shapes), format_lsn(point))
            yield from copy_tables(bulk, shapes, point)
        log.set_note("copied", str(point))
        logger.info("copy is complete")

    def _follow(self, log: Log) -> Iterator[Iterable[Entry]]:
        position = log.position()
        after = position.commit if position else 0
        self._confirmed = after
        stream = self._stream = Stream(self._config, after)
        decoder = Decoder(max_batch_bytes=self._max_bytes)
        builder = GroupBuilder(log.schemas(), self._catalog())
        beat = _Every(self._config.heartbeat)
        feedback = _Every(_FEEDBACK_EVERY)
        collected_since: float | None = None
        standby = in_recovery(self._catalog())
        try:
            while True:
                more, asked = stream.pump(decoder, self._max_bytes)
                if decoder.pending_bytes and collected_since is None:
                    collected_since = time.monotonic()
                waited = time.monotonic() - (collected_since or time.monotonic())
                too_big = decoder.pending_bytes >= self._max_bytes
                if too_big or (waited >= self._linger and not decoder.in_transaction):
                    transactions, events = decoder.take()
                    if entries := list(builder.build(transactions, events, after)):
                        yield entries
                    collected_since = None
                if asked or feedback.due():
                    stream.report(self._confirmed)
                if not standby and beat.due():
                    _emit(self._catalog(), "heartbeat")
                if not more:
                    reached = max(self._confirmed, after)
                    idle = collected_since is None and not decoder.in_transaction
                    sought = reached <= self._sought < stream.heard
                    if standby and idle and stream.heard > reached and (sought or beat.due()):
                        yield [heard_entry(self._catalog(), stream.heard)]
                    yield ()
                    stream.report(self._confirmed, always=False)
                    stream.wait(_IDLE if collected_since is None else max(0.0, self._linger - waited))
        finally:
            builder.close()


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


def _next_version(shape: TableSchema, known: dict[TableId, TableSchema]) -> TableSchema:
    before = known.get(shape.table)
    version = 1 if before is None else before.version + (not before.same_shape(shape))
    return TableSchema(shape.table, shape.columns, shape.key, version)
