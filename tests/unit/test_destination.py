"""DuckDB as a destination: what is its own; the contract is in tests/contracts."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import duckdb
import pytest

from headrace.destinations.duckdb import DuckDBDestination
from headrace.errors import DestinationBusy, DestinationError, DestinationUnavailable, UserError, Verdict
from headrace.testing.destinations import MODEL, row, slice_of, table


@pytest.fixture
def destination(tmp_path: Path) -> DuckDBDestination:
    return DuckDBDestination(tmp_path / "w.duckdb")


HOLD = """
import sys, duckdb
db = duckdb.connect(sys.argv[1])
print("held", flush=True)
sys.stdin.readline()
"""


def test_a_file_that_another_process_holds_is_busy_and_names_it(destination: DuckDBDestination) -> None:
    destination.apply(slice_of(0, (MODEL, [row(1)])))
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(destination.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(DestinationBusy, match=rf"PID {holder.pid}\b") as caught:
            destination.apply(slice_of(1, (MODEL, [row(2)])))
        assert caught.value.verdict is Verdict.RETRY
    finally:
        holder.communicate(b"\n", timeout=30)
    destination.apply(slice_of(1, (MODEL, [row(2)])))
    assert table(destination) == [(1, "a"), (2, "a")]


def test_a_file_that_this_process_reads_elsewhere_is_busy_for_a_while(
    destination: DuckDBDestination,
) -> None:
    destination.apply(slice_of(0, (MODEL, [row(1)])))
    with destination.connected(read_only=True), pytest.raises(DestinationBusy, match="in this process"):
        destination.apply(slice_of(1, (MODEL, [row(2)])))
    destination.apply(slice_of(1, (MODEL, [row(2)])))
    assert table(destination) == [(1, "a"), (2, "a")]


@pytest.mark.parametrize(
    "query",
    [
        "UPDATE shop.t SET v = 'x'",
        "ATTACH ':memory:' AS m",
        "SET memory_limit = '1GB'",
        "WITH x AS (SELECT 1) DELETE FROM shop.t",
        "EXPLAIN ANALYZE DELETE FROM shop.t",
    ],
)
def test_only_queries_are_answered(destination: DuckDBDestination, query: str) -> None:
    destination.apply(slice_of(0, (MODEL, [row(1)])))
    with pytest.raises(UserError):
        destination.read([query])
    assert table(destination) == [(1, "a")]


def test_a_query_for_which_there_is_no_memory_now_is_to_be_asked_again(
    destination: DuckDBDestination, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination.apply(slice_of(0, (MODEL, [row(1)])))
    monkeypatch.setattr("headrace.destinations.duckdb.QUERY_MEMORY", 1 << 20)
    query = "SELECT count(DISTINCT md5(n::VARCHAR)) FROM range(3_000_000) t(n)"
    with destination.connected() as db:
        db.execute("SET max_temp_directory_size = '0KB'")
        with pytest.raises(DestinationUnavailable) as caught:
            destination.read([query])
    assert caught.value.verdict is Verdict.RETRY
    with pytest.raises(UserError):
        destination.read(["SELECT 'a'::INTEGER"])


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "w.duckdb").write_bytes(b"no database " * 1000)
    with pytest.raises(DestinationError, match=r"w\.duckdb is no DuckDB file"):
        DuckDBDestination(tmp_path / "w.duckdb").progress("shop")


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DestinationError, match="cannot be opened"):
        DuckDBDestination(tmp_path / "absent" / "w.duckdb").apply(slice_of(0, (MODEL, [row(1)])))


def test_a_query_beside_an_apply_that_has_spilled_disturbs_neither(tmp_path: Path) -> None:
    """Both are connections to one engine, whose folder for what does not fit cannot be moved once used."""
    destination = DuckDBDestination(tmp_path / "w.duckdb", spill=tmp_path / "spill")
    with destination.connected() as applying:
        applying.execute(
            "CREATE TABLE t AS SELECT i, md5(i::VARCHAR) AS k FROM range(2000000) r(i) ORDER BY k"
        )
        assert any((tmp_path / "spill").iterdir()), "it has spilled"
        assert destination.read(["SELECT 1 AS one"])[0].to_pylist() == [{"one": 1}]
        with destination.connected() as other:
            assert other.execute("SELECT count(*) FROM t").fetchall() == [(2_000_000,)]


def test_what_was_promised_memory_has_it_while_others_come_and_go(tmp_path: Path) -> None:
    """The engine has one limit for all connections of a file."""
    destination = DuckDBDestination(tmp_path / "w.duckdb", spill=tmp_path / "spill")
    done = threading.Event()

    def others() -> None:
        while not done.is_set():
            destination.progress("shop")

    thread = threading.Thread(target=others)
    thread.start()
    try:
        with destination.connected(memory=1 << 30) as db:
            one_large_value = "SELECT length(string_agg(md5(range::VARCHAR), '')) FROM range(4000000)"
            assert db.execute(one_large_value).fetchall() == [(128_000_000,)]
    finally:
        done.set()
        thread.join()


def test_changes_all_over_a_large_table_have_the_memory_that_they_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a transaction holds for its deletes cannot be spilled: here it is more than an apply has else."""
    monkeypatch.setattr("headrace.destinations.duckdb.MEMORY", 24 << 20)
    destination = DuckDBDestination(tmp_path / "w.duckdb", spill=tmp_path / "spill")
    destination.apply(slice_of(0, (MODEL, [row(1)])))
    many = 4_000_000
    with destination.connected(memory=1 << 30) as db:
        db.execute(
            "INSERT INTO shop.t BY NAME SELECT i AS id, 'a' AS v, 'shop' AS _source, "
            f"i::VARCHAR AS _source_key FROM range(2, {many + 1}) r(i)"
        )
    keys = range(2, many, 2048)
    destination.apply(slice_of(1, (MODEL, [row(key, "b") for key in keys]), size=len(keys)))
    counts = "SELECT count(*), count(*) FILTER (WHERE v = 'b') FROM shop.t"
    assert table(destination, counts) == [(many, len(keys))]


