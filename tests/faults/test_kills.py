"""Killed anywhere, at any moment, the pipeline loses nothing and doubles nothing."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import duckdb
import psycopg
import pytest
from harness import (
    MODEL,
    assert_whole,
    make_project,
    make_shop,
    run_once,
    running,
    said,
    start,
    stop,
)

from headrace import failpoints
from headrace.change import CopyMark
from headrace.cli import main
from headrace.config import Project, load_project
from headrace.errors import HeadraceError
from headrace.log.sqlite import SQLiteLog
from headrace.pipeline import Pipeline
from headrace.server import read
from headrace.testing import shop
from headrace.testing.postgres import PostgresServer
from pipelines import until

KILLS = 20
NEAR = 5.0  # seconds around a kill whose freshness does not count
SOURCES = Path(failpoints.__file__).parent


class Watcher(threading.Thread):
    """Asks the pipeline again and again for the newest order, as another process than it."""

    def __init__(self, project: Project) -> None:
        super().__init__(daemon=True)
        self.seen: list[tuple[float, int]] = []
        self.stop = threading.Event()
        self._project = project

    def run(self) -> None:
        while not self.stop.wait(0.05):
            with suppress(HeadraceError, OSError):
                newest = read(self._project, ["SELECT max(order_id) AS id FROM shop.order_items"])[0]["id"][
                    0
                ].as_py()
                if newest is not None and (not self.seen or newest > self.seen[-1][1]):
                    self.seen.append((time.time(), newest))


def freshness(
    commits: list[tuple[int, float]], seen: list[tuple[float, int]], kills: list[float]
) -> list[float]:
    """Seconds from commit to visible, of samples that no kill is near."""
    found, at = [], 0
    for order, committed in commits:
        while at < len(seen) and seen[at][1] < order:
            at += 1
        if at == len(seen):
            break
        visible = seen[at][0]
        if all(visible < kill - NEAR or committed > kill + NEAR for kill in kills):
            found.append(visible - committed)
    return sorted(found)


def test_kills_at_random_moments_of_a_busy_workload(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(int(os.environ.get("HEADRACE_SEED", "20")))
    with PostgresServer(tmp_path / "pg") as server:
        project = make_project(tmp_path / "project", make_shop(server, "busy"), model=MODEL)
        url = project.sources[0].url.reveal()
        run_once(project)
        workload = subprocess.Popen(
            [sys.executable, "-m", "headrace.testing.shop", url, "--seconds=120", "--tps=600", "--small"],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        watcher = Watcher(project)
        watcher.start()
        kills: list[float] = []
        pipeline = start(project)
        time.sleep(4.0)
        for _ in range(KILLS):
            time.sleep(rng.uniform(0.4, 1.4))
            assert pipeline.poll() is None, said(project)
            pipeline.kill()
            pipeline.wait(10)
            kills.append(time.time())
            pipeline = start(project)
        time.sleep(NEAR + 6.0)
        workload.terminate()
        summary = json.loads(workload.communicate(timeout=30)[0])
        with psycopg.connect(url) as db:
            newest = db.execute("SELECT max(order_id) FROM order_items").fetchall()[0][0]
        until(lambda: watcher.seen[-1][1] >= newest, 30, "the last order is visible")
        watcher.stop.set()
        watcher.join(10)
        assert stop(pipeline) == 0
        run_once(project)
        assert_whole(project)
        fresh = freshness(summary["commits"], watcher.seen, kills)
        rate = summary["committed"] / summary["seconds"]
        p50, p99 = (fresh[min(len(fresh) - 1, int(len(fresh) * share))] for share in (0.5, 0.99))
        with capsys.disabled():
            print(
                f"\n{KILLS} kills, {summary['committed']} transactions at {rate:.0f}/s, freshness of "
                f"{len(fresh)} samples: p50 {p50:.2f} s, p99 {p99:.2f} s"
            )
        assert rate >= 250, "no busy workload: the machine is too slow for this test to mean anything"
        assert len(fresh) >= 20
        assert p99 <= 10.0


POINTS = {
    "source.copy.batch": "copy",
    "log.segment.sync": "once",
    "log.append.commit": "once",
    "log.append.committed": "once",
    "staging.data_synced": "once",
    "staging.committed": "once",
    "staging.commit_synced": "once",
    "destination.join.commit": "copy",
    "destination.join.attach": "copy",
    "destination.join.snapshot": "suite",
    "destination.apply.part": "once",
    "destination.apply.commit": "once",
    "destination.apply.committed": "once",
    "destination.redrive.commit": "redrive",
    "destination.mart.commit": "suite",
    "destination.postgres.commit": "suite",
    "log.trim.committed": "suite",
    "staging.merge_written": "maintain",
    "staging.merge_synced": "maintain",
    "staging.checkpoint_written": "maintain",
    "staging.checkpoint_synced": "maintain",
    "staging.checkpoint_proven": "maintain",
    "staging.commit_cleaned": "maintain",
    "staging.swept": "maintain",
    "publish.piece": "publish",
    "publish.copied": "publish",
    "publish.synced": "publish",
    "publish.renamed": "publish",
}
"""Every failpoint of the code, and what passes it: `suite` is passed in the conformance suites of logs and
destinations, `maintain` in the unit tests of staging's maintenance, `publish` in those of publishing."""

