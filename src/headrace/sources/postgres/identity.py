"""The server behind a source: is it the one that filled the log, and does it still hold what the log holds?

Its identity stands in notes of the log: `system` (system identifier), `version` (major), `database`
(its oid), `timeline` (with its history) and `role` (`standby` for a project that began at one). A timeline
is what Postgres counts up when a standby is promoted or a backup recovered: two servers of one system
agree up to the LSN at which their timelines forked, no further.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import pq

from headrace.config import SourceConfig
from headrace.errors import RESYNC, SourceGap, SourceUnavailable, UserError
from headrace.protocols import LogIndex
from headrace.sources.postgres.catalog import Connection
from headrace.sources.postgres.connection import connect_replication, place
from headrace.sources.postgres.lsn import format_lsn, parse_lsn
from headrace.sources.postgres.recovery import in_recovery
from headrace.sources.postgres.slot import durable_commit, replication_error

logger = logging.getLogger("headrace.capture")

_NEVER = (1 << 64) - 1
_FACTS = """
SELECT c.system_identifier::text, current_setting('server_version_num')::int / 10000, d.oid::text,
       pg_postmaster_start_time()::text
FROM pg_control_system() c, pg_database d WHERE d.datname = current_database()
"""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server and the database in it; `started` names this run of it."""

    system: str
    version: int
    database: str
    started: str


@dataclass(frozen=True, slots=True)
class Timeline:
    """A timeline with its history: `forks` are the LSNs at which the timelines before it ended."""

    number: int
    forks: dict[int, int]

    def end_of(self, other: Timeline) -> int | None:
        """Return the LSN up to which this timeline holds what `other` held, None if it does not descend
        from it. Two standbys that were promoted apart may have given themselves the same number."""
        if any(self.forks.get(number) != lsn for number, lsn in other.forks.items()):
            return None
        return _NEVER if self.number == other.number else self.forks.get(other.number)

    def to_json(self) -> str:
        """Render as the note holds it."""
        return json.dumps(
            {"number": self.number, "forks": {n: format_lsn(at) for n, at in self.forks.items()}}
        )

    @classmethod
    def from_json(cls, text: str) -> Timeline:
        """Read back what `to_json` wrote."""
        raw = json.loads(text)
        return cls(raw["number"], {int(number): parse_lsn(at) for number, at in raw["forks"].items()})


def read_server(db: Connection) -> Server:
    """Ask who answers on a connection."""
    row = db.execute(_FACTS).fetchone()
    assert row is not None
    return Server(*row)


def check_server(db: Connection, config: SourceConfig, log: LogIndex) -> Server:
    """Refuse a server that is not, or no longer holds, what filled the log; on a new log, remember it.

    A promoted standby is accepted where its timeline forked at or after the log's last commit.
    Raises UserError for another server or database, SourceGap for one that lacks what the log holds,
    SourceUnavailable for a standby that is not promoted.
    """
    _same_role(db, config, log)
    server = read_server(db)
    where = place(config.url.reveal())
    same_system(server, config, log)
    known = log.note("database")
    if known and known != server.database:
        raise UserError(
            f"{where} is another database than the one this state folder was filled from (oid "
            f"{server.database}, not {known}).",
            "Point the url at the original database. If this one has taken its place: " + _resync(config),
        )
    timeline, flushed = read_timeline(config, server)
    _same_history(timeline, flushed, config, log)
    adopt_server(log, server, timeline)
    return server


def _same_role(db: Connection, config: SourceConfig, log: LogIndex) -> None:
    """Wait where the url leads to a standby after a primary: its failover may not be over yet.

    A project that began at a standby reads from standbys, and goes on when one is promoted.
    """
    if not in_recovery(db):
        return
    if log.note("system") and log.note("role") != "standby":
        raise SourceUnavailable(
            f"{place(config.url.reveal())} is a standby in recovery.",
            "Promote it, or point the url at the primary.",
        )
    log.set_note("role", "standby")


def read_timeline(config: SourceConfig, server: Server) -> tuple[Timeline, int]:
    """Ask a server for its timeline and the LSN through which its WAL is flushed.

    Raises SourceUnavailable when it is not `server` that answers (a url may name several hosts).
    """
    with connect_replication(config.url.reveal()) as line:
        system, number, flushed = identify(line)
        if system != server.system:
            where = place(config.url.reveal())
            raise SourceUnavailable(f"{where} leads to two different servers.", "It is tried again.")
        return Timeline(number, read_history(line, number)), flushed


