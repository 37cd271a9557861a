"""The replication slot: made, checked, resumed.

Its notes in the log: `slot` (its name, written before it is created), `slot_system` (on which server),
`point` (the position from which it delivers, an LSN as a number) and `epoch` (of the positions from there).
"""

from __future__ import annotations

import select
import time
from collections.abc import Generator
from dataclasses import dataclass

import psycopg
from psycopg import pq

from headrace.alarms import tell
from headrace.config import SourceConfig
from headrace.errors import RESYNC, RETRY_SQLSTATES, HeadraceError, SourceGap, SourceUnavailable, UserError
from headrace.protocols import LogIndex
from headrace.sources.postgres.catalog import Connection, quoted
from headrace.sources.postgres.connection import without_password
from headrace.sources.postgres.health import oldest_transaction
from headrace.sources.postgres.lsn import format_lsn, parse_lsn
from headrace.sources.postgres.recovery import in_recovery

_STEP = 0.5
_SAY_AFTER = 5.0

POINT = "point"
"""The note that holds the position from which the slot delivers."""


def epoch_of(log: LogIndex) -> int:
    """Return the epoch that new positions belong to."""
    return int(log.note("epoch") or 0)


def durable_commit(log: LogIndex) -> int:
    """Return the commit through which the log holds this epoch's changes."""
    position = log.position()
    streamed = position.commit if position and position.epoch == epoch_of(log) else 0
    return max(streamed, int(log.note(POINT) or 0))


def claim_slot(config: SourceConfig, log: LogIndex) -> None:
    """Remember that the slot on the server that is noted now is ours; call it before it is created."""
    log.set_note("slot_system", log.note("system") or "")
    log.set_note("slot", config.slot)


def owned_slot(log: LogIndex) -> str | None:
    """Return the name of our slot on the server that is noted now; None if ours was on another."""
    return log.note("slot") if log.note("slot_system") == log.note("system") else None


def drop_unfinished(db: Connection, config: SourceConfig, log: LogIndex) -> None:
    """Drop the slot of a copy that did not finish; refuse one that is not ours."""
    slot = config.slot
    row = db.execute("SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s", [slot]).fetchone()
    if row is None:
        return
    if owned_slot(log) != slot:
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
                tell(
                    "Source %s: the slot is not made yet: %s",
                    config.name,
                    _obstacle(db),
                    source=config.name,
                    severity="warning",
                )
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


def check_resumable(db: Connection, config: SourceConfig, log: LogIndex) -> Slot:
    """Return the slot; refuse one from which changes that the log does not hold cannot be had.

    Raises SourceGap: the slot is gone, invalidated, not the one that Headrace made, or stands beyond
    what the log holds. A slot that stands behind is harmless: what is sent again is dropped.
    """
    slot = read_slot(db, config.slot)
    fault = _fault(slot, config.slot, durable_commit(log))
    if slot is None or fault:
        raise SourceGap(f"Source {config.name}: {fault}", RESYNC.format(source=config.name))
    return slot


@dataclass(frozen=True, slots=True)
class Slot:
    """A replication slot as the server sees it; `confirmed` is an LSN, 0 where there is none yet.

    `lost` says why the server has given the slot up, '' while it has not. `foreign` says what about it
    is not as Headrace makes it.
    """

    confirmed: int
    active_pid: int | None
    lost: str
    foreign: str


_LOST = {
    "wal_removed": "the WAL that it needed is thrown away (max_slot_wal_keep_size)",
    "rows_removed": "rows of the catalog that it needed are vacuumed away",
    "wal_level_insufficient": "wal_level was below logical for a while",
    "idle_timeout": "nobody read it for longer than idle_replication_slot_timeout",
}


def read_slot(db: Connection, name: str) -> Slot | None:
    """Ask a server about a slot, on every version in the words of the newest."""
    row = db.execute(
        "SELECT to_jsonb(s), current_database() FROM pg_replication_slots s WHERE slot_name = %s", [name]
    ).fetchone()
    if row is None:
        return None
    facts, database = row
    lost = ""
    if facts["wal_status"] == "lost" or facts.get("invalidation_reason"):
        # Before 17 the server does not say why; there, WAL is what a primary takes away.
        reason = facts.get("invalidation_reason") or "wal_removed"
        lost = _LOST.get(reason, reason)
    foreign = {
        "it is a physical one": facts["slot_type"] != "logical",
        f"its plugin is {facts['plugin']}": facts["plugin"] != "pgoutput",
        f"it belongs to the database {facts['database']}": facts["database"] != database,
        "it is temporary": facts["temporary"],
        "it decodes prepared transactions (two_phase)": facts.get("two_phase"),
    }
    words = next((words for words, holds in foreign.items() if holds), "")
    confirmed = facts["confirmed_flush_lsn"]
    return Slot(parse_lsn(confirmed) if confirmed else 0, facts["active_pid"], lost, words)


def _fault(slot: Slot | None, name: str, durable: int) -> str:
    if slot is None:
        return f"the slot {name} is gone; the log holds commits up to {format_lsn(durable)}."
    if slot.foreign:
        return f"the slot {name} is not the one that Headrace made: {slot.foreign}."
    if slot.lost:
        return (
            f"the server has given up the slot {name}: {slot.lost}. It stands at "
            f"{format_lsn(slot.confirmed)}, the log holds commits up to {format_lsn(durable)}."
        )
    if slot.confirmed > durable:
        return (
            f"the slot {name} stands at {format_lsn(slot.confirmed)}, the log at {format_lsn(durable)}: "
            "another reader moved it, it was dropped and made again, or the state folder is older than it."
        )
    return ""


def replication_error(result: pq.abc.PGresult, what: str) -> HeadraceError:
    """Turn a refused replication command into what it means for the user."""
    words = (result.error_message or b"").decode(errors="replace").strip().removeprefix("ERROR:").strip()
    state = (result.error_field(pq.DiagnosticField.SQLSTATE) or b"").decode()
    if not state or state == "55006" or state[:2] in RETRY_SQLSTATES:
        return SourceUnavailable(f"{what}: {without_password(words)}", "It is tried again.")
    return UserError(f"{what}: {words}", "Run `headrace check` for what the server lacks.")
