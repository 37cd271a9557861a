"""Proof that a server which was away is still the one whose changes the log holds.

A server restored from a copy of its disk keeps system identifier and timeline, and once it has
written more than it lost, no LSN tells the difference: it would resume as if nothing had been, and
what took the place of the lost transactions would be dropped as known. But its slot, as old as the
copy, sends everything behind it again, so the last transaction that the log holds must be among that.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from headrace.config import SourceConfig
from headrace.errors import RESYNC, SourceGap
from headrace.protocols import LogIndex
from headrace.sources.postgres.events import Dated
from headrace.sources.postgres.lsn import format_lsn
from headrace.sources.postgres.slot import durable_commit, epoch_of


class Continuity:
    """Watches what a restarted server sends again until the log's last transaction has come.

    A run of the server in which that was seen is remembered in the note `server_run`; as long as it
    lasts, nothing can be restored under us, and a stream may start at the log's end. Otherwise it is to
    start from wherever the slot stands.
    """

    def __init__(self, config: SourceConfig, log: LogIndex, run: str, confirmed: int) -> None:
        """`run` names this run of the server, `confirmed` is where the slot stands."""
        self._source = config.name
        self._log = log
        self._run = run
        self._durable = durable_commit(log)
        self._committed_at = self._last_commit_time()
        self._open = log.note("server_run") != run
        if self._open and (self._committed_at is None or confirmed >= self._durable):
            self._close()

    @property
    def is_open(self) -> bool:
        """Whether the last transaction of the log has not been seen yet."""
        return self._open

    def confirmable(self, lsn: int) -> int:
        """Return what may be confirmed, and from where a stream may start, where the log holds `lsn`:
        nothing (0) while it is open whether the server still has that, since a slot that has moved up
        would hide the gap."""
        return 0 if self._open else lsn

    def check(self, transactions: Sequence[Dated]) -> None:
        """Look at transactions in the order in which they are sent.

        Raises SourceGap when the stream passes the log's last commit and that transaction was not there.
        """
        if not self._open:
            return
        for transaction in transactions:
            if transaction.commit >= self._durable:
                if (transaction.commit, transaction.committed_at) != (self._durable, self._committed_at):
                    place = f"{format_lsn(transaction.commit)} ({_time(transaction.committed_at)})"
                    raise self._gap(f"goes on with one at {place}")
                self._close()
                return

    def check_heard(self, heard: int) -> None:
        """Look at the LSN up to which the server says it has sent everything, all of which was checked.

        Raises SourceGap when the log's last commit lies before it and that transaction was not there.
        """
        if self._open and heard > self._durable:
            raise self._gap(f"has sent everything up to {format_lsn(heard)}")

    def _close(self) -> None:
        self._open = False
        if self._log.note("server_run") != self._run:
            self._log.set_note("server_run", self._run)

    def _last_commit_time(self) -> int | None:
        """Return the commit time of the log's last transaction; None if it has none of this epoch."""
        last = self._log.last_commit()
        # What has no ordinal is a message outside of transactions.
        if (
            last is None
            or not last[0].ordinal
            or last[0].epoch != epoch_of(self._log)
            or last[0].commit != self._durable
        ):
            return None
        return last[1]

    def _gap(self, instead: str) -> SourceGap:
        assert self._committed_at is not None
        return SourceGap(
            f"Source {self._source}: the log holds a transaction committed at {format_lsn(self._durable)} "
            f"({_time(self._committed_at)}), but the server has none there and {instead}: it was restored to "
            "an earlier state.",
            RESYNC.format(source=self._source),
        )


def _time(microseconds: int) -> str:
    return datetime.fromtimestamp(microseconds / 1e6, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
