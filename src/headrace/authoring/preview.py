"""What a model would make of the staged data, and how that differs from what is live; nothing is changed.

The model's table is built as the pipeline builds a new one, by a join of its table's copy, but in a
destination of its own, a temporary file. So memory is bounded as it is there, and what is found is what
would come. Log and staging are opened to be read only, beside a running pipeline or without one.

The live rows are taken first, in one read transaction with the offset at which they stand; the model is then
built through that same offset, so that a pipeline which goes on meanwhile makes no difference.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from headrace.authoring.differences import LIVE, Difference, compare
from headrace.authoring.files import Found, bind_found
from headrace.change import Offset
from headrace.config import Project
from headrace.destinations.duckdb import QUERY_MEMORY, DuckDBDestination
from headrace.destinations.tables import OPEN
from headrace.errors import HeadraceError, UserError
from headrace.joining import Joiner
from headrace.keys import identity, literal, quoted
from headrace.log.sqlite import SQLiteLog
from headrace.masking import MASK, Masked, mask_columns
from headrace.prepared import Prepared
from headrace.server import read, scan
from headrace.sources.postgres.lsn import format_lsn
from headrace.staging.delta import DeltaStaging
from headrace.transform.kind import LATEST
from headrace.transform.model import RowModel
from headrace.transform.pii import marked

EXAMPLES = 5
"""Keys that are named of each cause and each kind of difference."""

_DIGITS = 8  # of a key's MD5, to compare with the share of a sample
_RUNNING = ("in_sync", "joining")


@dataclass(frozen=True, slots=True)
class Cause:
    """Records that would come to the quarantine for one reason, with some of their source keys."""

    reason: str
    columns: str
    message: str
    records: int
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Preview:
    """What a model makes of its raw table as of `offset`, at `position` in the source.

    `share` says how much of the source keys were looked at, 1.0 for all; all counts are of these. `changes`
    were read, `rows` would be in the table, `filtered` rows are left out by WHERE, `records` would be in
    quarantine. `first` holds the first rows, by key. `live_offset` is where the live table stands;
    it and `difference` are None where the destination has no such table.
    """

    model: str
    version: str
    source: str
    table: str
    offset: Offset
    position: str
    share: float
    changes: int
    rows: int
    filtered: int
    records: int
    causes: tuple[Cause, ...]
    first: pa.Table
    live_offset: Offset | None
    live_records: int
    difference: Difference | None


@dataclass(frozen=True, slots=True)
class _Live:
    """The live table: how its model stands, and its columns with their types."""

    columns: Mapping[str, str]
    state: str = ""
    offset: Offset = 0
    open_records: int = 0


@dataclass(frozen=True, slots=True)
class _Sampled(RowModel):
    """A model of the source keys alone whose MD5 is below a bound; all changes of such a key count."""

    below: str = ""

    def prepare(self, changes: pa.Table) -> Prepared:
        """See `Model.prepare`."""
        own, before = identity(self.schema)
        with duckdb.connect() as db:
            db.register("changes", changes)
            mine = f"{_in_sample(own, self.below)} OR {_in_sample(before, self.below)}"
            keep = db.sql(f"SELECT coalesce(_op = 't' OR {mine}, false) AS keep FROM changes")
            prepared = RowModel.prepare(self, changes.filter(keep.to_arrow_table()["keep"]))
        made = prepared.steps
        return replace(
            prepared,
            removed=self._only(pa.table({"key": prepared.removed}), "key")["key"].combine_chunks(),
            rows=self._only(prepared.rows, "_source_key"),
            records=self._only(prepared.records, "key"),
            fewer=self._only(prepared.fewer, "_source_key") if prepared.fewer else None,
            deleted=self._only(prepared.deleted, "key") if prepared.deleted else None,
            steps=made and replace(made, table=self._only(made.table, "_source_key")),
        )

    def _only(self, table: pa.Table, key: str) -> pa.Table:
        """Return the rows of a table whose key is in the sample, or stands for all: a change of the key is
        one of two."""
        with duckdb.connect() as db:
            db.register("keyed", table.select([key]))
            found = db.sql(f"SELECT coalesce({_in_sample(key, self.below)}, true) AS keep FROM keyed")
            keep = found.to_arrow_table()["keep"]
        return table.filter(keep)


def preview(project: Project, found: Found, *, limit: int = 10, sample: int | None = None) -> Preview:
    """Build what a model would be, and compare it with what is live.

    `limit` is how many of its rows are returned; with `sample`, only so many source keys are looked at that
    about `sample` of the staged changes are theirs. Takes temporary space for the model's table and the live
    one. Raises UserError before the source has run, ModelError and ModelBroken for a model that does not fit,
    DestinationBusy while another process than a pipeline holds the destination.
    """
    with (
        tempfile.TemporaryDirectory(prefix="headrace-preview-") as folder,
        closing(_open_log(project, found.source)) as log,
    ):
        scratch = DuckDBDestination(Path(folder) / "preview.duckdb", spill=Path(folder) / "spill")
        share = 1.0 if sample is None else _share(_staging(project, found.source, log), found, sample)
        live = _take_live(project, found, scratch, share)
        staging = _staging(project, found.source, log)  # opened now, it is as far as what is live, or further
        built = _build(project, found, scratch, log, staging, live, share)
        with scratch.connected(memory=QUERY_MEMORY) as db:
            return _report(db, built, scratch.table_of(built.model.name), live, share, limit)


@dataclass(frozen=True, slots=True)
class _Built:
    """A model whose table stands in the scratch file as of an offset; `key` orders it."""

    model: RowModel
    key: tuple[str, ...]
    offset: Offset
    position: str
    changes: int


def _build(
    project: Project,
    found: Found,
    scratch: DuckDBDestination,
    log: SQLiteLog,
    staging: DeltaStaging,
    live: _Live | None,
    share: float,
) -> _Built:
    """Build a model in the scratch file, and beside it what its WHERE leaves out."""
    through = staging.through()
    pii = next(source.pii for source in project.sources if source.name == found.source)
    model = marked(bind_found(found, staging.schemas(through), project.defaults), found.text, pii)
    model = replace(model, decisions=staging.decisions(model.name, through))
    copy = staging.copy(model.table, through)
    if copy is None:
        raise UserError(
            f"The copy of {model.table} is not complete yet.", "`headrace tables list` says how far it is."
        )
    runs = live is not None and live.state in _RUNNING and live.offset >= copy.end
    offset = live.offset if live is not None and runs else through
    if log.mark(offset) is None:
        raise HeadraceError(f"The pipeline has gone on from offset {offset} meanwhile.", "Try again.")
    for each in (model, *([_left_out(model)] if model.where else [])):
        joiner = Joiner(found.source, log, staging, scratch.joins)
        chosen = _sampled(each, share) if share < 1 else each
        while joiner.step(chosen, copy, {}, (), offset, lambda _: None) != "attach":
            pass
    return _Built(
        model=model,
        key=found.text.key if found.text else (),
        offset=offset,
        position=format_lsn(log.place(offset)[0].commit),
        changes=staging.count(model.table, 0, offset),
    )


def _report(
    db: duckdb.DuckDBPyConnection,
    built: _Built,
    target: str,
    live: _Live | None,
    share: float,
    limit: int,
) -> Preview:
    """Ask the scratch file what has come."""
    model = built.model
    columns, order = (", ".join(map(quoted, names)) for names in (model.types(), built.key))
    records = f"FROM headrace.quarantine WHERE model = {literal(model.name)} AND {OPEN}"
    order = ", ".join([order or "_source_key", *model.kind.order])
    first = f"SELECT {columns} FROM {target} ORDER BY {order} LIMIT {max(limit, 0)}"
    causes = db.execute(
        f"SELECT reason, columns, message, count(*) AS records, min(key, {EXAMPLES}) AS keys "
        f"{records} GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    difference = compare(db, model, target, live.columns, EXAMPLES) if live else None
    return Preview(
        model=model.name,
        version=model.version,
        source=model.source,
        table=model.table.label,
        offset=built.offset,
        position=built.position,
        share=share,
        changes=built.changes,
        rows=_number(db, f"SELECT count(*) FROM {target}"),
        filtered=_number(db, f"SELECT count(*) FROM {_LEFT_OUT}") if model.where else 0,
        records=_number(db, f"SELECT count(*) {records}"),
        causes=tuple(sorted((_cause(model.masked, *row) for row in causes), key=_by_weight)),
        first=mask_columns(db.sql(first).to_arrow_table(), model.masked.outputs),
        live_offset=live.offset if live else None,
        live_records=live.open_records if live else 0,
        difference=difference,
    )


def _cause(masked: Masked, reason: str, columns: str, message: str, records: int, keys: list[str]) -> Cause:
    return Cause(reason, columns, message, records, tuple(MASK if masked.key else key for key in keys))


def _by_weight(cause: Cause) -> tuple[int, str, str]:
    return -cause.records, cause.reason, cause.columns


def _sampled(model: RowModel, share: float) -> _Sampled:
    return _Sampled(
        **{field.name: getattr(model, field.name) for field in fields(model)}, below=_bound(share)
    )


_LEFT_OUT = "main._left_out"


def _left_out(model: RowModel) -> RowModel:
    """Return the model of the rows that a model's WHERE leaves out."""
    return replace(
        model,
        name=_LEFT_OUT.partition(".")[2],
        outputs=(("left_out", "true", "BOOLEAN"),),
        where=f"({model.where}\n) IS NOT TRUE",
        checks=(),
        kind=LATEST,
        unique=(),
    )


