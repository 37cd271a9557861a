"""Far behind, a slot is read in bulk: its changes as the result of a query, not as a stream.

`pg_logical_slot_peek_binary_changes` decodes on the server without a word to the network for each
record, and its rows come in batches. Its price: the server keeps the whole result until it is read,
and each call decodes again from the slot's `restart_lsn`. `plan` weighs both.

A peek moves nothing. What it gave is confirmed by `pg_replication_slot_advance`, once it is durable.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import adbc_driver_postgresql.dbapi as adbc
import numpy as np
import pyarrow as pa

from headrace.change import Entry
from headrace.config import SourceConfig
from headrace.errors import SourceUnavailable
from headrace.keys import literal
from headrace.sources.postgres.assembly import whole
from headrace.sources.postgres.catalog import Connection, quoted
from headrace.sources.postgres.connection import connect_bulk, place, without_password
from headrace.sources.postgres.groups import GroupBuilder
from headrace.sources.postgres.lsn import format_lsn, parse_lsn
from headrace.sources.postgres.pgoutput import Decoder
from headrace.sources.postgres.stream import origin_option

logger = logging.getLogger("headrace.capture")

WORTHWHILE = 32 << 20
"""Bytes of WAL behind, from which on a peek is quicker by more than a switch of reading costs."""

FIRST_CHUNK = 64 << 20
"""Bytes of WAL for the first peek: how large a result its WAL gives is not known before, and what it gave
is staged and applied while the server prepares the next."""

SWITCH = 128 << 20
"""Bytes of WAL behind, from which on a running stream is given up for peeks."""

UNMEASURED = 2.0
"""Result bytes per byte of WAL, until a chunk has told."""

_MARGIN = 1.5  # on the ratio that was measured: the next chunk's rows may be others
_ROW_OVERHEAD = 44  # what a row of the result weighs on the server beside its data
_WORK_MEM = 64 << 20
_RELEASED_WITHIN = 10.0  # seconds for the server to let go of a slot whose stream was closed
_POLL = 0.25
_GROWTH = 4  # of the ratio, when a result was larger than the server allows
_TOO_LARGE = "temp_file_limit"  # in the server's words, in every language

_NOTHING = pa.record_batch([pa.array([], pa.binary())] * 2, ["data", "lsn"])

_STANDING = """
SELECT s.restart_lsn::text, s.confirmed_flush_lsn::text, pg_current_wal_flush_lsn()::text, s.active
FROM pg_replication_slots s
WHERE s.slot_name = %s AND s.plugin = 'pgoutput' AND s.database = current_database()
  AND s.confirmed_flush_lsn IS NOT NULL AND s.restart_lsn IS NOT NULL AND NOT pg_is_in_recovery()
"""
_MAY_SNAPSHOT = """
SELECT has_function_privilege(oid, 'EXECUTE') FROM pg_proc
WHERE proname = 'pg_log_standby_snapshot' AND pronamespace = 'pg_catalog'::regnamespace
"""
PEEK_FUNCTIONS = (
    "pg_logical_slot_peek_binary_changes(name, pg_lsn, integer, text[])",
    "pg_replication_slot_advance(name, pg_lsn)",
)
CAN_PEEK = "SELECT " + " AND ".join(
    f"has_function_privilege('{function}', 'EXECUTE')" for function in PEEK_FUNCTIONS
)


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a slot stands and where the server's WAL ends, as LSNs. Reading begins at `restart`, which
    moves only at records of running transactions and never past the oldest open transaction."""

    restart: int
    confirmed: int
    end: int


