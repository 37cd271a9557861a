"""Rows of a table without a key: so many of a source key go, whichever they are, since they are the same."""

from __future__ import annotations

import duckdb

from headrace.destinations.tables import OPEN, QUARANTINE, Table, target_of
from headrace.keys import literal
from headrace.protocols import Prepared


def take_off(
    db: duckdb.DuckDBPyConnection,
    source: str,
    name: str,
    table: Table,
    prepared: Prepared,
    commit: int,
    records: str = QUARANTINE,
) -> int:
    """Take off what `Prepared.fewer` says: of a key's open records first, the newest first, then of its rows.

    `name` is the model of the records, which are in the table `records`; `table` holds its rows. Records
    first, since where a changed model made some of the same rows bad, what stays should be good. Returns
    how many became superseded.
    """
    _hr_fewer = prepared.fewer
    if _hr_fewer is None or not _hr_fewer.num_rows:
        return 0
    model = literal(name)
    db.execute(
        f"""CREATE OR REPLACE TEMP TABLE _hr_taken AS
        SELECT id, key FROM (
          SELECT q.id, q.key, f.count, row_number() OVER (
            PARTITION BY q.key ORDER BY q.epoch DESC, q.commit DESC, q.ordinal DESC) AS place
          FROM {records} q JOIN _hr_fewer f ON q.key = f._source_key
          WHERE q.model = {model} AND q.{OPEN})
        WHERE place <= count"""
    )
    db.execute(
        f"UPDATE {records} SET status = 'superseded', superseded_by = {commit}, "
        "resolved_at = now() WHERE id IN (SELECT id FROM _hr_taken)"
    )
    target = target_of(table.name)
    db.execute(
        f"""DELETE FROM {target} WHERE rowid IN (
        SELECT row FROM (
          SELECT t.rowid AS row, f.count - coalesce(r.count, 0) AS count,
            row_number() OVER (PARTITION BY t._source_key ORDER BY t.rowid DESC) AS place
          FROM {target} t JOIN _hr_fewer f ON t._source_key = f._source_key
          LEFT JOIN (SELECT key, count(*) AS count FROM _hr_taken GROUP BY key) r ON r.key = t._source_key
          WHERE t._source = {literal(source)})
        WHERE place <= count)"""
    )
    return len(db.execute("SELECT 1 FROM _hr_taken").fetchall())
