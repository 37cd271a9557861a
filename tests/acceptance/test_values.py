"""Every type, copied and then streamed: the raw cell is what Postgres prints, byte for byte."""

from __future__ import annotations

# ruff: noqa: E501
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from headrace.config import Project, load_project
from headrace.sources.postgres.connection import connect
from headrace.testing.postgres import PostgresServer
from pipelines import raw, stage

DEBIAN = Path("/usr/lib/postgresql/15/bin")
"""An installed Postgres with what the wheel's lack: xml and the contributed extensions."""

STREAMED = 1000
"""What the ids of streamed rows have more than those of the same rows copied."""

BUILT_IN: dict[str, list[str]] = {
    "smallint": ["-32768", "32767"],
    "integer": ["-2147483648", "2147483647"],
    "bigint": ["-9223372036854775808", "9223372036854775807"],
    "real": ["0.1", "3.4028235e38", "1e-45", "NaN", "Infinity", "-Infinity", "-0"],
    "double precision": ["0.1", "1.7976931348623157e308", "5e-324", "NaN", "Infinity", "-Infinity", "-0",
                         "0.30000000000000004", "1e15", "1e16"],
    "numeric": ["1" * 1000, "-" + "9" * 500 + "." + "7" * 500, "0." + "0" * 16382 + "1", "9" * 131072,
                "NaN", "Infinity", "-Infinity", "1.10", "0.000", "-0", "1e20"],
    "numeric(1000,500)": ["9" * 500 + "." + "1" * 500],
    "numeric(1000,0)": ["8" * 1000],
    "numeric(5,2)": ["-999.99", "0"],
    "money": ["-92233720368547758.08", "1234567.89", "0"],
    "boolean": ["t", "f"],
    '"char"': ["x", "", "\\200", "\\377"],
    "character": ["a", ""],
    "character(4)": ["ab", "ab  ", "", "🚰é"],
    "bpchar": ["ab  ", "x"],
    "character varying": ["", "ab  "],
    "character varying(5)": ["ab  ", "東京"],
    "text": ["", " ", "NULL", "\\N", "\\", "null", "a\tb\nc\r\nd\v\f\b\x01\x7f", "Zürich 東京 🚰", "e\u0301",
             "\u2028\ufeff\u00a0\u200b", "\U0010ffff\ue000\ufffd", "'\"`$$", "{}", "(,)", "x" * 3_000_000,
             "🏳\ufe0f\u200d🌈👩\u200d👩\u200d👧\u200d👦"],
    "name": ["a name", "ä" * 31, ""],
    "bytea": ["\\x", "\\x00", "\\x00ff5c27220a", "\\x" + "deadbeef" * 50_000],
    "date": ["2024-02-29", "0044-03-15 BC", "4713-01-01 BC", "0001-01-01", "infinity", "-infinity", "5874897-12-31"],
    "time": ["00:00:00", "23:59:59.999999", "24:00:00", "12:00:00.1"],
    "time(2)": ["23:59:59.99"],
    "time with time zone": ["23:59:59.999999+05:30", "00:00:00-15:59:59", "24:00:00+00"],
    "timestamp": ["2024-02-29 23:59:59.999999", "0044-03-15 12:00:00 BC", "4713-01-01 00:00:00 BC", "infinity",
                  "-infinity", "294276-12-31 23:59:59.999999", "1969-12-31 23:59:59.5", "1582-10-10 00:00:00"],
    "timestamp(3)": ["2024-02-29 23:59:59.999"],
    "timestamp with time zone": ["2024-02-29 23:59:59.999999+05:30", "0044-03-15 12:00:00+00 BC", "infinity",
                                 "-infinity", "294276-12-31 23:59:59.999999+00", "1883-11-18 12:00:00-07:52:58"],
    "interval": ["1 year 2 mons -3 days 04:05:06.789", "-00:00:01", "178000000 years", "00:00:00",
                 "-1 mons +1 day -00:00:00.000001", "2562047788:00:54.775807"],
    "interval year to month": ["1 year 2 mons"],
    "interval(0)": ["1 day 00:00:01"],
    "uuid": ["00000000-0000-0000-0000-000000000000", "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"],
    "json": ['{"a":1, "a":2}', ' [1.10, 1e400,\n null] ', '"\\u00e9\\ud83d\\udeb0"', '"\\u0000"', '"\\ud800"',
             '"\\udc00\\ud800"', "{}", "null", '{"": ""}', "1" * 400],
    "jsonb": ['{"b": 1.10, "a": [null, true, "x\\"y"]}', "123456789012345678901234567890.1230", '"\\n\\u0001"',
              "null", '{"a": {"": [[], {}]}}', "1e-30", '"' + "ü" * 5000 + '"'],
    "jsonpath": ["$.a[*] ? (@.b > 1)", "strict $.\"a b\"[0 to last]"],
    "inet": ["1.2.3.4", "1.2.3.4/8", "1.2.3.4/32", "::1", "::ffff:1.2.3.4/100"],
    "cidr": ["10.0.0.0/8", "10.1.2.3/32", "2001:db8::/32"],
    "macaddr": ["08:00:2b:01:02:03"],
    "macaddr8": ["08:00:2b:01:02:03:04:05"],
    "bit": ["1"],
    "bit(5)": ["10101"],
    "bit varying": ["", "1010" * 50],
    "bit varying(5)": ["101"],
    "point": ["(1.5,-2)", "(NaN,Infinity)", "(0.1,1e300)"],
    "line": ["{1,-1,0.5}"],
    "lseg": ["[(0,0),(1,1)]"],
    "box": ["(3,4),(1,2)"],
    "path": ["[(0,0),(1,1)]", "((0,0),(1,1),(2,0))"],
    "polygon": ["((0,0),(1,1),(2,0))"],
    "circle": ["<(1,2),3.5>"],
    "tsvector": ["'a':1A 'b''c':2", "", "'\\\\':1"],
    "tsquery": ["'a' & !'b' <-> 'c':*A", ""],
    "pg_lsn": ["16/B374D848", "0/0"],
    "xid": ["4294967295"],
    "xid8": ["18446744073709551615"],
    "cid": ["7"],
    "tid": ["(4294967295,65535)"],
    "oid": ["4294967295", "0"],
    "oidvector": ["1 2 3", ""],
    "int2vector": ["1 -2 3"],
    "pg_snapshot": ["10:20:10,14,15"],
    "txid_snapshot": ["10:20:10,14,15"],
    "refcursor": ["a cursor"],
    "aclitem": ["postgres=arwdDxt/postgres"],
    "regclass": ["pg_class", 'public."Oth.er"', "0", "4294967295"],
    "regtype": ["integer", "public.mood", "public.pair[]"],
    "regproc": ["pg_catalog.now"],
    "regprocedure": ["abs(integer)"],
    "regoper": ["0"],
    "regoperator": ["+(integer,integer)"],
    "regrole": ["postgres"],
    "regnamespace": ["public"],
    "regconfig": ["english"],
    "regdictionary": ["english_stem"],
    "regcollation": ['"C"'],
    "int4range": ["[1,10)", "empty", "(,5)", "(,)", "[3,3]"],
    "int8range": ["[1,9223372036854775807)"],
    "numrange": ["[1.50,2.00]", "(NaN,)"],
    "tsrange": ['["2024-01-01 00:00:00","2024-02-01 00:00:00")', "[-infinity,infinity]"],
    "tstzrange": ['["2024-01-01 00:00:00+05:30","2024-02-01 00:00:00+00")', "(,infinity)"],
    "daterange": ["[2024-01-01,2024-02-01)", "[0044-03-15 BC,)"],
    "int4multirange": ["{[1,3),[5,7)}", "{}"],
    "int8multirange": ["{[1,3)}"],
    "nummultirange": ["{[1.0,3],(4,)}"],
    "tsmultirange": ['{["2024-01-01 00:00:00",)}'],
    "tstzmultirange": ['{["2024-01-01 00:00:00+00",)}'],
    "datemultirange": ["{[2024-01-01,2024-01-02),[2024-02-01,)}"],
    "integer[]": ["{}", "{1,NULL,-3}", "{{1,2},{3,NULL}}", "[0:1]={1,2}", "[-2:-1][5:6]={{1,2},{3,4}}"],
    "text[]": ["{}", '{"","NULL",NULL,"a,b","{x}","q\\"q","back\\\\slash","new\nline"," pad ","[1]",null}',
               '{{"a b",c},{NULL,"🚰"}}', '[2:3]={a,b}', '{"it\'s",\\N}'],
    "double precision[]": ["{0.1,NaN,Infinity,-Infinity,-0,NULL}"],
    "numeric[]": ["{NaN,-Infinity,1.10}"],
    "boolean[]": ["{t,NULL,f}"],
    "character(3)[]": ['{a,"b ",NULL}'],
    "timestamptz[]": ['{"2024-02-29 23:59:59.999999+00",infinity,"0044-03-15 12:00:00+00 BC",NULL}'],
    "bytea[]": ['{"\\\\x00ff",NULL,"\\\\x"}'],
    "jsonb[]": ['{"{\\"a\\": [1, \\"x,y\\"]}",NULL}'],
    "interval[]": ['{"1 day -00:00:01"}'],
    "box[]": ["{(3,4),(1,2);(1,1),(0,0)}"],
    "int4range[]": ['{"[1,10)",empty}'],
    "inet[]": ["{1.2.3.4/32,::1}"],
}  # fmt: skip

