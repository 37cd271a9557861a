"""What a publication gives out of a table: a list of columns and a condition on rows (Postgres 15 and later).

A publication must never make the application's own statements fail. Postgres refuses an UPDATE or DELETE of
a published table whose list lacks a column of the replica identity, or whose condition reads a column
outside of it; so no such clause is made. A list is dispensable, since columns are left out on our side as
well; a condition that cannot be published is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import psycopg

from headrace.change import TableId, TableSchema
from headrace.config import SourceConfig
from headrace.errors import UserError
from headrace.sources.postgres.catalog import Connection, qualified, quoted, read_shapes
from headrace.sources.postgres.columns import Policy
from headrace.sources.postgres.locks import unless_locked

CLAUSES_SINCE = 150_000


class Clause(NamedTuple):
    """A table's part in a publication.

    `columns` are all where there is none; `where` is '' for all rows, else as Postgres prints it.
    """

    columns: tuple[str, ...] = ()
    where: str = ""

    def after(self, table: TableId) -> str:
        """Return the table with its clause, as `FOR TABLE` and `ADD TABLE` take it."""
        columns = f" ({', '.join(map(quoted, self.columns))})" if self.columns else ""
        return qualified(table) + columns + (f" WHERE ({self.where})" if self.where else "")

    def __str__(self) -> str:
        columns = f"columns {', '.join(self.columns)}" if self.columns else "all columns"
        return f"{columns} of {f'rows where {self.where}' if self.where else 'all rows'}"

    def same(self, other: Clause) -> bool:
        """Whether both give out the same."""
        return set(self.columns) == set(other.columns) and self.where == other.where


class _Identity(NamedTuple):
    """A replica identity: pg_class's letter, and the columns of its index."""

    kind: str
    columns: frozenset[str]


# A partitioned table has the identities of its partitions, since these are what is written.
_IDENTITIES = """
SELECT n.nspname::text, c.relname::text, l.relreplident::text, coalesce((
  SELECT array_agg(a.attname::text) FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid
  AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]) WHERE i.indrelid = l.oid
  AND CASE l.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident ELSE false END), '{}')
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_class l ON l.oid IN (
  SELECT c.oid WHERE c.relkind <> 'p'
  UNION ALL SELECT relid FROM pg_partition_tree(c.oid) WHERE isleaf AND c.relkind = 'p')
WHERE c.oid = ANY (SELECT to_regclass(t) FROM unnest(%s::text[]) t)
"""

_HELD = """
SELECT t.schemaname::text, t.tablename::text, r.oid IS NOT NULL, {clause}
FROM pg_publication_tables t JOIN pg_publication p ON p.pubname = t.pubname
LEFT JOIN pg_publication_rel r ON r.prpubid = p.oid
  AND r.prrelid = format('%%I.%%I', t.schemaname, t.tablename)::regclass
WHERE t.pubname = %s
"""
_HELD_CLAUSE = """
(SELECT array_agg(a.attname::text ORDER BY a.attnum) FROM pg_attribute a
 WHERE a.attrelid = r.prrelid AND a.attnum = ANY (r.prattrs::int2[])),
pg_get_expr(r.prqual, r.prrelid)
"""


def has_clauses(db: Connection) -> bool:
    """Whether the server knows lists of columns and conditions on rows."""
    return db.info.server_version >= CLAUSES_SINCE


def held_clauses(db: Connection, publication: str) -> dict[TableId, Clause | None]:
    """Return what a publication gives out of each of its tables; None where it holds the table only as
    part of a schema or of all tables, which takes no clause."""
    clause = _HELD_CLAUSE if has_clauses(db) else "NULL, NULL"
    rows = db.execute(_HELD.format(clause=clause).encode(), [publication]).fetchall()
    return {
        TableId(schema, name): Clause(tuple(columns or ()), where or "") if listed else None
        for schema, name, listed, columns, where in rows
    }