ONCE = [name for name, kind in POINTS.items() if kind == "once"]
COPY = [name for name, kind in POINTS.items() if kind in ("copy", "once")]


def test_every_failpoint_is_in_the_table() -> None:
    named = re.compile(r"failpoint\(\s*\"([^\"]+)\"")
    found = {name for path in SOURCES.rglob("*.py") for name in named.findall(path.read_text())}
    # What is durable of alerts is killed at where they are delivered: tests/acceptance/test_alerts.py.
    assert found - {"alerts.record", "alerts.sent"} == set(POINTS)


def database(server: PostgresServer, point: str) -> str:
    return make_shop(server, point.replace(".", "_"), orders=300)


def change(url: str, seed: int) -> None:
    workload = shop.Workload(url, seed=seed, transactions_per_second=None)
    with workload:
        until(lambda: workload.committed >= 40)


@pytest.mark.parametrize("hop", ["log", "staging", "destination"])
def test_killed_at_every_failpoint_and_passage(server: PostgresServer, tmp_path: Path, hop: str) -> None:
    """At a later and at the first passage of each, one after the other, with changes in between."""
    url = database(server, f"kill.{hop}")
    project = make_project(tmp_path, url, slot=f"kill_{hop}", model=MODEL)
    run_once(project)
    for point in (point for point in ONCE if point.startswith(hop)):
        for passage in (3, 1):
            change(url, passage)
            process = start(project, "run_once", step_bytes=4096, failpoints=f"{point}=kill@{passage}")
            assert process.wait(60) == -9, f"passage {passage} of {point} was never reached: {said(project)}"
    run_once(project)
    assert_whole(project)


def test_killed_in_the_middle_of_every_hop_of_the_first_copy(server: PostgresServer, tmp_path: Path) -> None:
    url = database(server, "first")
    project = make_project(tmp_path, url, slot="first", model=MODEL)
    for point in COPY:
        process = start(project, "run_once", step_bytes=4096, failpoints=f"{point}=kill@2")
        assert process.wait(60) == -9, f"{point} was never reached: {said(project)}"
    run_once(project)
    assert_whole(project)


KILLS_AMID_COPIES = (
    (
        ("source.copy.batch", 9),
        ("destination.join.commit", 6),
        ("destination.join.commit", 2),
        ("destination.join.attach", 3),
    ),
    (("source.copy.batch", 9), ("destination.join.commit", 6), ("destination.join.attach", 1)),
)
"""Passages at which a first copy dies, and then a second one."""


def test_killed_amid_a_copy_in_chunks_and_the_next_one_beside_it(
    server: PostgresServer, tmp_path: Path
) -> None:
    """Finished chunks are never read again, a join goes on with its next slice, and neither the first
    copy, which fills its tables in place, nor a second one, beside them, loses or doubles a row."""
    url = make_shop(server, "chunks", orders=3_000)
    project = make_project(tmp_path, url, slot="chunks", model=MODEL, more='chunk_bytes = "64KiB"\n')

    for copies, passages in enumerate(KILLS_AMID_COPIES, 1):
        before: list[CopyMark] = []
        for point, passage in passages:
            change(url, passage)
            process = start(project, "run_once", step_bytes=16384, failpoints=f"{point}=kill@{passage}")
            assert process.wait(60) == -9, f"passage {passage} of {point} was never reached: {said(project)}"
            before = before or marks_of(project, "orders")
        run_once(project)
        assert_whole(project)
        marks = marks_of(project, "orders")
        assert [mark.kind for mark in marks].count("begin") == copies
        assert marks[: len(before)] == before
        chunks = sorted(mark.chunk for mark in marks if mark.kind == "chunk")
        assert len(chunks) >= 3
        assert chunks == list(range(len(chunks)))
        if copies == 1:
            tables = ("customers", "products", "orders", "order_items", "accounts")
            assert main(["tables", "resync", *tables, "--project", str(project.root)]) == 0


