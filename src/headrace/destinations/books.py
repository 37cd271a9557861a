"""What a transaction of the destination says of itself: quarantine, ledger, and where models stand."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from headrace.change import Counts, Mark, Offset, Position
from headrace.destinations.issues import count_closing, count_opening
from headrace.destinations.multiset import take_off
from headrace.destinations.session import Session
from headrace.destinations.tables import LEDGER_COUNTS, OPEN, QUARANTINE, RECORD_COLUMNS
from headrace.errors import DestinationError
from headrace.keys import literal
from headrace.prepared import FOREIGN_KEY, Prepared
from headrace.protocols import Model, Part, Slice

if TYPE_CHECKING:
    from headrace.destinations.refolding import Refolded
    from headrace.destinations.steps import Settled


_SQLSTATES = {
    "transform.cast": "22018",
    "constraint.not_null": "23502",
    "constraint.check": "23514",
    "constraint.unique": "23505",
    "constraint.foreign_key": "23503",
}
"""What the SQL standard and Postgres call errors that DuckDB has no codes for."""

_SQLSTATE = " ".join(
    ["CASE reason", *(f"WHEN '{reason}' THEN '{state}'" for reason, state in _SQLSTATES.items()), "END"]
)
_CONSTRAINT = (
    "CASE WHEN stage = 'constraint' THEN "
    "concat(replace(upper(split_part(reason, '.', 2)), '_', ' '), ' (', columns, ')') END"
)
"""The columns `sqlstate` and `constraint_name` of a record, by its reason."""


_UNWRITTEN = 20_000
"""Records of a model that are written at once: a statement costs much, and a record weighs up to 8 KB."""


@dataclass(slots=True)
class _Account:
    """One model in a slice: how it stood before, and what all of its parts so far amount to."""

    model: Model
    state: str
    known: bool
    counts: Counts
    moved: Counts
    open_records: int
    unwritten: list[pa.Table] = field(default_factory=list)
    """Records of parts that are applied."""


class Books:
    """The accounts of one slice, kept while its parts are applied and written at the end."""

    def __init__(self, db: Session, work: Slice) -> None:
        self.new_issues: list[str] = []
        """Those of the records that are written so far."""
        self._db = db
        self._work = work
        self._accounts: dict[str, _Account] = {}
        rows = db.execute(
            'SELECT model, "offset", version, state, reason, open_records FROM headrace.models '
            "WHERE source = $1",
            [work.source],
        )
        self._stands = {str(row[0]): row[1:] for row in rows}

    def admit(self, part: Part, target: str) -> None:
        """Enter what a part overtakes, before its rows are applied to the table `target`: healed records, and
        rows taken off.

        Raises DestinationError unless the model stands where the slice begins.
        """
        name, commit = part.model.name, self._work.position.commit
        if name not in self._accounts:
            offset, version, state, reason, opened = self._stands.get(name, (0, "", "", "", 0))
            if offset != self._work.after.offset:
                raise DestinationError(f"Model {name} does not stand at {self._work.after.offset}.")
            self._db.moving.add(name)
            known = (version, state, reason) == (part.model.version, _state(part), "")
            self._accounts[name] = _Account(part.model, _state(part), known, Counts(), Counts(), opened)
        account = self._accounts[name]
        if _touches(part.prepared, account.unwritten):
            self._write_records(account)
        written = account.open_records - sum(map(len, account.unwritten))
        moved = heal(self._db, name, part.prepared, commit) if written else Counts()
        moved += overtaken(take_off(self._db, self._work.source, name, target, part.prepared, commit))
        account.moved += moved
        account.open_records += moved.quarantined + moved.waiting

    def take(self, part: Part) -> None:
        """Enter a part whose rows were applied; its records are written together with those of others."""
        account = self._accounts[part.model.name]
        if part.prepared.steps is not None:
            return  # see `settle`
        account.counts += part.prepared.counts
        records = part.prepared.records
        if not records.num_rows:
            return
        account.open_records += records.num_rows
        account.unwritten.append(records)
        if sum(map(len, account.unwritten)) >= _UNWRITTEN:
            self._write_records(account)

    def write_records(self) -> None:
        """Write all records that are not yet."""
        for account in self._accounts.values():
            self._write_records(account)

    def refolded(self, model: Model, refolded: Refolded) -> None:
        """Enter what the whole histories of some keys came to, whose ledger is written."""
        self._accounts[model.name].open_records += refolded.more

    def settle(self, settled: Settled) -> None:
        """Enter what came of a model's steps."""
        account = self._accounts[settled.model.name]
        account.counts += settled.counts
        account.open_records += settled.records
        self.new_issues += settled.issues

    def close(self) -> None:
        """Write what is not yet: records, the ledger, and where the models stand now."""
        self.write_records()
        self._write_ledger()
        self._write_models()

    def _write_records(self, account: _Account) -> None:
        if account.unwritten:
            records, account.unwritten = pa.concat_tables(account.unwritten), []
            self.new_issues += record(self._db, account.model, records)

    def _write_ledger(self) -> None:
        work, rows = self._work, []
        span = (work.after.offset, work.through.offset)
        for name, account in self._accounts.items():
            version = account.model.version
            if account.counts.read:
                rows.append((work.source, name, "apply", *span, *numbers(account.counts), version))
            if account.moved.superseded:
                rows.append((work.source, name, "superseded", *span, *numbers(account.moved), version))
        insert(self._db, "ledger", rows)

    def _write_models(self) -> None:
        """Move every model: those of which only the place changes in one statement."""
        work = self._work
        place = (work.through.offset, work.position.epoch, work.position.commit, work.committed_at)
        moved = [name for name, account in self._accounts.items() if self._only_moves(name, account)]
        if moved:
            self._db.execute(
                'UPDATE headrace.models SET "offset" = $1, epoch = $2, commit = $3, committed_at = $4, '
                f"updated_at = now() WHERE model IN ({', '.join(map(literal, moved))})",
                list(place),
            )
        others = {name: self._accounts[name] for name in self._accounts.keys() - set(moved)}
        if others:
            names = ", ".join(map(literal, others))
            self._db.execute(f"DELETE FROM headrace.models WHERE model IN ({names})")
            self._db.execute(f"DELETE FROM headrace.suspensions WHERE model IN ({names})")
        insert(
            self._db,
            "models",
            [
                (name, work.source, account.model.version, account.state, "", *place,
                 account.open_records)
                for name, account in others.items()
            ],
        )  # fmt: skip

    def _only_moves(self, name: str, account: _Account) -> bool:
        return account.known and account.open_records == self._stands[name][-1]


