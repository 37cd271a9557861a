"""What would stop a capture, found before it starts: each finding with the SQL that mends it.

Reads the catalog only. The server is judged here, its tables in `preflight_tables`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import psycopg

from headrace.config import SourceConfig
from headrace.errors import HeadraceError, UserError
from headrace.keys import literal
from headrace.sources.postgres.bulk import CAN_PEEK, PEEK_FUNCTIONS
from headrace.sources.postgres.catalog import Connection, quoted
from headrace.sources.postgres.connection import connect, connect_replication, place, without_password
from headrace.sources.postgres.failover import failover_findings
from headrace.sources.postgres.preflight_tables import Finding, Role, Table, read_tables, table_findings
from headrace.sources.postgres.recovery import standby_findings
from headrace.sources.postgres.stream import origin_option

__all__ = ["Finding", "Summary", "TableSummary", "inspect", "summarise"]

OLDEST, NEWEST = 14, 18
SMALL_WAL_KEEP_MB = 1024

_LEVELS = ("fail", "warn", "ok")


@dataclass(frozen=True, slots=True)
class TableSummary:
    """A table that could be captured: its size as the server last counted it, and what forbids it.

    `obstacle` is '' or one clause that says why the table cannot be captured as it is.
    """

    table: Table
    obstacle: str


@dataclass(frozen=True, slots=True)
class Summary:
    """A database as `init` sees it."""

    database: str
    place: str
    tables: tuple[TableSummary, ...]
    slots: frozenset[str]
    """The names of the server's replication slots."""


def inspect(config: SourceConfig, *, fresh: bool = False) -> list[Finding]:
    """Look for all that would stop a capture of this source; failures first, then warnings.

    `fresh` says that the project has captured nothing yet: then a slot of its name is another's.
    Raises nothing: a database that cannot be reached is one failure.
    """
    try:
        with connect(config.url.reveal()) as db:
            found = list(_findings(db, config, fresh=fresh))
    except HeadraceError as error:
        found = [Finding("fail", str(error), error.remedy)]
    except psycopg.Error as error:
        words = " ".join(without_password(str(error)).split())
        what = f"{place(config.url.reveal())} broke off the inspection: {words}"
        found = [Finding("fail", what, "Check that the server is up, and run the check again.")]
    return sorted(found, key=lambda finding: _LEVELS.index(finding.level))


def summarise(config: SourceConfig) -> Summary:
    """Return what is in the database, whatever the configuration selects.

    Raises what `connect` raises.
    """
    url = config.url.reveal()
    with connect(url) as db:
        role = _role(db)
        tables = [table for table in read_tables(db) if table.can_be_listed]
        obstacles: dict[Table, str] = {}
        for table in tables:
            obstacles[table] = next((clause for clause, _ in table.obstacles(role)), "")
        database = str(_row(db, "SELECT current_database()")[0])
        slots = frozenset(str(row[0]) for row in db.execute("SELECT slot_name FROM pg_replication_slots"))
    _mark_doubles(obstacles)
    summaries = tuple(TableSummary(*item) for item in obstacles.items())
    return Summary(database, place(url), summaries, slots)


def _mark_doubles(obstacles: dict[Table, str]) -> None:
    """Of tables whose names differ in case only, one can be captured: in lower case if there is such."""
    taken: dict[str, Table] = {}
    usable = [table for table, obstacle in obstacles.items() if not obstacle]
    for table in sorted(usable, key=lambda table: (not table.id.name.islower(), table.id)):
        first = taken.setdefault(table.id.label.casefold(), table)
        if first is not table:
            obstacles[table] = f"its name differs from {first.id} in upper and lower case only"


# ------------------------------------------------------------------------------------- the server


class _Server(NamedTuple):
    version: int
    standby: bool
    encoding: str
    database: str
    wal_level: str
    max_slots: int
    slots: int
    max_senders: int
    senders: int
    wal_keep_mb: int
    idle_timeout: str


_SERVER = """
SELECT current_setting('server_version_num')::int, pg_is_in_recovery(),
  current_setting('server_encoding'), current_database(), current_setting('wal_level'),
  current_setting('max_replication_slots')::int, (SELECT count(*)::int FROM pg_replication_slots),
  current_setting('max_wal_senders')::int,
  (SELECT count(*)::int FROM pg_stat_replication),
  (SELECT setting::int FROM pg_settings WHERE name = 'max_slot_wal_keep_size'),
  coalesce(current_setting('idle_replication_slot_timeout', true), '0')
"""

