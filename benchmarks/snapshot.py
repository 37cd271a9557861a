"""The initial copy into the durable log, against Postgres's own `COPY … TO STDOUT (FORMAT binary)`.

One worker each. Sizes grow: the ratio is that of the largest, `rows_per_second` tells all, so that a
copy that slows down as a table grows is seen. The clock of ours runs from just before the source is
first asked, slot and publication included, until the log has fsynced the last row.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from typing import Any

import workload
from rig import SLOT, TIMEOUT, Rig, Runs, by_turns, open_rig, ours

from headrace.testing.postgres import clean_environment

CASES = ("one_worker",)
ONE_WORKER = "copy_workers = 1\n"


def run(*, quick: bool, case: str | None = None) -> dict[str, Any]:
    assert case in (None, *CASES)
    step, steps, times = (200_000, 2, 1) if quick else (1_000_000, 3, 3)
    by_size: dict[int, Runs] = {}
    with open_rig() as rig:
        workload.create(rig)
        rows = 0
        for size in (step << n for n in range(steps)):
            workload.insert_big(rig, size - rows)
            rows = size
            rig.db.execute("VACUUM (FREEZE) orders")
            rig.db.execute("CHECKPOINT")
            by_size[rows] = _measure(rig, rows, times)
    speeds = {
        str(size): {who: round(statistics.median(run[who] for run in runs)) for who in ("ours", "rival")}
        for size, runs in by_size.items()
    }
    extra = {"rows": rows, "rows_per_second": speeds}
    rival = "COPY orders TO STDOUT (FORMAT binary) by psql > /dev/null"
    return {"unit": "rows/s", "cases": {"one_worker": (rival, by_size[rows], extra)}}


def _measure(rig: Rig, rows: int, times: int) -> Runs:
    return by_turns(
        times,
        {
            "ours": lambda: {"ours": rows / _copy(rig, rows)},
            "rival": lambda: {"rival": rows / _rival(rig)},
        },
    )


def _copy(rig: Rig, rows: int) -> float:
    """Copy the table into a new project's log; all of it must be there."""
    rig.drop_slot(SLOT)
    measured = ours("copy", rig.project(ONE_WORKER))
    assert measured["rows"] == rows, f"{measured['rows']} rows in the log instead of {rows}"
    return measured["seconds"]


def _rival(rig: Rig) -> float:
    begin = time.monotonic()
    subprocess.run(
        [rig.server.bin / "psql", "-X", "-q", "-d", rig.server.url,
         "-c", "COPY orders TO STDOUT (FORMAT binary)"],
        stdout=subprocess.DEVNULL,
        check=True,
        timeout=TIMEOUT,
        env=clean_environment(),
    )  # fmt: skip
    return time.monotonic() - begin
