"""Postgres as a source: slot, copy, stream.

Facts that outlive the process are notes in the log: `system` (the server's identity), `slot` (its
name, written before it is created), `copied` (its consistent point, once the copy is in the log).
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path

import psycopg

from headrace.change import Entry, Position, TableId, TableSchema
from headrace.config import SourceConfig, select_tables
from headrace.protocols import Log
from headrace.sources.postgres.assembly import Assembler
from headrace.sources.postgres.catalog import Connection, list_tables
from headrace.sources.postgres.connection import broke_off, connect, connect_bulk, connect_replication
from headrace.sources.postgres.copy import copy_tables
from headrace.sources.postgres.groups import GroupBuilder
from headrace.sources.postgres.lsn import format_lsn, parse_lsn
from headrace.sources.postgres.publication import capturable_shapes, chosen_tables, publish
from headrace.sources.postgres.slot import check_resumable, create_slot, drop_unfinished, same_server
from headrace.sources.postgres.spool import SpoolSpace
from headrace.sources.postgres.stream import Stream, StreamingFailed

logger = logging.getLogger("headrace.capture")

_IDLE = 0.2
_YIELD_EVERY = 0.4


class PostgresSource:
    """One Postgres database, read through one logical replication slot."""

    def __init__(
        self, config: SourceConfig, max_bytes: int, linger: float, spool: Path | None = None
    ) -> None:
        """`max_bytes` bounds what is decoded before it becomes a group, `linger` (seconds) how long
        a group waits for more while changes keep coming. Large transactions wait in the folder `spool`
        for their commit, by default the system's for temporary files."""
        self.name = config.name
        self._config = config
        self._url = config.url.reveal()
        self._max_bytes = max_bytes
        self._linger = linger
        self._spool = spool or Path(tempfile.gettempdir())
        self._confirmed = 0
        self._stream: Stream | None = None
        self._plain: Connection | None = None

    def read(self, log: Log) -> Generator[Iterable[Entry]]:
        """See `Source.read`."""
        try:
            self._plain = connect(self._url)
            same_server(self._plain, self._config, log)
            if log.note("copied") is None:
                yield from self._copy(log)
            else:
                self._say_what_is_new(log)
            check_resumable(self._plain, self._config, log)
            try:
                yield from self._follow(log, streaming=True)
            except StreamingFailed as error:
                logger.warning("%s; large transactions are now awaited as a whole", error)
                yield from self._follow(log, streaming=False)
        except (psycopg.OperationalError, psycopg.InterfaceError) as error:
            raise broke_off(self._url, error) from error
        finally:
            self.close()

    def confirm(self, through: Position) -> None:
        """See `Source.confirm`."""
        self._confirmed = max(self._confirmed, through.commit)

    def head(self) -> int:
        """Return an LSN that every change committed until now lies before, and make sure that the
        stream will pass it: a logical message is written behind it."""
        with connect(self._url) as db:
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

    def _say_what_is_new(self, log: Log) -> None:
        """Name tables that the patterns select but that are not captured."""
        selected = select_tables(self._config.tables, list_tables(self._catalog()))
        if new := [str(table) for table in selected if table not in log.schemas()]:
            logger.warning("not captured, since made after the copy: %s", ", ".join(new))

    def _copy(self, log: Log) -> Iterator[Sequence[Entry]]:
        """Create publication and slot, then copy every table under the slot's own snapshot."""
        db = self._catalog()
        tables = chosen_tables(db, self._config)
        publish(db, self._config, tables)
        drop_unfinished(db, self._config, log)
        log.set_note("slot", self._config.slot)
        with connect_replication(self._url) as holder, connect_bulk(self._url) as bulk:
            point, snapshot = create_slot(holder, self._config)
            with bulk.cursor() as cursor:
                cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                cursor.execute(f"SET TRANSACTION SNAPSHOT '{snapshot}'")
            known = log.schemas()
            shapes = [_next_version(shape, known) for shape in capturable_shapes(db, self._config, tables)]
            logger.info("copy of %d tables begins at %s", len(shapes), format_lsn(point))
            yield from copy_tables(bulk, shapes, point)
        log.set_note("copied", str(point))
        logger.info("copy is complete")

    def _follow(self, log: Log, *, streaming: bool) -> Iterator[Iterable[Entry]]:
        position = log.position()
        after = position.commit if position else 0
        self._confirmed = after
        stream = self._stream = Stream(self._config, after, streaming=streaming)
        space = SpoolSpace(self.name, self._spool, self._config.spool_max)
        builder = GroupBuilder(log.schemas(), self._catalog(), space)
        assembler = Assembler(self._config, builder, space, self._max_bytes, self._linger, after)
        beat = _Every(self._config.heartbeat)
        breath = _Every(_YIELD_EVERY)
        try:
            while True:
                more, asked = assembler.pump(stream)
                yield from assembler.groups()
                if asked:
                    stream.report(self._confirmed)
                if beat.due():
                    _emit(self._catalog(), "heartbeat")
                if not more or breath.due():
                    yield ()
                    stream.report(self._confirmed, always=False)
                if not more:
                    stream.wait(assembler.pause(_IDLE))
        finally:
            stream.close()
            space.close()


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
