"""What the fault tests share: a project on a real Postgres, a pipeline in a process of its own, proof."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from headrace.config import Project, load_project
from headrace.pipeline import Pipeline
from headrace.testing import shop
from headrace.testing.postgres import PostgresServer
from headrace.verify import verify

CHECK = Path(__file__).resolve().parents[2] / "scripts" / "independent_check.py"

MODEL = """\
/* headrace
key = ["order_id"]
[contract]
order_id = "BIGINT NOT NULL"
amount = "DECIMAL(12,2) NOT NULL CHECK (amount >= 0)"
*/
SELECT id::BIGINT AS order_id, status AS status, amount::DECIMAL(12,2) AS amount,
       CAST(discount AS DECIMAL(5,2)) AS discount, due::DATE AS due
FROM raw.shop.orders
WHERE status <> 'returned'
"""
"""A model that rows with a discount that is no number do not fit."""

RUN = """
import signal, sys
from dataclasses import replace
from pathlib import Path
from headrace import lane
from headrace.config import load_project
from headrace.log import index
from headrace.pipeline import Pipeline
pipeline = Pipeline(load_project(Path(sys.argv[1])))
if {bytes}:
    lane._LOAD_BYTES = lane._SLICE_BYTES = index._MAX_SLICE_BYTES = {bytes}
    source = pipeline.lanes[0].source
    source._limits = replace(source._limits, max_bytes={bytes})
signal.signal(signal.SIGTERM, lambda *_: pipeline.stop.set())
pipeline.{verb}()
"""


def make_project(
    folder: Path,
    url: str,
    *,
    slot: str = "headrace_shop",
    tables: str = "public.*",
    model: str = "",
    more: str = "",
) -> Project:
    """Write a project whose source is called shop, with one model `sales` if given."""
    (folder / "models").mkdir(parents=True, exist_ok=True)
    (folder / "headrace.toml").write_text(
        f'[source.shop]\ntype = "postgres"\nurl = "{url}"\ntables = ["{tables}"]\nslot = "{slot}"\n'
        f'heartbeat = "1s"\n{more}[destination]\ntype = "duckdb"\npath = "warehouse.duckdb"\n'
    )
    if model:
        (folder / "models" / "sales.sql").write_text(model)
    return load_project(folder)


def make_shop(server: PostgresServer, database: str, *, orders: int = 400) -> str:
    """Create a database with a shop and a little history; returns its url."""
    server.psql(f'CREATE DATABASE "{database}"')
    url = server.url.removesuffix("postgres") + database
    with psycopg.connect(url, autocommit=True) as db:
        shop.create_schema(db)
        shop.fill(db, customers=50, products=20, orders=orders, accounts=20)
    return url


def run_once(project: Project) -> None:
    """Bring everything over, in this process."""
    Pipeline(load_project(project.root)).run_once()


def start(
    project: Project, verb: str = "run", *, step_bytes: int = 0, failpoints: str = ""
) -> subprocess.Popen[str]:
    """Start a pipeline in a process of its own; `step_bytes` bounds its groups, loads and slices."""
    command = [sys.executable, "-c", RUN.format(verb=verb, bytes=step_bytes), str(project.root)]
    if verb == "run" and not failpoints and importlib.util.find_spec("headrace.cli.run"):
        command = [sys.executable, "-m", "headrace", "run", "--project", str(project.root)]
    with (project.root / "stderr").open("a") as errors:
        return subprocess.Popen(
            command,
            env={**os.environ, "HEADRACE_FAILPOINTS": failpoints, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.DEVNULL,
            stderr=errors,
            text=True,
        )


def stop(process: subprocess.Popen[str], number: int = signal.SIGTERM, seconds: float = 30.0) -> int:
    """Send a signal to a process that `start` made and wait for its end."""
    process.send_signal(number)
    return process.wait(seconds)


@contextmanager
def running(project: Project, **options: object) -> Iterator[subprocess.Popen[str]]:
    """Run a pipeline in a process of its own for a while."""
    process = start(project, **options)  # type: ignore[arg-type]
    try:
        yield process
    finally:
        if process.poll() is None:
            stop(process)


def independent_check(project: Project) -> subprocess.Popen[str]:
    """Start the script that shares no code with Headrace."""
    models = [f"--model={path.stem}={path}" for path in sorted(project.models.glob("*.sql"))]
    return subprocess.Popen(
        [sys.executable, "-I", str(CHECK), f"--source-url={project.sources[0].url.reveal()}",
         f"--warehouse={project.destination.path}", f"--log={project.state / 'log' / 'shop.db'}", *models],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def assert_whole(project: Project) -> None:
    """Nothing lost and nothing doubled, by Headrace's own account and by the other one."""
    project = load_project(project.root)
    with independent_check(project) as check:
        wrong = [finding for finding in verify(project).findings if not finding.ok]
        said, _ = check.communicate(timeout=120)
    assert not wrong, wrong
    assert check.returncode == 0, said


def said(project: Project) -> str:
    """What the pipelines that `start` made have written to stderr."""
    return (project.root / "stderr").read_text()
