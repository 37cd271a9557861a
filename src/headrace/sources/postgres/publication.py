"""The publication: which tables a source captures, and nothing that it leaves out."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence

import psycopg

from headrace.alarms import tell
from headrace.change import RESERVED, TableId, TableSchema
from headrace.config import SourceConfig, select_tables
from headrace.errors import UserError
from headrace.protocols import LogIndex
from headrace.sources.postgres.catalog import Connection, list_tables, qualified, quoted, read_shapes
from headrace.sources.postgres.clauses import Clause, held_clauses, wanted_clauses
from headrace.sources.postgres.columns import Policy
from headrace.sources.postgres.connection import place
from headrace.sources.postgres.locks import unless_locked
from headrace.sources.postgres.preflight_tables import read_tables

logger = logging.getLogger("headrace.capture")

_FILTERS = "filters"


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
    """Return the tables' shapes as they are captured: without excluded columns, hashed ones as text.

    Raises UserError for a table whose changes cannot be captured.
    """
    shapes = read_shapes(db, tables, config.publication)
    _check_keys(db, config, tables)
    policy = Policy(config)
    for shape in shapes.values():
        taken = [column.name for column in shape.columns if column.name.lower() in RESERVED]
        if taken:
            raise UserError(
                f"Table {shape.table} has a column called {taken[0]}, a name that Headrace uses itself.",
                f'Rename it at the source, or exclude the table: "!{shape.table}".',
            )
    return [policy.shape(shapes[table]) for table in tables]


def _check_keys(db: Connection, config: SourceConfig, tables: Sequence[TableId]) -> None:
    known = {table.id: table for table in read_tables(db)}
    obstacles = [
        (table, clause, remedy) for table in tables for clause, remedy in known[table].key_obstacles()
    ]
    if obstacles:
        table, _, remedy = obstacles[0]
        raise UserError(
            f"Source {config.name}: "
            + "; ".join(f"table {name}: {clause}" for name, clause, _ in obstacles)
            + ".",
            f'{remedy} or leave it out: tables = […, "!{table}"].',
        )


def publish(db: Connection, config: SourceConfig, tables: Sequence[TableId]) -> bool:
    """Make the publication, or add what it lacks; never FOR ALL TABLES. Returns whether it did any.

    Raises UserError where the settings do not fit the tables, or the role has not the right.
    """
    capturable_shapes(db, config, tables)
    if mistakes := list(Policy(config).mistakes(list(read_shapes(db, tables).values()))):
        raise UserError(f"Source {config.name}: {'; '.join(mistakes)}.", "Mend it in headrace.toml.")
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
    held = held_clauses(db, config.publication)
    missing = [table for table in tables if table not in held]
    amended = amend(db, config, [table for table in tables if table in held])
    wanted = wanted_clauses(db, config, missing)
    missing = [table for table in missing if table in wanted]  # the others have gone meanwhile
    listed = ", ".join(wanted[table].after(table) for table in missing)
    if not found:
        members = f" FOR TABLE {listed}" if missing else ""
        statement = f"CREATE PUBLICATION {name}{members} WITH (publish_via_partition_root = true)"
        _run(db, config, [statement], missing)
    elif missing:
        _run(db, config, [f"ALTER PUBLICATION {name} ADD TABLE {listed}"], missing)
    return bool(not found or missing or amended)


def amend(db: Connection, config: SourceConfig, tables: Iterable[TableId]) -> list[TableId]:
    """Bring what the publication gives out of captured tables to what the settings say now, with an alert.

    Returns the tables of which it gives out something else from now on. Columns that it did not give out
    until now are not made good by that; other rows need a copy (`refiltered`). Raises UserError for a
    condition that cannot be published.
    """
    changed = _give_out(db, config, tables)
    for table, (now, clause) in changed.items():
        missed = "What it did not give out until now is not captured; `headrace verify` tells."
        if now.where != clause.where:
            missed = "It is copied again beside its stream."
        tell("PUBLICATION of %s changed from %s to %s. %s", table, now, clause, missed, source=config.name)
    return list(changed)


def refiltered(config: SourceConfig, log: LogIndex, tables: Iterable[TableId]) -> list[TableId]:
    """Return tables whose captured rows were chosen by another condition than `where` says now."""
    held = json.loads(log.note(_FILTERS) or "{}")
    wanted = _filters(config, tables)
    return [table for table in tables if held.get(str(table), wanted[str(table)]) != wanted[str(table)]]


def remember_filters(config: SourceConfig, log: LogIndex, tables: Iterable[TableId]) -> None:
    """Note the conditions by which the rows of captured tables are chosen from now on."""
    wanted = json.dumps(_filters(config, tables), ensure_ascii=False, sort_keys=True)
    if wanted != log.note(_FILTERS):
        log.set_note(_FILTERS, wanted)


def _filters(config: SourceConfig, tables: Iterable[TableId]) -> dict[str, str]:
    policy = Policy(config)
    return {str(table): policy.where(table) for table in tables}


def _give_out(
    db: Connection, config: SourceConfig, tables: Iterable[TableId]
) -> dict[TableId, tuple[Clause, Clause]]:
    """Publish tables that the publication holds as the settings say; returns what changed, from and to."""
    chosen = set(tables)
    held = {table: now for table, now in held_clauses(db, config.publication).items() if table in chosen}
    changed = {}
    for table, clause in wanted_clauses(db, config, list(held)).items():
        now = held[table]
        if now is None:
            if clause.where:
                raise UserError(
                    f"Source {config.name}: the publication {config.publication} holds {table} with its "
                    "whole schema, or with all tables: where has no effect there.",
                    "Let its owner make it anew, FOR TABLE with the tables by name.",
                )
        elif not now.same(clause) and _replace(db, config, table, now, clause):
            changed[table] = (now, clause)
    return changed


def _replace(db: Connection, config: SourceConfig, table: TableId, now: Clause, clause: Clause) -> bool:
    """Publish a table with another clause; False where that needs rights which we can do without."""
    name = quoted(config.publication)
    statements = [
        f"ALTER PUBLICATION {name} DROP TABLE {qualified(table)}",
        f"ALTER PUBLICATION {name} ADD TABLE {clause.after(table)}",
    ]
    try:
        _run(db, config, statements, [table])
    except UserError as error:
        enough = not now.columns or (clause.columns and set(clause.columns) <= set(now.columns))
        if now.where != clause.where or not enough:
            raise
        logger.info("%s is published with more columns, and cut down here: %s", table, error)
        return False
    return True


def _run(db: Connection, config: SourceConfig, statements: Sequence[str], tables: Sequence[TableId]) -> None:
    """Run statements in one transaction."""
    try:
        with unless_locked(db, f"Source {config.name}: publishing", tables), db.transaction():
            for statement in statements:
                db.execute(statement.encode())
    except psycopg.errors.ReadOnlySqlTransaction as error:
        raise UserError(
            f"Source {config.name}: a standby takes no publication.",
            f"Let an owner of the tables run on the primary: {'; '.join(statements)};",
        ) from error
    except psycopg.errors.InsufficientPrivilege as error:
        raise UserError(
            f"Source {config.name}: the role may not make the publication: {str(error).strip()}.",
            f"Let an owner of the tables run: {'; '.join(statements)};",
        ) from error


def withdraw(db: Connection, config: SourceConfig, tables: Iterable[TableId]) -> bool:
    """Take tables out of the publication, if that holds them by name, not with their schema or with all.

    What the role may not take out stays, with a warning. Returns whether any was taken out.
    """
    held, done = held_clauses(db, config.publication), False
    for table in tables:
        if held.get(table) is None:
            continue
        try:
            statement = f"ALTER PUBLICATION {quoted(config.publication)} DROP TABLE {qualified(table)}"
            _run(db, config, [statement], [table])
            done = True
        except UserError as error:
            logger.warning("%s is no longer captured, but still published: %s", table, error.paragraph())
    return done
