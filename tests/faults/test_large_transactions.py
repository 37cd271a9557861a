"""A transaction that is larger than the memory that capturing it may take."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from harness import make_project

from headrace.change import Entry
from headrace.log.sqlite import SQLiteLog
from headrace.payload import decode_rows
from headrace.testing.postgres import PostgresServer

MEMORY = 128 << 20
"""Bytes that a process may grow by, beyond what it needs to have loaded its libraries."""

CAPTURE = """
import sys, threading
from pathlib import Path
from headrace.config import load_project
from headrace.pipeline import Pipeline
pipeline = Pipeline(load_project(Path(sys.argv[1])))
lane = pipeline.lanes[0]
def resident(what):
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in status if line.startswith(what))
before = resident("VmRSS")
lane.capture(threading.Event(), until=lane.source.head())
print(resident("VmHWM") - before)
pipeline.close()
"""


def capture(project: Path) -> int:
    """Capture in a process of its own; returns by how much its peak of resident memory is higher (bytes)."""
    done = subprocess.run(
        [sys.executable, "-c", CAPTURE, str(project)], stdout=subprocess.PIPE, timeout=300, check=True
    )
    return int(done.stdout)


@pytest.mark.parametrize(
    ("work_mem", "rows"), [("64MB", 1_500_000), ("2GB", 600_000)], ids=["streamed", "whole"]
)
def test_memory_is_bounded_however_large_a_transaction_is(
    server: PostgresServer, tmp_path: Path, work_mem: str, rows: int
) -> None:
    database = f"large{work_mem}".lower()
    server.psql(f"CREATE DATABASE {database}")
    url = server.url.removesuffix("postgres") + database
    with psycopg.connect(url, autocommit=True) as db:
        db.execute(f"ALTER DATABASE {database} SET logical_decoding_work_mem = '{work_mem}'")
        db.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
        project = make_project(tmp_path, url, slot=f"slot_{database}")
        capture(tmp_path)
        db.execute(f"INSERT INTO t SELECT i, md5(i::text) FROM generate_series(1, {rows}) i")
    grown = capture(tmp_path)
    log = SQLiteLog(project.state / "log" / "shop.db", read_only=True)
    seen, commits = 0, set()
    for entry in stream_of(log):
        batch = decode_rows(entry.payload)
        ordinals = batch["_ordinal"].to_numpy()
        assert (ordinals == range(seen + 1, seen + 1 + len(ordinals))).all()
        assert batch["id"][0].as_py() == str(seen + 1)
        commits |= set(batch["_commit"].unique().to_pylist())
        seen += len(ordinals)
    log.close()
    assert seen == rows
    assert len(commits) == 1
    assert grown < MEMORY


def stream_of(log: SQLiteLog) -> Iterator[Entry]:
    """Yield the entries with rows, without those of the copy."""
    offset = 0
    while found := log.read(offset, 1 << 40):
        yield from (item.entry for item in found if item.entry.kind == "rows")
        offset = found[-1].offset
