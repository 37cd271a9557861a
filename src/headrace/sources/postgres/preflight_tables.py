"""The tables' part of the inspection: what is selected, and what forbids to capture it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple

from headrace.change import RESERVED, Column, TableId, TableSchema
from headrace.config import SourceConfig, select_tables
from headrace.errors import UserError
from headrace.sources.postgres.catalog import NAME, Connection, qualified, quoted
from headrace.sources.postgres.clauses import wanted_clauses
from headrace.sources.postgres.columns import Policy
from headrace.sources.postgres.undecodable import text_of

SHOWN = 5
"""How many names a message lists before it counts the rest."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `remedy` holds the exact SQL or setting, '' where all is well."""

    level: Literal["ok", "warn", "fail"]
    what: str
    remedy: str = ""


class Role(NamedTuple):
    """Who we are on the server."""

    name: str
    superuser: bool
    replication: bool
    may_create: bool
    """Whether it may create a publication in this database."""
    standby: bool
    """Whether the server is a standby, which takes no statement of anybody's."""


@dataclass(frozen=True, slots=True)
class Table:
    """A relation and all that decides whether its changes can be captured."""

    id: TableId
    kind: str
    is_partition: bool
    persistence: str
    identity: str
    """Replica identity as pg_class has it: d, n, f or i."""
    has_index: bool
    """Whether the index that replica identity i names is there."""
    key: tuple[str, ...]
    deferrable: bool
    rows: int
    pages: int
    may_read: bool
    may_use_schema: bool
    row_security: bool
    owned: bool
    columns: tuple[str, ...]
    generated: tuple[str, ...]
    weak_partitions: tuple[str, ...]
    """Partitions in which an UPDATE of a published root would fail."""
    partial_partitions: tuple[str, ...]
    """Partitions whose replica identity is not FULL."""

    @property
    def can_be_listed(self) -> bool:
        """Whether patterns select it: see `catalog.list_tables`."""
        return self.kind in "rp" and not self.is_partition and self.persistence == "p"

    def obstacles(self, role: Role) -> Iterator[tuple[str, str]]:
        """Yield what forbids to capture the table, rights aside: a clause, and the SQL that mends it."""
        name = qualified(self.id)
        yield from self.key_obstacles()
        folded = [column.casefold() for column in self.columns]
        for column in self.columns:
            if column.casefold() in RESERVED:
                rename = (
                    f"ALTER TABLE {name} RENAME COLUMN {quoted(column)} TO {quoted(column.strip('_') + '_')};"
                )
                yield f"its column {column} has a name that Headrace uses itself", rename
        for i, column in enumerate(self.columns):
            if folded[i] in folded[:i]:
                other = self.columns[folded.index(folded[i])]
                rename = f"ALTER TABLE {name} RENAME COLUMN {quoted(column)} TO {quoted(folded[i] + '_2')};"
                yield f"its columns {other} and {column} differ in upper and lower case only", rename
        if self.row_security:
            bypass = f"ALTER ROLE {quoted(role.name)} BYPASSRLS;"
            yield f"row security hides rows of it from role {role.name}, so a copy would lack them", bypass

    def key_obstacles(self) -> Iterator[tuple[str, str]]:
        """Yield why rows of the table cannot be told apart, or what of its replica identity does harm."""
        name = qualified(self.id)
        fails = "publishing it would make the application's own UPDATE and DELETE fail"
        back = f"ALTER TABLE {name} REPLICA IDENTITY DEFAULT;"
        if not self.key and self.identity == "f":
            if self.partial_partitions:
                yield (
                    f"it has no key, and partitions that do not send whole old rows "
                    f"({shortened(self.partial_partitions)})",
                    f"ALTER TABLE {self.partial_partitions[0]} REPLICA IDENTITY FULL; for each of them,",
                )
        elif not self.key:
            yield (
                f"it has no primary key: {fails}",
                f"ALTER TABLE {name} ADD PRIMARY KEY (…); or ALTER TABLE {name} REPLICA IDENTITY FULL;",
            )
        elif computed := set(self.key) & set(self.generated):
            yield (
                f"its key has the generated column {min(computed)}, which is not captured",
                f"ALTER TABLE {name} REPLICA IDENTITY USING INDEX …; with an index over other columns",
            )
        elif self.identity == "n":
            yield f"its replica identity is NOTHING: {fails}", back
        elif self.identity == "i" and not self.has_index:
            yield f"the index of its replica identity is gone: {fails}", back
        elif self.identity == "d" and self.deferrable:
            yield (
                f"its primary key is deferrable, which is no replica identity: {fails}",
                f"ALTER TABLE {name} REPLICA IDENTITY FULL;",
            )
        elif self.weak_partitions:
            yield (
                f"partitions have no key of their own ({shortened(self.weak_partitions)}): {fails}",
                f"ALTER TABLE {self.weak_partitions[0]} REPLICA IDENTITY FULL; for each of them,",
            )


