"""What workers have cost is not forgotten by a process that is killed."""

from __future__ import annotations

import time
from pathlib import Path
from signal import SIGKILL
from typing import Any

from harness import running

from headrace.config import Project, load_project
from headrace.server import ask
from pipelines import until

PROJECT = """[source.shop]
url = "postgresql://nobody@127.0.0.1:1/none"
[scale]
policy = "static"
max_workers = 2
max_worker_hours_per_day = 5
"""
FORGOTTEN = 2 * (5 + 1 + 0.5) / 3600
"""Worker-hours of two workers: what has not been written, a look, and this test's own delay."""


def test_a_days_worker_hours_outlive_a_kill(tmp_path: Path) -> None:
    (tmp_path / "headrace.toml").write_text(PROJECT)
    (tmp_path / "models").mkdir()
    project = load_project(tmp_path)
    with running(project) as process:
        until(lambda: report(project).get("ready") == 2, 30, "there are two workers")
        time.sleep(8)
        spent = hours(project)
        process.send_signal(SIGKILL)
        process.wait(10)
    assert spent > 1.2 * FORGOTTEN
    with running(project):
        until(lambda: report(project), 30, "it runs")
        assert spent - FORGOTTEN <= hours(project) <= spent + FORGOTTEN


def hours(project: Project) -> float:
    return float(report(project)["worker_hours_today"])


def report(project: Project) -> dict[str, Any]:
    try:
        return ask(project, {"op": "scale"})
    except OSError:
        return {}