def adopt_server(log: LogIndex, server: Server, timeline: Timeline) -> None:
    """Take a server for the one whose changes the log holds, whatever it was before."""
    facts = {
        "system": server.system,
        "version": str(server.version),
        "database": server.database,
        "timeline": timeline.to_json(),
    }
    for key, value in facts.items():
        if log.note(key) != value:
            log.set_note(key, value)


def forget_server(log: LogIndex) -> None:
    """Take whatever server answers next for the one whose changes the log holds."""
    for key in ("system", "version", "database", "timeline", "role"):
        log.set_note(key, "")


def noted_timeline(log: LogIndex) -> Timeline | None:
    """Return the timeline of the server that the log was last filled from."""
    note = log.note("timeline")
    return Timeline.from_json(note) if note else None


def identify(line: psycopg.Connection[Any]) -> tuple[str, int, int]:
    """Ask a replication connection for system identifier, timeline and the LSN flushed so far."""
    result = line.pgconn.exec_(b"IDENTIFY_SYSTEM")
    if result.status != pq.ExecStatus.TUPLES_OK:
        raise replication_error(result, "The server does not tell who it is")
    system, timeline, flushed = ((result.get_value(0, column) or b"").decode() for column in range(3))
    return system, int(timeline), parse_lsn(flushed)


def read_history(line: psycopg.Connection[Any], timeline: int) -> dict[int, int]:
    """Return where each timeline before `timeline` ended, as LSNs; empty for the first timeline."""
    if timeline == 1:
        return {}
    result = line.pgconn.exec_(b"TIMELINE_HISTORY %d" % timeline)
    if result.status != pq.ExecStatus.TUPLES_OK:
        raise replication_error(result, f"The server does not tell the history of its timeline {timeline}")
    return parse_history((result.get_value(0, 1) or b"").decode(errors="replace"))


def parse_history(text: str) -> dict[int, int]:
    """Read a timeline history file: lines of timeline, LSN of its end, reason; `#` begins a comment."""
    lines = (line.split(maxsplit=2) for line in text.splitlines() if not line.lstrip().startswith("#"))
    return {int(fields[0]): parse_lsn(fields[1]) for fields in lines if len(fields) >= 2}


def same_system(server: Server, config: SourceConfig, log: LogIndex) -> None:
    """Refuse a server of another system, or another version, than the one that filled the log."""
    known, version = log.note("system"), log.note("version")
    where = place(config.url.reveal())
    if version and version != str(server.version):
        raise SourceGap(
            f"Source {config.name}: {where} runs Postgres {server.version} (system identifier "
            f"{server.system}), the log was filled from Postgres {version} ({known}): an upgrade starts WAL "
            "and slots anew, and what was committed around it cannot be had from the slot.",
            "If the url leads to the right server: " + _resync(config),
        )
    if known and known != server.system:
        raise UserError(
            f"{where} is another server than the one this state folder was filled from (system identifier "
            f"{server.system}, not {known}).",
            "Point the url at the original server. If this one has taken its place: " + _resync(config),
        )


def _same_history(timeline: Timeline, flushed: int, config: SourceConfig, log: LogIndex) -> None:
    """Raise SourceGap where the server's WAL is not a continuation of what the log was filled from."""
    known = noted_timeline(log) or timeline
    durable = durable_commit(log)
    fork = timeline.end_of(known)
    fault = ""
    if fork is None:
        fault = f"its timeline {timeline.number} does not descend from timeline {known.number} of the log"
    elif timeline.number != known.number and fork < durable:
        fault = f"its timeline {timeline.number} forked from timeline {known.number} at {format_lsn(fork)}"
    elif flushed < durable:
        fault = f"its WAL ends at {format_lsn(flushed)}: it was restored to an earlier state"
    if fault:
        raise SourceGap(
            f"Source {config.name}: the log holds commits up to {format_lsn(durable)} that "
            f"{place(config.url.reveal())} never had or has lost: {fault}.",
            _resync(config),
        )
    if fork and timeline.number != known.number:
        logger.warning(
            "source %s: failover to timeline %d, which forked from timeline %d at %s; the log holds commits "
            "up to %s: nothing is missing, capture goes on",
            config.name, timeline.number, known.number, format_lsn(fork), format_lsn(durable),
        )  # fmt: skip


def _resync(config: SourceConfig) -> str:
    return RESYNC.format(source=config.name)
