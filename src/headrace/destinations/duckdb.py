"""DuckDB as a destination.

The file is opened for each apply and closed again: a process that holds it, even read-only, holds
up apply. Tables carry no index and no declared constraint (models check); rows are changed by
`DELETE … USING` and `INSERT`, never MERGE or `INSERT OR REPLACE`.

Arrow tables reach the engine as Python variables that a statement names (`_hr_…`), not by `register`:
a transaction keeps every view that it ever had until it ends, and with it the table behind it, so
that a slice of ten million rows would stay in memory whole.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa

from headrace.change import Mark
from headrace.destinations.books import Books, insert, move_progress, numbers, read_progress, record
from headrace.destinations.tables import CREATE, OPEN, Table, place_of, target_of
from headrace.errors import (
    DestinationBusy,
    DestinationError,
    ForeignDestination,
    ModelBroken,
    UserError,
)
from headrace.failpoints import failpoint
from headrace.keys import literal, quoted
from headrace.protocols import Counts, Model, ModelState, Prepared, Slice

_READING = {
    duckdb.StatementType.SELECT,
    duckdb.StatementType.EXPLAIN,
    duckdb.StatementType.RELATION,
}
_HOLDER = re.compile(r"Conflicting lock is held in (.*?)\.? ?(?:See also|$)", re.DOTALL)


MEMORY = 64 << 20
"""Bytes that the engine may take for an apply before it spills to disk."""

QUERY_MEMORY = 512 << 20
"""Bytes for a query of a user."""

_SCAN_ROWS = 10_000
"""Rows in memory at once of a result that is scanned."""

Scanned = tuple[pa.Schema, Iterator[pa.RecordBatch]]
"""A result that is read batch by batch."""

# Two threads of one process that open and close the same file at once get "unique file handle
# conflict": apply and queries take turns at it.
_opening = threading.Lock()


class DuckDBDestination:
    """One DuckDB file."""

    def __init__(self, path: Path, *, spill: Path | None = None) -> None:
        """What does not fit into memory goes to the folder `spill`, by default beside the file."""
        self.path = path
        self._spill = spill
        self._shaped: dict[str, dict[str, str]] = {}

    @contextmanager
    def open(self, *, read_only: bool = False, memory: int = 0) -> Iterator[duckdb.DuckDBPyConnection]:
        """Open the file for a moment; `memory` (bytes) is for work that needs more than an apply does.

        Raises DestinationBusy, naming the holder, while another process has it, and
        DestinationError when it cannot be opened at all.
        """
        try:
            with _opening:
                connection = duckdb.connect(str(self.path), read_only=read_only)
        except duckdb.IOException as error:
            text = str(error)
            if "could not set lock" in text.lower():
                holder = _HOLDER.search(text)
                who = holder[1].strip() if holder else "another process"
                raise DestinationBusy(
                    f"{self.path} is held by {who}.",
                    "Close it there; the pipeline waits and goes on by itself.",
                ) from error
            if "not a valid DuckDB" in text:
                raise self._not_ours(text) from error
            raise DestinationError(
                f"{self.path} cannot be opened: {text.splitlines()[0]}",
                "Check that the folder exists and can be written, and that there is room on the disk.",
            ) from error
        except duckdb.Error as error:
            raise self._not_ours(str(error)) from error
        try:
            connection.execute("SET TimeZone = 'UTC'")
            connection.execute("SET enable_progress_bar = false")
            connection.execute("SET allocator_flush_threshold = '16MB'")
            connection.execute("SET allocator_bulk_deallocation_flush_threshold = '16MB'")
            connection.execute(f"SET memory_limit = '{max(memory, MEMORY)}B'")
            if self._spill is not None and _spills_to(connection) != str(self._spill):
                connection.execute(f"SET temp_directory = {literal(str(self._spill))}")
            yield connection
        except BaseException:
            self._shaped.clear()  # what was made in the transaction is not there
            raise
        finally:
            with _opening:
                connection.close()

    def _not_ours(self, text: str) -> DestinationError:
        return DestinationError(
            f"{self.path} is no DuckDB file that this version can read: {text.splitlines()[0]}",
            "Move it away, or name another file in [destination] path.",
        )

    def read(self, queries: Sequence[str], *, read_only: bool = False) -> list[pa.Table]:
        """Run queries that only read, in one transaction.

        `read_only` opens the file so (where no apply of this process may have it open). Raises
        UserError for anything but a query, and for what the engine says of one.
        """
        _refuse_writing(queries)
        try:
            with self.open(read_only=read_only, memory=QUERY_MEMORY) as db:
                db.execute("BEGIN TRANSACTION READ ONLY")
                return [db.sql(query).to_arrow_table() for query in queries]
        except duckdb.Error as error:
            raise UserError(str(error).strip()) from error

    @contextmanager
    def scan(self, queries: Sequence[str], *, read_only: bool = False) -> Iterator[Iterator[Scanned]]:
        """Run queries that only read, in one transaction, and read their results batch by batch: they need
        not fit in memory. Each result is read to its end before the next is asked for.

        Raises UserError for anything but a query and for one that does not run; the batches raise
        DestinationError for one that fails on the way.
        """
        _refuse_writing(queries)
        with self.open(read_only=read_only, memory=QUERY_MEMORY) as db:
            db.execute("BEGIN TRANSACTION READ ONLY")
            yield (_scanned(db, query) for query in queries)

    def progress(self, source: str) -> Mark | None:
        """See `Destination.progress`. Makes the file and Headrace's own tables in it if need be."""
        with self.open() as db:
            db.execute(CREATE)
            return read_progress(db, source)

    def models(self, source: str) -> dict[str, ModelState]:
        """See `Destination.models`."""
        with self.open() as db:
            db.execute(CREATE)
            rows = db.execute(
                'SELECT model, source, version, state, reason, "offset", open_records '
                "FROM headrace.models WHERE source = ?",
                [source],
            ).fetchall()
        return {str(row[0]): ModelState(*row) for row in rows}

    def apply(self, work: Slice) -> Sequence[str]:
        """See `Destination.apply`. In this order, in one transaction:

        1. progress is compared with what the slice says it starts from;
        2. part by part: the model's table is made or widened, its rows are changed, its open records
           that a later good change has healed become superseded, its new records are written;
        3. the ledger has one row per model, the models' and the source's progress move; commit.
        """
        with self.open() as db:
            if not self._shaped:
                db.execute(CREATE)
            db.execute("BEGIN")
            self._check(db, work)
            books = Books(db, work)
            new_issues: list[str] = []
            for part in work.parts:
                self.make_table(db, part.model)
                books.admit(part)
                self.change_rows(db, work.source, part.model, part.prepared)
                new_issues += books.take(part)
                failpoint("destination.apply.part")
                del part  # before the next one is made
            books.close()
            move_progress(db, work.source, work.through, work.position, work.committed_at)
            failpoint("destination.apply.commit")
            db.execute("COMMIT")
        failpoint("destination.apply.committed")
        return new_issues

    def redrive(self, model: Model, prepared: Prepared, *, dry_run: bool = False) -> dict[str, int]:
        """Apply what the current model makes of the whole histories of some keys (`prepared.removed`),
        in one transaction; with `dry_run` only find out what that would do.

        Open records of these keys that are no longer bad become resolved; those still bad count one
        more attempt; changes that the current model refuses and an earlier one took become records.
        Returns how many records are `resolved` and how many are `still_quarantined`.
        """
        name = literal(model.name)
        mine = f"q.model = {name} AND q.{OPEN} AND q.key IN (SELECT r.key FROM _hr_redriven r)"
        same = "b.epoch = q.epoch AND b.commit = q.commit AND b.ordinal = q.ordinal"
        bad = int(prepared.records.num_rows)
        with self.open() as db:
            db.execute("BEGIN")
            db.register("_hr_redriven", pa.table({"key": prepared.removed}))
            db.register("_hr_still_bad", prepared.records)
            before = _number(db, f"SELECT count(*) FROM headrace.quarantine q WHERE {mine}")
            self.make_table(db, model)
            self.change_rows(db, model.source, model, prepared)
            resolved = _number(
                db,
                f"UPDATE headrace.quarantine q SET status = 'resolved', resolution = 'redriven', "
                f"resolved_at = now(), attempts = attempts + 1, last_attempt = now(), "
                f"model_version = {literal(model.version)} WHERE {mine} "
                f"AND NOT EXISTS (SELECT 1 FROM _hr_still_bad b WHERE {same})",
            )
            record(db, model, prepared.records)
            if moved := before - bad:
                counts = numbers(Counts(applied=moved, quarantined=-moved))
                insert(db, "ledger", [(model.source, model.name, "redrive", 0, 0, *counts, model.version)])
            db.execute(
                f"UPDATE headrace.models SET open_records = (SELECT count(*) FROM headrace.quarantine "
                f"WHERE model = {name} AND {OPEN}) WHERE model = {name}"
            )
            failpoint("destination.redrive.commit")
            db.execute("ROLLBACK" if dry_run else "COMMIT")
        if dry_run:
            self._shaped.clear()
        return {"resolved": resolved, "still_quarantined": bad}

    def suspend(self, model: str, source: str, version: str, reason: str) -> bool:
        """Mark a version of a model suspended with its reason; True if it was not already so."""
        with self.open() as db:
            db.execute(CREATE)
            known = db.execute(
                "SELECT state, version, reason FROM headrace.models WHERE model = ?", [model]
            ).fetchall()
            if known == [("suspended", version, reason)]:
                return False
            if known:
                db.execute(
                    "UPDATE headrace.models SET state = 'suspended', version = ?, reason = ?, "
                    "updated_at = now() WHERE model = ?",
                    [version, reason, model],
                )
            else:
                db.execute(
                    "INSERT INTO headrace.models VALUES (?, ?, ?, 'suspended', ?, 0, 0, 0, 0, 0, now())",
                    [model, source, version, reason],
                )
            return True

    def retire(self, model: str) -> None:
        """Mark a model that the project no longer has; its table stays."""
        with self.open() as db:
            db.execute(
                "UPDATE headrace.models SET state = 'retired', updated_at = now() WHERE model = ?", [model]
            )

    def forget_if_reshaped(self, model: Model) -> bool:
        """Drop a model's table, and its place, where its columns are no longer the model's.

        Its open records become superseded and its ledger rows void: it is built again from staging.
        """
        schema, table = place_of(model.name)
        self._shaped.clear()
        with self.open() as db:
            known = _columns(db, schema, table)
            if not known or known == model.types():
                return False
            db.execute("BEGIN")
            db.execute(f"DROP TABLE {quoted(schema)}.{quoted(table)}")
            db.execute(
                f"UPDATE headrace.quarantine SET status = 'superseded', resolution = 'rebuilt', "
                f"resolved_at = now() WHERE model = ? AND {OPEN}",
                [model.name],
            )
            db.execute("UPDATE headrace.ledger SET kind = 'void' WHERE model = ?", [model.name])
            db.execute("DELETE FROM headrace.models WHERE model = ?", [model.name])
            db.execute("DELETE FROM headrace.joins WHERE model = ?", [model.name])
            db.execute("COMMIT")
        return True

    def issue(self, issue: str) -> tuple[str, str, str, str, int]:
        """Return model, reason, columns, message and number of records of an issue."""
        with self.open() as db:
            rows: list[tuple[str, str, str, str, int]] = db.execute(
                "SELECT any_value(model), any_value(reason), any_value(columns), any_value(message), "
                "count(*) FROM headrace.quarantine WHERE issue = ?",
                [issue],
            ).fetchall()
        return rows[0]

    def _check(self, db: duckdb.DuckDBPyConnection, work: Slice) -> None:
        progress = read_progress(db, work.source)
        if progress is None and work.after.offset:
            raise ForeignDestination(f"{self.path} has no progress for source {work.source}.")
        if progress is not None and progress.log_id != work.after.log_id:
            raise foreign(self.path, work.source)
        if progress is not None and work.through.offset > progress.offset and progress != work.after:
            raise ForeignDestination(
                f"{self.path} stands at offset {progress.offset}, this pipeline at {work.after.offset}: "
                "another pipeline writes to it.",
                "Run one pipeline only.",
            )

    def make_table(self, db: duckdb.DuckDBPyConnection, model: Table) -> None:
        """Make or widen a model's table; raises ModelBroken when it cannot take the columns."""
        try:
            if self._shaped.get(model.name) != model.types():
                _shape(db, model)
                self._shaped[model.name] = model.types()
        except duckdb.Error as error:
            raise ModelBroken(
                model.name,
                f"Table {model.name} cannot take the model's columns: {str(error).splitlines()[0]}",
                "Drop or mend the table.",
            ) from error

    def drop_table(self, db: duckdb.DuckDBPyConnection, model: Table) -> None:
        """Drop a model's table, if there is one."""
        self._shaped.pop(model.name, None)
        db.execute(f"DROP TABLE IF EXISTS {target_of(model.name)}")

    def change_rows(
        self, db: duckdb.DuckDBPyConnection, source: str, model: Table, prepared: Prepared
    ) -> None:
        """Write an outcome to a model's table."""
        target = target_of(model.name)
        if prepared.reset:
            db.execute(f"DELETE FROM {target} WHERE _source = ?", [source])
        if prepared.rows.nbytes > MEMORY // 2:  # one large value, say
            db.execute(f"SET memory_limit = '{MEMORY + 8 * prepared.rows.nbytes}B'")
        if len(prepared.removed):
            _hr_removed = pa.table({"key": prepared.removed})
            db.execute(
                f"DELETE FROM {target} USING _hr_removed r WHERE _source = ? AND _source_key = r.key",
                [source],
            )
        if prepared.rows.num_rows:
            _hr_arrived = prepared.rows
            db.execute(
                f"INSERT INTO {target} BY NAME SELECT {literal(source)} AS _source, * FROM _hr_arrived"
            )


