"""Running a model's expressions so that a bad row fails alone.

`TRY({'a': expr_a, …})` is null exactly where a row fails, and costs what the plain query costs when
rows are good; outputs that are mere casts are tried each by itself, which costs the same when they are
bad (see `headrace.transform.casts`). The filter is an output too, and outputs stand under it, so that a
guard in WHERE protects its casts. What TRY cannot hold is found by bisection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.errors import ModelBroken, Verdict, verdict_of
from headrace.keys import literal, quoted, source_key
from headrace.prepared import FOREIGN_KEY, UNIQUE, Claims, Reference
from headrace.scrub import scrub
from headrace.transform.casts import Cast, cast_of
from headrace.transform.engine import within
from headrace.transform.nulling import NULLED, null_cells
from headrace.transform.refusing import NONE_REFUSED, refused_of, with_alike
from headrace.transform.trial import killers, refuse_too_many, show_events, time_for

if TYPE_CHECKING:
    from headrace.transform.handling import Action
    from headrace.transform.model import RowModel

_ASKED_ROWS, _SAYING_NOTHING_NEW = 100, 3
"""Bad rows of one column whose message is asked of the engine one by one, at most and while there is a new
one among the last few; more of them share the message of the first."""

FAULTS = pa.schema(
    {
        "n": pa.int64(),
        "stage": pa.string(),
        "reason": pa.string(),
        "columns": pa.string(),
        "message": pa.string(),
    }
)
"""What is wrong with events, by their numbers."""

_EXHAUSTED: dict[type[duckdb.Error], str] = {
    duckdb.OutOfMemoryException: "crash.memory",
    duckdb.InterruptException: "crash.timeout",
}
"""Errors that are the world's, unless a row meets them in a process of its own, too; and its reason then."""

_Cause = tuple[str, str, str, str]
"""Stage, reason, columns and message."""