# Managed services give no role the attribute itself, but membership in one of theirs.
_ROLE = """
SELECT r.rolname::text, r.rolsuper, r.rolreplication OR EXISTS (
    SELECT FROM pg_roles m WHERE m.rolname = 'rds_replication' AND pg_has_role(m.oid, 'MEMBER')),
  has_database_privilege(current_database(), 'CREATE'), pg_is_in_recovery()
FROM pg_roles r WHERE r.rolname = current_user
"""


def _row(db: Connection, query: str) -> tuple[Any, ...]:
    row = db.execute(query.encode()).fetchone()
    assert row is not None
    return row


def _role(db: Connection) -> Role:
    return Role(*_row(db, _ROLE))


def _findings(db: Connection, config: SourceConfig, *, fresh: bool) -> Iterator[Finding]:
    server, role = _Server(*_row(db, _SERVER)), _role(db)
    where = place(config.url.reveal())
    yield Finding("ok", f"{where} answers; login as {role.name}")
    yield from _kind_of_server(server)
    yield from _origin(server, config)
    if server.standby:
        yield from standby_findings(db)
    yield from _wal(server)
    slot = _slot(db, config.slot)
    yield from _replication_right(config, server, role)
    yield from _room(db, server, has_slot=slot is not None)
    if slot and fresh:
        yield Finding(
            "fail",
            f"slot {config.slot} exists already, and this project has captured nothing yet",
            f"Name another in [source.{config.name}] slot; or, if nothing needs it: "
            f"SELECT pg_drop_replication_slot({literal(config.slot)});",
        )
    else:
        yield from _own_slot(config.slot, slot, server.database)
    yield from _wal_kept(server)
    yield from _bulk(db, config, role)
    yield from failover_findings(db, config)
    yield from table_findings(db, config, role)


def _kind_of_server(server: _Server) -> Iterator[Finding]:
    major = server.version // 10_000
    if OLDEST <= major <= NEWEST:
        yield Finding("ok", f"Postgres {major} is supported")
    else:
        remedy = f"Use a server of version {OLDEST} to {NEWEST}."
        yield Finding("fail", f"Postgres {major} is not supported", remedy)
    if server.encoding == "SQL_ASCII":
        yield Finding(
            "warn",
            f"database {server.database} has the encoding SQL_ASCII: what its bytes mean is not known; cells "
            "that are not UTF-8 are kept as U+0000, \\x and their bytes in hex",
            "Dump it and restore it into one that has: CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0;",
        )


def _origin(server: _Server, config: SourceConfig) -> Iterator[Finding]:
    try:
        origin_option(config, server.version)
    except UserError as error:
        yield Finding("fail", str(error), error.remedy)


def _wal(server: _Server) -> Iterator[Finding]:
    if server.wal_level == "logical":
        yield Finding("ok", "wal_level is logical")
        return
    yield Finding(
        "fail",
        f"wal_level is {server.wal_level}: the server does not write what changes are read from",
        "ALTER SYSTEM SET wal_level = 'logical'; then restart the server (a managed service: set it in "
        "its parameters, on RDS rds.logical_replication = 1)",
    )


def _replication_right(config: SourceConfig, server: _Server, role: Role) -> Iterator[Finding]:
    if not (role.replication or role.superuser):
        remedy = f"ALTER ROLE {quoted(role.name)} REPLICATION;"
        yield Finding("fail", f"role {role.name} may not replicate", remedy)
        return
    if server.max_senders == 0:
        return
    try:
        connect_replication(config.url.reveal()).close()
    except HeadraceError as error:
        yield Finding(
            "fail",
            f"a replication connection is refused, an ordinary one is not: {error}",
            "Name the server itself and not a connection pooler, and let pg_hba.conf admit it.",
        )
    else:
        yield Finding("ok", f"role {role.name} may replicate")


def _room(db: Connection, server: _Server, *, has_slot: bool) -> Iterator[Finding]:
    free = server.max_slots - server.slots
    idle = [
        str(row[0])
        for row in db.execute(
            "SELECT slot_name FROM pg_replication_slots WHERE NOT active AND NOT temporary ORDER BY 1 LIMIT 3"
        )
    ]
    raise_slots = f"ALTER SYSTEM SET max_replication_slots = {server.max_slots + 4}; then restart the server"
    if idle and not has_slot:
        raise_slots += (
            f"; or drop one that nothing needs: SELECT pg_drop_replication_slot({literal(idle[0])});"
        )
    used = f"{server.slots} of {server.max_slots} replication slots are in use"
    if has_slot or free > 1:
        yield Finding("ok", used)
    elif free == 1:
        yield Finding("warn", f"{used}: with ours, none is left for verify's snapshot", raise_slots)
    else:
        yield Finding("fail", f"{used}: none is free for ours", raise_slots)
    senders = f"{server.senders} of {server.max_senders} WAL senders are in use"
    if server.senders < server.max_senders:
        yield Finding("ok", senders)
    else:
        remedy = f"ALTER SYSTEM SET max_wal_senders = {server.max_senders + 4}; then restart the server"
        yield Finding("fail", f"{senders}: none is free for ours", remedy)


