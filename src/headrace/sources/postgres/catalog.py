"""What Postgres's catalog says about tables and types."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import psycopg

from headrace.change import Column, Constraint, TableId, TableSchema
from headrace.sources.postgres.undecodable import text_of

Connection = psycopg.Connection[tuple[Any, ...]]

_NAMES = """
(SELECT array_agg(a.attname::text ORDER BY u.i) FROM unnest({numbers}) WITH ORDINALITY u(number, i)
  JOIN pg_attribute a ON a.attrelid = {of} AND a.attnum = u.number)
"""
_CONSTRAINTS = f"""
SELECT n.nspname, t.relname, kind, name, columns, definition, m.nspname, p.relname, parents, beyond FROM (
  SELECT conrelid AS of, CASE contype WHEN 'f' THEN 'foreign_key' ELSE 'check' END AS kind,
    conname::text AS name, {_NAMES.format(numbers="conkey", of="conrelid")} AS columns,
    CASE WHEN contype = 'c' THEN pg_get_constraintdef(oid) ELSE '' END AS definition,
    confrelid AS parent, coalesce({_NAMES.format(numbers="confkey", of="confrelid")}, '{{}}') AS parents,
    concat_ws(', ', CASE WHEN NOT convalidated THEN 'not validated' END,
      CASE WHEN (to_jsonb(pg_constraint) ->> 'conperiod')::boolean THEN 'of periods' END) AS beyond
  FROM pg_constraint WHERE contype IN ('f', 'c') AND conparentid = 0 AND conkey IS NOT NULL
  UNION ALL
  SELECT i.indrelid, 'unique', r.relname::text,
    {_NAMES.format(numbers="(i.indkey::int2[])[0:i.indnkeyatts - 1]", of="i.indrelid")}, '', 0::oid, '{{}}',
    concat_ws(', ', CASE WHEN i.indpred IS NOT NULL THEN 'of a part of the rows' END,
      CASE WHEN (to_jsonb(i) ->> 'indnullsnotdistinct')::boolean THEN 'also of nulls' END)
  FROM pg_index i JOIN pg_class r ON r.oid = i.indexrelid
  WHERE i.indisunique AND i.indisvalid AND NOT i.indisprimary AND NOT i.indisexclusion AND i.indexprs IS NULL
  UNION ALL
  SELECT a.attrelid, 'not_null', a.attname || ' not null', ARRAY[a.attname::text], '', 0::oid, '{{}}', ''
  FROM pg_attribute a WHERE a.attnum > 0 AND a.attnotnull AND NOT a.attisdropped AND NOT EXISTS (
    SELECT FROM pg_constraint k WHERE k.conrelid = a.attrelid AND k.contype = 'n' AND NOT k.convalidated
    AND a.attnum = ANY (k.conkey))
) k JOIN pg_class t ON t.oid = k.of JOIN pg_namespace n ON n.oid = t.relnamespace
LEFT JOIN pg_class p ON p.oid = k.parent LEFT JOIN pg_namespace m ON m.oid = p.relnamespace
WHERE k.of = ANY (%s::oid[]) ORDER BY 1, 2, k.kind, k.name
"""
_CHECK = re.compile(r"CHECK \((.*)\)( NO INHERIT)?( NOT VALID)?( NOT ENFORCED)?", re.DOTALL)

_TYPE = """
format_type(t.oid, {modifier}), CASE WHEN t.typoutput = 'pg_catalog.array_out'::regproc THEN 'array'
  WHEN t.typtype = 'e' THEN 'enum' WHEN t.typtype = 'd' THEN 'domain' WHEN t.typtype = 'c' THEN 'composite'
  WHEN t.typtype IN ('r', 'm') THEN 'range' ELSE '' END
"""

NAME = """
CASE current_setting('server_encoding') WHEN 'SQL_ASCII' THEN convert_to(a.attname::text, 'SQL_ASCII')
  ELSE convert_to(a.attname::text, 'UTF8') END
"""
"""The bytes of the name of a column `a`, which need not be UTF-8 in a database of encoding SQL_ASCII."""

_SHAPES = f"""
SELECT n.nspname, c.relname, c.relreplident::text, {NAME}, {_TYPE.format(modifier="a.atttypmod")},
  coalesce(a.attnum = ANY ((p.indkey::int2[])[0:p.indnkeyatts - 1]), false),
  coalesce(a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]), false)
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_publication_tables o ON o.pubname = %s AND o.schemaname = n.nspname AND o.tablename = c.relname
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
  AND coalesce(to_jsonb(o) -> 'attnames' ? a.attname::text, a.attgenerated = '')