class Evaluation:
    """One model on one connection: converts rows, then tells why the failed ones failed."""

    def __init__(self, db: duckdb.DuckDBPyConnection, model: RowModel) -> None:
        self._db = db
        self._model = model
        self._fatal: dict[int, _Cause] = {}
        self._judged: pa.Table | None = None
        self._refused = NONE_REFUSED

    @property
    def model(self) -> RowModel:
        """The model that judges."""
        return self._model

    def refuse(self, events: pa.Table) -> None:
        """Count those of these events as bad that the model refuses, see `RowModel.refusing`."""
        if self._model.refused and self._model.claims:
            self._refused = refused_of(self._db, self._model.refused, events)

    def claims(self, events: pa.Table, effects: pa.ChunkedArray, settled: pa.Array | None) -> Claims | None:
        """Return what `rows` claim; None if the source's key keeps them apart and nothing refers to another.
        `effects` are the source keys of all effects of the events."""
        if not self._model.claims:
            return None
        good = self._chosen(settled)
        made_by = events.take(good["_hr_n"])
        places = {name: made_by[f"_{name}"] for name in ("epoch", "commit", "ordinal")}
        keys = pc.value_counts(effects)
        once = keys.field("values").filter(pc.equal(keys.field("counts"), 1))
        sole = pc.is_in(good["_source_key"], value_set=once)
        made = pa.table({"_source_key": good["_source_key"], **places, "sole": sole})
        return Claims(self._model.name, self._model.unique, made, self._model.references)

    def query(self, events: str) -> str:
        """Return the query that judges the rows of relation `events`.

        Columns: `_hr_n`, `_hr_k`, `_hr_failed`, `_hr_cast` (where nothing failed under TRY, the place of the
        first output whose cast fails), `_hr_filtered`, one `_hr_v<i>` per check that is true where it is
        violated, then the outputs.
        """
        model = self._model
        casts = self._casts()
        tried, beside = list[str](), list[str]()
        for i, (name, expression, _) in enumerate(model.outputs):
            if (cast := casts.get(i)) is None:
                tried.append(f"{literal(name)}: ({expression})")
            elif cast.is_column:
                beside.append(f", ({cast.operand}) AS _hr_o{i}")
            else:
                tried.append(f"'_hr_o{i}': ({cast.operand})")
        made = f"TRY({{{', '.join(tried)}}})" if tried else "true"
        failed, filtered = "r IS NULL", "false"
        keep = "true"
        if model.where:
            keep = f"TRY({{'keep': ({model.where})}})"
            made = f"CASE WHEN {keep}.keep THEN {made} END"
            failed = "f IS NULL OR (f.keep AND r IS NULL)"
            filtered = "f IS NOT NULL AND f.keep IS NOT TRUE"
        inner = f"SELECT _hr_n, _hr_k, {keep} AS f, {made} AS r{''.join(beside)} FROM {events}"
        tries = "".join(f", {cast.tried(_operand(i, cast))} AS _hr_c{i}" for i, cast in casts.items())
        wrong = " ".join(
            f"WHEN _hr_c{i} IS NULL AND {_operand(i, cast)} IS NOT NULL THEN {i}" for i, cast in casts.items()
        )
        cast_fails = f"CASE WHEN {failed} OR {filtered} THEN NULL {wrong} END" if casts else "NULL"
        outputs = ", ".join(
            f"{f'_hr_c{i}' if i in casts else f'r.{quoted(name)}'} AS {quoted(name)}"
            for i, (name, _, _) in enumerate(model.outputs)
        )
        checks = "".join(f", {self._violation(i)} AS _hr_v{i}" for i in range(len(model.checks)))
        judged = (
            f"SELECT _hr_n, _hr_k, {failed} AS _hr_failed, {cast_fails}::SMALLINT AS _hr_cast, "
            f"{filtered} AS _hr_filtered, {outputs} "
            f"FROM (SELECT *{tries} FROM ({inner} AS {quoted(model.alias)}))"
        )
        return f"SELECT *{checks} FROM ({judged})"

    def _casts(self) -> dict[int, Cast]:
        """Return those of the outputs that are casts of a text, by their place."""
        model = self._model
        source = model.schema.columns if model.python is None else ()
        columns = tuple(column.name for column in source) or tuple(model.types())
        found = ((i, cast_of(output[1], columns, model.alias)) for i, output in enumerate(model.outputs))
        return {i: cast for i, cast in found if cast is not None}

    def run(self, events: pa.Table) -> pa.Table:
        """Judge events and return `n`, `k` and `verdict` (good, filtered or bad) of each.

        Raises ModelBroken when the query fails even without rows.
        """
        self.judge(events)
        return self.verdicts()

    def judge(self, events: pa.Table) -> None:
        """Judge events, see `run`; the verdicts of all that were judged are in `verdicts`."""
        show_events(self._db, events)
        self._try_without_rows()
        if self._model.suspect and events.num_rows:
            events = self._survived(events)
        self._judge(events)

    def verdicts(self) -> pa.Table:
        """Return `n`, `k` and `verdict` (good, filtered or bad) of each event that was judged."""
        judged, model = self._judged, self._model
        assert judged is not None
        self._refuse_suspending(judged)
        if self._refused.num_rows:
            keys = [(each.name or None, each.columns) for each in model.unique]
            keys += ((each.name, each.columns) for each in model.own_references)
            self._refused = with_alike(self._db, self._refused, judged, keys)
        filtered = pc.if_else(judged["_hr_filtered"], "filtered", "good")
        verdicts = pc.if_else(self._bad(judged), "bad", filtered)
        return pa.table({"n": judged["_hr_n"], "k": judged["_hr_k"], "verdict": verdicts})

    def rows(self, settled: pa.Array | None) -> pa.Table:
        """Return the good rows as `_source_key` and outputs; only those numbered in `settled`, if given."""
        return self._chosen(settled).drop_columns("_hr_n")

    def _chosen(self, settled: pa.Array | None) -> pa.Table:
        good = self.good()
        return good if settled is None else good.filter(pc.is_in(good["_hr_n"], value_set=settled))

    def good(self) -> pa.Table:
        """Return the good rows: `_hr_n`, `_source_key`, the outputs, and `_nulled` where a check nulls."""
        judged = self._judged
        assert judged is not None
        apart = pc.or_(self._bad(judged), judged["_hr_filtered"])
        good = judged.filter(pc.invert(apart)) if pc.any(apart).as_py() else judged
        names = [name for name, _, _ in self._model.outputs]
        violations = [
            (check.column, good[f"_hr_v{i}"])
            for i, check in enumerate(self._model.checks)
            if check.on_violation == "null"
        ]
        if violations:
            good = null_cells(good, violations)
            names += NULLED
        return good.select(["_hr_n", "_hr_k", *names]).rename_columns(["_hr_n", "_source_key", *names])

    def faults(self, events: pa.Table) -> pa.Table:
        """Return what is wrong with those of these events that were judged and are bad, see `FAULTS`;
        messages are scrubbed of values."""
        judged = self._judged
        assert judged is not None
        wanted = events["_hr_n"].combine_chunks()
        bad = judged.select(["_hr_n", "_hr_failed", "_hr_cast", *self._violations("quarantine")])
        bad = bad.filter(pc.and_(self._bad(judged), pc.is_in(judged["_hr_n"], value_set=wanted)))
        failed = _failed(bad)
        fatal = sorted(self._fatal.keys() & set(wanted.to_pylist())) if self._fatal else []
        return pa.concat_tables(
            [
                self._violated(bad.filter(pc.invert(failed))),
                _faults(
                    pa.array(fatal, pa.int64()),
                    range(len(fatal)),
                    [self._fatal[n] for n in fatal],
                ),
                *self._expression_faults(events, bad.filter(failed)),
            ]
        )

    def _violated(self, bad: pa.Table) -> pa.Table:
        """Say of rows which check they violate first; those that violate none are refused: they lack what
        they refer to, or would have the key of another."""
        checks = [(i, c) for i, c in enumerate(self._model.checks) if c.on_violation == "quarantine"]
        causes = [("constraint", c.reason, c.column, f"{c.column}: {c.text} is violated") for _, c in checks]
        limits = list[str]()
        for key in self._model.unique:
            columns = ", ".join(key.columns)
            causes.append(
                ("constraint", UNIQUE, columns, f"{columns}: another row of the table has this key")
            )
            limits.append(key.name)
        for reference in self._model.own_references:
            columns = ", ".join(reference.columns)
            what = f"{columns}: {reference.parent} has no such row"
            causes.append(("constraint", FOREIGN_KEY, columns, what))
            limits.append(reference.name)
        which = np.full(bad.num_rows, len(checks))
        for place, name in enumerate(limits, len(checks)):
            lacking = self._refused.filter(pc.equal(self._refused["name"], name))["n"]
            which[pc.is_in(bad["_hr_n"], value_set=lacking.combine_chunks()).to_numpy()] = place
        for place, (i, _) in reversed(list(enumerate(checks))):
            which[pc.fill_null(bad[f"_hr_v{i}"], False).to_numpy()] = place
        return _faults(bad["_hr_n"].combine_chunks(), which, causes)

    def awaited(self, numbers: pa.Array) -> pa.ChunkedArray:
        """Return for each of these bad events what it waits for: JSON of `model`, `columns` and `values`
        (texts) of the row that it lacks, or whose key it would have, with that row's source `key` where that
        is known and the name of the `constraint`; null for what is bad by itself."""
        model = self._model
        if not self._refused.num_rows or not model.claims:
            return pa.chunked_array([pa.nulls(len(numbers), pa.string())])
        keys = ((key.name, key.columns) for key in model.unique)
        waits = [*model.own_references]
        waits += (Reference(model.name, name, columns, model.name, columns) for name, columns in keys)
        cases = " ".join(f"WHEN {literal(each.name)} THEN {_waited(each)}" for each in waits)
        self._db.register("judged", self._judged)
        self._db.register("lacks", self._refused)
        self._db.register("numbers", pa.table({"n": numbers, "i": pa.array(range(len(numbers)), pa.int64())}))
        checks = self._violations("quarantine")
        fails = " OR ".join(["j._hr_failed", "j._hr_cast IS NOT NULL", *(f"j.{name}" for name in checks)])
        return self._db.sql(
            f"SELECT CASE WHEN NOT ({fails}) THEN CASE coalesce(l.name, '') {cases} END END AS awaited "
            "FROM numbers w LEFT JOIN lacks l USING (n) LEFT JOIN judged j ON j._hr_n = l.n ORDER BY w.i"
        ).to_arrow_table()["awaited"]

    def fatal(self) -> list[int]:
        """Return the rows that took the query down; they are in no judgement."""
        return sorted(self._fatal)

    def _violations(self, *actions: Action) -> list[str]:
        """Return the columns that say of each check with one of some actions whether a row violates it."""
        return [f"_hr_v{i}" for i, check in enumerate(self._model.checks) if check.on_violation in actions]

    def tolerated(self, settled: pa.Array | None) -> dict[str, int]:
        """Return how many good rows violate a check that only warns (`warned`), and how many have a cell
        nulled (`nulled`); of those numbered in `settled`, if given."""
        judged = self._judged
        assert judged is not None
        counts = {}
        for name, columns in (("warned", self._violations("warn")), ("nulled", self._violations("null"))):
            if columns:
                rows = judged.filter(pc.invert(self._bad(judged)))
                rows = rows if settled is None else rows.filter(pc.is_in(rows["_hr_n"], value_set=settled))
                counts[name] = pc.sum(_any_of(rows, columns)).as_py() or 0
        return counts

    def _bad(self, judged: pa.Table) -> pa.ChunkedArray:
        """Return which rows have failed or violate a check."""
        bad = _failed(judged)
        for name in self._violations("quarantine"):
            bad = pc.or_(bad, judged[name])
        if self._refused.num_rows:
            refused = pc.is_in(judged["_hr_n"], value_set=self._refused["n"].combine_chunks())
            bad = pc.or_(bad, pc.and_(refused, pc.invert(judged["_hr_filtered"])))
        return bad

    def _refuse_suspending(self, judged: pa.Table) -> None:
        """Raise ModelBroken where a row violates a check that is to suspend the model."""
        for i, check in enumerate(self._model.checks):
            if check.on_violation == "suspend" and (count := pc.sum(judged[f"_hr_v{i}"]).as_py()):
                raise ModelBroken(
                    self._model.name,
                    f"{count:,} changes violate {check.column}: {check.text}, which suspends the model "
                    "(on_violation).",
                    f"Mend the data or the model, then run `headrace resume {self._model.name}`.",
                )

    def _violation(self, i: int) -> str:
        check = self._model.checks[i]
        live = "NOT _hr_failed AND _hr_cast IS NULL AND NOT _hr_filtered"
        if not check.expression:
            return f"({live} AND {quoted(check.column)} IS NULL)"
        held = f"TRY({{'held': ({check.expression})}})"
        return f"({live} AND ({held} IS NULL OR {held}.held IS FALSE))"

    def _try_without_rows(self) -> None:
        if self._judged is not None:
            return
        try:
            self._judged = self._db.sql(self.query("(SELECT * FROM events LIMIT 0)")).to_arrow_table()
        except duckdb.Error as error:
            name = self._model.name
            raise ModelBroken(name, f"Model {name} cannot run: {scrub(str(error))}", "Mend it.") from error

    def _survived(self, events: pa.Table) -> pa.Table:
        """Return the events without those that end the process in which they are judged."""
        dying = killers(self._model.name, self.query("events"), events)
        self._fatal |= {n: ("crash", reason, "", words) for n, (reason, words) in dying.items()}
        return events.filter(pc.invert(pc.is_in(events["_hr_n"], value_set=pa.array(dying, pa.int64()))))

    def _judge(self, events: pa.Table) -> None:
        """Judge events all at once; where the engine gives up, half by half down to the single row."""
        if not events.num_rows:
            return
        show_events(self._db, events)
        try:
            with within(self._db, time_for(events.num_rows)):
                judged = self._db.sql(self.query("events")).to_arrow_table()
        except duckdb.Error as error:
            if type(error) not in _EXHAUSTED and _is_the_engines(error):
                raise
            if events.num_rows == 1:
                self._fatal[events["_hr_n"][0].as_py()] = self._cause_of(events, error)
                refuse_too_many(self._model.name, self._fatal.values())
                return
            middle = events.num_rows // 2
            self._judge(events.slice(0, middle))
            self._judge(events.slice(middle))
            return
        assert self._judged is not None
        self._judged = pa.concat_tables([self._judged, judged])

    def _cause_of(self, event: pa.Table, error: duckdb.Error) -> _Cause:
        """Say why a single event cannot be judged. Raises the error if it is not the event's: a process of
        its own, that has nothing else to do, can judge it."""
        if type(error) not in _EXHAUSTED:
            return "transform", "transform.expression", "", scrub(str(error))
        for reason, words in killers(self._model.name, self.query("events"), event).values():
            return "crash", reason, "", words
        raise error

    def _expression_faults(self, events: pa.Table, failed: pa.Table) -> Iterator[pa.Table]:
        """Yield what is wrong with rows of which an expression fails: of each the first one."""
        parts = [(name, expression) for name, expression, _ in self._model.outputs]
        blamed = [
            failed.filter(pc.is_valid(failed["_hr_cast"])).select(["_hr_n", "_hr_cast"]),
            self._blame(events, failed.filter(pc.is_null(failed["_hr_cast"]))["_hr_n"], parts),
        ]
        found = pa.concat_tables(blamed).sort_by("_hr_n")
        for which in pc.unique(found["_hr_cast"]).to_pylist():
            numbers = found.filter(pc.equal(found["_hr_cast"], which))["_hr_n"].combine_chunks()
            name, expression = parts[which] if which < len(parts) else ("", self._model.where)
            causes = self._causes(events, numbers[:_ASKED_ROWS], name, expression)
            yield _faults(numbers, [*range(len(causes)), *[0] * (len(numbers) - len(causes))], causes)

    def _blame(self, events: pa.Table, failed: pa.ChunkedArray, parts: Sequence[tuple[str, str]]) -> pa.Table:
        """Return for each failed row (`_hr_n`) which expression is the first that fails on it (`_hr_cast`):
        the number of an output, or of the one behind the last for the filter."""
        if not len(failed):
            return pa.table({"_hr_n": failed, "_hr_cast": pa.array([], pa.int16())})
        tests = [(i, expression) for i, (_, expression) in enumerate(parts)]
        if self._model.where:
            tests.insert(0, (len(parts), self._model.where))
        cases = " ".join(f"WHEN TRY({{'v': ({expression})}}) IS NULL THEN {i}" for i, expression in tests)
        show_events(self._db, _those(events, failed.combine_chunks()))
        return self._db.sql(
            f"SELECT _hr_n, (CASE {cases} ELSE {tests[0][0]} END)::SMALLINT AS _hr_cast "
            f"FROM events AS {quoted(self._model.alias)}"
        ).to_arrow_table()

    def _causes(self, events: pa.Table, numbers: pa.Array, column: str, expression: str) -> list[_Cause]:
        """Ask the engine of each of a few rows why an expression fails on it."""
        show_events(self._db, _those(events, numbers))
        causes = list[_Cause]()
        for n in numbers.to_pylist():
            reason, message = self._ask(n, expression)
            stage = reason.partition(".")[0]
            reason = "transform.filter" if stage == "transform" and not column else reason
            causes.append((stage, reason, column, message))
            before, last = causes[:-_SAYING_NOTHING_NEW], causes[-_SAYING_NOTHING_NEW:]
            if len(last) == _SAYING_NOTHING_NEW and set(last) <= set(before or last[:1]):
                break
        return causes

    def _ask(self, n: int, expression: str) -> tuple[str, str]:
        """Ask the engine for its message about one row; returns (reason, message)."""
        try:
            self._db.execute(
                f"SELECT ({expression}) FROM events AS {quoted(self._model.alias)} WHERE _hr_n = {n}"
            ).fetchall()
        except duckdb.ConversionException as error:
            return "transform.cast", scrub(str(error))
        except duckdb.Error as error:
            return _EXHAUSTED.get(type(error), "transform.expression"), scrub(str(error))
        return "transform.expression", "the expression fails together with the others"


