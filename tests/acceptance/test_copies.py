"""Copies beside the stream, on real servers: nothing is lost, doubled or older than it should be, whatever
happens in the middle."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from headrace.change import START, TableId
from headrace.config import Project, load_project
from headrace.errors import SourceGap
from headrace.pipeline import Pipeline
from headrace.server import read
from headrace.sources.postgres.catalog import read_shapes
from headrace.sources.postgres.chunks import condition, cut, ranges
from headrace.sources.postgres.copy import was_rewritten
from headrace.sources.postgres.reader import Reader
from headrace.sources.postgres.snapshots import Snapshots
from headrace.sources.postgres.tables import read_states
from headrace.testing.postgres import PostgresServer
from headrace.verify import verify

WIDE = "(SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 100) WHERE {} > 0)"

ON_18 = pytest.mark.parametrize("server", [18], indirect=True)


@pytest.fixture(scope="module", params=[16, 18])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("copies") / "pg", request.param) as running:
        yield running


@pytest.fixture
def db(server: PostgresServer) -> Iterator[psycopg.Connection]:
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
        yield connection
        connection.execute("DROP PUBLICATION IF EXISTS headrace_shop")
        connection.execute(
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active_pid IS NOT NULL"
        )
        for _ in range(50):
            if not connection.execute("SELECT 1 FROM pg_replication_slots WHERE active").fetchall():
                break
            time.sleep(0.1)
        connection.execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")


def project_of(server: PostgresServer, folder: Path, *lines: str) -> Project:
    text = "\n".join([f'[source.shop]\nurl = "{server.url}"', *lines])
    (folder / "headrace.toml").write_text(text + "\n")
    return load_project(folder)


class Running:
    """A pipeline in a thread."""

    def __init__(self, project: Project) -> None:
        self.pipeline = Pipeline(project)
        self.lane = self.pipeline.lanes[0]
        self._thread = threading.Thread(target=self._run)
        self.error: BaseException | None = None

    def _run(self) -> None:
        try:
            self.pipeline.run()
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Running:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.pipeline.stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def stages(self) -> dict[str, str]:
        return {table.name: state.stage for table, state in read_states(self.lane.log).items()}

    def until(self, what: Callable[[], object], seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, (self.stages(), self.pipeline.status(), self.error)
            time.sleep(0.05)

    def live(self, *tables: str) -> None:
        self.until(lambda: all(self.stages().get(table) == "live" for table in tables))

    def settled(self) -> None:
        """Wait until the destination has all that is committed at the source now."""
        head = self.lane.source.head()
        self.until(lambda: (self.lane.log.position() or START).commit >= head and self.lane.idle())


def proved(project: Project) -> None:
    report = verify(project)
    assert report.verified, [finding for finding in report.findings if not finding.ok]


def chunks(lane: object) -> list[tuple[str, int]]:
    return [
        (table.name, mark.chunk) for _, table, _, _, mark in lane.log.copy_marks() if mark.kind == "chunk"
    ]  # type: ignore[attr-defined]


def fill(db: psycopg.Connection, table: str, rows: int) -> None:
    db.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, n int, big text)")
    db.execute(f"INSERT INTO {table} SELECT g, 0, {WIDE.format('g')} FROM generate_series(1, {rows}) g")


def test_writers_do_not_disturb_a_copy_nor_it_them(
    server: PostgresServer, db: psycopg.Connection, tmp_path: Path
) -> None:
    """Small chunks, a slow copy and short-lived snapshots: changes of every kind fall before, between and
    behind the chunks, large values unchanged among them."""
    fill(db, "orders", 3000)
    db.execute("CREATE TABLE pairs (a int, b text, v int, PRIMARY KEY (b, a))")
    db.execute("INSERT INTO pairs SELECT g, E'k''\\\\' || g % 7, 0 FROM generate_series(1, 4000) g")
    project = project_of(
        server, tmp_path, 'chunk_bytes = "256KiB"', 'copy_rate = "3MiB"', 'max_snapshot_age = "1s"'
    )
    chance = random.Random(5)
    with Running(project) as running:
        running.until(lambda: len(chunks(running.lane)) > 2)
        while running.stages()["orders"] != "live":
            key = chance.randint(1, 3000)
            db.execute(f"UPDATE orders SET n = n + 1 WHERE id BETWEEN {key} AND {key + 20}")
            db.execute(f"DELETE FROM orders WHERE id = {chance.randint(1, 3000)}")
            db.execute(f"UPDATE orders SET id = id + 100000 WHERE id = {chance.randint(1, 3000)}")
            db.execute(f"UPDATE orders SET id = id - 100000 WHERE id = {100000 + chance.randint(1, 3000)}")
            db.execute(f"UPDATE pairs SET v = v + 1, a = a + 5000 WHERE a = {chance.randint(1, 4000)}")
        running.live("pairs")
        held = {at.commit for _, _, at, _, mark in running.lane.log.copy_marks() if mark.kind == "chunk"}
        assert len(held) > 1, "the copy took several snapshots"
        done = chunks(running.lane)
        assert len(done) == len(set(done)), "a chunk was copied twice"
        kinds = [item.entry.kind for item in running.lane.log.headers(0, running.lane.log.end().offset)]
        last = len(kinds) - kinds[::-1].index("copy")
        assert "rows" in kinds[:last], "the stream came in only after the copy"
        db.execute("UPDATE orders SET n = n + 1 WHERE id % 10 = 0")
        running.settled()
    proved(project)
    assert read(project, ["SELECT count(*) AS n FROM headrace.quarantine"])[0]["n"].to_pylist() == [0]


@ON_18
@pytest.mark.parametrize("statement", ["TRUNCATE orders", "ALTER TABLE orders ALTER n TYPE bigint"])
def test_a_table_emptied_or_rewritten_in_the_middle_begins_again(
    server: PostgresServer, db: psycopg.Connection, tmp_path: Path, statement: str
) -> None:
    fill(db, "orders", 2000)
    project = project_of(server, tmp_path, 'chunk_bytes = "256KiB"', 'copy_rate = "3MiB"')
    with Running(project) as running:
        running.until(lambda: len(chunks(running.lane)) > 2)
        db.execute(statement)
        db.execute("INSERT INTO orders VALUES (99999, 7, 'new')")
        running.live("orders")
        begins = [mark for _, _, _, _, mark in running.lane.log.copy_marks() if mark.kind == "begin"]
        assert len(begins) > 1
        running.settled()
    proved(project)


@pytest.mark.parametrize("statement", ["ALTER TABLE %s ALTER v TYPE int USING v::int", "TRUNCATE %s"])
def test_a_snapshot_shows_a_rewritten_table_empty_and_the_file_tells(
    server: PostgresServer, db: psycopg.Connection, statement: str
) -> None:
    """The fact that the rule is for, and the rule; for a table and for a partitioned one."""
    db.execute("CREATE TABLE plain (id int PRIMARY KEY, v text)")
    db.execute("CREATE TABLE parted (id int PRIMARY KEY, v text) PARTITION BY HASH (id)")
    db.execute("CREATE TABLE parted_0 PARTITION OF parted FOR VALUES WITH (MODULUS 1, REMAINDER 0)")
    db.execute("INSERT INTO plain VALUES (1, '1'); INSERT INTO parted VALUES (1, '1')")
    snapshots = Snapshots(server.url, 60)
    name = snapshots.current(0).name
    for table in ("plain", "parted"):
        for rewritten in (False, True):
            if rewritten:
                db.execute(statement % table)
            with closing(Reader(server.url)) as reader, reader.under(name) as reading:
                assert len(list(reader.rows(f"SELECT id FROM public.{table}", ["id"]))) == (not rewritten)
                assert was_rewritten(reading, TableId("public", table)) is rewritten
    snapshots.release()


@ON_18
def test_what_is_copied_is_not_copied_again_after_a_kill(
    server: PostgresServer, db: psycopg.Connection, tmp_path: Path
) -> None:
    fill(db, "orders", 3000)
    db.execute("CREATE TABLE nothing (id int PRIMARY KEY)")
    project = project_of(server, tmp_path, 'chunk_bytes = "256KiB"', 'copy_rate = "2MiB"')
    for _ in range(2):
        child = subprocess.Popen([sys.executable, "-m", "headrace", "run", "--project", str(tmp_path)])
        try:
            before = len(_finished(tmp_path))
            deadline = time.monotonic() + 60
            while len(_finished(tmp_path)) < before + 3:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            child.kill()
            child.wait()
        db.execute("UPDATE orders SET n = n + 1 WHERE id % 3 = 0")
        db.execute("DELETE FROM orders WHERE id % 50 = 7")
    with Running(project) as running:
        running.live("orders", "nothing")
        running.settled()
        done = chunks(running.lane)
        assert len(done) == len(set(done)), "a chunk was copied twice"
        assert len([name for name, _ in done if name == "orders"]) > 6
    proved(project)


def _finished(folder: Path) -> list[str]:
    listed = subprocess.run(
        [sys.executable, "-m", "headrace", "tables", "list", "--json", "--project", str(folder)],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    tables = [json.loads(line) for line in listed.stdout.splitlines() if line.startswith("{")]
    return [row["table"] for row in tables for _ in range(row["done"])]


@ON_18
def test_one_bad_table_stops_nothing_else_and_is_taken_up_again(
    server: PostgresServer, db: psycopg.Connection, tmp_path: Path
) -> None:
    fill(db, "good", 50)
    fill(db, "bad", 50)
    db.execute("DROP ROLE IF EXISTS reader")
    db.execute("CREATE ROLE reader LOGIN REPLICATION")
    db.execute("GRANT USAGE ON SCHEMA public TO reader; GRANT SELECT ON good TO reader")
    db.execute(
        "CREATE PUBLICATION headrace_shop FOR TABLE good, bad WITH (publish_via_partition_root = true)"
    )
    url = server.url.replace("postgres@", "reader@")
    (tmp_path / "headrace.toml").write_text(f'[source.shop]\nurl = "{url}"\n')
    project = load_project(tmp_path)
    with Running(project) as running:
        running.live("good")
        running.until(lambda: running.stages()["bad"] == "failed")
        assert "permission denied" in read_states(running.lane.log)[TableId("public", "bad")].reason
        running.settled()
        db.execute("UPDATE good SET n = 5 WHERE id = 1")
        db.execute("UPDATE bad SET n = 5 WHERE id = 1")
        running.until(
            lambda: read(project, ["SELECT n FROM shop.good WHERE id = 1"])[0]["n"].to_pylist() == [5]
        )
        db.execute("GRANT SELECT ON bad TO reader")
        run("tables", "resync", "bad", folder=tmp_path)
        running.live("bad")
        running.settled()
    proved(project)
    db.execute("DROP OWNED BY reader; DROP ROLE reader")


def run(*arguments: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "headrace", *arguments, "--project", str(folder)],
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_tables_come_and_go_while_the_pipeline_runs(
    server: PostgresServer, db: psycopg.Connection, tmp_path: Path
) -> None:
    fill(db, "orders", 100)
    project = project_of(server, tmp_path, 'tables = ["public.orders"]')
    with Running(project) as running:
        running.live("orders")
        fill(db, "late", 500)
        db.execute("UPDATE late SET n = 1 WHERE id = 1")
        assert '"public.late"' in run("tables", "add", "late", folder=tmp_path)
        for i in range(20):
            db.execute(f"UPDATE late SET n = n + 1 WHERE id BETWEEN {i * 10} AND {i * 20}")
        running.live("late")
        running.settled()
        proved(project)
        run("tables", "pause", "public.orders", folder=tmp_path)
        time.sleep(0.5)  # a slice may be in hand
        db.execute("UPDATE orders SET n = 77")
        db.execute("UPDATE late SET n = 77")
        count = "SELECT count(*) AS n FROM shop.{} WHERE n = 77"
        running.until(lambda: read(project, [count.format("late")])[0]["n"][0].as_py() == 500)
        assert read(project, [count.format("orders")])[0]["n"][0].as_py() == 0
        run("tables", "resume", "orders", folder=tmp_path)
        running.until(lambda: read(project, [count.format("orders")])[0]["n"][0].as_py() == 100)
        run("tables", "remove", "late", folder=tmp_path)
        running.until(lambda: running.stages()["late"] == "removed")
        published = "SELECT tablename FROM pg_publication_tables WHERE pubname = 'headrace_shop'"
        running.until(lambda: db.execute(published).fetchall() == [("orders",)])
        retired = "SELECT state FROM headrace.models WHERE model = 'shop.late'"
        running.until(lambda: read(project, [retired])[0]["state"].to_pylist() == ["retired"])
    assert "live" in run("tables", "list", folder=tmp_path)


@ON_18
def test_a_live_table_is_copied_again_while_it_is_written_and_read(
    server: PostgresServer, db: psycopg.Connection, tmp_path: Path
) -> None:
    """The live table goes on meanwhile: what is written beside the copy shows before it has ended."""
    fill(db, "orders", 3000)
    project = project_of(server, tmp_path, 'chunk_bytes = "256KiB"', 'copy_rate = "512KiB"')
    chance = random.Random(7)
    with Running(project) as running:
        running.live("orders")
        run("tables", "resync", "orders", folder=tmp_path)
        running.until(lambda: running.stages()["orders"] == "copying")
        db.execute("UPDATE orders SET n = 77 WHERE id = 1")
        shown = ["SELECT n FROM shop.orders WHERE id = 1"]
        running.until(lambda: read(project, shown)[0]["n"].to_pylist() == [77])
        assert running.stages()["orders"] == "copying"
        while running.stages()["orders"] != "live":
            key = chance.randint(2, 3000)
            db.execute(f"UPDATE orders SET n = n + 1 WHERE id BETWEEN {key} AND {key + 20}")
            db.execute(f"DELETE FROM orders WHERE id = {chance.randint(2, 3000)}")
            db.execute(f"UPDATE orders SET id = id + 100000 WHERE id = {chance.randint(2, 3000)}")
        running.settled()
    proved(project)


def test_skewed_and_composite_keys_are_cut_into_ranges_of_about_one_size(
    server: PostgresServer, db: psycopg.Connection
) -> None:
    """Nearly all rows share the first column; text sorts by the table's own collation."""
    db.execute("CREATE TABLE skewed (a int, b text, pad text, PRIMARY KEY (a, b))")
    db.execute(
        "INSERT INTO skewed SELECT CASE WHEN g % 50 = 0 THEN g ELSE 7 END, E'k''\\\\' || g, repeat('x', 200) "
        "FROM generate_series(1, 20000) g"
    )
    schema = read_shapes(db, [TableId("public", "skewed")])[TableId("public", "skewed")]
    parts = ranges(cut(db, schema, 512 << 10))
    assert len(parts) > 8
    counts = [
        db.execute(f"SELECT count(*) FROM skewed WHERE {condition(schema, part)}".encode()).fetchall()[0][0]
        for part in parts
    ]
    assert sum(counts) == 20_000, "no row is in two ranges, or in none"
    assert max(counts) < 4 * 20_000 / len(parts)


