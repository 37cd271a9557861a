"""`run`, `status`, `query` and `quarantine` against a real Postgres, as a user meets them."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest

from headrace.cli import main
from headrace.config import load_project
from headrace.pipeline import Pipeline
from headrace.testing import shop
from headrace.testing.postgres import PostgresServer

MODEL = """/* headrace
key = ["id"]
*/
SELECT id::BIGINT AS id, status, discount::DECIMAL(6,4) AS discount FROM raw.shop.orders
"""
MENDED = MODEL.replace("discount::DECIMAL(6,4)", "TRY_CAST(discount AS DECIMAL(6,4))")


class Done(NamedTuple):
    code: int
    out: str
    err: str


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "headrace", *arguments]


def headrace(*arguments: str, cwd: Path) -> Done:
    """A command in a process of its own."""
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, cwd=cwd, timeout=60, check=False
    )
    assert "Traceback" not in done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


def here(*arguments: str, cwd: Path) -> Done:
    """A command in this process, which saves its imports."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*arguments, "--project", str(cwd)])
    return Done(code, out.getvalue(), err.getvalue())


def answer(*arguments: str, cwd: Path) -> Any:
    done = here(*arguments, "--json", cwd=cwd)
    assert done.code == 0, done
    return json.loads(done.out)


def counted(project: Path, query: str) -> int:
    return int(json.loads(here("query", query, "--json", cwd=project).out)["n"])


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.1)


class Running:
    """`headrace run` as a process, its output in a file."""

    def __init__(self, project: Path) -> None:
        self.log = project / "run.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command("run"), cwd=project, stdout=log, stderr=log)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def says(self, words: str) -> bool:
        return words in self.log.read_text()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(10)


@contextlib.contextmanager
def taken(project: Path) -> Iterator[Pipeline]:
    pipeline = Pipeline(load_project(project))
    try:
        yield pipeline
    finally:
        pipeline.close()


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with tempfile.TemporaryDirectory(prefix="hr-") as folder, PostgresServer(Path(folder)) as server:
        yield server


