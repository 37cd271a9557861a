"""`headrace resync` repairs what a gap has left, whatever the server has become, and whenever it dies."""

from __future__ import annotations

import contextlib
import io
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import assert_whole, make_project, run_once, running, start

from headrace.cli import main
from headrace.config import Project
from headrace.errors import SourceGap
from headrace.log.sqlite import SQLiteLog
from headrace.sources.postgres.lsn import parse_lsn
from headrace.sources.postgres.slot import epoch_of
from headrace.sources.postgres.source import PostgresSource
from headrace.sources.postgres.tables import read_states
from headrace.testing.postgres import PostgresServer
from pipelines import until

SLOT = "headrace_shop"
SCHEMA = """
CREATE TABLE t (id int PRIMARY KEY, v text);
CREATE TABLE u (id int PRIMARY KEY, v text);
INSERT INTO t SELECT n, 'first' FROM generate_series(1, 200) n;
INSERT INTO u VALUES (1, 'first');
"""
MISSED = (
    "DELETE FROM t WHERE id <= 5; UPDATE t SET v = 'missed' WHERE id <= 9; INSERT INTO t VALUES (999, '')"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    settings = {"max_slot_wal_keep_size": "1MB", "max_wal_size": "32MB", "min_wal_size": "32MB"}
    with PostgresServer(tmp_path_factory.mktemp("resync") / "pg", settings=settings) as running:
        yield running


@pytest.fixture
def project(server: PostgresServer, tmp_path: Path) -> Iterator[Project]:
    server.psql(SCHEMA)
    project = make_project(tmp_path / "project", server.url)
    run_once(project)
    yield project
    server.psql(f"SELECT pg_drop_replication_slot('{SLOT}'); DROP PUBLICATION headrace_shop; DROP TABLE t, u")


def resync(project: Project) -> None:
    """Ask for it on the command line, once the source has stopped with a gap."""
    with pytest.raises(SourceGap):
        run_once(project)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["resync", "--project", str(project.root)]) == 0
    assert "begins anew" in out.getvalue()


@contextlib.contextmanager
def log_of(project: Project, *, read_only: bool = True) -> Iterator[SQLiteLog]:
    with contextlib.closing(SQLiteLog(project.state / "log" / "shop.db", read_only=read_only)) as log:
        yield log


def is_live(project: Project) -> bool:
    with log_of(project) as log:
        return all(state.stage == "live" for state in read_states(log).values())


def epochs(project: Project) -> list[int]:
    """The epochs of the log's entries, in its order, each once in a row."""
    with log_of(project) as log:
        found = [logged.entry.last.epoch for logged in log.read(0, 1 << 30)]
    return [epoch for at, epoch in enumerate(found) if at == 0 or found[at - 1] != epoch]


def copied(project: Project) -> dict[str, int]:
    """How many rows the newest copy of each table has brought."""
    with log_of(project) as log:
        rows: dict[str, int] = {}
        for _, table, _, _, mark in log.copy_marks():
            rows[table.name] = 0 if mark.kind == "begin" else rows[table.name] + mark.rows
        return rows


def stands(server: PostgresServer) -> tuple[int, int]:
    """Where the slot stands, and where the server does."""
    query = f"SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = '{SLOT}'"
    return parse_lsn(server.psql(query)), parse_lsn(server.psql("SELECT pg_current_wal_flush_lsn()"))


def test_after_the_slot_was_lost(server: PostgresServer, project: Project) -> None:
    server.psql(MISSED)
    for _ in range(4):
        server.psql("SELECT pg_logical_emit_message(false, 'x', 'y'), pg_switch_wal()")
        server.psql("CHECKPOINT")
    assert server.psql(f"SELECT wal_status FROM pg_replication_slots WHERE slot_name = '{SLOT}'") == "lost"
    resync(project)
    run_once(project)
    server.psql("INSERT INTO t VALUES (1000, 'after')")
    run_once(project)
    assert epochs(project) == [0, 1]
    assert_whole(project)


@pytest.mark.parametrize(
    "altered",
    [
        f"ALTER PUBLICATION {SLOT} DROP TABLE t; {MISSED}; ALTER PUBLICATION {SLOT} ADD TABLE t",
        f"ALTER PUBLICATION {SLOT} SET TABLE t WHERE (id > 9), u; {MISSED}",
        f"DROP PUBLICATION {SLOT}; {MISSED}",
    ],
    ids=["taken out", "filtered", "dropped"],
)
def test_after_the_publication_was_altered(server: PostgresServer, project: Project, altered: str) -> None:
    server.psql(altered)
    resync(project)
    run_once(project)
    server.psql("UPDATE t SET v = 'after' WHERE id < 20")
    run_once(project)
    assert_whole(project)


