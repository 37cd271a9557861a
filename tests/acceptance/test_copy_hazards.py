"""What may happen to a table between the slot's snapshot and its turn in the copy, and to a publication."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from headrace.config import Secret, load_project, source_config
from headrace.errors import HeadraceError, SourceGap, SourceUnavailable
from headrace.pipeline import Pipeline
from headrace.sources.postgres.catalog import read_shapes
from headrace.sources.postgres.columns import Policy
from headrace.sources.postgres.connection import connect, connect_bulk, connect_replication
from headrace.sources.postgres.copy import copy_tables
from headrace.testing.postgres import PostgresServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("hazards") / "pg") as running:
        yield running


@pytest.mark.parametrize("statement", ["ALTER TABLE %s ALTER v TYPE int USING v::int", "TRUNCATE %s"])
@pytest.mark.parametrize("table", ["plain", "parted"])
def test_a_table_rewritten_after_the_snapshot_is_not_taken_as_empty(
    server: PostgresServer, table: str, statement: str
) -> None:
    server.psql("DROP TABLE IF EXISTS plain, parted")
    server.psql("CREATE TABLE plain (id int PRIMARY KEY, v text)")
    server.psql("CREATE TABLE parted (id int PRIMARY KEY, v text) PARTITION BY HASH (id)")
    server.psql("CREATE TABLE parted_0 PARTITION OF parted FOR VALUES WITH (MODULUS 1, REMAINDER 0)")
    server.psql("INSERT INTO plain VALUES (1, '1'); INSERT INTO parted VALUES (1, '1')")
    policy = Policy(source_config("shop", Secret(server.url)))
    with connect(server.url) as db:
        (shape,) = read_shapes(db, [t for t in _tables(db) if t.name == table]).values()
    for rewritten in (False, True):
        with connect_replication(server.url) as holder, connect_bulk(server.url) as bulk:
            made = holder.pgconn.exec_(
                b"CREATE_REPLICATION_SLOT hazard TEMPORARY LOGICAL pgoutput (SNAPSHOT 'export')"
            )
            with bulk.cursor() as cursor:
                cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                cursor.execute(f"SET TRANSACTION SNAPSHOT '{made.get_value(0, 2).decode()}'")
            if rewritten:
                server.psql(statement % table)
                with pytest.raises(SourceUnavailable, match="rewritten during its copy"):
                    list(copy_tables(bulk, [shape], policy, 1))
            else:
                assert (
                    sum(entry.rows for group in copy_tables(bulk, [shape], policy, 1) for entry in group) == 2
                )


def test_a_publication_that_leaves_changes_out_and_a_key_that_changes_are_refused(
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
        db.execute("UPDATE keyed SET id = 2")
    with pytest.raises(SourceGap, match=r"key of table public\.keyed changed"):
        Pipeline(project).run_once()


def _tables(db: psycopg.Connection) -> list:
    from headrace.sources.postgres.catalog import list_tables

    return list_tables(db)
