"""From one Postgres database into another: each command as a user meets it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest

from headrace.cli import main
from headrace.config import load_project
from headrace.failpoints import VARIABLE
from headrace.testing.postgres import PostgresServer
from headrace.verify import verify
from pipelines import running, until

TABLES = """
CREATE TABLE orders (
  id bigint PRIMARY KEY, status text, amount numeric(12,2), tags text[], at timestamptz, doc jsonb
);
INSERT INTO orders SELECT i, 'new', i * 1.5, ARRAY['a,b', NULL, i::text], 'infinity', '{"a": 1}'
FROM generate_series(1, 3000) i;
CREATE TABLE lines (note text, n integer);
ALTER TABLE lines REPLICA IDENTITY FULL;
INSERT INTO lines SELECT 'same', 1 FROM generate_series(1, 5);
"""
MODEL = """SELECT id::BIGINT AS id, amount::DECIMAL(12,2) AS amount, status::INTEGER AS status
FROM raw.shop.orders WHERE id::BIGINT <= 10
"""


class Warehouse(NamedTuple):
    folder: Path
    source: psycopg.Connection
    destination: psycopg.Connection


@pytest.fixture
def warehouse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Warehouse]:
    server = PostgresServer(tmp_path / "pg")
    server.start()
    url = server.url.removesuffix("postgres")
    with psycopg.connect(server.url, autocommit=True) as db:
        db.execute("CREATE DATABASE source")
        db.execute("CREATE DATABASE warehouse")
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.setenv("WAREHOUSE_URL", f"{url}warehouse")
    (folder / "headrace.toml").write_text(
        f'[source.shop]\nurl = "{url}source"\n'
        '[destination]\ntype = "postgres"\nurl = "${env:WAREHOUSE_URL}"\nlock_timeout = "1s"\n'
    )
    with (
        psycopg.connect(f"{url}source", autocommit=True) as source,
        psycopg.connect(f"{url}warehouse", autocommit=True) as destination,
    ):
        source.execute(TABLES)
        yield Warehouse(folder, source, destination)
    server.stop("immediate")


def headrace(warehouse: Warehouse, *arguments: str) -> tuple[int, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*arguments, "--project", str(warehouse.folder)])
    return code, out.getvalue() + err.getvalue()


def answer(warehouse: Warehouse, *arguments: str) -> Any:
    code, out = headrace(warehouse, *arguments, "--json")
    assert code == 0, out
    return json.loads(out)


def assert_verified(warehouse: Warehouse) -> None:
    report = verify(load_project(warehouse.folder))
    assert report.verified, [finding for finding in report.findings if not finding.ok]
    compared = [finding.rows for finding in report.findings if finding.what.startswith("model ")]
    assert len(compared) == 2
    assert min(compared) > 3


def test_all_commands_work_on_a_postgres_destination(warehouse: Warehouse) -> None:
    findings = answer(warehouse, "check")["findings"]
    assert [f["level"] for f in findings if f["area"] == "destination"] == ["ok"]
    settings = warehouse.folder / "headrace.toml"
    text = settings.read_text()
    settings.write_text(
        text.replace("${env:WAREHOUSE_URL}", os.environ["WAREHOUSE_URL"].replace("warehouse", "source"))
    )
    code, out = headrace(warehouse, "check")
    assert code == 2
    assert "the destination is the database of source shop" in out
    settings.write_text(text)
    code, out = headrace(warehouse, "query", "SELECT 1")
    assert (code, "There is no destination at postgresql://" in out) == (2, True)
    code, out = headrace(warehouse, "run", "--once")
    assert (code, "2 of 2 models in sync, 0 open records" in out) == (0, True), out
    assert_verified(warehouse)
    counted = answer(warehouse, "query", "SELECT count(*) AS n, min(tags[3]) AS t FROM shop.orders")
    assert counted == {"n": 3000, "t": "1"}

    source = warehouse.source
    source.execute("UPDATE orders SET status = CASE WHEN id = 3 THEN 'no number' ELSE '7' END WHERE id < 6")
    source.execute("DELETE FROM orders WHERE id > 2990")
    source.execute("ALTER TABLE orders ADD COLUMN added date")
    source.execute("DELETE FROM lines WHERE ctid = (SELECT min(ctid) FROM lines)")
    (warehouse.folder / "models").mkdir()
    (warehouse.folder / "models" / "small.sql").write_text(MODEL)
    assert headrace(warehouse, "run", "--once")[0] == 0
    assert_verified(warehouse)
    rows = warehouse.destination.execute("SELECT status FROM small ORDER BY id").fetchall()
    assert rows == [(7,), (7,), (7,), (7,)]
    status = answer(warehouse, "status")
    assert status["destination"]["error"] is None
    (shop,) = status["sources"]
    assert {model["name"]: model["state"] for model in shop["models"]} == {
        "small": "in_sync", "shop.orders": "retired", "shop.lines": "in_sync",
    }  # fmt: skip
    assert sum(cause["records"] for cause in shop["quarantine"]) == 7

    records = [
        json.loads(line) for line in headrace(warehouse, "quarantine", "list", "--json")[1].splitlines()
    ]
    assert len(records) == 7
    shown = answer(warehouse, "quarantine", "show", records[0]["id"])
    assert (shown["id"], shown["model"]) == (records[0]["id"], "small")
    (warehouse.folder / "models" / "small.sql").write_text(
        MODEL.replace("status::INTEGER", "TRY_CAST(status AS INTEGER)")
    )
    _, tried = headrace(warehouse, "quarantine", "redrive", "--all", "--dry-run", "--json")
    outcomes = Counter(json.loads(line)["outcome"] for line in tried.splitlines())
    assert outcomes == {"passes": 6, "superseded": 1}, "key 3 has a record of its copy and one of its change"
    assert answer(warehouse, "quarantine", "redrive", "--all")["resolved"] == 7
    assert warehouse.destination.execute("SELECT count(*) FROM small").fetchone() == (10,)
    assert_verified(warehouse)


def test_a_running_pipeline_goes_on_over_kills_and_a_resync_writes_what_differs(
    warehouse: Warehouse,
) -> None:
    assert headrace(warehouse, "run", "--once")[0] == 0
    for place in ("destination.apply.commit", "destination.postgres.commit", "destination.apply.committed"):
        warehouse.source.execute("UPDATE orders SET amount = amount + 1 WHERE id % 7 = 0")
        command = [sys.executable, "-m", "headrace", "run", "--once", "--project", str(warehouse.folder)]
        environment = {**os.environ, VARIABLE: f"{place}=kill"}
        done = subprocess.run(command, env=environment, capture_output=True, timeout=90, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
    with running(load_project(warehouse.folder)):
        until(lambda: applied(warehouse) == 3000)
        assert_verified(warehouse)
        # Behind Headrace's back: what a resync finds and mends, and no more than that.
        warehouse.destination.execute("UPDATE shop.orders SET amount = 0 WHERE id = 5")
        warehouse.destination.execute("DELETE FROM shop.orders WHERE id = 6")
        versions = "SELECT count(*) FROM shop.orders WHERE xmin::text::bigint > %s"
        (before,) = warehouse.destination.execute("SELECT pg_current_xact_id()::text::bigint").fetchone() or (
            0,
        )
        assert headrace(warehouse, "tables", "resync", "public.orders")[0] == 0
        until(lambda: applied(warehouse) == 3000)
        until(lambda: warehouse.destination.execute(versions, [before]).fetchone() == (2,))
        assert_verified(warehouse)


def applied(warehouse: Warehouse) -> int:
    try:
        rows = warehouse.destination.execute("SELECT count(*) FROM shop.orders").fetchone()
    except psycopg.errors.UndefinedTable:
        return 0
    return rows[0] if rows else 0


def test_a_model_whose_table_refuses_is_suspended_and_the_others_go_on(warehouse: Warehouse) -> None:
    assert headrace(warehouse, "run", "--once")[0] == 0
    warehouse.destination.execute("ALTER TABLE shop.orders ADD CHECK (amount < 5000)")
    warehouse.source.execute("INSERT INTO orders VALUES (9999, 'secret', 9999)")
    warehouse.source.execute("INSERT INTO lines VALUES ('other', 2)")
    code, out = headrace(warehouse, "run", "--once")
    assert code != 0
    assert "CheckViolation" in out
    assert "9999" not in out.replace(str(warehouse.folder), "")
    states = dict(warehouse.destination.execute("SELECT model, state FROM headrace.models").fetchall())
    assert states == {"shop.orders": "suspended", "shop.lines": "in_sync"}
    assert warehouse.destination.execute("SELECT count(*) FROM shop.lines").fetchone() == (6,)
    assert headrace(warehouse, "run", "--once")[0] != 0, "tried again, and refused again"
    warehouse.destination.execute("ALTER TABLE shop.orders DROP CONSTRAINT orders_amount_check")
    assert headrace(warehouse, "run", "--once")[0] == 0
    assert_verified(warehouse)
