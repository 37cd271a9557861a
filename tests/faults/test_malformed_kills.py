"""What does not decode, with the pipeline killed at every step of its way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from harness import make_project, run_once, said, start

from corrupting import corrupting
from headrace.cli import main
from headrace.payload import decode_rows
from headrace.pipeline import open_lanes
from headrace.server import read_rows
from headrace.testing.postgres import PostgresServer
from headrace.verify import verify

POINTS = (
    ("log.append.committed", 1),
    ("staging.data_synced", 2),
    ("staging.committed", 1),
    ("staging.commit_synced", 1),
    ("staging.commit_synced", 2),
    ("destination.apply.commit", 1),
    ("destination.apply.committed", 1),
)
"""Failpoints and their passages: a load writes what does not decode, and then two tables."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("pg"), 16) as server:
        yield server


def test_bytes_and_record_are_there_once_whenever_it_dies(server: PostgresServer, tmp_path: Path) -> None:
    with (
        corrupting(server, lambda message: message + b"\0" if b"damaged" in message else message) as proxy,
        psycopg.connect(server.url, autocommit=True) as db,
    ):
        for table in "tu":
            db.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, v text)")
        project = make_project(tmp_path, proxy.url)
        run_once(project)
        for n, (point, passage) in enumerate(POINTS):
            with db.transaction():
                db.execute("INSERT INTO u VALUES (%s, 'good')", [n])
                db.execute("INSERT INTO t VALUES (%s, 'damaged')", [n])
                db.execute("INSERT INTO t VALUES (%s, 'good')", [1000 + n])
            process = start(project, "run_once", failpoints=f"{point}=kill@{passage}")
            assert process.wait(60) == -9, f"passage {passage} of {point} was never reached: {said(project)}"
        run_once(project)

        count = len(POINTS)
        (lane,) = open_lanes(project, read_only=True)
        entries = [item.entry for item in lane.log.read(0, 1 << 40) if item.entry.kind == "undecodable"]
        logged = [
            message for entry in entries for message in decode_rows(entry.payload)["message"].to_pylist()
        ]
        staged = lane.staging.undecodable(entries[0].table, 0, lane.staging.through(), whole=True)  # type: ignore[arg-type]
        assert Counter(staged["message"].to_pylist()) == Counter(logged)
        assert sorted(Counter(logged).values()) == [1] * count
        for model, rows in (("shop.t", count), ("shop.u", count)):
            assert [tuple(row) for row in read_rows(project, f"SELECT count(*) FROM {model}")[1]] == [(rows,)]
        ((records, positions),) = read_rows(
            project, "SELECT count(*), count(DISTINCT (commit, ordinal)) FROM headrace.quarantine"
        )[1]
        assert (records, positions) == (count, count)
        wrong = [finding.what for finding in verify(project).findings if not finding.ok]
        assert wrong == ["source table public.t = staging"]

        assert main(["tables", "resync", "t", "--project", str(project.root)]) == 0
        run_once(project)
        ((status,),) = read_rows(project, "SELECT DISTINCT status FROM headrace.quarantine")[1]
        assert status == "superseded"
        assert [finding for finding in verify(project).findings if not finding.ok] == []