def _touches(prepared: Prepared, records: Sequence[pa.Table]) -> bool:
    """Whether a part may close some of these records."""
    if not records or prepared.reset or prepared.fewer is not None or prepared.deleted is not None:
        return bool(records)
    keys = pa.concat_tables(records)["key"].combine_chunks()
    return bool(pc.any(pc.is_in(prepared.removed, value_set=keys)).as_py())


def _state(part: Part) -> str:
    return "in_sync" if part.in_sync else "joining"


def overtaken(records: int, waiting: int = 0, blocked: int = 0) -> Counts:
    """Return what the ledger says of open records that became superseded, some of which waited, with the
    changes that were `blocked` behind them."""
    return Counts(
        superseded=records + blocked, quarantined=waiting - records, waiting=-waiting, blocked=-blocked
    )


def heal(db: Session, model: str, prepared: Prepared, commit: int, records: str = QUARANTINE) -> Counts:
    """Mark the open records, kept in the table `records`, that a later good change has overtaken; returns
    what the ledger is to say of it."""
    keys = [prepared.removed, *([prepared.deleted["key"]] if prepared.deleted is not None else [])]
    if not prepared.reset and not sum(map(len, keys)):
        return Counts()
    given = None if prepared.reset else pa.table({"key": pa.chunked_array(keys, pa.string())})
    mine = f"model = {literal(model)} AND {OPEN}"
    where = "" if prepared.reset else "AND key IN (SELECT key FROM _hr_given)"
    db.keep("_hr_healed", f"SELECT id, status, blocked FROM {records} WHERE {mine} {where}", given)
    ((waiting, healed, blocked),) = db.execute(
        "SELECT count(*) FILTER (WHERE status = 'waiting'), count(*), coalesce(sum(blocked), 0)::BIGINT "
        "FROM _hr_healed"
    )
    if healed:
        close_records(
            db, "id IN (SELECT id FROM _hr_healed)", f"'superseded', superseded_by = {commit}", records
        )
    return overtaken(healed, waiting, int(blocked))


