"""How a replication slot fares: asked with a short timeout, over a connection of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psycopg

from headrace.errors import SourceError
from headrace.sources.postgres.connection import pinned_conninfo, place, refusal, without_password

_TIMEOUT = 3  # seconds, to connect and for each statement

_SLOT = """
SELECT s.active, s.active_pid, s.wal_status, s.confirmed_flush_lsn::text, s.restart_lsn::text, c.lsn::text,
       pg_wal_lsn_diff(c.lsn, s.confirmed_flush_lsn)::int8, pg_wal_lsn_diff(c.lsn, s.restart_lsn)::int8,
       s.safe_wal_size::int8
FROM (SELECT pg_current_wal_lsn() AS lsn) c
LEFT JOIN pg_replication_slots s ON s.slot_name = %s AND s.database = current_database()
"""

_MAY_LIST = "SELECT has_function_privilege('pg_ls_waldir()', 'execute')"
_AGE = """
SELECT greatest(extract(epoch FROM clock_timestamp() - w.modification), 0)::float8
FROM pg_ls_waldir() w WHERE w.name = pg_walfile_name(%s::pg_lsn)
"""


@dataclass(frozen=True, slots=True)
class SlotHealth:
    """A slot as the server sees it. LSNs are in X/Y form, sizes in bytes.

    All but `current_lsn` is None where there is no such slot (`exists` says so). `lag_bytes` is what
    the slot's reader has not confirmed, `retained_bytes` the WAL kept for it. `safe_wal_size` is how
    much more may be written before the slot is in danger; None where the server sets no limit.
    `restart_age_s` is how long ago the WAL segment of `restart_lsn` was last written: the slot holds
    WAL at least so old; None where the role may not list WAL (`GRANT pg_monitor`).
    """

    exists: bool
    active: bool | None
    active_pid: int | None
    wal_status: str | None
    confirmed_flush_lsn: str | None
    restart_lsn: str | None
    current_lsn: str
    lag_bytes: int | None
    retained_bytes: int | None
    safe_wal_size: int | None
    restart_age_s: float | None


def slot_health(url: str, slot: str) -> SlotHealth:
    """Ask a server about a slot; takes a few seconds at most where it does not answer.

    Raises SourceUnavailable, UserError where the login is refused, SourceError where the server
    does not answer the question.
    """
    try:
        db = psycopg.connect(pinned_conninfo(url, connect_timeout=str(_TIMEOUT)), autocommit=True)
    except psycopg.OperationalError as error:
        raise refusal(url, error) from error
    with db:
        try:
            db.execute(f"SET statement_timeout = '{_TIMEOUT}s'".encode())
            row = db.execute(_SLOT, [slot]).fetchone()
            assert row is not None
            values: tuple[Any, ...] = (row[0] is not None, *row, _age(db, row[4]))
            return SlotHealth(*values)
        except psycopg.Error as error:
            words = without_password(str(error)).strip().splitlines()
            raise SourceError(f"{place(url)} does not tell about its slot: {' '.join(words[:1])}") from error


def _age(db: psycopg.Connection[tuple[object, ...]], restart_lsn: str | None) -> float | None:
    """Return the age of a place in the WAL by its segment's time, in seconds."""
    allowed = db.execute(_MAY_LIST).fetchone()
    if restart_lsn is None or allowed is None or not allowed[0]:
        return None
    row = db.execute(_AGE, [restart_lsn]).fetchone()
    return float(str(row[0])) if row and row[0] is not None else None


def lsn_text(lsn: int) -> str:
    """Return an LSN as Postgres writes it: X/Y."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"
