"""Every kind of change that a source's tables can take, on one running pipeline: the destination has what the
source has, also of rows that no later change touches, and nothing was started again for it."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from headrace.change import TableId
from headrace.cli.staging import history as staging_history
from headrace.config import load_project
from headrace.pipeline import Pipeline
from headrace.sources.postgres import follow
from headrace.sources.postgres.tables import read_states
from headrace.staging.timeline import timeline
from headrace.testing.postgres import INSTALLS, PostgresServer
from pipelines import running


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for a condition; asks seldom, since each look at the destination takes it from the pipeline."""
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.3)


@dataclass(frozen=True)
class Case:
    """`ddl` alters table {t}; `said` are the kinds that the timeline has of it, `model` the columns of a row
    model, `again` how often its rows are copied again (None: whatever the servers' luck)."""

    ddl: str
    said: tuple[str, ...] = ()
    again: bool = False
    model: str = "v, w"
    touch: str = "UPDATE {t} SET w = 'new' WHERE id = 3; DELETE FROM {t} WHERE id = 4"
    schema: str = "public"


ADD = "ALTER TABLE {t} ADD COLUMN n "
CASES = {
    "plain": Case(ADD + "date", ("column_added",)),
    "constant": Case(ADD + "integer NOT NULL DEFAULT 7", ("column_added",), True),
    "volatile": Case(ADD + "text DEFAULT md5(random()::text)", ("column_added",), True),
    "dropped": Case("ALTER TABLE {t} DROP COLUMN v", ("column_dropped",), model="w"),
    "renamed": Case("ALTER TABLE {t} RENAME v TO value", ("column_renamed",), True, "w"),
    "widened": Case("ALTER TABLE {t} ALTER v TYPE bigint", ("type_widened",)),
    "narrowed": Case("ALTER TABLE {t} ALTER v TYPE smallint", ("type_changed",), True),
    "retyped": Case("ALTER TABLE {t} ALTER v TYPE text USING 'no. ' || v", ("type_changed",), True),
    "measured": Case(
        "ALTER TABLE {t} ALTER w TYPE integer USING length(w)", ("type_changed",), True,
        touch="UPDATE {t} SET w = 33 WHERE id = 3; DELETE FROM {t} WHERE id = 4",
    ),
    "doubled": Case("ALTER TABLE {t} ALTER v TYPE integer USING v * 2", (), True),
    "readded": Case("ALTER TABLE {t} DROP COLUMN w; ALTER TABLE {t} ADD COLUMN w text", (), True),
    "middle": Case("ALTER TABLE {t} DROP COLUMN v; ALTER TABLE {t} ADD COLUMN v integer", (), True),
    "enumerated": Case(
        "ALTER TYPE mood ADD VALUE IF NOT EXISTS 'glad'", model="v, w, m",
        touch="UPDATE {t} SET m = 'glad' WHERE id = 3; DELETE FROM {t} WHERE id = 4",
    ),
    "rekeyed": Case(
        "ALTER TABLE {t} DROP CONSTRAINT {t}_pkey, ADD PRIMARY KEY (v)", ("key_changed",), True,
        touch="UPDATE {t} SET id = id + 100 WHERE v = 30; DELETE FROM {t} WHERE v = 40",
    ),
    "moved": Case("ALTER TABLE {t} SET SCHEMA other", schema="other"),
}  # fmt: skip
ROWS = 300


