"""What a running pipeline measures and says of scaling, beside a database."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace.config import load_project
from headrace.errors import UserError
from headrace.pipeline import Pipeline, open_lanes
from headrace.rebuilding import Rebuilding
from headrace.scaling.journal import FILE, Journal
from headrace.scaling.policy import Load, Snapshot
from headrace.testing.postgres import PostgresServer
from live import LiveProject
from pipelines import running, stage, until
from projects import here

ROWS = 60_000
WHOLE = "sales (all of it)"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("scaling") / "pg") as started:
        yield started


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.scaling.measure._WARM", 0.5)
    monkeypatch.setattr("headrace.scaling.controller.DECIDE_EVERY", 0.2)
    monkeypatch.setattr("headrace.autoscaling.LOOK_EVERY", 0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.usefixtures("quick")
def test_what_waits_is_measured_decided_on_told_and_remembered(
    tmp_path: Path, server: PostgresServer
) -> None:
    live = LiveProject(
        tmp_path,
        server,
        "DROP TABLE IF EXISTS orders, quiet",
        "CREATE TABLE orders (id int PRIMARY KEY, amount text)",
        "CREATE TABLE quiet (id int PRIMARY KEY)",
    )
    port = free_port()
    with (tmp_path / "headrace.toml").open("a") as file:
        file.write(f'[scale]\nfreshness = "2s"\nmax_workers = 3\nprice = 0.5\nlisten = ":{port}"\n')
    live.project = load_project(tmp_path)
    live.model("SELECT id, amount::INTEGER AS amount FROM raw.shop.orders", "sales", 'freshness = "3s"')

    def loads() -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/scale") as answer:
            decision = json.load(answer)["decision"]
        return {load["model"]: load for load in decision["snapshot"]["loads"]} if decision else {}

    with running(live.project) as pipeline:
        meter = pipeline.lanes[0].meter
        targets = {("sales", 3.0), ("shop.quiet", 2.0)}
        until(lambda: {(load.model, load.slo) for load in meter.loads() or ()} >= targets, what="no figures")
        assert not loads()  # nothing has been done, and nothing waits
        with pipeline.lanes[0].applying:
            live.sql(f"INSERT INTO orders SELECT i, i FROM generate_series(1, {ROWS}) i")
            until(lambda: "sales" in loads() and loads()["sales"]["oldest_age"] > 1.0, what="not seen")
            held = loads()["sales"]
            assert held["ewma_30s"] > 0
            assert held["backlog_rows"] == ROWS
            assert held["backlog_bytes"] > ROWS
            assert (held["slo"], held["own_rate"], held["worth"]) == (3.0, None, None)
        until(lambda: loads()["sales"]["backlog_rows"] == 0, what="the backlog stays")
        until(lambda: loads()["sales"]["own_rate"], what="preparing is not measured")
        found = json.loads(here("scale", "status", "--json", cwd=tmp_path).out)
        assert (found["running"], found["ready"]) == (True, 0)
        snapshot = found["decision"]["snapshot"]
        assert snapshot["apply_rate"] > 1_000
        assert (snapshot["limits"]["max_workers"], snapshot["limits"]["price"]) == (3, 0.5)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            text = answer.read().decode()
        assert 'headrace_scale_own_rows_per_second{model="sales"} ' in text
    entries = list(Journal(live.project.state / FILE).read())
    codes = {entry.decision.reason.code.value for entry in entries}
    assert codes & {"behind", "SLO_INFEASIBLE", "figures_missing"}
    explained = here("scale", "explain", "--json", cwd=tmp_path)
    assert json.loads(explained.out)["at"] == entries[-1].at.isoformat()
    own = loads_of(entries[-1].snapshot)["sales"].own_rate
    assert own is not None
    with socket.create_server(("127.0.0.1", port)), pytest.raises(UserError, match="Nothing can listen"):
        Pipeline(live.project).run()
    with running(live.project):  # what was measured is known again, although nothing is prepared
        until(lambda: "sales" in loads())
        assert loads()["sales"]["own_rate"] == pytest.approx(own)


@pytest.mark.usefixtures("quick")
def test_a_rebuild_is_work_of_its_own(
    tmp_path: Path, server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = LiveProject(
        tmp_path,
        server,
        "DROP TABLE IF EXISTS orders, quiet",
        "CREATE TABLE orders (id int PRIMARY KEY, amount text)",
        f"INSERT INTO orders SELECT i, i FROM generate_series(1, {ROWS}) i",
    )
    live.model("SELECT id, amount::INTEGER AS amount FROM raw.shop.orders", "sales")
    live.run()
    (lane,) = open_lanes(live.project)
    try:
        while lane.apply():
            pass

        let_go = threading.Event()
        prepare = Rebuilding.prepare

        def held(reading: Rebuilding, *of: Any) -> Any:
            let_go.wait(10)
            return prepare(reading, *of)

        monkeypatch.setattr(Rebuilding, "prepare", held)

        def begun(at: float) -> dict[str, Load]:
            """Return the loads once all that is to be prepared is found."""
            let_go.clear()
            lane.rebuild("sales")

            def loads() -> dict[str, Load]:
                lane.apply()
                lane.meter.look(at)
                lane.meter.look(at + 1)
                return {load.model: load for load in lane.meter.loads() or ()}

            until(lambda: WHOLE in (found := loads()) and found[WHOLE].backlog_rows > 0)
            found = loads()
            let_go.set()
            return found

        first = begun(0.0)
        assert first["sales"].backlog_rows == 0
        whole = first[WHOLE]
        assert (whole.backlog_rows, whole.own_rate, whole.ewma_300s) == (ROWS, None, 0.0)
        while lane.apply():
            pass
        lane.meter.look(2.0)
        assert [load.model for load in lane.meter.loads() or ()] == ["sales"]
        assert (begun(3.0)[WHOLE].own_rate or 0) > 1_000
    finally:
        lane.close()
        lane.destination.close()


def loads_of(snapshot: Snapshot) -> dict[str, Load]:
    return {load.model: load for load in snapshot.loads}


DEADLY = "json_contains(repeat('[', v::INT) || repeat(']', v::INT), '1')"
"""Deep JSON overflows the engine's stack, which ends the process."""
STATIC = '[scale]\npolicy = "static"\nmax_workers = 2\n'
PYTHON = """import os, time
from dataclasses import dataclass
import headrace

@dataclass
class Out:
    id: int

@headrace.model(reads="raw.shop.t", key=["id"])
def p(row: headrace.Row) -> Out:
    time.sleep(0.0002)
    if row["v"] == "1000000":
        os._exit(3)
    return Out(int(row["id"]))
"""


