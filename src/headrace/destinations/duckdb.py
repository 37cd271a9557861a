"""DuckDB as a destination.

The file is opened for each apply and closed again: a process that holds it, even read-only, holds
up apply. Tables carry no index and no declared constraint (models check); rows are changed by
`DELETE … USING` and `INSERT`, never MERGE or `INSERT OR REPLACE`.

An Arrow table reaches the engine as the Python variable `_hr_given` that a statement names, not by
`register`: a transaction keeps every view that it ever had until it ends, and with it the table behind
it, so that a slice of ten million rows would stay in memory whole.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from headrace.destinations.database import Database
from headrace.destinations.session import Session
from headrace.destinations.shapes import drifts
from headrace.destinations.tables import CREATE
from headrace.destinations.unique import Claimed
from headrace.errors import (
    DestinationBusy,
    DestinationError,
    DestinationUnavailable,
    HeadraceError,
    UserError,
    Verdict,
    verdict_of,
)
from headrace.keys import literal, quoted
from headrace.protocols import DestinationFinding, Scanned, Table
from headrace.turns import Gate

_READING = {
    duckdb.StatementType.SELECT,
    duckdb.StatementType.EXPLAIN,
    duckdb.StatementType.RELATION,
}
_OF_NAMES = (
    duckdb.BinderException,
    duckdb.CatalogException,
    duckdb.ParserException,
    duckdb.SyntaxException,
    duckdb.NotImplementedException,
)
_HOLDER = re.compile(r"Conflicting lock is held in (.*?)\.? ?(?:See also|$)", re.DOTALL)


MEMORY = 64 << 20
"""Bytes that the engine may take for an apply before it spills to disk."""

QUERY_MEMORY = 512 << 20
"""Bytes for a query of a user."""

_SCAN_ROWS = 10_000
"""Rows in memory at once of a result that is scanned."""

_REPLAYED = 4 << 20
"""Bytes of the write-ahead log that are left to whoever opens the file next, who replays them within some
20 ms; a checkpoint with each close would take most of the time of small slices in large tables, since it
writes anew what the file says of each of their parts."""

_VECTOR, _VECTOR_BYTES = 2048, 20 << 10
"""Of so many rows that lie together, a transaction that deletes one holds who deleted each: so many bytes."""

# Two threads of one process that open and close the same file at once get "unique file handle
# conflict": apply and queries take turns at it.
_opening = threading.Lock()


class DuckDBDestination(Database):
    """One DuckDB file."""

    fresh = "name a new file in [destination] path"
    main = "main"

    def __init__(self, path: Path, *, spill: Path | None = None, published: Path | None = None) -> None:
        """What does not fit into memory goes to the folder `spill`, by default beside the file; `published`
        is where a copy for readers is kept, if there is one."""
        super().__init__()
        self.path = path
        self.name = str(path)
        self.gate = Gate()
        """Passed by whoever has the file open in this process."""
        self._spill = spill
        self._published = published
        self._granted: dict[int, int] = {}
        """Bytes of memory that each open connection was promised."""
        self._left = self._signature()
        self._is_foreign = True  # or was changed, since this process looked at its tables

    @contextmanager
    def open(self, *, memory: int = 0) -> Iterator[Session]:
        """See `Database.open`; makes the file if need be."""
        with self.gate.passed(), self.connected(memory=memory) as db:
            yield _DuckDBSession(db, self._grant)

    @contextmanager
    def connected(self, *, read_only: bool = False, memory: int = 0) -> Iterator[duckdb.DuckDBPyConnection]:
        """Open the file for a moment; `memory` (bytes) is for work that needs more than an apply does.

        Raises DestinationBusy, naming the holder, while another process has it, and
        DestinationError when it cannot be opened at all.
        """
        try:
            with _opening:
                # While this process has it open, nobody else can change it.
                self._is_foreign |= not self._granted and self._signature() != self._left
                connection = duckdb.connect(str(self.path), read_only=read_only)
                self._granted[id(connection)] = 0
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
            if "different configuration" in str(error):  # one reads only, the other writes
                raise DestinationBusy(
                    f"{self.path} is open elsewhere in this process.", "It passes as that is closed."
                ) from error
            raise self._not_ours(str(error)) from error
        try:
            connection.execute("SET TimeZone = 'UTC'")
            connection.execute("SET enable_progress_bar = false")
            if not read_only:
                connection.execute("PRAGMA disable_checkpoint_on_shutdown")
            connection.execute("SET allocator_flush_threshold = '16MB'")
            connection.execute("SET allocator_bulk_deallocation_flush_threshold = '16MB'")
            # Before its memory is limited: what was replayed may have to go there, and then it cannot be set.
            if self._spill is not None and _spills_to(connection) != str(self._spill):
                connection.execute(f"SET temp_directory = {literal(str(self._spill))}")
            self._grant(connection, max(memory, MEMORY))
            yield connection
        finally:
            with _opening:
                self._granted.pop(id(connection), None)
                try:
                    with suppress(duckdb.Error, OSError):  # what is wrong is told where it does harm
                        if not read_only and not self._granted and self._leaves_much(connection):
                            connection.execute("PRAGMA enable_checkpoint_on_shutdown")
                finally:
                    connection.close()
                    self._left = self._signature()

    def _leaves_much(self, connection: duckdb.DuckDBPyConnection) -> bool:
        """Whether what no checkpoint has written had better be written now."""
        log = self.path.with_name(f"{self.path.name}.wal")
        return (log.exists() and log.stat().st_size > _REPLAYED) or _holds_much(connection)

    def _signature(self) -> list[tuple[int, int, int] | None]:
        """Return what differs once another process has changed the file."""
        found: list[tuple[int, int, int] | None] = []
        for path in (self.path, self.path.with_name(f"{self.path.name}.wal")):
            try:
                status = path.stat()
            except OSError:
                found.append(None)
            else:
                found.append((status.st_ino, status.st_mtime_ns, status.st_size))
        return found

    def tables_may_differ(self) -> bool:
        """See `Database.tables_may_differ`."""
        with _opening:
            self._is_foreign, was = False, self._is_foreign
        return was

    def _grant(self, connection: duckdb.DuckDBPyConnection, size: int) -> None:
        """Let a connection take `size` bytes. The engine has one limit for all connections of a file: the
        most that any of them was promised."""
        with _opening:
            self._granted[id(connection)] = max(size, self._granted.get(id(connection), 0))
            limit = f"SET memory_limit = '{max(self._granted.values())}B'"
            try:
                connection.execute(limit)
            except duckdb.OutOfMemoryException:  # a process that was killed has left more to replay
                connection.execute("CHECKPOINT")
                connection.execute(limit)

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
        refuse_writing(queries)
        try:
            with self.gate.passed(), self.connected(read_only=read_only, memory=QUERY_MEMORY) as db:
                db.execute("BEGIN TRANSACTION READ ONLY")
                return [db.sql(query).to_arrow_table() for query in queries]
        except duckdb.Error as error:
            raise _judged(self.path, error) from error

    @contextmanager
    def scan(self, queries: Sequence[str], *, read_only: bool = False) -> Iterator[Iterator[Scanned]]:
        """See `Destination.scan`. Results need not fit in memory."""
        refuse_writing(queries)
        with self.gate.passed(), self.connected(read_only=read_only, memory=QUERY_MEMORY) as db:
            db.execute("BEGIN TRANSACTION READ ONLY")
            yield (_scanned(self.path, db, query) for query in queries)

    def create(self, db: Session) -> None:
        """See `Database.create`; makes the file before."""
        db.execute(CREATE)

    def exists(self) -> bool:
        """See `Destination.exists`."""
        return self.path.exists()

    def inspect(self) -> Iterator[DestinationFinding]:
        """See `Destination.inspect`. Of a file that is not there nothing is said."""
        try:
            with self.open() as db:
                yield DestinationFinding("ok", f"{self.path} opens")
                yield from drifts(self, db)
        except DestinationBusy as error:
            yield DestinationFinding("warn", str(error), error.remedy)
        except DestinationError as error:
            yield DestinationFinding("fail", str(error), error.remedy)

    def folded(self, model: str) -> tuple[str, str]:
        """See `Destination.folded`: upper and lower case are one."""
        schema, table = self.place_of(model)
        return schema.casefold(), table.casefold()

    def misnamed(self, model: str) -> tuple[str, str] | None:
        """See `Destination.misnamed`."""
        schema = self.place_of(model)[0]
        files = {"path": (self.path, "warehouse"), "publish": (self._published, "published")}
        for key, (file, role) in files.items():
            if file is not None and schema.casefold() == file.stem.casefold():
                what = f"the destination's file has the name of its schema {schema}"
                name = f"{schema.casefold()}_{role}.duckdb"
                return (
                    f"{what}: DuckDB cannot tell them apart",
                    f'Name another: [destination] {key} = "{name}"',
                )
        return None

    def checkpoint(self) -> None:
        """Write into the file what its write-ahead log holds, so that it is whole by itself, unless another
        transaction of this process is writing."""
        if self.path.with_name(f"{self.path.name}.wal").exists():
            with self.connected() as db, suppress(duckdb.TransactionException):
                db.execute("CHECKPOINT")

    def close(self) -> None:
        """See `Destination.close`. Who has only read leaves the file as it is."""
        if self.commits:
            with suppress(DestinationError, duckdb.Error):
                self.checkpoint()

    def fault_of(self, error: Exception) -> str | None:
        """See `Database.fault_of`."""
        if not isinstance(error, duckdb.Error) or verdict_of(error) is Verdict.RETRY:
            return None
        # What it says of data quotes it, and a query may raise words of its own.
        is_of_names = isinstance(error, _OF_NAMES)
        return str(error).splitlines()[0] if is_of_names else type(error).__name__


class _DuckDBSession:
    """See `Session`."""

    row_id = "rowid"

    def __init__(
        self, db: duckdb.DuckDBPyConnection, grant: Callable[[duckdb.DuckDBPyConnection, int], None]
    ) -> None:
        self._db = db
        self._grant = grant
        self._keys: dict[str, int] = {}
        self._rooms: dict[str, int] = {}
        self.touched: dict[tuple[str, str], str] = {}
        self.changed: set[str] = set()
        self.moving: set[str] = set()
        self.counts_issues = False
        self.claimed: dict[str, Claimed] = {}

    def begin(self, source: str, *, steady: bool = False) -> None:
        del source, steady  # the file has one writer, and transactions see one state
        self._db.execute("BEGIN")

    def resolve_in(self, schema: str) -> None:
        pass  # they are of `main` anyway

    def commit(self) -> None:
        self._db.execute("COMMIT")

    def rollback(self) -> None:
        self._db.execute("ROLLBACK")

    def execute(
        self, statement: str, parameters: Sequence[Any] = (), given: pa.Table | None = None
    ) -> list[tuple[Any, ...]]:
        _hr_given = given
        return self._db.execute(statement, list(parameters)).fetchall()

    def change(self, statement: str, parameters: Sequence[Any] = (), given: pa.Table | None = None) -> int:
        return int(self.execute(statement, parameters, given)[0][0])

    def keep(self, name: str, query: str, given: pa.Table | None = None) -> None:
        self.execute(f"CREATE OR REPLACE TEMP TABLE {name} AS {query}", given=given)

    def append(self, target: str, types: Mapping[str, str], source: str, rows: pa.Table) -> None:
        del types
        if rows.nbytes > MEMORY // 2:  # one large value, say
            self._grant(self._db, MEMORY + sum(self._rooms.values()) + 8 * rows.nbytes)
        self.execute(
            f"INSERT INTO {target} BY NAME SELECT {literal(source)} AS _source, * FROM _hr_given", given=rows
        )

    def remove(self, target: str, source: str, keys: pa.Table, number: tuple[str, str] | None = None) -> None:
        self.make_room(target, keys.num_rows)
        cell, key = "_source_key", "key"
        if number is not None:  # numbers are read five times as fast; of a key that is none there is no row
            cell, key = quoted(number[0]), f"TRY_CAST(key AS {number[1]})"
        self.execute(
            f"DELETE FROM {target} WHERE _source = $1 AND {cell} IN (SELECT {key} FROM _hr_given)",
            [source],
            keys,
        )

    def make_room(self, target: str, keys: int) -> None:
        keys = self._keys[target] = keys + self._keys.get(target, 0)
        if keys * _VECTOR_BYTES <= MEMORY // 4:
            return
        ((rows,),) = self.execute(f"SELECT count(*) FROM {target}")
        self._rooms[target] = min(keys, rows // _VECTOR + 1) * _VECTOR_BYTES
        self._grant(self._db, MEMORY + sum(self._rooms.values()))

    def columns(self, schema: str, table: str, *, hidden: bool = False) -> dict[str, str]:
        return dict(
            self.execute(
                "SELECT column_name, data_type FROM information_schema.columns WHERE table_schema = $1 "
                "AND table_name = $2 AND (column_name NOT IN ('_source', '_source_key') OR $3) "
                "ORDER BY ordinal_position",
                [schema, table, hidden],
            )
        )

    def types(self, table: Table) -> dict[str, str]:
        return table.types()

    def same_key(self, left: str, right: str) -> str:
        return f"{left} = {right}"

    def json_text(self, document: str, *path: str | int) -> str:
        steps = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
        return f"json_extract_string({document}, '${steps}')"

    def make_findable(self, target: str, columns: Sequence[str]) -> None:
        pass  # as little as by their source keys

    def fingerprints(self, columns: Sequence[str]) -> Sequence[str]:
        # Two hashes: one of 64 bits may meet by chance, both do not.
        return [f"hash({', '.join(cells)})::HUGEINT" for cells in (columns, [*columns[::-1], "'again'"])]

    def retype(self, target: str, column: str, type_: str, *, lenient: bool) -> None:
        cast = "TRY_CAST" if lenient else "CAST"
        alter = f"ALTER TABLE {target} ALTER COLUMN {column} SET DATA TYPE {type_}"
        self.execute(f"{alter} USING {cast}({column} AS {type_})")

    def prepare_table(self, target: str, number: str | None) -> None:
        pass  # no index: a scan of one column costs less than an index that every change moves


def refuse_writing(queries: Sequence[str]) -> None:
    """Raise UserError for what is no query, or no SQL."""
    for query in queries:
        try:
            kinds = {statement.type for statement in duckdb.extract_statements(query)}
        except duckdb.Error as error:
            raise UserError(str(error).strip()) from error
        if not kinds <= _READING:
            raise UserError("Only queries are answered: the destination is written by the pipeline alone.")


def _judged(path: Path, error: duckdb.Error) -> HeadraceError:
    """Return what an error of a query that reads means: what passes by itself, or the query's own fault."""
    words = str(error).strip()
    writes = isinstance(error, duckdb.TransactionException)  # in a transaction that only reads
    if verdict_of(error) is Verdict.RETRY and not writes:
        return DestinationUnavailable(f"{path}: {words}", "Try again; it may ask for too much at once.")
    return UserError(words)