def wanted_clauses(db: Connection, config: SourceConfig, tables: Sequence[TableId]) -> dict[TableId, Clause]:
    """Return what the settings say the publication should give out of each table.

    Raises UserError for a condition that Postgres cannot publish without harm to the application.
    """
    policy = Policy(config)
    shapes = read_shapes(db, tables)
    identities = _identities(db, tables)
    found = {}
    for table, shape in shapes.items():
        condition = policy.where(table)
        where = _publishable(db, config, table, condition, identities[table]) if condition else ""
        lists = has_clauses(db)
        found[table] = Clause(_listed(policy, shape, identities[table]) if lists else (), where)
    return found


def _listed(policy: Policy, shape: TableSchema, identities: Sequence[_Identity]) -> tuple[str, ...]:
    """Return the columns to list; none where nothing is left out, or a list would do harm."""
    kept = tuple(c.name for c in shape.columns if not policy.excludes(shape.table, c.name))
    harmless = all(i.kind != "f" and i.columns <= set(kept) for i in identities)
    return kept if harmless and len(kept) < len(shape.columns) else ()


def _identities(db: Connection, tables: Sequence[TableId]) -> dict[TableId, list[_Identity]]:
    found: dict[TableId, list[_Identity]] = {table: [] for table in tables}
    for schema, name, kind, columns in db.execute(_IDENTITIES.encode(), [[qualified(t) for t in tables]]):
        found[TableId(schema, name)].append(_Identity(kind, frozenset(columns)))
    return found


def _publishable(
    db: Connection, config: SourceConfig, table: TableId, condition: str, identities: Sequence[_Identity]
) -> str:
    """Return a condition as Postgres prints it; raises UserError where it must not be published."""
    what = f"Source {config.name}: where of {table}"
    model = "Or take it out of [source…where] and filter in a model with WHERE."
    if not has_clauses(db):
        raise UserError(f"{what}: Postgres before 15 publishes no conditions on rows.", model)
    where, columns = _examine(db, what, table, condition)
    for identity in identities:
        outside = sorted(columns - identity.columns)
        if identity.kind != "f" and outside:
            raise UserError(
                f"{what} reads {', '.join(outside)}, outside of the table's replica identity: with it in the "
                "publication, the application's own UPDATE and DELETE would fail.",
                f"ALTER TABLE {qualified(table)} REPLICA IDENTITY FULL; or USING INDEX … over the key and "
                f"these columns. {model}",
            )
    return where


def _examine(db: Connection, what: str, table: TableId, condition: str) -> tuple[str, set[str]]:
    """Let Postgres read a condition: how it prints it, and the columns that it reads.

    Makes a publication and takes it back in the same transaction, so that nobody else ever sees it.
    """
    probe = f"headrace_probe_{db.info.backend_pid}"
    try:
        with unless_locked(db, f"{what}: examining it", [table]), db.transaction(force_rollback=True):
            members = f"TABLE {qualified(table)} WHERE ({condition})"
            db.execute(f"CREATE PUBLICATION {quoted(probe)} FOR {members}".encode())
            row = db.execute(
                """SELECT pg_get_expr(r.prqual, r.prrelid), ARRAY (
                  SELECT a.attname::text FROM pg_depend d
                  JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
                  WHERE d.classid = 'pg_publication_rel'::regclass AND d.objid = r.oid
                  AND d.refobjid = r.prrelid AND d.refobjsubid > 0)
                FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid WHERE p.pubname = %s""",
                [probe],
            ).fetchone()
    except psycopg.errors.ReadOnlySqlTransaction as error:
        raise UserError(
            f"{what}: a standby cannot examine a condition.",
            "Filter in a model with WHERE, or read from the primary.",
        ) from error
    except psycopg.errors.InsufficientPrivilege as error:
        raise UserError(
            f"{what}: the role may not publish the table: {_words(error)}.",
            "Let the role own the table and CREATE in the database, or filter in a model with WHERE.",
        ) from error
    except (psycopg.ProgrammingError, psycopg.NotSupportedError, psycopg.DataError) as error:
        raise UserError(
            f"{what}: Postgres does not take {condition!r}: {_words(error)}.", "Mend it in headrace.toml."
        ) from error
    assert row is not None
    return str(row[0]), set(row[1])


def _words(error: psycopg.Error) -> str:
    return (error.diag.message_primary or str(error)).strip().rstrip(".")
