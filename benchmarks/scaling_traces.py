"""The tables of docs/scaling.md: what each way of scaling does with real and with made-up arrivals.

    python benchmarks/scaling_traces.py [FOLDER]

Real ones are the first two weeks of three traces, from tests/data; the first week teaches the schedule, the
second is judged. FOLDER holds the whole traces of the Numenta Anomaly Benchmark (nyc_taxi.csv,
Twitter_volume_AAPL.csv, elb_request_count_8c0756.csv), which are judged as well then.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from headrace.scaling.arrivals import Arrivals, read_csv
from headrace.scaling.baselines import compare
from headrace.scaling.policy import SloBand
from headrace.scaling.simulation import Limits, Outcome, Plant, simulate
from headrace.testing.arrivals import GENERATED, read_compact

DATA = Path(__file__).parents[1] / "tests" / "data" / "arrivals"
WEEK = 7 * 86_400.0
MU = 1000.0
PLANT = Plant(MU, slo=120.0, start=60.0, pause=3.0, limits=Limits(1, 64))
TRACES = {  # the file of two weeks, the whole one, and how many workers the mean keeps busy
    "taxi": ("nyc_taxi.csv", 6.0),
    "load balancer": ("elb_request_count_8c0756.csv", 6.0),
    "mentions": ("Twitter_volume_AAPL.csv", 3.0),
}


def traces() -> Iterator[tuple[str, Arrivals, Arrivals]]:
    for name, (_, mean) in TRACES.items():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "arrivals.csv"
            file.write_text(read_compact(DATA / f"{name.replace(' ', '_')}.txt"))
            every = read_csv(file)
        yield name, *weeks(every, mean)
    for name, make in GENERATED.items():
        yield name, *weeks(make(), 0.2 if "idle" in name else 3.0)


def weeks(every: Arrivals, mean: float) -> tuple[Arrivals, Arrivals]:
    """Return the first and the second week, scaled so that the second keeps `mean` workers busy."""
    history, rest = every.split(WEEK)
    judged = rest.split(WEEK)[0]
    return replace(history, rows=history.rows * (mean * MU / judged.rate)), judged.scaled(mean * MU)


def cell(outcome: Outcome) -> str:
    return (
        f"{outcome.ratio:.2f} / {outcome.minutes_over:.1f} / {outcome.p99_freshness:.0f} / "
        f"{outcome.actions_per_day:.0f}"
    )


def main() -> None:
    print("cost over the lower bound / minutes over target in a week / p99 s / changes a day\n")
    for name, history, judged in traces():
        for outcome in compare(judged, history, PLANT):
            print(f"{name:17} {outcome.policy:13} {cell(outcome)}")
        for start in (60.0, 180.0):
            for believed in (1.0, 1.3, 0.7):
                plant = replace(PLANT, start=start, believed=believed)
                outcome = simulate(judged, SloBand(), plant)
                print(f"{name:17} start {start:3.0f} s, mu x {believed:.1f}: {cell(outcome)}")
    if len(sys.argv) > 1:
        whole(Path(sys.argv[1]))


def whole(folder: Path) -> None:
    print("\nwhole traces")
    for name, (file, mean) in TRACES.items():
        every = read_csv(folder / file).scaled(mean * MU)
        began = time.process_time()
        outcome = simulate(every, SloBand(), PLANT)
        spent = time.process_time() - began
        print(f"{name:17} {every.seconds / 86_400:.0f} days: {cell(outcome)}, {spent:.1f} s of CPU")


if __name__ == "__main__":
    main()
