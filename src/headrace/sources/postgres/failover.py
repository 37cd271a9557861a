"""Slots that live on after a failover (Postgres 17 and later): made, kept so, and examined on the standby.

A slot with `failover` is copied to standbys that have sync_replication_slots on. It is of use there once it
is persistent: `synced` and not `temporary`.
"""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
from psycopg import pq

from headrace.config import SourceConfig
from headrace.errors import HeadraceError
from headrace.keys import literal
from headrace.sources.postgres.catalog import Connection, quoted
from headrace.sources.postgres.connection import connect, connect_replication, place, without_password
from headrace.sources.postgres.preflight_tables import Finding
from headrace.sources.postgres.recovery import in_recovery
from headrace.sources.postgres.slot import replication_error

OLDEST = 17
"""The first version that has failover slots."""

_SYNC = """
SELECT coalesce(current_setting('sync_replication_slots', true), 'off'),
  current_setting('hot_standby_feedback'), current_setting('primary_slot_name'),
  (SELECT setting FROM pg_settings WHERE name = 'primary_conninfo')
"""


def wants_failover(db: Connection, config: SourceConfig) -> bool:
    """Whether the slot is to be a failover slot: where the server can, unless `failover = false`."""
    return config.failover is not False and db.info.server_version >= OLDEST * 10_000 and not in_recovery(db)


def keep_failover(db: Connection, config: SourceConfig) -> None:
    """Make an existing slot a failover slot, or an ordinary one, as the settings now want it."""
    if db.info.server_version < OLDEST * 10_000 or in_recovery(db):
        return
    row = db.execute(
        "SELECT failover FROM pg_replication_slots WHERE slot_name = %s AND wal_status <> 'lost'",
        [config.slot],
    ).fetchone()
    wanted = wants_failover(db, config)
    if row is None or row[0] == wanted:
        return
    with connect_replication(config.url.reveal()) as holder:
        command = f"ALTER_REPLICATION_SLOT {quoted(config.slot)} (FAILOVER {str(wanted).lower()})"
        result = holder.pgconn.exec_(command.encode())
        if result.status != pq.ExecStatus.COMMAND_OK:
            raise replication_error(result, f"Source {config.name}: the slot's failover cannot be changed")


def failover_findings(db: Connection, config: SourceConfig) -> Iterator[Finding]:
    """Judge whether a failover would take the slot along: on this server, and on `standby_url` if given."""
    version = db.info.server_version // 10_000
    if version < OLDEST or in_recovery(db):
        if config.failover or config.standby_url:
            reason = f"Postgres {version} has no failover slots" if version < OLDEST else "it is a standby"
            yield Finding(
                "fail",
                f"a failover slot cannot be made: {reason}",
                f"Take failover and standby_url out of [source.{config.name}].",
            )
        return
    if config.failover is False:
        if config.standby_url:
            yield Finding("fail", "standby_url is of no use with failover = false", "Take one of them out.")
        return
    row = db.execute(
        "SELECT current_setting('synchronized_standby_slots'), (SELECT array_agg(slot_name::text ORDER BY 1) "
        "FROM pg_replication_slots WHERE slot_type = 'physical' AND active)"
    ).fetchone()
    assert row is not None
    named, standbys = str(row[0]), row[1] or []
    if standbys and not named:
        yield Finding(
            "warn",
            "synchronized_standby_slots is empty: changes may be captured before a standby has them, and a "
            "failover would then leave the log ahead of the new primary",
            f"ALTER SYSTEM SET synchronized_standby_slots = {literal(', '.join(standbys))}; "
            "SELECT pg_reload_conf();",
        )
    elif not standbys and config.failover:
        yield Finding(
            "warn",
            "no standby reads from a physical slot of this server, so nothing takes the failover slot over",
            "Give the standby a slot: primary_slot_name; and sync_replication_slots = on.",
        )
    if config.standby_url is not None:
        yield from _of_standby_url(config, named)


