"""Every type, name, key and event of a real Postgres, copied and then streamed, value by value."""

from __future__ import annotations

# ruff: noqa: E501
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import psycopg
import pytest

from headrace.config import Project, load_project
from headrace.errors import HeadraceError
from headrace.pipeline import Pipeline
from headrace.testing.postgres import PostgresServer
from headrace.verify import verify

CHECK = Path(__file__).resolve().parents[2] / "scripts" / "independent_check.py"

TYPES: dict[str, list[str]] = {
    "smallint": ["-32768", "32767"],
    "integer": ["-2147483648", "0"],
    "bigint": ["-9223372036854775808", "9223372036854775807"],
    "oid": ["4294967295"],
    "real": ["0.1", "3.4028235e38", "1e-45", "NaN", "-Infinity", "-0"],
    "double precision": ["0.1", "1.7976931348623157e308", "5e-324", "NaN", "Infinity", "0.30000000000000004"],
    "numeric": ["1e100", "0.00000000000000000000000000000001", "NaN", "-Infinity", "1.10"],
    "numeric(12,2)": ["0.10", "-9999999999.99"],
    "numeric(38,10)": ["1234567890123456789012345678.0123456789"],
    "numeric(50,5)": ["123456789012345678901234567890123456789012345.12345"],
    "numeric(5,-2)": ["12300"],
    "boolean": ["t", "f"],
    "text": ["", " ", "NULL", "\\N", "a\tb\nc\r\nd", "Zürich 東京 🚰", "'\"\\", '{"a": [1]}', "x" * 70_000],
    "character varying(5)": ["abc", "ab  "],
    "character(4)": ["ab", "", "ab  "],
    '"char"': ["x", ""],
    "name": ["a name"],
    "bytea": ["\\x", "\\x00ff5c27", "\\xdeadbeef"],
    "date": ["2024-02-29", "0044-03-15 BC", "0001-01-01", "infinity", "-infinity", "5874897-12-31"],
    "timestamp": [
        "2024-02-29 23:59:59.999999",
        "0044-03-15 12:00:00 BC",
        "infinity",
        "-infinity",
        "1969-12-31 23:59:59.5",
    ],
    "timestamp(3)": ["2024-02-29 23:59:59.999"],
    "timestamptz": ["2024-02-29 23:59:59.999999+05:30", "0044-03-15 12:00:00+00 BC", "infinity", "-infinity"],
    "time": ["00:00:00", "23:59:59.999999"],
    "timetz": ["23:59:59.999999+05:30"],
    "interval": ["1 year 2 mons -3 days 04:05:06.789", "-00:00:01", "178000000 years"],
    "uuid": ["00000000-0000-0000-0000-000000000000", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"],
    "json": ['{"a":1, "a":2}', " [1.10, 1e400, null] ", '"\\u00e9\\ud83d\\udeb0"', "{}"],
    "jsonb": [
        '{"b": 1.10, "a": [null, true, "x\\"y"]}',
        "123456789012345678901234567890.123",
        '"\\n"',
        "null",
    ],
    "inet": ["1.2.3.4", "1.2.3.4/8", "::1"],
    "cidr": ["10.0.0.0/8"],
    "macaddr": ["08:00:2b:01:02:03"],
    "bit(5)": ["10101"],
    "bit varying": ["", "1010"],
    "money": ["-1234.56", "0.01"],
    "point": ["(1.5,-2)"],
    "box": ["(3,4),(1,2)"],
    "path": ["[(0,0),(1,1)]"],
    "tsvector": ["'a':1A 'b''c':2"],
    "pg_lsn": ["16/B374D848"],
    "int4range": ["[1,10)", "empty", "(,5)"],
    "tstzrange": ['["2024-01-01 00:00:00+00","2024-02-01 00:00:00+00")'],
    "int4multirange": ["{[1,3),[5,7)}"],
    "mood": ["sad", 'it\'s, "ok" {}'],
    "price": ["12.50"],
    "pair": ['(1,"a ""q"" (b), c\\\\d")', "(1,)", "(,)"],
    "integer[]": ["{}", "{1,NULL,-3}"],
    "bigint[]": ["{9223372036854775807}"],
    "boolean[]": ["{t,NULL,f}"],
    "numeric(6,2)[]": ["{0.10,NULL}"],
    "double precision[]": ["{0.1,NaN,Infinity,NULL}"],
    "text[]": ["{}", '{"","NULL",NULL,"a,b","{x}","q\\"q","back\\\\slash","new\nline"," pad ","[1]"}'],
    "character varying(9)[]": ['{"a b",c}'],
    "timestamptz[]": ['{"2024-02-29 23:59:59.999999+00",NULL}'],
    "date[]": ["{2024-02-29,NULL}"],
    "uuid[]": ["{a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11,NULL}"],
    "jsonb[]": ['{"{\\"a\\": [1, \\"x,y\\"]}",NULL}'],
    "bytea[]": ['{"\\\\x00ff",NULL}'],
    "mood[]": ['{sad,"it\'s, \\"ok\\" {}"}'],
    "int4range[]": ['{"[1,10)",empty}'],
}
"""Types with values; a column of its own each, in as many rows as the longest list, and one of nulls."""

KEYS = {
    "one": ["numeric"],
    "two": ["character(4)", "timestamptz"],
    "six": ["bytea", "date", "inet", "mood", "interval", "text[]"],
}
"""Tables whose keys are of types with more than one way to write a value."""

TEXT_KEYS = ["", " ", "'", '"', "a\nb", '["a","b"]', "NULL", "\\", "é", "e\u0301", "🚰", "a,b", "{}", "1"]

LONG = "ä" * 30 + "xyz"
ODD = 'We"ird Täble.x'
ODD_SQL = ODD.replace('"', '""')

NAMES = """i n value place key known hit found pending numbered past chunk old_k gone own r f keep v held
events points verdicts settled changes removed arrived moving judged waiting expected found_raw x h""".split()  # noqa: SIM905
"""Columns that are called like something in a query of ours."""

DEFINITIONS = f"""
CREATE TYPE mood AS ENUM ('sad', 'it''s, "ok" {{}}');
CREATE DOMAIN price AS numeric(10,2) CHECK (VALUE >= 0);
CREATE TYPE pair AS (n integer, t text);
CREATE TABLE texts (k text PRIMARY KEY, v integer);
CREATE TABLE pairs (a text, b bigint, "C d" date, v text, PRIMARY KEY ("C d", a, b));
CREATE SCHEMA "Other";
CREATE TABLE "Other"."{ODD_SQL}" ("Key ""K"" é" integer PRIMARY KEY, "{LONG}" text, "select" text, "été" text);
CREATE TABLE "{LONG}" (id integer PRIMARY KEY, "_v" text);
CREATE TABLE identity_full (id integer PRIMARY KEY, v text, w text);
ALTER TABLE identity_full REPLICA IDENTITY FULL;
CREATE TABLE identity_index (id integer PRIMARY KEY, code text NOT NULL UNIQUE, v text);
ALTER TABLE identity_index REPLICA IDENTITY USING INDEX identity_index_code_key;
CREATE TABLE parts (id integer, at date, v text, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
CREATE TABLE parts_23 PARTITION OF parts FOR VALUES FROM ('2023-01-01') TO ('2024-01-01');
CREATE TABLE parts_24 PARTITION OF parts FOR VALUES FROM ('2024-01-01') TO ('2025-01-01');
CREATE TABLE animals (id integer PRIMARY KEY, name text);
CREATE TABLE birds (wings integer, PRIMARY KEY (id)) INHERITS (animals);
CREATE TABLE empty_one (id integer PRIMARY KEY, v text);
CREATE TABLE made (id integer PRIMARY KEY, v integer, twice integer GENERATED ALWAYS AS (v * 2) STORED);
CREATE TABLE live (id integer PRIMARY KEY, v text, n integer DEFAULT 1, gone text);
CREATE TABLE place (k text PRIMARY KEY, {", ".join(f"{name} text" for name in NAMES)});
{"".join(f"ALTER TABLE place ALTER {name} SET STORAGE EXTERNAL;" for name in NAMES)}
CREATE TABLE toasted (id integer PRIMARY KEY, long text, n text);
ALTER TABLE toasted ALTER long SET STORAGE EXTERNAL;
"""

MODEL = """\
/* headrace
key = ["id"]
*/
SELECT id::INTEGER AS id, long AS long, n::INTEGER AS n FROM raw.pg.toasted
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("pg"), 18) as server:
        yield server


@pytest.fixture(scope="module")
def project(server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Everything once by the copy, once by the stream."""
    with psycopg.connect(server.url, autocommit=True) as db:
        db.execute(DEFINITIONS.encode())
        create_types(db)
        fill(db, 0)
    root = tmp_path_factory.mktemp("project")
    (root / "models").mkdir()
    (root / "models" / "toasted_clean.sql").write_text(MODEL)
    (root / "headrace.toml").write_text(
        f'[source.pg]\ntype = "postgres"\nurl = "{server.url}"\ntables = ["*.*"]\n'
        '[destination]\ntype = "duckdb"\npath = "warehouse.duckdb"\n'
    )
    project = load_project(root)
    once(project)
    with psycopg.connect(server.url, autocommit=True) as db:
        fill(db, 1000)
    once(project)
    return project


def create_types(db: psycopg.Connection[Any]) -> None:
    columns = ", ".join(f"c{i} {type_}" for i, type_ in enumerate(TYPES))
    db.execute(f"CREATE TABLE types (id integer PRIMARY KEY, {columns})".encode())
    for name, types in KEYS.items():
        columns = ", ".join(f"k{i} {type_}" for i, type_ in enumerate(types))
        key = ", ".join(f"k{i}" for i in range(len(types)))
        db.execute(f"CREATE TABLE key_{name} ({columns}, v integer, PRIMARY KEY ({key}))".encode())


def fill(db: psycopg.Connection[Any], base: int) -> None:
    """Insert every value, ids from `base`; text keys get it as a prefix."""
    cells = ", ".join(["%s", *(f"%s::text::{type_}" for type_ in TYPES)])
    for n in range(max(map(len, TYPES.values())) + 1):
        row = [values[n] if n < len(values) else None for values in TYPES.values()]
        db.execute(f"INSERT INTO types VALUES ({cells})".encode(), [base + n, *row])
    for name, types in KEYS.items():
        cells = ", ".join(f"%s::text::{type_}" for type_ in types)
        upsert = f"INSERT INTO key_{name} VALUES ({cells}, 1) ON CONFLICT ON CONSTRAINT key_{name}_pkey "
        for n in range(10):
            row = [TYPES[type_][n % len(TYPES[type_])] for type_ in types]
            db.execute((upsert + "DO UPDATE SET v = excluded.v + 1").encode(), row)
    prefix = str(base) if base else ""
    for key in TEXT_KEYS:
        db.execute("INSERT INTO texts VALUES (%s, 1)", [prefix + key])
        db.execute("INSERT INTO pairs VALUES (%s, %s, '2024-01-01', %s)", [prefix + key, base, key])
    db.execute(f"INSERT INTO \"Other\".\"{ODD_SQL}\" VALUES (%s, 'a', 'b', NULL)".encode(), [base])
    db.execute(f"INSERT INTO \"{LONG}\" VALUES (%s, 'a')".encode(), [base])
    values = ", ".join(f"repeat('{name} ', 800)" for name in NAMES)
    db.execute(
        f"INSERT INTO place SELECT 'a' || n, {values} FROM generate_series(%s::int, %s::int) n".encode(),
        [base, base + 9],
    )
    for n in range(base, base + 20):
        db.execute("INSERT INTO identity_full VALUES (%s, 'a', NULL)", [n])
        db.execute("INSERT INTO identity_index VALUES (%s, %s, 'a')", [n, f"code {n}"])
        db.execute("INSERT INTO parts VALUES (%s, %s, 'a')", [n, f"202{3 + n % 2}-05-05"])
        db.execute("INSERT INTO animals VALUES (%s, 'animal')", [n])
        db.execute("INSERT INTO birds VALUES (%s, 'bird', 2)", [n])
        db.execute("INSERT INTO made VALUES (%s, 1)", [n])
        db.execute("INSERT INTO live VALUES (%s, 'a', 1, 'x')", [n])
        db.execute("INSERT INTO toasted VALUES (%s, %s, '1')", [n, f"{n} " * 3000])


def once(project: Project) -> None:
    Pipeline(load_project(project.root)).run_once()


def assert_whole(project: Project) -> None:
    with subprocess.Popen(
        [sys.executable, "-I", str(CHECK), f"--source-url={project.sources[0].url.reveal()}",
         f"--warehouse={project.destination.path}", f"--log={project.state / 'log' / 'pg.db'}",
         f"--model=toasted_clean={project.models / 'toasted_clean.sql'}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as check:  # fmt: skip
        wrong = [finding for finding in verify(load_project(project.root)).findings if not finding.ok]
        said, _ = check.communicate(timeout=60)
    assert not wrong
    assert check.returncode == 0, said


def found(project: Project, sql: str) -> list[tuple[Any, ...]]:
    with duckdb.connect(str(project.destination.path), read_only=True) as db:
        return db.execute(sql).fetchall()


def run(server: PostgresServer, *statements: str) -> None:
    """Run statements, each its own transaction unless it begins one."""
    for statement in statements:
        server.psql(statement)


def test_every_type_arrives_as_it_was(project: Project) -> None:
    assert_whole(project)
    counts = found(project, "SELECT model, count(*) FROM headrace.quarantine GROUP BY 1")
    assert counts == [], "a value that the table of types holds does not arrive"


def test_copied_and_streamed_values_are_the_same(project: Project) -> None:
    """The rows from `fill` twice, once copied and once streamed, differ in nothing but their ids."""
    columns = "* EXCLUDE (id, _source, _source_key)"
    for one, other in ((0, 1000), (1000, 0)):
        rows = found(
            project,
            f"SELECT * FROM (SELECT {columns}, id - {one} AS n FROM pg.types WHERE id // 1000 = {one // 1000} "
            f"EXCEPT ALL SELECT {columns}, id - {other} FROM pg.types WHERE id // 1000 = {other // 1000})",
        )
        assert rows == []


def test_events(server: PostgresServer, project: Project) -> None:
    """Updates, deletes, key changes, truncate, rollbacks, savepoints, columns that come and go.

    `test_unchanged_long_values…` compares every value of what this one leaves.
    """
    run(
        server,
        "UPDATE texts SET k = k || '!' WHERE v = 1",
        "UPDATE pairs SET a = a || '#', v = NULL WHERE b = 0; DELETE FROM pairs WHERE b = 1000 AND a LIKE '%a%'",
        "BEGIN; DELETE FROM texts WHERE k = '🚰!'; INSERT INTO texts VALUES ('🚰!', 7); COMMIT",
        "BEGIN; UPDATE texts SET k = 'swap' WHERE k = '1!'; UPDATE texts SET k = '1!' WHERE k = '{}!'; "
        "UPDATE texts SET k = '{}!' WHERE k = 'swap'; COMMIT",
        "BEGIN; INSERT INTO texts VALUES ('never', 1); ROLLBACK",
        "BEGIN; INSERT INTO texts VALUES ('kept', 1); SAVEPOINT s; INSERT INTO texts VALUES ('undone', 1); "
        "DELETE FROM texts WHERE k = 'kept'; ROLLBACK TO s; INSERT INTO texts VALUES ('after', 1); COMMIT",
        f'UPDATE "Other"."{ODD_SQL}" SET "{LONG}" = NULL, "été" = \'é\'',
        f'UPDATE "{LONG}" SET id = id + 1',
        "UPDATE identity_full SET v = 'b' WHERE id < 5; UPDATE identity_full SET id = id + 500 WHERE id < 3; "
        "DELETE FROM identity_full WHERE id = 4",
        "UPDATE identity_index SET v = 'b' WHERE id < 5; UPDATE identity_index SET code = code || 'x' "
        "WHERE id < 3; DELETE FROM identity_index WHERE id = 4; UPDATE identity_index SET id = 99 WHERE id = 5",
        "UPDATE parts SET at = at + 366 WHERE at < '2024-01-01' AND id < 9; DELETE FROM parts WHERE id = 11",
        "UPDATE animals SET name = 'both' WHERE id < 5; DELETE FROM ONLY animals WHERE id = 6",
        "UPDATE made SET v = 5 WHERE id < 5",
        "UPDATE place SET k = 'b' || k, i = 'new' WHERE k < 'a5'; UPDATE place SET k = 'c' || k, n = 'new'",
        "UPDATE live SET gone = NULL WHERE id < 3; ALTER TABLE live ADD COLUMN more timestamptz; "
        "UPDATE live SET more = '2024-01-01 00:00:00+00' WHERE id < 5",
        "BEGIN; INSERT INTO live (id, v) VALUES (50, 'before'); ALTER TABLE live ADD COLUMN extra integer[]; "
        "INSERT INTO live (id, v, extra) VALUES (51, 'after', '{1,NULL}'); COMMIT",
        "ALTER TABLE live DROP COLUMN gone; UPDATE live SET n = 9 WHERE id < 4; DELETE FROM live WHERE id = 5",
        "INSERT INTO empty_one VALUES (1, 'a'); TRUNCATE empty_one; INSERT INTO empty_one VALUES (1, 'b')",
        "BEGIN; TRUNCATE birds; INSERT INTO birds VALUES (7, 'new', 1); COMMIT",
        "TRUNCATE identity_full, made",
    )  # fmt: skip
    once(project)
    assert found(project, "SELECT v FROM pg.empty_one") == [("b",)]
    keys = {row[0] for row in found(project, "SELECT k FROM pg.texts")}
    assert {"kept", "after"} <= keys
    assert not {"never", "undone", "swap"} & keys
    assert found(project, "SELECT count(*) FROM pg.made") == [(0,)]


def test_a_large_transaction(server: PostgresServer, project: Project) -> None:
    run(
        server,
        "BEGIN; INSERT INTO empty_one SELECT n, repeat('x', 100) FROM generate_series(100, 50099) n; "
        "SAVEPOINT s; UPDATE empty_one SET v = 'undone'; ROLLBACK TO s; "
        "UPDATE empty_one SET v = 'even' WHERE id % 2 = 0; COMMIT",
    )  # fmt: skip
    once(project)
    assert found(project, "SELECT count(*) FROM pg.empty_one WHERE v = 'even'") == [(25_000,)]
    assert found(project, "SELECT count(*), count(*) FILTER (v = 'undone') FROM pg.empty_one") == [
        (50_001, 0)
    ]


def test_unchanged_long_values_after_a_quarantined_change(server: PostgresServer, project: Project) -> None:
    """The long value comes from raw: the destination's is older, since a change in between was bad."""
    run(
        server,
        "UPDATE toasted SET n = 'bad', long = repeat('new value ', 900) WHERE id = 1",
        "UPDATE toasted SET n = 'worse' WHERE id = 2",
    )
    once(project)
    opened = found(project, "SELECT key FROM headrace.quarantine WHERE status = 'quarantined' ORDER BY 1")
    assert opened == [("1",), ("2",)]
    assert found(project, "SELECT long FROM toasted_clean WHERE id = 1") == [("1 " * 3000,)]
    run(server, "UPDATE toasted SET n = '5' WHERE id = 1", "UPDATE toasted SET id = 777 WHERE id = 3")
    once(project)
    assert found(project, "SELECT n, long FROM toasted_clean WHERE id = 1") == [(5, "new value " * 900)]
    assert found(project, "SELECT n, long FROM toasted_clean WHERE id = 777") == [(1, "3 " * 3000)]
    assert_whole(project)


def test_a_table_without_a_key_is_refused(server: PostgresServer, tmp_path: Path) -> None:
    run(server, "CREATE DATABASE keyless")
    server.psql("CREATE TABLE t (v text)", "keyless")
    url = server.url.removesuffix("postgres") + "keyless"
    (tmp_path / "headrace.toml").write_text(
        f'[source.kl]\ntype = "postgres"\nurl = "{url}"\n[destination]\ntype = "duckdb"\npath = "w.duckdb"\n'
    )
    with pytest.raises(HeadraceError, match=r"table public\.t: it has no primary key"):
        Pipeline(load_project(tmp_path)).run_once()