def _any_of(rows: pa.Table, columns: list[str]) -> pa.ChunkedArray:
    found = rows[columns[0]]
    for name in columns[1:]:
        found = pc.or_(found, rows[name])
    return found


def _failed(judged: pa.Table) -> pa.ChunkedArray:
    """Return of which rows an expression has failed."""
    failed = pc.fill_null(judged["_hr_failed"], False)  # a filter that is null is neither
    casts = judged["_hr_cast"]
    return failed if casts.null_count == len(casts) else pc.or_(failed, pc.is_valid(casts))


def _those(events: pa.Table, numbers: pa.Array) -> pa.Table:
    """Return the events of these numbers."""
    return events.filter(pc.is_in(events["_hr_n"], value_set=numbers))


def _operand(i: int, cast: Cast) -> str:
    """Return where the query that judges has the operand of an output's cast."""
    return f"_hr_o{i}" if cast.is_column else f"r._hr_o{i}"


def _faults(numbers: pa.Array, which: Sequence[int] | np.ndarray, causes: Sequence[_Cause]) -> pa.Table:
    """Return events with their causes, given for each by its place among `causes`."""
    places = pa.array(which, pa.int64())
    cells = zip(*causes, strict=True) if causes else [()] * (len(FAULTS) - 1)
    columns = [pa.array(column, pa.string()).take(places) for column in cells]
    return pa.table([numbers, *columns], schema=FAULTS)


def _waited(reference: Reference) -> str:
    """Return the expression of `Evaluation.awaited` over the outputs of a row."""
    cells = [f"j.{quoted(name)}::VARCHAR" for name in reference.columns]
    key = source_key([cells[i] for i in reference.by_key]) if reference.by_key else "NULL"
    members = {
        "constraint": literal(reference.name),
        "model": literal(reference.parent),
        "columns": f"[{', '.join(map(literal, reference.to))}]",
        "values": f"[{', '.join(cells)}]",
        "key": key,
    }
    struct = ", ".join(f"{literal(name)}: {value}" for name, value in members.items())
    return f"to_json({{{struct}}})::VARCHAR"


def _is_the_engines(error: duckdb.Error) -> bool:
    """Whether a failure is no row's fault: no memory, no disk, or an engine that is broken."""
    return isinstance(error, duckdb.InternalException) or verdict_of(error) is Verdict.RETRY