def plan(
    standing: Standing, temp_max: int, ratio: float | None, *, in_vain: int = 0, held: bool = False
) -> int | None:
    """Return the LSN up to which the next peek should read, or None where streaming is better.

    `temp_max` is how many bytes a result may take on the server, `ratio` how many a byte of WAL was
    seen to give (None: not seen yet), `in_vain` the length of a peek from here that gave nothing,
    `held` says that the server itself fails what is larger than `temp_max`.

    No more is decoded again for a chunk than twice its length, so that all peeks together decode at
    most three times what there is. Unless the bound is held, all WAL from `restart` counts as giving rows:
    a transaction that commits in the chunk may have written them anywhere there.
    """
    behind = standing.end - standing.confirmed
    again = standing.confirmed - standing.restart
    room = int(temp_max / (ratio or UNMEASURED))
    chunk = min(behind, room if held else room - again)
    if ratio is None and not (held and (in_vain or behind < 2 * FIRST_CHUNK)):
        chunk = min(chunk, max(FIRST_CHUNK, again, 8 * in_vain))
    return standing.confirmed + chunk if chunk >= max(WORTHWHILE, again // 2, 2 * in_vain) else None


class Bulk:
    """Reads a slot by peeks, as long as that is the faster way. Nobody may stream from the slot meanwhile;
    one that the server has not released yet is waited for."""

    def __init__(self, config: SourceConfig, max_bytes: int) -> None:
        """`max_bytes` bounds what is decoded before it becomes a group."""
        self._config = config
        self._url = config.url.reveal()
        self._max_bytes = max_bytes
        self._temp_max = config.peek_temp_max
        self._ratio: float | None = None
        self._usable = config.peek_temp_max > 0
        self._held = False  # whether the server enforces `_temp_max`
        self._origin: str | None = None  # the value of pgoutput's option, where the server has it
        self._vain = (0, 0)  # where the last peek that gave nothing began, and how long it was

    def worthwhile(self, db: Connection, durable: int) -> bool:
        """Whether a stream that has brought the log to LSN `durable` should be given up for `read`."""
        return self._beyond(db, durable, SWITCH)

    def read(
        self, db: Connection, builder: GroupBuilder, durable: Callable[[], int]
    ) -> Generator[Iterable[Entry]]:
        """Yield groups of whole transactions beyond `durable()` until streaming is the better way.

        `durable` tells the commit up to which the log is durable; it must have moved when the iterator
        is asked for more than a group. A group is to be taken to its end: that of a large transaction is
        made meanwhile. Yields an empty group at least twice a second while the server prepares a result.
        What the server refuses is logged, and left to the stream.

        Raises SourceUnavailable when the connection breaks, UserError for a setting that the server does
        not know.
        """
        self._origin = origin_option(self._config, db.info.server_version)
        if not self._may_peek(db) or not self._beyond(db, durable(), WORTHWHILE):
            return
        yield from self._released(db)
        self._mark_head(db)
        with connect_bulk(self._url) as connection:
            self._prepare(connection)
            decoder = Decoder(max_batch_bytes=self._max_bytes)
            try:
                while True:
                    yield from self._confirm(db, connection, durable())
                    if (upto := self._next(db, durable())) is None:
                        return
                    try:
                        yield from self._chunk(connection, decoder, builder, durable, upto)
                    except _TooLarge:
                        self._ratio = _GROWTH * (self._ratio or UNMEASURED)
            except _QueryFailed as error:
                if not _answers(connection):
                    raise self._broke_off(error) from error
                self._give_up(str(error))

    def _broke_off(self, error: Exception) -> SourceUnavailable:
        return SourceUnavailable(f"{place(self._url)} broke off: {_words(error)}")

    def _may_peek(self, db: Connection) -> bool:
        row = db.execute(CAN_PEEK).fetchone()
        if self._usable and (row is None or not row[0]):
            self._give_up("its role may not execute pg_logical_slot_peek_binary_changes")
        return self._usable

    def _mark_head(self, db: Connection) -> None:
        """Give the slot's `restart_lsn` a place to move to: a record of running transactions, where we may
        write one, and a commit behind it. Without, the stream that follows would decode all of the last
        chunk again before it sends anything."""
        row = db.execute(_MAY_SNAPSHOT).fetchone()
        if row and row[0]:
            db.execute("SELECT pg_log_standby_snapshot()")
        with db.transaction():
            db.execute("SET LOCAL synchronous_commit = 'local'")  # a peek reads what is flushed
            db.execute("SELECT pg_logical_emit_message(true, 'headrace', 'heartbeat')")

    def _standing(self, db: Connection) -> Standing | None:
        row = db.execute(_STANDING, [self._config.slot]).fetchone() if self._usable else None
        return Standing(*(parse_lsn(str(lsn)) for lsn in row[:3])) if row else None

    def _released(self, db: Connection) -> Iterator[Iterable[Entry]]:
        """Wait until nobody holds the slot."""
        deadline = time.monotonic() + _RELEASED_WITHIN
        while (row := db.execute(_STANDING, [self._config.slot]).fetchone()) and row[3]:
            if time.monotonic() > deadline:
                raise SourceUnavailable(f"The slot {self._config.slot} is still held by another reader.")
            yield ()
            time.sleep(_POLL / 5)

    def _beyond(self, db: Connection, durable: int, least: int) -> bool:
        """Whether there are `least` bytes of WAL after `durable`, and a peek would be planned there."""
        standing = self._standing(db)
        if standing is None or standing.end - durable < least:
            return False
        return self._plan(replace(standing, confirmed=max(standing.confirmed, durable))) is not None

    def _confirm(self, db: Connection, connection: Any, durable: int) -> Iterator[Iterable[Entry]]:
        """Let the slot follow the log, which moves its `restart_lsn` too; the server decodes to do so."""
        standing = self._standing(db)
        if standing is not None and standing.confirmed < durable:
            slot, lsn = literal(self._config.slot), literal(format_lsn(durable))
            with _Query(
                connection, f"SELECT pg_replication_slot_advance({slot}, {lsn})::text::bytea"
            ) as query:
                for _ in query.batches():
                    yield ()

    def _next(self, db: Connection, durable: int) -> int | None:
        """Plan the next peek from where the slot stands, which is where the log ends."""
        standing = self._standing(db)
        return self._plan(standing) if standing is not None and standing.confirmed == durable else None

    def _plan(self, standing: Standing) -> int | None:
        begin, length = self._vain
        in_vain = length if begin == standing.confirmed else 0
        return plan(standing, self._temp_max, self._ratio, in_vain=in_vain, held=self._held)

    def _prepare(self, connection: Any) -> None:
        """Set what the session may set; where it may not, the server's own values hold."""
        try:
            with connection.cursor() as cursor:
                cursor.execute("SELECT setting::int8 << 10 FROM pg_settings WHERE name = 'temp_file_limit'")
                (limit,) = cursor.fetchone()
        except (adbc.Error, OSError) as error:
            raise self._broke_off(error) from error
        if limit >= 0:
            self._temp_max = min(self._temp_max, limit)
        self._held = self._set(connection, "temp_file_limit", _kilobytes(self._temp_max)) or limit >= 0
        self._set(connection, "work_mem", _kilobytes(min(_WORK_MEM, self._temp_max)))
        self._set(connection, "logical_decoding_work_mem", _kilobytes(max(_WORK_MEM, self._temp_max // 2)))
        self._set(connection, "client_connection_check_interval", "1s")

    def _set(self, connection: Any, name: str, value: str) -> bool:
        """Set one of the session's settings; say whether the server took it."""
        try:
            with connection.cursor() as cursor:
                cursor.execute(f"SET {name} = '{value}'")
            connection.commit()
        except adbc.Error as error:
            if not _answers(connection):
                raise self._broke_off(error) from error
            return False
        return True

    def _chunk(
        self,
        connection: Any,
        decoder: Decoder,
        builder: GroupBuilder,
        durable: Callable[[], int],
        upto: int,
    ) -> Iterator[Iterable[Entry]]:
        begin, after, rows, size = time.monotonic(), durable(), 0, 0
        with _Query(connection, self._peek(upto)) as query:
            for batch in query.batches():
                messages, lsns = batch.column(0), _lsns(batch.column(1))
                at, count = 0, len(messages)
                rows, size = rows + count, size + messages.nbytes
                del batch
                while at < count:
                    at = decoder.push_many(messages, lsns, at, self._max_bytes)
                    if at == count:
                        del messages  # before a group is made of them: one may hold a very large value
                    if decoder.pending_bytes >= self._max_bytes:
                        yield from whole(self._url, builder.build(*decoder.take(), after))
                yield ()
        yield from whole(self._url, builder.build(*decoder.take(), after))
        self._vain = (after, upto - after) if durable() == after else (0, 0)
        if rows:
            self._ratio = max(1.0, _MARGIN * (size + _ROW_OVERHEAD * rows) / (upto - after))
        logger.info(
            "read in bulk: %d MiB of WAL, %d messages, %.1f s",
            (upto - after) >> 20,
            rows,
            time.monotonic() - begin,
        )

    def _peek(self, upto: int) -> str:
        options = {
            "proto_version": "1",
            "publication_names": quoted(self._config.publication),
            "messages": "true",
        }
        if self._origin is not None:
            options["origin"] = self._origin
        listed = ", ".join(literal(text) for option in options.items() for text in option)
        return (
            "SELECT data, lsn FROM pg_logical_slot_peek_binary_changes("
            f"{literal(self._config.slot)}, {literal(format_lsn(upto))}, NULL, VARIADIC ARRAY[{listed}])"
        )

    def _give_up(self, reason: str) -> None:
        self._usable = False
        logger.info("source %s is read by streaming alone: %s", self._config.name, " ".join(reason.split()))


class _Query:
    """One query on a thread of its own, so that its reader can stop while the server is at work, and decode
    while more comes. At most two batches wait."""

    def __init__(self, connection: Any, query: str) -> None:
        self._connection = connection
        self._cursor = connection.cursor()
        self._query = query
        self._ready: queue.Queue[pa.RecordBatch | Exception | None] = queue.Queue(maxsize=2)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="query", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the query, where it runs still, and its transaction, so that it holds back no vacuum."""
        self._closed.set()
        while self._thread.is_alive():
            with contextlib.suppress(adbc.Error):
                self._cursor.adbc_cancel()
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=_POLL)
        with contextlib.suppress(adbc.Error):
            self._cursor.close()
            self._connection.rollback()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the rows as they come, and an empty batch whenever nothing came for a while."""
        while True:
            item = self._next()
            if item is None:
                return
            if isinstance(item, Exception):
                words = _words(item)
                raise (_TooLarge if _TOO_LARGE in words else _QueryFailed)(words) from item
            held = [item]
            del item
            yield held.pop()

    def _next(self) -> pa.RecordBatch | Exception | None:
        with contextlib.suppress(queue.Empty):
            return self._ready.get(timeout=_POLL)
        return _NOTHING

    def _run(self) -> None:
        try:
            self._cursor.execute(self._query)
            for batch in self._cursor.fetch_record_batch():
                self._put(batch)
                del batch
                if self._closed.is_set():
                    return
            self._put(None)
        except Exception as error:
            self._put(error)

    def _put(self, item: pa.RecordBatch | Exception | None) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(item, timeout=_POLL)
                return


class _QueryFailed(Exception):
    """The server did not carry a query out; says why in its words."""


class _TooLarge(_QueryFailed):
    """A result is larger than the server's `temp_file_limit` allows; nothing of it was seen."""


def _answers(connection: Any) -> bool:
    """Whether a connection, on which something failed, is there still; its transaction is rolled back.

    An error that comes in the middle of a result has lost its SQLSTATE: the connection itself is asked.
    """
    try:
        connection.rollback()
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
            cursor.fetchone()
        connection.rollback()  # that was a transaction too
    except (adbc.Error, OSError):
        return False
    return True


def _lsns(column: pa.Array) -> np.ndarray:
    """Return LSNs, eight bytes each as the server sends them, as integers."""
    if isinstance(column, pa.ExtensionArray):  # a type that the driver does not know, as the server sends it
        column = column.storage
    if not pa.types.is_binary(column.type):
        raise TypeError(f"LSNs come as binary, not as {column.type}")
    _, offsets, data = column.buffers()
    if not len(column):
        return np.empty(0, np.int64)
    first = np.frombuffer(offsets, np.int32)[column.offset]
    return np.frombuffer(data, ">i8", len(column), first).astype(np.int64)


def _kilobytes(size: int) -> str:
    return f"{size >> 10}kB"


def _words(error: Exception) -> str:
    return " ".join(without_password(str(error)).split()) or type(error).__name__
