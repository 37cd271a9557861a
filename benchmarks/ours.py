"""Headrace's side of a measurement, as a process of its own: `python ours.py VERB FOLDER …`.

The last line of stdout is what was measured, as JSON. `seconds` begins when everything is imported and
opened, just before the source is read.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

from rig import memory_mb

from headrace.autoscaling import Autoscaling
from headrace.config import load_project
from headrace.lane import Lane
from headrace.memory import economise
from headrace.pipeline import Pipeline, open_lanes
from headrace.sources.postgres.tables import read_states


def once(folder: str) -> None:
    """Bring over what is committed now."""
    Pipeline(load_project(Path(folder))).run_once()
    print("{}")


def pipeline(folder: str) -> None:
    """Run until told to stop."""
    stop = threading.Event()
    _stop_on_sigterm(stop)
    Pipeline(load_project(Path(folder)), stop).run()


def capture(folder: str, head: str) -> None:
    """Fill the durable log until it is past the LSN `head`."""
    lane = _lane(folder)
    before = lane.log.end().offset
    begin = time.monotonic()
    lane.capture(threading.Event(), until=int(head))
    _tell(lane, before, time.monotonic() - begin)


def copy(folder: str) -> None:
    """Fill the durable log with the initial copy."""
    lane = _lane(folder)
    begin = time.monotonic()
    with closing(lane.source.read(lane.log)) as groups:
        for group in groups:
            if group:
                lane.log.append(group)
                if position := lane.log.position():
                    lane.source.confirm(position)
            states = read_states(lane.log).values()
            if states and all(state.stage in ("catching_up", "live") for state in states):
                break
    _tell(lane, 0, time.monotonic() - begin)


def rebuild(folder: str, model: str) -> None:
    """Build a model once more, without a pipeline."""
    lane = _lane(folder)
    lane.apply()
    begin, cpu = time.monotonic(), time.process_time()
    lane.rebuild(model)
    while lane.take_rebuild_further(model):
        pass
    seconds, cpu = time.monotonic() - begin, time.process_time() - cpu
    peak = memory_mb(os.getpid(), "VmHWM")  # what getrusage tells is at least the parent's
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_rss_mb": peak}))
    lane.close()


def drain(folder: str) -> None:
    """Apply all that is staged, with the workers that are decided on."""
    _staffed(folder)


def build_again(folder: str, model: str) -> None:
    """Build a model once more, with the workers that are decided on."""
    _staffed(folder, model)


def _staffed(folder: str, rebuilt: str | None = None) -> None:
    lane, stop, most = _lane(folder), threading.Event(), 0
    scaling = Autoscaling(load_project(Path(folder)), [lane])
    if rebuilt:
        lane.apply()

    def scale() -> None:
        nonlocal most
        while not stop.is_set():
            scaling.step(stop, ())
            most = max(most, scaling.report()["ready"])

    thread = threading.Thread(target=scale)
    begin = time.monotonic()
    if rebuilt:
        lane.rebuild(rebuilt)
    thread.start()
    while lane.apply() or not lane.idle():
        pass
    seconds = time.monotonic() - begin
    stop.set()
    thread.join()
    scaling.close()
    print(json.dumps({"seconds": seconds, "most_workers": most}))
    lane.close()


def _lane(folder: str) -> Lane:
    economise()
    project = load_project(Path(folder))
    (project.state / "log").mkdir(parents=True, exist_ok=True)
    (lane,) = open_lanes(project)
    return lane


def _tell(lane: Lane, before: int, seconds: float) -> None:
    entries = [item.entry for item in lane.log.headers(before, lane.log.end().offset)]
    rows = sum(entry.rows for entry in entries if entry.kind in ("rows", "copy"))
    print(json.dumps({"seconds": seconds, "rows": rows}))
    lane.close()


def _stop_on_sigterm(stop: threading.Event) -> None:
    import signal

    signal.signal(signal.SIGTERM, lambda *_: stop.set())


if __name__ == "__main__":
    verbs = {
        "once": once,
        "pipeline": pipeline,
        "capture": capture,
        "copy": copy,
        "rebuild": rebuild,
        "drain": drain,
        "build_again": build_again,
    }
    verbs[sys.argv[1]](*sys.argv[2:])