def _refuse_writing(queries: Sequence[str]) -> None:
    for query in queries:
        try:
            kinds = {statement.type for statement in duckdb.extract_statements(query)}
        except duckdb.Error as error:
            raise UserError(str(error).strip()) from error
        if not kinds <= _READING:
            raise UserError("Only queries are answered: the destination is written by the pipeline alone.")


def _scanned(db: duckdb.DuckDBPyConnection, query: str) -> Scanned:
    try:
        reader = db.sql(query).to_arrow_reader(_SCAN_ROWS)
    except duckdb.Error as error:
        raise UserError(str(error).strip()) from error
    return reader.schema, _batches(reader)


def _batches(reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    try:
        yield from reader
    except (duckdb.Error, pa.ArrowException, OSError) as error:  # Arrow passes an engine's error on as these
        # Its message may quote a cell.
        raise DestinationError("A query of the destination failed on the way.", "Try again.") from error


def _spills_to(db: duckdb.DuckDBPyConnection) -> str:
    """Return the folder of the engine, which other connections share: once it is used it cannot be set."""
    ((folder,),) = db.execute("SELECT current_setting('temp_directory')").fetchall()
    return str(folder)


def foreign(path: Path, source: str) -> ForeignDestination:
    """Build the refusal of a destination whose progress is another log's."""
    return ForeignDestination(
        f"{path} was filled from another log than the one in this state folder (source {source}): the "
        "state folder was deleted, restored or copied.",
        "Restore the state folder that belongs to it, or name a new file in [destination] path and "
        "let it be filled again.",
    )


def _columns(db: duckdb.DuckDBPyConnection, schema: str, table: str) -> dict[str, str]:
    """Return a table's columns with their types, without hidden ones; empty if there is none."""
    rows = db.execute(
        "SELECT column_name, data_type FROM information_schema.columns WHERE table_schema = ? "
        "AND table_name = ? AND column_name NOT IN ('_source', '_source_key') ORDER BY ordinal_position",
        [schema, table],
    )
    return dict(rows.fetchall())


def _shape(db: duckdb.DuckDBPyConnection, model: Table) -> None:
    """Make the model's table, or add what it lacks; columns that the model lost stay, null from now."""
    schema, table = place_of(model.name)
    target = target_of(model.name)
    known = _columns(db, schema, table)
    wanted = model.types()
    if not known:
        db.execute(f"CREATE SCHEMA IF NOT EXISTS {quoted(schema)}")
        columns = ", ".join(f"{quoted(name)} {type_}" for name, type_ in wanted.items())
        db.execute(f"CREATE TABLE {target} ({columns}, _source VARCHAR, _source_key VARCHAR)")
    for name, type_ in wanted.items() if known else ():
        if name not in known:
            db.execute(f"ALTER TABLE {target} ADD COLUMN {quoted(name)} {type_}")
        elif known[name] != type_:
            db.execute(f"ALTER TABLE {target} ALTER COLUMN {quoted(name)} SET DATA TYPE {type_}")


def _number(db: duckdb.DuckDBPyConnection, statement: str) -> int:
    """Run a change and return how many rows it changed."""
    return int(db.execute(statement).fetchall()[0][0])
