"""What of a table is captured: columns left out, columns hashed, and a condition on rows.

Applied to copied and streamed rows alike, before the log: what is left out is in no file of ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import NamedTuple

import duckdb
import pyarrow as pa

from headrace.change import Column, Constraint, TableId, TableSchema
from headrace.config import SourceConfig, select_tables
from headrace.errors import UserError
from headrace.keys import literal
from headrace.payload import BEFORE, UNCHANGED

HASHED = "sha256:"
"""How `Column.base` of a hashed column begins; behind it a mark of the salt, the same for the same salt."""
_SALTED = "getvariable('salt')"


class _Pattern(NamedTuple):
    """`schema.table.column` with `*` and `?`: the schema ends at the first dot, the column begins after
    the last."""

    text: str
    schema: str
    table: str
    column: str

    @classmethod
    def of(cls, text: str) -> _Pattern:
        schema, _, rest = text.replace("[", "[[]").partition(".")
        table, _, column = rest.rpartition(".")
        return cls(text, schema, table, column)

    @property
    def exact(self) -> bool:
        return not set("*?") & set(self.text)

    def fits(self, table: TableId, column: str) -> bool:
        return self.fits_table(table) and fnmatchcase(column, self.column)

    def fits_table(self, table: TableId) -> bool:
        return fnmatchcase(table.schema, self.schema) and fnmatchcase(table.name, self.table)


class Policy:
    """A source's `exclude`, `hash` and `where`. May be shared between threads."""

    def __init__(self, config: SourceConfig) -> None:
        self._name = config.name
        self._exclude = [_Pattern.of(text) for text in config.exclude]
        self._hash = [_Pattern.of(text) for text in config.hash]
        self._where = config.where
        self._salt = config.hash_salt.reveal() if config.hash_salt else ""
        mark = hashlib.sha256(b"headrace:" + self._salt.encode()).hexdigest()[:8]
        self._base = HASHED + mark
        self._db: duckdb.DuckDBPyConnection | None = None

    def excludes(self, table: TableId, column: str) -> bool:
        """Whether a column is left out."""
        return any(pattern.fits(table, column) for pattern in self._exclude)

    def excludes_of(self, table: TableId) -> bool:
        """Whether a table may have columns that are left out."""
        return any(pattern.fits_table(table) for pattern in self._exclude)

    def conceals(self, table: TableId | None) -> bool:
        """Whether something of a table may be left out or hashed; of one that nobody can tell (None), whether
        anything of the source may."""
        if table is None:
            return bool(self._exclude or self._hash or self._where)
        patterns = [*self._exclude, *self._hash]
        return any(pattern.fits_table(table) for pattern in patterns) or bool(self.where(table))

    def hashes(self, table: TableId, column: str) -> bool:
        """Whether a column is captured as the hash of its values."""
        return any(pattern.fits(table, column) for pattern in self._hash)

    def where(self, table: TableId) -> str:
        """Return the condition of the rows to capture, '' for all: that of the last pattern that fits."""
        fitting = [condition for pattern, condition in self._where if select_tables([pattern], [table])]
        return fitting[-1] if fitting else ""

    def shape(self, schema: TableSchema) -> TableSchema:
        """Return a table's shape as it is captured: without columns left out, hashed ones as text.

        Raises UserError for a shape with which the policy cannot be kept.
        """
        if faults := list(self._table_faults(schema)):
            raise UserError(f"Source {self._name}: {'; '.join(faults)}.", "Mend exclude or hash.")
        columns = tuple(
            Column(column.name, "text", self._base, column.not_null)
            if self.hashes(schema.table, column.name)
            else column
            for column in schema.columns
            if not self.excludes(schema.table, column.name)
        )
        constraints = tuple(each for each in schema.constraints if self._tells(schema.table, each))
        return replace(schema, columns=columns, constraints=constraints)

    def _tells(self, table: TableId, constraint: Constraint) -> bool:
        """Whether a constraint still means something of rows as they are captured, and names none of their
        columns that are left out."""
        if any(self.excludes(table, name) for name in constraint.columns):
            return False
        hashed = [self.hashes(table, name) for name in constraint.columns]
        if constraint.references is None:
            return constraint.kind != "check" or not any(hashed)
        parent = constraint.references
        hidden = any(self.excludes(parent, name) for name in constraint.to)
        return not hidden and hashed == [self.hashes(parent, name) for name in constraint.to]

    def apply(self, table: TableId, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Return rows as they are captured.

        `batch` has the source's columns as text, in any of which null stays null, and perhaps
        `_unchanged` and `_before` (see headrace.payload); other columns pass.
        """
        names = batch.schema.names
        excluded = {name for name in names if self.excludes(table, name)}
        hashed = {name for name in names if name not in excluded and self.hashes(table, name)}
        if not excluded and not hashed:
            return batch
        made: dict[str, pa.Array] = {}
        for name, cells in zip(names, batch.columns, strict=True):
            if name in excluded:
                continue
            if name in hashed:
                made[name] = self._digest(cells)
            elif name == "_before" and pa.types.is_map(cells.type):
                made[name] = self._before(cells, excluded, hashed)
            elif name == "_unchanged" and pa.types.is_list(cells.type):
                made[name] = self._unchanged(cells, excluded)
            else:
                made[name] = cells
        return pa.RecordBatch.from_pydict(made)

    def mistakes(self, tables: Sequence[TableSchema]) -> Iterator[str]:
        """Yield what is wrong with the policy for tables as the source has them: columns that cannot be
        left out, and exact names that are none."""
        for table in tables:
            yield from self._table_faults(table)
        for key, patterns in (("exclude", self._exclude), ("hash", self._hash)):
            for pattern in patterns:
                if pattern.exact:
                    yield from _unknown_column(key, pattern, tables)
        known = [str(schema.table) for schema in tables]
        for name, _ in self._where:
            if not set("*?") & set(name) and name not in known:
                yield f"where: there is no table {name} among those captured{_like(name, known)}"

    def _table_faults(self, schema: TableSchema) -> Iterator[str]:
        table = schema.table
        gone = [c.name for c in schema.columns if self.excludes(table, c.name)]
        for name in gone:
            if self.hashes(table, name):
                yield f"{table}.{name} is both excluded and hashed"
        if keys := [name for name in schema.key if name in gone]:
            yield f"exclude leaves out {keys[0]}, which is of the key of {table}: hash it instead"
        elif gone and len(gone) == len(schema.columns):
            yield f"exclude leaves no column of {table}"

    def _digest(self, cells: pa.Array) -> pa.Array:
        return self._made(f"sha256({_SALTED} || c)", cells).cast(pa.string())

    def _unchanged(self, cells: pa.Array, excluded: Iterable[str]) -> pa.Array:
        kept = f"nullif([x for x in c if x NOT IN ({_listed(excluded)})], [])"
        return self._made(kept, cells).cast(UNCHANGED)

    def _before(self, cells: pa.Array, excluded: Iterable[str], hashed: Iterable[str]) -> pa.Array:
        value = f"CASE WHEN e.key IN ({_listed(hashed)}) THEN sha256({_SALTED} || e.value) ELSE e.value END"
        entries = f"[{{k: e.key, v: {value}}} for e in map_entries(c) if e.key NOT IN ({_listed(excluded)})]"
        return self._made(f"map_from_entries({entries})", cells).cast(BEFORE)

    def _made(self, expression: str, cells: pa.Array) -> pa.Array:
        engine = self._db = self._db or duckdb.connect()  # opened late: most policies are only asked
        with engine.cursor() as db:
            # Not in the query: an error would cite it.
            db.execute("SET VARIABLE salt = ?", [self._salt])
            db.register("cells", pa.table({"c": cells}))
            made = db.sql(f"SELECT {expression} AS c FROM cells").to_arrow_table()["c"]
        return made.combine_chunks()


def _listed(names: Iterable[str]) -> str:
    # IN () is no SQL, and no column is called ''.
    return ", ".join(map(literal, ["", *sorted(names)]))


def _unknown_column(key: str, pattern: _Pattern, tables: Sequence[TableSchema]) -> Iterator[str]:
    table = next((schema for schema in tables if pattern.fits_table(schema.table)), None)
    if table is None:
        known = [f"{schema.table}.{column.name}" for schema in tables for column in schema.columns]
        yield f"{key}: there is no table of {pattern.text} among those captured{_like(pattern.text, known)}"
    elif not any(fnmatchcase(column.name, pattern.column) for column in table.columns):
        known = [f"{table.table}.{column.name}" for column in table.columns]
        yield f"{key}: there is no column {pattern.text}{_like(pattern.text, known)}"


def _like(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known, 1)
    return f'; did you mean "{close[0]}"?' if close else ""
