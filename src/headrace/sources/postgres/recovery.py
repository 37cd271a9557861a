"""Reading from a standby: what a server in recovery does not do, and what stands in for it.

It takes no publication and no message of ours, so nothing that we write moves the slot on. Instead the
server's own word counts: when the stream is idle, it says up to where it has sent everything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from headrace.change import Entry, Position
from headrace.sources.postgres.catalog import Connection
from headrace.sources.postgres.lsn import parse_lsn
from headrace.sources.postgres.preflight_tables import Finding

OLDEST = 16
"""The first version whose standbys decode."""

_REPLAYED = "SELECT pg_last_wal_replay_lsn()::text"

# All that was committed until then is replayed. The commit's own time is newer where there has been one
# since the standby started.
_AS_OF = """
SELECT (extract(epoch FROM greatest(pg_last_xact_replay_timestamp(), checkpoint_time)) * 1000000)::int8
FROM pg_control_checkpoint()
"""


def in_recovery(db: Connection) -> bool:
    """Whether the server is a standby."""
    row = db.execute("SELECT pg_is_in_recovery()").fetchone()
    return bool(row and row[0])


def replayed(db: Connection) -> int:
    """Return an LSN before which everything lies that the standby has replayed until now."""
    row = db.execute(_REPLAYED).fetchone()
    # Less one: what is heard may be just this, and a position has to lie beyond it.
    return parse_lsn(str(row[0])) - 1 if row and row[0] else 0


def heard_entry(db: Connection, heard: int, epoch: int) -> Entry:
    """Return the entry that takes the log to `heard`, an LSN up to which an idle stream has brought
    everything; it stands in for a heartbeat."""
    row = db.execute(_AS_OF).fetchone()
    at = Position(epoch, heard, 0)
    content = {"prefix": "headrace", "content": "heard", "lsn": heard, "txid": 0}
    payload = json.dumps(content).encode()
    return Entry("message", None, at, at, int(row[0]) if row else 0, 0, 0, payload)


def standby_findings(db: Connection) -> Iterator[Finding]:
    """Judge whether this standby can be read from."""
    version = db.info.server_version // 10_000
    if version < OLDEST:
        yield Finding(
            "fail",
            f"the server is a standby, and one of Postgres {version} does not decode",
            f"Name the primary in the url, or use a standby of {OLDEST} or later.",
        )
        return
    row = db.execute(
        "SELECT current_setting('hot_standby_feedback'), current_setting('primary_slot_name')"
    ).fetchone()
    assert row is not None
    if row[0] != "on":
        yield Finding(
            "fail",
            "hot_standby_feedback is off: the primary would clean up what the slot needs, and lose it",
            "On the standby: ALTER SYSTEM SET hot_standby_feedback = on; SELECT pg_reload_conf();",
        )
    if not row[1]:
        yield Finding(
            "warn",
            "primary_slot_name is empty: while the standby is away, the primary forgets its feedback, and "
            "the slot can be lost",
            "Make a physical slot on the primary and name it on the standby in primary_slot_name.",
        )
    yield Finding("ok", "the server is a standby that can be read from; the primary holds the publication")
