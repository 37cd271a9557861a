"""DuckDB and Postgres keep the contract of a destination."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import duckdb
import psycopg
import pytest

pytest.register_assert_rewrite(
    "headrace.testing.destination_suite",
    "headrace.testing.destination_drift_suite",
    "headrace.testing.destination_joins_suite",
    "headrace.testing.destination_marts_suite",
)

from headrace.destinations.duckdb import DuckDBDestination  # noqa: E402
from headrace.destinations.postgres import PostgresDestination  # noqa: E402
from headrace.mart import Mart  # noqa: E402
from headrace.secret import Secret  # noqa: E402
from headrace.testing.destination_suite import DestinationSuite  # noqa: E402
from headrace.testing.destinations import NUMBERS, row, slice_of, table  # noqa: E402
from headrace.testing.postgres import PostgresServer  # noqa: E402

STEPS = (
    ("destination.apply.part", False),
    ("destination.apply.commit", False),
    ("destination.apply.committed", True),
)


class DuckDBs:
    steps = STEPS

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def make(self) -> DuckDBDestination:
        return DuckDBDestination(self._folder / "w.duckdb")

    def reopen(self, destination: DuckDBDestination) -> DuckDBDestination:
        return DuckDBDestination(destination.path)

    def code(self, destination: DuckDBDestination) -> str:
        return (
            "from pathlib import Path; from headrace.destinations.duckdb import DuckDBDestination\n"
            f"destination = DuckDBDestination(Path({str(destination.path)!r}))"
        )

    def alter(self, destination: DuckDBDestination, statement: str) -> None:
        with duckdb.connect(str(destination.path)) as db:
            db.execute(statement)


class Postgreses:
    steps = (*STEPS[:2], ("destination.postgres.commit", False), STEPS[2])

    def __init__(self, server: PostgresServer) -> None:
        self._server = server
        self._number = 0

    def make(self) -> PostgresDestination:
        database = f"w{next(_numbers)}"
        with psycopg.connect(self._server.url, autocommit=True) as db:
            db.execute(f"CREATE DATABASE {database}")
        self._url = self._server.url.removesuffix("postgres") + quote(database)
        return PostgresDestination(Secret(self._url))

    def reopen(self, destination: PostgresDestination) -> PostgresDestination:
        return PostgresDestination(Secret(self._url))

    def code(self, destination: PostgresDestination) -> str:
        return (
            "from headrace.secret import Secret\n"
            "from headrace.destinations.postgres import PostgresDestination\n"
            f"destination = PostgresDestination(Secret({self._url!r}))"
        )

    def alter(self, destination: PostgresDestination, statement: str) -> None:
        with psycopg.connect(self._url, autocommit=True) as db:
            db.execute(statement.encode())


_numbers = iter(range(1_000_000))


@pytest.fixture(scope="module", params=[18, 16])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PostgresServer]:
    started = PostgresServer(tmp_path_factory.mktemp("pg"), request.param)
    started.start()
    yield started
    started.stop("immediate")


class TestDuckDB(DestinationSuite):
    @pytest.fixture
    def destinations(self, tmp_path: Path) -> DuckDBs:
        return DuckDBs(tmp_path)


class TestPostgres(DestinationSuite):
    @pytest.fixture
    def destinations(self, server: PostgresServer) -> Postgreses:
        return Postgreses(server)

    def test_a_constraint_on_a_mart_that_waits_for_the_end_suspends_it(
        self, destination: PostgresDestination
    ) -> None:
        destination.apply(slice_of(0, (NUMBERS, [row(1, "1"), row(2, "1")])))
        mart = Mart("each", "SELECT v FROM shop.t", ("shop.t",), "table", 0.0, "v1")
        destination.apply(slice_of(1, (NUMBERS, [row(2, None, _op="d")])))
        state = destination.marts.make(mart, None, ["shop.t"])
        with destination.open() as db:
            db.execute("ALTER TABLE public.each ADD UNIQUE (v) DEFERRABLE INITIALLY DEFERRED")
        destination.apply(slice_of(2, (NUMBERS, [row(3, "1")])))
        state = destination.marts.make(mart, state, ["shop.t"])
        assert state.state == "suspended"
        assert "each_v_key" in state.reason
        assert table(destination, "SELECT count(*) FROM each") == [(1,)]
