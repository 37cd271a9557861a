"""What may happen to a table between the snapshots of its copy, and to a publication."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import psycopg
import pytest

from headrace.change import CopyMark, Position, TableId
from headrace.cli import main
from headrace.config import Project, load_project
from headrace.errors import HeadraceError
from headrace.log.sqlite import SQLiteLog
from headrace.pipeline import Pipeline
from headrace.server import read_rows
from headrace.sources.postgres.tables import TableState, read_states
from headrace.testing.postgres import PostgresServer
from headrace.verify import verify
from pipelines import running, until

BAG = """
CREATE TABLE bag (a int, b text, filler text);
ALTER TABLE bag REPLICA IDENTITY FULL;
INSERT INTO bag SELECT n % 40, CASE n % 3 WHEN 0 THEN NULL ELSE 'b' || n % 3 END, repeat('f', 100)
FROM generate_series(1, 8000) n;
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("hazards") / "pg") as running:
        yield running


def made(server: PostgresServer, folder: Path, database: str, definition: str, *lines: str) -> Project:
    """A project over a database of its own, copied in small chunks."""
    server.psql(f"CREATE DATABASE {database}")
    server.psql(definition, database)
    url = server.url.removesuffix("postgres") + database
    settings = [f'url = "{url}"', f'slot = "{database}"', 'chunk_bytes = "64KiB"', *lines]
    (folder / "headrace.toml").write_text("\n".join(["[source.shop]", *settings, ""]))
    return load_project(folder)


def chunks(log: SQLiteLog) -> list[tuple[Position, CopyMark]]:
    return [(at, mark) for _, _, at, _, mark in log.copy_marks() if mark.kind == "chunk"]


def state_of(project: Project, table: str) -> TableState:
    log = SQLiteLog(project.state / "log" / "shop.db", read_only=True)
    try:
        return read_states(log)[TableId("public", table)]
    finally:
        log.close()


def rows_of(project: Project, query: str) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in read_rows(project, query)[1]]


def proved(project: Project) -> None:
    assert not [finding for finding in verify(project).findings if not finding.ok]


def test_equal_rows_are_counted_while_writers_disturb_their_copy(
    server: PostgresServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    project = made(server, tmp_path, "counted", BAG, 'copy_rate = "1MiB"')
    chance = random.Random(3)
    one_of = "ctid = (SELECT ctid FROM bag WHERE a = {} LIMIT 1)"
    url = project.sources[0].url.reveal()
    with running(project) as pipeline, psycopg.connect(url, autocommit=True) as db:
        log = pipeline.lanes[0].log
        until(lambda: len(chunks(log)) >= 2, 60)
        while read_states(log)[TableId("public", "bag")].stage != "live":
            key = chance.randrange(40)
            db.execute("INSERT INTO bag SELECT * FROM bag WHERE a = %s LIMIT 3", [key])
            db.execute(f"DELETE FROM bag WHERE {one_of.format(chance.randrange(40))}".encode())
            db.execute(f"UPDATE bag SET a = {key} WHERE {one_of.format(chance.randrange(40))}".encode())
            db.execute("UPDATE bag SET b = b WHERE a = %s AND b IS NULL", [key])
        done = chunks(log)
        assert len(done) > 5
        assert len({at.commit for at, _ in done}) == 1, "blocks hold under one snapshot only"
    Pipeline(project).run_once()
    proved(project)
    ((key,),) = rows_of(project, "SELECT max(_source_key) FROM shop.bag WHERE a = 7 AND b = 'b1'")
    with duckdb.connect(str(project.destination.path)) as table:
        table.execute(
            "DELETE FROM shop.bag WHERE rowid IN (SELECT rowid FROM shop.bag WHERE _source_key = ? LIMIT 2)",
            [key],
        )
    assert main(["tables", "resync", "bag", "--project", str(tmp_path)]) == 0
    with caplog.at_level("INFO"):
        Pipeline(project).run_once()
    assert ": 0 added, 0 removed, 1 changed" in caplog.text, "the key whose count differs"
    proved(project)


def test_a_copy_that_one_snapshot_cannot_hold_fails_with_the_reason(
    server: PostgresServer, tmp_path: Path
) -> None:
    slow = 'copy_rate = "512KiB"\nmax_snapshot_age = "1s"'
    project = made(server, tmp_path, "outlived", BAG, slow)
    Pipeline(project).run_once()
    state = state_of(project, "bag")
    assert state.stage == "failed"
    assert "takes longer than max_snapshot_age" in state.reason
    text = (tmp_path / "headrace.toml").read_text().replace(slow, "")
    (tmp_path / "headrace.toml").write_text(text)
    assert main(["tables", "resync", "bag", "--project", str(tmp_path)]) == 0
    Pipeline(load_project(tmp_path)).run_once()
    proved(load_project(tmp_path))


def test_a_truncate_between_two_snapshots_takes_no_later_row_with_it(
    server: PostgresServer, tmp_path: Path
) -> None:
    """While nobody reads: no snapshot is there that shows the table empty."""
    definition = "CREATE TABLE t (id int PRIMARY KEY, v text);"
    rows = "INSERT INTO t SELECT n, repeat('v', 100) FROM generate_series({}, {}) n"
    project = made(server, tmp_path, "emptied", definition + rows.format(1, 8000), 'copy_rate = "512KiB"')
    with running(project) as pipeline:
        log = pipeline.lanes[0].log
        until(lambda: len(chunks(log)) >= 3, 60)
    assert state_of(project, "t").stage == "copying"
    server.psql("TRUNCATE t", "emptied")
    server.psql(rows.format(7000, 7999), "emptied")
    Pipeline(project).run_once()
    assert rows_of(project, "SELECT count(*), min(id) FROM shop.t") == [(1000, 7000)]
    proved(project)


def test_a_publication_that_leaves_changes_out_is_refused_and_a_key_that_changes_is_followed(
    server: PostgresServer, tmp_path: Path
) -> None:
    (tmp_path / "headrace.toml").write_text(
        f'[source.shop]\nurl = "{server.url}"\ntables = ["public.keyed"]\n'
    )
    project = load_project(tmp_path)
    server.psql("CREATE TABLE keyed (id int PRIMARY KEY, other int NOT NULL UNIQUE)")
    server.psql("INSERT INTO keyed VALUES (1, 10)")
    server.psql("CREATE PUBLICATION headrace_shop FOR TABLE keyed WITH (publish = 'insert')")
    with pytest.raises(HeadraceError, match="leaves changes out"):
        Pipeline(project).run_once()
    server.psql("DROP PUBLICATION headrace_shop")
    Pipeline(project).run_once()
    with psycopg.connect(server.url, autocommit=True) as db:
        db.execute("ALTER TABLE keyed DROP CONSTRAINT keyed_pkey, ADD PRIMARY KEY (other)")
        db.execute("UPDATE keyed SET id = 2; INSERT INTO keyed VALUES (2, 11)")
    Pipeline(project).run_once()
    assert rows_of(project, "SELECT id, other FROM shop.keyed ORDER BY other") == [(2, 10), (2, 11)]
    proved(project)
