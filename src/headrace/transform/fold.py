"""From changes in source order to one outcome per source key.

A later good change of a key supersedes what came before it, so only the last change of each key is
converted; the earlier ones are looked at where the last one is bad, for the value that then stands.
The outcome does not depend on how the changes were cut into slices, and folding twice changes
nothing: apply, redrive and verify are all this one function.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.change import Counts
from headrace.keys import key_before, key_of_row, literal, quoted
from headrace.masking import mask_columns
from headrace.prepared import FOREIGN_KEY, Prepared
from headrace.transform.engine import engine

if TYPE_CHECKING:
    from headrace.transform.evaluate import Evaluation

RECORD = pa.schema(
    {
        "key": pa.string(),
        "stage": pa.string(),
        "reason": pa.string(),
        "columns": pa.string(),
        "message": pa.string(),
        "op": pa.string(),
        "is_partial": pa.bool_(),
        "epoch": pa.int64(),
        "commit": pa.int64(),
        "ordinal": pa.int64(),
        "txid": pa.int64(),
        "committed_at": pa.int64(),
        "offset": pa.int64(),
        "preview": pa.string(),
        "blocked": pa.int64(),
        "key_is_masked": pa.bool_(),
        "waiting_on": pa.string(),
    }
)
_NONE = pa.array([], pa.int64())
NO_ROWS = pa.table({"_source_key": pa.array([], pa.string())})
NOTHING = Prepared(False, pa.array([], pa.string()), NO_ROWS, RECORD.empty_table(), Counts())
"""What becomes of no changes."""
_CELL_IS_MISSING = {
    "stage": "decode",
    "reason": "decode.unchanged",
    "columns": "",
    "message": "a cell that the source did not send is not in raw",
}
"""What is wrong with a bad change that was not judged."""
_PREVIEW_CELL = 120
_PREVIEW = 4096


def fold(
    db: duckdb.DuckDBPyConnection, key: Sequence[str], changes: pa.Table, evaluation: Evaluation
) -> Prepared:
    """Fold changes (as `Staging.read` returns them) under one model.

    `key` names the source's key columns. Raises ModelBroken when the model cannot run at all.
    """
    total = changes.num_rows
    resets = np.flatnonzero(pc.equal(changes["_op"], "t").to_numpy(zero_copy_only=False))
    live = changes.slice(int(resets[-1]) + 1) if len(resets) else changes
    if not total:
        return NOTHING
    events = events_of(db, key, live)
    points = points_of(db, key, events)
    settled, removed = _lasts(points)
    bad, chosen = _NONE, None
    evaluation.refuse(events)
    verdicts = evaluation.run(undecided(events, settled))
    verdicts = with_fatal(evaluation, verdicts, events)
    if pc.any(pc.equal(verdicts["verdict"], "bad")).as_py():
        again = earlier_of_bad(points, verdicts) if points.num_rows > len(removed) else _NONE
        if len(again):
            verdicts = evaluation.run(undecided(events, again))
            verdicts = with_fatal(evaluation, verdicts, events)
        settled, removed, bad = _settle(db, points, verdicts, settled, removed)
        chosen = settled if len(again) else None  # of more rows that were converted
    filtered = _count_in(verdicts, "filtered", settled)
    records = records_of(evaluation, events, bad)
    return Prepared(
        reset=bool(len(resets)),
        removed=removed,
        rows=evaluation.rows(chosen),
        records=records,
        counts=Counts(
            read=total,
            applied=len(settled) - filtered + len(resets),
            superseded=total - len(settled) - len(resets) - records.num_rows,
            filtered=filtered,
            quarantined=records.num_rows - (waiting := waiting_in(records)),
            waiting=waiting,
            **evaluation.tolerated(chosen),
        ),
        claims=evaluation.claims(events, points["k"], chosen),
    )


def events_of(db: duckdb.DuckDBPyConnection, key: Sequence[str], changes: pa.Table) -> pa.Table:
    """Add `_hr_n`, the place in the slice, and `_hr_k`, the source key."""
    if len(key) == 1:
        keys = changes[key[0]]
    else:
        db.register("changes", changes.select(list(dict.fromkeys(key))))
        keys = db.sql(f"SELECT {key_of_row(key)} AS k FROM changes").to_arrow_table()["k"]
    numbers = pa.array(np.arange(changes.num_rows, dtype=np.int64))
    return changes.append_column("_hr_n", numbers).append_column("_hr_k", keys)


def points_of(db: duckdb.DuckDBPyConnection, key: Sequence[str], events: pa.Table) -> pa.Table:
    """Return every effect: `n`, its key `k`, whether the row is `gone` by it, whether the key is the event's
    `own`. A change of the key itself has two effects: the old key's row goes, the new key's comes.
    """
    gone = pc.equal(events["_op"], "d")
    points = pa.table(
        {"n": events["_hr_n"], "k": events["_hr_k"], "gone": gone, "own": pa.repeat(True, events.num_rows)}
    )
    if events["_before"].null_count == events.num_rows:
        return points
    db.register("moving", events)
    moved = db.sql(
        f"SELECT _hr_n AS n, {key_before(key)} AS k, true AS gone, false AS own FROM moving "
        f"WHERE _op <> 'd' AND _before IS NOT NULL AND {key_before(key)} IS DISTINCT FROM _hr_k"
    ).to_arrow_table()
    return pa.concat_tables([points, moved]).sort_by("n")


def _lasts(points: pa.Table) -> tuple[pa.Array, pa.Array]:
    """Return the numbers of the events that are the last of their own key, and all keys."""
    keys = points["k"].combine_chunks()
    numbers = _as_integers(keys)
    if numbers is not None:
        order = np.argsort(numbers, kind="stable")  # of equal ones the last one stays
        ordered = numbers[order]
        last = order[np.append(ordered[1:] != ordered[:-1], len(ordered) > 0)]
        found = keys if len(last) == len(keys) else keys.take(pa.array(last))
    else:
        encoded = keys.dictionary_encode(null_encoding="encode")
        last = np.empty(len(encoded.dictionary), dtype=np.int64)
        last[encoded.indices.to_numpy()] = np.arange(points.num_rows)
        found = encoded.dictionary
    own = points["own"].to_numpy()
    return pa.array(points["n"].to_numpy()[np.sort(last[own[last]])]), found


def _as_integers(keys: pa.Array) -> npt.NDArray[np.int64] | None:
    """Return keys as integers if each is written as one always is, so that two are the same where their texts
    are: most are, and to sort them takes half the time that hashing the texts does."""
    if keys.null_count or not len(keys) or not keys[0].as_py().isdecimal():
        return None
    try:
        numbers = keys.cast(pa.int64())
    except pa.ArrowInvalid:
        return None
    return numbers.to_numpy() if numbers.cast(pa.string()).equals(keys) else None


def undecided(events: pa.Table, numbers: pa.Array | pa.ChunkedArray) -> pa.Table:
    """Return the events of these numbers, without those that need no conversion, and those that cannot be
    converted for want of a cell."""
    keep = pc.not_equal(events["_op"], "d")
    if events["_unchanged"].null_count < events.num_rows:
        keep = pc.and_(keep, pc.is_null(events["_unchanged"]))
    if len(numbers) < events.num_rows:
        return events.take(numbers.filter(keep.take(numbers)))
    return events.filter(keep) if pc.any(pc.invert(keep)).as_py() else events


def with_fatal(evaluation: Evaluation, verdicts: pa.Table, events: pa.Table) -> pa.Table:
    """Add the rows that no query could judge, and those with a cell that raw does not know."""
    fatal = pa.array(evaluation.fatal(), pa.int64())
    partial = events.filter(pc.is_valid(events["_unchanged"]))["_hr_n"].combine_chunks()
    bad = pa.concat_arrays([fatal, partial.cast(pa.int64())]) if len(partial) else fatal
    if not len(bad):
        return verdicts
    keys = events["_hr_k"].take(bad)
    return pa.concat_tables(
        [verdicts, pa.table({"n": bad, "k": keys, "verdict": pa.repeat("bad", len(bad))})]
    )


def earlier_of_bad(points: pa.Table, verdicts: pa.Table) -> pa.ChunkedArray:
    """Return the numbers of all other changes of keys whose last change is bad."""
    bad = verdicts.filter(pc.equal(verdicts["verdict"], "bad"))["k"].combine_chunks()
    others = points.filter(pc.and_(points["own"], pc.is_in(points["k"], value_set=bad)))["n"]
    return others.filter(pc.invert(pc.is_in(others, value_set=verdicts["n"].combine_chunks())))


def _settle(
    db: duckdb.DuckDBPyConnection, points: pa.Table, verdicts: pa.Table, settled: pa.Array, removed: pa.Array
) -> tuple[pa.Array, pa.Array, pa.Array]:
    """Decide each key: numbers of the settling changes, keys that settled, numbers of open bad ones.

    `settled` and `removed` are what it would be if no change were bad: that of most keys stands.
    """
    bad = verdicts.filter(pc.equal(verdicts["verdict"], "bad"))
    if points.num_rows == len(removed):  # each key has one effect, and they are in the same order
        comes = pc.invert(points["gone"])
        fails = pc.and_(comes, pc.is_in(points["n"], value_set=pc.unique(bad["n"])))
        numbers = points["n"].filter(fails).combine_chunks()
        good = settled.filter(pc.invert(pc.is_in(settled, value_set=numbers)))
        return good, removed.filter(pc.invert(fails).combine_chunks()), numbers
    keys = pc.unique(bad["k"])
    others = removed.filter(pc.invert(pc.is_in(removed, value_set=keys)))
    points = points.filter(pc.is_in(points["k"], value_set=keys))
    theirs = points.filter(points["own"])["n"].combine_chunks()
    good = settled.filter(pc.invert(pc.is_in(settled, value_set=theirs)))
    numbers = pc.unique(bad["n"])
    if points.num_rows == len(numbers) and not pc.any(points["gone"]).as_py():
        return good, others, numbers.sort()  # nothing else has happened to these keys
    db.register("points", points)
    db.register("verdicts", verdicts.filter(pc.is_in(verdicts["k"], value_set=keys)))
    db.execute(
        """CREATE OR REPLACE TEMP TABLE outcomes AS
        SELECT p.k, max(p.n) AS n, arg_max(p.own, p.n) AS own
        FROM points p LEFT JOIN verdicts v ON v.n = p.n AND p.own
        WHERE p.gone OR v.verdict IN ('good', 'filtered') GROUP BY p.k"""
    )
    own = db.sql("SELECT n FROM outcomes WHERE own").to_arrow_table()["n"].combine_chunks()
    settling = db.sql("SELECT k FROM outcomes").to_arrow_table()["k"].combine_chunks()
    opened = db.sql(
        "SELECT v.n FROM verdicts v LEFT JOIN outcomes s ON s.k = v.k "
        "WHERE v.verdict = 'bad' AND (s.n IS NULL OR v.n > s.n) ORDER BY v.n"
    ).to_arrow_table()["n"]
    return pa.concat_arrays([good, own]), pa.concat_arrays([others, settling]), opened.combine_chunks()


def _count_in(verdicts: pa.Table, verdict: str, settled: pa.Array) -> int:
    chosen = verdicts.filter(pc.equal(verdicts["verdict"], verdict))["n"]
    return int(pc.sum(pc.is_in(chosen, value_set=settled)).as_py() or 0) if len(chosen) else 0


def records_of(evaluation: Evaluation, events: pa.Table, bad: pa.Array) -> pa.Table:
    """Return the records of the bad events, given by their numbers."""
    if not len(bad):
        return RECORD.empty_table()
    rows = events.take(bad)
    faults = evaluation.faults(rows)
    which = pc.index_in(bad, value_set=faults["n"].combine_chunks())
    columns = {
        name: pc.fill_null(faults[name].combine_chunks().take(which), cell)
        for name, cell in _CELL_IS_MISSING.items()
    }
    return pa.table(
        {
            "key": rows["_hr_k"],
            **columns,
            "op": rows["_op"],
            "is_partial": pc.is_valid(rows["_unchanged"]),
            **{
                name: rows[f"_{name}"]
                for name in ("epoch", "commit", "ordinal", "txid", "committed_at", "offset")
            },
            "preview": _previews(rows, evaluation.model.masked.cells),
            "blocked": pa.repeat(pa.scalar(0, pa.int64()), rows.num_rows),
            "key_is_masked": pa.repeat(evaluation.model.key_is_masked, rows.num_rows),
            "waiting_on": evaluation.awaited(bad),
        },
        schema=RECORD,
    )


def waiting_in(records: pa.Table) -> int:
    """Return how many records wait for a row that they refer to."""
    return int(pc.sum(pc.equal(records["reason"], FOREIGN_KEY)).as_py() or 0)


def _previews(rows: pa.Table, masked: Collection[str]) -> pa.ChunkedArray:
    """Return the source's cells as JSON, cut to a size that a person reads, those of some columns masked."""
    rows = mask_columns(rows, masked)
    names = [name for name in rows.schema.names if not name.startswith("_hr_") and name not in _META]
    cells = ", ".join(f"{literal(name)}: left({quoted(name)}, {_PREVIEW_CELL})" for name in names)
    with engine() as db:
        db.register("rows", rows)
        return db.sql(
            f"SELECT left(to_json({{{cells}}})::VARCHAR, {_PREVIEW}) AS p FROM rows"
        ).to_arrow_table()["p"]


_META = frozenset(
    ("_op", "_epoch", "_commit", "_ordinal", "_offset", "_committed_at", "_txid", "_unchanged", "_before")
)
