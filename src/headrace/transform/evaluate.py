"""Running a model's expressions so that a bad row fails alone.

`TRY({'a': expr_a, …})` is null exactly where a row fails, and costs what the plain query costs when
rows are good. The filter is an output too, and outputs stand under it, so that a guard in WHERE
protects its casts. What TRY cannot hold is found by bisection.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from headrace.errors import ModelBroken, Verdict, verdict_of
from headrace.keys import literal, quoted
from headrace.prepared import Claims
from headrace.scrub import scrub

if TYPE_CHECKING:
    from headrace.masking import Masked
    from headrace.transform.handling import Action
    from headrace.transform.model import RowModel

_ASKED_ROWS = 200
"""Bad rows per evaluation whose message is asked of the engine one by one; more rows of the same
column share the message of the first."""

UNIQUE = "constraint.unique"
"""The reason of a change that would give its row the key of another."""


class Evaluation:
    """One model on one connection: converts rows, then tells why the failed ones failed."""

    def __init__(self, db: duckdb.DuckDBPyConnection, model: RowModel) -> None:
        self._db = db
        self._model = model
        self._fatal: dict[int, str] = {}
        self._judged: pa.Table | None = None
        self._refused = pa.array([], pa.int64())

    @property
    def masked(self) -> Masked:
        """What of the model is not shown."""
        return self._model.masked

    def refuse(self, events: pa.Table) -> None:
        """Count those of these events as bad that the model refuses, see `RowModel.refusing`."""
        if not self._model.refused:
            return
        places = list(zip(*self._model.refused, strict=True))
        names = ("_epoch", "_commit", "_ordinal")
        self._db.register("placed", events.select(["_hr_n", *names]))
        self._db.register(
            "refused", pa.table({n: pa.array(p, pa.int64()) for n, p in zip(names, places, strict=True)})
        )
        found = self._db.sql(f"SELECT _hr_n FROM placed SEMI JOIN refused USING ({', '.join(names)})")
        self._refused = found.to_arrow_table()["_hr_n"].combine_chunks()

    def claims(self, events: pa.Table, effects: pa.ChunkedArray, settled: pa.Array | None) -> Claims | None:
        """Return the keys that `rows` claim; None if the source's key keeps them apart. `effects` are the
        source keys of all effects of the events."""
        if not self._model.unique:
            return None
        good = self._chosen(settled)
        made_by = events.take(good["_hr_n"])
        places = {name: made_by[f"_{name}"] for name in ("epoch", "commit", "ordinal")}
        keys = pc.value_counts(effects)
        once = keys.field("values").filter(pc.equal(keys.field("counts"), 1))
        sole = pc.is_in(good["_source_key"], value_set=once)
        made = pa.table({"_source_key": good["_source_key"], **places, "sole": sole})
        return Claims(self._model.name, self._model.unique, made)

    def query(self, events: str) -> str:
        """Return the query that judges the rows of relation `events`.

        Columns: `_hr_n`, `_hr_k`, `_hr_failed`, `_hr_filtered`, one `_hr_v<i>` per check that is
        true where it is violated, then the outputs.
        """
        model = self._model
        struct = ", ".join(f"{literal(name)}: ({expression})" for name, expression, _ in model.outputs)
        made = f"TRY({{{struct}}})"
        failed, filtered = "r IS NULL", "false"
        keep = "true"
        if model.where:
            keep = f"TRY({{'keep': ({model.where})}})"
            made = f"CASE WHEN {keep}.keep THEN {made} END"
            failed = "f IS NULL OR (f.keep AND r IS NULL)"
            filtered = "f IS NOT NULL AND f.keep IS NOT TRUE"
        checks = "".join(f", {self._violation(i)} AS _hr_v{i}" for i in range(len(model.checks)))
        return (
            f"SELECT *{checks} FROM (SELECT _hr_n, _hr_k, {failed} AS _hr_failed, "
            f"{filtered} AS _hr_filtered, unnest(r) FROM (SELECT _hr_n, _hr_k, {keep} AS f, {made} AS r "
            f"FROM {events} AS {quoted(model.alias)}))"
        )

    def run(self, events: pa.Table) -> pa.Table:
        """Judge events and return `n`, `k` and `verdict` (good, filtered or bad) of each.

        Raises ModelBroken when the query fails even without rows.
        """
        self.judge(events)
        return self.verdicts()

    def judge(self, events: pa.Table) -> None:
        """Judge events, see `run`; the verdicts of all that were judged are in `verdicts`."""
        self._events(events)
        self._try_without_rows()
        self._judge(events)

    def verdicts(self) -> pa.Table:
        """Return `n`, `k` and `verdict` (good, filtered or bad) of each event that was judged."""
        judged = self._judged
        assert judged is not None
        self._refuse_suspending(judged)
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
        """Return the good rows: `_hr_n`, `_source_key` and the outputs."""
        judged = self._judged
        assert judged is not None
        apart = pc.or_(self._bad(judged), judged["_hr_filtered"])
        good = judged.filter(pc.invert(apart)) if pc.any(apart).as_py() else judged
        names = [name for name, _, _ in self._model.outputs]
        for i, check in enumerate(self._model.checks):
            if check.on_violation == "null":
                at, cells = good.schema.get_field_index(check.column), good[check.column]
                nulled = pc.if_else(good[f"_hr_v{i}"], pa.scalar(None, cells.type), cells)
                good = good.set_column(at, check.column, nulled)
        return good.select(["_hr_n", "_hr_k", *names]).rename_columns(["_hr_n", "_source_key", *names])

    def faults(self, events: pa.Table) -> Iterator[tuple[int, str, str, str, str]]:
        """Yield (n, stage, reason, columns, message) for each of these bad events that was judged;
        messages are scrubbed of values."""
        self._events(events)
        wanted = set(events["_hr_n"].to_pylist())
        judged = self._judged
        assert judged is not None
        bad = judged.filter(self._bad(judged)).select(
            ["_hr_n", "_hr_failed", *self._violations("quarantine")]
        )
        found = [tuple(row.values()) for row in bad.to_pylist() if row["_hr_n"] in wanted]
        checks = [check for check in self._model.checks if check.on_violation == "quarantine"]
        for n, *violated in ((n, *violated) for n, failed, *violated in found if not failed):
            if True in violated:
                check = checks[violated.index(True)]
                yield n, "constraint", check.reason, check.column, f"{check.column}: {check.text} is violated"
            else:
                key = ", ".join(self._model.unique)
                yield n, "constraint", UNIQUE, key, f"{key}: another row of the table has this key"
        for n in sorted(wanted & self._fatal.keys()):
            yield n, "transform", "transform.expression", "", self._fatal[n]
        yield from self._expression_faults(sorted(n for n, failed, *_ in found if failed))

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
        bad = pc.fill_null(judged["_hr_failed"], False)  # a filter that is null is neither
        for name in self._violations("quarantine"):
            bad = pc.or_(bad, judged[name])
        if len(self._refused):
            refused = pc.is_in(judged["_hr_n"], value_set=self._refused)
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
        live = "NOT _hr_failed AND NOT _hr_filtered"
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

    def _events(self, events: pa.Table) -> None:
        self._db.register("arrow_events", events)
        self._db.execute(
            "CREATE OR REPLACE TEMP VIEW events AS SELECT * REPLACE "
            "(make_timestamptz(_committed_at) AS _committed_at) FROM arrow_events"
        )

    def _judge(self, events: pa.Table) -> None:
        """Judge events all at once; where the engine gives up, half by half down to the single row."""
        if not events.num_rows:
            return
        self._events(events)
        try:
            judged = self._db.sql(self.query("events")).to_arrow_table()
        except duckdb.Error as error:
            if _is_the_engines(error):
                raise
            if events.num_rows == 1:
                self._fatal[events["_hr_n"][0].as_py()] = scrub(str(error))
                return
            middle = events.num_rows // 2
            self._judge(events.slice(0, middle))
            self._judge(events.slice(middle))
            return
        assert self._judged is not None
        self._judged = pa.concat_tables([self._judged, judged])

    def _expression_faults(self, failed: list[int]) -> Iterator[tuple[int, str, str, str, str]]:
        if not failed:
            return
        parts = [(name, expression) for name, expression, _ in self._model.outputs]
        if self._model.where:
            parts.insert(0, ("", self._model.where))
        known: dict[str, tuple[str, str]] = {}
        asked = 0
        for n, column, expression in self._blame(failed, parts):
            if asked < _ASKED_ROWS or column not in known:
                asked += 1
                known[column] = self._ask(n, expression)
            reason, message = known[column]
            yield n, "transform", reason if column else "transform.filter", column, message

    def _blame(self, failed: list[int], parts: list[tuple[str, str]]) -> Iterator[tuple[int, str, str]]:
        """Yield for each failed row the first expression that fails on it."""
        self._db.register("failed_rows", pa.table({"n": pa.array(failed, pa.int64())}))
        tests = ", ".join(f"TRY({{'v': ({expression})}}) IS NULL" for _, expression in parts)
        rows = self._db.execute(
            f"SELECT _hr_n, {tests} FROM events AS {quoted(self._model.alias)} "
            "WHERE _hr_n IN (SELECT n FROM failed_rows) ORDER BY 1"
        ).fetchall()
        for n, *fails in rows:
            name, expression = parts[fails.index(True)] if True in fails else parts[0]
            yield n, name, expression

    def _ask(self, n: int, expression: str) -> tuple[str, str]:
        """Ask the engine for its message about one row; returns (reason, message)."""
        try:
            self._db.execute(
                f"SELECT ({expression}) FROM events AS {quoted(self._model.alias)} WHERE _hr_n = {n}"
            ).fetchall()
        except duckdb.ConversionException as error:
            return "transform.cast", scrub(str(error))
        except duckdb.Error as error:
            return "transform.expression", scrub(str(error))
        return "transform.expression", "the expression fails together with the others"


def _any_of(rows: pa.Table, columns: list[str]) -> pa.ChunkedArray:
    found = rows[columns[0]]
    for name in columns[1:]:
        found = pc.or_(found, rows[name])
    return found


def _is_the_engines(error: duckdb.Error) -> bool:
    """Whether a failure is no row's fault: no memory, no disk, or an engine that is broken."""
    return isinstance(error, duckdb.InternalException) or verdict_of(error) is Verdict.RETRY
