"""From changes to rows where a table has no key: its rows are a multiset, and only counts can be told.

The source key of a row is its whole content. An insert puts one row of its key onto a stack, a delete
takes the newest off, an update does both. What stays of a slice is how many rows it takes off what was
there before, and the changes whose rows it leaves on top; so any cut into slices comes to the same.
Rows of one key fare the same under a model: all good, all filtered or all bad.
"""

from __future__ import annotations

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.change import Counts, TableSchema
from headrace.keys import identity
from headrace.prepared import Prepared
from headrace.transform.evaluate import Evaluation
from headrace.transform.fold import NOTHING, records_of, undecided, with_fatal

_NO_KEYS = pa.array([], pa.string())


def fold_multiset(
    db: duckdb.DuckDBPyConnection, schema: TableSchema, changes: pa.Table, evaluation: Evaluation
) -> Prepared:
    """Fold changes (as `Staging.read` returns them) of a table without a key under one model.

    A key's rows come as often as the changes put it and do not take it off again. Raises ModelBroken when
    the model cannot run at all.
    """
    total = changes.num_rows
    if not total:
        return NOTHING
    resets = np.flatnonzero(pc.equal(changes["_op"], "t").to_numpy(zero_copy_only=False))
    live = changes.slice(int(resets[-1]) + 1) if len(resets) else changes
    events, left, fewer = _stack(db, schema, live)
    verdicts = evaluation.run(undecided(events, left))
    verdicts = with_fatal(evaluation, verdicts, events)
    verdicts = verdicts.filter(pc.is_in(verdicts["n"], value_set=left))
    bad = verdicts.filter(pc.equal(verdicts["verdict"], "bad"))["n"].combine_chunks().sort()
    filtered = int(pc.sum(pc.equal(verdicts["verdict"], "filtered")).as_py() or 0)
    deletes = int(pc.sum(pc.equal(live["_op"], "d")).as_py() or 0)
    counts = Counts(
        read=total,
        applied=len(left) - filtered - len(bad) + deletes + len(resets),
        superseded=total - len(left) - deletes - len(resets),
        filtered=filtered,
        quarantined=len(bad),
        **evaluation.tolerated(None),
    )
    # A reset takes all that was there before.
    gone = fewer.slice(0, 0) if len(resets) else fewer
    records = records_of(evaluation, events, bad)
    return Prepared(bool(len(resets)), _NO_KEYS, evaluation.rows(None), records, counts, gone)


def _stack(
    db: duckdb.DuckDBPyConnection, schema: TableSchema, changes: pa.Table
) -> tuple[pa.Table, pa.Array, pa.Table]:
    """Run the changes over the stacks of their keys.

    Returns the changes with `_hr_n` (their place) and `_hr_k` (their source key), the numbers of those
    whose row is left on top, and `_source_key` with the `count` of rows taken off what was there before.
    """
    own, before = identity(schema)
    numbered = changes.append_column("_hr_n", pa.array(np.arange(changes.num_rows, dtype=np.int64)))
    db.register("changes", numbered)
    keys = db.sql(f"SELECT {own} AS k FROM changes ORDER BY _hr_n").to_arrow_table()["k"]
    events = numbered.append_column("_hr_k", keys)
    if pc.all(pc.is_in(changes["_op"], value_set=pa.array(["c", "r"]))).as_py() is not False:
        left = events["_hr_n"].combine_chunks()
        return events, left, pa.table({"_source_key": _NO_KEYS, "count": pa.array([], pa.int64())})
    db.register("changes", events)
    # An update takes its old row off before it puts the new one, which may be the same.
    db.execute(
        f"""CREATE OR REPLACE TEMP TABLE steps AS
        SELECT k, n, step, sum(step) OVER (PARTITION BY k ORDER BY n, step) AS height FROM (
          SELECT _hr_k AS k, _hr_n AS n, CASE WHEN _op = 'd' THEN -1 ELSE 1 END AS step FROM changes
          UNION ALL SELECT {before}, _hr_n, -1 FROM changes WHERE _op = 'u')"""
    )
    left = db.sql(
        """SELECT n FROM (SELECT n, step, height, min(height) OVER (
          PARTITION BY k ORDER BY n, step ROWS BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING) AS lowest
          FROM steps) WHERE step = 1 AND lowest = height ORDER BY n"""
    ).to_arrow_table()
    fewer = db.sql(
        "SELECT k AS _source_key, -min(height)::BIGINT AS count FROM steps GROUP BY k HAVING min(height) < 0"
    ).to_arrow_table()
    return events, left["n"].combine_chunks(), fewer
