"""Proving that nothing is lost or doubled, beside a running pipeline.

Four comparisons, each at an exact position:

- the log's chain, from its first entry to its end;
- the source, under a snapshot that a temporary slot exports together with its position P, with the
  fold of staging up to P;
- each destination table, in one read transaction with its stored position, with the fold of staging
  up to that position under its model; and the open records of its quarantine likewise;
- the ledger: every row closes, and together they account for every staged change.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import duckdb
import psycopg
import pyarrow as pa
import pyarrow.compute as pc

from headrace.change import Mark, Offset, TableSchema
from headrace.config import Project
from headrace.conservation import check_ledger, ledger_of
from headrace.destinations.joins import joins_of
from headrace.errors import HeadraceError
from headrace.join import Join
from headrace.keys import identity, literal, quoted
from headrace.lane import Lane
from headrace.log.proof import verify as verify_log
from headrace.masking import MASK, marked_in, masks_key
from headrace.pipeline import open_lanes
from headrace.prepared import FOREIGN_KEY, UNIQUE, Contested, Reference, Refused
from headrace.server import is_running, read
from headrace.sources.postgres.slot import durable_commit
from headrace.sources.postgres.snapshot import SourceSnapshot, pending_changes, take_snapshot
from headrace.sources.postgres.tables import captured_tables
from headrace.staging.unchanged import fill_unchanged
from headrace.transform.model import RowModel, as_text
from headrace.undecodable import of_history

_SHOWN_KEYS = 10
_CATCH_UP = 120.0


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one comparison. `rows` were compared; `keys` are some of those that differ."""

    what: str
    ok: bool
    detail: str
    rows: int = 0
    keys: tuple[str, ...] = ()


