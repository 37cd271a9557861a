"""SQL over raw tables and the destination's, in one DuckDB session of this process.

Raw is read from staging, beside a running pipeline or without one. Tables of the destination that a query
names are copied into the session batch by batch, in one read transaction, so that the destination is held no
longer than that, whatever it is; raw then counts up to where the destination stands.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from headrace.change import Offset
from headrace.config import Project
from headrace.destinations.duckdb import QUERY_MEMORY, refuse_writing
from headrace.errors import HeadraceError, UserError
from headrace.keys import literal, quoted
from headrace.log.sqlite import SQLiteLog
from headrace.protocols import Scanned
from headrace.raw import CATALOGS
from headrace.raw.place import AsOf, place_of
from headrace.raw.views import Wanted, relation
from headrace.server import scan
from headrace.staging.delta import DeltaStaging
from headrace.staging.named import find_tables

_BATCH = 10_000
_PART = re.compile(r'"(?:[^"]|"")*"')


@dataclass(frozen=True, slots=True)
class Names:
    """The tables that a query names: raw ones by catalog, source and label, others by their quoted names."""

    raw: tuple[tuple[str, str, str], ...]
    others: tuple[str, ...]


def names_in(sql: str) -> Names:
    """Find the tables that a query names. Raises UserError for anything but a query."""
    refuse_writing([sql])
    with duckdb.connect() as db:
        ((text,),) = db.execute("SELECT json_serialize_sql($1)", [sql]).fetchall()
    tree = json.loads(text)
    if tree["error"]:
        raise UserError(f"{tree['error_message']}.", "Raw tables are read by SELECT.")
    tables, named = set[tuple[str, str, str]](), set[str]()
    for node in _nodes(tree):
        if node.get("type") == "BASE_TABLE":
            tables.add((node["catalog_name"], node["schema_name"], node["table_name"]))
        if isinstance(node.get("cte_map"), dict):
            named.update(entry["key"].lower() for entry in node["cte_map"]["map"])
    raw = sorted((c.lower(), s, t) for c, s, t in tables if c.lower() in CATALOGS)
    others = sorted(
        ".".join(map(quoted, filter(None, table)))
        for table in tables
        if table[0].lower() not in CATALOGS and (table[1] or table[2].lower() not in named)
    )
    return Names(tuple(raw), tuple(others))


def _nodes(tree: object) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
    for inner in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _nodes(inner)


class Session:
    """One DuckDB session over the raw tables of a project; a context manager, which gives back the files."""

    def __init__(self, project: Project) -> None:
        self._project = project
        self._kept = ExitStack()
        self._opened: dict[str, tuple[SQLiteLog, DeltaStaging]] = {}
        spill = self._kept.enter_context(tempfile.TemporaryDirectory(prefix="headrace-query-"))
        self.db = self._kept.enter_context(closing(duckdb.connect()))
        for setting in (
            "TimeZone = 'UTC'",
            "enable_progress_bar = false",
            f"memory_limit = '{QUERY_MEMORY}B'",
            f"temp_directory = {literal(spill)}",
            # It would lift a cast that occurs twice out of its TRY.
            "disabled_optimizers = 'common_subexpressions'",
        ):
            self.db.execute(f"SET {setting}")

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back what it opened."""
        self._kept.close()

    def source(self, name: str) -> tuple[SQLiteLog, DeltaStaging]:
        """Open log and staging of a source to read them. Raises UserError for an unknown one."""
        if name not in self._opened:
            known = [source.name for source in self._project.sources]
            path = self._project.log_path(name)
            if name not in known:
                raise UserError(f"There is no [source.{name}].", f"Sources are: {', '.join(known)}.")
            log = self._kept.enter_context(closing(SQLiteLog(path, read_only=True)))
            staging = DeltaStaging(self._project.staging_path(name), name, log.id, read_only=True)
            staging.follow(log)
            self._opened[name] = log, staging
        return self._opened[name]

    def relation(self, catalog: str, source: str, label: str, as_of: AsOf | None, after: Offset = 0) -> str:
        """Return the query that is a raw table. Raises UserError for an unknown table or place."""
        log, staging = self.source(source)
        ((_, table), *_) = find_tables({source: staging}, source, label)
        return relation(
            self.db, staging, Wanted(source, table, place_of(log, staging, as_of), after), catalog
        )

    def view(self, catalog: str, source: str, label: str, as_of: AsOf | None) -> None:
        """Let a raw table be read by its name."""
        query = self.relation(catalog, source, label, as_of)
        self.db.execute(f"ATTACH IF NOT EXISTS ':memory:' AS {catalog}")
        self.db.execute(f"CREATE SCHEMA IF NOT EXISTS {catalog}.{quoted(source)}")
        self.db.execute(f"CREATE VIEW {catalog}.{quoted(source)}.{quoted(label)} AS {query}")

    def take(self, tables: Sequence[str]) -> dict[str, Offset]:
        """Copy tables of the destination, by their quoted names, into the session; returns how far each
        source was applied to them. Raises what `headrace.server.scan` raises."""
        typed = self._project.destination.type == "duckdb"
        queries = ['SELECT source, "offset" FROM headrace.progress']
        for table in tables:
            if len(_PART.findall(table)) > 2:
                raise UserError(f"{table} names a database.", "Leave it out: write schema.table.")
            queries += [f"SELECT column_name, column_type FROM (DESCRIBE {table})"] if typed else []
            queries.append(f"SELECT * FROM {table}")
        with scan(self._project, queries) as results:
            progress = {row["source"]: int(row["offset"]) for row in _rows(next(results))}
            for table in tables:
                types = (
                    {row["column_name"]: row["column_type"] for row in _rows(next(results))} if typed else {}
                )
                self._fill(table, types, next(results))
        return progress

    def _fill(self, table: str, types: Mapping[str, str], rows: Scanned) -> None:
        """Make a table of rows that come batch by batch; Arrow alone does not tell every type."""
        schema, batches = rows
        if len(parts := _PART.findall(table)) > 1:
            self.db.execute(f"CREATE SCHEMA IF NOT EXISTS {parts[0]}")
        _hr_batch = schema.empty_table()
        cells = ", ".join(
            f"{quoted(name)}::{types[name]} AS {quoted(name)}" if name in types else quoted(name)
            for name in schema.names
        )
        self.db.execute(f"CREATE TABLE {table} AS SELECT {cells} FROM _hr_batch")
        for batch in batches:
            _hr_batch = pa.Table.from_batches([batch])
            self.db.execute(f"INSERT INTO {table} SELECT * FROM _hr_batch")

    def reader(self, sql: str) -> pa.RecordBatchReader:
        """Run a query and return its result, read batch by batch; the session closes at its end.

        Raises UserError for what the engine says of it.
        """
        try:
            found = self.db.sql(sql).to_arrow_reader(_BATCH)
        except duckdb.Error as error:
            raise _told(error) from error
        return pa.RecordBatchReader.from_batches(found.schema, self._batches(found))

    def _batches(self, found: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
        with self:
            try:
                yield from found
            except (
                duckdb.Error,
                pa.ArrowException,
                OSError,
            ) as error:  # Arrow passes an engine's on as these
                raise _told(error) from error


def read_query(project: Project, sql: str, as_of: AsOf | None = None) -> pa.RecordBatchReader:
    """Run a query over raw tables, and tables of the destination beside them, read batch by batch.

    Raises UserError for anything but a query, for an unknown table or place, and for a table of the
    destination as of a place.
    """
    names = names_in(sql)
    if as_of is not None and (names.others or not names.raw):
        what = (
            f"{', '.join(names.others)} is"
            if names.others
            else "Only tables of the destination are named; each is"
        )
        raise UserError(
            f"{what} only there as it is now: a place is for raw tables.",
            f"Read {', '.join(CATALOGS)} tables, or leave out the place: raw then counts up to where the "
            "destination stands.",
        )
    session = Session(project)
    try:
        stands = session.take(names.others) if names.others else {}
        for catalog, source, label in names.raw:
            session.view(catalog, source, label, stands.get(source) if as_of is None else as_of)
        return session.reader(sql)
    except duckdb.Error as error:
        session.close()
        raise _told(error) from error
    except BaseException:
        session.close()
        raise


def _rows(result: Scanned) -> list[dict[str, Any]]:
    return [row for batch in result[1] for row in batch.to_pylist()]


def _told(error: Exception) -> HeadraceError:
    words = str(error)
    if isinstance(error, duckdb.IOException | FileNotFoundError) or ".parquet" in words:
        return HeadraceError(
            "A file of staging was replaced while it was read.",
            "Run it again; for queries that take long, raise [staging] grace.",
        )
    return UserError(words.strip().split("\n\nLINE")[0])
