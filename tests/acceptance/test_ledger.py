"""`headrace ledger check`, what a running pipeline says of it, and the bound of the quarantine."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pytest

from headrace.config import Project, load_project
from headrace.conservation import LedgerWatch
from headrace.errors import HeadraceError
from headrace.pipeline import Pipeline
from headrace.server import read_rows
from headrace.testing.postgres import PostgresServer
from projects import here, sales_project, sql


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("ledger") / "pg") as started:
        yield started


def altered(project: Project, statement: str) -> None:
    with duckdb.connect(str(project.destination.path)) as db:
        db.execute(statement)


def test_a_ledger_closes_and_what_is_taken_from_it_or_from_the_records_shows(
    tmp_path: Path, server: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    project = sales_project(tmp_path, server)
    checked = (
        (project.models / "sales.sql")
        .read_text()
        .replace("CHECK (amount >= 0)", "CHECK (amount >= 0) CHECK (amount < 2) ON VIOLATION warn")
    )
    (project.models / "sales.sql").write_text(checked)
    assert "no destination" in here("ledger", "check", cwd=tmp_path).err
    Pipeline(project).run_once()
    sql(server, "INSERT INTO orders VALUES (4, 'paid', '4'), (5, 'paid', 'x')", "DELETE FROM customers")
    Pipeline(project).run_once()
    closes = here("ledger", "check", cwd=tmp_path)
    assert (closes.code, closes.out.splitlines()[-1]) == (0, "2 ledgers, 0 do not close.")
    assert "✔ sales: closes over 5 changes" in closes.out
    # What only warns is applied and counted.
    status = json.loads(here("status", "--json", cwd=tmp_path).out)
    (sales,) = [m for m in status["sources"][0]["models"] if m["name"] == "sales"]
    assert (sales["warned"], sales["nulled"]) == (1, 0)
    assert "sales checks: 1 applied with a warning" in here("status", cwd=tmp_path).out
    warnings = [r.getMessage() for r in caplog.records if "violate a check" in r.getMessage()]
    assert warnings == ["model sales: 1 changes applied that violate a check, 0 with a cell nulled for it"]
    pipeline = Pipeline(project)
    watch = LedgerWatch(pipeline.lanes)
    watch.step()
    pipeline.close()
    assert not [r for r in caplog.records if "does not close" in r.getMessage()]
    for statement, words in (
        ("DELETE FROM headrace.quarantine WHERE key = '5'", "says 2 quarantined records, there are 1"),
        ("UPDATE headrace.ledger SET applied = applied + 1", "rows do not close"),
        (
            "UPDATE headrace.ledger SET applied = applied + 1, read = read + 1",
            "has not read what the log holds",
        ),
    ):
        saved = project.destination.path.read_bytes()
        altered(project, statement)
        found = here("ledger", "check", "--json", cwd=tmp_path)
        accounts = {one["model"]: one for one in found.objects()}
        assert (found.code, accounts["sales"]["closes"]) == (1, False)
        assert words in accounts["sales"]["detail"]
        pipeline = Pipeline(project)
        watch = LedgerWatch(pipeline.lanes)
        for _ in range(2):  # told once
            watch.step()
        pipeline.close()
        project.destination.path.write_bytes(saved)
    told = [r.getMessage() for r in caplog.records if "LEDGER of model sales" in r.getMessage()]
    assert len(told) == 2, told  # the third is told by log and staging alone
    assert "it says 2 open records, there are 1" in told[0]


def test_at_its_bound_the_quarantine_drops_nothing_and_the_model_goes_on_when_there_is_room(
    tmp_path: Path, server: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    project = sales_project(tmp_path, server)
    config = (tmp_path / "headrace.toml").read_text()
    (tmp_path / "headrace.toml").write_text(config + "[quarantine]\nmax_records = 2\n")
    project = load_project(tmp_path)
    logging.getLogger("headrace").setLevel(logging.INFO)
    Pipeline(project).run_once()  # one record
    sql(server, "INSERT INTO orders VALUES (6, 'paid', '6'), (7, 'paid', 'x'), (8, 'paid', 'y')")
    with pytest.raises(HeadraceError, match=r"would hold more than 2 open records \(max_records\)"):
        Pipeline(project).run_once()
    count = "SELECT count(*) FROM headrace.quarantine WHERE status = 'quarantined'"
    assert list(read_rows(project, count)[1]) == [(1,)]
    assert list(read_rows(project, "SELECT count(*) FROM main.sales WHERE order_id = 6")[1]) == [(0,)]
    # A good change heals the one that is there, and so makes room.
    (tmp_path / "headrace.toml").write_text(config + "[quarantine]\nmax_records = 3\n")
    project = load_project(tmp_path)
    Pipeline(project).run_once()
    assert list(read_rows(project, count)[1]) == [(3,)]
    assert list(read_rows(project, "SELECT count(*) FROM main.sales WHERE order_id = 6")[1]) == [(1,)]
    assert here("ledger", "check", cwd=tmp_path).code == 0
    # What was healed since it was counted is not held against a model.
    sql(server, "UPDATE orders SET amount = '1' WHERE id IN (7, 8)")
    Pipeline(project).run_once()
    pipeline = Pipeline(project)
    sql(server, "INSERT INTO orders VALUES (9, 'paid', 'x'), (10, 'paid', 'y')")
    pipeline.run_once()
    assert list(read_rows(project, count)[1]) == [(3,)]
    for key, value in (("max_records", "0"), ("max_bytes", '"1B"')):
        (tmp_path / "headrace.toml").write_text(config + f"[quarantine]\n{key} = {value}\n")
        assert f"{key}" in here("status", cwd=tmp_path).err
