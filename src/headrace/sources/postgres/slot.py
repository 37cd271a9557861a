"""The replication slot: made, checked, resumed; and the server that it stands on."""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Generator

import psycopg
from psycopg import pq

from headrace.config import SourceConfig
from headrace.errors import HeadraceError, SourceGap, SourceUnavailable, UserError
from headrace.protocols import Log
from headrace.sources.postgres.catalog import Connection, quoted
from headrace.sources.postgres.connection import place, without_password
from headrace.sources.postgres.health import oldest_transaction
from headrace.sources.postgres.lsn import format_lsn, parse_lsn
from headrace.sources.postgres.recovery import in_recovery

alerts = logging.getLogger("headrace.alert")

_STEP = 0.5
_SAY_AFTER = 5.0


def same_server(db: Connection, config: SourceConfig, log: Log) -> None:
    """Refuse another server than the one that filled the log."""
    row = db.execute("SELECT system_identifier::text FROM pg_control_system()").fetchone()
    found = str(row[0]) if row else ""
    known = log.note("system")
    if known is None:
        log.set_note("system", found)
    elif known != found:
        raise UserError(
            f"{place(config.url.reveal())} is another server than the one this state folder was filled from "
            f"(system identifier {found}, not {known}).",
            "Point the url at the original server, or start with an empty project folder.",
        )


def drop_unfinished(db: Connection, config: SourceConfig, log: Log) -> None:
    """Drop the slot of a copy that did not finish; refuse one that is not ours."""
    slot = config.slot
    row = db.execute("SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s", [slot]).fetchone()
    if row is None:
        return
    if log.note("slot") != slot:
        raise UserError(
            f"Source {config.name}: the slot {slot} exists already, and not for this state folder.",
            f"Name another in [source.{config.name}] slot, or drop it if nothing needs it: "
            f"SELECT pg_drop_replication_slot('{slot}');",
        )
    try:
        db.execute("SELECT pg_drop_replication_slot(%s)", [slot])
    except psycopg.errors.ObjectInUse as error:
        raise SourceUnavailable(f"The slot {slot} is still held by pid {row[0]}.") from error


def create_slot(
    db: Connection, holder: Connection, config: SourceConfig, *, failover: bool
) -> Generator[tuple[()], None, tuple[int, str]]:
    """Create the slot over the replication connection `holder`; returns its consistent point and the name
    of the exported snapshot.

    The server waits for transactions that are open, however long they are. Yields meanwhile, twice a second,
    so that the caller can stop: then the server is told to give up.
    """
    options = "SNAPSHOT 'export'" + (", FAILOVER true" if failover else "")
    command = f"CREATE_REPLICATION_SLOT {quoted(config.slot)} LOGICAL pgoutput ({options})"
    pgconn = holder.pgconn
    pgconn.send_query(command.encode())
    since, said = time.monotonic(), False
    try:
        while pgconn.flush() or pgconn.is_busy():
            yield ()
            select.select([pgconn.socket], [], [], _STEP)
            pgconn.consume_input()
            if not said and time.monotonic() - since > _SAY_AFTER:
                alerts.warning("Source %s: the slot is not made yet: %s", config.name, _obstacle(db))
                said = True
    except GeneratorExit:
        pgconn.get_cancel().cancel()
        raise
    result = pgconn.get_result()
    assert result is not None
    if result.status != pq.ExecStatus.TUPLES_OK:
        raise replication_error(result, f"Source {config.name}: the slot cannot be created")
    point, snapshot = result.get_value(0, 1), result.get_value(0, 2)
    assert point is not None
    assert snapshot is not None
    while pgconn.get_result() is not None:
        pass
    return parse_lsn(point.decode()), snapshot.decode()


def _obstacle(db: Connection) -> str:
    if in_recovery(db):
        return (
            "a standby waits for the primary to log its running transactions. Run there: "
            "SELECT pg_log_standby_snapshot();"
        )
    holder = oldest_transaction(db)
    return f"it waits for transactions that are open; {holder}" if holder else "no transaction is open now"


def check_resumable(db: Connection, config: SourceConfig, log: Log) -> None:
    """Refuse to go on where the slot stands beyond what the log holds: a gap is never skipped."""
    position = log.position()
    durable = position.commit if position else 0
    row = db.execute(
        "SELECT confirmed_flush_lsn::text, wal_status FROM pg_replication_slots WHERE slot_name = %s",
        [config.slot],
    ).fetchone()
    remedy = (
        "The changes in between are gone: move the state folder and the destination away and run "
        "again, which copies everything anew."
    )
    if row is None:
        raise SourceGap(f"Source {config.name}: the slot {config.slot} is gone.", remedy)
    if row[1] == "lost":
        raise SourceGap(
            f"Source {config.name}: the server has thrown away WAL that the slot {config.slot} "
            "needed (max_slot_wal_keep_size).",
            remedy,
        )
    if row[0] and parse_lsn(str(row[0])) > durable:
        raise SourceGap(
            f"Source {config.name}: the slot stands at {row[0]}, the log at {format_lsn(durable)}: "
            "another reader moved it, or the state folder is older than it.",
            remedy,
        )


def replication_error(result: pq.abc.PGresult, what: str) -> HeadraceError:
    """Turn a refused replication command into what it means for the user."""
    words = (result.error_message or b"").decode(errors="replace").strip().removeprefix("ERROR:").strip()
    state = (result.error_field(pq.DiagnosticField.SQLSTATE) or b"").decode()
    if not state or state == "55006" or state[:2] in ("08", "40", "53", "57", "58"):
        return SourceUnavailable(f"{what}: {without_password(words)}", "It is tried again.")
    return UserError(f"{what}: {words}", "Run `headrace check` for what the server lacks.")
