"""A connection to Postgres as a destination's session."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import psycopg
import pyarrow as pa

from headrace.destinations.postgres_values import as_csv, postgres_type
from headrace.destinations.session import Unfit
from headrace.destinations.unique import Claimed
from headrace.errors import CommitUnknown, ModelBroken
from headrace.failpoints import failpoint
from headrace.keys import quoted
from headrace.protocols import Table

LONGEST_NAME = 63
"""Bytes; Postgres cuts off what is longer, so that two names may become one."""

_INLINE_ROWS = 2_000
"""An Arrow table of more rows becomes a temporary table, a smaller one arrays in the statement: a temporary
table is rows in the catalog, which a busy pipeline would fill with dead ones."""

_GIVEN = {pa.string(): "text", pa.int64(): "bigint", pa.bool_(): "boolean"}
_KEY_PREFIX = 400
"""Characters of a source key that are in its index, whose entries take 2704 bytes at most."""

_CANNOT_COERCE = "42846"

_GIVEN_RELATION = re.compile(r"\b(FROM|JOIN|USING) _hr_given\b")

Connection = psycopg.Connection[tuple[Any, ...]]


def run(db: Connection, statement: str, parameters: Sequence[Any] = ()) -> psycopg.Cursor[tuple[Any, ...]]:
    """Run one statement; its names are quoted and its literals escaped where it is made."""
    return db.execute(statement, parameters or None)


def words_of(error: psycopg.Error) -> str:
    """Say what Postgres refused, without the cells that its messages quote."""
    state, diag = error.sqlstate or "", error.diag
    if isinstance(error, psycopg.DataError) and not state:
        return "a text holds a NUL character, which Postgres does not take"
    # What a function says, a trigger's for instance, its author words, under any state.
    if state[:2] not in ("22", "23", "P0") and "function" not in (diag.context or ""):
        return (diag.message_primary or str(error)).splitlines()[0]
    kind = type(error).__name__
    parts = [("constraint", diag.constraint_name), ("column", diag.column_name), ("of", diag.table_name)]
    named = " ".join(f"{word} {quoted(name)}" for word, name in parts if name)
    return f"{kind} (SQLSTATE {state})" + (f", {named}" if named else "")


class PostgresSession:
    """See `Session`."""

    row_id = "ctid"

    def __init__(self, db: Connection, name: str) -> None:
        self._db = db
        self._name = name
        self.touched: dict[tuple[str, str], str] = {}
        self.changed: set[str] = set()
        self.moving: set[str] = set()
        self.counts_issues = False
        self.claimed: dict[str, Claimed] = {}
        self._held: pa.Table | None = None  # what the temporary table _hr_given is made of

    def begin(self, source: str, *, steady: bool = False) -> None:
        """See `Session.begin`. What a lost connection left running is waited for here."""
        run(self._db, "BEGIN ISOLATION LEVEL REPEATABLE READ" if steady else "BEGIN")
        run(self._db, "SET CONSTRAINTS ALL DEFERRED")
        # Source keys are long texts: to hash them costs less than to sort them.
        run(self._db, "SET LOCAL enable_mergejoin = off")
        self.lock(source)

    def resolve_in(self, schema: str) -> None:
        """See `Session.resolve_in`."""
        run(self._db, f"SET LOCAL search_path = {quoted(schema)}")

    def lock(self, what: str) -> None:
        """Wait until no other transaction works on this."""
        run(self._db, "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", [f"headrace {what}"])

    def commit(self) -> None:
        """See `Session.commit`."""
        try:
            run(self._db, "SET CONSTRAINTS ALL IMMEDIATE")
        except psycopg.IntegrityError as error:
            raise self._unfit(error) from error
        failpoint("destination.postgres.commit")
        self._held = None
        try:
            run(self._db, "COMMIT")
        except psycopg.OperationalError as error:
            raise CommitUnknown(
                f"{self._name} broke off while a transaction was committed.", "Headrace asks it again."
            ) from error

    @staticmethod
    def _unfit(error: psycopg.Error) -> Unfit:
        diag = error.diag
        table = (diag.schema_name or "", diag.table_name or "")
        return Unfit(table, diag.constraint_name or "", words_of(error))

    def rollback(self) -> None:
        """See `Session.rollback`."""
        self._held = None
        run(self._db, "ROLLBACK")

    def execute(
        self, statement: str, parameters: Sequence[Any] = (), given: pa.Table | None = None
    ) -> list[tuple[Any, ...]]:
        """See `Session.execute`."""
        cursor = self._run(statement, parameters, given)
        return cursor.fetchall() if cursor.description else []

    def change(self, statement: str, parameters: Sequence[Any] = (), given: pa.Table | None = None) -> int:
        """See `Session.change`."""
        return self._run(statement, parameters, given).rowcount

    def keep(self, name: str, query: str, given: pa.Table | None = None) -> None:
        """See `Session.keep`."""
        run(self._db, f"DROP TABLE IF EXISTS pg_temp.{name}")
        self._run(f"CREATE TEMP TABLE {name} ON COMMIT DROP AS {query}", (), given)

    def _run(
        self, statement: str, parameters: Sequence[Any], given: pa.Table | None
    ) -> psycopg.Cursor[tuple[Any, ...]]:
        if given is None:
            return run(self._db, statement, parameters)
        types = {field.name: _GIVEN.get(field.type, "timestamptz") for field in given.schema}
        if given.num_rows > _INLINE_ROWS:
            self._hold(given, types)
            return run(self._db, statement, parameters)
        first = len(parameters) + 1
        arrays = ", ".join(f"${first + i}::{type_}[]" for i, type_ in enumerate(types.values()))
        names = ", ".join(map(quoted, types))
        relation = f"(SELECT * FROM unnest({arrays}) AS g({names}))"
        cells = [column.to_pylist() for column in given.columns]
        return run(self._db, _GIVEN_RELATION.sub(rf"\1 {relation}", statement), [*parameters, *cells])

    def _hold(self, given: pa.Table, types: Mapping[str, str]) -> None:
        """Make the temporary table _hr_given of an Arrow table, unless it is that already."""
        if self._held is given:
            return
        columns = ", ".join(f"{quoted(name)} {type_}" for name, type_ in types.items())
        run(self._db, "DROP TABLE IF EXISTS pg_temp._hr_given")
        run(self._db, f"CREATE TEMP TABLE _hr_given ({columns}) ON COMMIT DROP")
        times = {name: "TIMESTAMP WITH TIME ZONE" for name, type_ in types.items() if type_ == "timestamptz"}
        self._copy("_hr_given", given, times, {})
        self._held = given

    def append(self, target: str, types: Mapping[str, str], source: str, rows: pa.Table) -> None:
        """See `Session.append`."""
        self._copy(target, rows, types, {"_source": source})

    def remove(self, target: str, source: str, keys: pa.Table, number: tuple[str, str] | None = None) -> None:
        """See `Session.remove`. Its type here holds every whole number that is a key of a source."""
        same = f"{quoted(number[0])} = r.key::bigint" if number else self.same_key("_source_key", "r.key")
        self._run(f"DELETE FROM {target} USING _hr_given r WHERE _source = $1 AND {same}", [source], keys)

    def make_room(self, target: str, keys: int) -> None:
        """See `Session.make_room`. The server's own settings hold."""

    def _copy(
        self, target: str, rows: pa.Table, types: Mapping[str, str], constants: Mapping[str, str]
    ) -> None:
        columns = ", ".join(quoted(name) for name in (*constants, *rows.column_names))
        statement = f"COPY {target} ({columns}) FROM STDIN (FORMAT csv)"
        with self._db.cursor() as cursor, cursor.copy(statement) as copy:
            for piece in as_csv(rows, types, constants):
                copy.write(piece)

    def columns(self, schema: str, table: str, *, hidden: bool = False) -> dict[str, str]:
        """See `Session.columns`."""
        return dict(
            self.execute(
                "SELECT a.attname, format_type(a.atttypid, a.atttypmod) FROM pg_attribute a "
                "JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace "
                "WHERE n.nspname = $1 AND c.relname = $2 AND a.attnum > 0 AND NOT a.attisdropped "
                "AND (a.attname NOT IN ('_source', '_source_key') OR $3) ORDER BY a.attnum",
                [schema, table, hidden],
            )
        )

    def types(self, table: Table) -> dict[str, str]:
        """See `Session.types`."""
        found = {}
        for name, type_ in table.types().items():
            if len(name.encode()) > LONGEST_NAME:
                what = f"Column {name} of model {table.name} has a name of more than {LONGEST_NAME} bytes."
                raise ModelBroken(table.name, what, "Name it otherwise in a model.")
            if (known := postgres_type(type_)) is None:
                what = (
                    f"Column {name} of model {table.name} is of type {type_}, which Postgres does not have."
                )
                raise ModelBroken(table.name, what, "Cast it to another type in the model.")
            found[name] = known
        return found

    def same_key(self, left: str, right: str) -> str:
        """See `Session.same_key`: the first part is what the index is of."""
        return f"{_prefix(left)} = {_prefix(right)} AND {left} = {right}"

    def json_text(self, document: str, *path: str | int) -> str:
        """See `Session.json_text`."""
        return f"({document}::json #>> '{{{','.join(map(str, path))}}}')"

    def make_findable(self, target: str, columns: Sequence[str]) -> None:
        """See `Session.make_findable`. An index of hashes is of one column, with values of any length."""
        name = f"headrace_{blake2b(f'{target} {columns[0]}'.encode(), digest_size=8).hexdigest()}"
        run(self._db, f"CREATE INDEX IF NOT EXISTS {name} ON {target} USING hash ({quoted(columns[0])})")

    def fingerprints(self, columns: Sequence[str]) -> Sequence[str]:
        """See `Session.fingerprints`. As text, since not every type can be compared."""
        return [f"hashtextextended(ROW({', '.join(columns)})::text, {seed})" for seed in (0, 1)]

    def retype(self, target: str, column: str, type_: str, *, lenient: bool) -> None:
        """See `Session.retype`."""
        alter = f"ALTER TABLE {target} ALTER COLUMN {column} TYPE {type_}"
        self.execute("SAVEPOINT headrace_retype")
        try:
            self.execute(f"{alter} USING CAST({column} AS {type_})")
        except psycopg.Error as error:
            state = error.sqlstate or ""
            if not (lenient and (state.startswith("22") or state == _CANNOT_COERCE)):
                raise
            self.execute("ROLLBACK TO SAVEPOINT headrace_retype")
            self.execute(f"{alter} USING CAST(NULL AS {type_})")
        self.execute("RELEASE SAVEPOINT headrace_retype")

    def prepare_table(self, target: str, number: str | None) -> None:
        """See `Session.prepare_table`."""
        run(self._db, f"CREATE INDEX ON {target} ({quoted(number) if number else _prefix('_source_key')})")


def _prefix(key: str) -> str:
    return f'(left({key}, {_KEY_PREFIX}) COLLATE "C")'