@pytest.fixture
def url(server: PostgresServer, request: pytest.FixtureRequest) -> Iterator[str]:
    """A small shop in a database of the test's own."""
    name = request.node.name.removeprefix("test_")[:50]
    server.psql(f'CREATE DATABASE "{name}"')
    url = server.url.removesuffix("postgres") + name
    with psycopg.connect(url) as connection:
        shop.create_schema(connection)
        shop.fill(connection, customers=20, products=10, orders=600, accounts=5)
    yield url
    server.psql(
        f"SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = '{name}'"
    )
    server.psql(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def project(url: str, tmp_path: Path) -> Path:
    """A project for that shop, with a model that cannot cast what some customers typed."""
    folder = tmp_path / "p"
    (folder / "models").mkdir(parents=True)
    (folder / "models" / "clean.sql").write_text(MODEL)
    slot = url.rpartition("/")[2]
    (folder / "headrace.toml").write_text(f'[source.shop]\nurl = "{url}"\nslot = "{slot}"\n')
    return folder


def execute(url: str, sql: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(sql.encode())


def bad_orders(url: str) -> int:
    with psycopg.connect(url) as connection:
        row = connection.execute(r"SELECT count(*) FROM orders WHERE discount !~ '^\d+(\.\d+)?$'").fetchone()
    assert row is not None
    return int(row[0])


# -------------------------------------------------------------------------------------- by itself


def test_once(project: Path, url: str) -> None:
    before = here("status", cwd=project)
    assert before.code == 0
    assert "has not run yet" in before.out
    assert answer("status", cwd=project)["sources"][0]["has_run"] is False
    bad = bad_orders(url)
    assert bad > 0

    done = headrace("run", "--once", cwd=project)
    assert done.code == 0, done
    start, summary = done.out.splitlines()
    assert "1 model" in start
    assert "warehouse.duckdb" in start
    assert f"5 of 5 models in sync, {bad} open records" in summary
    assert done.err.count("NEW CAUSE") == 1
    assert all(line[:4].isdigit() and line[23] == "Z" for line in done.err.splitlines())

    status = answer("status", cwd=project)
    (source,) = status["sources"]
    assert status["running"] is False
    assert source["staged_through"] == source["log"]["end"] == source["visible"]["offset"]
    assert source["position"] == source["visible"]["position"]
    assert source["load"] == {"rows": 0, "bytes": 0, "oldest_s": None}
    states = {model["name"]: (model["state"], model["open_records"]) for model in source["models"]}
    assert states == {
        "clean": ("in_sync", bad),
        **{f"shop.{name}": ("in_sync", 0) for name in ("accounts", "customers", "order_items", "products")},
    }
    assert [cause["records"] for cause in source["quarantine"]] == [bad]
    slot = source["slot"]
    assert (slot["exists"], slot["active"], slot["wal_status"]) == (True, False, "reserved")
    assert slot["retained_bytes"] >= slot["lag_bytes"] == source["capture"]["lag_bytes"] >= 0
    assert slot["restart_age_s"] >= 0
    assert {(table["stage"], table["share"]) for table in source["tables"]} == {("live", 1.0)}
    assert "not running" in here("status", cwd=project).out


def test_how_far_copies_are(project: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "models" / "clean.sql").unlink()
    with (project / "headrace.toml").open("a") as settings:
        settings.write('tables = ["public.wide", "public.accounts"]\n')
        settings.write('chunk_bytes = "64KiB"\ncopy_workers = 1\n')
    execute(url, "CREATE TABLE wide (id int PRIMARY KEY, v text)")
    execute(url, "INSERT INTO wide SELECT i, repeat('x', 1000) FROM generate_series(1, 800) i; ANALYZE wide")
    assert here("tables", "list", cwd=project).out == "Nothing is captured yet: headrace run\n"
    assert here("tables", "list", "--json", cwd=project).out == ""
    monkeypatch.setenv("HEADRACE_FAILPOINTS", "source.copy.batch=kill@8")
    assert headrace("run", "--once", cwd=project).code == -signal.SIGKILL
    monkeypatch.delenv("HEADRACE_FAILPOINTS")

    lines = here("tables", "list", "--json", cwd=project).out.splitlines()
    accounts, wide = (json.loads(line) for line in lines)
    assert (accounts["table"], accounts["rows"], accounts["share"]) == ("public.accounts", 5, 1.0)
    assert (wide["source"], wide["table"], wide["stage"]) == ("shop", "public.wide", "copying")
    assert 0 < wide["done"] < wide["chunks"]
    assert wide["share"] == round(wide["done"] / wide["chunks"], 4)
    assert 0 < wide["rows"] < 800
    assert wide["left_s"] is None or wide["left_s"] > 0
    # The estimate shrinks with the clock between two looks.
    again = answer("status", cwd=project)["sources"][0]["tables"]
    assert [{**table, "left_s": None} for table in again] == [
        {**table, "left_s": None} for table in (accounts, wide)
    ]
    shown = here("status", cwd=project).out
    assert "1 copying" in shown
    (line,) = (line for line in shown.splitlines() if line.startswith("public.wide "))
    assert re.search(rf"  copying +█+░+ +{wide['share']:.0%} +{wide['rows']}\b", line)

    # Without a terminal there is nothing to watch: the list, once.
    watched = headrace("tables", "list", "--watch", cwd=project)
    assert (watched.code, watched.out.count("█░")) == (0, 1)

    assert here("tables", "pause", "wide", cwd=project).code == 0
    assert headrace("run", "--once", cwd=project).code == 0
    status = here("status", cwd=project).out
    assert "tables   2 live\n" in status
    assert re.search(r"^public\.wide +live, paused +█+ 100% +800$", status, re.MULTILINE)
    assert "public.accounts  live" not in status


def test_a_table_goes_and_comes_back_while_nothing_runs(project: Path, url: str) -> None:
    (project / "models" / "clean.sql").unlink()
    with (project / "headrace.toml").open("a") as settings:
        settings.write('tables = ["public.accounts", "public.products"]\n')

    def published() -> list[str]:
        with psycopg.connect(url) as db:
            names = db.execute("SELECT tablename FROM pg_publication_tables ORDER BY 1").fetchall()
        return [str(name) for (name,) in names]

    assert headrace("run", "--once", cwd=project).code == 0
    assert "with the next headrace run" in here("tables", "remove", "accounts", cwd=project).out
    execute(url, "UPDATE accounts SET balance = balance + 1")
    removed = headrace("run", "--once", cwd=project)
    assert (removed.code, "is in the publication" in removed.err) == (0, False)
    assert published() == ["products"]
    shown = here("status", cwd=project).out
    assert "1 live, 1 removed" in shown
    assert "public.accounts" not in shown
    assert headrace("verify", cwd=project).out.endswith("verified\n")

    assert here("tables", "add", "accounts", cwd=project).code == 0
    assert headrace("run", "--once", cwd=project).code == 0
    assert published() == ["accounts", "products"]
    verified = headrace("verify", cwd=project).out
    assert verified.endswith("verified\n")
    assert "source table public.accounts = staging: 5 rows" in verified


def test_query(project: Path) -> None:
    nothing = headrace("query", "SELECT 1", cwd=project)
    assert (nothing.code, "There is no destination" in nothing.err) == (2, True)
    assert headrace("run", "--once", cwd=project).code == 0
    table = headrace("query", "SELECT 7 AS a, NULL AS bee, e'x\\n\\x1b[1m' AS c", cwd=project)
    assert table.out == "a  bee   c\n7  NULL  x\\n\\x1b[1m\n"
    odd = "SELECT 1.50::DECIMAL(9,2) AS d, '\\xff'::BLOB AS b, [1, NULL] AS l, NULL AS n, '' AS e"
    line = here("query", odd, "--json", cwd=project).out
    assert line == '{"d": 1.50, "b": "\\\\xff", "l": [1, null], "n": null, "e": ""}\n'
    assert here("query", odd, "--csv", cwd=project).out == 'd,b,l,n,e\n1.50,\\xff,"[1, null]",,""\n'
    assert counted(project, "SELECT count(*) AS n FROM shop.order_items") > 0
    for wrong, words in (
        ("SELECT nope FROM clean", "nope"),
        ("SELEC", "syntax error"),
        ("DROP TABLE clean", "Only queries"),
    ):
        refused = here("query", wrong, cwd=project)
        assert (refused.code, refused.out) == (2, "")
        assert words in refused.err
    assert here("query", "SELECT 1", "--json", "--csv", cwd=project).code == 2


def test_quarantine(project: Path, url: str) -> None:
    assert headrace("run", "--once", cwd=project).code == 0
    bad = bad_orders(url)
    listed = here("quarantine", "list", cwd=project)
    assert f"{bad} open records of 1 cause" in listed.out
    lines = here("quarantine", "list", "--limit", "2", "--json", cwd=project).out.splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == min(bad, 2)
    record = records[0]
    assert (record["model"], record["reason"], record["columns"]) == ("clean", "transform.cast", "discount")
    shown = answer("quarantine", "show", record["id"], cwd=project)
    assert shown["key"] == record["key"]
    assert shown["position"].startswith("0/")
    assert json.loads(shown["preview"])["id"] == record["key"]
    text = here("quarantine", "show", record["id"][:8], cwd=project).out
    assert f"redrive --issue {record['issue']}" in text
    assert f'  id = "{record["key"]}"' in text

    # Without a mend nothing passes; a dry run changes nothing after it either.
    kept = answer("quarantine", "redrive", "--issue", record["issue"], cwd=project)
    assert (kept["resolved"], kept["still_quarantined"]) == (0, bad)
    (project / "models" / "clean.sql").write_text(MENDED)
    tried = here("quarantine", "redrive", "--all", "--dry-run", "--json", cwd=project).out.splitlines()
    assert [json.loads(line)["outcome"] for line in tried] == ["passes"] * bad
    assert f"{bad} open records" in here("quarantine", "list", cwd=project).out
    one = answer("quarantine", "redrive", "--model", "clean", "--key", record["key"], cwd=project)
    assert one == {
        "keys": 1,
        "resolved": 1,
        "still_quarantined": 0,
        "rebuilding": 0,
        "failed": 0,
        "dry_run": False,
    }
    rest = headrace("quarantine", "redrive", "--all", cwd=project)
    assert rest.code == 0
    assert f"{bad - 1} records resolved, 0 still quarantined" in rest.out
    assert counted(project, "SELECT count(*) AS n FROM clean") == 600
    assert "nothing to redrive" in here("quarantine", "redrive", "--all", cwd=project).out
    assert here("quarantine", "list", cwd=project).out == "No open records.\n"


def test_a_mended_model_with_other_columns(project: Path, url: str) -> None:
    """It is built again as a whole, its open records with it."""
    assert headrace("run", "--once", cwd=project).code == 0
    (project / "models" / "clean.sql").write_text(MENDED.replace("status,", "status, amount,"))
    done = answer("quarantine", "redrive", "--all", cwd=project)
    assert done["rebuilding"] == bad_orders(url)
    assert counted(project, "SELECT count(*) AS n FROM clean WHERE amount IS NOT NULL") == 600
    assert answer("status", cwd=project)["sources"][0]["quarantine"] == []


def test_redrive_says_what_it_lacks(project: Path) -> None:
    for wrong in ([], ["--all", "--issue", "v1:0"], ["--key", "1"]):
        refused = here("quarantine", "redrive", *wrong, cwd=project)
        assert refused.code == 2
        assert "not clear" in refused.err
    assert headrace("run", "--once", cwd=project).code == 0
    assert "No record fits" in here("quarantine", "redrive", "--issue", "v1:0", cwd=project).err
    assert "no record's id" in here("quarantine", "show", "'; --", cwd=project).err
    assert "There is no record" in here("quarantine", "show", "00000000", cwd=project).err


# ------------------------------------------------------------------------------ beside a pipeline


def test_beside_a_running_pipeline(project: Path, url: str) -> None:
    with Running(project) as pipeline:
        until(lambda: "in_sync" in here("status", cwd=project).out)
        bad = bad_orders(url)
        until(lambda: answer("status", cwd=project)["sources"][0]["quarantine"] != [])
        status = answer("status", cwd=project)
        assert (status["pid"], status["stopped"], status["waiting"]) == (pipeline.process.pid, {}, {})
        assert status["sources"][0]["slot"]["active"] is True

        execute(url, "INSERT INTO orders (id, customer_id, amount, discount) VALUES (9001, 1, 1, '0.5')")
        arrived = "SELECT count(*) AS n FROM clean WHERE id = 9001"
        until(lambda: counted(project, arrived) == 1)
        other = headrace("query", "SELECT discount FROM clean WHERE id = 9001", cwd=project)
        assert (other.code, other.out) == (0, "discount\n  0.5000\n")
        assert headrace("query", "SELECT nope", cwd=project).code == 2
        odd = "SELECT 1.50::DECIMAL(9,2) AS d, 1e300 AS f, '\\xff'::BLOB AS b, now() IS NULL AS t, NULL AS n"
        line = '{"d": 1.50, "f": 1e+300, "b": "\\\\xff", "t": false, "n": null}\n'
        assert here("query", odd, "--json", cwd=project).out == line
        many = here("query", "SELECT range AS n FROM range(20000)", "--csv", cwd=project)
        assert len(many.out.splitlines()) == 20_001

        second = headrace("run", cwd=project)
        assert (second.code, second.out) == (2, "")
        assert f"pid {pipeline.process.pid}" in second.err

        # A file that does not parse is alerted once and changes nothing; the next one counts.
        (project / "models" / "clean.sql").write_text("SELEC")
        until(lambda: pipeline.says("MODEL clean cannot be read"))
        still = answer("quarantine", "redrive", "--all", cwd=project)
        assert (still["resolved"], still["still_quarantined"]) == (0, bad)
        (project / "models" / "clean.sql").write_text(MENDED)
        done = answer("quarantine", "redrive", "--all", cwd=project)
        assert (done["resolved"], done["still_quarantined"]) == (bad, 0)
        assert counted(project, "SELECT count(*) AS n FROM clean") == 601

        # The apply step takes a changed file up by itself.
        (project / "models" / "clean.sql").write_text(MENDED.replace("status,", "upper(status) AS status,"))
        until(lambda: pipeline.log.read_text().count("changed models: clean") == 2)
        execute(url, "UPDATE orders SET status = 'paid' WHERE id = 9001")
        upper = f"{arrived} AND status = 'PAID'"
        until(lambda: counted(project, upper) == 1)
        assert pipeline.log.read_text().count("cannot be read") == 1
        assert pipeline.stop() == 0
        assert pipeline.says("SIGTERM: finishing what is in hand")
    assert counted(project, upper) == 1


def test_a_second_signal_ends_at_once(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_FAILPOINTS", "destination.apply.commit=sleep:60")
    with Running(project) as pipeline:
        until(lambda: pipeline.says("copy is complete"))
        time.sleep(1)
        pipeline.process.send_signal(signal.SIGINT)
        until(lambda: pipeline.says("SIGINT: finishing what is in hand"))
        pipeline.process.send_signal(signal.SIGTERM)
        assert pipeline.process.wait(5) == 128 + signal.SIGTERM


def test_a_model_that_breaks_stops_alone(project: Path, url: str) -> None:
    """It names a missing column: suspended, while the others go on; mended, it catches up."""
    model = project / "models" / "clean.sql"
    with Running(project) as pipeline:
        until(lambda: pipeline.says("NEW CAUSE"))
        model.write_text(MENDED.replace("status,", "statsu AS status,"))
        until(lambda: pipeline.says("SUSPENDED model clean"))
        execute(
            url,
            "INSERT INTO orders (id, customer_id, amount) VALUES (9001, 1, 1);"
            "INSERT INTO accounts (id, balance) VALUES (9001, 1)",
        )
        until(lambda: counted(project, "SELECT count(*) AS n FROM shop.accounts WHERE id = 9001") == 1)
        status = answer("status", cwd=project)
        states = {row["name"]: row for row in status["sources"][0]["models"]}
        assert states["clean"]["state"] == "suspended"
        assert "statsu" in states["clean"]["reason"]
        assert states["clean"]["backlog"]["rows"] == 1
        assert states["clean"]["backlog"]["oldest_s"] >= 0
        assert states["shop.accounts"]["backlog"]["rows"] == 0
        assert status["stopped"] == {}
        model.write_text(MENDED)
        until(lambda: counted(project, "SELECT count(*) AS n FROM clean WHERE id = 9001") == 1)
        states = {row["name"]: row for row in answer("status", cwd=project)["sources"][0]["models"]}
        assert states["clean"]["state"] == "in_sync"
        assert pipeline.stop() == 0


def test_it_starts_again_where_a_quiet_table_was_staged_long_ago(project: Path, url: str) -> None:
    """What is staged is worked out exactly: a shape of long ago must not break a model that fits."""
    assert headrace("run", "--once", cwd=project).code == 0
    execute(url, "ALTER TABLE orders ADD COLUMN note text; UPDATE orders SET note = 'x' WHERE id < 9")
    (project / "models" / "clean.sql").write_text(MENDED.replace("status,", "status, note,"))
    assert headrace("run", "--once", cwd=project).code == 0
    # Captured and not staged: a table that was last written before the other's new column.
    execute(url, "UPDATE customers SET city = 'Ulm'")
    with taken(project) as pipeline:
        (lane,) = pipeline.lanes
        staged = lane.staging.through()
        lane.capture(pipeline.stop, until=lane.source.head())
    (source,) = answer("status", cwd=project)["sources"]
    assert source["staged_through"] == staged
    assert source["load"]["rows"] == 20
    done = headrace("run", "--once", cwd=project)
    assert "SUSPENDED" not in done.err
    assert counted(project, "SELECT count(*) AS n FROM clean WHERE note = 'x'") == 8


def test_it_ends_when_its_only_source_is_lost(project: Path, url: str) -> None:
    assert headrace("run", "--once", cwd=project).code == 0
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SELECT pg_drop_replication_slot(%s)", [url.rpartition("/")[2]])
    done = headrace("run", cwd=project)
    assert done.code == 1, done
    assert "is gone" in done.err.splitlines()[-1]
    assert counted(project, "SELECT count(*) AS n FROM shop.customers") == 20


# -------------------------------------------------------------------------------------- bad input


def test_state_folders_that_do_not_belong(project: Path, url: str, tmp_path: Path) -> None:
    assert headrace("run", "--once", cwd=project).code == 0
    state, older = project / ".headrace", tmp_path / "older"
    shutil.copytree(state, older)
    execute(url, "UPDATE accounts SET balance = balance + 1")
    assert headrace("run", "--once", cwd=project).code == 0
    newest = state.rename(tmp_path / "newest")

    shutil.copytree(older, state)
    copied = headrace("run", "--once", cwd=project)
    assert (copied.code, copied.err.count("\n")) == (2, 1)
    assert "the state folder is an older copy" in copied.err
    shutil.rmtree(state)

    deleted = headrace("run", "--once", cwd=project)
    assert deleted.code == 2
    assert "the state folder was deleted, restored or copied" in deleted.err
    shutil.rmtree(state)

    newest.rename(state)
    assert headrace("run", "--once", cwd=project).code == 0


def test_another_server(project: Path, url: str, tmp_path: Path) -> None:
    assert headrace("run", "--once", cwd=project).code == 0
    with PostgresServer(tmp_path / "pg") as other:
        other.psql("CREATE TABLE t (id int PRIMARY KEY)")
        settings = project / "headrace.toml"
        settings.write_text(settings.read_text().replace(url, other.url))
        refused = headrace("run", "--once", cwd=project)
        assert refused.code == 2
        assert "is another server than the one" in refused.err
        slot = answer("status", cwd=project)["sources"][0]["slot"]
        assert slot["exists"] is False
    assert "cannot be reached" in answer("status", cwd=project)["sources"][0]["slot"]["unreachable"]
    assert "slot     unreachable: " in here("status", cwd=project).out


def test_no_such_table(project: Path) -> None:
    """Found by the capture thread: nothing else will ever run, so it ends with the mistake."""
    settings = project / "headrace.toml"
    settings.write_text(settings.read_text() + 'tables = ["public.nope"]\n')
    refused = headrace("run", cwd=project)
    assert refused.code == 2
    assert "no table of" in refused.err.splitlines()[-1]


def test_a_destination_that_is_held(project: Path) -> None:
    assert headrace("run", "--once", cwd=project).code == 0
    path = project / "warehouse.duckdb"
    code = f"import duckdb; c = duckdb.connect({str(path)!r}); print('open', flush=True); input()"
    with (
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as holder,
        Running(project) as pipeline,
    ):
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        until(lambda: pipeline.says("is held by"))
        assert pipeline.says(f"PID {holder.pid}")
        assert f"PID {holder.pid}" in answer("status", cwd=project)["destination"]["error"]
        holder.communicate("\n")
        until(lambda: answer("status", cwd=project)["running"])
        assert pipeline.says("goes on")
        assert pipeline.stop() == 0


def test_stopped_while_it_waits(project: Path) -> None:
    assert headrace("run", "--once", cwd=project).code == 0
    path = project / "warehouse.duckdb"
    code = f"import duckdb; c = duckdb.connect({str(path)!r}); print('open', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with Running(project) as pipeline:
            until(lambda: pipeline.says("is held by"))
            assert pipeline.stop() == 0
        holder.communicate("\n")


def test_an_unwritable_state_folder(
    project: Path, unwritable: Callable[[Path], AbstractContextManager[None]]
) -> None:
    with unwritable(project):
        refused = headrace("run", "--once", cwd=project)
    assert refused.code == 2
    assert "cannot be written" in refused.err