def _wal_kept(server: _Server) -> Iterator[Finding]:
    kept = server.wal_keep_mb
    if kept == -1:
        yield Finding(
            "warn",
            "max_slot_wal_keep_size is -1: while the pipeline is away, WAL can fill the source's disk",
            "ALTER SYSTEM SET max_slot_wal_keep_size = '50GB'; SELECT pg_reload_conf(); with as much as the "
            "disk can spare; past it the slot is lost, and the tables are copied again",
        )
    elif kept < SMALL_WAL_KEEP_MB:
        yield Finding(
            "warn",
            f"max_slot_wal_keep_size is {kept} MB: a short absence of the pipeline loses the slot",
            "ALTER SYSTEM SET max_slot_wal_keep_size = '50GB'; SELECT pg_reload_conf(); with as much as the "
            "disk can spare",
        )
    else:
        yield Finding("ok", f"the source keeps up to {kept} MB of WAL for an absent pipeline")
    if server.idle_timeout not in ("0", "0s", "0min"):
        yield Finding(
            "warn",
            f"idle_replication_slot_timeout is {server.idle_timeout}: a longer absence loses the slot",
            "ALTER SYSTEM SET idle_replication_slot_timeout = 0; SELECT pg_reload_conf();",
        )


def _bulk(db: Connection, config: SourceConfig, role: Role) -> Iterator[Finding]:
    if role.standby:
        yield Finding("ok", "a backlog is streamed: a standby's slot is not read in bulk")
    elif not config.peek_temp_max:
        yield Finding("ok", "a backlog is streamed: peek_temp_max is 0")
    elif _row(db, CAN_PEEK)[0]:
        size = config.peek_temp_max >> 20
        yield Finding(
            "ok", f"a backlog is read in bulk, with up to {size} MiB of temporary files on the source"
        )
    else:
        grants = (
            f"GRANT EXECUTE ON FUNCTION {function} TO {quoted(role.name)};" for function in PEEK_FUNCTIONS
        )
        yield Finding(
            "warn",
            f"role {role.name} may not read a backlog in bulk: it is streamed, which takes longer",
            " ".join(grants),
        )


# --------------------------------------------------------------------------------------- our slot


class _Slot(NamedTuple):
    plugin: str
    database: str
    active: bool
    pid: int | None
    program: str
    wal_status: str


def _slot(db: Connection, name: str) -> _Slot | None:
    row = db.execute(
        """SELECT coalesce(s.plugin::text, ''), coalesce(s.database::text, ''), s.active, s.active_pid,
        coalesce(a.application_name, ''), coalesce(s.wal_status, '')
        FROM pg_replication_slots s LEFT JOIN pg_stat_activity a ON a.pid = s.active_pid
        WHERE s.slot_name = %s""",
        [name],
    ).fetchone()
    return _Slot(*row) if row else None


def _own_slot(name: str, slot: _Slot | None, database: str) -> Iterator[Finding]:
    if slot is None:
        yield Finding("ok", f"slot {name} is free to be made")
        return
    drop = f"SELECT pg_drop_replication_slot({literal(name)});"
    if slot.plugin != "pgoutput" or slot.database != database:
        kind = f"of plugin {slot.plugin} in database {slot.database}" if slot.plugin else "a physical one"
        remedy = f"Name another in [source] slot; or, if nothing needs it: {drop}"
        yield Finding("fail", f"slot {name} exists and is not ours: it is {kind}", remedy)
    elif slot.wal_status == "lost":
        yield Finding(
            "fail",
            f"slot {name} is lost: the server has thrown away WAL that it needed",
            "Run `headrace resync`: it copies every table again and repairs what differs, deletes included",
        )
    elif slot.wal_status == "unreserved":
        yield Finding(
            "warn",
            f"slot {name} is about to be lost: it is past max_slot_wal_keep_size",
            "Run the pipeline now, or raise it: ALTER SYSTEM SET max_slot_wal_keep_size = '100GB'; "
            "SELECT pg_reload_conf();",
        )
    elif slot.active and slot.program != "headrace":
        yield Finding(
            "warn",
            f"slot {name} is in use by pid {slot.pid} ({slot.program or 'unnamed'}), not by Headrace",
            f"Name another in [source] slot, or end it: SELECT pg_terminate_backend({slot.pid});",
        )
    else:
        state = f"in use by pid {slot.pid}, a pipeline" if slot.active else "waiting for its pipeline"
        yield Finding("ok", f"slot {name} exists and is {state}")
