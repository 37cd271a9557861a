"""What may happen to a table between the slot's snapshot and its turn in the copy, and to a publication."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from headrace.config import load_project
from headrace.errors import HeadraceError, SourceGap
from headrace.pipeline import Pipeline
from headrace.testing.postgres import PostgresServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("hazards") / "pg") as running:
        yield running


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
