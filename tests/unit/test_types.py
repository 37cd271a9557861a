"""Postgres' text of a value as a DuckDB value: faithful, or it fails."""

from __future__ import annotations

import datetime as dt
import math
import uuid
from decimal import Decimal

import duckdb
import pytest

from headrace.change import Column
from headrace.pgtypes import canonical, cast_keeps_apart, duckdb_type, mirror_expression

UTC = dt.UTC


def value(type_: str, text: str | None, then: str = "{}") -> object:
    column = Column("c", type_)
    with duckdb.connect() as db:
        db.execute("SET TimeZone = 'UTC'; CREATE TABLE t (c VARCHAR)")
        db.execute("INSERT INTO t VALUES (?)", [text])
        made = db.execute(
            f"SELECT {then.format('x')} FROM (SELECT {mirror_expression(column)} AS x FROM t)"
        ).fetchall()
        kind = db.execute(f"DESCRIBE SELECT {mirror_expression(column)} AS x FROM t").fetchall()[0][1]
    assert kind == canonical(duckdb_type(column)), "the expression has the type that the table gets"
    return made[0][0]


TYPES = [
    ("smallint", "SMALLINT"),
    ("integer", "INTEGER"),
    ("bigint", "BIGINT"),
    ("oid", "UINTEGER"),
    ("real", "FLOAT"),
    ("double precision", "DOUBLE"),
    ("boolean", "BOOLEAN"),
    ("uuid", "UUID"),
    ("json", "JSON"),
    ("jsonb", "JSON"),
    ("date", "DATE"),
    ("bytea", "BLOB"),
    ("text", "VARCHAR"),
    ("character varying(20)", "VARCHAR"),
    ("timestamp without time zone", "TIMESTAMP"),
    ("timestamp(3) without time zone", "TIMESTAMP"),
    ("timestamp with time zone", "TIMESTAMPTZ"),
    ("timestamp(0) with time zone", "TIMESTAMPTZ"),
    ("time without time zone", "TIME"),
    ("time(3) without time zone", "TIME"),
    ("time with time zone", "VARCHAR"),
    ("numeric", "VARCHAR"),
    ("numeric(12,2)", "DECIMAL(12,2)"),
    ("numeric(38,38)", "DECIMAL(38,38)"),
    ("numeric(39,2)", "VARCHAR"),
    ("numeric(3,-2)", "VARCHAR"),
    ("numeric(2,5)", "VARCHAR"),
    ("interval", "VARCHAR"),
    ("int4range", "VARCHAR"),
    ("inet", "VARCHAR"),
    ("mood", "VARCHAR"),
    ("integer[]", "INTEGER[]"),
    ("text[]", "VARCHAR[]"),
    ("numeric(12,2)[]", "DECIMAL(12,2)[]"),
    ("bytea[]", "VARCHAR"),
    ("date[]", "DATE[]"),
]


@pytest.mark.parametrize(("source", "ours"), TYPES)
def test_each_postgres_type_has_its_type(source: str, ours: str) -> None:
    assert duckdb_type(Column("c", source)) == ours


@pytest.mark.parametrize("source", [source for source, _ in TYPES])
def test_null_stays_null(source: str) -> None:
    assert value(source, None) is None


@pytest.mark.parametrize(
    ("type_", "text", "expected"),
    [
        ("smallint", "-32768", -32768),
        ("bigint", "-9223372036854775808", -(2**63)),
        ("oid", "4294967295", 2**32 - 1),
        ("numeric(12,2)", "-9999999999.99", Decimal("-9999999999.99")),
        ("numeric(38,0)", "9" * 38, Decimal("9" * 38)),
        ("numeric", "1" * 60 + "." + "3" * 60, "1" * 60 + "." + "3" * 60),
        ("numeric", "NaN", "NaN"),
        ("double precision", "1.7976931348623157e+308", 1.7976931348623157e308),
        ("double precision", "5e-324", 5e-324),
        ("double precision", "0.1", 0.1),
        ("double precision", "-Infinity", -math.inf),
        ("boolean", "t", True),
        ("boolean", "f", False),
        ("text", "", ""),
        ("text", "NULL", "NULL"),
        ("text", "a\\b'\"\n\u00e9", "a\\b'\"\n\u00e9"),
        ("uuid", "00000000-0000-0000-0000-0000000000ff", uuid.UUID(int=255)),
        ("bytea", "\\x", b""),
        ("bytea", "\\x00ff27", b"\x00\xff'"),
        ("jsonb", '{"a": [1, "\\u00e9"]}', '{"a": [1, "\\u00e9"]}'),
        ("jsonb", "null", "null"),
        ("json", '{"a":1,  "a":2}', '{"a":1,  "a":2}'),
        ("jsonb", "1" * 40, "1" * 40),
        ("date", "2024-02-29", dt.date(2024, 2, 29)),
        (
            "timestamp without time zone",
            "2024-02-29 23:59:59.999999",
            dt.datetime(2024, 2, 29, 23, 59, 59, 999999),
        ),
        ("time without time zone", "23:59:59.999999", dt.time(23, 59, 59, 999999)),
        ("interval", "1 year -3 days", "1 year -3 days"),
        ("time with time zone", "01:02:03+05:30", "01:02:03+05:30"),
    ],
)
def test_values_are_kept_exactly(type_: str, text: str, expected: object) -> None:
    assert value(type_, text) == expected


