"""Reports that go out in time, whatever the reader of the stream is busy with.

The server ends a stream that is silent for wal_sender_timeout, and the reader is silent while the log's
disk is slow. So a thread of its own repeats the last report. It says nothing new: what is confirmed is the
reader's to tell.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import psycopg
from psycopg import pq

_P = ParamSpec("_P")
_R = TypeVar("_R")

_PER_TIMEOUT = 3  # the server asks at half of its timeout; we are there before


class TakesTurns(Protocol):
    """An object that one thread at a time may use."""

    turn: threading.Lock


_T = TypeVar("_T", bound=TakesTurns)


def in_turn(method: Callable[Concatenate[_T, _P], _R]) -> Callable[Concatenate[_T, _P], _R]:
    """Let a method wait for the object's turn: libpq's connections are for one thread at a time."""

    @wraps(method)
    def alone(self: _T, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with self.turn:
            return method(self, *args, **kwargs)

    return alone


class Keepalive:
    """Calls `report` at a third of the server's wal_sender_timeout until closed, in a thread.

    `report` is called while the reader may be anywhere, so it must take its turn; when it fails the thread
    ends, since the reader meets the broken connection by itself.
    """

    def __init__(self, timeout: float, report: Callable[[], None]) -> None:
        """`timeout` is the server's, in seconds; at 0, which means none, nothing is ever sent."""
        self._report = report
        self._interval = timeout / _PER_TIMEOUT
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keepalive", daemon=True)
        if timeout:
            self._thread.start()

    def close(self) -> None:
        """End the thread; no report is under way when this returns."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(self._interval):
            try:
                self._report()
            except psycopg.Error:
                return


def sender_timeout(pgconn: pq.abc.PGconn) -> float:
    """Ask a replication connection for its wal_sender_timeout; seconds, 0 for none."""
    result = pgconn.exec_(b"SELECT setting FROM pg_settings WHERE name = 'wal_sender_timeout'")
    value = result.get_value(0, 0) if result.ntuples else None
    return int(value) / 1000 if value else 0.0
