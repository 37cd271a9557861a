"""From source commit to queryable in DuckDB, against `pg_recvlogical -f /dev/null` on the same WAL.

The changes are made in transactions of 50 while no pipeline runs; then the pipeline, a process of its
own, brings them over. Its clock runs from the process's start until a query of the destination finds
the last row; only then destination and source are compared, by count and checksum.

- insert: rows into an empty table;
- mixed: 34 % inserts, 50 % updates and 16 % deletes, to a table that was copied before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import workload
from rig import RECVLOGICAL, Case, Rig, by_turns, open_rig, pipeline_until

from headrace.config import load_project
from headrace.server import read

CASES = ("insert", "mixed")


def run(*, quick: bool, case: str | None = None) -> dict[str, Any]:
    changes, times = (300_000, 1) if quick else (2_000_000, 3)
    chosen = CASES if case is None else (case,)
    return {"unit": "rows/s", "cases": {name: _measure(name, changes, times) for name in chosen}}


def _measure(case: str, changes: int, times: int) -> Case:
    keys = changes // 2
    with open_rig() as rig:
        workload.create(rig)
        if case == "mixed":
            workload.insert_big(rig, keys)
        attached = rig.attach()
        if case == "mixed":
            workload.mix(rig, changes, keys)
        else:
            workload.insert_small(rig, changes)
        backlog = rig.settle()
        runs = by_turns(
            times,
            {
                "ours": lambda: bring_over(rig, attached, changes),
                "rival": lambda: {"rival": changes / rig.recvlogical(backlog.end)},
            },
        )
    peak = max(run.pop("peak_rss_mb") for run in runs)
    return RECVLOGICAL, runs, {"rows": changes, "peak_rss_mb": round(peak)}


def bring_over(rig: Rig, attached: Path, changes: int) -> dict[str, float]:
    """Bring the backlog over once; the destination must then equal the source."""
    folder = rig.again(attached)
    # Changes become visible in source order, and the last transaction inserts the highest key.
    last = rig.one("SELECT max(id) FROM orders")
    took, peak = pipeline_until(folder, f"count(*) > 0 FROM shop.orders WHERE id = {last}")
    _check(rig, folder)
    return {"ours": changes / took, "peak_rss_mb": peak}


def _check(rig: Rig, folder: Path) -> None:
    there = rig.db.execute(f"SELECT {workload.SUMMARY} FROM orders").fetchone()
    (table,) = read(load_project(folder), [f"SELECT {workload.SUMMARY} FROM shop.orders"])
    here = tuple(column[0].as_py() for column in table.columns)
    assert here == there, f"the destination has {here}, the source {there}"