class _Died(BaseException):
    """The process is gone."""


def test_wherever_it_dies_the_next_start_goes_on(
    server: PostgresServer, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dies at each note that it writes in turn."""
    server.psql("INSERT INTO u VALUES (2, 'streamed')")
    run_once(project)
    server.psql(f"{MISSED}; SELECT pg_drop_replication_slot('{SLOT}')")
    resync(project)
    asked, set_note = project.state.with_name("asked"), SQLiteLog.set_note
    subprocess.run(["cp", "-a", str(project.state), str(asked)], check=True)

    def capture(notes: int) -> None:
        def counted(log: SQLiteLog, key: str, value: str) -> None:
            nonlocal notes
            notes -= 1
            if notes < 0:
                raise _Died
            set_note(log, key, value)

        monkeypatch.setattr(SQLiteLog, "set_note", counted)
        source = PostgresSource(project.sources[0], 8 << 20, 0.0)
        with log_of(project, read_only=False) as log, contextlib.closing(source.read(log)) as groups:
            for group in groups:
                if group:
                    log.append(group)
                    position = log.position()  # at first one of the former epoch
                    assert position is not None
                    source.confirm(position)
                elif log.note("point") and all(state.stage == "live" for state in read_states(log).values()):
                    return

    deaths = 0
    while True:
        subprocess.run(["rm", "-r", str(project.state)], check=True)
        subprocess.run(["cp", "-a", str(asked), str(project.state)], check=True)
        try:
            capture(deaths)
        except _Died:
            deaths += 1
        else:
            break
        capture(1 << 30)
        at, end = stands(server)
        assert at <= end
        assert copied(project) == {"t": 196, "u": 2}
    monkeypatch.setattr(SQLiteLog, "set_note", set_note)
    assert deaths > 15
    server.psql("DELETE FROM t WHERE id = 7")
    run_once(project)
    assert_whole(project)


def test_after_the_server_was_restored_to_an_earlier_state(tmp_path: Path) -> None:
    """Its positions are lower than the log's, none of which may be confirmed to it. Dies thrice meanwhile."""
    server = PostgresServer(tmp_path / "pg")
    with server:
        server.psql(SCHEMA)
        project = make_project(tmp_path / "project", server.url)
        run_once(project)
        server.stop()
        subprocess.run(["cp", "-a", str(server.data), str(tmp_path / "copy")], check=True)
        server.start()
        for _ in range(3):
            server.psql("SELECT pg_switch_wal()")
            server.psql("INSERT INTO u SELECT max(id) + 1, 'lost' FROM u; DELETE FROM t WHERE id % 7 = 1")
        run_once(project)
        with log_of(project) as log:
            lost = log.position()
        assert lost is not None
        server.stop("immediate")
        subprocess.run(["rm", "-r", str(server.data)], check=True)
        subprocess.run(["cp", "-a", str(tmp_path / "copy"), str(server.data)], check=True)
        server.start()

        resync(project)
        for dies_at, begun in (
            ("log.append.commit=kill@1", (0, "requested")),
            ("log.append.commit=kill@2", (1, "")),
            ("log.append.committed=kill@3", (1, "")),
        ):
            assert start(project, failpoints=dies_at).wait(30) == -9
            with log_of(project) as log:
                assert (epoch_of(log), log.note("resync")) == begun
        with running(project):
            until(lambda: is_live(project), 30, "all is copied")
            assert max(stands(server)) < lost.commit
            for number in (50, 51):
                server.psql(f"INSERT INTO u VALUES ({number}, 'new'); DELETE FROM t WHERE id = {number}")
            written = stands(server)[1]
            until(lambda: stands(server)[0] >= written, 30, "what is written since has come")
            assert max(stands(server)) < lost.commit
        run_once(project)
        assert epochs(project) == [0, 1]
        with log_of(project) as log:
            position = log.position()
        assert position is not None
        assert position > lost
        assert position.commit < lost.commit
        assert_whole(project)


def test_another_server_keeps_a_slot_of_the_same_name(tmp_path: Path) -> None:
    """What stands there under our name is not ours because another server had ours."""
    with PostgresServer(tmp_path / "one") as one, PostgresServer(tmp_path / "two") as two:
        one.psql(SCHEMA)
        run_once(make_project(tmp_path / "project", one.url))
        two.psql(SCHEMA)
        two.psql(f"SELECT pg_create_logical_replication_slot('{SLOT}', 'pgoutput')")
        project = make_project(tmp_path / "project", two.url)
        assert main(["resync", "--project", str(project.root)]) == 0
        with pytest.raises(Exception, match="exists already, and not for this state folder"):
            run_once(project)
        two.psql(f"SELECT pg_drop_replication_slot('{SLOT}')")
        run_once(project)
        assert_whole(project)
