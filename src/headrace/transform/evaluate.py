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
from headrace.keys import literal, quoted, source_key
from headrace.prepared import FOREIGN_KEY, UNIQUE, Claims, Reference
from headrace.scrub import scrub

if TYPE_CHECKING:
    from headrace.transform.model import RowModel

_ASKED_ROWS = 200
"""Bad rows per evaluation whose message is asked of the engine one by one; more rows of the same
column share the message of the first."""


class Evaluation:
    """One model on one connection: converts rows, then tells why the failed ones failed."""

    def __init__(self, db: duckdb.DuckDBPyConnection, model: RowModel) -> None:
        self._db = db
        self._model = model
        self._fatal: dict[int, str] = {}
        self._judged: pa.Table | None = None
        self._refused = pa.table({"n": pa.array([], pa.int64()), "reference": pa.array([], pa.string())})

    def refuse(self, events: pa.Table) -> None:
        """Count those of these events as bad that the model refuses, see `RowModel.refusing`."""
        if not self._model.refused:
            return
        names = ("_epoch", "_commit", "_ordinal", "reference")
        cells = zip(*self._model.refused, strict=True)
        types = (pa.int64(), pa.int64(), pa.int64(), pa.string())
        refused = {name: pa.array(each, type_) for name, each, type_ in zip(names, cells, types, strict=True)}
        self._db.register("placed", events.select(["_hr_n", *names[:3]]))
        self._db.register("refused", pa.table(refused))
        self._refused = self._db.sql(
            "SELECT _hr_n AS n, reference FROM placed JOIN refused USING (_epoch, _commit, _ordinal)"
        ).to_arrow_table()

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
        return good.select(["_hr_n", "_hr_k", *names]).rename_columns(["_hr_n", "_source_key", *names])

    def faults(self, events: pa.Table) -> Iterator[tuple[int, str, str, str, str]]:
        """Yield (n, stage, reason, columns, message) for each of these bad events that was judged;
        messages are scrubbed of values."""
        self._events(events)
        wanted = set(events["_hr_n"].to_pylist())
        judged = self._judged
        assert judged is not None
        bad = judged.filter(self._bad(judged)).select(["_hr_n", "_hr_failed", *self._violations()])
        found = [tuple(row.values()) for row in bad.to_pylist() if row["_hr_n"] in wanted]
        lacks = dict(zip(*(column.to_pylist() for column in self._refused.columns), strict=True))
        for n, *violated in ((n, *violated) for n, failed, *violated in found if not failed):
            if True in violated:
                check = self._model.checks[violated.index(True)]
                yield n, "constraint", check.reason, check.column, f"{check.column}: {check.text} is violated"
            elif lacks.get(n) is not None:
                reference = next(each for each in self._model.own_references if each.name == lacks[n])
                columns = ", ".join(reference.columns)
                yield n, "constraint", FOREIGN_KEY, columns, f"{columns}: {reference.parent} has no such row"
            else:
                key = ", ".join(self._model.unique)
                yield n, "constraint", UNIQUE, key, f"{key}: another row of the table has this key"
        for n in sorted(wanted & self._fatal.keys()):
            yield n, "transform", "transform.expression", "", self._fatal[n]
        yield from self._expression_faults(sorted(n for n, failed, *_ in found if failed))

    def awaited(self, numbers: pa.Array) -> pa.ChunkedArray:
        """Return for each of these bad events what it waits for: JSON of `model`, `columns` and `values`
        (texts) of the row that it lacks, or whose key it would have, with that row's source `key` where that
        is known and the name of the `constraint`; null for what is bad by itself."""
        model = self._model
        if not self._refused.num_rows or not model.claims:
            return pa.chunked_array([pa.nulls(len(numbers), pa.string())])
        waits = list(model.own_references)
        if model.unique:
            waits.append(Reference(model.name, "", model.unique, model.name, model.unique))
        cases = " ".join(f"WHEN {literal(each.name)} THEN {_waited(each)}" for each in waits)
        self._db.register("judged", self._judged)
        self._db.register("lacks", self._refused)
        self._db.register("numbers", pa.table({"n": numbers, "i": pa.array(range(len(numbers)), pa.int64())}))
        fails = " OR ".join(f"j.{name}" for name in ("_hr_failed", *self._violations()))
        return self._db.sql(
            f"SELECT CASE WHEN NOT ({fails}) THEN CASE coalesce(l.reference, '') {cases} END END AS awaited "
            "FROM numbers w LEFT JOIN lacks l USING (n) LEFT JOIN judged j ON j._hr_n = l.n ORDER BY w.i"
        ).to_arrow_table()["awaited"]

    def fatal(self) -> list[int]:
        """Return the rows that took the query down; they are in no judgement."""
        return sorted(self._fatal)

    def _violations(self) -> list[str]:
        """Return the columns that say of each check whether a row violates it."""
        return [f"_hr_v{i}" for i in range(len(self._model.checks))]

    def _bad(self, judged: pa.Table) -> pa.ChunkedArray:
        """Return which rows have failed or violate a check."""
        bad = pc.fill_null(judged["_hr_failed"], False)  # a filter that is null is neither
        for name in self._violations():
            bad = pc.or_(bad, judged[name])
        if self._refused.num_rows:
            refused = pc.is_in(judged["_hr_n"], value_set=self._refused["n"].combine_chunks())
            bad = pc.or_(bad, pc.and_(refused, pc.invert(judged["_hr_filtered"])))
        return bad

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


def _waited(reference: Reference) -> str:
    """Return the expression of `Evaluation.awaited` over the outputs of a row."""
    cells = [f"{quoted(name)}::VARCHAR" for name in reference.columns]
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
