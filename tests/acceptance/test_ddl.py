"""Changes of a table's shape amid changes of its rows: what the log holds is what the stream said."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest

from headrace.change import Entry, Mark, TableId, TableSchema, shape_in
from headrace.config import Project, load_project
from headrace.payload import HEAD, decode_rows
from headrace.pipeline import Pipeline, open_lanes
from headrace.sources.postgres.catalog import read_shapes
from headrace.sources.postgres.connection import connect
from headrace.sources.postgres.tables import read_states
from headrace.testing.postgres import INSTALLS, PostgresServer
from headrace.verify import verify
from pipelines import stage

TABLES = """plain defaulted volatile identity dropped renamed readded middle widened retyped full_
gone""".split()  # noqa: SIM905


@pytest.fixture(scope="module", params=sorted(INSTALLS))
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("pg"), request.param) as server:
        yield server


@pytest.fixture(scope="module")
def newest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("pg")) as server:
        yield server


@pytest.fixture(scope="module")
def project(server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """One table for each case, with rows 1 and 2 copied."""
    for table in TABLES:
        server.psql(
            f"CREATE TABLE {table} (id integer PRIMARY KEY, v integer, w text); "
            f"INSERT INTO {table} VALUES (1, 10, 'a'), (2, 20, 'b')"
        )
    server.psql("ALTER TABLE full_ REPLICA IDENTITY FULL; ALTER TABLE gone REPLICA IDENTITY FULL")
    root = tmp_path_factory.mktemp("project")
    (root / "headrace.toml").write_text(
        f'[source.pg]\ntype = "postgres"\nurl = "{server.url}"\n'
        '[destination]\ntype = "duckdb"\npath = "warehouse.duckdb"\n'
    )
    project = load_project(root)
    stage(project)
    return project


class Said:
    """What was streamed to one table in a run: rows with their operation, each under its shape's columns."""

    def __init__(self, project: Project, table: str, server: PostgresServer, *statements: str) -> None:
        (lane,) = open_lanes(project, read_only=True)
        after = lane.log.end().offset
        for statement in statements:
            server.psql(statement)
        stage(project)
        (lane,) = open_lanes(project, read_only=True)
        self.rows: list[dict[str, Any]] = []
        self.shapes: list[dict[str, str]] = []
        versions: dict[int, TableSchema] = {}
        every = [item for item in lane.log.read(0, 1 << 30) if item.entry.table == TableId("public", table)]
        for item in every:
            if item.entry.kind in ("schema", "marker"):
                shape = shape_in(item.entry.kind, item.entry.payload)
                if shape is not None:
                    versions.setdefault(shape.version, shape)
                    assert shape == versions[shape.version], "two shapes of one version"
                if shape is not None and item.entry.kind == "schema" and item.offset > after:
                    self.shapes.append({column.name: column.type for column in shape.columns})
            elif item.entry.kind == "rows" and item.offset > after:
                batch = decode_rows(item.entry.payload)
                names = [c.name for c in versions[item.entry.schema_version].columns]
                assert batch.schema.names[len(HEAD) :][: len(names)] == names, "not the schema bound to it"
                for row in batch.to_pylist():
                    self.rows.append({"op": row["_op"], **{name: row[name] for name in names}})
        staged = lane.staging.read(TableId("public", table), after, lane.staging.through()).to_pylist()
        self.raw = [row for row in staged if row["_op"] != "t"]
        assert len(self.raw) == len(self.rows)
        for one, other in zip(self.raw, self.rows, strict=True):
            assert one["_op"] == other["op"]
            assert {name: one[name] for name in other if name != "op"} == {
                name: cell for name, cell in other.items() if name != "op"
            }


