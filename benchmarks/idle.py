"""What `headrace run` costs at rest: processor time and memory while nothing changes at the source.

The rival is a budget: 1 % of one core, 150 MB. The table has been copied and the pipeline has settled.
"""

from __future__ import annotations

import time
from typing import Any

import workload
from rig import Case, cpu_seconds, memory_mb, open_rig, running

CASES = ("cpu", "memory")
CPU_BUDGET = 1.0  # percent of one core
MEMORY_BUDGET = 150.0  # MB resident
SETTLE = 10.0  # seconds, for its start and for what it had in hand


def run(*, quick: bool, case: str | None = None) -> dict[str, Any]:
    seconds, times, rows = (10, 1, 10_000) if quick else (30, 3, 1_000_000)
    cpu, memory = [], []
    with open_rig() as rig:
        workload.create(rig)
        workload.insert_big(rig, rows)
        attached = rig.attach()
        for _ in range(times):
            with running("pipeline", attached) as child:
                time.sleep(SETTLE)
                before = cpu_seconds(child.pid)
                time.sleep(seconds)
                percent = 100 * (cpu_seconds(child.pid) - before) / seconds
                cpu.append({"ours": percent, "rival": CPU_BUDGET})
                # The rest is pages of shared libraries, which the kernel drops when it needs room.
                private = memory_mb(child.pid, "RssAnon")
                memory.append(
                    {"ours": memory_mb(child.pid, "VmRSS"), "rival": MEMORY_BUDGET, "private": private}
                )
    cases: dict[str, Case] = {
        "cpu": ("a budget of 1 % of one core", cpu, {"unit": "% of one core", "seconds": seconds}),
        "memory": ("a budget of 150 MB", memory, {"unit": "MB resident"}),
    }
    return {"unit": "see each case", "cases": {name: cases[name] for name in CASES if case in (None, name)}}