def close_records(
    db: Session,
    condition: str,
    status: str,
    records: str = QUARANTINE,
    *,
    version: str | None = None,
    given: pa.Table | None = None,
) -> int:
    """Close the records of the table `records` that meet a condition; returns how many.

    `status` is the status that they have then, as SQL, with what else is to be set. `version` is that of the
    model that closes them, None for the one that it stands at.
    """
    if records == QUARANTINE:
        count_closing(db, condition, version, given)
    return db.change(
        f"UPDATE {records} SET status = {status}, resolved_at = now() WHERE {condition}", given=given
    )


def read_progress(db: Session, source: str) -> Mark | None:
    """Return how far a source is applied."""
    rows = db.execute('SELECT log_id, "offset", hash FROM headrace.progress WHERE source = $1', [source])
    return Mark(*rows[0]) if rows else None


def move_progress(db: Session, source: str, at: Mark, position: Position, committed_at: int) -> None:
    """Move how far a source is applied to `at`, unless it is there or beyond."""
    progress = read_progress(db, source)
    if progress is not None and progress.offset >= at.offset:
        return
    db.execute("DELETE FROM headrace.progress WHERE source = $1", [source])
    insert(db, "progress", [(source, *at, position.epoch, position.commit, committed_at)])


def stand(
    db: Session,
    model: Model,
    at: Offset,
    position: Position,
    committed_at: int,
    *,
    in_sync: bool,
) -> None:
    """Write where a model stands, with its open records counted anew."""
    ((records,),) = db.execute(
        f"SELECT count(*) FROM headrace.quarantine WHERE model = $1 AND {OPEN}", [model.name]
    )
    for table in ("models", "suspensions", "decided"):  # what was decided meanwhile is looked at again
        db.execute(f"DELETE FROM headrace.{table} WHERE model = $1", [model.name])
    state = "in_sync" if in_sync else "joining"
    where = (at, position.epoch, position.commit, committed_at)
    insert(db, "models", [(model.name, model.source, model.version, state, "", *where, records)])


def count_open(db: Session, model: str) -> None:
    """Write how many open records a model has, counted anew."""
    name = literal(model)
    db.execute(
        f"UPDATE headrace.models SET open_records = (SELECT count(*) FROM headrace.quarantine "
        f"WHERE model = {name} AND {OPEN}) WHERE model = {name}"
    )


def numbers(counts: Counts) -> list[int]:
    """Return counts in the order of the ledger's columns."""
    return [getattr(counts, name) for name in LEDGER_COUNTS]


def count_changes(db: Session, names: Collection[str]) -> None:
    """Count that a transaction changes the rows of models and marts, in the transaction itself."""
    listed = ", ".join(map(literal, sorted(names)))
    counted = db.change(f"UPDATE headrace.changes SET changes = changes + 1 WHERE name IN ({listed})")
    if counted < len(names):
        rows = ", ".join(f"({literal(name)})" for name in sorted(names))
        db.execute(
            f"INSERT INTO headrace.changes SELECT name, 1 FROM (VALUES {rows}) AS v(name) "
            "WHERE name NOT IN (SELECT name FROM headrace.changes)"
        )