def _scanned(path: Path, db: duckdb.DuckDBPyConnection, query: str) -> Scanned:
    try:
        reader = db.sql(query).to_arrow_reader(_SCAN_ROWS)
    except duckdb.Error as error:
        raise _judged(path, error) from error
    return reader.schema, _batches(reader)


def _batches(reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    try:
        yield from reader
    except (duckdb.Error, pa.ArrowException, OSError) as error:  # Arrow passes an engine's error on as these
        # Its message may quote a cell.
        raise DestinationError("A query of the destination failed on the way.", "Try again.") from error


def _holds_much(db: duckdb.DuckDBPyConnection) -> bool:
    """Whether changes that no checkpoint has written hold so much memory that whoever opens the file next had
    better find them in it: what can be let go of, goes."""
    with suppress(duckdb.TransactionException):  # there is none, but where something has failed
        db.rollback()
    try:
        db.execute(f"SET memory_limit = '{MEMORY // 2}B'")
    except duckdb.OutOfMemoryException:
        return True
    return False


def _spills_to(db: duckdb.DuckDBPyConnection) -> str:
    """Return the folder of the engine, which other connections share: once it is used it cannot be set."""
    ((folder,),) = db.execute("SELECT current_setting('temp_directory')").fetchall()
    return str(folder)
