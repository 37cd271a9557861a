"""How a replication slot fares: asked with a short timeout, over a connection of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psycopg

from headrace.errors import SourceError
from headrace.sources.postgres.connection import pinned_conninfo, place, refusal, without_password

_TIMEOUT = 3  # seconds, to connect, for each statement and for an answer that does not come

# A standby has no WAL position of its own: what it has replayed is all that its slots can read.
_SLOT = """
SELECT s.active, s.active_pid, s.wal_status, s.confirmed_flush_lsn::text, s.restart_lsn::text, c.lsn::text,
       pg_wal_lsn_diff(c.lsn, s.confirmed_flush_lsn)::int8, pg_wal_lsn_diff(c.lsn, s.restart_lsn)::int8,
       s.safe_wal_size::int8, k.mb << 20
FROM (SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END
      AS lsn) c
CROSS JOIN (SELECT nullif(setting::int8, -1) AS mb FROM pg_settings WHERE name = 'max_slot_wal_keep_size') k
LEFT JOIN pg_replication_slots s ON s.slot_name = %s AND s.database = current_database()
"""

_MAY_LIST = "SELECT has_function_privilege('pg_ls_waldir()', 'execute')"

# By number and not by pg_walfile_name, which a standby refuses; the timeline, 8 digits, goes before it.
_AGE = """
SELECT greatest(extract(epoch FROM clock_timestamp() - max(w.modification)), 0)::float8
FROM (SELECT pg_wal_lsn_diff(%s, '0/0') AS lsn) r,
     (SELECT setting::int8 AS size FROM pg_settings WHERE name = 'wal_segment_size') g,
     pg_ls_waldir() w
WHERE substr(w.name, 9) = upper(lpad(to_hex(div(r.lsn, 4294967296)::int8), 8, '0')
  || lpad(to_hex(div(mod(r.lsn, 4294967296), g.size)::int8), 8, '0'))
"""

# The oldest transaction with an id, of whatever database: decoding begins where it began. Its id and its
# session are shown to every role, its age and state to members of pg_read_all_stats (in pg_monitor).
_HOLDER = """
SELECT * FROM (
  SELECT 'transaction', pid::text, coalesce(usename::text, ''), coalesce(application_name, ''),
    extract(epoch FROM clock_timestamp() - xact_start)::float8, coalesce(state, ''), age(backend_xid) AS xids
  FROM pg_stat_activity WHERE backend_xid IS NOT NULL
  UNION ALL
  SELECT 'prepared transaction', gid, owner::text, '',
    extract(epoch FROM clock_timestamp() - prepared)::float8, 'prepared', age(transaction)
  FROM pg_prepared_xacts) held
ORDER BY xids DESC LIMIT 1
"""


@dataclass(frozen=True, slots=True)
class Holder:
    """The oldest open transaction of the server: no slot's restart_lsn goes beyond where it began.

    `kind` is "transaction", whose `id` is a pid, or "prepared transaction", whose `id` is its gid.
    `age_s` is None and `state` empty where the role may not see them (`GRANT pg_monitor`).
    """

    kind: str
    id: str
    user: str
    application: str
    age_s: float | None
    state: str

    def __str__(self) -> str:
        age = "" if self.age_s is None else f", open for {age_text(self.age_s)}"
        who = ", ".join(filter(None, (self.user, self.application, self.state)))
        named = f"pid {self.id}" if self.kind == "transaction" else f"gid {self.id!r}"
        return f"the oldest {self.kind} is {named} ({who}){age}"


@dataclass(frozen=True, slots=True)
class SlotHealth:
    """A slot as the server sees it. LSNs are in X/Y form, sizes in bytes.

    All but `current_lsn`, `wal_keep_size` and `holder` is None where there is no such slot (`exists` says
    so). `lag_bytes` is what the slot's reader has not confirmed, `retained_bytes` the WAL kept for it.
    `safe_wal_size` is how much more may be written before the slot is in danger and `wal_keep_size` the
    server's max_slot_wal_keep_size; both None where it sets no limit.
    `restart_age_s` is how long ago the WAL segment of `restart_lsn` was last written: the slot holds
    WAL at least so old; None where the role may not list WAL (`GRANT pg_monitor`). `holder` is None where
    no transaction is open.
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
    wal_keep_size: int | None
    restart_age_s: float | None
    holder: Holder | None


class Probe:
    """Asks one server about one slot, again and again over a connection of its own."""

    def __init__(self, url: str, slot: str) -> None:
        self._url = url
        self._slot = slot
        self._db: psycopg.Connection[tuple[Any, ...]] | None = None

    def read(self) -> SlotHealth:
        """Ask; takes a few seconds at most where the server does not answer, and connects anew next time.

        Raises SourceUnavailable, UserError where the login is refused, SourceError where the server
        does not answer the question.
        """
        try:
            if self._db is None:
                self._connect()
            db = self._db
            assert db is not None
            row = db.execute(_SLOT, [self._slot]).fetchone()
            assert row is not None
            values: tuple[Any, ...] = (row[0] is not None, *row, _age(db, row[4]), oldest_transaction(db))
            return SlotHealth(*values)
        except psycopg.Error as error:
            self.close()
            words = without_password(str(error)).strip().splitlines()
            raise SourceError(
                f"{place(self._url)} does not tell about its slot: {' '.join(words[:1])}"
            ) from error

    def close(self) -> None:
        """Give the connection back."""
        if self._db is not None:
            self._db.close()
        self._db = None

    def _connect(self) -> None:
        limits = {"connect_timeout": str(_TIMEOUT), "tcp_user_timeout": str(2 * _TIMEOUT * 1000)}
        try:
            self._db = psycopg.connect(pinned_conninfo(self._url, **limits), autocommit=True)
        except psycopg.OperationalError as error:
            raise refusal(self._url, error) from error
        for setting in ("statement_timeout", "lock_timeout"):
            self._db.execute(f"SET {setting} = '{_TIMEOUT}s'".encode())


def slot_health(url: str, slot: str) -> SlotHealth:
    """Ask a server about a slot once; raises what `Probe.read` raises."""
    probe = Probe(url, slot)
    try:
        return probe.read()
    finally:
        probe.close()


def oldest_transaction(db: psycopg.Connection[tuple[Any, ...]]) -> Holder | None:
    """Return the server's oldest open transaction that has an id, None if there is none."""
    row = db.execute(_HOLDER).fetchone()
    return Holder(*row[:-1]) if row else None


def _age(db: psycopg.Connection[tuple[Any, ...]], restart_lsn: str | None) -> float | None:
    """Return the age of a place in the WAL by its segment's time, in seconds."""
    allowed = db.execute(_MAY_LIST).fetchone()
    if restart_lsn is None or allowed is None or not allowed[0]:
        return None
    row = db.execute(_AGE, [restart_lsn]).fetchone()
    return float(str(row[0])) if row and row[0] is not None else None


def size_text(number: int | None) -> str:
    """Return a number of bytes for people."""
    if number is None:
        return "an unknown amount"
    value, units = float(number), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def age_text(seconds: float) -> str:
    """Return a number of seconds for people."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} days"
