"""The primary dies, a standby is promoted: nothing is lost and nothing repeated, or the source stops."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import assert_whole, make_project, run_once, running, said, stop

from headrace.cli import main
from headrace.config import Project
from headrace.errors import RESYNC, SourceGap, SourceUnavailable
from headrace.log.sqlite import SQLiteLog
from headrace.payload import decode_rows
from headrace.sources.postgres.connection import connect_replication
from headrace.sources.postgres.identity import Timeline, noted_timeline
from headrace.sources.postgres.lsn import format_lsn, parse_lsn
from headrace.testing.postgres import PostgresServer
from headrace.testing.standby import Standby
from pipelines import until

SLOT = "headrace_shop"


@pytest.fixture
def primary(tmp_path: Path) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path / "primary") as server:
        server.psql("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (0, 'copied')")
        yield server


@pytest.fixture
def project(primary: PostgresServer, tmp_path: Path) -> Project:
    """A project that has copied."""
    project = point_to(primary, tmp_path)
    run_once(project)
    return project


def point_to(server: PostgresServer, tmp_path: Path) -> Project:
    return make_project(tmp_path / "project", server.url)


def insert(server: PostgresServer, *ids: int) -> None:
    server.psql("".join(f"INSERT INTO t VALUES ({number}, 'x');" for number in ids))


def captured(project: Project) -> list[int]:
    """The ids of all rows of t in the log, copied and streamed, in order."""
    log = SQLiteLog(project.state / "log" / "shop.db", read_only=True)
    try:
        entries = [logged.entry for logged in log.read(0, 1 << 30)]
        assert {entry.last.epoch for entry in entries} == {0}
        rows = (decode_rows(entry.payload) for entry in entries if entry.kind in ("copy", "rows"))
        return [int(cell) for batch in rows for cell in batch.column("id").to_pylist()]
    finally:
        log.close()


def durable(project: Project) -> tuple[int, Timeline | None]:
    log = SQLiteLog(project.state / "log" / "shop.db", read_only=True)
    try:
        position = log.position()
        return position.commit if position else 0, noted_timeline(log)
    finally:
        log.close()


def slot_stands(server: PostgresServer) -> int:
    """Where a slot that would outlive a promotion stands; 0 without one."""
    found = server.psql(
        f"SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = '{SLOT}' AND NOT temporary"
    )
    return parse_lsn(found) if found else 0


def synchronised(standby: Standby) -> bool:
    """Whether the slot is on the standby for good: once it has passed a snapshot logged after it came there,
    of which a quiet server logs one in 15 seconds."""
    standby.primary.psql("SELECT pg_log_standby_snapshot()")
    return slot_stands(standby) > 0


def test_a_failover_loses_nothing_and_repeats_nothing(
    primary: PostgresServer, project: Project, tmp_path: Path
) -> None:
    """The slot is synchronised by the server itself, the pipeline runs until the primary is killed."""
    with Standby(primary, tmp_path / "standby") as standby:
        with running(project) as process:
            until(lambda: synchronised(standby), 60, "the slot is on the standby for good")
            insert(primary, *range(1, 50))
            until(lambda: captured(project)[-1] == 49)
            standby.catch_up()
            primary.kill()
            until(lambda: "shop.capture waits" in said(project))
            assert stop(process) == 0
        project = point_to(standby, tmp_path)
        with pytest.raises(SourceUnavailable, match="standby in recovery"):
            run_once(project)
        standby.promote()
        insert(standby, 50)
        run_once(project)
        insert(standby, 51)
        run_once(project)
        assert captured(project) == list(range(52))
        timeline = durable(project)[1]
        assert timeline is not None
        assert timeline.number == 2
        assert_whole(project)


def test_the_promoted_slot_stands_behind_what_we_hold(
    primary: PostgresServer, project: Project, tmp_path: Path
) -> None:
    """What is sent again is dropped; a second standby, promoted on its own, is another history."""
    with (
        Standby(primary, tmp_path / "standby") as standby,
        Standby(primary, tmp_path / "second", slot="second") as second,
    ):
        with running(project):
            until(lambda: synchronised(standby) and synchronised(second), 60, "the slot is on both for good")
            standby.psql("ALTER SYSTEM SET sync_replication_slots = off")
            standby.psql("SELECT pg_reload_conf()")
        insert(primary, *range(1, 20))
        run_once(project)
        standby.catch_up()
        second.catch_up()
        primary.kill()
        standby.promote()
        assert 0 < slot_stands(standby) < durable(project)[0]
        project = point_to(standby, tmp_path)
        run_once(project)
        insert(standby, 20)
        run_once(project)
        assert captured(project) == list(range(21))
        assert_whole(project)

        second.promote()
        project = point_to(second, tmp_path)
        with pytest.raises(SourceGap, match="never had or has lost"):
            run_once(project)


def test_the_standby_forked_before_our_last_commit(
    primary: PostgresServer, project: Project, tmp_path: Path
) -> None:
    with Standby(primary, tmp_path / "standby") as standby:
        with running(project):
            until(lambda: synchronised(standby), 60, "the slot is on the standby for good")
        standby.stop()
        insert(primary, 1000)
        run_once(project)
        commit, _ = durable(project)
        primary.kill()
        standby.start()
        standby.promote()
        insert(standby, *range(2000, 2050))
        before = captured(project)
        project = point_to(standby, tmp_path)
        with pytest.raises(SourceGap) as caught:
            run_once(project)
        with connect_replication(standby.url) as line:
            history = line.pgconn.exec_(b"TIMELINE_HISTORY 2").get_value(0, 1) or b""
        fork = history.decode().split()[1]
        assert parse_lsn(fork) < commit
        assert f"forked from timeline 1 at {fork}" in str(caught.value)
        assert f"commits up to {format_lsn(commit)}" in str(caught.value)
        assert caught.value.remedy == RESYNC.format(source="shop")
        assert captured(project) == before

        assert main(["resync", "--project", str(project.root)]) == 0
        run_once(project)
        insert(standby, 3000)
        run_once(project)
        assert_whole(project)


def test_without_slot_synchronisation_the_slot_is_gone(tmp_path: Path) -> None:
    with PostgresServer(tmp_path / "primary", 16) as primary:
        primary.psql("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (0, 'copied')")
        project = point_to(primary, tmp_path)
        run_once(project)
        with Standby(primary, tmp_path / "standby") as standby:
            standby.catch_up()
            primary.kill()
            standby.promote()
            with pytest.raises(SourceGap, match=f"the slot {SLOT} is gone") as caught:
                run_once(point_to(standby, tmp_path))
            assert caught.value.remedy == RESYNC.format(source="shop")
