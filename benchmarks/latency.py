"""What an application notices: pgbench's p95 latency with Headrace attached, against the same without.

The load is fixed (`pgbench -R`, TPC-B-like), and latency counts from when a transaction was due, so
that a stall is not hidden. The server fsyncs. Server, pgbench and Headrace share the machine's cores;
Headrace runs at nice 19, which stands for a machine of its own: what the source's own processes do for
us (the walsender, the backend of the copy) runs at normal priority and is what is measured.

- streaming: the whole pipeline, caught up before, bringing over what pgbench changes;
- copying: initial copies of a large table into the log, one after the other, all the time.
"""

from __future__ import annotations

import math
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import workload
from rig import SLOT, Case, Rig, by_turns, open_rig, running

from headrace.testing.postgres import clean_environment

CASES = ("streaming", "copying")
RATE = 200  # transactions per second
CLIENTS = 4
NICENESS = 19
RAMP = 2.0  # seconds at each window's beginning that do not count
COPY_BUDGET = 'copy_workers = 1\ncopy_rate = "4MiB"\n'

_SELECTED = 'tables = ["public.pgbench_*", "!public.pgbench_history"]\n'
_COPIED = 'tables = ["public.orders"]\nslot = "headrace_copy"\npublication = "headrace_copy"\n'


def run(*, quick: bool, case: str | None = None) -> dict[str, Any]:
    seconds, times, rows = (6, 1, 200_000) if quick else (30, 5, 2_000_000)
    settings = {"shared_buffers": "1GB", "max_wal_size": "4GB"}
    chosen = CASES if case is None else (case,)
    with open_rig(durable=True, settings=settings) as rig:
        _pgbench(rig, "-i", "-q", "-s", "10")
        workload.create(rig)
        workload.insert_big(rig, rows)
        rig.db.execute("VACUUM ANALYZE")
        cases = {name: _measure(rig, name, seconds, times) for name in chosen}
    return {"unit": "microseconds, p95", "cases": cases}


def _measure(rig: Rig, case: str, seconds: int, times: int) -> Case:
    beside: Callable[[], AbstractContextManager[None]]
    if case == "streaming":
        attached = rig.attach(_SELECTED)
        beside = lambda: _streaming(rig, attached)  # noqa: E731
    else:
        beside = lambda: _copying(rig)  # noqa: E731
    runs = by_turns(
        times,
        {
            "ours": lambda: _window(rig, "ours", seconds, beside()),
            "rival": lambda: _window(rig, "rival", seconds, nullcontext()),
        },
    )
    extra = {"rate": RATE, "clients": CLIENTS, "seconds": seconds, "niceness": NICENESS}
    return "the same load without Headrace", runs, extra


def _window(rig: Rig, who: str, seconds: int, beside: AbstractContextManager[None]) -> dict[str, float]:
    """Return the p95 latency of one window, in microseconds, and how many transactions it is of."""
    rig.db.execute("CHECKPOINT")
    prefix = rig.folder / f"window{time.monotonic_ns()}"
    with beside:
        begin = time.time()
        _pgbench(
            rig, "-n", "-M", "prepared", "-c", str(CLIENTS), "-j", "1", "-R", str(RATE),
            "-T", str(seconds), "--log", f"--log-prefix={prefix}",
        )  # fmt: skip
    (log,) = rig.folder.glob(f"{prefix.name}.*")
    latencies = sorted(_latencies(log, begin + RAMP))
    p95 = latencies[math.ceil(len(latencies) * 0.95) - 1]
    return {who: p95, f"{who}_transactions": len(latencies)}


def _latencies(log: Path, since: float) -> Iterator[float]:
    """Yield each transaction's latency, of a log of pgbench: client, number, latency, script, seconds,
    microseconds, lag."""
    for line in log.read_text().splitlines():
        _, _, latency, _, second, microsecond, *_ = line.split()
        if int(second) + int(microsecond) / 1e6 >= since:
            yield float(latency)


@contextmanager
def _streaming(rig: Rig, attached: Path) -> Iterator[None]:
    with running("pipeline", attached, niceness=NICENESS):
        mark = rig.one("SELECT pg_logical_emit_message(true, 'headrace', 'window')::text")
        reached = (
            f"SELECT confirmed_flush_lsn > '{mark}' FROM pg_replication_slots WHERE slot_name = '{SLOT}'"
        )
        deadline = time.monotonic() + 120
        while not rig.one(reached):
            if time.monotonic() > deadline:
                raise TimeoutError("the pipeline did not catch up in two minutes")
            time.sleep(0.1)
        time.sleep(2)  # what is captured is still to be applied
        yield


@contextmanager
def _copying(rig: Rig) -> Iterator[None]:
    stop = threading.Event()
    copier = threading.Thread(target=_copy_on, args=(rig, stop))
    copier.start()
    try:
        yield
    finally:
        stop.set()
        copier.join()


def _copy_on(rig: Rig, stop: threading.Event) -> None:
    while not stop.is_set():
        rig.drop_slot("headrace_copy")
        with running("copy", rig.project(_COPIED + COPY_BUDGET), niceness=NICENESS) as child:
            while child.poll() is None and not stop.wait(0.05):
                pass


def _pgbench(rig: Rig, *arguments: str) -> None:
    command = [rig.server.bin / "pgbench", *arguments, rig.server.url]
    subprocess.run(command, check=True, capture_output=True, env=clean_environment())
