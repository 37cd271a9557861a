"""Postgres, version 14 or later, as a destination.

Rows come by COPY, go by DELETE … USING over an index on the source key; all of a slice is one transaction
with its progress. An advisory lock per source orders these transactions, so that what a lost connection
left running is over before its progress is read: a commit whose answer never came is either seen or will
never be.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import psycopg
import pyarrow as pa
from psycopg import conninfo, pq

from headrace.destinations.database import Database
from headrace.destinations.postgres_session import (
    LONGEST_NAME,
    Connection,
    PostgresSession,
    run,
    words_of,
)
from headrace.destinations.postgres_values import from_csv, limit
from headrace.destinations.session import Session
from headrace.destinations.shapes import drifts
from headrace.destinations.tables import CREATE, OPEN
from headrace.errors import (
    RETRY_SQLSTATES,
    DestinationError,
    DestinationUnavailable,
    HeadraceError,
    ModelBroken,
    UserError,
)
from headrace.keys import quoted
from headrace.protocols import DestinationFinding, Table
from headrace.secret import Secret, without_passwords

_PINNED = {
    "TimeZone": "UTC",
    "DateStyle": "ISO,YMD",
    "IntervalStyle": "postgres",
    "extra_float_digits": "1",
    "bytea_output": "hex",
    "standard_conforming_strings": "on",
    "search_path": "pg_catalog",
    "idle_in_transaction_session_timeout": "0",  # a slice is prepared while its transaction is open
    "default_transaction_isolation": "read\\ committed",
    "application_name": "headrace",
}
_CONNECT_TIMEOUT = "10"
_IDLE = 3
"""Connections that are kept for the next use."""

_OLDEST = 140_000
_OF_A_TABLE = ("0A", "22", "23", "2B", "42", "54", "P0")
"""Classes of what is wrong with a table or with its rows."""

_SHOWN = re.compile(r"\s*(EXPLAIN|SHOW)\b", re.IGNORECASE)
"""What has rows and is no query."""

_INDEXES = f"""
CREATE UNIQUE INDEX ON headrace.progress (source);
CREATE UNIQUE INDEX ON headrace.models (model);
CREATE UNIQUE INDEX ON headrace.joins (model);
CREATE UNIQUE INDEX ON headrace.shapes (model);
CREATE UNIQUE INDEX ON headrace.changes (name);
CREATE UNIQUE INDEX ON headrace.marts (mart);
CREATE UNIQUE INDEX ON headrace.quarantine (id);
CREATE INDEX ON headrace.quarantine USING hash (key) WHERE {OPEN};
CREATE INDEX ON headrace.quarantine (issue);
CREATE UNIQUE INDEX ON headrace.joining (id);
CREATE INDEX ON headrace.ledger (model);
"""


class PostgresDestination(Database):
    """One database of a Postgres server."""

    fresh = "name another database in [destination] url"

    def __init__(
        self,
        url: Secret,
        *,
        schema: str = "public",
        lock_timeout: float = 30.0,
        statement_timeout: float = 3600.0,
    ) -> None:
        """Models without a schema in their name are tables of `schema`. Statements wait for locks for
        `lock_timeout` seconds, and take `statement_timeout` at most; 0: no limit."""
        super().__init__()
        self.name = url.redacted()
        self.main = schema
        self._url = url
        self._timeouts = {
            "lock_timeout": f"{int(lock_timeout * 1000)}",
            "statement_timeout": f"{int(statement_timeout * 1000)}",
        }
        self._idle: list[Connection] = []
        self._turn = threading.Lock()
        weakref.finalize(self, _close_all, self._idle)

    # -- connections

    @contextmanager
    def open(self, *, memory: int = 0) -> Iterator[Session]:
        """See `Database.open`."""
        del memory  # the server's own settings hold
        db = self._take()
        try:
            yield PostgresSession(db, self.name)
        except psycopg.Error as error:
            raise self._judged(error) from error
        finally:
            self._give_back(db)

    def _take(self) -> Connection:
        while True:
            with self._turn:
                db = self._idle.pop() if self._idle else None
            if db is None:
                return self._connect()
            try:
                run(db, "SELECT 1")  # it may have died meanwhile
            except psycopg.Error:
                db.close()
            else:
                return db

    def _give_back(self, db: Connection) -> None:
        with self._turn:
            if db.info.transaction_status == pq.TransactionStatus.IDLE and len(self._idle) < _IDLE:
                self._idle.append(db)
                return
        db.close()

    def close(self) -> None:
        """See `Destination.close`."""
        with self._turn:
            _close_all(self._idle)

    def _connect(self) -> Connection:
        url = self._url.reveal()
        try:
            given = conninfo.conninfo_to_dict(url)
            options = " ".join(f"-c {name}={value}" for name, value in (_PINNED | self._timeouts).items())
            settings: dict[str, Any] = {
                "connect_timeout": _CONNECT_TIMEOUT,
                "keepalives_idle": "15",
                "keepalives_interval": "5",
                "keepalives_count": "3",
                "tcp_user_timeout": "30000",
                **given,
                "client_encoding": "UTF8",
                "options": f"{given.get('options', '')} {options}".strip(),
            }
            return psycopg.connect(
                conninfo.make_conninfo("", **settings),
                autocommit=True,
                prepare_threshold=None,
                cursor_factory=psycopg.RawCursor,
            )
        except psycopg.Error as error:
            raise self._refusal(error) from error

    def _refusal(self, error: psycopg.Error) -> DestinationError:
        """Say what a failed connection means."""
        lines = without_passwords(str(error)).strip().splitlines()
        words = lines[-1] if lines else type(error).__name__
        if "authentication" in words or "no password supplied" in words:
            return DestinationError(
                f"{self.name} refuses the login: {words}",
                "Check user and password in [destination] url, and the server's pg_hba.conf.",
            )
        if re.search(r'(database|role) ".*" does not exist|permission denied for database', words):
            return DestinationError(f"{self.name}: {words}", "Check [destination] url.")
        return DestinationUnavailable(
            f"{self.name} cannot be reached: {words}",
            "Check that the server runs and that [destination] url is right; Headrace keeps trying.",
        )

    def _judged(self, error: psycopg.Error) -> DestinationError:
        """Say what a failed statement means, where it is not about a model's table."""
        state = error.sqlstate or ""
        if not state and isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
            words = without_passwords(str(error)).strip().splitlines()[0]
            return DestinationUnavailable(f"{self.name} broke off: {words}", "Headrace keeps trying.")
        if state.startswith(RETRY_SQLSTATES):
            return DestinationUnavailable(f"{self.name}: {words_of(error)}.", "Headrace keeps trying.")
        remedy = "Give the role the rights that docs/destinations.md lists." if state == "42501" else ""
        return DestinationError(f"{self.name}: {words_of(error)}.", remedy)

    def fault_of(self, error: Exception) -> str | None:
        """See `Database.fault_of`."""
        if not isinstance(error, psycopg.Error):
            return None
        is_of_a_table = (error.sqlstate or "")[:2] in _OF_A_TABLE
        is_nul = isinstance(error, psycopg.DataError) and not error.sqlstate
        return words_of(error) if is_of_a_table or is_nul else None

    # -- tables

    def create(self, db: Session) -> None:
        """See `Database.create`."""
        if _is_set_up(db):
            return
        session = cast("PostgresSession", db)
        session.execute("BEGIN")
        session.lock("")
        if not _is_set_up(db):
            for statement in CREATE.split(";") + _INDEXES.split(";"):
                if statement.strip():
                    self._create_one(db, statement)
        session.execute("COMMIT")

    def _create_one(self, db: Session, statement: str) -> None:
        schema = re.match(r"\s*CREATE SCHEMA IF NOT EXISTS (\w+)", statement)
        if schema:
            self.make_schema(db, schema[1])
        else:
            db.execute(statement)

    def make_schema(self, db: Session, schema: str) -> None:
        """See `Database.make_schema`. One that is there takes no right to make schemas."""
        if not db.execute("SELECT 1 FROM pg_namespace WHERE nspname = $1", [schema]):
            db.execute(f"CREATE SCHEMA IF NOT EXISTS {quoted(schema)}")

    def _shape(self, db: Session, model: Table) -> None:
        if fault := self.misnamed(model.name):
            raise ModelBroken(model.name, f"Model {model.name}: {fault[0]}.", fault[1])
        super()._shape(db, model)
        cascading = db.execute(
            "SELECT conname, conrelid::regclass::text FROM pg_constraint WHERE contype = 'f' "
            "AND confrelid = $1::text::regclass AND confdeltype IN ('c', 'n', 'd')",
            [self.table_of(model.name)],
        )
        # A row that changes is deleted and comes again.
        for constraint, table in cascading:
            raise ModelBroken(
                model.name,
                f"Table {model.name} is referred to by {table} with ON DELETE CASCADE or SET "
                f"(constraint {constraint}): applying a change would change rows there.",
                "Make it ON DELETE NO ACTION DEFERRABLE.",
            )

    def referred_by(self, schema: str, table: str, constraint: str) -> tuple[str, str] | None:
        """See `Database.referred_by`."""
        with self.open() as db:
            found = db.execute(
                "SELECT n.nspname, c.relname FROM pg_constraint k JOIN pg_class c ON c.oid = k.confrelid "
                "JOIN pg_namespace n ON n.oid = c.relnamespace "
                "WHERE k.conname = $1 AND k.conrelid = to_regclass($2)",
                [constraint, f"{quoted(schema)}.{quoted(table)}"],
            )
        return cast("tuple[str, str]", found[0]) if found else None

    def tables_may_differ(self) -> bool:
        """See `Database.tables_may_differ`. Anybody may alter a table between two transactions."""
        return True

    def misnamed(self, model: str) -> tuple[str, str] | None:
        """See `Destination.misnamed`."""
        schema, table = self.place_of(model)
        for name in (schema, table):
            if len(name.encode()) > LONGEST_NAME:
                what = f"{name} has more than the {LONGEST_NAME} bytes that Postgres allows a name"
                return what, "Write a model with a shorter name for its table."
        if schema.startswith("pg_"):
            return f"Postgres keeps schemas that begin with pg_, such as {schema}, for itself", "Rename it."
        return None

    def limits(self, model: Table) -> Sequence[tuple[str, str]]:
        """See `Destination.limits`."""
        found = ((name, limit(quoted(name), type_)) for name, type_ in model.types().items())
        return [(name, condition) for name, condition in found if condition]

    # -- reading

    def exists(self) -> bool:
        """See `Destination.exists`."""
        with self.open() as db:
            return _is_set_up(db)

    def read(self, queries: Sequence[str], *, read_only: bool = False) -> list[pa.Table]:
        """See `Destination.read`. Types that DuckDB does not hold exactly come as Postgres' own text."""
        del read_only
        with self._connect() as db:
            try:
                run(db, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                run(db, f"SET LOCAL search_path = {quoted(self.main)}")
                return [_answer(db, query.strip().rstrip(";")) for query in queries]
            except psycopg.Error as error:
                judged = self._judged(error)
                if isinstance(judged, DestinationUnavailable):
                    raise judged from error
                raise UserError(error.diag.message_primary or str(error).strip()) from error

    def inspect(self) -> Iterator[DestinationFinding]:
        """See `Destination.inspect`."""
        try:
            with self.open() as db:
                yield from self._findings(db)
        except HeadraceError as error:
            yield DestinationFinding("fail", str(error), error.remedy)

    def _findings(self, db: Session) -> Iterator[DestinationFinding]:
        ((version, number, encoding, standby, database, create, temp),) = db.execute(
            "SELECT current_setting('server_version'), current_setting('server_version_num')::int, "
            "pg_encoding_to_char(d.encoding), pg_is_in_recovery(), d.datname, "
            "has_database_privilege(d.oid, 'CREATE'), has_database_privilege(d.oid, 'TEMP') "
            "FROM pg_database d WHERE d.datname = current_database()"
        )
        if number < _OLDEST:
            yield DestinationFinding("fail", f"Postgres {version} is too old", "It must be 14 or later.")
        elif standby:
            what = f"{self.name} is a standby, which cannot be written"
            yield DestinationFinding("fail", what, "Name the primary in [destination] url.")
        else:
            yield DestinationFinding("ok", f"{self.name} answers: Postgres {version}")
        if encoding != "UTF8":
            what = f"database {database} has the encoding {encoding}, which does not hold every text"
            yield DestinationFinding("fail", what, "Make one with ENCODING 'UTF8'.")
        role = quoted(db.execute("SELECT current_user")[0][0])
        if not temp:
            remedy = f"GRANT TEMPORARY ON DATABASE {quoted(database)} TO {role}"
            yield DestinationFinding("fail", "temporary tables cannot be made", remedy)
        for schema in ("headrace", "headrace_joining", self.main):
            rights = db.execute(
                "SELECT has_schema_privilege(oid, 'CREATE') AND has_schema_privilege(oid, 'USAGE') "
                "FROM pg_namespace WHERE nspname = $1",
                [schema],
            )
            if not rights and not create:
                what = f"there is no schema {schema}, and it cannot be made"
                remedy = f"CREATE SCHEMA {quoted(schema)} AUTHORIZATION {role}"
                yield DestinationFinding("fail", what, remedy)
            elif rights and not rights[0][0]:
                remedy = f"GRANT USAGE, CREATE ON SCHEMA {quoted(schema)} TO {role}"
                yield DestinationFinding("fail", f"tables cannot be made in the schema {schema}", remedy)
        yield from drifts(self, db)


def _is_set_up(db: Session) -> bool:
    # The last of the tables that are made.
    return db.execute("SELECT to_regclass('headrace.shapes') IS NOT NULL") == [(True,)]


def _close_all(connections: list[Connection]) -> None:
    while connections:
        with suppress(psycopg.Error):
            connections.pop().close()


def _answer(db: Connection, query: str) -> pa.Table:
    """Run one query and return its rows."""
    if _SHOWN.match(query):
        with db.cursor() as cursor:
            rows = cursor.execute(query, binary=True).fetchall()
            names = [column.name for column in cursor.description or ()]
        return pa.table({name: pa.array([str(row[i]) for row in rows]) for i, name in enumerate(names)})
    # A cursor takes a query and nothing else; binary, since that protocol takes one statement at a time. What
    # stands by itself so is what it seems to be within parentheses, too.
    db.execute(f"DECLARE answer CURSOR FOR {query}", binary=True)
    head = run(db, "FETCH 0 FROM answer").pgresult
    assert head is not None
    names = [(head.fname(i) or b"").decode() for i in range(head.nfields)]
    oids = ", ".join(f"format_type({head.ftype(i)}, {head.fmod(i)})" for i in range(head.nfields))
    (types,) = run(db, f"SELECT {oids}").fetchall()
    run(db, "CLOSE answer")
    with db.cursor() as cursor, cursor.copy(f"COPY ({query}\n) TO STDOUT (FORMAT csv)") as copy:
        data = b"".join(copy)
    return from_csv(data, names, types)
