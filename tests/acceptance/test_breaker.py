"""Models that stand still alone: their breaker tripped, or a person has suspended them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.errors import HeadraceError
from headrace.testing.postgres import PostgresServer
from live import LiveProject
from pipelines import running, until
from projects import here

GOOD = "SELECT id::INT AS id, TRY_CAST(amount AS INT) AS amount FROM raw.shop.t"
STRICT = "SELECT id::INT AS id, amount::INT AS amount FROM raw.shop.t"


class Shop(LiveProject):
    def states(self) -> list[tuple[object, ...]]:
        return self.rows("SELECT model, state FROM headrace.models ORDER BY model")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("breaker") / "pg") as started:
        yield started


@pytest.fixture
def shop(tmp_path: Path, server: PostgresServer) -> Shop:
    return Shop(
        tmp_path / "project",
        server,
        "DROP TABLE IF EXISTS t, u",
        "CREATE TABLE t (id int PRIMARY KEY, amount text); CREATE TABLE u (id int PRIMARY KEY)",
        "INSERT INTO t VALUES (1, '1'), (2, '2'); INSERT INTO u VALUES (1)",
    )


def alerts_of(caplog: pytest.LogCaptureFixture, word: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "headrace.alert" and word in r.getMessage()]


def test_a_stream_of_which_half_fails_trips_and_nothing_of_it_is_kept(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    shop.model(STRICT)
    shop.model(GOOD, "other")
    shop.run()
    shop.sql(
        "INSERT INTO t SELECT n, CASE WHEN n <= 700 THEN 'x' ELSE '7' END FROM generate_series(3, 1200) n"
    )
    with pytest.raises(HeadraceError, match=r"Model m is suspended: 698 of its newest 1,198 changes"):
        shop.run()
    assert shop.rows("SELECT count(*) FROM main.m") == [(2,)]
    assert shop.rows("SELECT count(*) FROM headrace.quarantine WHERE model = 'm'") == [(0,)]
    # All else goes on, and so does what comes behind.
    shop.sql("INSERT INTO t VALUES (5000, '5')")
    with pytest.raises(HeadraceError, match="Model m is suspended"):
        shop.run()
    assert shop.rows("SELECT count(*) FROM main.other") == [(1201,)]
    assert shop.states() == [("m", "suspended"), ("other", "in_sync"), ("shop.u", "in_sync")]
    assert len(alerts_of(caplog, "SUSPENDED")) == 1
    # A person who wants the probe with the model as it is gets it, and the breaker trips once more.
    assert here("resume", "m", cwd=shop.project.root).code == 0
    with pytest.raises(HeadraceError, match="Model m is suspended"):
        shop.run()
    assert shop.rows("SELECT count(*) FROM main.m") == [(2,)]
    assert len(alerts_of(caplog, "SUSPENDED")) == 2
    # Mended, all that has waited is applied.
    shop.model(GOOD)
    shop.run()
    assert shop.rows("SELECT count(*), count(amount) FROM main.m") == [(1201, 503)]
    shop.assert_verified()


def test_a_rate_of_one_never_trips_and_few_bad_rows_do_not(shop: Shop) -> None:
    shop.model(STRICT, header="max_error_rate = 1")
    shop.model(STRICT, "few", header="max_error_rate = 0.9")
    shop.sql(
        "INSERT INTO t SELECT n, CASE WHEN n < 2000 THEN 'x' ELSE '7' END FROM generate_series(3, 2500) n"
    )
    shop.run()
    assert shop.rows("SELECT model, count(*) FROM headrace.quarantine GROUP BY 1 ORDER BY 1") == [
        ("few", 1997),
        ("m", 1997),
    ]


def test_a_copy_whose_rows_all_fail_trips_and_goes_on_when_the_model_is_mended(shop: Shop) -> None:
    shop.sql("UPDATE t SET amount = 'x'", "INSERT INTO t SELECT n, 'x' FROM generate_series(3, 1500) n")
    shop.model(STRICT)
    with pytest.raises(HeadraceError, match=r"1,500 of its newest 1,500 changes failed"):
        shop.run()
    assert shop.rows("SELECT count(*) FROM headrace.quarantine") == [(0,)]
    shop.model(GOOD)
    shop.run()
    assert shop.rows("SELECT count(*) FROM main.m") == [(1500,)]
    assert shop.rows("SELECT count(*) FROM headrace.suspensions") == [(0,)]
    shop.assert_verified()


def test_what_a_person_suspends_stays_so_until_it_is_resumed_and_holds_nothing(shop: Shop) -> None:
    shop.model(GOOD)
    with running(shop.project) as pipeline:
        until(lambda: {("m", "in_sync"), ("shop.u", "in_sync")} <= set(shop.states()))
        assert here("suspend", "m", "--reason", "month end", cwd=shop.project.root).code == 0
        assert shop.rows("SELECT reason FROM headrace.models WHERE model = 'm'") == [("by hand: month end",)]
        shop.model(STRICT)
        shop.sql("INSERT INTO t VALUES (3, '3')", "INSERT INTO u VALUES (2)")
        until(lambda: shop.rows("SELECT count(*) FROM shop.u") == [(2,)])
        time.sleep(1.2)  # the folder is looked at once a second
        until(pipeline.lanes[0].needs)
        needs = pipeline.lanes[0].needs()
        (stood,) = shop.rows("SELECT \"offset\" FROM headrace.models WHERE model = 'm'")
        # The log may be trimmed beyond where it stands, which stays a stop.
        assert needs is not None
        assert needs.used > int(str(stood[0]))
        assert stood[0] in needs.stops
    shop.run()  # a restart, and no failure: a person wants it so
    assert shop.rows("SELECT count(*) FROM main.m") == [(2,)]
    assert ("m", "suspended") in shop.states()
    assert here("resume", "m", cwd=shop.project.root).out == "m goes on from where it stands\n"
    assert here("resume", "m", cwd=shop.project.root).code == 2
    shop.run()
    assert shop.rows("SELECT count(*) FROM main.m") == [(3,)]
    assert ("m", "in_sync") in shop.states()
    shop.assert_verified()


def test_one_that_missed_nothing_is_in_sync_at_once_and_no_model_is_no_model(shop: Shop) -> None:
    shop.run()
    assert here("suspend", "shop.t", cwd=shop.project.root).code == 0
    assert here("resume", "shop.t", cwd=shop.project.root).code == 0
    assert ("shop.t", "in_sync") in shop.states()
    refused = here("suspend", "nowhere", cwd=shop.project.root)
    assert (refused.code, "There is no row model nowhere." in refused.err) == (2, True)


def test_a_rate_that_cannot_be_meant_is_refused(shop: Shop) -> None:
    for rate in ("0", "1.5", '"half"', "true"):
        shop.model(GOOD, header=f"max_error_rate = {rate}")
        assert "max_error_rate must be a number" in here("check", cwd=shop.project.root).out