@pytest.mark.parametrize(
    ("type_", "text", "expected"),
    [
        ("date", "0044-03-15 BC", "0044-03-15 (BC)"),
        ("date", "infinity", "infinity"),
        ("date", "-infinity", "-infinity"),
        ("date", "5874897-12-31", "5874897-12-31"),
        ("timestamp without time zone", "0044-03-15 12:00:00.5 BC", "0044-03-15 (BC) 12:00:00.5"),
        ("timestamp without time zone", "infinity", "infinity"),
        ("timestamp with time zone", "0044-03-15 12:00:00+00 BC", "0044-03-15 (BC) 12:00:00+00"),
        ("timestamp with time zone", "2024-01-01 12:00:00.000001+05:30", "2024-01-01 06:30:00.000001+00"),
        ("timestamp with time zone", "-infinity", "-infinity"),
        ("timestamp with time zone", "12024-01-01 00:00:00+00", "12024-01-01 00:00:00+00"),
        ("real", "3.4028235e+38", "3.4028235e+38"),
        ("real", "NaN", "nan"),
    ],
)
def test_values_beyond_python_are_kept_exactly(type_: str, text: str, expected: str) -> None:
    assert value(type_, text, "{}::VARCHAR") == expected


@pytest.mark.parametrize(
    ("type_", "text", "expected"),
    [
        ("text[]", "{}", []),
        ("text[]", "{a,b}", ["a", "b"]),
        ("text[]", '{a,"b c",NULL,"NULL",""}', ["a", "b c", None, "NULL", ""]),
        ("text[]", r'{"a\"b","c\\d","e,f","{g}","[h"}', ['a"b', "c\\d", "e,f", "{g}", "[h"]),
        ("text[]", '{"a\nb","it\'s",\u00e9}', ["a\nb", "it's", "\u00e9"]),
        ("text[]", '{" "}', [" "]),
        ("integer[]", "{1,NULL,-3}", [1, None, -3]),
        ("numeric(4,2)[]", "{1.50,-0.01}", [Decimal("1.50"), Decimal("-0.01")]),
        ("boolean[]", "{t,f}", [True, False]),
        ("date[]", "{2024-01-01}", [dt.date(2024, 1, 1)]),
        ("timestamp without time zone[]", '{"2024-01-01 00:00:00"}', [dt.datetime(2024, 1, 1)]),
        ("jsonb[]", r'{"{\"a\": 1}"}', ['{"a": 1}']),
        ("bytea[]", r'{"\\x00"}', r'{"\\x00"}'),
    ],
)
def test_arrays_are_lists_of_their_elements(type_: str, text: str, expected: object) -> None:
    assert value(type_, text) == expected


@pytest.mark.parametrize(
    ("type_", "text"),
    [
        ("integer[]", "{{1,2},{3,4}}"),
        ("text[]", "{{a},{b}}"),
        ("text[]", "[0:1]={a,b}"),
        ("integer[]", "[0:1]={1,2}"),
        ("integer[]", "{1,x}"),
        ("numeric(4,2)", "NaN"),
        ("numeric(4,2)", "Infinity"),
        ("integer", "2147483648"),
        ("bytea", "\\xzz"),
        ("uuid", "no"),
        ("time without time zone", "25:00:00"),
        ("date", "2023-02-29"),
        ("boolean", "perhaps"),
    ],
)
def test_what_does_not_fit_fails_and_is_never_bent(type_: str, text: str) -> None:
    with pytest.raises(duckdb.Error):
        value(type_, text)


def test_a_column_s_name_is_quoted() -> None:
    assert mirror_expression(Column('a"b', "integer")) == '"a""b"::INTEGER'


@pytest.mark.parametrize(
    ("source", "target", "kept"),
    [
        ("bigint", "BIGINT", True),
        ("bigint", "HUGEINT", True),
        ("bigint", "INTEGER", False),
        ("integer", "BIGINT", True),
        ("integer", "INTEGER", True),
        ("bigint", "DOUBLE", False),
        ("uuid", "UUID", True),
        ("text", "VARCHAR", True),
        ("text", "INTEGER", False),
        ("numeric(4,2)", "DECIMAL(4,2)", False),
        ("timestamp with time zone", "DATE", False),
    ],
)
def test_only_casts_that_keep_values_apart_carry_a_key(source: str, target: str, kept: bool) -> None:
    assert cast_keeps_apart(source, target) is kept
