"""The source is protected: a watch over its slot, no queue behind us, a stream that outlives a slow disk,
and everything of ours taken away on request."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from headrace import failpoints
from headrace.cli import main
from headrace.config import Project, load_project
from headrace.errors import SourceUnavailable, UserError
from headrace.log.sqlite import SQLiteLog
from headrace.pipeline import Pipeline
from headrace.sources.postgres import slot
from headrace.sources.postgres.connection import connect
from headrace.sources.postgres.health import SlotHealth, slot_health
from headrace.sources.postgres.publication import chosen_tables, publish
from headrace.sources.postgres.watch import Watch
from headrace.testing.postgres import PostgresServer
from pipelines import running, until


@pytest.fixture(scope="module", params=[16, 18])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PostgresServer]:
    settings = {"wal_sender_timeout": "4s", "max_prepared_transactions": "4", "max_slot_wal_keep_size": "4GB"}
    folder = tmp_path_factory.mktemp("guard") / "pg"
    with PostgresServer(folder, request.param, settings) as running:
        yield running


@pytest.fixture
def project(server: PostgresServer, tmp_path: Path) -> Iterator[Project]:
    """A project on a database of its own with a table t of one row."""
    number = server.psql("SELECT count(*) FROM pg_database")
    slot = f"headrace_{number}"
    url = server.url.removesuffix("postgres") + slot
    server.psql(f"CREATE DATABASE {slot}")
    server.psql("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a')", slot)
    (tmp_path / "headrace.toml").write_text(
        f'[source.shop]\nurl = "{url}"\nslot = "{slot}"\nheartbeat = "200ms"\nrestart_age_alarm = "10s"\n'
    )
    yield load_project(tmp_path)
    drop = (
        "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT active AND slot_name"
    )
    server.psql(f"{drop} = '{slot}'")


def execute(project: Project, *statements: str) -> None:
    with psycopg.connect(project.sources[0].url.reveal(), autocommit=True) as db:
        for statement in statements:
            db.execute(statement.encode())


def value(project: Project, query: str) -> object:
    with psycopg.connect(project.sources[0].url.reveal(), autocommit=True) as db:
        row = db.execute(query.encode()).fetchone()
    return row[0] if row else None


@contextmanager
def streaming(project: Project) -> Iterator[Pipeline]:
    """A pipeline that reads its slot."""
    with running(project) as pipeline:
        until(lambda: reader(project))
        yield pipeline


def reader(project: Project) -> object:
    """Who streams from the slot; whoever creates it holds it too, for a moment."""
    slot = project.sources[0].slot
    return value(
        project, f"SELECT pid FROM pg_stat_replication r JOIN pg_replication_slots s ON s.active_pid = r.pid "
        f"WHERE s.slot_name = '{slot}' AND r.state IN ('catchup', 'streaming')"
    )  # fmt: skip


def command(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(arguments))
    return code, out.getvalue(), err.getvalue()


# ---------------------------------------------------------------------------------------- the stream


@pytest.mark.parametrize("server", [18], indirect=True)
def test_a_stream_outlives_a_log_that_is_slow(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than twice wal_sender_timeout, while more waits than the sockets hold."""
    with streaming(project) as pipeline:
        before = reader(project)
        slow = failpoints._Armed("sleep:9", 1)
        monkeypatch.setitem(failpoints._armed, "log.append.commit", slow)
        execute(project, "INSERT INTO t VALUES (2, 'b')")
        until(lambda: slow.passed)
        began = time.monotonic()
        execute(project, "INSERT INTO t SELECT g, repeat('x', 400) FROM generate_series(3, 30000) g")
        until(lambda: slow.passed > 1)
        assert time.monotonic() - began > 4
        head = value(project, "SELECT pg_current_wal_flush_lsn()")
        passed = "SELECT confirmed_flush_lsn >= '{}' FROM pg_replication_slots WHERE slot_name = '{}'"
        until(lambda: value(project, passed.format(head, project.sources[0].slot)))
        assert reader(project) == before
        assert not pipeline.status()["waiting"]


