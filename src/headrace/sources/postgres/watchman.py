"""Looks, while the stream runs, whether the source is still what it was when the stream began."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable
from contextlib import closing

from headrace.change import Entry
from headrace.config import SourceConfig
from headrace.errors import SourceUnavailable
from headrace.protocols import LogIndex
from headrace.sources.postgres.catalog import Connection
from headrace.sources.postgres.connection import connect_replication
from headrace.sources.postgres.fingerprint import check_publication
from headrace.sources.postgres.identity import Server, identify, noted_timeline, read_server
from headrace.sources.postgres.slot import check_resumable
from headrace.sources.postgres.stream import Stream

WATCH_EVERY = 10.0
"""Seconds between two looks."""


class Watchman:
    """Checks server, slot and publication of one running stream, each with a short query or two."""

    def __init__(
        self, db: Connection, config: SourceConfig, log: LogIndex, server: Server, stream: Stream
    ) -> None:
        """`server` is what the start's checks accepted on `db`.

        Raises SourceUnavailable when the stream has reached another one (a url may name several hosts).
        """
        self._db = db
        self._config = config
        self._log = log
        self._server = server
        self._reader = stream.backend
        self._last = time.monotonic()
        timeline = noted_timeline(log)
        if stream.system != server.system or (timeline and stream.timeline != timeline.number):
            raise SourceUnavailable(
                f"Source {config.name}: the stream has reached another server than the checks.",
                "It is tried again.",
            )

    def check_if_due(self) -> None:
        """Check if it is time.

        Raises SourceGap when something is missing for good, SourceUnavailable when another start must
        find out: somebody else reads the slot, or another server answers.
        """
        if time.monotonic() - self._last < WATCH_EVERY:
            return
        self._last = time.monotonic()
        if read_server(self._db) != self._server:
            raise SourceUnavailable(
                f"Source {self._config.name}: another server answers now.", "It is tried again."
            )
        slot = check_resumable(self._db, self._config, self._log)
        if slot.active_pid != self._reader:
            raise SourceUnavailable(
                f"Source {self._config.name}: the slot {self._config.slot} is read by pid {slot.active_pid}, "
                f"not by our stream (pid {self._reader}).",
                "It is tried again.",
            )
        check_publication(self._db, self._config, self._log)


def on_one_timeline(
    groups: Generator[Iterable[Entry]], config: SourceConfig, log: LogIndex, server: Server
) -> Generator[Iterable[Entry]]:
    """Yield the groups of a standby, `server`, as long as it stays on the timeline that the log knows.

    One that is promoted, or whose primary is replaced, goes over to another timeline, and a stream from it
    too, without a word. The log must know where that forked before it holds anything from beyond, or a
    server of the former timeline could not be told from this one. So the server is asked before each group
    is given out, and SourceUnavailable lets another start find out.
    """
    known = noted_timeline(log)
    with closing(groups), closing(connect_replication(config.url.reveal())) as line:
        if read_server(line) != server:
            raise SourceUnavailable(
                f"Source {config.name}: another server answers now.", "It is tried again."
            )
        for group in groups:
            if group and known and (timeline := identify(line)[1]) != known.number:
                raise SourceUnavailable(
                    f"Source {config.name}: the standby has gone over to timeline {timeline}.",
                    "It is tried again.",
                )
            yield group
