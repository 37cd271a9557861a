"""Benchmarks, each a ratio against a named rival in the same run.

    python benchmarks/bench.py NAME --json [--quick] [--case CASE]

prints one object: name, unit, machine, cases: {case: {ours, rival, rival_name, ratio, runs}}. `ours`,
`rival` and `ratio` are medians over the runs; a case may tell more. docs/benchmarks.md says what each
one measures.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import signal
import statistics
import sys
from pathlib import Path

NAMES = (
    "log",
    "capture",
    "catchup",
    "end_to_end",
    "postgres_apply",
    "merge",
    "snapshot",
    "models",
    "quarantine",
    "rebuild",
    "debezium",
    "latency",
    "idle",
    "overload",
    "memory",
    "scaling",
)


def machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--json", action="store_true", help="on one line")
    parser.add_argument("--quick", action="store_true", help="at most about a minute; says little")
    parser.add_argument("--case", help="only this one")
    arguments = parser.parse_args()
    # Told to stop, we still stop the servers and remove the folders.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.path.insert(0, str(Path(__file__).parent))
    module = importlib.import_module(arguments.name)
    if arguments.case not in (None, *module.CASES):
        parser.error(f"{arguments.name} has the cases {', '.join(module.CASES)}")
    from rig import Unavailable

    try:
        measured = module.run(quick=arguments.quick, case=arguments.case)
    except Unavailable as error:
        print(error, file=sys.stderr)
        return 2
    cases = {}
    for case, (rival_name, runs, extra) in measured["cases"].items():
        cases[case] = {
            "ours": readable(statistics.median(run["ours"] for run in runs)),
            "rival": readable(statistics.median(run["rival"] for run in runs)),
            "rival_name": rival_name,
            "ratio": round(statistics.median(run["ours"] / run["rival"] for run in runs), 3),
            "runs": [{key: readable(value) for key, value in run.items()} for run in runs],
            **extra,
        }
    result = {"name": arguments.name, "unit": measured["unit"], "machine": machine(), "cases": cases}
    print(json.dumps(result) if arguments.json else json.dumps(result, indent=2))
    return 0


def readable(number: float) -> float:
    return round(number) if abs(number) >= 100 else round(number, 3)


if __name__ == "__main__":
    sys.exit(main())
