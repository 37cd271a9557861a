"""Running the tests of models: the same fold as in the pipeline, over the rows that a test gives."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import duckdb
import pyarrow as pa

from headrace.authoring.cases import Case, CaseFile, Event, ExpectedRecord, case_paths, read_cases
from headrace.authoring.checking import output_columns
from headrace.authoring.comparing import compared, differences
from headrace.authoring.files import Shapes, bind_found, find_any
from headrace.authoring.marts import judge_mart
from headrace.change import Offset, TableId, TableSchema
from headrace.config import Project
from headrace.errors import HeadraceError, UserError
from headrace.mart import Mart
from headrace.payload import BEFORE, UNCHANGED
from headrace.prepared import Prepared
from headrace.staging.unchanged import fill_unchanged
from headrace.transform.model import RowModel


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one test, or of a file that has none to run; passed where `problems` is empty."""

    file: str
    line: int
    name: str
    model: str
    problems: tuple[str, ...]


def run_tests(
    project: Project, recorded: Mapping[str, Shapes], names: Collection[str] = ()
) -> Iterator[Outcome]:
    """Run the tests of a project, or only those of some files or models.

    `recorded` are shapes of raw tables by source, for files that give none. What does not read or bind is a
    failed test. Raises UserError for a name of `names` that no test has.
    """
    unknown = set(names)
    for path in case_paths(project):
        try:
            file = read_cases(path)
        except UserError as error:
            if not names or path.stem in names:
                unknown.discard(path.stem)
                yield Outcome(path.name, 1, path.stem, "", (error.paragraph(),))
            continue
        if names and not {path.stem, file.model} & set(names):
            continue
        unknown -= {path.stem, file.model}
        yield from _run_file(project, file, recorded)
    if unknown:
        known = [path.stem for path in case_paths(project)]
        near = get_close_matches(min(unknown), known, 1)
        hint = f'Did you mean "{near[0]}"?' if near else f"Tests are: {', '.join(known) or 'none yet'}."
        raise UserError(f'There is no test of "{min(unknown)}".', hint)


def _run_file(project: Project, file: CaseFile, recorded: Mapping[str, Shapes]) -> Iterator[Outcome]:
    try:
        found = find_any(project, file.model)
        if isinstance(found, Mart):
            yield from _run_mart(project, file, found, recorded)
            return
        given = file.schema(found.table)
        shapes = {given.table: given} if given else recorded.get(found.source, {})
        if not shapes:
            raise UserError(
                f"The types of raw.{found.source}.{found.table} are not known.",
                "Give them in [schema], or record them: `headrace ci --record`.",
            )
        model = bind_found(found, shapes, project.defaults)
    except HeadraceError as error:
        yield Outcome(file.path.name, 1, file.path.stem, file.model, (error.paragraph(),))
        return
    key = found.text.key if found.text else tuple(model.schema.key)
    yield from _outcomes(file, lambda case: judge(case, model, key))


def _run_mart(
    project: Project, file: CaseFile, mart: Mart, recorded: Mapping[str, Shapes]
) -> Iterator[Outcome]:
    if project.destination.type != "duckdb":
        raise UserError(
            f"{mart.name} is in the SQL of {project.destination.type}: tests of marts run in DuckDB.",
            "Test it against the destination.",
        )
    tables = {**output_columns(project, recorded), **file.tables}
    yield from _outcomes(file, lambda case: judge_mart(case, mart, tables))


def _outcomes(file: CaseFile, judged: Callable[[Case], Iterable[str]]) -> Iterator[Outcome]:
    for case in file.cases:
        try:
            problems = tuple(judged(case))
        except HeadraceError as error:
            problems = (error.paragraph(),)
        yield Outcome(file.path.name, case.line, case.name, file.model, problems)


