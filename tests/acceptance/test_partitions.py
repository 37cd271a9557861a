"""Partitions that come and go: no stream tells what rows they bring and take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from headrace.cli import main
from headrace.config import Project, load_project
from headrace.pipeline import Pipeline
from headrace.server import is_running, read_rows
from headrace.sources.postgres import follow
from headrace.testing.postgres import PostgresServer
from headrace.verify import verify
from pipelines import running, until

TABLES = """
CREATE TABLE parted (id int, region text, v text, PRIMARY KEY (id, region)) PARTITION BY LIST (region);
CREATE TABLE north PARTITION OF parted FOR VALUES IN ('n');
CREATE TABLE south PARTITION OF parted FOR VALUES IN ('s');
INSERT INTO parted SELECT g, CASE WHEN g % 2 = 0 THEN 'n' ELSE 's' END, 'v' FROM generate_series(1, 100) g;
CREATE TABLE other (id int PRIMARY KEY)"""
FILLED = """CREATE TABLE east (LIKE parted INCLUDING ALL);
INSERT INTO east SELECT g, 'e', 'old' FROM generate_series(1, 50) g"""
ATTACH = "ALTER TABLE parted ATTACH PARTITION east FOR VALUES IN ('e')"


class Source:
    """A database with a partitioned table, and a project that captures it."""

    def __init__(self, server: PostgresServer, name: str, folder: Path, more: str = "") -> None:
        server.psql(f"CREATE DATABASE {name}")
        self.url = server.url.removesuffix("postgres") + name
        self.folder = folder
        (folder / "headrace.toml").write_text(f'[source.shop]\nurl = "{self.url}"\nslot = "{name}"\n{more}')
        self.sql(TABLES)
        self.sync()

    @property
    def project(self) -> Project:
        return load_project(self.folder)

    def sql(self, statements: str) -> None:
        """Run statements in one transaction."""
        with psycopg.connect(self.url) as db:
            db.execute(statements.encode())

    def sync(self) -> None:
        Pipeline(self.project).run_once()

    def regions(self) -> dict[str, int]:
        query = "SELECT region, count(*) FROM shop.parted GROUP BY ALL"
        return {str(region): int(n) for region, n in read_rows(self.project, query)[1]}

    def resync(self) -> None:
        assert main(["tables", "resync", "parted", "--project", str(self.folder)]) == 0
        self.sync()

    def proved(self) -> None:
        report = verify(self.project)
        assert report.verified, [finding for finding in report.findings if not finding.ok]


@pytest.fixture(scope="module", params=[16, 18])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("pg"), request.param) as server:
        yield server


@pytest.fixture
def source(server: PostgresServer, tmp_path: Path, request: pytest.FixtureRequest) -> Source:
    return Source(server, request.node.originalname.removeprefix("test_")[:40], tmp_path)


def test_one_that_is_made_as_a_partition_came_empty(source: Source, caplog: pytest.LogCaptureFixture) -> None:
    source.sql("CREATE TABLE west PARTITION OF parted FOR VALUES IN ('w')")
    source.sql("INSERT INTO parted SELECT g, 'w', 'new' FROM generate_series(1, 10) g")
    source.sync()
    source.proved()
    assert "SCHEMA" not in caplog.text


@pytest.mark.parametrize("transactions", [(FILLED, ATTACH), (f"{FILLED}; {ATTACH}",)], ids=["two", "one"])
def test_one_that_is_attached_brings_its_rows(
    server: PostgresServer, tmp_path: Path, transactions: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    source = Source(server, f"attached_{len(transactions)}", tmp_path)
    for statements in transactions:
        source.sql(statements)
    source.sync()
    assert "SCHEMA of public.parted changed: partitions were attached: public.east" in caplog.text
    source.proved()
    assert source.regions()["e"] == 50


def test_one_that_is_attached_in_a_project_that_copies_nothing_by_itself_is_told(
    server: PostgresServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = Source(server, "alert", tmp_path, 'on_rewrite = "alert"\n')
    source.sql(f"{FILLED}; {ATTACH}")
    source.sync()
    assert "`headrace tables resync public.parted`" in caplog.text
    assert "e" not in source.regions()
    source.resync()
    source.proved()


def test_one_that_is_attached_before_the_first_look_is_seen(
    server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the trees were is known from before the copy."""
    with monkeypatch.context() as patched:
        patched.setattr(follow, "changed_partitions", lambda *_: ())
        source = Source(server, "first_look", tmp_path)
    source.sql(f"{FILLED}; {ATTACH}")
    source.sync()
    source.proved()


def test_one_that_was_away_meanwhile_may_have_other_rows(source: Source) -> None:
    source.sql("ALTER TABLE parted DETACH PARTITION north")
    source.sql("DELETE FROM north WHERE id < 50")
    source.sql("ALTER TABLE parted ATTACH PARTITION north FOR VALUES IN ('n')")
    source.sync()
    source.proved()


def test_one_with_partitions_of_its_own_is_attached_once(
    source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    source.sql(
        "CREATE TABLE mid (LIKE parted INCLUDING ALL) PARTITION BY LIST (id); "
        "CREATE TABLE mid_1 PARTITION OF mid FOR VALUES IN (1); INSERT INTO mid VALUES (1, 'm', 'old'); "
        "ALTER TABLE parted ATTACH PARTITION mid FOR VALUES IN ('m')"
    )
    source.sync()
    assert caplog.text.count("attached: public.mid") == 1
    source.sql(
        "CREATE TABLE mid_2 PARTITION OF mid FOR VALUES IN (2); INSERT INTO parted VALUES (2, 'm', 'new')"
    )
    source.sync()
    assert caplog.text.count("SCHEMA") == 1
    source.proved()


def test_what_is_detached_or_dropped_stays_until_it_is_copied_again(
    source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    """Who drops old partitions to make room does not have the whole table copied each time."""
    source.sql("ALTER TABLE parted DETACH PARTITION south; DROP TABLE north")
    source.sync()
    assert "PARTITIONS of public.parted were detached or dropped: public.north, public.south" in caplog.text
    assert "SCHEMA" not in caplog.text
    assert source.regions() == {"n": 50, "s": 50}
    source.resync()
    assert source.regions() == {}
    source.proved()


def test_a_lock_on_a_partition_stops_no_other_table(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "WATCH_EVERY", 1.0)
    count = "SELECT count(*) FROM shop.other"

    def arrives(n: int) -> None:
        source.sql(f"INSERT INTO other VALUES ({n})")
        until(lambda: next(iter(read_rows(source.project, count)[1]))[0] == n, 15)

    with running(source.project) as pipeline, psycopg.connect(source.url) as application:
        until(lambda: is_running(source.project))
        arrives(1)  # what is asked at the start is done
        source.sql(f"{FILLED}; {ATTACH}")
        application.execute("LOCK TABLE ONLY north, ONLY east IN ACCESS EXCLUSIVE MODE")
        for n in (2, 3, 4):
            time.sleep(1.5)
            arrives(n)
        assert "shop.capture" not in pipeline.status()["waiting"]
        application.rollback()
        until(lambda: source.regions().get("e") == 50, 60, "it is seen once the lock is gone")