def _open_log(project: Project, source: str) -> SQLiteLog:
    if source not in {item.name for item in project.sources}:
        raise UserError(
            f"There is no [source.{source}].", f"Sources are: {', '.join(s.name for s in project.sources)}."
        )
    path = project.log_path(source)
    if not path.exists():
        raise UserError(
            f"Source {source} has not run yet: nothing is staged.", "Run `headrace run --once` first."
        )
    return SQLiteLog(path, read_only=True)


def _staging(project: Project, source: str, log: SQLiteLog) -> DeltaStaging:
    staging = DeltaStaging(project.staging_path(source), source, log.id, read_only=True)
    staging.follow(log)
    return staging


def _share(staging: DeltaStaging, found: Found, sample: int) -> float:
    through = staging.through()
    table = next((table for table in staging.schemas(through) if table.label == found.table), None)
    rows = staging.count(table, 0, through) if table else 0
    return min(1.0, max(sample, 1) / max(rows, 1))


def _bound(share: float) -> str:
    return f"{int(share * 16**_DIGITS):0{_DIGITS}x}"


def _in_sample(key: str, below: str) -> str:
    """Return the condition of a key in the sample; MD5, since every destination has it."""
    return f"md5({key}) < {literal(below)}"


# ------------------------------------------------------------------------------------ what is live


