"""Judging the rows of a Python model: its worker makes them, DuckDB types and checks them as it does SQL's.

A worker that dies costs the record that it dies of, and nothing else: the row in work, or half after half
of a batch, is tried once more alone, in a process that did nothing before, and only what kills that one too
goes to the quarantine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from headrace.errors import ModelBroken
from headrace.transform.evaluate import FAULTS, Evaluation
from headrace.transform.python.function import KEPT, NUMBER
from headrace.transform.python.process import Death, Worker

if TYPE_CHECKING:
    from headrace.transform.model import RowModel

_CARRIED = ("_hr_n", "_hr_k", "_committed_at")
_PART_ROWS, _PART_BYTES = 16_384, 16 << 20
_MOST_DEATHS = 100
_MOST_CRASHES = 20


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a row."""

    stage: str
    reason: str
    column: str
    message: str


class PythonRows:
    """The part of a bound model that runs outside: from raw changes to rows that are not typed yet."""

    def __init__(self, model: str, worker: Worker, columns: Sequence[str], key: tuple[str, ...]) -> None:
        """`columns` of the changes are what the function is given; `key` see `Definition`."""
        self.key = key
        self._model = model
        self._worker = worker
        self._columns = list(columns)

    @property
    def identity(self) -> object:
        """All that determines the rows that are made."""
        return (self._model, self._worker.identity, self._columns, self.key)

    def close(self) -> None:
        """End the worker's process, if there is one."""
        self._worker.close()

    def made(self, events: pa.Table) -> Iterator[tuple[list[pa.Table], dict[int, Fault]]]:
        """Yield part by part the rows that were made, kept or not, and by `_hr_n` what is wrong with others.

        Raises ModelBroken for a model that cannot run, or ends its worker over and over.
        """
        deaths = crashes = 0
        parts = deque(_parts(events))
        while parts:
            part = parts.popleft()
            try:
                tables, faults = self._worker.make(self._given(part.events), fresh=part.suspect)
            except Death as death:
                deaths += 1
                alone = part.suspect and part.events.num_rows == 1
                crashes += alone
                if deaths > _MOST_DEATHS or crashes > _MOST_CRASHES:
                    raise self._giving_up(deaths, crashes, death) from death
                if alone:
                    n = part.events["_hr_n"][0].as_py()
                    yield [], {n: Fault("crash", death.reason, "", str(death))}
                else:
                    parts.extendleft(reversed(_cut(part.events, death.row)))
                continue
            numbers = part.events["_hr_n"]
            wrong = {numbers[i].as_py(): Fault("transform", *what) for i, *what in faults}
            yield [_carried(part.events, table) for table in tables], wrong

    def _given(self, events: pa.Table) -> pa.Table:
        given = events.select(self._columns)
        if "_committed_at" in self._columns:
            at = self._columns.index("_committed_at")
            moments = given["_committed_at"].cast(pa.timestamp("us", "UTC"))
            given = given.set_column(at, "_committed_at", moments)
        return given

    def _giving_up(self, deaths: int, crashes: int, death: Death) -> ModelBroken:
        what = (
            f"{crashes} records of one slice" if crashes > _MOST_CRASHES else f"{deaths} times in one slice"
        )
        return ModelBroken(
            self._model,
            f"Model {self._model} ended its worker on {what}, the last time: {death}.",
            "Mend it: a record may end it, but hardly so many.",
        )


class PythonEvaluation(Evaluation):
    """An evaluation whose outputs are expressions over what a worker made, instead of over the raw table."""

    def __init__(self, db: duckdb.DuckDBPyConnection, model: RowModel, rows: PythonRows) -> None:
        super().__init__(db, model)
        self._rows = rows
        self._faults = dict[int, Fault]()
        self._doubtful = list[pa.Table]()

    def run(self, events: pa.Table) -> pa.Table:
        """See `Evaluation.run`."""
        tables = list[pa.Table]()
        for made, faults in self._rows.made(events):
            self._faults |= faults
            for table in () if self._model.suspect else made:
                self.judge(table)
            tables += made
        if self._model.suspect:
            for table in _joined(tables):  # since each trial starts a process
                self.judge(table)
        if not tables:
            self.judge(self._nothing())
        verdicts = self.verdicts()
        judged_bad = verdicts.filter(pc.equal(verdicts["verdict"], "bad"))["n"].combine_chunks()
        bad = pa.concat_arrays([judged_bad, pa.array(super().fatal(), pa.int64())])
        if len(bad):
            # What the engine has against a row is asked of it once more, over what was made of it.
            kept = (table.filter(pc.is_in(table["_hr_n"], value_set=bad)) for table in tables)
            self._doubtful += [table for table in kept if table.num_rows]
        return verdicts

    def faults(self, events: pa.Table) -> pa.Table:
        """See `Evaluation.faults`."""
        wanted = events["_hr_n"].combine_chunks()
        raised = [(n, self._faults[n]) for n in wanted.to_pylist() if n in self._faults]
        rows = [(n, fault.stage, fault.reason, fault.column, fault.message) for n, fault in raised]
        columns = zip(*rows, strict=True) if rows else [()] * len(FAULTS)
        found = [
            pa.table(
                [pa.array(cells, field.type) for cells, field in zip(columns, FAULTS, strict=True)],
                schema=FAULTS,
            )
        ]
        doubtful = (table.filter(pc.is_in(table["_hr_n"], value_set=wanted)) for table in self._doubtful)
        return pa.concat_tables([*found, *map(super().faults, doubtful)])

    def fatal(self) -> list[int]:
        """See `Evaluation.fatal`."""
        return sorted([*super().fatal(), *self._faults])

    def _nothing(self) -> pa.Table:
        nulls = {name: pa.nulls(0) for name in self._model.types()}
        own = {"_hr_n": pa.int64(), "_hr_k": pa.string(), "_committed_at": pa.int64(), KEPT: pa.bool_()}
        return pa.table(nulls | {name: pa.array([], type_) for name, type_ in own.items()})


def _joined(tables: Sequence[pa.Table]) -> Sequence[pa.Table]:
    """Return tables as one, if they have the same columns: those of a batch function may differ."""
    is_same = tables and all(table.schema == tables[0].schema for table in tables)
    return [pa.concat_tables(tables)] if is_same else tables


def _carried(events: pa.Table, made: pa.Table) -> pa.Table:
    """Return what was made of changes with what it is judged by beside the outputs."""
    carried = events.select(_CARRIED).take(made[NUMBER])
    for name in made.schema.names:
        if name != NUMBER:
            carried = carried.append_column(name, made[name])
    return carried


@dataclass(frozen=True, slots=True)
class _Part:
    """Changes that go to the worker at once; a suspect one has ended a worker, and goes to a fresh one."""

    events: pa.Table
    suspect: bool = False


def _parts(events: pa.Table) -> Iterator[_Part]:
    size = max(events.nbytes // max(events.num_rows, 1), 1)
    rows = max(min(_PART_ROWS, _PART_BYTES // size), 1)
    return (_Part(events.slice(begin, rows)) for begin in range(0, events.num_rows, rows))


def _cut(events: pa.Table, row: int | None) -> list[_Part]:
    """Cut changes on which a worker died: around the row that was in work, else in halves."""
    count = events.num_rows
    if row is None and count > 1:
        middle = count // 2
        cut = [_Part(events.slice(0, middle), middle == 1), _Part(events.slice(middle), count - middle == 1)]
    else:
        at = row or 0
        cut = [_Part(events.slice(0, at)), _Part(events.slice(at, 1), True), _Part(events.slice(at + 1))]
    return [part for part in cut if part.events.num_rows]
