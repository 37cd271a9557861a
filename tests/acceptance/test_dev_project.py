"""A dev project reads the staging of production, without a slot, and whatever it does, production goes on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.config import Project, load_project
from headrace.errors import ConfigError, DestinationUnavailable
from headrace.log.readers import Readers
from headrace.pipeline import Pipeline
from headrace.server import is_running, read
from headrace.state import take_state
from headrace.testing.postgres import PostgresServer
from headrace.upstream import ReadingPlace
from headrace.verify import verify
from pipelines import running, until
from projects import SALES, here, sales_project, sql

DEV_SALES = SALES.replace("upper(status)", "lower(status)").replace("DECIMAL(12,2)", "INTEGER")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("dev") / "pg") as running_server:
        yield running_server


@pytest.fixture
def prod(tmp_path: Path, server: PostgresServer) -> Project:
    (tmp_path / "prod").mkdir()
    project = sales_project(tmp_path / "prod", server)
    with (project.root / "headrace.toml").open("a") as file:
        file.write(
            '[log]\nkeep = "1s"\ngroup_linger = "0ms"\n[staging]\ngrace = "0s"\nmaintenance_cpu = 1.0\n'
        )
    return load_project(project.root)


@pytest.fixture
def dev(tmp_path: Path, prod: Project) -> Project:
    (tmp_path / "dev" / "models").mkdir(parents=True)
    (tmp_path / "dev" / "headrace.toml").write_text('[source.shop]\nstaging_of = "../prod"\n')
    (tmp_path / "dev" / "models" / "sales.sql").write_text(DEV_SALES)
    return load_project(tmp_path / "dev")


def sales(project: Project) -> list[tuple[object, ...]]:
    (table,) = read(project, ["SELECT order_id, status, amount FROM sales ORDER BY order_id"])
    return [tuple(row.values()) for row in table.to_pylist()]


def files_of(folder: Path) -> dict[Path, bytes]:
    passing = (".db-shm", ".db-wal")
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in passing)
    return {path: path.read_bytes() for path in found if ".readers" not in str(path)}


def slots(server: PostgresServer) -> int:
    import psycopg

    with psycopg.connect(server.url) as db:
        ((count,),) = db.execute("SELECT count(*) FROM pg_replication_slots").fetchall()
    return int(count)


def test_dev_reads_what_production_stages_and_touches_nothing(
    prod: Project, dev: Project, server: PostgresServer
) -> None:
    Pipeline(prod).run_once()
    before = files_of(prod.root)
    Pipeline(dev).run_once()
    assert sales(dev) == [(1, "new", 2)]
    assert sales(prod)[0][1] == "NEW"
    assert files_of(prod.root) == before
    assert slots(server) == 1
    assert not (dev.state / "log" / "shop.db").exists()
    (reader,) = Readers(prod.log_path("shop")).all()
    assert reader.project == str(dev.state)

    status = here("status", "--json", cwd=dev.root).objects()[0]
    assert status["sources"][0]["slot"] == {"name": None, "read_by": str(prod.root)}
    assert here("query", "SELECT count(*) AS n FROM raw.shop.orders", "--csv", cwd=dev.root).out == "n\n3\n"
    assert "The same as the live table" in here("preview", "sales", cwd=dev.root).out
    assert here("rebuild", "sales", cwd=dev.root).code == 0
    assert here("check", cwd=dev.root).code == 0
    assert verify(dev).verified
    for refused in (
        ("tables", "add", "visits"),
        ("resync",),
        ("staging", "compact"),
    ):
        done = here(*refused, cwd=dev.root)
        assert (done.code, "only reads the staging of source shop" in done.err) == (2, True), refused
    assert "captured nothing" in here("teardown", "--yes", cwd=dev.root).out
    assert files_of(prod.root) == before


def test_production_compacts_and_trims_while_dev_follows_and_goes_on_when_it_is_gone(
    prod: Project, dev: Project, server: PostgresServer
) -> None:
    Pipeline(prod).run_once()
    Pipeline(dev).run_once()
    with running(prod) as production:
        until(lambda: is_running(prod))
        upkeep, maintenance = production._upkeep["shop"], production._maintenance["shop"]
        with running(dev):
            until(lambda: is_running(dev))
            for n in range(10, 40):
                sql(
                    server,
                    f"INSERT INTO orders VALUES ({n}, 'Paid', '{n}')",
                    "UPDATE orders SET amount = '5'",
                )
                if n % 10 == 0:
                    until(lambda n=n: len(sales(dev)) >= n - 8)
                    for table in maintenance.staging.tables():
                        maintenance.compact(table)  # with a grace of nothing: files go at once
            until(lambda: len(sales(dev)) == 32, what="dev follows")
            until(lambda: len(sales(prod)) == 32)
        assert {row[1:] for row in sales(dev)} == {("new", 5), ("paid", 5)}
        stood = read(dev, ['SELECT "offset" FROM headrace.progress'])[0].to_pylist()[0]["offset"]
        assert verify(dev).verified

        # Dev stands still; production goes on, and retention passes the place at which it stands.
        sql(server, "DELETE FROM orders WHERE id = 10", "INSERT INTO orders VALUES (99, 'paid', '9')")
        log = production.lanes[0].log
        until(lambda: _trimmed(upkeep, log, stood), what="retention")
        assert log.entry(stood) is None
        Pipeline(dev).run_once()
        assert len(sales(dev)) == 32
        assert sales(dev)[-1] == (99, "paid", 9)
        assert verify(dev).verified

        # A place that was not pinned is refused, and production does not care.
        shutil.rmtree(Readers(prod.log_path("shop")).folder)
        shutil.rmtree(dev.root)
        sql(server, "INSERT INTO orders VALUES (100, 'paid', '9')")
        until(lambda: len(sales(prod)) == 33)
    assert not production._errors


def _trimmed(upkeep: object, log: object, offset: int) -> bool:
    upkeep.step()  # type: ignore[attr-defined]
    return log.begin().offset > offset  # type: ignore[attr-defined]


def test_an_environment_reads_the_staging_of_the_one_it_lies_over(prod: Project) -> None:
    Pipeline(prod).run_once()
    (prod.root / "headrace.dev.toml").write_text(
        '[source.shop]\nstaging_of = "."\n[destination]\npath = "dev.duckdb"\n'
    )
    dev = load_project(prod.root, env="dev")
    assert dev.log_path("shop") == prod.log_path("shop")
    Pipeline(dev).run_once()
    assert sales(dev) == sales(prod)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ('staging_of = "."', "is this project itself"),
        ('staging_of = "../none"', "cannot be read"),
        ('staging_of = "../prod"\nstaging_env = "x y"', "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_line(
    tmp_path: Path, prod: Project, settings: str, words: str
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "headrace.toml").write_text(f"[source.shop]\n{settings}\n")
    with pytest.raises(ConfigError, match=rf"headrace.toml:2: \[source.shop\] staging_of: .*{words}"):
        load_project(tmp_path / "other")
    (tmp_path / "other" / "headrace.toml").write_text('[source.mart]\nstaging_of = "../prod"\n')
    with pytest.raises(ConfigError, match="captures no source mart"):
        load_project(tmp_path / "other")


def test_a_destination_that_is_away_keeps_dev_from_nothing_when_it_stops(
    prod: Project, dev: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_: ReadingPlace) -> None:
        raise DestinationUnavailable("The destination is away.")

    Pipeline(prod).run_once()
    pipeline = Pipeline(dev)
    monkeypatch.setattr(ReadingPlace, "step", away)
    pipeline.close()
    take_state(dev.state).close()