@dataclass(slots=True)
class Report:
    """All comparisons of a project."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def verified(self) -> bool:
        """Whether every comparison agrees."""
        return all(finding.ok for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {"verified": self.verified, "findings": [asdict(finding) for finding in self.findings]}


def verify(project: Project) -> Report:
    """Compare source, log, staging and destination of every lane.

    Raises HeadraceError when something cannot be read at all; what differs is in the report.
    """
    report = Report()
    for source in project.sources:
        report.findings += _log(project, source.name)
        if not source.upstream:  # its own project compares it
            report.findings += _source(project, source.name)
        report.findings += verify_destination(project, source.name)
    return report


def _lane(project: Project, source: str) -> Lane:
    """Open the lane as it stands now, to read only."""
    lanes = open_lanes(project, read_only=True)
    return next(lane for lane in lanes if lane.config.name == source)


def _log(project: Project, source: str) -> list[Finding]:
    what = f"log {source}"
    try:
        lane = _lane(project, source)
        end = verify_log(lane.log).end
    except HeadraceError as error:
        return [Finding(what, False, str(error))]
    return [Finding(what, True, f"chain holds to offset {end.offset}, hash {end.hash[:12]}…", end.offset)]


def _source(project: Project, source: str) -> list[Finding]:
    """Compare every captured table with the fold of staging at one position of the source."""
    what = f"source {source}"
    config = next(item for item in project.sources if item.name == source)
    lane = _lane(project, source)
    try:
        with take_snapshot(config) as snapshot:
            if is_running(project):
                lane = _wait_past(project, lane, snapshot.commit)
            elif behind := pending_changes(config, snapshot.commit, durable_commit(lane.log)):
                return [Finding(what, False, f"{behind} changes are not captured yet: run the pipeline")]
            captured = captured_tables(lane.log)
            schemas = lane.staging.schemas(lane.staging.through()).values()
            found = list[Finding]()
            for schema in (schema for schema in schemas if schema.table in captured):
                cells = marked_in(config.pii, schema.table, [column.name for column in schema.columns])
                compared = [_compare_source(lane, snapshot, schema)]
                found += _masked(compared, is_key=masks_key(schema, cells))
            return found
    except psycopg.Error as error:
        return [Finding(what, False, f"cannot be read: {type(error).__name__}")]


def _wait_past(project: Project, lane: Lane, commit: int) -> Lane:
    """Wait until staging holds everything up to a position of the source; returns a newer look."""
    head = max(lane.source.head(), commit)
    deadline = time.monotonic() + _CATCH_UP
    needed: Offset | None = None
    while time.monotonic() < deadline:
        lane.close()
        lane = _lane(project, lane.config.name)
        # Not the position of what is staged last: a copy may have read it ahead of the stream.
        if needed is None and durable_commit(lane.log) > head:
            needed = lane.log.end().offset
        if needed is not None and lane.staging.through() >= needed:
            return lane
        time.sleep(0.2)
    raise HeadraceError(
        f"The pipeline did not reach the source's position within {_CATCH_UP:.0f} s.",
        "See `headrace status`.",
    )


def _compare_source(lane: Lane, snapshot: SourceSnapshot, schema: TableSchema) -> Finding:
    through = lane.staging.through()
    copy = lane.staging.copy(schema.table, through)
    if copy is None:
        return Finding(f"source table {schema.table}", False, "its copy is not complete yet")
    if copy.ceiling.commit > snapshot.commit:
        return Finding(f"source table {schema.table}", False, "copied again meanwhile: verify once more")
    changes = lane.staging.history(schema.table, copy, through)
    changes = changes.filter(pc.less_equal(changes["_commit"], snapshot.commit))
    changes = fill_unchanged(lane.staging, schema.table, schema.key, changes, newest=through)
    model = as_text(lane.config.name, schema)
    expected = model.prepare(changes).rows
    try:
        found = snapshot.read(schema)
    except HeadraceError as error:
        return Finding(f"source table {schema.table}", False, str(error))
    with duckdb.connect() as db:
        db.register("found_raw", found)
        key, _ = identity(schema)
        keyed = f"SELECT {key} AS _source_key, * FROM found_raw"
        db.register("expected_raw", expected)
        cells = ", ".join(f"{quoted(name)} VARCHAR" for name in model.types())
        db.execute(f"CREATE TABLE expected (_source_key VARCHAR, {cells})")
        db.execute("INSERT INTO expected BY NAME SELECT * FROM expected_raw")
        what = f"source table {schema.table} = staging"
        return _compare(db, what, "SELECT * FROM expected", keyed, list(model.types()))


def verify_destination(project: Project, source: str) -> list[Finding]:
    """Compare the destination with the fold of staging at the position that it says it stands at."""
    lane = _lane(project, source)
    begun = lane.log.begin().offset
    models = lane.models()
    queries = [
        f'SELECT model, state, version, "offset" FROM headrace.models WHERE source = {literal(source)}',
        "SELECT model, key, model_version, reason, epoch, commit, ordinal, blocked, status "
        f"FROM headrace.quarantine WHERE source = {literal(source)} "
        "AND status IN ('quarantined', 'waiting', 'blocked')",
        ledger_of(source),
        f'SELECT log_id, "offset", hash FROM headrace.progress WHERE source = {literal(source)}',
        joins_of(source),
        f"SELECT model, name FROM headrace.foreign_keys WHERE source = {literal(source)} "
        "AND unchecked_since IS NULL",
        *(
            f"SELECT _source_key, {_columns(model)} FROM {lane.destination.table_of(model.name)}"
            for model in models
        ),
    ]
    try:
        states, records, ledger, progress, joins, kept, *tables = read(project, queries)
    except HeadraceError as error:
        return [Finding(f"destination of {source}", False, str(error))]
    lane.close()
    lane = _lane(project, source)
    lane.joiner.know({row["model"]: Join(**row) for row in joins.to_pylist()})
    findings = [_check_progress(lane, progress.to_pylist(), begun)]
    for model, table in zip(models, tables, strict=True):
        state = next((row for row in states.to_pylist() if row["model"] == model.name), None)
        if state is None or state["state"] == "suspended" or not state["offset"]:
            suspended = state is not None and state["state"] == "suspended"
            reason = "suspended: not compared" if suspended else "not applied yet"
            findings.append(Finding(f"model {model.name}", suspended, reason))
            continue
        mine = records.filter(pc.equal(records["model"], model.name))
        own = ledger.filter(pc.equal(ledger["model"], model.name)).to_pylist()
        findings += _masked(_compare_model(lane, model, state, table, mine), is_key=model.masked.key)
        account = check_ledger(lane.log, model.table, state["offset"], own, mine.to_pylist())
        findings.append(Finding(f"ledger of {model.name}", *account))
    judged = {(row["model"], row["name"]) for row in kept.to_pylist()}
    references = (each for model in models for each in model.own_references)
    found = dict(zip((model.name for model in models), tables, strict=True))
    for each in references:
        if (each.model, each.name) in judged:
            hidden = next(model.masked.key for model in models if model.name == each.model)
            findings += _masked([_referred(each, found)], is_key=hidden)
    return findings


def _referred(reference: Reference, tables: Mapping[str, pa.Table]) -> Finding:
    """Look for rows that refer to none."""
    with duckdb.connect() as db:
        db.register("child", tables[reference.model])
        db.register("parent", tables[reference.parent])
        pairs = zip(reference.columns, reference.to, strict=True)
        same = " AND ".join(f"p.{quoted(to)} = c.{quoted(column)}" for column, to in pairs)
        some = " AND ".join(f"c.{quoted(column)} IS NOT NULL" for column in reference.columns)
        rows = db.execute(
            f"SELECT _source_key FROM child c WHERE {some} "
            f"AND NOT EXISTS (SELECT 1 FROM parent p WHERE {same}) ORDER BY 1 LIMIT {_SHOWN_KEYS}"
        ).fetchall()
    what = f"foreign key {reference.name} of {reference.model}"
    detail = f"some rows refer to no row of {reference.parent}" if rows else "every row refers to one"
    keys = tuple(str(key) for (key,) in rows)
    return Finding(what, not rows, detail, tables[reference.model].num_rows, keys)


def _masked(findings: Sequence[Finding], *, is_key: bool) -> list[Finding]:
    """Return findings without the keys of rows where these are not to be shown."""
    return [
        replace(finding, keys=tuple(MASK for _ in finding.keys) if is_key else finding.keys)
        for finding in findings
    ]


def _check_progress(lane: Lane, rows: Sequence[dict[str, Any]], begun: Offset) -> Finding:
    """Compare the place that the destination remembers with the log: a chain that was made anew shows.

    `begun` is where the log began before the destination was read.
    """
    what = f"progress of {lane.config.name}"
    if len(rows) != 1:
        return Finding(what, False, f"{len(rows)} rows instead of one")
    stands = Mark(**rows[0])
    held = lane.log.mark(stands.offset)
    if held == stands:
        return Finding(what, True, f"the log holds offset {stands.offset} with the same hash")
    if held is None and begun <= stands.offset < lane.log.begin().offset:
        return Finding(
            what, True, f"the log was trimmed meanwhile beyond offset {stands.offset}: not compared"
        )
    return Finding(what, False, f"offset {stands.offset} has another hash or is not in the log")


def _columns(model: RowModel) -> str:
    return ", ".join(quoted(name) for name in model.types())


def _compare_model(
    lane: Lane, model: RowModel, state: dict[str, Any], table: pa.Table, records: pa.Table
) -> list[Finding]:
    """Compare rows and open records; keys that wait for a redrive under a mended model are left out.

    Which row had a contested key first, the records tell: what they refuse is refused here.
    """
    history = lane.joiner.history(model, state["offset"])
    prepared = model.refusing(_refused(model, records)).whole(history)
    is_current = pc.equal(records["model_version"], model.version)
    outdated = records.filter(pc.invert(is_current))["key"].combine_chunks().drop_null().cast(pa.string())
    with duckdb.connect() as db:
        db.execute("SET TimeZone = 'UTC'")
        columns = ", ".join(f"{quoted(name)} {type_}" for name, type_ in model.types().items())
        db.register("waiting", pa.table({"key": outdated}))
        for name, rows in (("expected_raw", prepared.rows), ("found_raw", table)):
            db.execute(f"CREATE TABLE {name[:-4]} (_source_key VARCHAR, {columns})")
            db.register(name, rows)
            # What a model makes of no changes has no columns.
            typed = ((cell, type_) for cell, type_ in model.types().items() if cell in rows.column_names)
            cells = (f"{as_type(rows, cell, type_)} AS {quoted(cell)}" for cell, type_ in typed)
            db.execute(
                f"INSERT INTO {name[:-4]} BY NAME SELECT {', '.join(('_source_key', *cells))} FROM {name} "
                "WHERE _source_key NOT IN (SELECT key FROM waiting)"
            )
        where = f"model {model.name} at offset {state['offset']}"
        rows = _compare(db, where, "SELECT * FROM expected", "SELECT * FROM found", list(model.types()))
        unique = [_keys_apart(db, model.name, key.columns, table) for key in model.unique]
    place = ["epoch", "commit", "ordinal"]
    copy = lane.joiner.stands_on(model)
    aside = (each.records for each in of_history(lane.staging, model, copy, state["offset"]))
    # What does not decode has no key, and the model's version makes no difference to it.
    stays, wanted = (
        part.filter(pc.invert(pc.is_in(part["key"].cast(pa.string()), value_set=outdated))).select(place)
        for part in (records, pa.concat_tables([prepared.records, *aside]))
    )
    found = {tuple(row.values()) for row in stays.to_pylist()}
    expected = {tuple(row.values()) for row in wanted.to_pylist()}
    same = found == expected and stays.num_rows == len(found)
    detail = f"{len(found)} open records" if same else f"{len(found)} open records, {len(expected)} expected"
    if len(outdated):
        detail += f"; {len(outdated)} of an earlier model version wait for `headrace quarantine redrive`"
    return [rows, *unique, Finding(f"quarantine of {model.name}", same, detail, len(found))]


def _refused(model: RowModel, records: pa.Table) -> Contested:
    """Return what the open records say was refused since another row had the key, or none was referred to."""
    is_of_others = pc.and_(
        pc.is_in(records["reason"], pa.array([UNIQUE, FOREIGN_KEY])),
        pc.equal(records["model_version"], model.version),
    )
    places = records.filter(is_of_others).select(["epoch", "commit", "ordinal"]).to_pylist()
    return Contested({model.name: [Refused(**place, name=None) for place in places]})


def _keys_apart(
    db: duckdb.DuckDBPyConnection, model: str, columns: Sequence[str], table: pa.Table
) -> Finding:
    """Look for rows of the table, `found_raw`, that have one key."""
    key, some = (
        ", ".join(map(quoted, columns)),
        " AND ".join(f"{quoted(name)} IS NOT NULL" for name in columns),
    )
    twins = db.execute(
        f"SELECT min(_source_key) FROM found_raw WHERE {some} GROUP BY {key} HAVING count(*) > 1 "
        f"LIMIT {_SHOWN_KEYS}"
    ).fetchall()
    detail = "some rows have one key" if twins else "no two rows have one key"
    what = f"key of {model} ({', '.join(columns)})"
    return Finding(what, not twins, detail, table.num_rows, tuple(str(key) for (key,) in twins))


def as_type(rows: pa.Table, column: str, type_: str) -> str:
    """Return the DuckDB expression of a column of query results as a model's type: nested values come as JSON
    from a destination that has no types for them."""
    is_nested = type_.endswith("]") or type_.startswith(("STRUCT", "MAP", "UNION"))
    if is_nested and pa.types.is_string(rows.schema.field(column).type):
        return f"CAST({quoted(column)}::JSON AS {type_})"
    return quoted(column)


def _compare(
    db: duckdb.DuckDBPyConnection, what: str, expected: str, found: str, columns: Sequence[str]
) -> Finding:
    """Compare two relations by count, by an order-independent hash of every column, and by key."""
    cells = ", ".join(f"hash({quoted(name)})" for name in columns)
    for name, query in (("a", expected), ("b", found)):
        db.execute(
            f"CREATE OR REPLACE TEMP TABLE {name} AS SELECT _source_key AS k, [{cells}] AS h FROM ({query})"
        )
    sums = ", ".join(f"sum(hash(k, h[{i + 1}])::HUGEINT) AS s{i}" for i in range(len(columns)))
    (left, right) = (db.execute(f"SELECT count(*), {sums} FROM {name}").fetchall()[0] for name in "ab")
    if left == right:
        return Finding(what, True, f"{left[0]} rows, {len(columns)} columns agree", int(left[0]))
    wrong = [name for i, name in enumerate(columns) if left[i + 1] != right[i + 1]]
    keys = db.execute(
        "SELECT k FROM (SELECT k, h FROM a EXCEPT ALL SELECT k, h FROM b) UNION SELECT k FROM "
        f"(SELECT k, h FROM b EXCEPT ALL SELECT k, h FROM a) ORDER BY k LIMIT {_SHOWN_KEYS}"
    ).fetchall()
    detail = f"{left[0]} rows expected, {right[0]} found; columns that differ: {', '.join(wrong) or 'none'}"
    return Finding(what, False, detail, int(right[0]), tuple(str(row[0]) for row in keys))