def judge(case: Case, model: RowModel, key: Sequence[str]) -> Iterator[str]:
    """Run one test; yield each way in which it fails. `key` are output columns that tell rows apart.

    Raises UserError for a test that names what is not there.
    """
    prepared = prepare_given(case.given, model)
    names = compared(case, model.types())
    with duckdb.connect() as db:
        db.execute("SET TimeZone = 'UTC'")
        db.register("_hr_rows", prepared.rows.select(names))
        types = {name: model.types()[name] for name in names}
        yield from differences(db, "FROM _hr_rows", types, case.expect, key)
    yield from _record_problems(prepared.records, case.quarantine)


def prepare_given(given: Sequence[Event], model: RowModel) -> Prepared:
    """Return what a model makes of given changes of an empty table.

    Raises UserError for a cell of a column that the table does not have, or a key that is not whole.
    """
    return model.whole(_changes(given, model.schema))


def _record_problems(records: pa.Table, expected: Sequence[ExpectedRecord]) -> Iterator[str]:
    left = records.select(["key", "reason", "columns", "message"]).to_pylist()
    for wanted in expected:
        fits = (
            record
            for record in left
            if record["key"] == wanted.key
            and wanted.reason in ("", record["reason"])
            and wanted.column in ("", record["columns"])
        )
        if match := next(fits, None):
            left.remove(match)
        else:
            parts = " ".join(part for part in (wanted.reason, wanted.column) if part)
            yield f"quarantine, missing: key {wanted.key} {parts}".rstrip()
    for record in left:
        why = " ".join(part for part in (record["reason"], record["columns"]) if part)
        yield f"quarantine, unexpected: key {record['key']} {why}: {record['message']}"


# ------------------------------------------------------------------------------- the given rows


def _changes(events: Sequence[Event], schema: TableSchema) -> pa.Table:
    """Return the given rows as staging would, with unchanged cells filled from the rows before."""
    names = [column.name for column in schema.columns]
    for i, event in enumerate(events, 1):
        for name in (*event.cells, *event.unchanged, *(event.before or ())):
            if name not in names:
                near = get_close_matches(name, names, 1)
                hint = f'Did you mean "{near[0]}"?' if near else f"It has: {', '.join(names)}."
                raise UserError(f"Given row {i}: the raw table has no column {name}.", hint)
        lacking = [name for name in schema.key if name not in event.cells and event.op != "t"]
        if lacking:
            raise UserError(f"Given row {i}: it lacks {', '.join(lacking)}, which the table's key has.")
    count = len(events)
    numbers = pa.array(range(1, count + 1), pa.int64())
    zeros = pa.repeat(pa.scalar(0, pa.int64()), count)
    columns: dict[str, Any] = {
        name: pa.array([event.cells.get(name) for event in events], pa.string()) for name in names
    }
    columns |= {
        "_op": pa.array([event.op for event in events], pa.string()),
        "_epoch": zeros,
        "_commit": numbers,
        "_ordinal": numbers,
        "_offset": numbers,
        "_committed_at": pa.array([_micros(event.committed_at) for event in events], pa.int64()),
        "_txid": numbers,
        "_unchanged": pa.array([list(event.unchanged) or None for event in events], UNCHANGED),
        "_before": pa.array(
            [list(event.before.items()) if event.before else None for event in events], BEFORE
        ),
    }
    changes = pa.table(columns)
    return fill_unchanged(_Given(changes), schema.table, schema.key, changes)


def _micros(moment: Any) -> int:
    return pa.scalar(moment, pa.timestamp("us", "UTC")).cast(pa.int64()).as_py()  # type: ignore[no-any-return]


class _Given:
    """The given rows as the raw history of their table."""

    def __init__(self, changes: pa.Table) -> None:
        self._changes = changes

    def read_back(
        self,
        table: TableId,  # noqa: ARG002 - there is but one
        before: Offset,  # noqa: ARG002 - who asks compares positions
        columns: Sequence[str],
        rows: int,  # noqa: ARG002 - all are few
    ) -> tuple[pa.Table, Offset]:
        """Return all given rows: nothing stands before them."""
        return self._changes.select(columns), 0

    def undecodable(self, table: TableId, after: Offset, through: Offset) -> pa.Table:  # noqa: ARG002
        """Return nothing: who gives rows can read them."""
        return self._changes.slice(0, 0)
