"""From source commit to queryable in DuckDB, against `pg_recvlogical … -f /dev/null` on the same WAL.

One million rows are inserted in transactions of 50 while no pipeline runs; then the pipeline, a
process of its own, brings them over, and `pg_recvlogical` reads a copy of the slot. The time of ours
runs until a query sees the last row.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psycopg

from headrace.config import load_project
from headrace.pipeline import Pipeline
from headrace.server import read
from headrace.testing.postgres import PostgresServer

TABLE = """CREATE TABLE orders (id bigserial PRIMARY KEY, customer_id int, status text,
amount numeric(12,2), note text, placed_at timestamptz DEFAULT now())"""
LOAD = """CREATE PROCEDURE load(n int) LANGUAGE plpgsql AS $$ BEGIN FOR i IN 1..n LOOP
INSERT INTO orders (customer_id, status, amount, note) SELECT g % 1000, 'paid', (g % 100000) / 7.0,
'note for order number ' || g FROM generate_series(1, 50) g; COMMIT;
IF i % 1000 = 0 THEN PERFORM pg_log_standby_snapshot(); END IF; END LOOP; END $$"""
CHILD = """
import sys
from pathlib import Path
from headrace.config import load_project
from headrace.pipeline import Pipeline
Pipeline(load_project(Path(sys.argv[1]))).run()
"""


def run(*, quick: bool) -> dict[str, Any]:
    rows = 300_000 if quick else 1_000_000
    runs = [_once(rows) for _ in range(2 if quick else 3)]
    extra = {"peak_rss_mb": max(run.pop("rss_mb") for run in runs)}
    return {"unit": "rows/s", "cases": {"insert": ("pg_recvlogical -f /dev/null", runs, extra)}}


def _once(rows: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)
        settings = {"synchronous_commit": "off", "max_wal_size": "8GB"}
        with PostgresServer(folder / "pg", settings=settings) as server:
            with psycopg.connect(server.url, autocommit=True) as db:
                db.execute(TABLE)
                db.execute(LOAD)
            project = folder / "project"
            project.mkdir()
            (project / "headrace.toml").write_text(f'[source.shop]\nurl = "{server.url}"\n')
            Pipeline(load_project(project)).run_once()
            with psycopg.connect(server.url, autocommit=True) as db:
                db.execute("SELECT pg_copy_logical_replication_slot('headrace_shop', 'rival')")
                db.execute("CALL load(%s)", [rows // 50])
                db.execute("VACUUM orders")
                db.execute("CHECKPOINT")
                end = db.execute("SELECT pg_current_wal_flush_lsn()::text").fetchone()[0]
            rival = _recvlogical(server, end)
            ours, rss = _pipeline(project, rows)
            return {"ours": rows / ours, "rival": rows / rival, "rss_mb": rss}


def _recvlogical(server: PostgresServer, end: str) -> float:
    begin = time.monotonic()
    subprocess.run(
        [
            server.bin / "pg_recvlogical", "-d", server.url, "--slot", "rival", "--start", "-f", "/dev/null",
            "-o", "proto_version=1", "-o", "publication_names=headrace_shop", "--endpos", end,
        ],
        check=True,
    )  # fmt: skip
    return time.monotonic() - begin


def _pipeline(folder: Path, rows: int) -> tuple[float, float]:
    """Return the seconds until all rows are visible, and the pipeline's peak memory in MB."""
    project = load_project(folder)
    begin = time.monotonic()
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(folder)])
    try:
        while True:
            time.sleep(0.05)
            try:
                (table,) = read(project, ["SELECT count(*) AS n FROM shop.orders"])
            except Exception:
                continue
            if table["n"][0].as_py() >= rows:
                break
            if time.monotonic() - begin > 120:
                raise TimeoutError(f"only {table['n'][0].as_py()} rows after two minutes")
        took = time.monotonic() - begin
        status = Path(f"/proc/{child.pid}/status").read_text()
        peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return took, int(peak.split()[1]) / 1024
    finally:
        child.terminate()
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            os.kill(child.pid, 9)
            child.wait()