def test_a_small_slice_leaves_its_checkpoint_to_later(destination: DuckDBDestination) -> None:
    log = destination.path.with_name(f"{destination.path.name}.wal")
    destination.apply(slice_of(0, (MODEL, [row(1)])))
    assert log.stat().st_size
    with duckdb.connect(str(destination.path), read_only=True) as elsewhere:
        assert elsewhere.execute("SELECT id, v FROM shop.t").fetchall() == [(1, "a")]
    reader = DuckDBDestination(destination.path)
    reader.read(["SELECT 1"], read_only=True)
    reader.close()
    assert log.exists()
    destination.close()
    assert not log.exists()
    assert table(destination) == [(1, "a")]


def test_a_checkpoint_that_fails_at_the_end_keeps_nothing_from_being_closed(
    destination: DuckDBDestination, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination.apply(slice_of(0, (MODEL, [row(1)])))

    def full() -> None:
        raise duckdb.IOException("No space left on device")

    monkeypatch.setattr(destination, "checkpoint", full)
    destination.close()
    assert table(destination) == [(1, "a")]


DIE = """
import os, sys, duckdb
db = duckdb.connect(sys.argv[1])
db.execute("DELETE FROM big WHERE i % 2000 = 0")
os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_has_left_to_replay_may_be_more_than_an_apply_may_hold(
    destination: DuckDBDestination,
) -> None:
    destination.apply(slice_of(0, (MODEL, [row(1)])))
    with destination.connected() as db:
        db.execute("CREATE TABLE big AS SELECT i FROM range(10_000_000) r(i)")
        db.execute("CHECKPOINT")
    subprocess.run([sys.executable, "-c", DIE, str(destination.path)], check=False, timeout=60)
    destination.apply(slice_of(1, (MODEL, [row(2)])))
    assert table(destination) == [(1, "a"), (2, "a")]
    (found,) = destination.read(["SELECT count(*) AS n FROM big"])
    assert found["n"].to_pylist() == [9_995_000]


def test_a_file_of_another_version_is_refused_with_what_differs(destination: DuckDBDestination) -> None:
    destination.apply(slice_of(0, (MODEL, [row(1)])))
    with duckdb.connect(str(destination.path)) as db:
        db.execute("ALTER TABLE headrace.quarantine DROP COLUMN blocked")
    words = "filled by another version of Headrace: headrace.quarantine lacks blocked"
    for opened in (lambda d: d.progress("shop"), lambda d: d.apply(slice_of(1, (MODEL, [row(2)])))):
        with pytest.raises(DestinationError, match=words) as caught:
            opened(DuckDBDestination(destination.path))
        assert "name a new file" in caught.value.remedy
