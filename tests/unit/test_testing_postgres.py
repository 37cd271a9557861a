import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import psycopg
import pytest

from headrace.errors import HeadraceError, UserError
from headrace.testing.postgres import PostgresServer, children_of, process_state
from headrace.testing.shop import OPENING_BALANCE, TABLES, Workload, create_schema, fill
from headrace.testing.shopper import JUNK, Shopper

START_AND_WAIT = """
import sys, time
from pathlib import Path
from headrace.testing.postgres import PostgresServer
server = PostgresServer(Path(sys.argv[1]))
server.start()
print(server.pid, flush=True)
if sys.argv[2] == "wait":
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("shop")) as server:
        with psycopg.connect(server.url) as conn:
            create_schema(conn)
            fill(conn, customers=100, products=30, orders=1_000, accounts=20)
        yield server


def gone(pid: int, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while process_state(pid)[0] not in "ZX":
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("version", [16, 18])
def test_both_versions_start_with_logical_wal_on_tcp_and_socket(tmp_path: Path, version: int) -> None:
    began = time.monotonic()
    with PostgresServer(tmp_path / "server", version) as server:
        assert time.monotonic() - began < 10
        for url in (server.url, server.socket_url):
            with psycopg.connect(url) as conn:
                assert conn.info.server_version // 10_000 == version
                assert conn.execute("SHOW wal_level").fetchone() == ("logical",)
        assert server.psql("SELECT 1, 'a' UNION ALL SELECT 2, 'b' ORDER BY 1") == "1|a\n2|b"
        assert server.psql("SHOW fsync; SHOW listen_addresses") == "off\n127.0.0.1"
        assert server.psql("SELECT current_database()", database="template1") == "template1"


def test_committed_data_survive_stop_and_kill_on_the_same_port(tmp_path: Path) -> None:
    server = PostgresServer(tmp_path, durable=True)
    with server:
        assert server.psql("SHOW fsync; CREATE TABLE t (n int); INSERT INTO t VALUES (1)") == "on"
        url, pid = server.url, server.pid
        assert pid is not None
        server.start()
        assert server.pid == pid
        for n, end in enumerate((server.stop, lambda: server.stop("immediate"), server.kill), start=2):
            with psycopg.connect(url, autocommit=True) as conn:
                conn.execute("INSERT INTO t VALUES (%s)", [n])
                family = [server.pid, *children_of(server.pid or 0)]
                assert len(family) > 4
                end()
            assert not server.running
            assert all(gone(member, 0.5) for member in family if member)
            with pytest.raises(psycopg.OperationalError):
                psycopg.connect(url)
            server.start()
        assert server.url == url
        assert server.psql("SELECT array_agg(n ORDER BY n) FROM t") == "{1,2,3,4}"
    server.stop()
    with PostgresServer(tmp_path) as again:
        assert again.url == url
        assert again.psql("SELECT count(*) FROM t") == "4"


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_the_server_ends_with_the_python_process(tmp_path: Path, end: str) -> None:
    command = [sys.executable, "-W", "error", "-c", START_AND_WAIT, str(tmp_path)]
    with subprocess.Popen([*command, "wait" if end == "kill" else "go"], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        if end == "kill":
            os.kill(owner.pid, signal.SIGKILL)
    assert gone(pid)


def test_settings_are_read_at_each_start_and_long_paths_get_a_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    server = PostgresServer(folder, settings={"wal_level": "replica", "search_path": "it's"})
    with server:
        assert server.psql("SHOW wal_level; SHOW search_path") == "replica\nit's"
        with psycopg.connect(server.socket_url) as conn:
            assert conn.execute("SELECT 1").fetchone() == (1,)
        server.stop()
        server.settings |= {"wal_level": "logical"}
        server.start()
        assert server.psql("SHOW wal_level") == "logical"


def test_failures_say_what_happened(tmp_path: Path, shop: PostgresServer) -> None:
    with pytest.raises(UserError, match="no throw-away Postgres 9"):
        PostgresServer(tmp_path, 9)
    server = PostgresServer(tmp_path, settings={"no_such_setting": "1"})
    with pytest.raises(HeadraceError, match="no_such_setting"):
        server.start()
    assert not server.running
    with pytest.raises(HeadraceError, match='relation "nowhere" does not exist'):
        shop.psql("SELECT * FROM nowhere")


def test_the_history_holds_what_it_promises(shop: PostgresServer) -> None:
    assert int(shop.psql("SELECT count(*) FROM order_items")) == 2_500
    assert (
        shop.psql("SELECT count(*) FROM order_items i LEFT JOIN products p USING (sku) WHERE p.sku IS NULL")
        == "0"
    )
    # Stored at more than 8 kB, so out of line: a page holds no more.
    assert int(shop.psql("SELECT min(pg_column_size(description)) FROM products")) > 8_192
    with psycopg.connect(shop.url) as conn:
        junk = conn.execute("SELECT count(*) FROM orders WHERE discount = ANY(%s)", [list(JUNK)]).fetchone()
        assert junk == (5,)
        keys = conn.execute(
            "SELECT c.relname, array_agg(a.attname::text ORDER BY a.attnum), c.relreplident FROM pg_index i"
            " JOIN pg_class c ON c.oid = i.indrelid JOIN pg_attribute a ON a.attrelid = c.oid"
            " AND a.attnum = ANY (i.indkey) WHERE i.indisprimary AND c.relnamespace = 'public'::regnamespace"
            " GROUP BY 1, 3"
        ).fetchall()
    assert {name: tuple(columns) for name, columns, _ in keys} == TABLES
    assert {identity for _, _, identity in keys} == {"d"}


@pytest.mark.parametrize("small", [False, True])
def test_the_bank_sum_holds_under_the_workload(shop: PostgresServer, small: bool) -> None:
    with psycopg.connect(shop.url, autocommit=True) as conn:
        workload = Workload(shop.url, seed=7, transactions_per_second=None, small=small, sample_every=5)
        began = time.time()
        workload.start()
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            total = conn.execute("SELECT sum(balance) FROM accounts").fetchone()
            assert total == (20 * OPENING_BALANCE,)
            time.sleep(0.05)
        summary = workload.stop()
        ended = time.time()
        changed = conn.execute(
            "SELECT count(*) FROM accounts WHERE balance <> %s", [OPENING_BALANCE]
        ).fetchone()
    assert changed is not None
    assert changed[0] > 10
    assert summary.committed == workload.committed > 200
    assert summary.rows > summary.committed
    assert small or summary.rolled_back > 0
    assert (summary.uncertain, summary.reconnects) == (0, 0)
    ids = [sample.order_id for sample in workload.commits]
    assert len(ids) > 10
    assert ids == sorted(set(ids))
    assert all(began <= sample.committed_at <= ended for sample in workload.commits)


def test_one_seed_makes_the_same_changes_twice(tmp_path: Path) -> None:
    with PostgresServer(tmp_path) as server:
        samples: list[list[int]] = []
        buyers: list[dict[int, int]] = []
        for database in ("one", "two"):
            server.psql(f"CREATE DATABASE {database}")
            url = server.url.removesuffix("postgres") + database
            with psycopg.connect(url) as conn:
                create_schema(conn)
                fill(conn, customers=20, products=5, orders=100, accounts=4)
            with Workload(url, seed=1, transactions_per_second=None) as workload:
                while workload.committed < 300:
                    time.sleep(0.01)
            samples.append([sample.order_id for sample in workload.commits])
            with psycopg.connect(url) as conn:
                buyers.append(
                    dict(conn.execute("SELECT id, customer_id FROM orders WHERE id BETWEEN 101 AND 180"))
                )
    assert samples[0][:5] == samples[1][:5]
    in_both = buyers[0].keys() & buyers[1].keys()
    assert len(in_both) > 40
    assert all(buyers[0][order] == buyers[1][order] for order in in_both)


def test_the_workload_comes_back_with_the_server(tmp_path: Path) -> None:
    with PostgresServer(tmp_path) as server:
        with psycopg.connect(server.url) as conn:
            create_schema(conn)
            fill(conn, customers=20, products=5, orders=200, accounts=4)
        workload = Workload(server.url, transactions_per_second=200)
        workload.start()
        time.sleep(0.5)
        server.kill()
        before = workload.committed
        time.sleep(0.3)
        server.start()
        deadline = time.monotonic() + 10
        while workload.committed < before + 20 and time.monotonic() < deadline:
            time.sleep(0.05)
        summary = workload.stop()
        assert summary.committed >= before + 20
        assert summary.reconnects > 0
        assert Decimal(server.psql("SELECT sum(balance) FROM accounts")) == 4 * OPENING_BALANCE


def test_a_workload_that_cannot_work_says_why(shop: PostgresServer) -> None:
    workload = Workload(shop.url.removesuffix("postgres") + "template1")
    workload.start()
    with pytest.raises(psycopg.errors.UndefinedTable):
        workload.stop()


def test_a_connection_lost_in_a_rollback_is_a_reconnect_and_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PostgresServer(tmp_path) as server:
        with psycopg.connect(server.url) as conn:
            create_schema(conn)
            fill(conn, customers=20, products=5, orders=50, accounts=4)
        lost = []

        def roll_back(shopper: Shopper) -> None:
            lost.append(shopper)
            shopper.conn.close()
            raise psycopg.Rollback

        monkeypatch.setattr(Shopper, "roll_back", roll_back)
        workload = Workload(server.url, transactions_per_second=None)
        workload.start()
        deadline = time.monotonic() + 20
        while not lost and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        assert workload.stop().reconnects >= 1
