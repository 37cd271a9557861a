"""`headrace preview`: what it says would come is what comes, and nothing is changed by asking."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import psycopg
import pyarrow as pa
import pytest

from headrace.authoring.files import find_model
from headrace.authoring.preview import Preview
from headrace.authoring.preview import preview as preview_model
from headrace.config import Project
from headrace.errors import HeadraceError, ModelBroken, UserError
from headrace.pipeline import Pipeline
from headrace.server import is_running, read, read_rows, scan
from headrace.testing.postgres import PostgresServer
from pipelines import running, until
from projects import SALES, here, sales_project, sql

CHANGED = SALES.replace("upper(status)", "lower(status)").replace("<> 'draft'", "<> 'new'")
INTEGERS = SALES.replace("DECIMAL(12,2)", "INTEGER").replace("upper(status) AS status", "status AS state")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("preview") / "pg") as running_server:
        yield running_server


@pytest.fixture
def project(tmp_path: Path, server: PostgresServer) -> Project:
    return sales_project(tmp_path, server)


def of(project: Project, name: str = "sales", sample: int | None = None) -> Preview:
    return preview_model(project, find_model(project, name), limit=3, sample=sample)


def off(project: Project, text: str, name: str = "sales") -> str:
    path = project.models / f"{name}.sql.off"
    path.write_text(text)
    return str(path)


def test_a_file_that_is_not_taken_up_is_compared_with_what_is_live(
    project: Project, server: PostgresServer
) -> None:
    Pipeline(project).run_once()
    sql(server, "UPDATE orders SET amount = '7' WHERE id = 3", "INSERT INTO orders VALUES (4, 'PAID', '4')")
    Pipeline(project).run_once()
    before = project.destination.path.read_bytes()
    files = sorted(path for path in project.state.rglob("*") if path.suffix not in (".db-shm", ".db-wal"))

    found = of(project, off(project, CHANGED))

    assert (found.rows, found.filtered, found.records, found.changes) == (3, 1, 0, 5)
    assert found.first.to_pylist()[0] == {"order_id": 2, "status": "draft", "amount": 2}
    assert found.difference is not None
    assert (found.difference.added.rows, found.difference.added.keys) == (1, ("2",))
    assert (found.difference.removed.rows, found.difference.removed.keys) == (1, ("1",))
    assert (found.difference.changed.rows, found.difference.changed.keys) == (2, ("3", "4"))
    assert found.difference.cells == {"status": 2}
    assert found.live_offset == found.offset
    assert project.destination.path.read_bytes() == before
    after = sorted(path for path in project.state.rglob("*") if path.suffix not in (".db-shm", ".db-wal"))
    assert after == files


def test_the_model_in_use_makes_what_is_live(project: Project) -> None:
    Pipeline(project).run_once()
    for name in ("sales", "shop.customers"):
        found = of(project, name)
        assert found.difference is not None
        assert found.difference.nothing
    out = here("preview", "sales", cwd=project.root).out
    assert "The same as the live table." in out
    assert "1 row, 1 left out by WHERE, 1 record quarantined (1 open now)" in out


def test_causes_are_told_with_keys_and_without_values(project: Project) -> None:
    Pipeline(project).run_once()
    path = off(project, INTEGERS.replace("CHECK (amount >= 0)", "CHECK (amount >= 5)"))
    (cause, other) = of(project, path).causes
    assert (cause.reason, cause.columns, cause.records, cause.keys) == (
        "constraint.check",
        "amount",
        1,
        ("1",),
    )
    assert (other.reason, other.columns, other.keys) == ("transform.cast", "amount", ("3",))
    assert "three" not in other.message
    out = here("preview", path, cwd=project.root).out
    assert "three" not in out
    assert "1 transform.cast amount: Conversion Error" in out


def test_other_columns_are_told_apart_from_other_values(project: Project) -> None:
    Pipeline(project).run_once()
    difference = of(project, off(project, INTEGERS)).difference
    assert difference is not None
    assert difference.new_columns == (("state", "VARCHAR"),)
    assert difference.gone_columns == (("status", "VARCHAR"),)
    assert difference.retyped == (("amount", "DECIMAL(12,2)", "INTEGER"),)
    assert difference.cells == {"amount": 1}  # 1.50 became 2
    out = here("preview", "models/sales.sql.off", cwd=project.root).out
    assert "column amount is INTEGER, and was DECIMAL(12,2)" in out
    assert "the table is dropped and built again" in out


def test_a_new_model_and_one_that_is_suspended(project: Project) -> None:
    Pipeline(project).run_once()
    found = of(project, off(project, CHANGED, "fresh"))
    assert found.difference is None
    assert found.rows == 1
    (project.models / "sales.sql").write_text(SALES.replace("upper(status)", "upper(state)"))
    with pytest.raises(UserError, match="suspended"):
        Pipeline(project).run_once()
    with pytest.raises(ModelBroken, match='Referenced column "state" not found'):
        of(project)
    assert of(project, off(project, SALES)).rows == 1


def test_rows_without_a_key_are_counted(project: Project, server: PostgresServer) -> None:
    sql(
        server,
        "CREATE TABLE visits (page text, seconds text)",
        "ALTER TABLE visits REPLICA IDENTITY FULL",
        "INSERT INTO visits SELECT 'home', '1' FROM generate_series(1, 3)",
        "INSERT INTO visits VALUES ('help', '2'), ('help', 'long')",
    )
    (project.models / "visits.sql").write_text("SELECT page AS page, seconds AS seconds FROM raw.shop.visits")
    Pipeline(project).run_once()
    sql(server, "DELETE FROM visits WHERE ctid = (SELECT min(ctid) FROM visits WHERE page = 'home')")
    Pipeline(project).run_once()
    text = "SELECT page AS page, seconds::INT * 2 AS seconds FROM raw.shop.visits WHERE page <> 'none'"
    found = of(project, off(project, text, "visits"))
    difference = found.difference
    assert (found.rows, found.records) == (3, 1)
    assert difference is not None
    assert (difference.changed.rows, difference.removed.rows, difference.added.rows) == (3, 1, 0)


def test_a_sample_has_whole_keys_and_its_share_of_them(project: Project, server: PostgresServer) -> None:
    sql(server, "INSERT INTO orders SELECT i, 'new', i::text FROM generate_series(100, 2099) i")
    Pipeline(project).run_once()
    sql(server, "UPDATE orders SET id = id + 10000, amount = '5' WHERE id BETWEEN 100 AND 1099")
    Pipeline(project).run_once()
    found = of(project, sample=1000)
    assert found.share == pytest.approx(1000 / 3003)
    assert 400 < found.rows < 900  # of 2001
    assert found.difference is not None
    assert found.difference.nothing
    other = of(project, off(project, SALES.replace("upper(status)", "status || '!'")), sample=1000)
    assert other.difference is not None
    assert other.difference.changed.rows == other.rows == found.rows


def test_a_running_pipeline_goes_on_meanwhile_and_makes_no_difference(
    project: Project, server: PostgresServer
) -> None:
    stop = threading.Event()

    def work() -> None:
        with psycopg.connect(server.url, autocommit=True) as db:
            i = 10
            while not stop.is_set():
                db.execute("INSERT INTO orders VALUES (%s, 'new', '1')", (i,))
                db.execute("UPDATE orders SET amount = (id %% 7)::text, status = %s", (f"s{i}",))
                i += 1
                stop.wait(0.05)  # every round rewrites all rows: without a pause a slow machine drowns

    with running(project):
        until(lambda: is_running(project))
        until(lambda: "sales: in_sync" in here("models", "show", "sales", cwd=project.root).out)
        worker = threading.Thread(target=work)
        worker.start()
        try:
            offsets = set()
            for _ in range(4):
                found = of(project)
                assert found.difference is not None
                assert found.difference.nothing
                offsets.add(found.offset)
        finally:
            stop.set()
            worker.join()
    assert len(offsets) > 1


def scanned(project: Project, queries: list[str]) -> list[pa.Table]:
    with scan(project, queries) as results:
        return [pa.Table.from_batches(list(batches), schema) for schema, batches in results]


def test_what_a_scan_reads_is_what_a_query_reads(project: Project) -> None:
    queries = ["SELECT * FROM range(25000) t(i)", "SELECT 1 AS one WHERE false", "SELECT 'x' AS text"]
    with running(project):
        until(lambda: is_running(project))
        assert scanned(project, queries) == read(project, queries)
        for bad in ("SELECT nothing", "DROP TABLE headrace.models"):
            with pytest.raises(UserError):
                scanned(project, [bad])
    assert scanned(project, queries) == read(project, queries)


@pytest.mark.parametrize("live", [True, False])
def test_a_scan_that_fails_on_the_way_is_no_end(
    project: Project, caplog: pytest.LogCaptureFixture, *, live: bool
) -> None:
    Pipeline(project).run_once()
    # The bad value stands behind many good ones, so that batches have gone out by then.
    text = "CASE WHEN i = 299999 THEN 'secret' ELSE i::VARCHAR END"
    bad = f"SELECT CAST({text} AS INT) AS n FROM range(300000) t(i)"
    with running(project) if live else nullcontext():
        until(lambda: is_running(project) is live)
        with scan(project, [bad]) as results:
            batches = next(results)[1]
            assert next(batches).num_rows > 0
            with pytest.raises(HeadraceError, match="failed on the way") as caught:
                list(batches)
    assert "secret" not in str(caught.value) + caplog.text


def test_before_anything_ran_and_in_json(project: Project) -> None:
    assert "has not run yet" in here("preview", "sales", cwd=project.root).err
    Pipeline(project).run_once()
    answer = json.loads(here("preview", "sales", "--json", "--limit", "1", cwd=project.root).out)
    assert answer["first"] == [{"order_id": 1, "status": "NEW", "amount": 1.5}]
    assert answer["causes"][0]["keys"] == ["3"]
    assert answer["difference"]["changed"] == {"rows": 0, "keys": []}


def test_a_reader_that_goes_away_in_the_middle_does_no_harm(project: Project, server: PostgresServer) -> None:
    with running(project):
        until(lambda: is_running(project))
        with scan(project, ["SELECT i, repeat('x', 100) AS x FROM range(300000) t(i)"]) as results:
            assert next(next(results)[1]).num_rows > 0
        sql(server, "INSERT INTO orders VALUES (7, 'paid', '7')")
        until(lambda: rows(project, "SELECT count(*) FROM sales") == [(2,)])


def rows(project: Project, query: str) -> list[tuple[object, ...]]:
    try:
        return [tuple(row) for row in read_rows(project, query)[1]]
    except UserError:  # the table is not there yet
        return []
