"""Maintenance of staging in a running pipeline, on a real Postgres."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from deltalake import DeltaTable

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
