"""Maintenance of staging in a running pipeline, on a real Postgres."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from deltalake import DeltaTable

from headrace.cli import main
from headrace.config import Project, load_project
from headrace.pipeline import Pipeline
from headrace.testing.postgres import PostgresServer
from headrace.verify import verify
from pipelines import running, until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("pg")) as made:
        yield made


@pytest.fixture
def db(server: PostgresServer, request: pytest.FixtureRequest) -> Iterator[psycopg.Connection[object]]:
    name = request.node.name[:60]
    server.psql(f'CREATE DATABASE "{name}"')
    with psycopg.connect(server.url.removesuffix("postgres") + name, autocommit=True) as made:
        made.execute("CREATE TABLE t (id int PRIMARY KEY, note text)")
        made.execute("INSERT INTO t SELECT g, 'n' || g FROM generate_series(1, 100) g")
        yield made


@pytest.fixture
def project(db: psycopg.Connection[object], server: PostgresServer, tmp_path: Path) -> Project:
    name = db.info.dbname
    (tmp_path / "headrace.toml").write_text(
        f'[source.shop]\nurl = "{server.url.removesuffix("postgres") + name}"\nslot = "{name[:50]}"\n'
        f'publication = "{name}"\n[staging]\ngrace = "0s"\nmaintenance_cpu = 1.0\n'
    )
    return load_project(tmp_path)


def table(project: Project) -> DeltaTable:
    return DeltaTable(project.staging.path / "raw/shop/public/t")


def command(project: Project, capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(["staging", *arguments, "--project", str(project.root)]) == code
    out, err = capsys.readouterr()
    return err if code else out


def rows(project: Project, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in command(project, capsys, *arguments, "--json").splitlines()]


def test_the_raw_tables_their_columns_and_what_they_were(
    project: Project, db: psycopg.Connection[object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "run" in command(project, capsys, "ls")
    Pipeline(project).run_once()
    for change in (
        "ALTER TABLE t ADD COLUMN price numeric(9,2)",
        "ALTER TABLE t ALTER COLUMN id TYPE bigint",
        "ALTER TABLE t DROP COLUMN note",
    ):
        db.execute(change)
        db.execute("INSERT INTO t (id, price) SELECT max(id) + 1, 1.5 FROM t")
        Pipeline(project).run_once()

    (listed,) = rows(project, capsys, "ls")
    assert (listed["table"], listed["rows"] >= 103, listed["files"] >= 4) == ("public.t", True, True)
    assert listed["first"] < listed["last"] <= listed["staged_through"]
    assert listed["committed_at"].startswith("20")
    assert DeltaTable(listed["path"]).to_pyarrow_table().num_rows == listed["rows"]
    assert rows(project, capsys, "schema", "t") == [
        {"column": "id", "type": "bigint", "not_null": False, "key": 1, "captured": True},
        {"column": "price", "type": "numeric(9,2)", "not_null": False, "key": None, "captured": True},
        {"column": "note", "type": None, "not_null": False, "key": None, "captured": False},
    ]
    told = [(row["kind"], row["what"]) for row in rows(project, capsys, "history", "public.t")]
    assert told[:3] == [
        ("shape", "2 columns, key (id)"),
        ("copy", "begun"),
        ("copied", "100 rows"),
    ]
    assert told[3:] == [
        ("column_added", "price added: numeric(9,2)"),
        ("type_widened", "id: integer is bigint"),
        ("column_dropped", "note dropped"),
    ]
    assert "note dropped" in command(project, capsys, "history", "t")
    assert "There are: t." in command(project, capsys, "schema", "nope", code=2)
    assert "There are: shop." in command(project, capsys, "schema", "t", "--source", "other", code=2)


def test_compaction_at_once_with_and_without_a_pipeline(
    project: Project, db: psycopg.Connection[object], capsys: pytest.CaptureFixture[str]
) -> None:
    Pipeline(project).run_once()
    for _ in range(3):
        db.execute("UPDATE t SET note = note || '.' WHERE id <= 3")
        Pipeline(project).run_once()
    before = table(project).to_pyarrow_table().sort_by([("_offset", "ascending"), ("_ordinal", "ascending")])
    (done,) = rows(project, capsys, "compact", "t")
    assert (done["source"], done["table"], done["files_before"], done["files"]) == ("shop", "public.t", 4, 1)
    after = table(project).to_pyarrow_table()
    assert after.select(before.column_names).equals(before)
    with running(project) as pipeline:
        end = pipeline.lanes[0].staging.through()
        db.execute("UPDATE t SET note = 'x' WHERE id = 1")
        until(lambda: pipeline.lanes[0].staging.through() > end)
        assert [row["files_before"] for row in rows(project, capsys, "compact")] == [2]
        assert "There are: t." in command(project, capsys, "compact", "nope", code=2)
    assert len(table(project).file_uris()) == 1
    assert verify(project).verified


def test_files_are_merged_beside_loads_and_applies(
    project: Project, db: psycopg.Connection[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.pipeline.EVERY", 0.05)
    monkeypatch.setattr("headrace.staging.maintenance.FAN", 3)
    monkeypatch.setattr("headrace.staging.maintenance.CHECKPOINT_EVERY", 5)
    with running(project) as pipeline:
        (lane,) = pipeline.lanes
        for i in range(30):
            db.execute("UPDATE t SET note = note || %s WHERE id <= 3", [str(i)])
            end = lane.staging.through()
            until(lambda end=end: lane.staging.through() > end, what="nothing is loaded")
        until(lambda: len(table(project).file_uris()) < 10, what="nothing is merged")
        until(lambda: list((project.staging.path / "raw/shop/public/t/_delta_log").glob("*checkpoint*")))
    report = verify(project)
    assert report.verified, report
    Pipeline(project).run_once()
    folder = project.staging.path / "raw/shop/public/t"
    assert len(list(folder.glob("*.parquet"))) == len(table(project).file_uris()) < 10
