"""So many records of one cause: one issue, one alert, nothing halted, all of them right after the mend.

HEADRACE_FAILING_ROWS says how many, and then time and peak memory of each command are printed (pytest -s).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest

from headrace.config import load_project
from headrace.server import read_rows
from headrace.testing.postgres import PostgresServer

ROWS = int(os.environ.get("HEADRACE_FAILING_ROWS", "5000"))
HEADER = '/* headrace\nkey = ["id"]\nmax_error_rate = false\n*/\n'
MODEL = HEADER + "SELECT id::BIGINT AS id, {}::INTEGER AS amount FROM raw.shop.orders"
_MEASURED = """
import resource, sys
from headrace.cli import main
code = main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, file=sys.stderr)
sys.exit(code)
"""


def headrace(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, *arguments, "--project", str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(" ".join(arguments), f"{time.monotonic() - begin:.1f} s,", done.stderr.splitlines()[-1], "MB")
    return done


@pytest.mark.timeout(3600)
def test_records_of_one_cause_are_one_issue_and_one_alert_and_all_are_redriven(tmp_path: Path) -> None:
    folder = tmp_path / "shop"
    (folder / "models").mkdir(parents=True)
    with PostgresServer(tmp_path / "pg") as server:
        (folder / "headrace.toml").write_text(f'[source.shop]\nurl = "{server.url}"\n')
        (folder / "models" / "orders.sql").write_text(MODEL.format("amount"))
        with psycopg.connect(server.url, autocommit=True) as db:
            db.execute("CREATE TABLE orders (id bigint PRIMARY KEY, amount text)")
            db.execute("CREATE TABLE others (id int PRIMARY KEY)")
            db.execute("INSERT INTO others SELECT generate_series(1, 100)")
        headrace("run", "--once", folder=folder)
        with psycopg.connect(server.url, autocommit=True) as db:
            fill = "INSERT INTO orders SELECT i, i || ' EUR' FROM generate_series(1, %s) i"
            db.execute(fill, [ROWS])
            db.execute("INSERT INTO orders VALUES (0, '7')")
            db.execute("INSERT INTO others SELECT generate_series(101, 200)")
        failing = headrace("run", "--once", folder=folder)
    project = load_project(folder)

    def rows(query: str) -> list[tuple[object, ...]]:
        return [tuple(row) for row in read_rows(project, query)[1]]

    assert (failing.stdout + failing.stderr).count("NEW CAUSE") == 1
    assert "SUSPENDED" not in failing.stdout + failing.stderr
    records = "SELECT count(DISTINCT issue), count(*) FROM headrace.quarantine WHERE status = 'quarantined'"
    assert rows(records) == [(1, ROWS)]
    assert rows("SELECT (SELECT count(*) FROM shop.others), (SELECT count(*) FROM orders)") == [(200, 1)]
    (folder / "models" / "orders.sql").write_text(MODEL.format("split_part(amount, ' ', 1)"))
    ((issue,),) = rows("SELECT DISTINCT issue FROM headrace.quarantine")
    redriven = headrace("quarantine", "redrive", "--issue", str(issue), "--json", folder=folder)
    told = json.loads(redriven.stdout)
    assert (told["resolved"], told["still_quarantined"]) == (ROWS, 0)
    total = ROWS * (ROWS + 1) // 2 + 7
    assert rows("SELECT count(*), sum(amount)::BIGINT FROM orders") == [(ROWS + 1, total)]
    assert rows(records) == [(0, 0)]