@ON_18
def test_a_gap_is_repaired_deletes_included_and_only_differences_are_written(
    server: PostgresServer, db: psycopg.Connection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(db, "orders", 5000)
    project = project_of(server, tmp_path, 'chunk_bytes = "2MiB"')
    Pipeline(project).run_once()
    db.execute("SELECT pg_drop_replication_slot('headrace_shop')")
    db.execute("DELETE FROM orders WHERE id <= 30")
    db.execute("UPDATE orders SET n = -1 WHERE id BETWEEN 31 AND 60")
    db.execute("INSERT INTO orders VALUES (100000, 1, 'new')")
    with pytest.raises(SourceGap):
        Pipeline(project).run_once()
    run("resync", folder=tmp_path)
    with caplog.at_level("INFO"):
        Pipeline(project).run_once()
    assert ": 1 added, 30 removed, 30 changed" in caplog.text
    db.execute("UPDATE orders SET n = 8 WHERE id = 40")
    Pipeline(project).run_once()
    proved(project)


@ON_18
def test_a_copy_that_was_cut_off_begins_again_where_the_table_was_rewritten_meanwhile(
    server: PostgresServer, db: psycopg.Connection, tmp_path: Path
) -> None:
    fill(db, "orders", 2000)
    project = project_of(server, tmp_path, 'chunk_bytes = "256KiB"', 'copy_rate = "3MiB"')
    with Running(project) as running:
        running.until(lambda: len(chunks(running.lane)) > 2)
    db.execute("ALTER TABLE orders ALTER n TYPE int USING n + 1000")  # no change follows that would tell
    with Running(project) as running:
        running.live("orders")
        running.settled()
    proved(project)


@ON_18
def test_ddl_does_not_queue_behind_a_copy_that_keeps_to_its_budget(
    server: PostgresServer, db: psycopg.Connection, tmp_path: Path
) -> None:
    """A chunk that would take half a minute at this rate is read at once, and paid for afterwards."""
    fill(db, "orders", 3000)
    project = project_of(server, tmp_path, 'chunk_bytes = "4MiB"', 'copy_rate = "512KiB"')
    with Running(project) as running:
        running.until(lambda: chunks(running.lane))
        db.execute("SET lock_timeout = '5s'")
        db.execute("ALTER TABLE orders ADD COLUMN more int")
        db.execute("RESET lock_timeout")
        assert running.stages()["orders"] == "copying"
