"""Rows of a table without a key: so many of a source key go, whichever they are, since they are the same."""

from __future__ import annotations

from headrace.destinations.issues import count_closing
from headrace.destinations.session import Session
from headrace.destinations.tables import OPEN, QUARANTINE
from headrace.keys import literal
from headrace.prepared import Prepared


def take_off(
    db: Session,
    source: str,
    model: str,
    target: str,
    prepared: Prepared,
    commit: int,
    records: str = QUARANTINE,
) -> int:
    """Take off what `Prepared.fewer` says: of a key's open records first, the newest first, then of its rows.

    The model's records are in the table `records`, its rows in `target`. Records first, since where a
    changed model made some of the same rows bad, what stays should be good. Returns how many became
    superseded.
    """
    fewer = prepared.fewer
    if fewer is None or not fewer.num_rows:
        return 0
    db.keep(
        "_hr_taken",
        f"""SELECT id, key FROM (
          SELECT q.id, q.key, f.count, row_number() OVER (
            PARTITION BY q.key ORDER BY q.epoch DESC, q.commit DESC, q.ordinal DESC) AS place
          FROM {records} q JOIN _hr_given f ON q.key = f._source_key
          WHERE q.model = {literal(model)} AND q.{OPEN}) o
        WHERE place <= count""",
        fewer,
    )
    if records == QUARANTINE:
        count_closing(db, "id IN (SELECT id FROM _hr_taken)")
    taken = db.change(
        f"UPDATE {records} SET status = 'superseded', superseded_by = {commit}, "
        "resolved_at = now() WHERE id IN (SELECT id FROM _hr_taken)"
    )
    db.execute(
        f"""DELETE FROM {target} WHERE {db.row_id} IN (
        SELECT which FROM (
          SELECT t.{db.row_id} AS which, f.count - coalesce(r.count, 0) AS count,
            row_number() OVER (PARTITION BY t._source_key ORDER BY t.{db.row_id} DESC) AS place
          FROM {target} t JOIN _hr_given f ON {db.same_key("t._source_key", "f._source_key")}
          LEFT JOIN (SELECT key, count(*) AS count FROM _hr_taken GROUP BY key) r ON r.key = t._source_key
          WHERE t._source = {literal(source)}) o
        WHERE place <= count)""",
        given=fewer,
    )
    return taken