_TABLES = rf"""
SELECT n.nspname::text, c.relname::text, c.relkind::text, c.relispartition, c.relpersistence::text,
  c.relreplident::text, i.indrelid IS NOT NULL,
  (SELECT coalesce(array_agg({NAME} ORDER BY u.place), '{{}}')
   FROM unnest(coalesce(i.indkey, p.indkey)::int2[]) WITH ORDINALITY u(attnum, place)
   JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = u.attnum
   WHERE u.place <= coalesce(i.indnkeyatts, p.indnkeyatts)),
  coalesce(NOT p.indimmediate, false), greatest(c.reltuples, 0)::bigint, c.relpages,
  has_table_privilege(c.oid, 'SELECT'), has_schema_privilege(n.oid, 'USAGE'), row_security_active(c.oid),
  pg_has_role(c.relowner, 'USAGE'),
  (SELECT coalesce(array_agg({NAME} ORDER BY a.attnum), '{{}}') FROM pg_attribute a
   WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''),
  (SELECT coalesce(array_agg({NAME} ORDER BY a.attnum), '{{}}') FROM pg_attribute a
   WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated <> ''),
  CASE WHEN c.relkind <> 'p' THEN '{{}}' ELSE (
    SELECT coalesce(array_agg(l.oid::regclass::text ORDER BY l.oid), '{{}}')
    FROM pg_partition_tree(c.oid) t JOIN pg_class l ON l.oid = t.relid
    WHERE t.isleaf AND l.relkind = 'r' AND (l.relreplident = 'n' OR l.relreplident = 'd' AND NOT EXISTS (
      SELECT FROM pg_index x WHERE x.indrelid = l.oid AND x.indisprimary AND x.indimmediate))) END,
  CASE WHEN c.relkind <> 'p' THEN '{{}}' ELSE (
    SELECT coalesce(array_agg(l.oid::regclass::text ORDER BY l.oid), '{{}}')
    FROM pg_partition_tree(c.oid) t JOIN pg_class l ON l.oid = t.relid
    WHERE t.isleaf AND l.relkind = 'r' AND l.relreplident <> 'f') END
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_index p ON p.indrelid = c.oid AND p.indisprimary
LEFT JOIN pg_index i ON i.indrelid = c.oid AND i.indisreplident AND c.relreplident = 'i'
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND n.nspname NOT IN ('pg_catalog', 'information_schema')
  AND n.nspname NOT LIKE 'pg\_%'
ORDER BY 1, 2
"""


def read_tables(db: Connection) -> list[Table]:
    """Return every table, view and partition outside the system's schemas, by schema and name."""
    return [
        Table(TableId(schema, name), *map(_settled, rest))
        for schema, name, *rest in db.execute(_TABLES.encode()).fetchall()
    ]