def _of_standby_url(config: SourceConfig, synchronized: str) -> Iterator[Finding]:
    """Judge whether the standby of `standby_url` keeps a copy of the slot that a failover can use.

    `synchronized` is the primary's synchronized_standby_slots. Raises nothing.
    """
    assert config.standby_url is not None
    url = config.standby_url.reveal()
    try:
        with connect(url) as db:
            yield from (
                Finding(found.level, f"standby {place(url)}: {found.what}", found.remedy)
                for found in _of_standby(db, config, synchronized)
            )
    except HeadraceError as error:
        yield Finding("fail", f"the standby is not examined: {error}", error.remedy)
    except psycopg.Error as error:
        words = " ".join(without_password(str(error)).split())
        yield Finding("fail", f"{place(url)} broke off the inspection: {words}", "Run the check again.")


def _of_standby(db: Connection, config: SourceConfig, synchronized: str) -> Iterator[Finding]:
    row = db.execute(_SYNC).fetchone()
    assert row is not None
    sync, feedback, slot, conninfo = row
    version = db.info.server_version
    if not in_recovery(db):
        yield Finding("fail", "it is no standby", f"Mend standby_url in [source.{config.name}].")
        return
    if version < OLDEST * 10_000:
        yield Finding("fail", f"Postgres {version // 10_000} syncs no slots", "Upgrade it.")
        return
    faults = list(_settings(sync, feedback, slot, conninfo))
    yield from faults
    names = [name.strip().strip('"') for name in synchronized.split(",")]
    if slot and synchronized and slot not in names and "*" not in names:
        every = literal(f"{synchronized}, {slot}")
        yield Finding(
            "warn",
            f"its slot {slot} is not among the primary's synchronized_standby_slots ({synchronized})",
            f"There: ALTER SYSTEM SET synchronized_standby_slots = {every}; SELECT pg_reload_conf();",
        )
    yield _copy_of_slot(db, config.slot, works=not faults)


def _settings(sync: str, feedback: str, slot: str, conninfo: str | None) -> Iterator[Finding]:
    reload = "; SELECT pg_reload_conf();"
    if sync != "on":
        remedy = f"ALTER SYSTEM SET sync_replication_slots = on{reload}"
        yield Finding("fail", "sync_replication_slots is off: it copies no slot", remedy)
    if feedback != "on":
        remedy = f"ALTER SYSTEM SET hot_standby_feedback = on{reload}"
        yield Finding("fail", "hot_standby_feedback is off, without which it syncs no slot", remedy)
    if not slot:
        remedy = f"ALTER SYSTEM SET primary_slot_name = '…'{reload} with a physical slot of the primary"
        yield Finding("fail", "primary_slot_name is empty, without which it syncs no slot", remedy)
    # A role that may not see a setting's value is given nothing, or an empty text.
    if conninfo and not psycopg.conninfo.conninfo_to_dict(conninfo).get("dbname"):
        remedy = f"ALTER SYSTEM SET primary_conninfo = '… dbname=postgres'{reload}"
        yield Finding("fail", "primary_conninfo names no dbname, without which it syncs no slot", remedy)


def _copy_of_slot(db: Connection, slot: str, *, works: bool) -> Finding:
    row = db.execute(
        "SELECT synced, temporary, invalidation_reason FROM pg_replication_slots WHERE slot_name = %s", [slot]
    ).fetchone()
    wait = "Wait until it is, and check again." if works else "Mend the settings above."
    if row is None:
        return Finding("warn", f"slot {slot} is not copied yet", wait)
    synced, temporary, invalid = row
    if not synced:
        remedy = f"SELECT pg_drop_replication_slot({literal(slot)}); there, if nothing needs it"
        return Finding("fail", f"slot {slot} there is no copy of ours and is in its way", remedy)
    if invalid:
        return Finding(
            "fail", f"the copy of slot {slot} is invalid: {invalid}", "Run the pipeline, then check."
        )
    if temporary:
        return Finding("fail", f"the copy of slot {slot} is temporary: a failover would lose it", wait)
    return Finding("ok", f"slot {slot} is copied and would outlive a failover")
