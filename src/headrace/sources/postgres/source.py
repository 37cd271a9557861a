"""Postgres as a source: slot, copy, stream.

Facts that outlive the process are notes in the log: `system` (the server's identity), `slot` (its
name, written before it is created), `copied` (its consistent point, once the copy is in the log).
"""

from __future__ import annotations

import logging
import select
import struct
import time
from collections.abc import Iterable, Iterator, Sequence

import psycopg
from psycopg import pq

from headrace.change import RESERVED, Entry, Position, TableId, TableSchema
from headrace.config import SourceConfig, select_tables
from headrace.errors import HeadraceError, SourceGap, SourceUnavailable, UserError
from headrace.protocols import Log
from headrace.sources.postgres.catalog import Connection, list_tables, qualified, quoted, read_shapes
from headrace.sources.postgres.connection import (
    connect,
    connect_bulk,
    connect_replication,
    place,
    without_password,
)
from headrace.sources.postgres.copy import copy_tables
from headrace.sources.postgres.groups import GroupBuilder
from headrace.sources.postgres.pgoutput import Decoder

logger = logging.getLogger("headrace.capture")

_IDLE = 0.2
_FEEDBACK_EVERY = 10.0
_PUMP_MESSAGES = 20_000
_XLOG_HEADER = 25
_KEEPALIVE = struct.Struct(">cqqb")
_STATUS = struct.Struct(">cqqqqb")
_EPOCH_2000 = 946_684_800


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
        self._stream: psycopg.Connection[tuple[object, ...]] | None = None
        self._plain: Connection | None = None

    def read(self, log: Log) -> Iterator[Iterable[Entry]]:
        """See `Source.read`."""
        try:
            self._plain = connect(self._url)
            self._same_server(log)
            if log.note("copied") is None:
                yield from self._copy(log)
            else:
                self._say_what_is_new(log)
            self._slot_can_resume(log)
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

    def _same_server(self, log: Log) -> None:
        row = self._catalog().execute("SELECT system_identifier::text FROM pg_control_system()").fetchone()
        found = str(row[0]) if row else ""
        known = log.note("system")
        if known is None:
            log.set_note("system", found)
        elif known != found:
            raise UserError(
                f"{place(self._url)} is another server than the one this state folder was filled from "
                f"(system identifier {found}, not {known}).",
                "Point the url at the original server, or start with an empty project folder.",
            )

    def _say_what_is_new(self, log: Log) -> None:
        """Name tables that the patterns select but that are not captured."""
        selected = select_tables(self._config.tables, list_tables(self._catalog()))
        if new := [str(table) for table in selected if table not in log.schemas()]:
            logger.warning("not captured, since made after the copy: %s", ", ".join(new))

    def _copy(self, log: Log) -> Iterator[Sequence[Entry]]:
        """Create publication and slot, then copy every table under the slot's own snapshot."""
        db = self._catalog()
        tables = self._tables(db)
        self._publish(db, tables)
        self._drop_unfinished(db, log)
        log.set_note("slot", self._config.slot)
        with connect_replication(self._url) as holder, connect_bulk(self._url) as bulk:
            point, snapshot = self._create_slot(holder)
            with bulk.cursor() as cursor:
                cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                cursor.execute(f"SET TRANSACTION SNAPSHOT '{snapshot}'")
            known = log.schemas()
            shapes = [_next_version(shape, known) for shape in self._shapes(db, tables)]
            logger.info("copy of %d tables begins at %s", len(shapes), format_lsn(point))
            yield from copy_tables(bulk, shapes, point)
        log.set_note("copied", str(point))
        logger.info("copy is complete")

    def _tables(self, db: Connection) -> list[TableId]:
        tables = list(select_tables(self._config.tables, list_tables(db)))
        if not tables:
            raise UserError(
                f"Source {self.name}: no table of {place(self._url)} matches {list(self._config.tables)}.",
                'Name existing tables in [source] tables, such as "public.orders".',
            )
        return tables

    def _shapes(self, db: Connection, tables: Sequence[TableId]) -> list[TableSchema]:
        shapes = read_shapes(db, tables)
        without = [str(table) for table in tables if not shapes[table].key]
        if without:
            raise UserError(
                f"Source {self.name}: no primary key in {', '.join(without)}: changes of their rows cannot "
                "be told apart, and publishing them would make the application's own UPDATE fail.",
                f"Add one, ALTER TABLE {without[0]} ADD PRIMARY KEY (…); or exclude: tables = "
                f'[…, "!{without[0]}"].',
            )
        for shape in shapes.values():
            taken = [column.name for column in shape.columns if column.name.lower() in RESERVED]
            if taken:
                raise UserError(
                    f"Table {shape.table} has a column called {taken[0]}, a name that Headrace uses itself.",
                    f'Rename it at the source, or exclude the table: "!{shape.table}".',
                )
        return [shapes[table] for table in tables]

    def _publish(self, db: Connection, tables: Sequence[TableId]) -> None:
        """Make the publication, or add what it lacks; never FOR ALL TABLES."""
        self._shapes(db, tables)
        name = quoted(self._config.publication)
        found = db.execute(
            "SELECT pubviaroot, pubinsert AND pubupdate AND pubdelete AND pubtruncate "
            "FROM pg_publication WHERE pubname = %s",
            [self._config.publication],
        ).fetchone()
        if found and not all(found):
            raise UserError(
                f"Source {self.name}: the publication {self._config.publication} leaves changes out.",
                f"Let its owner run: ALTER PUBLICATION {name} SET (publish_via_partition_root = true, "
                "publish = 'insert, update, delete, truncate');",
            )
        has = db.execute(
            "SELECT schemaname, tablename FROM pg_publication_tables WHERE pubname = %s",
            [self._config.publication],
        ).fetchall()
        missing = [table for table in tables if table not in {TableId(*row) for row in has}]
        listed = ", ".join(qualified(table) for table in missing)
        if not found:
            statement = (
                f"CREATE PUBLICATION {name} FOR TABLE {listed} WITH (publish_via_partition_root = true)"
            )
        elif missing:
            statement = f"ALTER PUBLICATION {name} ADD TABLE {listed}"
        else:
            return
        try:
            db.execute(statement.encode())
        except psycopg.errors.InsufficientPrivilege as error:
            raise UserError(
                f"Source {self.name}: the role may not make the publication: {str(error).strip()}.",
                f"Let an owner of the tables run: {statement};",
            ) from error

    def _drop_unfinished(self, db: Connection, log: Log) -> None:
        """Drop the slot of a copy that did not finish; refuse one that is not ours."""
        slot = self._config.slot
        row = db.execute(
            "SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s", [slot]
        ).fetchone()
        if row is None:
            return
        if log.note("slot") != slot:
            raise UserError(
                f"Source {self.name}: the slot {slot} exists already, and not for this state folder.",
                f"Name another in [source.{self.name}] slot, or drop it if nothing needs it: "
                f"SELECT pg_drop_replication_slot('{slot}');",
            )
        try:
            db.execute("SELECT pg_drop_replication_slot(%s)", [slot])
        except psycopg.errors.ObjectInUse as error:
            raise SourceUnavailable(f"The slot {slot} is still held by pid {row[0]}.") from error

    def _create_slot(self, holder: psycopg.Connection[tuple[object, ...]]) -> tuple[int, str]:
        """Create the slot; returns its consistent point and the name of the exported snapshot."""
        slot = quoted(self._config.slot)
        command = f"CREATE_REPLICATION_SLOT {slot} LOGICAL pgoutput (SNAPSHOT 'export')"
        result = holder.pgconn.exec_(command.encode())
        if result.status != pq.ExecStatus.TUPLES_OK:
            raise _replication_error(result, f"Source {self.name}: the slot cannot be created")
        point, snapshot = result.get_value(0, 1), result.get_value(0, 2)
        assert point is not None
        assert snapshot is not None
        return parse_lsn(point.decode()), snapshot.decode()

    def _slot_can_resume(self, log: Log) -> None:
        """Refuse to go on where the slot stands beyond what the log holds: a gap is never skipped."""
        position = log.position()
        durable = position.commit if position else 0
        row = (
            self._catalog()
            .execute(
                "SELECT confirmed_flush_lsn::text, wal_status FROM pg_replication_slots WHERE slot_name = %s",
                [self._config.slot],
            )
            .fetchone()
        )
        remedy = (
            "The changes in between are gone: move the state folder and the destination away and run "
            "again, which copies everything anew."
        )
        if row is None:
            raise SourceGap(f"Source {self.name}: the slot {self._config.slot} is gone.", remedy)
        if row[1] == "lost":
            raise SourceGap(
                f"Source {self.name}: the server has thrown away WAL that the slot {self._config.slot} "
                "needed (max_slot_wal_keep_size).",
                remedy,
            )
        if row[0] and parse_lsn(str(row[0])) > durable:
            raise SourceGap(
                f"Source {self.name}: the slot stands at {row[0]}, the log at {format_lsn(durable)}: "
                "another reader moved it, or the state folder is older than it.",
                remedy,
            )

    def _follow(self, log: Log) -> Iterator[Iterable[Entry]]:
        position = log.position()
        after = position.commit if position else 0
        self._confirmed = after
        self._stream = connect_replication(self._url)
        self._start(self._stream.pgconn, after)
        decoder = Decoder(max_batch_bytes=self._max_bytes)
        builder = GroupBuilder(log.schemas(), self._catalog())
        beat = _Every(self._config.heartbeat)
        feedback = _Every(_FEEDBACK_EVERY)
        collected_since: float | None = None
        try:
            while True:
                more, asked = self._pump(self._stream.pgconn, decoder)
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
                    self._report(self._stream.pgconn)
                if beat.due():
                    _emit(self._catalog(), "heartbeat")
                if not more:
                    yield ()
                    self._report_if_moved(self._stream.pgconn)
                    idle = _IDLE if collected_since is None else max(0.0, self._linger - waited)
                    select.select([self._stream.pgconn.socket], [], [], idle)
        finally:
            builder.close()

    def _start(self, pgconn: pq.abc.PGconn, after: int) -> None:
        publication = self._config.publication.replace("'", "''").replace('"', '""')
        command = (
            f"START_REPLICATION SLOT {quoted(self._config.slot)} LOGICAL {format_lsn(after)} "
            f"(proto_version '1', publication_names '\"{publication}\"', messages 'true')"
        )
        result = pgconn.exec_(command.encode())
        if result.status != pq.ExecStatus.COPY_BOTH:
            raise _replication_error(result, f"Source {self.name}: the stream cannot start")
        self._reported = after

    def _pump(self, pgconn: pq.abc.PGconn, decoder: Decoder) -> tuple[bool, bool]:
        """Decode what has arrived, up to a bound; returns whether there is more, and whether the
        server asked for a report."""
        asked = False
        pgconn.consume_input()
        for _ in range(_PUMP_MESSAGES):
            size, data = pgconn.get_copy_data(1)
            if size == 0:
                return False, asked
            if size < 0:
                raise self._end_of_stream(pgconn, size)
            if data[0] == b"w"[0]:
                decoder.push(data, _XLOG_HEADER)
                if decoder.pending_bytes >= self._max_bytes:
                    break
            elif data[0] == b"k"[0]:
                asked |= bool(data[17])
        return True, asked

    def _end_of_stream(self, pgconn: pq.abc.PGconn, size: int) -> HeadraceError:
        words = pgconn.error_message.decode(errors="replace").strip()
        if size == -1:
            result = pgconn.get_result()
            words = result.error_message.decode(errors="replace").strip() if result else words
        return SourceUnavailable(
            f"{place(self._url)} ended the stream: {without_password(words) or 'no reason given'}"
        )

    def _report_if_moved(self, pgconn: pq.abc.PGconn) -> None:
        if self._confirmed > self._reported:
            self._report(pgconn)

    def _report(self, pgconn: pq.abc.PGconn) -> None:
        """Tell the server what is durable here, and nothing beyond it."""
        now = int((time.time() - _EPOCH_2000) * 1_000_000)
        pgconn.put_copy_data(_STATUS.pack(b"r", self._confirmed, self._confirmed, self._confirmed, now, 0))
        pgconn.flush()
        self._reported = self._confirmed


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


def _replication_error(result: pq.abc.PGresult, what: str) -> HeadraceError:
    words = (result.error_message or b"").decode(errors="replace").strip().removeprefix("ERROR:").strip()
    state = (result.error_field(pq.DiagnosticField.SQLSTATE) or b"").decode()
    if not state or state == "55006" or state[:2] in ("08", "40", "53", "57", "58"):
        return SourceUnavailable(f"{what}: {without_password(words)}", "It is tried again.")
    return UserError(f"{what}: {words}", "Run `headrace check` for what the server lacks.")


def format_lsn(value: int) -> str:
    """Return an LSN as Postgres prints it."""
    return f"{value >> 32:X}/{value & 0xFFFFFFFF:X}"


def parse_lsn(text: str) -> int:
    """Read an LSN as Postgres prints it."""
    high, _, low = text.partition("/")
    return (int(high, 16) << 32) + int(low, 16)
