"""What the whole histories of some keys come to takes the place of their rows and of their open records."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from headrace.change import Counts
from headrace.destinations.books import insert, numbers, record
from headrace.destinations.session import Session
from headrace.destinations.tables import OPEN
from headrace.keys import literal
from headrace.prepared import Prepared
from headrace.protocols import Model

if TYPE_CHECKING:
    from headrace.destinations.database import Database


class Refolded(NamedTuple):
    """How many records were resolved, how many are open of the keys now, and by how many these are more than
    before."""

    resolved: int
    still_open: int
    more: int


def refold(destination: Database, db: Session, model: Model, prepared: Prepared) -> Refolded:
    """Let the outcome of the whole histories of some keys (`prepared.removed`) be what they are: write their
    rows, resolve the open records that it does not have, write those that it has, and account for all."""
    name = literal(model.name)
    mine = f"q.model = {name} AND q.{OPEN} AND q.key IN (SELECT r.key FROM _hr_redriven r)"
    same = "b.epoch = q.epoch AND b.commit = q.commit AND b.ordinal = q.ordinal"
    db.keep("_hr_redriven", "SELECT key FROM _hr_given", pa.table({"key": prepared.removed}))
    before = _opened(db, mine)
    destination.make_table(db, model)
    destination.change_rows(db, model.source, model, prepared)
    resolved = db.change(
        f"UPDATE headrace.quarantine q SET status = 'resolved', resolution = 'redriven', "
        f"resolved_at = now(), attempts = attempts + 1, last_attempt = now(), "
        f"model_version = {literal(model.version)} WHERE {mine} "
        f"AND NOT EXISTS (SELECT 1 FROM _hr_given b WHERE {same})",
        given=prepared.records.select(["epoch", "commit", "ordinal"]),
    )
    record(db, model, prepared.records)
    after = _opened(db, mine)
    quarantined, waiting, blocked = (now - was for now, was in zip(after, before, strict=True))
    if quarantined or waiting or blocked:
        applied = -quarantined - waiting - blocked
        moved = Counts(applied=applied, quarantined=quarantined, waiting=waiting, blocked=blocked)
        insert(db, "ledger", [(model.source, model.name, "redrive", 0, 0, *numbers(moved), model.version)])
    return Refolded(resolved, after[0] + after[1], quarantined + waiting)


def _opened(db: Session, mine: str) -> tuple[int, int, int]:
    """Return how many open records there are, how many that wait, and how many changes are behind them."""
    ((records, waiting, blocked),) = db.execute(
        "SELECT count(*), count(*) FILTER (WHERE status = 'waiting'), coalesce(sum(blocked), 0)::BIGINT "
        f"FROM headrace.quarantine q WHERE {mine}"
    )
    return records - waiting, waiting, blocked
