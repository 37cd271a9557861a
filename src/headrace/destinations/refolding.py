"""What the whole histories of some keys come to takes the place of their rows and of their open records:
these are closed, still open, or discarded by a decision."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from headrace.change import Counts
from headrace.decisions import Outcome
from headrace.destinations.books import close_records, dated, insert, numbers, record, record_from
from headrace.destinations.session import Session
from headrace.destinations.tables import OPEN, QUARANTINE
from headrace.keys import literal
from headrace.prepared import Prepared
from headrace.protocols import Model

if TYPE_CHECKING:
    from headrace.destinations.database import Database

_PLACE = ["epoch", "commit", "ordinal"]


class Refolded(NamedTuple):
    """How many records were closed since they are no longer bad, how many were discarded, how many are open
    of the keys now, and by how many these are more than before."""

    resolved: int
    discarded: int
    still_open: int
    more: int


def refold(
    destination: Database, db: Session, model: Model, prepared: Prepared, decided: Outcome | None = None
) -> Refolded:
    """Let the outcome of the whole histories of some keys (`prepared.removed`) be what they are: write their
    rows, close the open records that it does not have, write those that it has, and account for all."""
    name = literal(model.name)
    of_keys = "q.key IN (SELECT r.key FROM _hr_redriven r)"
    db.keep("_hr_redriven", "SELECT key FROM _hr_given", pa.table({"key": prepared.removed}))
    if decided and decided.discarded.num_rows:
        # What does not decode has no key.
        db.keep("_hr_keyless", "SELECT * FROM _hr_given", decided.discarded.select(_PLACE))
        of_keys += f" OR q.key IS NULL AND EXISTS (SELECT 1 FROM _hr_keyless k WHERE {_at('q', 'k')})"
    mine = f"q.model = {name} AND q.{OPEN} AND ({of_keys})"
    before = _opened(db, mine)
    destination.make_table(db, model)
    destination.change_rows(db, model.source, model, prepared)
    discarded = _discard(db, model, decided) if decided else 0
    resolved, superseded = _close(db, model, mine, prepared.records)
    if decided:
        _say_patched(db, model, decided)
    reopened = _discarded_among(db, model, prepared.records)
    record(db, model, prepared.records)
    after = _opened(db, mine)
    quarantined, waiting, blocked = (now - was for now, was in zip(after, before, strict=True))
    moved = Counts(
        superseded=superseded,
        filtered=discarded - reopened,
        quarantined=quarantined,
        waiting=waiting,
        blocked=blocked,
    )
    if any(numbers(moved)):
        counts = numbers(moved + Counts(applied=-sum(numbers(moved))))
        insert(db, "ledger", [(model.source, model.name, "redrive", 0, 0, *counts, model.version)])
    if decided and decided.through:
        _take_in(db, model, decided)
    return Refolded(resolved + superseded, discarded, after[0] + after[1], quarantined + waiting)


def _opened(db: Session, mine: str) -> tuple[int, int, int]:
    """Return how many open records there are, how many that wait, and how many changes are behind them."""
    ((records, waiting, blocked),) = db.execute(
        "SELECT count(*), count(*) FILTER (WHERE status = 'waiting'), coalesce(sum(blocked), 0)::BIGINT "
        f"FROM {QUARANTINE} q WHERE {mine}"
    )
    return records - waiting, waiting, blocked


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
