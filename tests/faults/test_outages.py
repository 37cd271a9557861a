"""One side is away: the other goes on, and both catch up by themselves. What is gone is never skipped."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest
from harness import (
    MODEL,
    RUN,
    assert_whole,
    make_project,
    make_shop,
    run_once,
    running,
    said,
)

from headrace.config import Project, load_project
from headrace.errors import RESYNC, HeadraceError
from headrace.log.sqlite import SQLiteLog
from headrace.pipeline import Pipeline
from headrace.scaling.journal import Journal
from headrace.scaling.snapshot import Code
from headrace.server import ask, is_running, read
from headrace.staging.delta import DeltaStaging
from headrace.testing import shop
from headrace.testing.postgres import PostgresServer
from pipelines import until

OUTAGE = float(os.environ.get("HEADRACE_OUTAGE_SECONDS", "6"))

HOLD = """
import sys, time, duckdb
while True:
    try:
        held = duckdb.connect(sys.argv[1], read_only=True)
        break
    except duckdb.IOException:  # the pipeline has it open for a moment
        time.sleep(0.02)
print("held", flush=True)
sys.stdin.read()
"""


def log_end(project: Project) -> int:
    log = SQLiteLog(project.state / "log" / "shop.db", read_only=True)
    try:
        return log.end().offset
    finally:
        log.close()


def staged(project: Project) -> int:
    log = SQLiteLog(project.state / "log" / "shop.db", read_only=True)
    try:
        staging = DeltaStaging(project.staging.path, "shop", log.id, read_only=True)
        staging.recover(log.last_offsets(), log.end().offset)
        return staging.through()
    finally:
        log.close()


def applied(project: Project) -> int:
    """The newest order in the destination, 0 while nobody answers."""
    with suppress(HeadraceError, OSError):
        return int(
            read(project, ["SELECT coalesce(max(order_id), 0) AS n FROM shop.order_items"])[0]["n"][0].as_py()
        )
    return 0


def decided(project: Project) -> Code | None:
    """The reason for as many workers as there are."""
    last = Journal(project.state / "scaling.jsonl").last()
    return last.decision.reason.code if last else None


def newest(url: str) -> int:
    with psycopg.connect(url) as db:
        return int(db.execute("SELECT max(order_id) FROM order_items").fetchall()[0][0])


@contextmanager
def held(path: Path) -> Iterator[int]:
    """Another process has the destination open."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        yield holder.pid
    finally:
        holder.communicate(timeout=10)


