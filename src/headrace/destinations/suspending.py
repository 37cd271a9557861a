"""Models that stand still in a destination: since they are broken, since their breaker tripped, or since a
person wants it so.

`headrace.models` says that, and why; `headrace.suspensions` who it was, where it was one of the latter two.
What a person has suspended no other file and no restart sets going, and what has tripped is to prove itself
first.
"""

from __future__ import annotations

from typing import Literal

from headrace.destinations.books import insert
from headrace.destinations.session import Session

By = Literal["breaker", "hand"]

STATES = (
    'SELECT m.model, m.source, m.version, m.state, m.reason, m."offset", m.open_records, '
    "coalesce(s.suspended_by, '') FROM headrace.models m "
    "LEFT JOIN headrace.suspensions s ON s.model = m.model WHERE m.source = $1"
)
"""The query whose rows are the fields of `ModelState`, of the source `$1`."""


def suspend(db: Session, model: str, source: str, version: str, reason: str, *, tripped: bool) -> bool:
    """See `Destination.suspend`."""
    if _held(db, model):
        return False
    known = db.execute("SELECT state, version, reason FROM headrace.models WHERE model = $1", [model])
    if known == [("suspended", version, reason)]:
        return False
    if known:
        db.execute(
            "UPDATE headrace.models SET state = 'suspended', version = $1, reason = $2, "
            "updated_at = now() WHERE model = $3",
            [version, reason, model],
        )
    else:
        insert(db, "models", [(model, source, version, "suspended", reason, 0, 0, 0, 0, 0)])
    db.execute("DELETE FROM headrace.suspensions WHERE model = $1", [model])
    if tripped:
        insert(db, "suspensions", [(model, "breaker", "")])
    return True


def hold(db: Session, model: str, source: str, reason: str) -> None:
    """See `Destination.hold`."""
    known = db.execute("SELECT state FROM headrace.models WHERE model = $1", [model])
    if not known:
        insert(db, "models", [(model, source, "", "suspended", reason, 0, 0, 0, 0, 0)])
    held = _held(db, model)
    db.execute(
        "UPDATE headrace.models SET state = 'suspended', reason = $1, updated_at = now() WHERE model = $2",
        [reason, model],
    )
    if held:
        return
    db.execute("DELETE FROM headrace.suspensions WHERE model = $1", [model])
    insert(db, "suspensions", [(model, "hand", known[0][0] if known else "joining")])


def release(db: Session, model: str) -> bool:
    """See `Destination.release`."""
    rows = db.execute(
        'SELECT m.state, s.suspended_by, s.state, m."offset" >= coalesce(p."offset", 0) '
        "FROM headrace.models m LEFT JOIN headrace.suspensions s ON s.model = m.model "
        "LEFT JOIN headrace.progress p ON p.source = m.source WHERE m.model = $1",
        [model],
    )
    if not rows or (rows[0][0] != "suspended" and rows[0][1] != "hand"):
        return False
    _, by, before, is_current = rows[0]
    if by == "hand" and before == "in_sync" and is_current:
        # Nothing has come since: it stands where it stood.
        db.execute("UPDATE headrace.models SET state = 'in_sync', reason = '' WHERE model = $1", [model])
    else:
        # No version's: whatever it was suspended for besides, it is tried again.
        db.execute(
            "UPDATE headrace.models SET state = 'joining', version = '', reason = '', updated_at = now() "
            "WHERE model = $1",
            [model],
        )
    db.execute("DELETE FROM headrace.suspensions WHERE model = $1 AND suspended_by = 'hand'", [model])
    return True


def reconsider(db: Session, source: str) -> None:
    """See `Destination.reconsider`."""
    db.execute(
        "UPDATE headrace.models SET version = '' WHERE source = $1 AND state = 'suspended' "
        "AND model NOT IN (SELECT model FROM headrace.suspensions)",
        [source],
    )


def _held(db: Session, model: str) -> bool:
    query = "SELECT count(*) FROM headrace.suspensions WHERE model = $1 AND suspended_by = 'hand'"
    return db.execute(query, [model]) != [(0,)]