class World:
    """A source with two tables for each case, one mirrored and one with a row model, and its pipeline."""

    def __init__(self, server: PostgresServer, root: Path) -> None:
        self.server, self.root = server, root
        self.db = psycopg.connect(server.url, autocommit=True)
        self.alerts: list[str] = []
        server.psql("CREATE SCHEMA other; CREATE TYPE mood AS ENUM ('sad', 'calm')")
        (root / "models").mkdir()
        for name, case in CASES.items():
            more, cell = (", m mood DEFAULT 'sad'", "") if name == "enumerated" else ("", "")
            for table in (name, f"{name}_m"):
                server.psql(
                    f"CREATE TABLE {table} (id integer PRIMARY KEY, v integer, w text{more}); INSERT INTO "
                    f"{table} SELECT n, n * 10, repeat('w', n % 5){cell} FROM generate_series(1, {ROWS}) n"
                )
            model = f"SELECT id::INTEGER AS id, {case.model} FROM raw.pg.{name}_m"
            (root / "models" / f"model_{name}.sql").write_text(model)
        server.psql("CREATE TABLE gone (id integer PRIMARY KEY); INSERT INTO gone VALUES (1)")
        (root / "headrace.toml").write_text(
            f'[source.pg]\nurl = "{server.url}"\ntables = ["public.*", "other.*"]\nheartbeat = "500ms"\n'
            '[destination]\npath = "warehouse.duckdb"\n'
        )

    def alter(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.lane = pipeline.lanes[0]
        until(lambda: self.stages() == {"live"} and self.lane.idle(), "copied")
        self.copies = self._copies()
        self.reader = self._reader()
        for name, case in CASES.items():
            for table in (name, f"{name}_m"):
                self.server.psql(case.ddl.format(t=table))
        self.server.psql(
            "DROP TABLE gone; CREATE TABLE fresh (id integer PRIMARY KEY, w text); "
            "INSERT INTO fresh VALUES (1, 'a'), (2, 'b')"
        )

    def stages(self) -> set[str]:
        return {state.stage for state in read_states(self.lane.log).values()}

    def _copies(self) -> dict[str, int]:
        marks = [table for _, table, _, _, mark in self.lane.log.copy_marks() if mark.kind == "begin"]
        return {str(table): marks.count(table) for table in marks}

    def copied_again(self, table: str) -> bool:
        return self._copies()[table] > self.copies[table]

    def _reader(self) -> object:
        return self.server.psql("SELECT active_pid FROM pg_replication_slots WHERE slot_name = 'headrace_pg'")

    def never_restarted(self) -> bool:
        status = self.pipeline.status()
        return not status["stopped"] and not status["waiting"] and self._reader() == self.reader

    def source(self, table: str, columns: str = "") -> list[tuple[str | None, ...]]:
        """The source's rows as text, in its columns or those that are named."""
        schema, _, name = table.rpartition(".")
        names = columns.split(", ") if columns else self.columns(schema, name)
        cells = ", ".join(f'"{column}"::text' for column in names)
        return sorted(self.db.execute(f"SELECT {cells} FROM {table}".encode()).fetchall(), key=repr)

    def columns(self, schema: str, name: str) -> list[str]:
        rows = self.db.execute(
            "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT "
            "attisdropped ORDER BY attnum", [f"{schema}.{name}"],
        ).fetchall()  # fmt: skip
        return [str(row[0]) for row in rows]

    def found(self, table: str, columns: list[str]) -> list[tuple[str | None, ...]]:
        cells = ", ".join(f'CAST("{column}" AS VARCHAR) AS "{column}"' for column in columns)
        try:
            (rows,) = self.lane.destination.read([f"SELECT {cells} FROM {table}"])
        except Exception as error:  # a column that is not there yet
            return [(str(error),)]
        return sorted(zip(*(column.to_pylist() for column in rows.columns), strict=True), key=repr)

    def mirror_is_equal(self, case: Case, name: str) -> bool:
        label = name if case.schema == "public" else f'"{case.schema}.{name}"'
        columns = self.columns(case.schema, name)
        return self.found(f"pg.{label}", columns) == self.source(f"{case.schema}.{name}")

    def model_is_equal(self, case: Case, name: str) -> bool:
        columns = f"id, {case.model}"
        found = self.found(f"model_{name}", columns.split(", "))
        return found == self.source(f"{case.schema}.{name}_m", columns)


@pytest.fixture(scope="module", params=sorted(INSTALLS))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    class Taken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            world.alerts.append(record.getMessage())

    with (
        PostgresServer(tmp_path_factory.mktemp("pg"), request.param) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(follow, "WATCH_EVERY", 0.5)
        world = World(server, tmp_path_factory.mktemp("project"))
        handler = Taken()
        logging.getLogger("headrace.alert").addHandler(handler)
        with running(load_project(world.root)) as pipeline:
            world.alter(pipeline)
            yield world
        logging.getLogger("headrace.alert").removeHandler(handler)
        world.db.close()


@pytest.mark.parametrize("name", CASES)
def test_the_destination_has_what_the_source_has(world: World, name: str) -> None:
    case = CASES[name]
    until(lambda: world.mirror_is_equal(case, name), f"mirror, nothing touched: {world.alerts}")
    if case.schema == "public":
        until(lambda: world.model_is_equal(case, name), f"model, nothing touched: {world.alerts}")
    for table in (name, f"{name}_m"):
        world.server.psql(case.touch.format(t=f"{case.schema}.{table}"))
    until(lambda: world.mirror_is_equal(case, name), f"mirror, rows touched: {world.alerts}")
    if case.schema == "public":
        until(lambda: world.model_is_equal(case, name), f"model, rows touched: {world.alerts}")
        assert world.copied_again(f"public.{name}") is case.again
        staging = world.lane.staging
        events = list(timeline(staging, TableId("public", name), staging.through()))
        others = ("shape", "copy", "copied", "reordered", "constraints")
        assert tuple(e.kind for e in events if e.kind not in others) == case.said
    assert world.never_restarted()


def test_a_table_that_comes_is_captured_and_one_that_goes_is_let_go(world: World) -> None:
    until(lambda: world.found("pg.fresh", ["id", "w"]) == [("1", "a"), ("2", "b")], "fresh")
    world.server.psql("INSERT INTO fresh VALUES (3, 'c')")
    until(lambda: len(world.found("pg.fresh", ["id"])) == 3, "fresh goes on")
    until(lambda: read_states(world.lane.log)[TableId("public", "gone")].stage == "removed", "gone")
    assert world.found("pg.gone", ["id"]) == [("1",)], "what was captured stays"
    world.server.psql(
        "CREATE TABLE gone (id date PRIMARY KEY); INSERT INTO gone VALUES ('2024-01-05'), ('2024-01-06')"
    )
    until(lambda: world.found("pg.gone", ["id"]) == [("2024-01-05",), ("2024-01-06",)], "made anew")
    told = [alert.split(":")[0] for alert in world.alerts]
    assert "DROPPED table public.gone" in told
    assert "NEW table public.fresh" in told
    assert world.never_restarted()


def test_a_model_of_a_table_that_has_moved_says_where(world: World) -> None:
    until(lambda: "model_moved" in world.lane.suspended(), "suspended")
    assert world.lane.suspended()["model_moved"] == (
        "raw.pg.moved_m is not captured: it is called other.moved_m now."
    )
    assert any("MOVED table public.moved is called other.moved now" in alert for alert in world.alerts)


def test_a_policy_holds_the_destination_or_the_models_until_a_person_lets_them_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with PostgresServer(tmp_path / "pg") as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(follow, "WATCH_EVERY", 0.3)
        for table in ("kept", "waits", "read"):
            server.psql(f"CREATE TABLE {table} (id integer PRIMARY KEY, v integer, w text)")
            server.psql(f"INSERT INTO {table} SELECT n, n, 'w' FROM generate_series(1, 9) n")
        root = tmp_path / "project"
        (root / "models").mkdir(parents=True)
        (root / "models" / "reader.sql").write_text("SELECT id::INTEGER AS id, v FROM raw.pg.read")
        (root / "headrace.toml").write_text(
            f'[source.pg]\nurl = "{server.url}"\nheartbeat = "500ms"\n'
            "[source.pg.schema_changes]\n"
            'column_added = "freeze"\ncolumn_dropped = "freeze"\ntype_changed = "freeze"\n'
            '"public.waits" = { column_dropped = "suspend" }\n'
            '[destination]\npath = "warehouse.duckdb"\n'
        )
        with running(load_project(root)) as pipeline:
            (lane,) = pipeline.lanes

            def found(query: str) -> list[dict[str, object]]:
                (rows,) = lane.destination.read([query])
                return list(rows.to_pylist())

            until(lambda: len(lane.models()) == 3 and lane.idle(), "copied")
            server.psql("ALTER TABLE kept ADD COLUMN n integer DEFAULT 7, DROP COLUMN w, ALTER v TYPE text")
            server.psql("INSERT INTO kept VALUES (10, 'ten', 8), (11, '11', 8)")
            for table in ("waits", "read"):
                server.psql(f"ALTER TABLE {table} DROP COLUMN v; INSERT INTO {table} VALUES (10, 'x')")
            until(lambda: {"pg.waits", "reader"} <= lane.suspended().keys(), "suspended")
            until(lambda: found("SELECT * FROM pg.kept WHERE id = 11"), "kept goes on")
            until(lane.idle, "idle")
            assert [*found("SELECT * EXCLUDE (_source, _source_key) FROM pg.kept WHERE id = 11")] == [
                {"id": 11, "v": 11, "w": None}
            ]
            records = "SELECT key, columns FROM headrace.quarantine WHERE status = 'quarantined'"
            until(lambda: found(records) == [{"key": "10", "columns": "v"}], "a value that v cannot have")
            raw = lane.staging.read(TableId("public", "kept"), 0, lane.staging.through()).to_pylist()
            assert [row["n"] for row in raw if row["id"] == "10"] == ["8"], "raw has it all"
            assert len(found("SELECT * FROM pg.waits")) == 9, "it stands still"
            reasons = lane.suspended()
            assert reasons["pg.waits"] == (
                "The source altered public.waits: v dropped; schema_changes says suspend."
            )
            assert re.search(
                r'Column "v".*the source has had no column "v" since 0/[0-9A-F]+ \(20',
                reasons["reader"],
            )
            told = [record.getMessage() for record in caplog.records if record.name == "headrace.alert"]
            assert sum(text.startswith("FROZEN public.kept") for text in told) == 3
            assert sum("SUSPENDED model pg.waits" in text for text in told) == 1
            (root / "models" / "reader.sql").write_text("SELECT id::INTEGER AS id, w FROM raw.pg.read")
            lane.source.change_tables(lane.log, [TableId("public", "waits")], "resume")
            until(lambda: not lane.suspended() and lane.idle(), "resumed")
            assert len(found("SELECT * FROM pg.waits")) == 10
            until(lambda: len(found("SELECT * FROM reader")) == 10, "mended")
        staging_history("kept", project=root)
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[-1] for line in lines if "column_" in line] == ["freeze"] * 2