def staffed(folder: Path, server: PostgresServer, text: str = PYTHON) -> LiveProject:
    """A project that has two workers, always, and two models of one empty table."""
    live = LiveProject(
        folder, server, "DROP TABLE IF EXISTS orders, quiet, t", "CREATE TABLE t (id int PRIMARY KEY, v text)"
    )
    with (folder / "headrace.toml").open("a") as file:
        file.write(STATIC)
    live.project = load_project(folder)
    (live.project.models / "p.py").write_text(text)
    live.model(f"SELECT id, {DEADLY} AS x FROM raw.shop.t")
    live.run()
    return live


def insert(live: LiveProject, each: int, deadly: int, captured: Callable[[], None]) -> None:
    """Commit four times `each` rows, which become entries of the log; of one row processes of models die."""
    for begin in range(1, 4 * each, each):
        live.sql(
            f"INSERT INTO t SELECT i, CASE i WHEN {deadly} THEN 1000000 ELSE 1 END "
            f"FROM generate_series({begin}, {begin + each - 1}) i"
        )
        captured()


def test_a_record_that_ends_workers_is_quarantined_alone_and_soon(
    tmp_path: Path, server: PostgresServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("headrace.handover._BEGUN_WITHIN", 30.0)  # in this process it must not be tried
    monkeypatch.setattr("headrace.handover._TRICKLE", 0)
    monkeypatch.setattr("headrace.cutting._MOST_ROWS", 300)
    monkeypatch.setattr("headrace.scaling.measure.Meter.is_worth_a_worker", lambda *_: True)
    live = staffed(tmp_path, server)
    with running(live.project) as pipeline:
        pool = pipeline._scaling._pool
        assert pool is not None
        until(lambda: pool.state().ready == 2)
        pids = set(pool.pids())
        insert(live, 300, 700, lambda: time.sleep(0.5))
        began = time.monotonic()
        until(
            lambda: live.rows("SELECT count(*) FROM m") == live.rows("SELECT count(*) FROM p") == [(1_199,)]
        )
        assert time.monotonic() - began < 30
        records = live.rows("SELECT model, key, reason FROM headrace.quarantine ORDER BY model")
        assert records == [("m", "700", "crash.signal"), ("p", "700", "crash.exit")]
        until(lambda: pool.state().ready == 2)
        assert not pids <= set(pool.pids())  # one may have died of it twice
        assert 0 < pool.service()["m"].all_rows < 1_200
        assert pool.service()["p"].all_rows == 1_200
        # It is known now, to whoever has its history judged again in the pipeline's own process.
        assert json.loads(here("quarantine", "redrive", "--all", "--json", cwd=tmp_path).out)
    told = [record.getMessage() for record in caplog.records if record.name == "headrace.alert"]
    assert len([line for line in told if "NEW CAUSE" in line and "crash.signal" in line]) == 1
    assert sum("is replaced" in record.getMessage() for record in caplog.records) == 2
    live.assert_verified()


def test_a_run_that_ends_has_a_backlog_done_by_workers(tmp_path: Path, server: PostgresServer) -> None:
    live = staffed(tmp_path, server, PYTHON.replace("0.0002", "0.0005"))
    insert(live, 3_000, 0, lambda: stage(live.project))
    pipeline = Pipeline(live.project)
    pool = pipeline._scaling._pool
    assert pool is not None
    pipeline.run_once()
    assert pool.service()["p"].all_rows
    assert (pool.pids(), list((live.project.state / "workers").iterdir())) == ([], [])
    assert live.rows("SELECT count(*) FROM p") == [(12_000,)]
    live.assert_verified()