def test_one_side_is_away(server: PostgresServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two pipelines at the same time: one without its destination, the other without its source."""
    with ThreadPoolExecutor() as pool:
        sides = [
            pool.submit(destination_is_held, server, tmp_path / "held"),
            pool.submit(source_is_away, tmp_path / "away", OUTAGE),
        ]
        seconds = [side.result() for side in sides]
    with capsys.disabled():
        print(
            f"\n{OUTAGE:.0f} s of outage: caught up {seconds[0]:.1f} s after the destination was free, "
            f"{seconds[1]:.1f} s after the source was back"
        )


def destination_is_held(server: PostgresServer, folder: Path) -> float:
    """Capture and load go on, the holder is named; returns the seconds it took to catch up."""
    url = make_shop(server, "held")
    project = make_project(folder, url, slot="held", model=MODEL)
    run_once(project)
    with running(project), shop.Workload(url, transactions_per_second=100):
        until(lambda: ask_status(project), 30, "the pipeline runs")
        before = newest(url) + 20
        until(lambda: applied(project) >= before, 30, "the pipeline follows")
        with held(project.destination.path) as holder:
            since = newest(url)
            time.sleep(OUTAGE / 3)
            first = (log_end(project), staged(project))
            until(
                lambda: str(holder) in said(project) and " is held by " in said(project),
                20,
                "who holds it is said",
            )
            time.sleep(OUTAGE * 2 / 3)
            second = (log_end(project), staged(project))
            until(lambda: decided(project) is Code.APPLY_WAITS, 15, "no workers are asked for")
            assert second > first, "capture stood still"
            assert second[1] > first[1], "load stood still"
        missed, free = newest(url), time.monotonic()
        assert missed > since
        until(lambda: applied(project) >= missed, 60, "it catches up by itself")
        took = time.monotonic() - free
    run_once(project)
    assert_whole(project)
    return took


def test_source_crashes(tmp_path: Path) -> None:
    """A SIGKILL of the whole server, as a crash of its machine, and its recovery."""
    source_is_away(tmp_path, 1.0, crash=True)


def source_is_away(folder: Path, seconds: float, *, crash: bool = False) -> float:
    """Load and apply go on with what the log has, capture comes back by itself; returns the seconds it
    took to catch up."""
    with PostgresServer(folder / "pg", durable=crash) as server:
        url = make_shop(server, "away")
        project = make_project(folder / "project", url, slot="away", model=MODEL)
        run_once(project)
        workload = shop.Workload(url, transactions_per_second=200)
        with running(project) as process, workload:
            until(lambda: is_running(project) and workload.committed > 200)
            if crash:
                server.kill()
            else:
                server.stop()
            captured = log_end(project)
            until(lambda: staged(project) >= captured, 20, "load goes on")
            until(lambda: _stands(project) >= captured, 20, "apply goes on")
            time.sleep(seconds)
            assert process.poll() is None
            assert ask(project, {"op": "status"})["stopped"] == {}
            server.start()
            back, before = time.monotonic(), workload.committed
            until(lambda: workload.committed > before + 20, 30, "the workload works again")
            missed = newest(url)
            until(lambda: applied(project) >= missed, 30, "capture comes back by itself")
            took = time.monotonic() - back
        run_once(project)
        assert_whole(project)
    return took


def _stands(project: Project) -> int:
    with suppress(HeadraceError, OSError):
        return int(read(project, ['SELECT "offset" AS n FROM headrace.progress'])[0]["n"][0].as_py())
    return -1


def drop(db: psycopg.Connection[tuple[object, ...]], slot: str) -> None:
    db.execute("SELECT pg_drop_replication_slot(%s)", [slot])


def advance(db: psycopg.Connection[tuple[object, ...]], slot: str) -> None:
    db.execute("INSERT INTO accounts (balance) VALUES (1)")
    db.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", [slot])


def recreate(db: psycopg.Connection[tuple[object, ...]], slot: str) -> None:
    drop(db, slot)
    db.execute("INSERT INTO accounts (balance) VALUES (1)")
    db.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [slot])


@pytest.mark.parametrize(
    ("harm", "words"), [(drop, "is gone"), (advance, "another reader"), (recreate, "another reader")]
)
def test_a_gap_is_never_skipped(server: PostgresServer, tmp_path: Path, harm: object, words: str) -> None:
    name = harm.__name__  # type: ignore[attr-defined]
    url = make_shop(server, f"gap_{name}", orders=50)
    project = make_project(tmp_path, url, slot=f"gap_{name}", tables="public.accounts")
    pipeline = Pipeline(project)
    lane = pipeline.lanes[0]
    lane.capture(threading.Event(), until=lane.source.head())  # neither loaded nor applied
    pipeline.close()
    captured = log_end(project)
    with psycopg.connect(url, autocommit=True) as db:
        harm(db, f"gap_{name}")  # type: ignore[operator]
    code = RUN.format(verb="run_once", bytes=0)
    done = subprocess.run(
        [sys.executable, "-c", code, str(project.root)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "SourceGap" in done.stderr
    assert words in done.stderr
    captured += 1  # the marker of the gap, once, however often the pipeline is started
    assert log_end(project) == captured
    assert staged(project) == captured == _stands(project), "load and apply did not go on"
    if harm is not drop:
        return
    with running(project):
        until(lambda: "shop.capture" in ask_status(project).get("stopped", {}), 20, "capture stops")
        status = ask_status(project)
        assert list(status["stopped"]) == ["shop.capture"]
        assert words in status["stopped"]["shop.capture"]
    assert "STOPPED shop.capture" in said(project)
    assert RESYNC.format(source="shop") in said(project), "the remedy is missing"


def ask_status(project: Project) -> dict[str, dict[str, str]]:
    with suppress(HeadraceError, OSError):
        return ask(project, {"op": "status"})
    return {}


def test_another_server_is_refused(server: PostgresServer, tmp_path: Path) -> None:
    project = make_project(tmp_path / "project", make_shop(server, "mine", orders=50), slot="mine")
    run_once(project)
    end = log_end(project)
    with PostgresServer(tmp_path / "other") as other:
        project = make_project(tmp_path / "project", make_shop(other, "mine", orders=60), slot="mine")
        with pytest.raises(HeadraceError, match="another server") as caught:
            run_once(project)
        assert "original server" in caught.value.remedy
    assert log_end(project) == end


def test_an_fsync_error_of_the_log_confirms_nothing(
    server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every commit of the log fails for a while: the slot does not move, then all arrives."""
    url = make_shop(server, "eio", orders=50)
    project = make_project(tmp_path, url, slot="eio")
    run_once(project)
    failing = threading.Event()
    failing.set()

    def fail(name: str) -> None:
        if name == "log.append.commit" and failing.is_set():
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("headrace.log.sqlite.failpoint", fail)
    pipeline = Pipeline(load_project(project.root))
    thread = threading.Thread(target=pipeline.run)
    with psycopg.connect(url, autocommit=True) as db:
        db.execute("INSERT INTO accounts (balance) VALUES (7)")
        thread.start()
        try:
            query = "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = 'eio'"
            confirmed, end = db.execute(query).fetchall(), log_end(project)
            until(lambda: "shop.capture" in pipeline.status()["waiting"], 20, "it says that it waits")
            time.sleep(1)
            assert db.execute(query).fetchall() == confirmed
            assert log_end(project) == end
            failing.clear()
            until(lambda: log_end(project) > end, 20, "it is tried again")
            until(lambda: db.execute(query).fetchall() > confirmed, 20, "then it is confirmed")
        finally:
            pipeline.stop.set()
            thread.join(30)
    assert pipeline.status()["stopped"] == {}
    run_once(project)
    assert_whole(project)


def test_no_room_for_log_and_staging(server: PostgresServer, tmp_path: Path) -> None:
    """A limit on the size of files, as a full disk is: nothing is confirmed, and with room all goes on."""
    url = make_shop(server, "room", orders=50)
    project = make_project(tmp_path, url, slot="room", tables="public.accounts")
    run_once(project)
    with psycopg.connect(url, autocommit=True) as db:
        query = "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = 'room'"
        confirmed = db.execute(query).fetchall()
        db.execute("ALTER TABLE accounts ADD note text")
        db.execute(
            "INSERT INTO accounts (balance, note) SELECT 1, string_agg(md5(random()::text), '') "
            "FROM generate_series(1, 300) n, generate_series(1, 200) m GROUP BY n"
        )
        small = (256 << 10, resource.RLIM_INFINITY)  # the soft limit, which can be raised again
        code = RUN.format(verb="run", bytes=0).replace(
            "import signal, sys\n",
            "import signal, sys, resource\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, {small!r})\n",
        )
        with (tmp_path / "stderr").open("a") as errors:
            process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=errors)
        try:
            until(lambda: "shop.capture waits" in said(project), 30, "capture waits")
            time.sleep(2)
            assert process.poll() is None
            assert db.execute(query).fetchall() == confirmed, "confirmed what is not durable"
            resource.prlimit(
                process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )
            until(lambda: _accounts(project) == 320, 30, "with room it goes on")
        finally:
            process.terminate()
            process.wait(30)
    run_once(project)
    assert_whole(project)


def _accounts(project: Project) -> int:
    with suppress(HeadraceError, OSError):
        return int(read(project, ["SELECT count(*) AS n FROM shop.accounts"])[0]["n"][0].as_py())
    return -1
