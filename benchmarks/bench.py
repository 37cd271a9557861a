"""Benchmarks, each a ratio against a named rival in the same run.

    python benchmarks/bench.py NAME --json [--quick]

prints one object: name, unit, machine, cases: {case: {ours, rival, rival_name, ratio, runs}}.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import sys
from pathlib import Path

NAMES = ("end_to_end",)


def machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="at most a minute")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    measured = importlib.import_module(arguments.name).run(quick=arguments.quick)
    cases = {}
    for case, (rival_name, runs, extra) in measured["cases"].items():
        cases[case] = {
            "ours": round(statistics.median(run["ours"] for run in runs)),
            "rival": round(statistics.median(run["rival"] for run in runs)),
            "rival_name": rival_name,
            "ratio": round(statistics.median(run["ours"] / run["rival"] for run in runs), 3),
            "runs": runs,
            **extra,
        }
    result = {"name": arguments.name, "unit": measured["unit"], "machine": machine(), "cases": cases}
    print(json.dumps(result) if arguments.json else json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