# ----------------------------------------------------------------------------------------- the locks


@pytest.mark.parametrize("server", [16], indirect=True)
def test_publishing_gives_up_on_a_locked_table_and_is_tried_again(project: Project) -> None:
    config = project.sources[0]
    execute(project, "CREATE TABLE u (id int PRIMARY KEY)")
    with connect(config.url.reveal()) as db, psycopg.connect(config.url.reveal()) as application:
        tables = chosen_tables(db, config)
        application.execute("LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
        for statement in ("made", "extended"):
            began = time.monotonic()
            pid = application.info.backend_pid
            with pytest.raises(SourceUnavailable, match=rf"lock on .*public\.t.* held by pid {pid} "):
                publish(db, config, tables)
            assert 1 < time.monotonic() - began < 6
            if statement == "made":
                execute(project, f"CREATE PUBLICATION {config.publication} FOR TABLE u "
                        "WITH (publish_via_partition_root)")  # fmt: skip
        application.rollback()
        assert [publish(db, config, tables) for _ in range(2)] == [True, False]
    count = "SELECT count(*) FROM pg_publication_tables WHERE pubname = 'headrace_shop'"
    assert value(project, count) == 2


@pytest.mark.parametrize("server", [18], indirect=True)
def test_a_slot_that_waits_for_a_transaction_says_so_and_can_be_stopped(
    project: Project, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot, "_SAY_AFTER", 1.0)
    with psycopg.connect(project.sources[0].url.reveal()) as application:
        application.execute("INSERT INTO t VALUES (9, '')")
        pipeline = Pipeline(project)
        thread = threading.Thread(target=pipeline.run)
        thread.start()
        until(lambda: "the slot is not made yet" in caplog.text)
        assert f"pid {application.info.backend_pid} " in caplog.text
        pipeline.stop.set()
        thread.join(5)
        assert not thread.is_alive()
        slots = f"SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{project.sources[0].slot}'"
        until(lambda: value(project, slots) == 0)


# ----------------------------------------------------------------------------------------- the watch


@pytest.mark.parametrize("kind", ["transaction", "prepared"])
def test_old_wal_and_who_holds_it(project: Project, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """An episode from its beginning to its end, beside a pipeline that keeps up."""
    url = project.sources[0].url.reveal()
    watch = Watch(project.sources[0], expected=lambda: True)
    with streaming(project), psycopg.connect(url, autocommit=True) as application:
        application.execute("BEGIN")
        application.execute("INSERT INTO t VALUES (7, '')")
        name = f"pid {application.info.backend_pid} "
        if kind == "prepared":
            application.execute("PREPARE TRANSACTION 'shop-7'")
            name = "gid 'shop-7'"
        execute(project, "SELECT pg_switch_wal(), pg_sleep(0.3)", "CREATE TABLE w AS SELECT 1 AS one")
        execute(project, "SELECT pg_switch_wal()")
        until(lambda: held_back(slot_health(url, project.sources[0].slot)))
        watch._limits = type(watch._limits)(lag=1 << 30, restart_age=0.01)
        time.sleep(0.1)
        watch.step(10.0)
        assert [text.partition(":")[0] for text in alerts(caplog)] == ["ALARM shop.restart"]
        assert name in alerts(caplog)[0]
        assert "headrace status" not in alerts(caplog)[0]
        watch.step(10.0)
        status = command("status", "--project", str(project.root))[1]
        assert f"the oldest {'prepared ' * (kind == 'prepared')}transaction is" in status
        application.execute("ROLLBACK PREPARED 'shop-7'" if kind == "prepared" else "ROLLBACK")
        execute(project, "CHECKPOINT")

        def over() -> bool:
            watch.step(10.0)
            return len(alerts(caplog)) > 1

        until(over)
    watch.close()
    assert [text.split(":")[0] for text in alerts(caplog)] == ["ALARM shop.restart", "RESOLVED shop.restart"]


@pytest.mark.parametrize("server", [16], indirect=True)
def test_the_watch_of_a_pipeline_rings_and_is_in_its_status(
    project: Project, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (project.root / "headrace.toml").read_text()
    (project.root / "headrace.toml").write_text(text + 'lag_alarm = "1MiB"\n')
    with streaming(load_project(project.root)) as pipeline:
        pipeline._watches["shop"]._every = 0.1
        # The first wait of the watch is of the old length: another thread of it takes over.
        watcher = threading.Thread(target=pipeline._watches["shop"].run, args=(pipeline.stop,))
        watcher.start()
        slow = failpoints._Armed("sleep:2", 1)
        monkeypatch.setitem(failpoints._armed, "log.append.commit", slow)
        until(lambda: slow.passed)
        execute(project, "INSERT INTO t SELECT g, repeat('x', 400) FROM generate_series(3, 6000) g")
        until(lambda: pipeline.status()["alarms"]["shop"])
        said = command("status", "--project", str(project.root))[1]
        assert "ALARM shop: " in said
        assert "of WAL are not captured yet (lag_alarm 1.0 MiB)" in said
        until(lambda: any(text.startswith("RESOLVED shop.lag") for text in alerts(caplog)))
        assert pipeline.status()["alarms"] == {"shop": []}
    watcher.join()


def held_back(health: SlotHealth) -> bool:
    """Whether a segment of WAL is kept that is captured already."""
    assert health.retained_bytes is not None
    assert health.lag_bytes is not None
    return health.retained_bytes > 16 << 20 and health.lag_bytes < 1 << 20


def alerts(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "headrace.alert" and record.levelno >= logging.WARNING
    ]


# -------------------------------------------------------------------------------------------- teardown


def test_teardown_takes_what_is_ours_and_says_what_is_left(project: Project, server: PostgresServer) -> None:
    where = ("--project", str(project.root))
    assert "captured nothing" in command("teardown", *where)[1]
    Pipeline(project).run_once()
    slot = project.sources[0].slot
    execute(project, "SELECT pg_create_logical_replication_slot('headrace_other', 'pgoutput')")
    listed = command("teardown", *where)
    assert listed[0] == 0
    assert "Nothing was dropped" in listed[1]
    assert value(project, f"SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{slot}'") == 1
    with streaming(project):
        code, _, err = command("teardown", "--yes", *where)
        assert code == 2
        assert "Another Headrace" in err

    code, out, _ = command("teardown", "--yes", *where)
    assert code == 0
    lines = [line.split() for line in out.splitlines() if line.startswith("shop")]
    assert sorted((line[1], line[2], line[-1]) for line in lines) == sorted([
        ("slot", slot, "dropped"),
        ("slot", "headrace_other", "project"),
        ("publication", "headrace_shop", "dropped"),
    ])  # fmt: skip
    assert "not recorded for this project" in out
    assert str(project.state) in out
    assert str(project.destination.path) in out
    assert value(project, "SELECT array_agg(slot_name::text) FROM pg_replication_slots") == ["headrace_other"]
    assert value(project, "SELECT count(*) FROM pg_publication") == 0
    assert project.state.exists()
    assert project.destination.path.exists()
    with pytest.raises(UserError, match="headrace teardown` dropped the slot on 20"):
        Pipeline(project).run_once()
    again = command("teardown", "--yes", *where)
    assert again[0] == 0
    assert " dropped" not in again[1]
    execute(project, "SELECT pg_drop_replication_slot('headrace_other')")


def test_teardown_leaves_a_publication_that_somebody_else_made(project: Project) -> None:
    execute(project, "CREATE PUBLICATION headrace_shop FOR TABLE t WITH (publish_via_partition_root)")
    Pipeline(project).run_once()
    log = SQLiteLog(project.state / "log" / "shop.db")
    assert not log.note("published")
    log.close()
    code, out, _ = command("teardown", "--yes", "--project", str(project.root))
    assert code == 0
    assert "not made by this project" in out
    assert value(project, "SELECT count(*) FROM pg_publication") == 1