DEFINED = r"""
CREATE TABLE "Oth.er" (a int PRIMARY KEY);
CREATE TYPE mood AS ENUM ('sad', 'it''s, "ok" {}', 'NULL', '', E'a\\b', 'Zoë 🚰');
CREATE TYPE pair AS (n integer, t text);
CREATE TYPE "Nest ed" AS (p pair, ps pair[], "M" mood, at timestamptz, flag boolean);
CREATE TYPE floats AS RANGE (subtype = float8);
CREATE DOMAIN price AS numeric(10,2) CHECK (VALUE >= 0);
CREATE DOMAIN yes AS boolean;
CREATE DOMAIN feeling AS mood;
CREATE DOMAIN address AS inet;
CREATE DOMAIN deeper AS price CHECK (VALUE < 1000);
CREATE DOMAIN digits AS integer[] CHECK (cardinality(VALUE) < 5);
CREATE DOMAIN couple AS pair CHECK ((VALUE).n > 0);
CREATE FUNCTION mood_text(mood) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT ''cast by a function''::text';
CREATE CAST (mood AS text) WITH FUNCTION mood_text(mood) AS ASSIGNMENT;
CREATE FUNCTION moods_text(mood[]) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT ''cast by a function''::text';
CREATE CAST (mood[] AS text) WITH FUNCTION moods_text(mood[]) AS ASSIGNMENT;
CREATE FUNCTION pair_text(pair) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT ''cast by a function''::text';
CREATE CAST (pair AS text) WITH FUNCTION pair_text(pair) AS ASSIGNMENT;
"""
"""Types whose cast to text is not what they print as are among them."""

