"""For minutes the source commits faster than Headrace can take; then it is left alone.

Headrace is held to a fifth of its speed by stopping and continuing its process, the source writes at a
steady rate that is more than that. Told are the peak of its memory, how much WAL the slot held back, how
long the alarm took, and how long it took to catch up; every row must be there at the end. The rival is a
budget of memory.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import workload
from rig import SLOT, Rig, memory_mb, open_rig

from headrace.config import load_project
from headrace.server import read
from headrace.testing.postgres import clean_environment

CASES = ("memory",)
MEMORY_BUDGET = 400.0  # MB resident
RATE = 60_000  # rows per second, in transactions of 50
_STOPPED, _RUNNING = 0.4, 0.1  # seconds of each cycle
_SETTINGS = 'lag_alarm = "64MiB"\n'


def run(*, quick: bool, case: str | None = None) -> dict[str, Any]:
    assert case in (None, *CASES)
    seconds = 20 if quick else 300
    with open_rig() as rig:
        workload.create(rig)
        measured = _overload(rig, rig.attach(_SETTINGS), seconds)
    runs = [{"ours": measured.pop("peak_mb"), "rival": MEMORY_BUDGET}]
    told = {"unit": "MB resident", "seconds": seconds, **measured}
    return {"unit": "MB", "cases": {"memory": ("a budget of 400 MB", runs, told)}}


def _overload(rig: Rig, project: Path, seconds: int) -> dict[str, float]:
    log = (rig.folder / "run.log").open("w")
    command = [sys.executable, "-m", "headrace", "run", "--project", str(project)]
    child = subprocess.Popen(command, stdout=log, stderr=log, env=clean_environment())
    over = threading.Event()
    throttle = threading.Thread(target=_throttle, args=(child.pid, over))
    begin = time.monotonic()
    written = held = 0
    try:
        throttle.start()
        while (elapsed := time.monotonic() - begin) < seconds:
            if written < RATE * elapsed:
                workload.insert_small(rig, RATE // 4)
                written += RATE // 4
            else:
                time.sleep(0.05)
            held = max(held, _held(rig))
        over.set()
        throttle.join()
        lag_at_end, since = _held(rig), time.monotonic()
        while _rows(project) < written:
            if child.poll() is not None or time.monotonic() - since > 600:
                raise RuntimeError((rig.folder / "run.log").read_text()[-2000:])
            time.sleep(0.5)
        caught_up = time.monotonic() - since
        peak = memory_mb(child.pid, "VmHWM")
    finally:
        over.set()
        throttle.join()
        child.terminate()
        child.wait(60)
        log.close()
    words = (rig.folder / "run.log").read_text()
    assert _rows(project) == written, "rows are missing"
    return {
        "peak_mb": peak,
        "rows": written,
        "held_back_mb": round(held / 2**20),
        "held_back_at_end_mb": round(lag_at_end / 2**20),
        "caught_up_s": round(caught_up, 1),
        "alarms": words.count("ALARM shop.lag"),
        "resolved": words.count("RESOLVED shop.lag"),
    }


def _throttle(pid: int, over: threading.Event) -> None:
    """Let a process run for a part of each cycle only."""
    try:
        while not over.wait(_RUNNING):
            _signal(pid, signal.SIGSTOP)
            over.wait(_STOPPED)
            _signal(pid, signal.SIGCONT)
    finally:
        _signal(pid, signal.SIGCONT)


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _held(rig: Rig) -> int:
    row = rig.db.execute(
        "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn)::int8 FROM pg_replication_slots "
        "WHERE slot_name = %s",
        [SLOT],
    ).fetchone()
    assert row, "the slot is gone"
    return int(row[0])


def _rows(project: Path) -> int:
    try:
        (table,) = read(load_project(project), ["SELECT count(*) AS n FROM shop.orders"])
    except Exception:
        return 0
    return int(table["n"][0].as_py())
