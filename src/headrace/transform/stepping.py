"""From changes in source order to the steps of their source keys, for models that keep all states of a row.

What becomes of steps depends on what stands before them, see `headrace.steps`; here it is only said what
each change amounts to, which is the same whatever the slice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from headrace import steps
from headrace.change import Counts
from headrace.keys import literal, quoted
from headrace.prepared import Prepared
from headrace.transform.fold import (
    NO_ROWS,
    NOTHING,
    events_of,
    points_of,
    records_of,
    undecided,
    with_fatal,
)

if TYPE_CHECKING:
    from headrace.transform.model import RowModel

_NO_KEYS = pa.array([], pa.string())


def step(db: duckdb.DuckDBPyConnection, model: RowModel, changes: pa.Table) -> Prepared:
    """Say what each of some changes (as `Staging.read` returns them) amounts to under a model.

    Raises ModelBroken when the model cannot run at all.
    """
    if not changes.num_rows:
        return NOTHING
    key, makes = model.schema.key, model.kind.materialize
    assert makes != "latest"
    is_truncate = pc.equal(changes["_op"], "t")
    events = events_of(db, key, changes.filter(pc.invert(is_truncate)))
    points = points_of(db, key, events)
    db.register("arrow_changes", events)
    db.execute("CREATE OR REPLACE TEMP TABLE happened AS FROM arrow_changes")
    db.register("points", points)
    db.register("truncates", changes.filter(is_truncate))
    _say(db, model)
    evaluation = model.evaluation(db)
    asked = db.sql("SELECT n FROM said WHERE own AND what IS NULL ORDER BY n").to_arrow_table()["n"]
    verdicts = evaluation.run(undecided(events, asked))
    db.register("verdicts", with_fatal(evaluation, verdicts, events))
    db.execute(
        "UPDATE said SET what = CASE v.verdict WHEN 'good' THEN 'row' ELSE v.verdict END FROM verdicts v "
        "WHERE v.n = said.n AND said.own AND said.what IS NULL"
    )
    db.register("good", evaluation.good())
    db.execute("CREATE OR REPLACE TEMP TABLE made AS SELECT *, true AS _own FROM good")
    first_bad = db.sql("SELECT min(n) AS n FROM said WHERE what = 'bad' GROUP BY k ORDER BY n")
    records = records_of(evaluation, events, first_bad.to_arrow_table()["n"].combine_chunks())
    if makes == "append" and model.kind.delete == "soft":
        _tell_deletes(db, model, events)
    made = steps.Steps(makes, _steps(db, model))
    counts = Counts(read=changes.num_rows, applied=changes.num_rows, **evaluation.tolerated(None))
    return Prepared(False, _NO_KEYS, NO_ROWS, records, counts, steps=made)


def _say(db: duckdb.DuckDBPyConnection, model: RowModel) -> None:
    """Make the relation `said`: what each effect of a change amounts to, null where a row is to be judged."""
    what = "CASE WHEN p.gone THEN 'gone' END"
    if model.kind.materialize == "history":
        last = "row_number() OVER (PARTITION BY p.k, e._epoch, e._commit ORDER BY p.n DESC) = 1"
        what = f"CASE WHEN NOT {last} OR t.ordinal > e._ordinal THEN 'over' WHEN p.gone THEN 'gone' END"
    db.execute(
        f"CREATE OR REPLACE TEMP TABLE said AS SELECT p.*, {what} AS what "
        "FROM points p JOIN happened e ON e._hr_n = p.n LEFT JOIN ("
        "SELECT _epoch, _commit, max(_ordinal) AS ordinal FROM truncates GROUP BY ALL) t "
        "ON t._epoch = e._epoch AND t._commit = e._commit"
    )
    if model.kind.materialize == "append":
        # A copied row that says what is known already is no change.
        cells = ", ".join(f"e.{quoted(column.name)}" for column in model.schema.columns)
        db.execute(
            f"""UPDATE said SET what = 'same' FROM (
              SELECT p.n, p.own, e._op = 'r' AND NOT p.gone AND NOT lag(p.gone) OVER w
                AND row({cells}) IS NOT DISTINCT FROM lag(row({cells})) OVER w AS same
              FROM points p JOIN happened e ON e._hr_n = p.n WINDOW w AS (PARTITION BY p.k ORDER BY p.n)
            ) s WHERE s.same AND s.own AND said.own AND s.n = said.n"""
        )


def _tell_deletes(db: duckdb.DuckDBPyConnection, model: RowModel, events: pa.Table) -> None:
    """Have each delete, and each key that was changed, tell of it with the outputs of what was there before.

    Where the source sends no more of that than the key, the other cells are null, so the contract and WHERE
    are not asked, and what cannot be computed is null.
    """
    before = ", ".join(
        f"_before[{literal(name)}] AS {quoted(name)}" for name in (c.name for c in model.schema.columns)
    )
    db.execute(
        f"""CREATE OR REPLACE TEMP TABLE left_behind AS
        SELECT *, true AS _hr_own FROM happened
        UNION ALL BY NAME SELECT * REPLACE ({before}, 'd' AS _op), false AS _hr_own
        FROM happened WHERE _before IS NOT NULL"""
    )
    gone = db.sql(
        """SELECT l.* REPLACE (s.k AS _hr_k, 2 * s.n + s.own::INT AS _hr_n)
        FROM said s JOIN left_behind l ON l._hr_n = s.n AND l._hr_own = s.own WHERE s.what = 'gone'"""
    ).to_arrow_table()
    if not gone.num_rows:
        return
    outputs = tuple((name, f"TRY({expression})", type_) for name, expression, type_ in model.outputs)
    evaluation = replace(model, outputs=outputs, where="", checks=()).evaluation(db)
    evaluation.run(gone.select(events.column_names))
    db.register("good", evaluation.good())
    db.execute(
        "INSERT INTO made BY NAME SELECT * REPLACE (_hr_n // 2 AS _hr_n), _hr_n % 2 = 1 AS _own FROM good"
    )
    db.execute("UPDATE said SET what = 'deleted' WHERE what = 'gone'")


def _steps(db: duckdb.DuckDBPyConnection, model: RowModel) -> pa.Table:
    names = [name for name in model.types() if name not in model.kind.columns]
    outputs = "".join(f", m.{quoted(name)}" for name in names)
    place = "_epoch, _commit, _ordinal, make_timestamptz(_committed_at) AS _moment"
    return db.sql(
        f"""SELECT s.k AS _source_key, {place}, s.what AS _what, s.own AS _own{outputs}
        FROM said s JOIN happened h ON h._hr_n = s.n LEFT JOIN made m ON m._hr_n = s.n AND m._own = s.own
        UNION ALL BY NAME SELECT NULL::VARCHAR AS _source_key, {place}, 'truncate' AS _what, true AS _own
        FROM truncates"""
    ).to_arrow_table()


def settle(db: duckdb.DuckDBPyConnection, prepared: Prepared) -> Prepared:
    """Return what the steps of whole histories come to: the rows of a table in which nothing was before, the
    open records, each with how many changes it blocks, and where the changes went."""
    made = prepared.steps
    if made is None:
        return prepared

    def keep(name: str, query: str) -> None:
        db.execute(f"CREATE OR REPLACE TEMP TABLE {name} AS {query}")

    db.register("arrow_steps", made.table)
    keep("steps", "FROM arrow_steps")
    truncates = pc.sum(pc.equal(made.table["_what"], "truncate")).as_py() or 0
    steps.judge(keep, made.makes, "steps", None, truncated=truncates > 0)
    names = [quoted(name) for name in made.outputs]
    if made.makes == "history":
        sums = [f"hash({', '.join(cells)})" for cells in (names, [*names[::-1], "'again'"])]
        steps.make_versions(keep, "steps", None, sums)
    rows = db.sql(steps.made_rows(made.makes, "steps", made.outputs, None)).to_arrow_table()
    db.register("records", prepared.records)
    records = db.sql(
        """SELECT r.* REPLACE (coalesce(b.blocked, 0) AS blocked) FROM records r
        JOIN _hr_judged j ON j.k = r.key AND j._epoch = r.epoch AND j._commit = r.commit
          AND j._ordinal = r.ordinal AND j.outcome = 'quarantined'
        LEFT JOIN (SELECT k, count(*) AS blocked FROM _hr_judged
          WHERE own AND outcome = 'blocked' GROUP BY k) b ON b.k = r.key ORDER BY epoch, commit, ordinal"""
    ).to_arrow_table()
    found = dict(db.execute("SELECT outcome, count(*) FROM _hr_judged WHERE own GROUP BY outcome").fetchall())
    counts = prepared.counts
    judged = replace(counts, applied=truncates) + Counts(**found)
    keys = pc.unique(made.table["_source_key"].drop_null())
    return Prepared(False, keys, rows, records.cast(prepared.records.schema), judged)
