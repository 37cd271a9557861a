"""A quiet pipeline gets millions of rows at once, while one of its workers is killed every second.

    python benchmarks/burst.py [--rows N] [--workers N] [--no-kills]

The whole system: a Postgres server, `headrace run`, a model in Python, workers as they are decided on. First
comes a burst that the pipeline measures itself on, its workers killed as well; then `headrace scale plan` is
asked how long one of `rows` will take; then it comes, and the time from its commit until all of it is visible
is compared with that. Prints one object: the plan's seconds and the real ones, the workers that were seen
(how many, for how many seconds), how many were killed, and whether the table is what the source has.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import history
from rig import Rig, open_rig, running
from scaling import PYTHON

from headrace.config import load_project
from headrace.errors import HeadraceError
from headrace.scaling.worker import NAME
from headrace.server import read

_ROWS = """INSERT INTO orders SELECT i, i % 100000, (i % 9999999) / 100.0,
(ARRAY['new', 'paid', 'sent', 'back'])[i % 4 + 1], timestamptz '2020-01-01' + i * interval '1 second'
FROM generate_series({first}, {last}) i"""
_COLUMNS = ", ".join(f"{name} {type_}" for name, type_ in history.COLUMNS.items())
_FRESHNESS = 20
_PATIENCE = 600.0
_WIDTH = 100  # bytes of a row, of which a plan's disks are made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=3_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--no-kills", action="store_true")
    asked = parser.parse_args()
    with open_rig() as rig:
        rig.db.execute(f"CREATE TABLE orders ({_COLUMNS}, PRIMARY KEY (id))")
        folder = rig.project()
        (folder / "models").mkdir()
        (folder / "models" / "orders.py").write_text(PYTHON)
        with (folder / "headrace.toml").open("a") as file:
            file.write(f'[scale]\nfreshness = "{_FRESHNESS}s"\nmax_workers = {asked.workers}\n')
        with running("pipeline", folder) as child:
            result = _measure(rig, folder, child.pid, asked)
    print(json.dumps(result))
    return 0 if result["is_whole"] else 1


def _measure(rig: Rig, folder: Path, pid: int, asked: argparse.Namespace) -> dict[str, Any]:
    learnt = asked.rows // 3
    _until(folder, 0)
    first = _burst(rig, folder, pid, 1, learnt, kills=not asked.no_kills)
    _until_no_worker(pid)
    planned = _plan(folder, asked)
    second = _burst(rig, folder, pid, learnt + 1, learnt + asked.rows, kills=not asked.no_kills)
    _until_no_worker(pid)
    own = "count(*), sum(id), sum(round(amount, 2)), count(DISTINCT id)"
    theirs = "count(*), sum(order_id), sum(amount), count(DISTINCT order_id)"
    wanted = rig.db.execute(f"SELECT {own} FROM orders").fetchone()
    (found,) = read(load_project(folder), [f"SELECT {theirs} FROM orders"])
    is_whole = wanted is not None and list(map(str, wanted)) == [
        str(column[0].as_py()) for column in found.columns
    ]
    real = second["seconds"]
    return {
        "rows": asked.rows,
        "planned_seconds": round(planned, 1),
        "real_seconds": round(real, 1),
        "real_over_planned": round(real / planned, 2),
        "is_whole": is_whole,
        "killed": second["killed"],
        "workers": second["workers"],
        "learnt_on": {"rows": learnt, "seconds": round(first["seconds"], 1), "workers": first["workers"]},
    }


def _burst(rig: Rig, folder: Path, pid: int, first: int, last: int, *, kills: bool) -> dict[str, Any]:
    """Insert rows in one transaction, and wait until all are visible."""
    over, visible = threading.Event(), threading.Event()
    workers, killed = [len(_workers(pid))], 0

    def harass() -> None:
        nonlocal killed
        while not over.wait(1.0):
            pids = _workers(pid)
            workers.append(len(pids))
            if kills and pids and not visible.is_set():
                with suppress(ProcessLookupError):
                    os.kill(random.choice(pids), signal.SIGKILL)
                    killed += 1

    thread = threading.Thread(target=harass)
    thread.start()
    try:
        rig.db.execute(_ROWS.format(first=first, last=last))
        begin = time.monotonic()
        _until(folder, last)
        seconds = time.monotonic() - begin
        visible.set()
        _until_no_worker(pid)
    finally:
        over.set()
        thread.join()
    counts = [[count, len(list(same))] for count, same in itertools.groupby(workers)]
    return {"seconds": seconds, "workers": counts, "killed": killed}


def _workers(pipeline: int) -> list[int]:
    """Return the workers of a pipeline, which are forked from a child of it."""
    found = []
    for child in _children(pipeline):
        for pid in _children(child):
            with suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().rstrip() == NAME:
                    found.append(pid)
    return found


def _children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    found = list[int]()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, path.read_text().split())
    return found


def _until(folder: Path, rows: int) -> None:
    project, deadline = load_project(folder), time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        with suppress(HeadraceError, OSError):
            (answer,) = read(project, ["SELECT count(*) AS rows FROM orders"])
            if answer["rows"][0].as_py() == rows:
                return
        time.sleep(0.2)
    raise TimeoutError(f"{rows} rows are not visible within {_PATIENCE:.0f} s")


def _until_no_worker(pid: int) -> None:
    deadline = time.monotonic() + _PATIENCE
    while _workers(pid):
        if time.monotonic() > deadline:
            raise TimeoutError("there are workers although nothing waits")
        time.sleep(0.2)


def _plan(folder: Path, asked: argparse.Namespace) -> float:
    """Return the seconds that the project says a burst will take."""
    command = [
        sys.executable, "-m", "headrace", "scale", "plan", "--project", str(folder), "--json",
        "--rows-per-second", "1", "--row-bytes", str(_WIDTH), "--burst", str(asked.rows),
        "--freshness", f"{_FRESHNESS}s", "--max-workers", str(asked.workers),
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=60)
    told = json.loads(done.stdout)
    print(json.dumps(told), file=sys.stderr)
    return float(next(line["value"] for line in told["answers"] if "at once" in line["what"]))


if __name__ == "__main__":
    sys.exit(main())
