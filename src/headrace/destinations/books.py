"""What a transaction of the destination says of itself: quarantine, ledger, and where models stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import duckdb
import pyarrow as pa

from headrace.destinations.tables import LEDGER_COUNTS, OPEN, RECORD_COLUMNS
from headrace.errors import DestinationError
from headrace.keys import literal
from headrace.protocols import Counts, Model, Part, Slice


@dataclass(slots=True)
class _Account:
    """One model in a slice: how it stood before, and what all of its parts so far amount to."""

    model: Model
    state: str
    known: bool
    counts: Counts
    healed: int
    open_records: int


class Books:
    """The accounts of one slice, kept while its parts are applied and written at the end."""

    def __init__(self, db: duckdb.DuckDBPyConnection, work: Slice) -> None:
        self._db = db
        self._work = work
        self._accounts: dict[str, _Account] = {}
        rows = db.execute(
            'SELECT model, "offset", version, state, reason, open_records FROM headrace.models '
            "WHERE source = ?",
            [work.source],
        )
        self._stands = {str(row[0]): row[1:] for row in rows.fetchall()}

    def admit(self, part: Part) -> None:
        """Open a model's account. Raises DestinationError unless it stands where the slice begins."""
        name = part.model.name
        if name in self._accounts:
            return
        offset, version, state, reason, opened = self._stands.get(name, (0, "", "", "", 0))
        if offset != self._work.after.offset:
            raise DestinationError(f"Model {name} does not stand at {self._work.after.offset}.")
        known = (version, state, reason) == (part.model.version, _state(part), "")
        self._accounts[name] = _Account(part.model, _state(part), known, Counts(), 0, opened)

    def take(self, part: Part) -> list[str]:
        """Enter a part whose rows were applied: heal and write its records; return new issues."""
        account = self._accounts[part.model.name]
        prepared = part.prepared
        account.counts += prepared.counts
        if account.open_records and (prepared.reset or len(prepared.removed)):
            healed = self._heal(part)
            account.healed += healed
            account.open_records -= healed
        if not prepared.records.num_rows:
            return []
        account.open_records += int(prepared.records.num_rows)
        return record(self._db, part.model, prepared.records)

    def close(self) -> None:
        """Write the ledger and where the models stand now."""
        self._write_ledger()
        self._write_models()

    def _heal(self, part: Part) -> int:
        """Mark the open records that a later good change has overtaken; returns how many."""
        _hr_settled = pa.table({"key": part.prepared.removed})
        where = "" if part.prepared.reset else "AND key IN (SELECT key FROM _hr_settled)"
        done = self._db.execute(
            f"UPDATE headrace.quarantine SET status = 'superseded', "
            f"superseded_by = {self._work.position.commit}, resolved_at = now() "
            f"WHERE model = {literal(part.model.name)} AND {OPEN} {where}"
        )
        return int(done.fetchall()[0][0])

    def _write_ledger(self) -> None:
        work, rows = self._work, []
        span = (work.after.offset, work.through.offset)
        for name, account in self._accounts.items():
            version = account.model.version
            if account.counts.read:
                rows.append((work.source, name, "apply", *span, *numbers(account.counts), version))
            if account.healed:
                moved = Counts(superseded=account.healed, quarantined=-account.healed)
                rows.append((work.source, name, "superseded", *span, *numbers(moved), version))
        insert(self._db, "ledger", rows)

    def _write_models(self) -> None:
        """Move every model: those of which only the place changes in one statement."""
        work = self._work
        place = (work.through.offset, work.position.epoch, work.position.commit, work.committed_at)
        moved = [name for name, account in self._accounts.items() if self._only_moves(name, account)]
        if moved:
            self._db.execute(
                'UPDATE headrace.models SET "offset" = ?, epoch = ?, commit = ?, committed_at = ?, '
                f"updated_at = now() WHERE model IN ({', '.join(map(literal, moved))})",
                list(place),
            )
        others = {name: self._accounts[name] for name in self._accounts.keys() - set(moved)}
        if others:
            names = ", ".join(map(literal, others))
            self._db.execute(f"DELETE FROM headrace.models WHERE model IN ({names})")
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


def _state(part: Part) -> str:
    return "in_sync" if part.in_sync else "joining"


def numbers(counts: Counts) -> list[int]:
    """Return counts in the order of the ledger's columns."""
    return [getattr(counts, name) for name in LEDGER_COUNTS]


def insert(db: duckdb.DuckDBPyConnection, table: str, rows: Sequence[Sequence[object]]) -> None:
    """Insert a few rows into one of Headrace's tables, whose last column is the time now."""
    if rows:
        marks = ", ".join(f"({', '.join('?' * len(rows[0]))}, now())" for _ in rows)
        db.execute(f"INSERT INTO headrace.{table} VALUES {marks}", [cell for row in rows for cell in row])


def record(db: duckdb.DuckDBPyConnection, model: Model, records: pa.Table) -> list[str]:
    """Write records; return the ids of issues that no record had before.

    A record's id comes from its model and position, so a change has one record however often it fails:
    writing it again keeps when it was first seen and counts one more attempt.
    """
    source, name, table = literal(model.source), literal(model.name), literal(str(model.table))
    _hr_records = records
    _hr_incoming = db.sql(
        f"""SELECT r.*, coalesce(q.attempts, 0) + 1 AS attempts,
        coalesce(q.first_seen, now()) AS first_seen, now() AS last_attempt
        FROM (
          SELECT md5(concat_ws('|', {source}, {name}, epoch, commit, ordinal)) AS id,
          'v1:' || left(md5(concat_ws('|', {name}, stage, reason, columns, message)), 16) AS issue,
          {source} AS source, {name} AS model, {table} AS table_name,
          stage, reason, columns, message, op, is_partial, key, epoch, commit, ordinal, txid,
          make_timestamptz(committed_at) AS committed_at, "offset", preview,
          {literal(model.version)} AS model_version, 'quarantined' AS status FROM _hr_records
        ) r LEFT JOIN headrace.quarantine q ON q.id = r.id::UUID"""
    ).to_arrow_table()
    issues = db.execute(
        "SELECT DISTINCT issue FROM _hr_incoming WHERE issue NOT IN (SELECT issue FROM headrace.quarantine)"
    ).fetchall()
    db.execute("DELETE FROM headrace.quarantine WHERE id IN (SELECT id::UUID FROM _hr_incoming)")
    db.execute(
        f"INSERT INTO headrace.quarantine ({RECORD_COLUMNS}) "
        f"SELECT {RECORD_COLUMNS} FROM (SELECT * REPLACE (id::UUID AS id) FROM _hr_incoming)"
    )
    return [str(row[0]) for row in issues]
