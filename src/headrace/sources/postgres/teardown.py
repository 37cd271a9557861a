"""What a project made at its source, and how it is taken away again.

Ours is what the log has recorded as made for it: the notes `slot` and `published`, on the server of the
note `system`. Whatever else is there is left alone, however it is called.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import psycopg

from headrace.config import SourceConfig
from headrace.errors import SourceUnavailable, UserError
from headrace.keys import literal
from headrace.protocols import LogIndex
from headrace.sources.postgres.catalog import Connection, quoted
from headrace.sources.postgres.connection import LOCK_TIMEOUT, connect, place
from headrace.sources.postgres.identity import read_server, same_system
from headrace.sources.postgres.recovery import in_recovery
from headrace.sources.postgres.slot import owned_slot

PREFIX = "headrace_"

_RETAINED = """
SELECT slot_name::text, active, temporary, pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery()
  THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END, restart_lsn)::int8
FROM pg_replication_slots WHERE slot_name = %s OR slot_name LIKE %s ORDER BY 1
"""


@dataclass(frozen=True, slots=True)
class Made:
    """A slot or publication at a source. `retained` is the WAL kept for a slot, in bytes.

    `keep` says why it is left alone; '' for what is ours to drop. `statement` drops it.
    """

    kind: Literal["slot", "publication"]
    name: str
    retained: int | None
    keep: str
    statement: str


def list_made(config: SourceConfig, log: LogIndex) -> list[Made]:
    """Return what is at the source of this project's, and what looks as if it were.

    Raises SourceUnavailable, and UserError for another server than the one that filled the log.
    """
    with connect(config.url.reveal()) as db:
        same_system(read_server(db), config, log)
        return [*_slots(db, log), *_publications(db, config, log)]


def drop_made(config: SourceConfig, log: LogIndex, made: Made) -> None:
    """Drop one thing that is ours, and remember that it was us.

    Raises SourceUnavailable when somebody holds it, UserError when the role may not.
    """
    assert not made.keep
    with connect(config.url.reveal()) as db:
        # Before and not after: a run must never take a slot that we dropped for one that was lost.
        log.set_note("torn_down", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))
        try:
            db.execute(made.statement.encode())
        except (psycopg.errors.UndefinedObject, psycopg.errors.UndefinedTable):
            return
        except (psycopg.errors.ObjectInUse, psycopg.errors.LockNotAvailable) as error:
            words = error.diag.message_primary
            raise SourceUnavailable(
                f"The {made.kind} {made.name} is held by somebody (waited {LOCK_TIMEOUT}): {words}.",
                "End what holds it and run again.",
            ) from error
        except psycopg.errors.InsufficientPrivilege as error:
            raise UserError(
                f"The role may not drop the {made.kind} {made.name}: {error.diag.message_primary}.",
                f"Let its owner run: {made.statement}",
            ) from error


def refuse_torn_down(config: SourceConfig, log: LogIndex) -> None:
    """Refuse to read a source that was torn down."""
    when = log.note("torn_down")
    if when is not None:
        raise UserError(
            f"Source {config.name}: `headrace teardown` dropped the slot on {when}, and what was committed "
            "since cannot be had through it.",
            "To begin anew, move the state folder and the destination away and run again.",
        )


def _slots(db: Connection, log: LogIndex) -> Iterator[Made]:
    recorded = owned_slot(log)
    pattern = PREFIX.replace("_", r"\_") + "%"
    for name, active, temporary, retained in db.execute(_RETAINED, [recorded, pattern]).fetchall():
        keep = ""
        if name != recorded:
            keep = "not recorded for this project"
        elif active:
            keep = "somebody reads it"
        if not temporary:
            yield Made("slot", name, retained, keep, f"SELECT pg_drop_replication_slot({literal(name)});")


def _publications(db: Connection, config: SourceConfig, log: LogIndex) -> Iterator[Made]:
    recorded = log.note("published")
    names = [name for name in dict.fromkeys((recorded, config.publication)) if name]
    found = db.execute("SELECT pubname::text FROM pg_publication WHERE pubname = ANY (%s)", [names])
    standby = in_recovery(db)
    for (name,) in found.fetchall():
        keep = "" if name == recorded else "not made by this project"
        if standby:
            keep = f"{place(config.url.reveal())} is a standby: drop it on the primary"
        yield Made("publication", name, None, keep, f"DROP PUBLICATION {quoted(name)};")
