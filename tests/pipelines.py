"""A pipeline in this process: whole in a thread, or its first two verbs alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from headrace.change import TableId
from headrace.config import Project
from headrace.pipeline import Pipeline, open_lanes
from headrace.server import is_running


def until(condition: Callable[[], object], seconds: float = 60.0, what: str = "") -> None:
    """Wait for a condition, with bounds that a busy machine does not reach."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@contextmanager
def running(project: Project) -> Iterator[Pipeline]:
    """Run a pipeline in a thread, from when it answers on, and let it finish what it has in hand."""
    pipeline = Pipeline(project)
    thread = threading.Thread(target=pipeline.run)
    thread.start()
    # Who asked before would open the destination here, in the way of the pipeline's own process.
    until(lambda: is_running(project) or not thread.is_alive())
    try:
        yield pipeline
    finally:
        pipeline.stop.set()
        thread.join(60)
    assert not thread.is_alive()


def stage(project: Project) -> None:
    """Bring all that is committed at the source into the raw tables, and no further."""
    (project.state / "log").mkdir(parents=True, exist_ok=True)
    (lane,) = open_lanes(project)
    lane.capture(threading.Event(), until=lane.source.head())
    while lane.load():
        pass
    lane.close()


def raw(project: Project, table: str, schema: str = "public") -> list[dict[str, Any]]:
    """Return every copied row and staged change of a table, in source order."""
    (lane,) = open_lanes(project, read_only=True)
    staging, of = lane.staging, TableId(schema, table)
    return staging.history(of, staging.copy(of, staging.through()), staging.through()).to_pylist()