@pytest.fixture
def alerts(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """Reasons to copy a table again, as they were alerted."""
    found: list[str] = []

    class Taken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if str(record.msg).startswith("SCHEMA of"):
                assert isinstance(record.args, tuple)
                found.append(str(record.args[1]))

    handler = Taken()
    logging.getLogger("headrace.alert").addHandler(handler)
    yield found
    logging.getLogger("headrace.alert").removeHandler(handler)


def test_an_added_column(server: PostgresServer, project: Project, alerts: list[str]) -> None:
    said = Said(
        project, "plain", server,
        "INSERT INTO plain VALUES (3, 30, 'c')", "ALTER TABLE plain ADD COLUMN n date",
        "INSERT INTO plain VALUES (4, 40, 'd', '2024-01-01')", "UPDATE plain SET w = 'A' WHERE id = 1",
    )  # fmt: skip
    assert said.rows == [
        {"op": "c", "id": "3", "v": "30", "w": "c"},
        {"op": "c", "id": "4", "v": "40", "w": "d", "n": "2024-01-01"},
        {"op": "u", "id": "1", "v": "10", "w": "A", "n": None},
    ]
    assert said.shapes == [{"id": "integer", "v": "integer", "w": "text", "n": "date"}]
    assert said.raw[0]["n"] is None
    assert alerts == []


@pytest.mark.parametrize(
    ("table", "added", "cell"),
    [
        ("defaulted", "integer DEFAULT 7", "7"),
        ("volatile", "text DEFAULT left(random()::text, 2)", "0."),
        ("identity", "bigint GENERATED ALWAYS AS IDENTITY", "1"),
    ],
)
def test_a_column_added_with_a_value(
    server: PostgresServer, project: Project, alerts: list[str], table: str, added: str, cell: str
) -> None:
    said = Said(
        project, table, server,
        f"ALTER TABLE {table} ADD COLUMN n {added}", f"UPDATE {table} SET w = 'A' WHERE id = 1",
    )  # fmt: skip
    assert said.rows == [{"op": "u", "id": "1", "v": "10", "w": "A", "n": cell}]
    assert alerts == ["column n was added with a value for old rows"]


def test_a_dropped_column(server: PostgresServer, project: Project, alerts: list[str]) -> None:
    said = Said(
        project, "dropped", server,
        "ALTER TABLE dropped DROP COLUMN v", "INSERT INTO dropped VALUES (3, 'c')",
        "DELETE FROM dropped WHERE id = 2",
    )  # fmt: skip
    assert said.rows == [{"op": "c", "id": "3", "w": "c"}, {"op": "d", "id": "2", "w": None}]
    assert said.raw[0]["v"] is None
    assert alerts == []


def test_a_renamed_column(server: PostgresServer, project: Project, alerts: list[str]) -> None:
    said = Said(
        project, "renamed", server,
        "UPDATE renamed SET v = 11 WHERE id = 1", "ALTER TABLE renamed RENAME v TO value",
        "UPDATE renamed SET value = 12 WHERE id = 1",
    )  # fmt: skip
    assert said.rows == [
        {"op": "u", "id": "1", "v": "11", "w": "a"},
        {"op": "u", "id": "1", "value": "12", "w": "a"},
    ]
    assert alerts == ["columns v may be called value now"]


def test_one_name_three_columns_in_one_transaction(
    server: PostgresServer, project: Project, alerts: list[str]
) -> None:
    said = Said(
        project, "readded", server,
        "BEGIN; INSERT INTO readded VALUES (3, 30, 'c'); ALTER TABLE readded ADD COLUMN x integer; "
        "INSERT INTO readded VALUES (4, 40, 'd', 1); ALTER TABLE readded DROP COLUMN x; "
        "INSERT INTO readded VALUES (5, 50, 'e'); ALTER TABLE readded ADD COLUMN x text; "
        "INSERT INTO readded VALUES (6, 60, 'f', 'one'); ALTER TABLE readded DROP COLUMN v; "
        "ALTER TABLE readded ADD COLUMN v date; UPDATE readded SET v = '2024-01-01' WHERE id = 6; COMMIT",
    )  # fmt: skip
    assert said.rows == [
        {"op": "c", "id": "3", "v": "30", "w": "c"},
        {"op": "c", "id": "4", "v": "40", "w": "d", "x": "1"},
        {"op": "c", "id": "5", "v": "50", "w": "e"},
        {"op": "c", "id": "6", "v": "60", "w": "f", "x": "one"},
        {"op": "u", "id": "6", "w": "f", "x": "one", "v": "2024-01-01"},
    ]
    assert [shape.get("x") for shape in said.shapes] == ["integer", None, "text", "text"]
    assert alerts == ["column v changed from integer to date"]


def test_shapes_that_were_rolled_back_are_not_there(
    server: PostgresServer, project: Project, alerts: list[str]
) -> None:
    said = Said(
        project, "middle", server,
        "BEGIN; INSERT INTO middle VALUES (3, 30, 'c'); ALTER TABLE middle ADD COLUMN n integer; "
        "UPDATE middle SET n = 1; ROLLBACK",
        "BEGIN; INSERT INTO middle VALUES (4, 40, 'd'); SAVEPOINT s; ALTER TABLE middle DROP COLUMN w; "
        "INSERT INTO middle VALUES (5, 50); ROLLBACK TO s; INSERT INTO middle VALUES (6, 60, 'f'); "
        "ALTER TABLE middle ADD COLUMN m text; UPDATE middle SET m = w WHERE id = 4; TRUNCATE middle; "
        "INSERT INTO middle VALUES (7, 70, 'g', 'h'); COMMIT",
    )  # fmt: skip
    assert said.rows == [
        {"op": "c", "id": "4", "v": "40", "w": "d"},
        {"op": "c", "id": "6", "v": "60", "w": "f"},
        {"op": "u", "id": "4", "v": "40", "w": "d", "m": "d"},
        {"op": "c", "id": "7", "v": "70", "w": "g", "m": "h"},
    ]
    assert said.shapes == [{"id": "integer", "v": "integer", "w": "text", "m": "text"}]
    assert alerts == []


def test_a_wider_type_needs_no_copy(server: PostgresServer, project: Project, alerts: list[str]) -> None:
    said = Said(
        project, "widened", server,
        "ALTER TABLE widened ALTER v TYPE bigint, ALTER id TYPE bigint",
        "UPDATE widened SET v = 1 << 30 WHERE id = 1",
    )  # fmt: skip
    assert said.rows == [{"op": "u", "id": "1", "v": "1073741824", "w": "a"}]
    assert said.shapes == [{"id": "bigint", "v": "bigint", "w": "text"}]
    assert alerts == []


def test_a_converted_type(server: PostgresServer, project: Project, alerts: list[str]) -> None:
    said = Said(
        project, "retyped", server,
        "UPDATE retyped SET v = 11 WHERE id = 1",
        "ALTER TABLE retyped ALTER v TYPE text USING 'no. ' || v",
        "UPDATE retyped SET w = 'B' WHERE id = 2",
    )  # fmt: skip
    assert said.rows == [
        {"op": "u", "id": "1", "v": "11", "w": "a"},
        {"op": "u", "id": "2", "v": "no. 20", "w": "B"},
    ]
    assert alerts == ["column v changed from integer to text"]


def test_whole_old_rows_across_a_change(server: PostgresServer, project: Project, alerts: list[str]) -> None:
    said = Said(
        project, "full_", server,
        "ALTER TABLE full_ RENAME w TO word", "DELETE FROM full_ WHERE id = 1",
        "ALTER TABLE full_ DROP COLUMN v", "DELETE FROM full_ WHERE id = 2",
    )  # fmt: skip
    assert said.rows == [
        {"op": "d", "id": "1", "v": "10", "word": "a"},
        {"op": "d", "id": "2", "word": "b"},
    ]
    assert alerts == ["columns w may be called word now"]


def test_a_table_that_is_gone_before_its_changes_are_read(
    server: PostgresServer, project: Project, alerts: list[str]
) -> None:
    said = Said(
        project, "gone", server,
        "ALTER TABLE gone RENAME w TO word", "INSERT INTO gone VALUES (3, 30, 'c')", "DROP TABLE gone",
    )  # fmt: skip
    assert said.rows == [{"op": "c", "id": "3", "v": "30", "word": "c"}]
    assert alerts == ["columns w may be called word now"]
    (lane,) = open_lanes(project, read_only=True)
    state = read_states(lane.log)[TableId("public", "gone")]
    assert (state.stage, state.reason) == ("failed", "Table public.gone is gone.")


AT_REST = {
    "ALTER TABLE {} ALTER v TYPE text USING 'no. ' || v": ["column v changed from integer to text"],
    "ALTER TABLE {} ADD COLUMN n text DEFAULT left(random()::text, 8)": [
        "column n was added with a value for old rows"
    ],
    "ALTER TABLE {} ADD COLUMN n integer DEFAULT 7": ["column n was added with a value for old rows"],
    "ALTER TABLE {} RENAME v TO value": ["columns v may be called value now"],
}
"""Statements that change rows of which the stream says nothing."""


def made(folder: Path, url: str, *lines: str) -> Project:
    listed = "\n".join([f'[source.pg]\nurl = "{url}"', *lines])
    (folder / "headrace.toml").write_text(listed + '\n[destination]\npath = "warehouse.duckdb"\n')
    return load_project(folder)


def database(server: PostgresServer, name: str) -> str:
    server.psql(f"CREATE DATABASE {name}")
    return server.url.removesuffix("postgres") + name


def same(project: Project, table: str) -> bool:
    """Whether the destination has what the source has, as text and in the source's columns."""
    with connect(project.sources[0].url.reveal()) as db:
        shape = read_shapes(db, [TableId("public", table)]).popitem()[1]
        cells = ", ".join(f"{column.name}::text" for column in shape.columns)
        wanted = db.execute(f"SELECT {cells} FROM public.{table}".encode()).fetchall()
    with duckdb.connect(str(project.destination.path), read_only=True) as warehouse:
        found = warehouse.execute(f"SELECT {cells} FROM pg.{table}").fetchall()
    return sorted(found, key=repr) == sorted(wanted, key=repr)


def stages(project: Project) -> dict[str, str]:
    (lane,) = open_lanes(project, read_only=True)
    return {table.name: state.stage for table, state in read_states(lane.log).items()}


def test_rows_that_no_change_touches_arrive_as_they_are_now(
    newest: PostgresServer, tmp_path: Path, alerts: list[str]
) -> None:
    """One change of each table lets its new shape be seen; the rows besides it come with the copy."""
    url = database(newest, "at_rest")
    tables = dict(zip(("typed", "random", "constant", "called"), AT_REST, strict=True))
    for table in (*tables, "gone"):
        newest.psql(
            f"CREATE TABLE {table} (id integer PRIMARY KEY, v integer, w text); "
            f"INSERT INTO {table} SELECT n, n * 10, 'a' FROM generate_series(1, 500) n",
            "at_rest",
        )
    project = made(tmp_path, url)
    Pipeline(project).run_once()
    newest.psql("DROP TABLE gone", "at_rest")
    for table, statement in tables.items():
        newest.psql(statement.format(table) + f"; UPDATE {table} SET w = 'b' WHERE id = 3", "at_rest")
    Pipeline(load_project(tmp_path)).run_once()
    assert sorted(alerts) == sorted(reason for reasons in AT_REST.values() for reason in reasons)
    assert stages(project) == dict.fromkeys([*tables, "gone"], "live")
    for table in tables:
        assert same(project, table), table
    newest.psql("".join(f"DELETE FROM {table} WHERE id > 400;" for table in tables), "at_rest")
    Pipeline(load_project(tmp_path)).run_once()
    for table in tables:
        assert same(project, table), table
    assert len(alerts) == len(tables), "what is known is no news"


@pytest.mark.parametrize("statement", [each for each in AT_REST if "random" not in each])
def test_a_table_that_changes_while_it_is_copied_is_copied_as_it_is_now(
    newest: PostgresServer, tmp_path: Path, alerts: list[str], statement: str
) -> None:
    """The stream brings the news amid the copy. It begins again: what was read before it, and what is
    being read, is no part of it."""
    newest.psql("DROP DATABASE IF EXISTS amid WITH (FORCE)")
    url = database(newest, "amid")
    newest.psql(
        "CREATE TABLE t (id integer PRIMARY KEY, v integer, w text); INSERT INTO t SELECT n, n, "
        "(SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 10) WHERE n > 0) "
        "FROM generate_series(1, 3000) n",
        "amid",
    )
    lines = ['chunk_bytes = "64KiB"', 'copy_rate = "600KiB"', 'slot = "amid"']
    pipeline = Pipeline(made(tmp_path, url, *lines))
    (lane,) = pipeline.lanes
    append = lane.log.append
    count = itertools.count(1)

    def appended(entries: Iterable[Entry]) -> Mark:
        mark = append(entries)
        if next(count) == 5:
            newest.psql(statement.format("t") + "; UPDATE t SET w = 'b' WHERE id % 100 = 3", "amid")
        return mark

    lane.log.append = appended  # type: ignore[method-assign]
    pipeline.run_once()
    project = load_project(tmp_path)
    Pipeline(project).run_once()
    assert set(alerts) <= set(AT_REST[statement]), "or the copy found out by itself"
    (lane,) = open_lanes(project, read_only=True)
    marks = [(offset, mark) for offset, _, _, _, mark in lane.log.copy_marks()]
    begins = [offset for offset, mark in marks if mark.kind == "begin"]
    assert len(begins) > 1
    assert next(offset for offset, mark in marks if mark.kind == "end") > begins[1], "not amid the copy"
    chunks = [mark.chunk for offset, mark in marks if mark.kind == "chunk" and offset > begins[-1]]
    assert sorted(chunks) == list(range(len(chunks)))
    copied = [i.entry.rows for i in lane.log.headers(begins[-1], 1 << 40) if i.entry.kind == "copy"]
    assert sum(copied) == 3000
    assert same(project, "t")
    assert verify(project).verified


def test_a_table_that_was_removed_stays_so_whatever_its_shape_becomes(
    newest: PostgresServer, tmp_path: Path, alerts: list[str]
) -> None:
    """Here the publication is not ours and holds every table, so that the stream goes on about it."""
    url = database(newest, "removed")
    newest.psql(
        "CREATE TABLE kept (id integer PRIMARY KEY, v integer); CREATE TABLE t (LIKE kept INCLUDING ALL); "
        "INSERT INTO t VALUES (1, 1); "
        "CREATE PUBLICATION headrace_pg FOR ALL TABLES WITH (publish_via_partition_root = true)",
        "removed",
    )
    project = made(tmp_path, url, 'slot = "removed"')
    Pipeline(project).run_once()
    pipeline = Pipeline(load_project(tmp_path))
    (lane,) = pipeline.lanes
    lane.source.change_tables(lane.log, [TableId("public", "t")], "remove")
    newest.psql(
        "ALTER TABLE t ADD COLUMN n integer DEFAULT 7; UPDATE t SET v = 2; INSERT INTO kept VALUES (1, 1)",
        "removed",
    )
    pipeline.run_once()
    newest.psql("ALTER TABLE t RENAME v TO value; UPDATE t SET n = 8; UPDATE kept SET v = 2", "removed")
    Pipeline(load_project(tmp_path)).run_once()
    assert stages(project) == {"kept": "live", "t": "removed"}
    assert alerts == []
    assert same(project, "kept")
