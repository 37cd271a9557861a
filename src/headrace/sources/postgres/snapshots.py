"""Snapshots for copies: one exact position, shared by many short transactions.

Only a replication slot gives a snapshot together with the position in the WAL that it stands for. A
holder transaction adopts that snapshot and exports it again for as long as it lives; it reads nothing
and locks nothing. Since vacuum keeps every row that a snapshot may still see, a holder lives for
`max_age` at most, then another takes its place, at a later position.
"""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

import psycopg

from headrace.errors import SourceUnavailable
from headrace.sources.postgres.catalog import Connection
from headrace.sources.postgres.connection import connect, connect_replication, without_password
from headrace.sources.postgres.lsn import parse_lsn


class Snapshot(NamedTuple):
    """A snapshot that can be adopted: its `number` counts the holders of this process, `commit` is the
    position that it stands for (every transaction up to there, and no other, is in it)."""

    number: int
    commit: int
    name: str


class Snapshots:
    """Gives copies the snapshot to read under."""

    def __init__(self, url: str, max_age: float) -> None:
        """`max_age` in seconds."""
        self._url = url
        self._max_age = max_age
        self._lock = threading.Lock()
        self._holder: Connection | None = None
        self._current = Snapshot(0, 0, "")
        self._since = 0.0

    @property
    def number(self) -> int:
        """The number of the newest holder."""
        return self._current.number

    def adopt(self, commit: int, name: str) -> None:
        """Hold a snapshot that a slot has just exported, before its connection does anything else."""
        with self._lock:
            self._hold(commit, name)

    def current(self, at_least: int) -> Snapshot:
        """Return a snapshot that is not older than `max_age`, of holder number `at_least` or later.

        Raises SourceUnavailable when no temporary slot can be made.
        """
        with self._lock:
            self._expire()
            if self._holder is None or self._current.number < at_least:
                self._renew()
            return self._current

    def expire(self) -> None:
        """Let go of a holder that has grown too old."""
        with self._lock:
            self._expire()

    def release(self) -> None:
        """Let go of the holder: nothing is left to copy."""
        with self._lock:
            self._drop()

    def _expire(self) -> None:
        if self._holder is not None and time.monotonic() - self._since > self._max_age:
            self._drop()

    def _drop(self) -> None:
        if self._holder is not None:
            self._holder.close()
            self._holder = None

    def _renew(self) -> None:
        with connect_replication(self._url) as maker:
            self._hold(*export_snapshot(maker, "headrace_copy", "the copy"))

    def _hold(self, commit: int, name: str) -> None:
        self._drop()
        holder = connect(self._url)
        try:
            holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            holder.execute(f"SET TRANSACTION SNAPSHOT '{name}'".encode())
            row = holder.execute("SELECT pg_export_snapshot()").fetchone()
        except psycopg.Error:
            holder.close()
            raise
        assert row is not None
        self._holder, self._since = holder, time.monotonic()
        self._current = Snapshot(self._current.number + 1, commit, str(row[0]))


def export_snapshot(maker: Connection, prefix: str, what: str) -> tuple[int, str]:
    """Make a temporary slot on a replication connection; return its position and the name of the
    snapshot that it exports, both for as long as the connection does nothing else.

    Raises SourceUnavailable, which says for `what` it was.
    """
    slot = f"{prefix}_{maker.pgconn.backend_pid}"
    command = f"CREATE_REPLICATION_SLOT {slot} TEMPORARY LOGICAL pgoutput (SNAPSHOT 'export')"
    result = maker.pgconn.exec_(command.encode())
    point, name = (result.get_value(0, i) for i in (1, 2)) if result.ntuples else (None, None)
    if point is None or name is None:
        words = without_password((result.error_message or b"").decode(errors="replace")).strip()
        raise SourceUnavailable(
            f"No temporary slot can be made for {what}: {words}", "Raise max_replication_slots."
        )
    return parse_lsn(point.decode()), name.decode()
