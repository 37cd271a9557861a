"""Names of every kind, columns that are not what they seem, and tables that are made of tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.change import TableId, TableSchema
from headrace.config import Project, load_project
from headrace.errors import HeadraceError
from headrace.pipeline import Pipeline, open_lanes
from headrace.staging.naming import logical_name, physical_names
from headrace.testing.postgres import INSTALLS, PostgresServer
from pipelines import stage

LONG = "ä" * 31 + "x"  # 63 bytes, as many as a name may have
NAMES = [
    'We"ird. Täble%/',
    LONG,
    "select",
    "東京",
    "CamelCase",
    "a~b",
    "v~56",
    "_v",
    "%s",
    "{x}",
    "\\",
    "'",
    ".",
]


@pytest.fixture(scope="module", params=sorted(INSTALLS))
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("pg"), request.param) as server:
        yield server


def project_of(
    server: PostgresServer, folder: Path, name: str, definitions: str, settings: str = ""
) -> Project:
    """A project on a database of its own."""
    server.psql(f"CREATE DATABASE {name}")
    server.psql(definitions, name)
    url = server.url.removesuffix("postgres") + name
    (folder / "headrace.toml").write_text(
        f'[source.pg]\ntype = "postgres"\nurl = "{url}"\nslot = "{name}"\ntables = ["*.*"]\n{settings}\n'
        '[destination]\ntype = "duckdb"\npath = "warehouse.duckdb"\n'
    )
    return load_project(folder)


def raw(project: Project, table: str, schema: str = "public") -> list[dict[str, Any]]:
    """Every copied row and staged change of a table, in source order: operation and cells."""
    names = [column.name for column in shape(project, table, schema).columns]
    return history(project, table, schema).select(["_op", *names]).to_pylist()


def shape(project: Project, table: str, schema: str = "public") -> TableSchema:
    (lane,) = open_lanes(project, read_only=True)
    return lane.staging.schemas(lane.staging.through())[TableId(schema, table)]


def history(project: Project, table: str, schema: str = "public") -> pa.Table:
    (lane,) = open_lanes(project, read_only=True)
    staging, of = lane.staging, TableId(schema, table)
    return staging.history(of, staging.copy(of, staging.through()), staging.through())


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def test_any_name_may_be_a_table_s_a_column_s_and_a_schema_s(server: PostgresServer, tmp_path: Path) -> None:
    columns = ", ".join(f"{quoted(name)} text" for name in NAMES)
    sql = "".join(
        f"CREATE SCHEMA {quoted(name)}; CREATE TABLE {quoted(name)}.{quoted(name)} "
        f"({columns}, PRIMARY KEY ({quoted(name)}));"
        for name in NAMES
    )
    project = project_of(server, tmp_path, "named", sql)
    for op in "rc":
        for name in NAMES:
            cells = ", ".join(f"'{op}{n}'" for n in range(len(NAMES)))
            server.psql(f"INSERT INTO {quoted(name)}.{quoted(name)} VALUES ({cells})", "named")
        stage(project)
    for name in NAMES:
        expected = [{"_op": op, **{other: f"{op}{n}" for n, other in enumerate(NAMES)}} for op in "rc"]
        assert raw(project, name, name) == expected


def test_names_that_differ_in_case_only_stop_one_model_and_lose_nothing(
    server: PostgresServer, tmp_path: Path
) -> None:
    project = project_of(
        server, tmp_path, "twins",
        'CREATE TABLE twins (id int PRIMARY KEY, v text, "V" text, "É" text, "é" text); '
        'CREATE TABLE pairs (id int PRIMARY KEY, w text); CREATE TABLE "Pairs" (id int PRIMARY KEY, w text); '
        "CREATE TABLE others (id int PRIMARY KEY)",
    )  # fmt: skip
    for n in (1, 2):
        server.psql(
            f"INSERT INTO twins VALUES ({n}, 'a', 'b', 'c', 'd'); INSERT INTO pairs VALUES ({n}, 'small'); "
            f"INSERT INTO \"Pairs\" VALUES ({n}, 'Large'); INSERT INTO others VALUES ({n})",
            "twins",
        )
        with pytest.raises(HeadraceError, match=r"Model pg\.\w+ is suspended: Table"):
            Pipeline(load_project(project.root)).run_once()
    twins = {"v": "a", "V": "b", "É": "c", "é": "d"}
    assert raw(project, "twins") == [{"_op": "r", "id": "1", **twins}, {"_op": "c", "id": "2", **twins}]
    assert [row["w"] for row in raw(project, "pairs") + raw(project, "Pairs")] == ["small"] * 2 + [
        "Large"
    ] * 2
    (lane,) = open_lanes(project, read_only=True)
    reasons = lane.suspended()
    assert len(reasons) == 2
    assert reasons["pg.twins"].startswith("Table public.twins has columns v and V, which differ in upper and")
    with duckdb.connect(str(project.destination.path), read_only=True) as db:
        assert db.execute("SELECT id FROM pg.others ORDER BY 1").fetchall() == [(1,), (2,)]
        arrived = db.execute("SELECT w FROM pg.pairs").fetchall()
    assert arrived == [("Large" if "pg.pairs" in reasons else "small",)] * 2


def test_a_mended_table_goes_on_where_its_model_stood(server: PostgresServer, tmp_path: Path) -> None:
    project = project_of(
        server, tmp_path, "mended",
        'CREATE TABLE t (id int PRIMARY KEY, v text, "V" text); INSERT INTO t VALUES (1, \'a\', \'b\')',
    )  # fmt: skip
    with pytest.raises(HeadraceError, match="differ in upper and lower case"):
        Pipeline(load_project(project.root)).run_once()
    server.psql(
        "ALTER TABLE t DROP COLUMN \"V\"; UPDATE t SET v = 'c'; INSERT INTO t VALUES (2, 'd')", "mended"
    )
    Pipeline(load_project(project.root)).run_once()
    with duckdb.connect(str(project.destination.path), read_only=True) as db:
        assert db.execute("SELECT id, v FROM pg.t ORDER BY 1").fetchall() == [(1, "c"), (2, "d")]


def test_columns_that_are_gone_or_generated_are_in_neither_way(
    server: PostgresServer, tmp_path: Path
) -> None:
    virtual = "VIRTUAL" if server.version >= 18 else "STORED"
    project = project_of(
        server, tmp_path, "generated",
        "CREATE TABLE t (gone int, id int PRIMARY KEY, v int, twice int GENERATED ALWAYS AS (v * 2) STORED, "
        f"thrice int GENERATED ALWAYS AS (v * 3) {virtual}, w text); ALTER TABLE t DROP COLUMN gone; "
        "INSERT INTO t VALUES (1, 10, DEFAULT, DEFAULT, 'a')",
    )  # fmt: skip
    stage(project)
    server.psql("INSERT INTO t VALUES (2, 20, DEFAULT, DEFAULT, 'b')", "generated")
    server.psql("ALTER TABLE t DROP COLUMN v CASCADE; INSERT INTO t (id, w) VALUES (3, 'c')", "generated")
    stage(project)
    rows = history(project, "t").to_pylist()
    assert [(row["_op"], row["id"], row["v"], row["w"]) for row in rows] == [
        ("r", "1", "10", "a"), ("c", "2", "20", "b"), ("c", "3", None, "c")
    ]  # fmt: skip
    assert not {"gone", "twice", "thrice"} & set(rows[0])


def test_what_a_publication_gives_out_is_what_is_copied(server: PostgresServer, tmp_path: Path) -> None:
    """Generated columns where it publishes them (18), and a list of columns that the settings want too."""
    options = ", publish_generated_columns = stored" if server.version >= 18 else ""
    project = project_of(
        server, tmp_path, "published",
        "CREATE TABLE t (id int PRIMARY KEY, v int, twice int GENERATED ALWAYS AS (v * 2) STORED); "
        "CREATE TABLE listed (id int PRIMARY KEY, v int, secret text); INSERT INTO t VALUES (1, 10); "
        "INSERT INTO listed VALUES (1, 10, 'x'); CREATE PUBLICATION headrace_pg FOR TABLE t, listed (id, v) "
        f"WITH (publish_via_partition_root = true{options})", 'exclude = ["public.listed.secret"]',
    )  # fmt: skip
    stage(project)
    server.psql("INSERT INTO t VALUES (2, 20); INSERT INTO listed VALUES (2, 20, 'y')", "published")
    stage(project)
    more = ({"twice": "20"}, {"twice": "40"}) if server.version >= 18 else ({}, {})
    assert raw(project, "t") == [
        {"_op": "r", "id": "1", "v": "10", **more[0]}, {"_op": "c", "id": "2", "v": "20", **more[1]}
    ]  # fmt: skip
    assert raw(project, "listed") == [{"_op": op, "id": n, "v": n + "0"} for op, n in ("r1", "c2")]


def test_a_partitioned_table_is_one_and_an_inherited_one_is_two(
    server: PostgresServer, tmp_path: Path
) -> None:
    """Partitions of several levels and other column orders, attached with rows and detached."""
    project = project_of(
        server, tmp_path, "parted",
        "CREATE TABLE p (id int, at int, v text, PRIMARY KEY (id, at)) PARTITION BY RANGE (at); "
        "CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10) PARTITION BY LIST (id); "
        "CREATE TABLE p1a PARTITION OF p1 FOR VALUES IN (1, 2); CREATE TABLE p1b PARTITION OF p1 DEFAULT; "
        "CREATE TABLE p2 (v text, gone int, at int NOT NULL, id int NOT NULL, PRIMARY KEY (id, at)); "
        "ALTER TABLE p2 DROP COLUMN gone; ALTER TABLE p ATTACH PARTITION p2 FOR VALUES FROM (10) TO (20); "
        "CREATE TABLE parent (id int PRIMARY KEY, v text); "
        "CREATE TABLE child (w text, PRIMARY KEY (id)) INHERITS (parent); "
        "INSERT INTO p VALUES (1, 1, 'a'), (5, 5, 'b'), (1, 11, 'c'); "
        "INSERT INTO parent VALUES (1, 'p'); INSERT INTO child VALUES (2, 'c', 'w')",
        'on_rewrite = "alert"',  # of p2, which is detached, the table is not copied again
    )  # fmt: skip
    stage(project)
    server.psql(
        "INSERT INTO p VALUES (2, 2, 'd'), (2, 12, 'e'); UPDATE p SET at = 15 WHERE id = 5; "
        "UPDATE parent SET v = v || '!'; INSERT INTO child VALUES (3, 'd', 'x'); "
        "DELETE FROM parent WHERE id = 2; "
        "ALTER TABLE p DETACH PARTITION p2; INSERT INTO p1 VALUES (9, 9, 'f')",
        "parted",
    )
    stage(project)

    def brief(table: str, *columns: str) -> list[tuple[str, ...]]:
        return [tuple(row[name] for name in ("_op", *columns)) for row in raw(project, table)]

    changes = brief("p", "id", "at", "v")
    assert sorted(changes[:3]) == [("r", "1", "1", "a"), ("r", "1", "11", "c"), ("r", "5", "5", "b")]
    assert changes[3:5] == [("c", "2", "2", "d"), ("c", "2", "12", "e")]
    assert changes[5:7] == [("d", "5", "5", None), ("c", "5", "15", "b")]
    assert changes[7:] == [("c", "9", "9", "f")]
    assert brief("parent", "id", "v") == [("r", "1", "p"), ("u", "1", "p!")]
    assert brief("child", "id", "v", "w") == [
        ("r", "2", "c", "w"), ("u", "2", "c!", "w"), ("c", "3", "d", "x"), ("d", "2", None, None)
    ]  # fmt: skip


@given(st.lists(st.text("vV~56éÉß", min_size=1, max_size=5), unique=True))
def test_columns_of_a_raw_table_are_told_apart_and_found_again(names: list[str]) -> None:
    made = physical_names(["_op"], names)
    assert len({name.casefold() for name in made.values()}) == len(names) + 1
    assert all(logical_name(physical) == name for name, physical in made.items())
    again = physical_names(made.values(), names)
    assert again == made, "a table that is opened again has the same names"