JOIN pg_type t ON t.oid = a.atttypid
LEFT JOIN pg_index p ON p.indrelid = c.oid AND p.indisprimary
LEFT JOIN pg_index i ON i.indrelid = c.oid AND i.indisreplident
WHERE c.oid = ANY (%s::oid[])
ORDER BY n.nspname, c.relname, a.attnum
"""


def list_tables(db: Connection) -> list[TableId]:
    """Return every table that can be captured: ordinary and partitioned ones, not the partitions."""
    rows = db.execute(
        """SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relpersistence = 'p'
        AND n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname NOT LIKE 'pg\\_%'
        ORDER BY 1, 2"""
    ).fetchall()
    return [TableId(*row) for row in rows]


def read_shapes(
    db: Connection, tables: Iterable[TableId], publication: str = ""
) -> dict[TableId, TableSchema]:
    """Return the shape of each table that exists, as `db`'s snapshot sees it.

    Columns are those that `publication` gives out of the table, since the stream has no others: without
    generated ones, unless it publishes them (Postgres 18). For a table outside of it, and on Postgres 14,
    all that are not generated.

    The key is the replica identity's index where one is set, else the primary key; empty if none. A name that
    is no UTF-8 is escaped as cells are, see `undecodable`: no statement can have it, and no other table is
    held up by it.
    """
    names = [_regclass(table) for table in tables]
    oids = [row[0] for row in db.execute("SELECT to_regclass(n)::oid FROM unnest(%s::text[]) n", [names])]
    oids = [oid for oid in oids if oid is not None]
    constraints = read_constraints(db, oids)
    shapes: dict[TableId, tuple[list[Column], list[str], list[str]]] = {}
    for schema, name, identity, column, type_, base, in_primary, in_identity in db.execute(
        _SHAPES, [publication, oids]
    ):
        columns, primary, index = shapes.setdefault(TableId(schema, name), ([], [], []))
        column = text_of(column)  # noqa: PLW2901
        columns.append(Column(column, type_, base))
        if in_primary:
            primary.append(column)
        if in_identity and identity == "i":
            index.append(column)
    found = {}
    for table, (columns, primary, index) in shapes.items():
        key = tuple(index or primary)
        # That a key is never null goes without saying.
        rules = (
            each
            for each in constraints.get(table, ())
            if each.kind != "not_null" or each.columns[0] not in key
        )
        found[table] = TableSchema(table, tuple(columns), key, constraints=tuple(rules))
    return found


def read_constraints(db: Connection, tables: Sequence[int]) -> dict[TableId, tuple[Constraint, ...]]:
    """Return what the source keeps of the rows of tables, given by their oids, beside their primary key.

    A unique index is one, whether a constraint says so or not, unless it is over expressions.
    """
    found: dict[TableId, list[Constraint]] = {}
    for schema, table, kind, name, columns, definition, *parent, to, beyond in db.execute(
        _CONSTRAINTS, [list(tables)]
    ):
        check = _CHECK.fullmatch(definition)
        references = TableId(*parent) if parent[1] is not None else None
        expression = check[1] if check else ""
        constraint = Constraint(kind, name, tuple(columns), expression, references, tuple(to), beyond)
        found.setdefault(TableId(schema, table), []).append(constraint)
    return {table: tuple(constraints) for table, constraints in found.items()}


def empty_columns(db: Connection, table: TableId) -> list[str]:
    """Return the columns that are null in every row written before they were added."""
    rows = db.execute(
        "SELECT attname::text FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT "
        "(attisdropped OR attnotnull OR atthasdef OR atthasmissing OR attidentity <> '')",
        [qualified(table)],
    )
    return [str(row[0]) for row in rows]


def filled_columns(db: Connection, table: TableId) -> set[str]:
    """Return the columns that have a value of their own, so that adding one gave it to the rows there were:
    a constant default (`attmissingval`), any other default or an identity, or those of the type.

    Empty for a table that is gone.
    """
    rows = db.execute(
        "SELECT a.attname FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid "
        "WHERE a.attrelid = to_regclass(%s) AND a.attnum > 0 AND NOT a.attisdropped AND "
        "(a.attmissingval IS NOT NULL OR a.atthasdef OR a.attidentity <> '' OR t.typdefault IS NOT NULL)",
        [qualified(table)],
    ).fetchall()
    return {str(row[0]) for row in rows}


def name_types(db: Connection, types: Sequence[tuple[int, int]]) -> list[tuple[str, str]]:
    """Return (name, base) of types given as (oid, modifier); a type that is gone is `text`."""
    rows = db.execute(
        f"""SELECT {_TYPE.format(modifier="w.modifier")} FROM unnest(%s::oid[], %s::int[])
        WITH ORDINALITY AS w(oid, modifier, i) LEFT JOIN pg_type t ON t.oid = w.oid ORDER BY w.i""",
        [[oid for oid, _ in types], [modifier for _, modifier in types]],
    ).fetchall()
    return [(name if name and name != "???" else "text", base) for name, base in rows]


def quoted(name: str) -> str:
    """Quote an identifier for Postgres."""
    return '"' + name.replace('"', '""') + '"'


def _regclass(table: TableId) -> str:
    return f"{quoted(table.schema)}.{quoted(table.name)}"


def qualified(table: TableId) -> str:
    """Return a table's name for SQL."""
    return _regclass(table)