USERS: dict[str, list[str]] = {
    "mood": ["sad", 'it\'s, "ok" {}', "NULL", "", "a\\b", "Zoë 🚰"],
    "mood[]": ['{sad,"it\'s, \\"ok\\" {}","NULL",NULL,""}', "{{sad},{sad}}"],
    "pair": ['(1,"a ""q"" (b), c\\\\d")', "(1,)", "(,)", '(,"")', '(1," ")', "(1,🚰)"],
    "pair[]": ['{"(1,\\"a b\\")",NULL,"(,)"}'],
    '"Nest ed"': [
        '("(1,""a """"b"""""")","{""(1,x)"",NULL}",sad,"2024-01-01 00:00:00+05:30",t)',
        "(,,,,)",
        '("(,)",{},NULL,infinity,f)',
    ],
    "floats": ["[0.1,Infinity)", "empty"],
    "price": ["12.50", "0"],
    "yes": ["t", "f"],
    "feeling": ["sad", 'it\'s, "ok" {}'],
    "address": ["1.2.3.4/32", "1.2.3.4/8"],
    "deeper": ["999.99"],
    "digits": ["{}", "{1,NULL}", "[0:1]={1,2}", "{{1,2},{3,4}}"],
    "digits[]": ['{"{1,2}",NULL}'],
    "couple": ["(1,)", '(7,"a,b")'],
    "price[]": ["{1.50,NULL}"],
}

EXTENSIONS: dict[str, list[str]] = {
    "xml": ['<?xml version="1.0"?><a b="c">é &amp; <![CDATA[<x>]]></a>', "text <b/> only", "<a/>"],
    "xml[]": ['{"<a b=\\"c\\"/>",NULL}'],
    "hstore": ['"a"=>"1", "b c"=>NULL, ""=>"\\"q\\""', ""],
    "citext": ["MiXed", ""],
    "citext[]": ["{A,b}"],
    "ltree": ["Top.Science.Astronomy", ""],
    "lquery": ["*.Astronomy@*{1,2}"],
    "cube": ["(1, 2),(3, 4)"],
    "isbn": ["978-0-393-04002-9"],
    "seg": ["1.5 .. 2.50"],
}
"""Types of extensions: kept as the text that they print."""

NOT_FOR_TABLES = """gtsvector pg_node_tree pg_ndistinct pg_dependencies pg_mcv_list pg_brin_bloom_summary
pg_brin_minmax_multi_summary xml""".split()  # noqa: SIM905
"""Types that no value can be given to, and xml, which only some servers are built with."""


@pytest.fixture(scope="module", params=[15, 16, 18])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PostgresServer]:
    folder, version = tmp_path_factory.mktemp("pg"), request.param
    with PostgresServer(folder, version, bin_folder=DEBIAN if version == 15 else None) as server:
        yield server


