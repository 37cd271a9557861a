"""Models that change while their data stays: mended, made stricter, given other columns, taken away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from headrace import lane
from headrace.cli import main
from headrace.config import Project, load_project
from headrace.errors import HeadraceError
from headrace.pipeline import Pipeline
from headrace.server import read_rows
from headrace.testing.postgres import PostgresServer
from headrace.verify import verify

LOOSE = 'SELECT id::INT AS id, TRY_CAST(amount AS INT) AS amount FROM raw.shop."t"'
STRICT = "SELECT id::INT AS id, amount::INT AS amount FROM raw.shop.t"
STRICTER = "SELECT id::INT AS id, (amount || repeat('x', amount::INT // 6))::INT AS amount FROM raw.shop.t"


class Shop:
    """One table `t(id, amount)`, one model over it, driven by `run_once`."""

    def __init__(self, folder: Path, server: PostgresServer) -> None:
        self.server = server
        self.project: Project = self._write(folder)

    def _write(self, folder: Path) -> Project:
        (folder / "models").mkdir(parents=True)
        (folder / "headrace.toml").write_text(f'[source.shop]\nurl = "{self.server.url}"\n')
        return load_project(folder)

    def model(self, sql: str | None, name: str = "m") -> None:
        path = self.project.models / f"{name}.sql"
        path.unlink(missing_ok=True)
        if sql is not None:
            path.write_text(f'/* headrace\nkey = ["id"]\n*/\n{sql}\n')

    def sql(self, statement: str) -> None:
        with psycopg.connect(self.server.url, autocommit=True) as db:
            db.execute(statement.encode())

    def run(self) -> None:
        Pipeline(self.project).run_once()

    def redrive(self, *keys: str, dry_run: bool = False) -> dict[str, int]:
        pipeline = Pipeline(self.project)
        try:
            return pipeline.lanes[0].redrive("m", keys, dry_run=dry_run)
        finally:
            pipeline.close()

    def rows(self, query: str) -> list[tuple[object, ...]]:
        return [tuple(row) for row in read_rows(self.project, query)[1]]

    def assert_verified(self) -> None:
        report = verify(self.project)
        assert report.verified, [finding for finding in report.findings if not finding.ok]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("models") / "pg") as running:
        yield running


@pytest.fixture
def shop(tmp_path: Path, server: PostgresServer) -> Shop:
    with psycopg.connect(server.url, autocommit=True) as db:
        db.execute("DROP PUBLICATION IF EXISTS headrace_shop")
        db.execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT active")
        db.execute("DROP TABLE IF EXISTS t, u, nowhere")
        db.execute("CREATE TABLE t (id int PRIMARY KEY, amount text)")
        db.execute("INSERT INTO t VALUES (1, '1'), (2, 'two'), (3, '3')")
    return Shop(tmp_path / "project", server)


def test_a_mended_model_takes_the_quarantined_change_in(shop: Shop) -> None:
    shop.model(STRICT)
    shop.run()
    assert shop.rows("SELECT id, amount FROM main.m ORDER BY id") == [(1, 1), (3, 3)]
    shop.model(LOOSE)
    assert shop.redrive("2", dry_run=True) == {"resolved": 1, "still_quarantined": 0}
    assert shop.rows("SELECT count(*) FROM main.m") == [(2,)]
    assert shop.redrive("2") == {"resolved": 1, "still_quarantined": 0}
    assert shop.redrive("2") == {"resolved": 0, "still_quarantined": 0}
    assert shop.rows("SELECT id, amount FROM main.m ORDER BY id") == [(1, 1), (2, None), (3, 3)]
    shop.assert_verified()


def test_a_redrive_never_puts_an_old_value_over_a_newer_one(shop: Shop) -> None:
    shop.model(STRICT)
    shop.run()
    shop.sql("UPDATE t SET amount = '22' WHERE id = 2")
    shop.sql("DELETE FROM t WHERE id = 1; UPDATE t SET amount = 'three' WHERE id = 3")
    shop.run()
    assert shop.rows("SELECT id, amount FROM main.m ORDER BY id") == [(2, 22), (3, 3)]
    assert shop.rows("SELECT key, status FROM headrace.quarantine ORDER BY 1") == [
        ("2", "superseded"),
        ("3", "quarantined"),
    ]
    shop.model(LOOSE)
    shop.redrive("1", "2", "3")
    assert shop.rows("SELECT id, amount FROM main.m ORDER BY id") == [(2, 22), (3, None)]
    shop.assert_verified()


def test_what_a_stricter_model_refuses_becomes_a_record_and_no_row_goes_without_one(shop: Shop) -> None:
    shop.sql("INSERT INTO t VALUES (9, '9')")
    shop.model(STRICT)
    shop.run()
    shop.sql("UPDATE t SET amount = 'nine' WHERE id = 9")
    shop.run()
    assert shop.rows("SELECT amount FROM main.m WHERE id = 9") == [(9,)]
    shop.model(STRICTER)
    assert shop.redrive("9") == {"resolved": 0, "still_quarantined": 2}
    assert shop.rows("SELECT count(*) FROM main.m WHERE id = 9") == [(0,)]
    assert shop.rows("SELECT count(*), count(DISTINCT id) FROM headrace.quarantine WHERE key = '9'") == [
        (2, 2)
    ]
    shop.model(LOOSE)
    assert shop.redrive("2", "9") == {"resolved": 3, "still_quarantined": 0}
    shop.assert_verified()


def test_a_model_with_other_columns_is_built_again_from_staging(shop: Shop) -> None:
    shop.model(STRICT)
    shop.run()
    shop.model("SELECT id::INT AS id, amount, length(amount) AS n FROM raw.shop.t")
    shop.run()
    assert shop.rows("SELECT id, amount, n FROM main.m ORDER BY id") == [
        (1, "1", 1),
        (2, "two", 3),
        (3, "3", 1),
    ]
    assert shop.rows("SELECT DISTINCT status FROM headrace.quarantine") == [("superseded",)]
    shop.assert_verified()
    shop.model("SELECT id::INT AS id, amount::INT AS amount FROM raw.shop.t")
    shop.run()
    assert shop.rows("SELECT count(*), any_value(status) FROM headrace.quarantine") == [(1, "quarantined")]
    shop.assert_verified()


def test_a_redrive_does_not_get_in_the_way_of_a_copy(shop: Shop) -> None:
    """Neither of one that is being taken in, nor of one that is to be taken in again."""
    shop.model(STRICT)
    pipeline = Pipeline(shop.project)
    try:
        (shops,) = pipeline.lanes
        shops.capture(pipeline.stop, until=shops.source.head())
        while shops.load():
            pass
        for _ in ("begin", "rows"):
            assert shops.apply()
        assert shop.rows("SELECT key FROM headrace.quarantine") == [("2",)]
        with pytest.raises(HeadraceError, match="still takes in its table's copy"):
            shops.redrive("m", ["2"])
        while shops.apply():
            pass
        assert shop.rows("SELECT count(*) FROM main.m") == [(2,)]
        shop.model("SELECT id::INT AS id, amount AS amount, 7 AS n FROM raw.shop.t")
        assert shops.redrive("m", ["2"]) == {"resolved": 0, "still_quarantined": 0, "rebuilding": 1}
        while shops.apply():
            pass
    finally:
        pipeline.close()
    assert shop.rows("SELECT id, n FROM main.m ORDER BY id") == [(1, 7), (2, 7), (3, 7)]
    shop.assert_verified()


def test_a_broken_model_is_suspended_alone_and_runs_again_once_mended(shop: Shop) -> None:
    shop.sql("CREATE TABLE u (id int PRIMARY KEY)")
    shop.sql("INSERT INTO u VALUES (7)")
    shop.model("SELECT id::INT AS id, amuont FROM raw.shop.t")
    with pytest.raises(HeadraceError, match="amuont"):
        shop.run()
    assert shop.rows("SELECT id FROM shop.u") == [(7,)]
    assert shop.rows("SELECT state FROM headrace.models WHERE model = 'm'") == [("suspended",)]
    shop.model(LOOSE)
    shop.run()
    assert shop.rows("SELECT count(*) FROM main.m") == [(3,)]
    shop.assert_verified()


def test_a_model_of_a_table_that_is_not_captured_is_suspended_with_the_reason(shop: Shop) -> None:
    shop.model("SELECT id::INT AS id FROM raw.shop.nowhere", name="lost")
    with pytest.raises(HeadraceError, match=r"raw\.shop\.nowhere is not captured"):
        shop.run()
    assert shop.rows("SELECT count(*) FROM shop.t") == [(3,)]
    shop.sql("CREATE TABLE nowhere (id int PRIMARY KEY)")
    shop.sql("INSERT INTO nowhere VALUES (5)")
    assert main(["tables", "add", "nowhere", "--project", str(shop.project.root)]) == 0
    shop.run()
    assert shop.rows("SELECT id FROM lost") == [(5,)]
    shop.assert_verified()


def test_a_model_whose_table_is_not_staged_yet_waits(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.sql("CREATE TABLE u (id int PRIMARY KEY)")
    shop.model("SELECT id::INT AS id FROM raw.shop.u", name="late")
    shop.model("SELECT id::INT AS id FROM raw.shop.t", name="early")
    monkeypatch.setattr(lane, "_LOAD_BYTES", 1)
    pipeline = Pipeline(shop.project)
    try:
        (shops,) = pipeline.lanes
        shops.capture(pipeline.stop, until=shops.source.head())
        while shops.load():
            while shops.apply():
                assert shops.suspended() == {}
        states = {name: state.state for name, state in shops.destination.models("shop").items()}
    finally:
        pipeline.close()
    assert states["early"] == states["late"] == "in_sync"


def test_a_model_runs_again_once_its_table_fits_again(shop: Shop) -> None:
    shop.model("SELECT id::INT AS id, amount AS amount FROM raw.shop.t")
    shop.run()
    shop.sql("ALTER TABLE t RENAME amount TO total")
    shop.sql("INSERT INTO t VALUES (4, '4')")
    with pytest.raises(HeadraceError, match="amount"):
        shop.run()
    shop.sql("ALTER TABLE t RENAME total TO amount")
    shop.sql("INSERT INTO t VALUES (5, '5')")
    shop.run()
    assert shop.rows("SELECT count(amount) FROM m") == [(5,)]
    shop.assert_verified()


def test_a_mirror_steps_aside_for_a_model_and_comes_back_up_to_date(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    shop.run()
    shop.model(LOOSE)
    shop.sql("INSERT INTO t VALUES (4, '4')")
    assert main(["run", "--once", "--project", str(shop.project.root)]) == 0
    assert ": 1 of 1 models in sync" in capsys.readouterr().out  # the one that stepped aside is not counted
    assert shop.rows("SELECT model, state FROM headrace.models ORDER BY model") == [
        ("m", "in_sync"),
        ("shop.t", "retired"),
    ]
    assert shop.rows("SELECT count(*) FROM shop.t") == [(3,)]
    shop.model(None)
    shop.run()
    assert shop.rows("SELECT count(*) FROM shop.t") == [(4,)]
    assert shop.rows("SELECT model, state FROM headrace.models ORDER BY model") == [
        ("m", "retired"),
        ("shop.t", "in_sync"),
    ]
    shop.assert_verified()
