"""The fold of a model that keeps deleted rows: a row stays as it was last, with the time of its delete.

A row is marked by the first delete, truncate or change of its key since its last good change; a good change
makes it anew, and one that leaves the filter takes it away, marked or not. So where a slice has no good
change of a key, all that it can say is from when on the row that was there before is deleted, unless it is
already; and any cut into slices comes to the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.change import Counts
from headrace.prepared import Prepared
from headrace.transform.fold import (
    NOTHING,
    earlier_of_bad,
    events_of,
    points_of,
    records_of,
    undecided,
    with_fatal,
)

if TYPE_CHECKING:
    from headrace.transform.evaluate import Evaluation

# A change has an even place, a truncate the odd one before the change that follows it.
_EFFECTS = """CREATE OR REPLACE TEMP TABLE effects AS
SELECT p.k, 2 * p.n AS place, p.own, t.moment, CASE WHEN p.gone THEN 'gone' ELSE v.verdict END AS what
FROM points p JOIN times t ON t.n = p.n LEFT JOIN verdicts v ON v.n = p.n AND p.own"""

_OF_TRUNCATES = """INSERT INTO effects
SELECT DISTINCT k, place, false, moment, 'gone' FROM (
  SELECT e.k, c.place, c.moment FROM effects e ASOF JOIN cleared c ON e.place < c.place
  UNION ALL SELECT e.k, c.place, c.moment FROM effects e, (FROM cleared ORDER BY place LIMIT 1) c)"""

_OUTCOMES = """CREATE OR REPLACE TEMP TABLE outcomes AS
WITH settled AS (
  SELECT k, coalesce(max(place) FILTER (what IN ('good', 'filtered')), -2) AS place,
    arg_max(what, place) FILTER (what IN ('good', 'filtered')) AS what,
    coalesce(max(place) FILTER (what = 'gone'), -2) AS last_gone
  FROM effects GROUP BY k),
gone AS (
  SELECT e.k, arg_min(e.moment, e.place) AS moment, arg_min(e.own, e.place) AS own
  FROM effects e JOIN settled s ON s.k = e.k WHERE e.what = 'gone' AND e.place > s.place GROUP BY e.k)
SELECT s.*, make_timestamptz(g.moment) AS moment, coalesce(g.own, false) AS own
FROM settled s LEFT JOIN gone g ON g.k = s.k"""
"""Of each key: `place` of its last change that was good or filtered, and which of the two (`what`); and of
the first effect behind it by which the row was gone its time `moment`, and whether it was the key's `own`."""

_BAD = """SELECT e.place // 2 AS n FROM effects e JOIN outcomes o ON o.k = e.k
WHERE e.what = 'bad' AND e.place > greatest(o.place, o.last_gone) ORDER BY e.place"""


def fold_soft(
    db: duckdb.DuckDBPyConnection, key: Sequence[str], changes: pa.Table, evaluation: Evaluation
) -> Prepared:
    """Fold changes (as `Staging.read` returns them) under one model that keeps deleted rows.

    `key` names the source's key columns. Raises ModelBroken when the model cannot run at all.
    """
    if not changes.num_rows:
        return NOTHING
    is_truncate = pc.equal(changes["_op"], "t")
    events = events_of(db, key, changes.filter(pc.invert(is_truncate)))
    points = points_of(db, key, events)
    cleared = _cleared(changes, is_truncate)
    db.register("points", points)
    lasts = db.sql("SELECT max(n) AS n FROM points WHERE own AND NOT gone GROUP BY k ORDER BY n")
    verdicts = evaluation.run(undecided(events, lasts.to_arrow_table()["n"]))
    verdicts = with_fatal(evaluation, verdicts, events)
    if pc.any(pc.equal(verdicts["verdict"], "bad")).as_py():
        verdicts = evaluation.run(undecided(events, earlier_of_bad(points, verdicts)))
        verdicts = with_fatal(evaluation, verdicts, events)
    _decide(db, events, points, verdicts, cleared)
    bad = db.sql(_BAD).to_arrow_table()["n"].combine_chunks()
    records = records_of(evaluation, events, bad)
    removed = db.sql("SELECT k FROM outcomes WHERE what IS NOT NULL").to_arrow_table()["k"]
    good = db.sql("SELECT place // 2 AS n FROM outcomes WHERE what = 'good'").to_arrow_table()["n"]
    settled = good.combine_chunks()
    counts = _counts(db, changes.num_rows, int(pc.sum(is_truncate).as_py()), records.num_rows)
    return Prepared(
        reset=cleared.num_rows > 0,
        removed=removed.combine_chunks(),
        rows=_rows(db, evaluation, settled),
        records=records,
        counts=counts + Counts(**evaluation.tolerated(settled)),
        deleted=_deleted(db),
    )


def _cleared(changes: pa.Table, is_truncate: pa.ChunkedArray) -> pa.Table:
    """Return the truncates with their places between the other changes; of several there, the first."""
    marks = is_truncate.to_numpy()
    before = np.cumsum(~marks)[marks]  # how many other changes
    places, first = np.unique(2 * before - 1, return_index=True)
    times = changes.filter(is_truncate)["_committed_at"].to_numpy()[first]
    return pa.table({"place": pa.array(places, pa.int64()), "moment": pa.array(times, pa.int64())})


def _decide(
    db: duckdb.DuckDBPyConnection, events: pa.Table, points: pa.Table, verdicts: pa.Table, cleared: pa.Table
) -> None:
    """Make the relations `effects` and `outcomes`."""
    times = events.select(["_hr_n", "_committed_at"]).rename_columns(["n", "moment"])
    for name, table in (("points", points), ("verdicts", verdicts), ("cleared", cleared), ("times", times)):
        db.register(name, table)
    db.execute(_EFFECTS)
    if cleared.num_rows:
        db.execute(_OF_TRUNCATES)
    db.execute(_OUTCOMES)


def _rows(db: duckdb.DuckDBPyConnection, evaluation: Evaluation, settled: pa.Array) -> pa.Table:
    """Return the rows of the keys whose last word was a good change, with the time of a delete behind it."""
    db.register("made", evaluation.rows(settled))
    return db.sql(
        "SELECT m.*, o.moment AS _deleted_at FROM made m JOIN outcomes o ON o.k = m._source_key"
    ).to_arrow_table()


def _deleted(db: duckdb.DuckDBPyConnection) -> pa.Table:
    """Return what the rows that were there before are marked with."""
    return db.sql(
        """SELECT key, moment FROM (
          SELECT k AS key, moment FROM outcomes WHERE what IS NULL AND moment IS NOT NULL
          UNION ALL SELECT NULL, make_timestamptz(min(moment)) FROM cleared HAVING count(*) > 0)
        ORDER BY key NULLS LAST"""
    ).to_arrow_table()


def _counts(db: duckdb.DuckDBPyConnection, read: int, truncates: int, quarantined: int) -> Counts:
    ((good, filtered, deletes),) = db.execute(
        "SELECT count(*) FILTER (what = 'good'), count(*) FILTER (what = 'filtered'), "
        "count(*) FILTER (own AND what IS DISTINCT FROM 'filtered') FROM outcomes"
    ).fetchall()
    applied = good + deletes + truncates
    superseded = read - applied - filtered - quarantined
    return Counts(read, applied, superseded, filtered, quarantined)