def _take_live(project: Project, found: Found, scratch: DuckDBDestination, share: float) -> _Live | None:
    """Copy the live rows into the scratch file; None where there is no such table, or none of DuckDB, with
    whose types it could be compared."""
    if project.destination.type != "duckdb" or not project.destination.path.exists():
        return None
    schema, table = scratch.place_of(found.name)
    (known,) = read(
        project,
        [
            "SELECT column_name, data_type FROM information_schema.columns WHERE "
            f"table_schema = {literal(schema)} AND table_name = {literal(table)} ORDER BY ordinal_position"
        ],
    )
    columns = {row["column_name"]: row["data_type"] for row in known.to_pylist()}
    if "_source_key" not in columns:
        return None
    where = f"_source = {literal(found.source)}"
    if share < 1:
        where += f" AND {_in_sample('_source_key', _bound(share))}"
    columns = {name: type_ for name, type_ in columns.items() if name != "_source"}
    queries = [
        f'SELECT state, "offset", open_records FROM headrace.models WHERE model = {literal(found.name)}',
        f"SELECT {', '.join(map(quoted, columns))} FROM {scratch.table_of(found.name)} WHERE {where}",
    ]
    with scan(project, queries) as results:
        states = [row for batch in next(results)[1] for row in batch.to_pylist()]
        _fill(scratch, columns, next(results)[1])
    shown = {name: type_ for name, type_ in columns.items() if name != "_source_key"}
    state: dict[str, Any] = states[0] if states else {}
    return _Live(shown, **state)


def _fill(scratch: DuckDBDestination, columns: Mapping[str, str], batches: Iterator[pa.RecordBatch]) -> None:
    with scratch.connected() as db:
        db.execute(f"CREATE SCHEMA {LIVE.partition('.')[0]}")
        typed = ", ".join(f"{quoted(name)} {type_}" for name, type_ in columns.items())
        db.execute(f"CREATE TABLE {LIVE} ({typed})")
        for batch in batches:
            _hr_batch = pa.Table.from_batches([batch])
            db.execute(f"INSERT INTO {LIVE} SELECT * FROM _hr_batch")


def _number(db: duckdb.DuckDBPyConnection, query: str) -> int:
    return int(db.execute(query).fetchall()[0][0])
