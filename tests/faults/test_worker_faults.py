"""A pipeline that dies or is to end while workers are busy: they end with it, nothing is lost or doubled."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
from harness import make_project, run_once, said, start, stop

from headrace.config import Project
from headrace.errors import HeadraceError
from headrace.scaling.worker import NAME as WORKER_NAME
from headrace.server import read_rows
from headrace.stopping import GRACE
from headrace.testing.postgres import PostgresServer
from headrace.transform.python.worker import NAME as MODEL_NAME
from headrace.verify import verify
from pipelines import until

MODEL = """import time
from dataclasses import dataclass
import headrace

@dataclass
class Out:
    id: int
    n: int

@headrace.model(reads="raw.shop.t", key=["id"])
def m(row: headrace.Row) -> Out:
    time.sleep(0.003)
    return Out(int(row["id"]), int(row["v"]))
"""
Begin = Callable[[Project], "subprocess.Popen[str]"]
ROWS = 30_000  # three parts of half a minute each, since nobody knows yet how slow it is


def processes_of(pid: int) -> set[int]:
    """Return the processes that a process has started, and those that these have."""
    parents = dict[int, int]()
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError, ValueError):
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
    found, last = set[int](), {pid}
    while last:
        last = {child for child, parent in parents.items() if parent in last}
        found |= last
    return found


def are_busy(pid: int) -> bool:
    """Whether a worker has a process of a Python model."""
    return any(named(each, MODEL_NAME) for each in named(pid, WORKER_NAME))


def named(pid: int, name: str) -> list[int]:
    """Return the processes below one that are called so."""
    found = list[int]()
    for each in processes_of(pid):
        with suppress(OSError):
            if (Path("/proc") / str(each) / "comm").read_text() == f"{name}\n":
                found.append(each)
    return found


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # of a process whose parent is gone, if nobody asks for it


@pytest.fixture
def project(tmp_path: Path, server: PostgresServer) -> Project:
    server.psql("CREATE DATABASE busy_workers")
    url = server.url.removesuffix("postgres") + "busy_workers"
    with psycopg.connect(url, autocommit=True) as db:
        db.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
    scale = '[scale]\npolicy = "static"\nmax_workers = 2\n'
    made = make_project(tmp_path, url, slot="busy_workers", more=scale)
    (made.models / "m.py").write_text(MODEL)
    run_once(made)
    with psycopg.connect(url, autocommit=True) as db:
        for end in range(5_000, ROWS + 1, 5_000):
            db.execute(f"INSERT INTO t SELECT i, i FROM generate_series({end - 4_999}, {end}) i".encode())
    return made


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Start a pipeline, which ends with the test at the latest."""
    begun = list[subprocess.Popen[str]]()

    def begin(project: Project) -> subprocess.Popen[str]:
        begun.append(start(project))
        return begun[-1]

    yield begin
    for each in begun:
        each.kill()
        each.wait()


def test_a_pipeline_that_ends_while_workers_are_busy_takes_them_along_and_loses_nothing(
    project: Project, begin: Begin
) -> None:
    folder = project.state / "workers"
    # Killed: there is nobody to tell them.
    killed = begin(project)
    until(lambda: are_busy(killed.pid))
    until(lambda: len(named(killed.pid, WORKER_NAME)) == 2)
    theirs = processes_of(killed.pid)
    (epoch,) = folder.iterdir()
    (epoch / "half.making").touch()
    killed.kill()
    killed.wait(10)
    until(lambda: not any(map(is_alive, theirs)), 10, "workers outlive their pipeline")
    # Told to end: what would take long is given up.
    ended = begin(project)
    until(lambda: are_busy(ended.pid))
    assert not epoch.exists()
    theirs, began = processes_of(ended.pid), time.monotonic()
    assert stop(ended) == 0
    assert GRACE - 2 < time.monotonic() - began < GRACE + 8, said(project)
    assert not any(map(is_alive, theirs))
    assert list(folder.iterdir()) == []
    assert "is left to the next start" in said(project)
    assert list(read_rows(project, "SELECT count(*) FROM m")[1]) == [(0,)]
    # Left alone: all of it is there, once.
    (project.models / "m.py").write_text(MODEL.replace("time.sleep(0.003)", ""))
    left = begin(project)
    until(lambda: is_done(project), 120)
    assert stop(left) == 0
    wrong = [finding for finding in verify(project).findings if not finding.ok]
    assert not wrong, wrong
    assert "Traceback" not in said(project)


def is_done(project: Project) -> bool:
    with suppress(HeadraceError, OSError):
        rows = read_rows(project, "SELECT count(*), sum(n)::BIGINT FROM m")[1]
        return [tuple(row) for row in rows] == [(ROWS, ROWS * (ROWS + 1) // 2)]
    return False