def insert(db: Session, table: str, rows: Sequence[Sequence[object]]) -> None:
    """Insert a few rows into one of Headrace's tables, whose last column is the time now."""
    if rows:
        width = len(rows[0])
        numbered = (range(i * width + 1, (i + 1) * width + 1) for i in range(len(rows)))
        marks = ", ".join(f"({', '.join(f'${n}' for n in row)}, now())" for row in numbered)
        db.execute(f"INSERT INTO headrace.{table} VALUES {marks}", [cell for row in rows for cell in row])


def record(db: Session, model: Model, records: pa.Table, into: str = QUARANTINE) -> list[str]:
    """Write records to the table `into`; return the ids of issues that no record had before.

    A record's id comes from its model and position, so a change has one record however often it fails:
    writing it again keeps when it was first seen and counts one more attempt.
    """
    if not records.num_rows:
        return []
    return record_from(db, model, "_hr_given", into, dated(records))


def dated(records: pa.Table) -> pa.Table:
    """Return records as the table of the quarantine holds them."""
    at = records.schema.get_field_index("committed_at")
    times = records["committed_at"].cast(pa.timestamp("us", "UTC"))
    return records.set_column(at, "committed_at", times)


def record_from(
    db: Session, model: Model, relation: str, into: str = QUARANTINE, given: pa.Table | None = None
) -> list[str]:
    """Write the records of a relation to the table `into`; see `record`."""
    source, name, table = literal(model.source), literal(model.name), literal(str(model.table))
    # Waiting is no failure: what fails when it has been long is another issue, which is alerted.
    orphaned = f"r.reason = '{FOREIGN_KEY}' AND q.status = 'quarantined' AND q.waiting_on = r.waiting_on"
    waits = f"r.reason = '{FOREIGN_KEY}' AND ({orphaned}) IS NOT TRUE"
    cause = fingerprint(f"CASE WHEN {waits} THEN 'waiting' END")
    db.keep(
        "_hr_incoming",
        f"""SELECT r.*, coalesce(q.attempts, 0) + 1 AS attempts,
        coalesce(q.first_seen, now()) AS first_seen, now() AS last_attempt,
        CASE WHEN {orphaned} THEN q.issue ELSE {cause} END AS issue,
        CASE WHEN {waits} THEN 'waiting' ELSE 'quarantined' END AS status,
        CASE WHEN {waits} THEN coalesce(CASE WHEN q.status = 'waiting' THEN q.waiting_since END, now())
          ELSE q.waiting_since END AS waiting_since
        FROM (
          SELECT md5(concat_ws('|', {source}, {name}, epoch, commit, ordinal))::UUID AS id,
          {source} AS source, {name} AS model, {table} AS table_name,
          stage, reason, columns, message, op, is_partial, key, epoch, commit, ordinal, txid,
          committed_at, "offset", preview, blocked, key_is_masked, waiting_on, {_SQLSTATE} AS sqlstate,
          {_CONSTRAINT} AS constraint_name, {literal(model.version)} AS model_version,
          {model.schema_version} AS schema_version FROM {relation} AS i
        ) r LEFT JOIN {into} q ON q.id = r.id""",
        given,
    )
    issues = db.execute(
        "SELECT DISTINCT issue FROM _hr_incoming WHERE status <> 'waiting' "
        "AND issue NOT IN (SELECT issue FROM headrace.quarantine)"
    )
    if into == QUARANTINE:
        count_opening(db, model.version, "_hr_incoming")
    db.execute(f"DELETE FROM {into} WHERE id IN (SELECT id FROM _hr_incoming)")
    db.execute(f"INSERT INTO {into} ({RECORD_COLUMNS}) SELECT {RECORD_COLUMNS} FROM _hr_incoming")
    return [str(row[0]) for row in issues]


def fingerprint(more: str = "NULL", record: str = "r") -> str:
    """Return the expression of a record's issue: all records with one cause have one. `more` tells others
    apart, unless it is null."""
    parts = ", ".join(f"{record}.{name}" for name in ("model", "stage", "reason", "columns", "message"))
    return f"'v1:' || left(md5(concat_ws('|', {parts}, {more})), 16)"
