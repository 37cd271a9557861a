"""Reading from a standby, and slots that a failover takes along."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from headrace.config import Project, load_project
from headrace.errors import UserError
from headrace.pipeline import Pipeline
from headrace.sources.postgres.health import slot_health
from headrace.sources.postgres.preflight import inspect
from headrace.testing.postgres import PostgresServer
from headrace.testing.standby import Standby
from headrace.verify import verify
from pipelines import running, until


class Pair(NamedTuple):
    primary: PostgresServer
    standby: Standby


@pytest.fixture(scope="module", params=[16, 18])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    with PostgresServer(folder / "primary", request.param) as primary:
        primary.psql("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a')")
        with Standby(primary, folder / "standby") as standby:
            yield Pair(primary, standby)


def make_project(folder: Path, url: str, more: str = "") -> Project:
    (folder / "headrace.toml").write_text(
        f'[source.shop]\nurl = "{url}"\ntables = ["public.t"]\nheartbeat = "200ms"\n{more}'
    )
    return load_project(folder)


def findings(project: Project) -> dict[str, str]:
    return {found.what: found.level for found in inspect(project.sources[0])}


def level(found: dict[str, str], words: str) -> str:
    (level,) = [level for what, level in found.items() if words in what]
    return level


def confirmed(server: PostgresServer, lsn: str) -> bool:
    """Whether everything before an LSN is captured."""
    query = (
        f"SELECT confirmed_flush_lsn >= '{lsn}' FROM pg_replication_slots WHERE slot_name = 'headrace_shop'"
    )
    return server.psql(query) == "t"


@contextmanager
def snapshots_logged(primary: PostgresServer) -> Iterator[None]:
    """Let an idle primary log its running transactions, which a slot on its standby waits for."""
    done = threading.Event()

    def log() -> None:
        while not done.wait(0.5):
            primary.psql("SELECT pg_log_standby_snapshot()")

    thread = threading.Thread(target=log)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_a_standby_is_read_without_writing_to_it(pair: Pair, tmp_path: Path) -> None:
    primary, standby = pair
    project = make_project(tmp_path, standby.url)
    found = findings(project)
    assert level(found, "is on a standby, which takes it from its primary") == "fail"
    assert level(found, "a standby that can be read from") == "ok"
    with pytest.raises(UserError, match="standby takes no publication"):
        Pipeline(project).run_once()

    primary.psql("CREATE PUBLICATION headrace_shop FOR TABLE t WITH (publish_via_partition_root)")
    standby.catch_up()
    assert "fail" not in findings(project).values()
    with snapshots_logged(primary):
        Pipeline(project).run_once()
    primary.psql("INSERT INTO t VALUES (2, 'b')")
    standby.catch_up()
    Pipeline(project).run_once()
    with snapshots_logged(primary):
        report = verify(project)
    assert all(finding.ok for finding in report.findings)
    assert primary.psql("SELECT count(*) FROM pg_replication_slots WHERE slot_type = 'logical'") == "0"

    # Nothing of ours is written, so only the server's word moves the slot while others write.
    pipeline = Pipeline(project)
    thread = threading.Thread(target=pipeline.run)
    thread.start()
    before = slot_health(standby.url, "headrace_shop")
    assert before.confirmed_flush_lsn is not None
    primary.psql("CREATE TABLE other AS SELECT g FROM generate_series(1, 10000) g")
    written = primary.psql("SELECT pg_current_wal_lsn()")
    confirmed = (
        f"SELECT confirmed_flush_lsn >= '{written}' FROM pg_replication_slots WHERE slot_name LIKE 'h%'"
    )
    until(lambda: standby.psql(confirmed) == "t")
    assert slot_health(standby.url, "headrace_shop").active
    pipeline.stop.set()
    thread.join()

    standby.psql("ALTER SYSTEM SET hot_standby_feedback = off")
    standby.psql("SELECT pg_reload_conf()")
    until(lambda: standby.psql("SHOW hot_standby_feedback") == "off")
    assert level(findings(project), "hot_standby_feedback is off") == "fail"
    standby.psql("ALTER SYSTEM RESET hot_standby_feedback")
    standby.psql("SELECT pg_reload_conf()")
    standby.psql("SELECT pg_drop_replication_slot('headrace_shop')")
    primary.psql("DROP PUBLICATION headrace_shop; DROP TABLE other")
    until(lambda: standby.psql("SHOW hot_standby_feedback") == "on")


def test_a_failover_slot_outlives_its_primary(pair: Pair, tmp_path: Path) -> None:
    primary, standby = pair
    if primary.version < 17:
        project = make_project(tmp_path, primary.url, "failover = true\n")
        assert level(findings(project), "Postgres 16 has no failover slots") == "fail"
        return
    ours = "SELECT failover FROM pg_replication_slots WHERE slot_name = 'headrace_shop'"
    project = make_project(tmp_path, primary.url, "failover = false\n")
    Pipeline(project).run_once()
    assert primary.psql(ours) == "f"
    project = make_project(tmp_path, primary.url, f'standby_url = "{standby.url}"\n')
    Pipeline(project).run_once()
    assert primary.psql(ours) == "t"

    found = findings(project)
    assert level(found, "synchronized_standby_slots is empty") == "warn"
    primary.psql("ALTER SYSTEM SET synchronized_standby_slots = 'standby'")
    primary.psql("SELECT pg_reload_conf()")

    with running(project), snapshots_logged(primary):
        until(lambda: any("would outlive a failover" in what for what in findings(project)))
    assert "fail" not in findings(project).values()
    assert not any("synchronized_standby_slots" in what for what in findings(project))
    standby.psql("ALTER SYSTEM SET sync_replication_slots = off")
    standby.psql("ALTER SYSTEM SET primary_slot_name = ''")
    standby.psql("SELECT pg_reload_conf()")
    until(lambda: standby.psql("SHOW sync_replication_slots") == "off")
    broken = findings(project)
    assert level(broken, "sync_replication_slots is off") == "fail"
    assert level(broken, "primary_slot_name is empty") == "fail"

    primary.kill()
    assert level(findings(project), "cannot be reached") == "fail"
    standby.promote()
    standby.psql("INSERT INTO t VALUES (-1, 'after the failover')")
    Pipeline(make_project(tmp_path, standby.url)).run_once()
    report = verify(make_project(tmp_path, standby.url))
    assert all(finding.ok for finding in report.findings)


@pytest.mark.parametrize("version", [16, 18])
def test_capture_goes_on_when_the_standby_that_is_read_is_promoted(
    version: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log learns of the new timeline before it holds anything from it."""
    with PostgresServer(tmp_path / "primary", version) as primary:
        primary.psql("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a')")
        primary.psql("CREATE PUBLICATION headrace_shop FOR TABLE t WITH (publish_via_partition_root)")
        with Standby(primary, tmp_path / "standby") as standby:
            project = make_project(tmp_path, standby.url)
            with snapshots_logged(primary):
                Pipeline(project).run_once()
            with running(project):
                until(lambda: slot_health(standby.url, "headrace_shop").active)
                primary.kill()
                standby.promote()
                standby.psql("INSERT INTO t VALUES (2, 'b')")
                written = standby.psql("SELECT pg_current_wal_lsn()")
                until(lambda: confirmed(standby, written))
            assert "the standby has gone over to timeline 2" in caplog.text
            assert "failover to timeline 2" in caplog.text
            Pipeline(project).run_once()
            assert all(finding.ok for finding in verify(project).findings)