def marks_of(project: Project, table: str) -> list[CopyMark]:
    """What the log holds of a table's newest copy, behind the begin of every earlier one."""
    with closing(SQLiteLog(project.state / "log" / "shop.db", read_only=True)) as log:
        marks = [mark for _, name, _, _, mark in log.copy_marks() if name.name == table]
    begins = [number for number, mark in enumerate(marks) if mark.kind == "begin"]
    return [marks[number] for number in begins[:-1]] + marks[begins[-1] :] if begins else []


def test_goes_on_after_an_error_at_every_failpoint(
    server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An I/O error at the second passage of each; the running pipeline tries again by itself. Not where it is
    the log that could not be synced: that stops capture, see test_log.py."""
    url = database(server, "raise")
    project = make_project(tmp_path, url, slot="raise", model=MODEL)
    armed = failpoints._parse(";".join(f"{point}=raise@2" for point in COPY if point != "log.segment.sync"))
    monkeypatch.setattr(failpoints, "_armed", armed)
    pipeline = Pipeline(load_project(project.root))
    thread = threading.Thread(target=pipeline.run)
    thread.start()
    try:
        for seed in range(100):
            if all(point.passed >= 2 for point in armed.values()):
                break
            change(url, seed)
            time.sleep(0.2)
        assert not [name for name, point in armed.items() if point.passed < 2]
        change(url, 200)
        with psycopg.connect(url) as db:
            newest = db.execute("SELECT max(order_id) FROM order_items").fetchall()[0][0]
        until(lambda: _number(project, "max(order_id)", "order_items") >= newest, 30, "it goes on")
        assert pipeline.status()["stopped"] == {}
    finally:
        pipeline.stop.set()
        thread.join(30)
    run_once(project)
    assert_whole(project)


def test_killed_and_failed_during_a_redrive(server: PostgresServer, tmp_path: Path) -> None:
    project = make_project(tmp_path, database(server, "redrive"), slot="redrive", model=MODEL)
    run_once(project)
    opened = "SELECT DISTINCT key FROM headrace.quarantine WHERE status = 'quarantined'"
    with duckdb.connect(str(project.destination.path)) as db:
        keys = [row[0] for row in db.execute(opened).fetchall()]
    assert keys
    mended = MODEL.replace("CAST(discount", "TRY_CAST(discount")
    (project.models / "sales.sql").write_text(mended)
    run_once(project)
    code = (
        "import sys; from pathlib import Path; from headrace.pipeline import Pipeline\n"
        "from headrace.config import load_project\n"
        "pipeline = Pipeline(load_project(Path(sys.argv[1])))\n"
        "print(pipeline.lanes[0].redrive('sales', sys.argv[2:]))"
    )
    codes = []
    for action in ("kill", "raise", ""):
        armed = f"destination.redrive.commit={action}" if action else ""
        done = subprocess.run(
            [sys.executable, "-c", code, str(project.root), *keys],
            env={**os.environ, "HEADRACE_FAILPOINTS": armed},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        codes.append(done.returncode)
        with duckdb.connect(str(project.destination.path), read_only=True) as db:
            left = len(db.execute(opened).fetchall())
        assert left == (len(keys) if action else 0), done.stderr
    assert codes == [-9, 1, 0]
    assert_whole(project)


def test_a_killed_pipeline_leaves_nothing_that_stops_the_next(server: PostgresServer, tmp_path: Path) -> None:
    """Lock, socket and slot of a dead one are taken over at once."""
    project = make_project(tmp_path, database(server, "takeover"), slot="takeover")
    with running(project) as first:
        until(lambda: project.destination.path.exists() and (project.state / "lock").exists())
        first.kill()
        first.wait(10)
    began = time.monotonic()
    with running(project):
        until(lambda: _number(project, "count(*)", "orders") == 300, 20, "the next one copies")
    assert time.monotonic() - began < 20
    run_once(project)  # it was stopped as soon as one table was there
    assert_whole(project)


def _number(project: Project, what: str, table: str) -> int:
    with suppress(HeadraceError, OSError):
        answer = read(project, [f"SELECT coalesce({what}, 0) AS n FROM shop.{table}"])
        return int(answer[0]["n"][0].as_py())
    return -1