def _settled(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return tuple(text_of(each) if isinstance(each, bytes) else each for each in value)


def table_findings(db: Connection, config: SourceConfig, role: Role) -> Iterator[Finding]:
    """Judge what the configuration selects."""
    every = read_tables(db)
    by_id = {table.id: table for table in every}
    listed = [table.id for table in every if table.can_be_listed]
    chosen = [by_id[table] for table in select_tables(config.tables, listed)]
    yield from _patterns(config, every, listed)
    if not chosen:
        yield Finding(
            "fail",
            f"no table matches tables = [{', '.join(config.tables)}]",
            f'Name existing ones in [source.{config.name}], such as tables = ["public.*"].',
        )
        return
    sound = []
    for table in chosen:
        obstacles = list(table.obstacles(role))
        yield from (_obstacle(table, *obstacle) for obstacle in obstacles)
        if not obstacles:
            sound.append(table)
    yield from _same_names(chosen)
    yield from _reading(chosen, role)
    yield from _columns(config, chosen)
    yield from _publication(db, config, sound, role)
    yield from _left_out(config, every, chosen)
    if len(sound) == len(chosen):
        keyless = sum(not table.key for table in chosen)
        rest = f" but {keyless}, whose equal rows are counted" if keyless else ""
        yield Finding("ok", f"{counted(len(chosen))} selected, each with a key{rest}")


def _obstacle(table: Table, clause: str, remedy: str) -> Finding:
    return Finding(
        "fail", f"table {table.id}: {clause}", f'{remedy} or leave it out: "!{table.id}" in tables'
    )


def _patterns(config: SourceConfig, every: Sequence[Table], listed: Sequence[TableId]) -> Iterator[Finding]:
    for pattern in config.tables:
        bare = pattern.removeprefix("!")
        if select_tables([bare], listed):
            continue
        hits = select_tables([bare], [table.id for table in every])
        others = [table for table in every if table.id in hits]
        exact = not pattern.startswith("!") and not set("*?") & set(bare)
        if others and exact:
            yield Finding("fail", f"{others[0].id} {_nature(others[0])}", f'Take "{pattern}" out of tables.')
        elif not others:
            near = get_close_matches(bare, [str(table) for table in listed], 1, 0.75)
            remedy = (
                f'Did you mean "{near[0]}"?'
                if near
                else f"There are: {shortened(map(str, listed)) or 'none'}."
            )
            what = f"there is no table {bare}" if exact else f'the pattern "{pattern}" matches no table'
            yield Finding("fail" if exact else "warn", what, remedy)


def _nature(table: Table) -> str:
    if table.kind in "vmf":
        kind = {"v": "a view", "m": "a materialized view", "f": "a foreign table"}[table.kind]
        return f"is {kind}: it has no changes of its own to capture"
    if table.is_partition:
        return "is a partition: it is captured with the table that it is a part of"
    return "is not logged, so its changes are not in the WAL and cannot be captured"


def _same_names(chosen: Iterable[Table]) -> Iterator[Finding]:
    first: dict[str, Table] = {}
    for table in chosen:
        other = first.setdefault(table.id.label.casefold(), table)
        if other is not table:
            yield Finding(
                "fail",
                f"tables {other.id} and {table.id} would have one name in the destination",
                f'Leave one out: "!{table.id}" in tables',
            )


def _reading(chosen: Iterable[Table], role: Role) -> Iterator[Finding]:
    closed = sorted({table.id.schema for table in chosen if not table.may_use_schema})
    if closed:
        schemas = ", ".join(map(quoted, closed))
        remedy = f"GRANT USAGE ON SCHEMA {schemas} TO {quoted(role.name)};"
        yield Finding("fail", f"role {role.name} may not use schema {shortened(closed)}", remedy)
    unreadable = [table.id for table in chosen if not table.may_read]
    if unreadable:
        names = ", ".join(map(qualified, unreadable))
        remedy = f"GRANT SELECT ON {names} TO {quoted(role.name)};"
        what = f"role {role.name} may not read {shortened(map(str, unreadable))}"
        yield Finding("fail", what, remedy)


def _left_out(config: SourceConfig, every: Iterable[Table], chosen: Iterable[Table]) -> Iterator[Finding]:
    unlogged = [table.id for table in every if table.kind in "rp" and table.persistence == "u"]
    for name in select_tables(config.tables, unlogged):
        yield Finding(
            "warn",
            f"table {name} is not logged: its changes are not in the WAL and are not captured",
            f'ALTER TABLE {qualified(name)} SET LOGGED; or silence this: "!{name}" in tables',
        )
    for table in chosen:
        if table.generated:
            yield Finding(
                "warn",
                f"table {table.id}: generated columns are left out: {shortened(table.generated)}",
                "Compute them in a model, from the columns that they are made of.",
            )


def _columns(config: SourceConfig, chosen: Iterable[Table]) -> Iterator[Finding]:
    """Judge what the configuration leaves out of the tables, or hashes."""
    policy = Policy(config)
    shapes = [
        TableSchema(table.id, tuple(Column(name, "") for name in table.columns), table.key)
        for table in chosen
    ]
    for mistake in policy.mistakes(shapes):
        yield Finding("fail", mistake, f"Mend it in [source.{config.name}].")
    columns = [(shape.table, column.name) for shape in shapes for column in shape.columns]
    for verb, chooses in (("left out", policy.excludes), ("hashed", policy.hashes)):
        if names := [f"{table}.{name}" for table, name in columns if chooses(table, name)]:
            yield Finding("ok", f"columns {verb}: {shortened(names)}")


# --------------------------------------------------------------------------------- the publication


def _publication(
    db: Connection, config: SourceConfig, tables: Sequence[Table], role: Role
) -> Iterator[Finding]:
    """Judge whether the publication holds the tables that can be captured, or can be made to."""
    name = config.publication
    try:
        clauses = wanted_clauses(db, config, [table.id for table in tables])
    except UserError as error:
        yield Finding("fail", str(error), error.remedy)
        return
    row = db.execute(
        """SELECT pg_has_role(pubowner, 'USAGE'), pubviaroot,
        pubinsert AND pubupdate AND pubdelete AND pubtruncate FROM pg_publication WHERE pubname = %s""",
        [name],
    ).fetchone()
    held = {
        TableId(*pair)
        for pair in db.execute(
            "SELECT schemaname::text, tablename::text FROM pg_publication_tables WHERE pubname = %s", [name]
        )
    }
    missing = [table for table in tables if table.id not in held]
    if row and not row[2]:
        remedy = f"ALTER PUBLICATION {quoted(name)} SET (publish = 'insert, update, delete, truncate');"
        yield Finding("fail", f"publication {name} leaves out some kinds of change", remedy)
    if row and not row[1] and any(table.kind == "p" for table in tables):
        remedy = f"ALTER PUBLICATION {quoted(name)} SET (publish_via_partition_root = true);"
        yield Finding("fail", f"publication {name} gives partitions out under their own names", remedy)
    if not missing:
        if tables:
            yield Finding("ok", f"publication {name} holds {counted(len(tables))}")
        return
    lacking = list(_lacking(missing, role, exists=bool(row), ours=bool(row and row[0])))
    listed = ", ".join(clauses[table.id].after(table.id) for table in missing)
    if not lacking:
        todo = "be extended by" if row else "be made with"
        yield Finding("ok", f"publication {name} can {todo} {counted(len(missing))}")
        return
    statement = f"ALTER PUBLICATION {quoted(name)} ADD TABLE {listed};"
    if not row:
        statement = (
            f"CREATE PUBLICATION {quoted(name)} FOR TABLE {listed} WITH (publish_via_partition_root = true);"
        )
    verb = "extend" if row else "make"
    what = f"role {role.name} cannot {verb} publication {name}: it {' and '.join(lacking)}"
    who = "an administrator run on the primary" if role.standby else "an administrator run"
    yield Finding("fail", what, f"Let {who}: {statement}")


def _lacking(missing: Iterable[Table], role: Role, *, exists: bool, ours: bool) -> Iterator[str]:
    if role.standby:
        yield "is on a standby, which takes it from its primary"
        return
    if role.superuser:
        return
    if exists and not ours:
        yield "does not own the publication"
    if not exists and not role.may_create:
        yield "may not CREATE in the database"
    foreign = [str(table.id) for table in missing if not table.owned]
    if foreign:
        yield f"does not own {shortened(foreign)}"


def shortened(names: Iterable[str]) -> str:
    """List a few names and count the rest."""
    every = list(names)
    rest = len(every) - SHOWN
    return ", ".join(every[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def counted(tables: int) -> str:
    """Say how many tables."""
    return "1 table" if tables == 1 else f"{tables} tables"
