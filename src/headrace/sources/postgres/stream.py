"""One replication connection: START_REPLICATION, messages in, reports out."""

from __future__ import annotations

import select
import struct
import threading
import time

import psycopg
from psycopg import pq

from headrace.config import SourceConfig
from headrace.errors import HeadraceError, SourceUnavailable, UserError
from headrace.keys import literal
from headrace.sources.postgres.catalog import quoted
from headrace.sources.postgres.connection import connect_replication, place, without_password
from headrace.sources.postgres.identity import identify
from headrace.sources.postgres.lsn import format_lsn
from headrace.sources.postgres.pgoutput import Decoder
from headrace.sources.postgres.slot import replication_error

_PUMP_MESSAGES = 20_000
_STATUS = struct.Struct(">cqqqqb")
_LSN = struct.Struct(">q")
_EPOCH_2000 = 946_684_800
_REPORT_EVERY = 10.0
_REPORTS_PER_TIMEOUT = 4


class StreamingFailed(SourceUnavailable):
    """The server could not decode a transaction that it streamed; it may well when it has committed.

    While a transaction runs, a server knows only some of its changes to the catalog. One case that every
    version up to 18 fails at: a table is altered, that is rolled back to a savepoint, more rows come, and
    the table is altered again ("could not map filenumber … to relation OID").
    """


def stream_options(config: SourceConfig, server_version: int, *, streaming: bool) -> str:
    """Return pgoutput's options for the newest protocol that a server speaks; `server_version` as libpq
    gives it (160004).

    Streaming is on and not parallel: blocks of one transaction at a time, and nothing more is said of
    an abort. `two_phase` is left off, so that a prepared transaction comes whole when it commits.
    Raises UserError for a setting that the server does not know.
    """
    major = server_version // 10_000
    options = [
        f"proto_version '{4 if major >= 16 else 3 if major == 15 else 2}'",
        f"publication_names {literal(quoted(config.publication))}",
        "messages 'true'",
        f"streaming '{'on' if streaming else 'off'}'",
    ]
    if (origin := origin_option(config, server_version)) is not None:
        options.append(f"origin '{origin}'")
    return ", ".join(options)


def origin_option(config: SourceConfig, server_version: int) -> str | None:
    """Return the value of pgoutput's option `origin`, None for a server that has no such option.

    Raises UserError where the settings need it all the same.
    """
    major = server_version // 10_000
    if major >= 16:
        return config.origin
    if config.origin != "any":
        raise UserError(
            f'Source {config.name}: origin = "{config.origin}" needs Postgres 16, the server is {major}.',
            f"Leave origin out of [source.{config.name}], or use a newer server.",
        )
    return None


class Stream:
    """The slot's changes as they are committed, from LSN `after` on; 0 is where the slot stands.

    `system` and `timeline` say which server sends them, `backend` is the pid of its process, `heard` the
    LSN up to which it says it has sent everything, when it last said so.

    A thread repeats the last report, so that the server does not end a connection whose owner is busy:
    a large transaction may take longer to append than `wal_sender_timeout`.

    Raises SourceUnavailable from every method when the connection breaks.
    """

    def __init__(self, config: SourceConfig, after: int, *, streaming: bool = True) -> None:
        """`streaming` has large transactions sent before they commit. Raises what `connect` raises, and
        UserError where the server refuses."""
        self._config = config
        self._streaming = streaming
        self._url = config.url.reveal()
        self._reported = after
        self._connection = connect_replication(self._url)
        self._lock = threading.Lock()  # a libpq connection serves one thread at a time
        self._closed = threading.Event()
        try:
            self.system, self.timeline, _ = identify(self._connection)
            pid = self._connection.pgconn.exec_(b"SELECT pg_backend_pid()").get_value(0, 0)
            self.backend = int(pid or 0)
            self.heard = 0
            pause = self._report_pause()
            self._start(after)
        except BaseException:
            self._connection.close()
            raise
        self._reporter = threading.Thread(
            target=self._keep_reporting, args=(pause,), name=f"{config.name}.report", daemon=True
        )
        self._reporter.start()

    def pump(self, decoder: Decoder, max_bytes: int) -> tuple[bool, bool]:
        """Decode what has arrived, until `decoder` holds `max_bytes` or is to replay a transaction; returns
        whether there is more, and whether the server asked for a report."""
        pgconn, asked = self._connection.pgconn, False
        with self._lock:
            pgconn.consume_input()
            for _ in range(_PUMP_MESSAGES):
                size, data = pgconn.get_copy_data(1)
                if size == 0:
                    return False, asked
                if size < 0:
                    raise self._end(size)
                if data[0] == b"w"[0]:
                    if decoder.push_data(data) or decoder.pending_bytes >= max_bytes:
                        break
                elif data[0] == b"k"[0]:
                    asked |= bool(data[17])
                    self.heard = _LSN.unpack_from(data, 1)[0]
        return True, asked

    def wait(self, seconds: float) -> None:
        """Wait until something arrives, at most so long."""
        select.select([self._connection.pgconn.socket], [], [], seconds)

    def report(self, confirmed: int, *, always: bool = True) -> None:
        """Tell the server what is durable here, and nothing beyond it; only if it moved unless `always`."""
        if confirmed <= self._reported and not always:
            return
        with self._lock:
            self._reported = max(self._reported, confirmed)
            self._send_report()

    def close(self) -> None:
        """End the connection; the slot stays."""
        self._closed.set()
        self._reporter.join()
        self._connection.close()

    def _start(self, after: int) -> None:
        version = self._connection.pgconn.server_version
        options = stream_options(self._config, version, streaming=self._streaming)
        command = (
            f"START_REPLICATION SLOT {quoted(self._config.slot)} LOGICAL {format_lsn(after)} ({options})"
        )
        result = self._connection.pgconn.exec_(command.encode())
        if result.status != pq.ExecStatus.COPY_BOTH:
            raise replication_error(result, f"Source {self._config.name}: the stream cannot start")

    def _report_pause(self) -> float:
        """Return how many seconds may lie between two reports."""
        row = self._connection.execute(
            "SELECT setting::bigint FROM pg_settings WHERE name = 'wal_sender_timeout'"
        ).fetchone()
        timeout = int(str(row[0])) / 1000 if row else 0.0
        return min(_REPORT_EVERY, timeout / _REPORTS_PER_TIMEOUT) if timeout else _REPORT_EVERY

    def _keep_reporting(self, pause: float) -> None:
        while not self._closed.wait(pause):
            with self._lock:
                try:
                    self._send_report()
                except psycopg.Error:  # the owner meets it at its next call
                    return

    def _send_report(self) -> None:
        pgconn, at = self._connection.pgconn, self._reported
        now = int((time.time() - _EPOCH_2000) * 1_000_000)
        pgconn.put_copy_data(_STATUS.pack(b"r", at, at, at, now, 0))
        pgconn.flush()

    def _end(self, size: int) -> HeadraceError:
        pgconn = self._connection.pgconn
        words, state = pgconn.error_message.decode(errors="replace").strip(), ""
        if size == -1 and (result := pgconn.get_result()):
            words = result.error_message.decode(errors="replace").strip()
            state = (result.error_field(pq.DiagnosticField.SQLSTATE) or b"").decode()
        text = f"{place(self._url)} ended the stream: {without_password(words) or 'no reason given'}"
        internal = state.startswith("XX")
        return StreamingFailed(text) if self._streaming and internal else SourceUnavailable(text)
