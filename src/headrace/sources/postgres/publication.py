"""The publication: which tables a source captures, and nothing that it leaves out."""

from __future__ import annotations

from collections.abc import Sequence

import psycopg

from headrace.change import RESERVED, TableId, TableSchema
from headrace.config import SourceConfig, select_tables
from headrace.errors import UserError
from headrace.sources.postgres.catalog import Connection, list_tables, qualified, quoted, read_shapes
from headrace.sources.postgres.connection import place
from headrace.sources.postgres.locks import unless_locked


def chosen_tables(db: Connection, config: SourceConfig) -> list[TableId]:
    """Return the tables that the project selects; raises UserError when there is none."""
    tables = list(select_tables(config.tables, list_tables(db)))
    if not tables:
        raise UserError(
            f"Source {config.name}: no table of {place(config.url.reveal())} matches {list(config.tables)}.",
            'Name existing tables in [source] tables, such as "public.orders".',
        )
    return tables


def capturable_shapes(db: Connection, config: SourceConfig, tables: Sequence[TableId]) -> list[TableSchema]:
    """Return the tables' shapes; raises UserError for one whose changes cannot be captured."""
    shapes = read_shapes(db, tables)
    without = [str(table) for table in tables if not shapes[table].key]
    if without:
        raise UserError(
            f"Source {config.name}: no primary key in {', '.join(without)}: changes of their rows cannot "
            "be told apart, and publishing them would make the application's own UPDATE fail.",
            f"Add one, ALTER TABLE {without[0]} ADD PRIMARY KEY (…); or exclude: tables = "
            f'[…, "!{without[0]}"].',
        )
    for shape in shapes.values():
        taken = [column.name for column in shape.columns if column.name.lower() in RESERVED]
        if taken:
            raise UserError(
                f"Table {shape.table} has a column called {taken[0]}, a name that Headrace uses itself.",
                f'Rename it at the source, or exclude the table: "!{shape.table}".',
            )
    return [shapes[table] for table in tables]


def publish(db: Connection, config: SourceConfig, tables: Sequence[TableId]) -> bool:
    """Make the publication, or add what it lacks; never FOR ALL TABLES. Returns whether it was made."""
    capturable_shapes(db, config, tables)
    name = quoted(config.publication)
    found = db.execute(
        "SELECT pubviaroot, pubinsert AND pubupdate AND pubdelete AND pubtruncate "
        "FROM pg_publication WHERE pubname = %s",
        [config.publication],
    ).fetchone()
    if found and not all(found):
        raise UserError(
            f"Source {config.name}: the publication {config.publication} leaves changes out.",
            f"Let its owner run: ALTER PUBLICATION {name} SET (publish_via_partition_root = true, "
            "publish = 'insert, update, delete, truncate');",
        )
    has = db.execute(
        "SELECT schemaname, tablename FROM pg_publication_tables WHERE pubname = %s",
        [config.publication],
    ).fetchall()
    missing = [table for table in tables if table not in {TableId(*row) for row in has}]
    listed = ", ".join(qualified(table) for table in missing)
    if not found:
        statement = f"CREATE PUBLICATION {name} FOR TABLE {listed} WITH (publish_via_partition_root = true)"
    elif missing:
        statement = f"ALTER PUBLICATION {name} ADD TABLE {listed}"
    else:
        return False
    try:
        with unless_locked(db, f"Source {config.name}: publishing", missing):
            db.execute(statement.encode())
    except psycopg.errors.ReadOnlySqlTransaction as error:
        raise UserError(
            f"Source {config.name}: a standby takes no publication.",
            f"Let an owner of the tables run on the primary: {statement};",
        ) from error
    except psycopg.errors.InsufficientPrivilege as error:
        raise UserError(
            f"Source {config.name}: the role may not make the publication: {str(error).strip()}.",
            f"Let an owner of the tables run: {statement};",
        ) from error
    return not found