@pytest.fixture
def project(server: PostgresServer, tmp_path: Path) -> Project:
    return project_of(tmp_path, server.url)


def project_of(folder: Path, url: str, tables: str = "*.*") -> Project:
    folder.mkdir(exist_ok=True)
    (folder / "headrace.toml").write_text(
        f'[source.pg]\ntype = "postgres"\nurl = "{url}"\ntables = ["{tables}"]\n'
        '[destination]\ntype = "duckdb"\npath = "warehouse.duckdb"\n'
    )
    return load_project(folder)


def printed(url: str, table: str, columns: dict[str, str]) -> dict[int, dict[str, str | None]]:
    """What Postgres prints for each cell, by id: its type's output function, and null where there is none."""
    cells = ", ".join(f"CASE WHEN num_nulls({name}) = 0 THEN format('%s', {name}) END" for name in columns)
    with connect(url) as db:
        rows = db.execute(f"SELECT id, {cells} FROM {table}".encode()).fetchall()
    return {row[0]: dict(zip(columns, row[1:], strict=True)) for row in rows}


def values_of(server: PostgresServer) -> dict[str, list[str]]:
    return BUILT_IN | USERS | (EXTENSIONS if server.version == 15 else {})


def fill(db: psycopg.Connection[Any], types: dict[str, list[str]], first: int) -> None:
    """One row for each place in the lists of values, null where a list is shorter, and one of nulls."""
    cells = ", ".join(f"%s::{type_}" for type_ in types)
    for n, row in enumerate([*itertools.zip_longest(*types.values()), [None] * len(types)]):
        db.execute(f"INSERT INTO valued VALUES (%s, {cells})".encode(), [first + n, *row])


def test_every_value_is_kept_as_postgres_prints_it(server: PostgresServer, project: Project) -> None:
    types = values_of(server)
    columns = {f"c{i}": type_ for i, type_ in enumerate(types)}
    with psycopg.connect(server.url, autocommit=True) as db:
        if server.version == 15:
            for name in ("hstore", "citext", "ltree", "cube", "isn", "seg"):
                db.execute(f"CREATE EXTENSION {name}".encode())
        db.execute(DEFINED.encode())
        defined = ", ".join(f"{name} {type_}" for name, type_ in columns.items())
        db.execute(f"CREATE TABLE valued (id integer PRIMARY KEY, {defined})".encode())
        db.execute("ALTER TABLE valued REPLICA IDENTITY FULL")
        # What applications set for themselves must not show.
        db.execute("ALTER DATABASE postgres SET datestyle = 'German'")
        db.execute("ALTER DATABASE postgres SET intervalstyle = 'iso_8601'")
        db.execute("ALTER DATABASE postgres SET bytea_output = 'escape'")
        db.execute("ALTER DATABASE postgres SET extra_float_digits = -5")
        db.execute("ALTER DATABASE postgres SET timezone = 'Asia/Kolkata'")
        db.execute("ALTER ROLE postgres SET search_path = 'public'")
        fill(db, types, 0)
        stage(project)
        fill(db, types, STREAMED)
        db.execute("UPDATE valued SET id = id + 1000 WHERE id >= 1000")
    stage(project)
    expected = printed(server.url, "public.valued", columns)
    rows = raw(project, "valued")
    by_op = {op: [row for row in rows if row["_op"] == op] for op in "rcu"}
    assert [len(part) for part in by_op.values()] == [len(expected) // 2] * 3
    for op, added in (("r", 0), ("c", STREAMED), ("u", 0)):
        for row in by_op[op]:
            right = expected[int(row["id"]) + added]
            assert {name: row[name] for name in columns} == right, [
                (type_, str(row[name])[:200], str(right[name])[:200])
                for name, type_ in columns.items()
                if row[name] != right[name]
            ]
            if op == "u":
                assert dict(row["_before"]) == {**right, "id": str(int(row["id"]) - STREAMED)}


def test_no_built_in_type_is_left_out(server: PostgresServer) -> None:
    with connect(server.url) as db:
        known = db.execute(
            "SELECT DISTINCT format_type(t, NULL) FROM unnest(%s::regtype[]) t", [list(BUILT_IN)]
        ).fetchall()
        every = db.execute(
            "SELECT format_type(oid, NULL) FROM pg_type WHERE typnamespace = 'pg_catalog'::regnamespace "
            "AND typtype IN ('b', 'r', 'm') AND typcategory <> 'A'"
        ).fetchall()
    assert {row[0] for row in every} - {row[0] for row in known} == set(NOT_FOR_TABLES)
