"""A decision, killed at each durable step: it is in log, table and quarantine, or nowhere."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.failpoints import VARIABLE
from headrace.log.sqlite import SQLiteLog
from headrace.testing.postgres import PostgresServer
from live import LiveProject
from projects import here

MODEL = "SELECT id::INT AS id, amount::INT AS amount FROM raw.shop.t"
STEPS = {
    ("discard", "2", "--reason", "typed twice"): ("discarded", [(1, 1), (4, 4)]),
    ("patch", "3", "amount=33"): ("resolved", [(1, 1), (3, 33), (4, 4)]),
    ("undo", "3"): ("quarantined", [(1, 1), (4, 4)]),
}
"""What is decided, one after the other, of which key, and what its record and the table are then."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("decisions") / "pg") as started:
        yield started


@pytest.fixture
def shop(tmp_path: Path, server: PostgresServer) -> LiveProject:
    made = LiveProject(
        tmp_path / "project",
        server,
        "DROP TABLE IF EXISTS t",
        "CREATE TABLE t (id int PRIMARY KEY, amount text)",
        "INSERT INTO t VALUES (1, '1'), (2, 'two'), (3, 'three'), (4, '4')",
    )
    made.model(MODEL)
    made.run()
    return made


@pytest.mark.parametrize(
    "place",
    ["log.append.commit", "log.append.committed", "staging.commit_synced", "destination.redrive.commit"],
)
def test_a_decision_is_whole_or_not_at_all_wherever_its_process_dies(shop: LiveProject, place: str) -> None:
    died = 0
    for (verb, key, *more), (after, rows) in STEPS.items():
        (record,) = shop.rows(f"SELECT id::VARCHAR, status FROM headrace.quarantine WHERE key = '{key}'")
        command = ("quarantine", verb, str(record[0]), *more)
        known = decisions(shop)
        died += killed(shop, place, *command)
        shop.run()
        is_taken = decisions(shop) > known
        assert status(shop, key) == (after if is_taken else record[1])
        if not is_taken:
            assert here(*command, cwd=shop.project.root).code == 0
        assert decisions(shop) == known + 1
        assert (status(shop, key), table(shop)) == (after, rows)
    assert died == len(STEPS)
    assert here("rebuild", "m", cwd=shop.project.root).code == 0
    assert (status(shop, "2"), status(shop, "3"), table(shop)) == ("discarded", "quarantined", rows)
    shop.assert_verified()


def killed(shop: LiveProject, place: str, *command: str) -> bool:
    """Run a command in a process that dies at a place; returns whether it has come there."""
    whole = [sys.executable, "-m", "headrace", *command, "--project", str(shop.project.root)]
    environment = {**os.environ, VARIABLE: f"{place}=kill"}
    done = subprocess.run(whole, env=environment, capture_output=True, timeout=60, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


def decisions(shop: LiveProject) -> int:
    log = SQLiteLog(shop.project.log_path("shop"), read_only=True)
    try:
        headers = log.headers(0, log.end().offset)
        return sum(item.entry.kind == "decision" for item in headers)
    finally:
        log.close()


def status(shop: LiveProject, key: str) -> object:
    ((found,),) = shop.rows(f"SELECT status FROM headrace.quarantine WHERE key = '{key}'")
    return found


def table(shop: LiveProject) -> list[tuple[object, ...]]:
    return shop.rows("SELECT id, amount FROM main.m ORDER BY id")
