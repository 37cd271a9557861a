"""The connection that copies read on: each time in one transaction, under a snapshot that is shared."""

from __future__ import annotations

import socket
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress

import psycopg
import pyarrow as pa

from headrace.sources.postgres.catalog import Connection
from headrace.sources.postgres.connection import connect_copy
from headrace.sources.postgres.copyout import copy_out


class Reader:
    """Reads tables. Belongs to one thread, but for `interrupt`; connects when it is first needed, and
    again after a read that was left in its middle."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._db: Connection | None = None
        self._socket: socket.socket | None = None  # the connection's, by a descriptor of our own
        self._lock = threading.Lock()  # of _socket

    @property
    def is_lost(self) -> bool:
        """Whether the server, or what is between, has ended the connection."""
        return self._db is not None and self._db.broken

    @contextmanager
    def under(self, snapshot: str, **settings: str) -> Iterator[Connection]:
        """Hold a transaction that sees what the exported snapshot of that name does, with `settings` of the
        server; it is rolled back in the end.

        Raises SourceUnavailable and psycopg.Error.
        """
        db = self._opened()
        begin = ["BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY", f"SET TRANSACTION SNAPSHOT '{snapshot}'"]
        begin += [f"SET LOCAL {name} = '{value}'" for name, value in settings.items()]
        try:
            db.execute("; ".join(begin).encode())
            yield db
        finally:
            with suppress(psycopg.Error):  # a connection that is lost says so: is_lost
                db.rollback()

    def rows(self, query: str, names: Sequence[str]) -> Generator[pa.RecordBatch]:
        """Yield the rows of a query within `under`; see `copy_out`."""
        assert self._db is not None
        return copy_out(self._db, query, names)

    def interrupt(self) -> None:
        """Break off what another thread waits for the server for: to it the connection is lost."""
        with self._lock, suppress(OSError):
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None
        if self._db is not None:
            self._db.close()
            self._db = None

    def _opened(self) -> Connection:
        if self._db is None or self._db.closed:
            self.close()
            db = self._db = connect_copy(self._url)
            with self._lock:
                self._socket = socket.socket(fileno=socket.dup(db.fileno()))
        return self._db
