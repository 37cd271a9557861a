"""What comes of records whose keys are redriven: closed, still open, or discarded by a decision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from headrace.change import Counts
from headrace.decisions import Outcome
from headrace.destinations.books import close_records, dated, insert, numbers, record, record_from
from headrace.destinations.session import Session
from headrace.destinations.tables import OPEN, QUARANTINE
from headrace.failpoints import failpoint
from headrace.keys import literal
from headrace.prepared import Prepared
from headrace.protocols import Model

if TYPE_CHECKING:
    from headrace.destinations.database import Database

_PLACE = ["epoch", "commit", "ordinal"]


def redrive(
    destination: Database, model: Model, prepared: Prepared, decided: Outcome | None, *, dry_run: bool
) -> dict[str, int]:
    """See `Destination.redrive`."""
    name = literal(model.name)
    mine = f"q.model = {name} AND q.{OPEN} AND q.key IN (SELECT r.key FROM _hr_redriven r)"
    bad, blocked = prepared.records.num_rows, pc.sum(prepared.records["blocked"]).as_py() or 0
    with destination.writing(model.source, keep=not dry_run) as db:
        db.keep("_hr_redriven", "SELECT key FROM _hr_given", pa.table({"key": prepared.removed}))
        ((before, waited),) = db.execute(
            f"SELECT count(*), coalesce(sum(blocked), 0)::BIGINT FROM {QUARANTINE} q WHERE {mine}"
        )
        destination.make_table(db, model)
        destination.change_rows(db, model.source, model, prepared)
        discarded = _discard(db, model, decided) if decided else 0
        resolved, superseded = _close(db, model, mine, prepared.records)
        if decided:
            _say_patched(db, model, decided)
        reopened = _discarded_among(db, model, prepared.records)
        record(db, model, prepared.records)
        moved = Counts(
            superseded=superseded,
            filtered=discarded - reopened,
            quarantined=bad - before,
            blocked=blocked - waited,
        )
        rest = moved.superseded + moved.filtered + moved.quarantined + moved.blocked
        if any(numbers(moved)):
            counts = numbers(moved + Counts(applied=-rest))
            insert(db, "ledger", [(model.source, model.name, "redrive", 0, 0, *counts, model.version)])
        db.execute(
            f"UPDATE headrace.models SET open_records = (SELECT count(*) FROM {QUARANTINE} "
            f"WHERE model = {name} AND {OPEN}) WHERE model = {name}"
        )
        if decided and decided.through:
            _take_in(db, model, decided)
        failpoint("destination.redrive.commit")
    return {"resolved": resolved + superseded, "still_quarantined": bad} | (
        {"discarded": discarded} if decided else {}
    )


def _discard(db: Session, model: Model, decided: Outcome) -> int:
    """Mark the records of discarded changes, those that the destination has no more among them; returns how
    many were open."""
    name = literal(model.name)
    db.keep("_hr_discarded", "SELECT * FROM _hr_given", decided.discarded)
    db.keep(
        "_hr_lost",
        f"SELECT g.* FROM _hr_given g WHERE NOT EXISTS (SELECT 1 FROM {QUARANTINE} q "
        f"WHERE q.model = {name} AND {_at('q', 'g')})",
        dated(decided.records),
    )
    ((lost,),) = db.execute("SELECT count(*) FROM _hr_lost")
    if lost:
        record_from(db, model, "_hr_lost")
    db.keep(
        "_hr_closing",
        f"SELECT q.id, d.actor, d.reason FROM {QUARANTINE} q JOIN _hr_discarded d ON {_at('q', 'd')} "
        f"WHERE q.model = {name} AND q.{OPEN}",
    )
    closed = close_records(db, "id IN (SELECT id FROM _hr_closing)", "'discarded'", version=model.version)
    db.execute(
        f"UPDATE {QUARANTINE} AS q SET resolution = c.reason, actor = c.actor FROM _hr_closing c "
        "WHERE c.id = q.id"
    )
    return closed - int(lost)


def _close(db: Session, model: Model, mine: str, bad: pa.Table) -> tuple[int, int]:
    """Close the open records that are not bad any more; returns how many are resolved, and superseded by one
    of their key that came later."""
    newest = "first_value(q.commit) OVER w" if model.supersedes else "q.commit"
    is_newest = "row_number() OVER w = 1" if model.supersedes else "true"
    db.keep(
        "_hr_passing",
        f"""SELECT q.id, {newest} AS newest, {is_newest} AS is_newest FROM {QUARANTINE} q
        WHERE {mine} AND NOT EXISTS (SELECT 1 FROM _hr_given b WHERE {_at("q", "b")})
        WINDOW w AS (PARTITION BY q.key ORDER BY q.epoch DESC, q.commit DESC, q.ordinal DESC)""",
        bad.select(_PLACE),
    )
    tried = (
        f"resolution = 'redriven', attempts = attempts + 1, last_attempt = now(), "
        f"model_version = {literal(model.version)}"
    )
    resolved = close_records(
        db,
        "id IN (SELECT id FROM _hr_passing WHERE is_newest)",
        f"'resolved', {tried}",
        version=model.version,
    )
    by = "(SELECT p.newest FROM _hr_passing p WHERE p.id = headrace.quarantine.id)"
    superseded = close_records(
        db,
        "id IN (SELECT id FROM _hr_passing WHERE NOT is_newest)",
        f"'superseded', superseded_by = {by}, {tried}",
        version=model.version,
    )
    return resolved, superseded


def _say_patched(db: Session, model: Model, decided: Outcome) -> None:
    """Say of records that were resolved just now who patched their changes."""
    if not decided.patched.num_rows:
        return
    db.execute(
        f"UPDATE {QUARANTINE} AS q SET resolution = 'patched', actor = p.actor FROM _hr_given p "
        f"WHERE q.model = $1 AND q.resolved_at = now() AND q.resolution = 'redriven' AND {_at('q', 'p')}",
        [model.name],
        decided.patched,
    )


def _discarded_among(db: Session, model: Model, bad: pa.Table) -> int:
    """Return how many of some bad changes were discarded, and are not any more."""
    ((count,),) = db.execute(
        f"SELECT count(*) FROM {QUARANTINE} q JOIN _hr_given b ON {_at('q', 'b')} "
        "WHERE q.model = $1 AND q.status = 'discarded'",
        [model.name],
        bad.select(_PLACE),
    )
    return int(count)


def _take_in(db: Session, model: Model, decided: Outcome) -> None:
    """Note through where decisions are in the model's table."""
    db.execute("DELETE FROM headrace.decided WHERE model = $1", [model.name])
    db.execute("INSERT INTO headrace.decided VALUES ($1, $2)", [model.name, decided.through])


def _at(left: str, right: str) -> str:
    return " AND ".join(f"{left}.{name} = {right}.{name}" for name in _PLACE)
