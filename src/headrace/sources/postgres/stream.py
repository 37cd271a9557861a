"""One replication connection: START_REPLICATION, messages in, reports out."""

from __future__ import annotations

import select
import struct
import threading
import time

from psycopg import pq

from headrace.config import SourceConfig
from headrace.errors import HeadraceError, SourceUnavailable
from headrace.sources.postgres.catalog import quoted
from headrace.sources.postgres.connection import connect_replication, place, without_password
from headrace.sources.postgres.keepalive import Keepalive, in_turn, sender_timeout
from headrace.sources.postgres.lsn import format_lsn
from headrace.sources.postgres.pgoutput import Decoder
from headrace.sources.postgres.slot import replication_error

_PUMP_MESSAGES = 20_000
_XLOG_HEADER = 25
_STATUS = struct.Struct(">cqqqqb")
_LSN = struct.Struct(">q")
_EPOCH_2000 = 946_684_800


class Stream:
    """The slot's changes as they are committed, from LSN `after` on.

    `heard` is the LSN up to which the server says it has sent everything, when it last said so. A thread of
    the stream's own repeats the last report, so that a slow reader does not lose the connection.

    Raises SourceUnavailable from every method when the connection breaks.
    """

    def __init__(self, config: SourceConfig, after: int) -> None:
        self._config = config
        self._url = config.url.reveal()
        self._reported = after
        self.turn = threading.Lock()
        self.heard = 0
        self._connection = connect_replication(self._url)
        try:
            timeout = sender_timeout(self._connection.pgconn)
            self._start(after)
        except BaseException:
            self._connection.close()
            raise
        self._keepalive = Keepalive(timeout, self.repeat)

    @in_turn
    def pump(self, decoder: Decoder, max_bytes: int) -> tuple[bool, bool]:
        """Decode what has arrived, until `decoder` holds `max_bytes`; returns whether there is more, and
        whether the server asked for a report."""
        pgconn, asked = self._connection.pgconn, False
        pgconn.consume_input()
        for _ in range(_PUMP_MESSAGES):
            size, data = pgconn.get_copy_data(1)
            if size == 0:
                return False, asked
            if size < 0:
                raise self._end(size)
            if data[0] == b"w"[0]:
                decoder.push(data, _XLOG_HEADER)
                if decoder.pending_bytes >= max_bytes:
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
        if confirmed > self._reported or always:
            self._send(confirmed)

    def repeat(self) -> None:
        """Say once more what was reported last."""
        self._send(0)

    def close(self) -> None:
        """End the connection; the slot stays."""
        self._keepalive.close()
        self._connection.close()

    @in_turn
    def _send(self, confirmed: int) -> None:
        # Here and not at the caller's: a report that overtook another would take the slot back.
        confirmed = self._reported = max(self._reported, confirmed)
        pgconn = self._connection.pgconn
        now = int((time.time() - _EPOCH_2000) * 1_000_000)
        pgconn.put_copy_data(_STATUS.pack(b"r", confirmed, confirmed, confirmed, now, 0))
        pgconn.flush()

    def _start(self, after: int) -> None:
        publication = self._config.publication.replace("'", "''").replace('"', '""')
        command = (
            f"START_REPLICATION SLOT {quoted(self._config.slot)} LOGICAL {format_lsn(after)} "
            f"(proto_version '1', publication_names '\"{publication}\"', messages 'true')"
        )
        result = self._connection.pgconn.exec_(command.encode())
        if result.status != pq.ExecStatus.COPY_BOTH:
            raise replication_error(result, f"Source {self._config.name}: the stream cannot start")

    def _end(self, size: int) -> HeadraceError:
        pgconn = self._connection.pgconn
        words = pgconn.error_message.decode(errors="replace").strip()
        if size == -1:
            result = pgconn.get_result()
            words = result.error_message.decode(errors="replace").strip() if result else words
        return SourceUnavailable(
            f"{place(self._url)} ended the stream: {without_password(words) or 'no reason given'}"
        )
