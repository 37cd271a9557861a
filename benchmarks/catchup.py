"""Catching up a backlog into the durable log, against `pg_recvlogical -f /dev/null` on the same WAL.

- small_tx: transactions of 50 rows;
- big_tx: all rows in one transaction;
- long_open_tx: transactions of 50 rows, and another one that has written and stays open from before
  the first to after the last run.

The clock of ours runs from just before the source is read until the log has fsynced the last row.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import workload
from rig import RECVLOGICAL, Backlog, Case, Rig, by_turns, open_rig, ours

CASES = ("small_tx", "big_tx", "long_open_tx")


def run(*, quick: bool, case: str | None = None) -> dict[str, Any]:
    rows, times = (150_000, 1) if quick else (2_000_000, 5)
    chosen = CASES if case is None else (case,)
    return {"unit": "rows/s", "cases": {name: measure(name, rows, times) for name in chosen}}


def measure(case: str, rows: int, times: int, settings: str = "") -> Case:
    """Measure one case; `settings` are lines of [source.shop]."""
    load = workload.insert_big if case == "big_tx" else workload.insert_small
    with open_rig() as rig:
        workload.create(rig)
        attached = rig.attach(settings)
        with workload.left_open(rig) if case == "long_open_tx" else nullcontext():
            load(rig, rows)
            backlog = rig.settle()
            runs = by_turns(
                times,
                {
                    "ours": lambda: capture(rig, attached, backlog, rows),
                    "rival": lambda: {"rival": rows / rig.recvlogical(backlog.end)},
                },
            )
    return RECVLOGICAL, runs, {"rows": rows}


def capture(rig: Rig, attached: Any, backlog: Backlog, rows: int) -> dict[str, float]:
    """Capture the backlog once; all of it must be in the log."""
    measured = ours("capture", rig.again(attached), backlog.head)
    assert measured["rows"] == rows, f"{measured['rows']} rows in the log instead of {rows}"
    return {"ours": rows / measured["seconds"]}
