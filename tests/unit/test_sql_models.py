"""Model files: what is accepted, what is refused, and that expressions run as they were written."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from headrace.change import Column, TableId, TableSchema
from headrace.errors import ModelError
from headrace.payload import BEFORE, UNCHANGED
from headrace.transform.model import bind
from headrace.transform.sql import ModelText, read_model


def read(folder: Path, text: str) -> ModelText:
    path = folder / "m.sql"
    path.write_text(text)
    return read_model(path)


# -- refusals ------------------------------------------------------------------------------------------

FROM = "FROM raw.shop.t"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"SELECT v AS x,\n  (v AS y\n{FROM}", r"m\.sql:2: .*syntax error"),
        (f"SELECT v AS x {FROM} WHERE\n\n)", r"m\.sql:3: .*syntax error"),
        ("", r"m\.sql.*one plain SELECT"),
        (f"SELECT v AS x {FROM}; SELECT v AS x {FROM}", "one plain SELECT"),
        (f"SELECT v AS x {FROM} UNION ALL SELECT v AS x {FROM}", "one plain SELECT"),
        ("CREATE TABLE x (a INT)", r"m\.sql"),
        (f"WITH w AS (SELECT 1) SELECT v AS x {FROM}", "no WITH"),
        (f"SELECT DISTINCT v AS x {FROM}", "no DISTINCT"),
        (f"SELECT v AS x {FROM} GROUP BY v", "no DISTINCT, GROUP BY"),
        (f"SELECT v AS x {FROM} GROUP BY v HAVING v > 'a'", "HAVING"),
        (f"SELECT v AS x {FROM} ORDER BY v", "ORDER BY"),
        (f"SELECT v AS x {FROM} LIMIT 1", "LIMIT"),
        (f"SELECT v AS x {FROM} QUALIFY row_number() OVER () = 1", "QUALIFY"),
        (f"SELECT v AS x {FROM} USING SAMPLE 10%", "SAMPLE"),
        (f"SELECT v AS x {FROM} TABLESAMPLE 10%", "SAMPLE"),
        (f"{FROM} SELECT v AS x", "SELECT first|begins with SELECT"),
        (f"{FROM}", r"\* \(name the columns\)"),
        (f"SELECT * {FROM}", r"\* \(name the columns\)"),
        (f"SELECT COLUMNS('v') {FROM}", r"\* \(name the columns\)"),
        (f"SELECT (SELECT 1) AS x {FROM}", "a subquery"),
        (f"SELECT v AS x {FROM} WHERE EXISTS (SELECT 1)", "a subquery"),
        (f"SELECT v AS x {FROM} WHERE v IN (SELECT 'a')", "a subquery"),
        (f"SELECT row_number() OVER () AS x {FROM}", "a window"),
        (f"SELECT lag(v) OVER (ORDER BY id) AS x {FROM}", "a window"),
        (f"SELECT sum(v::INT) AS x {FROM}", r"sum\(\) makes one row"),
        (f"SELECT 1 + COUNT(*) AS x {FROM}", "count"),
        (f"SELECT unnest([v]) AS x {FROM}", r"unnest\(\) makes one row"),
        *(
            (f"SELECT {clock} AS x {FROM}", "a replay would not repeat")
            for clock in (
                "now()",
                "NOW()",
                "current_date",
                "CURRENT_TIMESTAMP",
                "current_timestamp::DATE",
                "today()",
                "localtimestamp",
                "random()",
                "uuid()",
                "gen_random_uuid()",
                "nextval('s')",
                "get_current_time()",
                "age(v::TIMESTAMP)",
                "ago(INTERVAL 1 DAY)",
            )
        ),
        (f"SELECT v AS x {FROM} WHERE v::DATE < today()", "a replay would not repeat"),
        ("SELECT 1 AS x", "reads one raw table"),
        ("SELECT v AS x FROM t", "reads one raw table"),
        ("SELECT v AS x FROM shop.t", "reads one raw table"),
        ("SELECT v AS x FROM other.shop.t", "reads one raw table"),
        ("SELECT t.v AS x FROM raw.shop.t JOIN raw.shop.u ON true", "reads one raw table"),
        ("SELECT t.v AS x FROM raw.shop.t, raw.shop.u", "reads one raw table"),
        ("SELECT v AS x FROM (SELECT * FROM raw.shop.t)", "reads one raw table"),
        ("SELECT x AS y FROM raw.shop.t AS t(x)", "renames the columns|reads one raw table"),
        (f"SELECT v::INT {FROM}", r"v::INT needs a name"),
        (f"SELECT v x {FROM}", r"v x needs a name"),
        (f"SELECT x: v {FROM}", r"needs a name"),
        (f"SELECT v AS x, id AS X {FROM}", "'x' is used twice"),
        (f"SELECT v AS _x {FROM}", "begins with an underscore"),
        (f"/* headrace\nkey = [\n*/ SELECT v AS x {FROM}", "the header is not TOML"),
        (f'/* headrace\nkeys = ["x"]\n*/ SELECT v AS x {FROM}', "unknown key 'keys'; did you mean \"key\""),
        (f"/* headrace\nzzz = 1\n*/ SELECT v AS x {FROM}", "known are key, contract"),
        (f'/* headrace\nkey = "x"\n*/ SELECT v AS x {FROM}', "key must be a list"),
        (
            f'/* headrace\nkey = ["y"]\n*/ SELECT v AS x {FROM}',
            "key names 'y', which the SELECT does not put out",
        ),
        (f'/* headrace\ncontract = "x"\n*/ SELECT v AS x {FROM}', "contract must be a table"),
        (f'/* headrace\n[contract]\namuont = "INT"\n*/ SELECT v AS amount {FROM}', 'Did you mean "amount"'),
        (f"/* headrace\n[contract]\nx = 1\n*/ SELECT v AS x {FROM}", "must be a string"),
        (
            f'/* headrace\n[contract]\nx = "INT CHECK (x > 0"\n*/ SELECT v AS x {FROM}',
            "a CHECK is not closed",
        ),
        (
            f'/* headrace\n[contract]\nx = "INT NOT NULL UNIQUE"\n*/ SELECT v AS x {FROM}',
            "'UNIQUE' is not understood",
        ),
    ],
)
def test_a_model_that_is_no_row_model_is_refused_by_name_and_reason(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith("m.sql")
    assert caught.value.exit_code == 2


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.sql").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match=r"m\.sql cannot be read"):
        read_model(tmp_path / "m.sql")
    with pytest.raises(ModelError, match=r"absent\.sql cannot be read"):
        read_model(tmp_path / "absent.sql")


# -- what is read --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("select", "outputs"),
    [
        ("id, t.v", [("id", "id"), ("v", "t.v")]),
        ('v AS "Mixed Name", id AS "a""b"', [("Mixed Name", "v"), ('a"b', "id")]),
        ("CAST(v AS DECIMAL(12,2)) AS x", [("x", "CAST(v AS DECIMAL(12,2))")]),
        ("v /* , FROM */ || -- WHERE\n 'x' AS y", [("y", "v /* , FROM */ || -- WHERE\n 'x'")]),
        ("'a, FROM (b' AS x, v AS y", [("x", "'a, FROM (b'"), ("y", "v")]),
        (
            "CASE WHEN v IS NULL THEN 'a' ELSE 'b' END AS x",
            [("x", "CASE WHEN v IS NULL THEN 'a' ELSE 'b' END")],
        ),
        ("v IS DISTINCT FROM id AS x, id AS y", [("x", "v IS DISTINCT FROM id"), ("y", "id")]),
        ("v is not distinct from id as x", [("x", "v is not distinct from id")]),
        ("[1, [2, 3]] AS x, {'a': {'b': 1}} AS y", [("x", "[1, [2, 3]]"), ("y", "{'a': {'b': 1}}")]),
        ("id,\n  v AS y,\n", [("id", "id"), ("y", "v")]),
    ],
)
def test_expressions_are_cut_out_verbatim(
    tmp_path: Path, select: str, outputs: list[tuple[str, str]]
) -> None:
    assert list(read(tmp_path, f"SELECT {select} {FROM}").outputs) == outputs


@pytest.mark.parametrize(
    ("rest", "where"),
    [
        ("", ""),
        (" WHERE v = 'x;' -- end\n;;", "v = 'x;'"),
        (
            " where\n v IS DISTINCT FROM 'a' /* in */ AND id > '1' -- after",
            "v IS DISTINCT FROM 'a' /* in */ AND id > '1'",
        ),
    ],
)
def test_where_is_cut_out_verbatim(tmp_path: Path, rest: str, where: str) -> None:
    assert read(tmp_path, f"select v as x from raw.shop.t{rest}").where == where


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("raw.shop.t", ("shop", "t", "t")),
        ("RAW.shop.t AS o", ("shop", "t", "o")),
        ('raw."My Shop"."sales.Orders" "O x"', ("My Shop", "sales.Orders", "O x")),
    ],
)
def test_the_table_and_its_alias_are_read(tmp_path: Path, table: str, expected: tuple[str, ...]) -> None:
    text = read(tmp_path, f"SELECT v AS x FROM {table} WHERE true")
    assert (text.source, text.table, text.alias) == expected


def test_the_contract_is_split_into_type_and_rules(tmp_path: Path) -> None:
    rule = "DECIMAL(12,2)  not null CHECK (x IN (1, 2) AND y <> ')') check(x > 0)"
    text = read(
        tmp_path, f'/* headrace\nkey = ["y"]\n[contract]\nx = "{rule}"\n*/ SELECT id AS x, v AS y {FROM}'
    )
    assert text.types == (("x", "DECIMAL(12,2)"),)
    assert [(c.column, c.text) for c in text.checks] == [
        ("y", "NOT NULL"),  # a key is never null
        ("x", "NOT NULL"),
        ("x", "CHECK (x IN (1, 2) AND y <> ')')"),
        ("x", "CHECK (x > 0)"),
    ]


def test_the_version_follows_the_text(tmp_path: Path) -> None:
    one, two = (read(tmp_path, f"SELECT v AS x {FROM} WHERE id <> '{i}'").version for i in "12")
    assert one != two
    assert read(tmp_path, f"SELECT v AS x {FROM} WHERE id <> '1'").version == one


# -- the key -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "fits"),
    [
        ("id::BIGINT AS k", True),
        ('"id" AS k', True),
        ("t.id::BIGINT AS k", True),
        ("CAST(id AS BIGINT) AS k", True),
        ("id::INTEGER AS k", False),  # what does not fit an INTEGER fails; what is cut would collide
        ("id::DOUBLE::BIGINT AS k", False),  # a DOUBLE holds no 9007199254740993
        ("CAST(CAST(id AS FLOAT) AS BIGINT) AS k", False),
        ("CAST(id::BIGINT AS BIGINT) AS k", True),
        ("lower(id) AS k", False),
        ("v AS k", False),
    ],
)
def test_a_key_that_is_not_the_table_s_is_kept_unique(tmp_path: Path, output: str, fits: bool) -> None:
    text = read(tmp_path, f'/* headrace\nkey = ["k"]\n*/ SELECT {output} {FROM}')
    schema = TableSchema(TableId("public", "t"), (Column("id", "bigint"), Column("v", "text")), ("id",))
    model = bind(text, schema)
    assert model.checks[0].column == "k"
    assert [key.columns for key in model.unique] == ([] if fits else [("k",)])


@pytest.mark.parametrize(
    ("output", "more", "words"),
    [
        ("v AS k", 'materialize = "append"', "it is append: rows of the past"),
        ("v AS k", 'materialize = "history"', "it is history: rows of the past"),
        ("v AS k", 'delete = "soft"', "it keeps deleted rows: rows of the past"),
        ("[v] AS k", "", r"k is VARCHAR\[\], which cannot be held to be unique"),
        ("v::JSON AS k", "", "k is JSON, which cannot be held to be unique"),
    ],
)
def test_a_key_that_cannot_be_kept_unique_is_refused(
    tmp_path: Path, output: str, more: str, words: str
) -> None:
    text = read(tmp_path, f'/* headrace\nkey = ["k"]\n{more}\n*/ SELECT {output} {FROM}')
    schema = TableSchema(TableId("public", "t"), (Column("id", "bigint"), Column("v", "text")), ("id",))
    with pytest.raises(ModelError, match=words):
        bind(text, schema)


# -- verbatim means: the same rows as the file gives by itself -------------------------------------------

COLUMNS = {
    "id": ["1", "2", "3", "4"],
    "n": ["10", "-20", None, "0"],
    "v": ["a,b", "it's", "Fromage", None],
    "j": ['{"a": [1, 2], "b": "x"}', '{"a": []}', None, '{"b": null}'],
    "f": ["1", "2", "3", "4"],
    "r": ["x", "y", "z", ""],
}
EXPRESSIONS = [
    "n::INTEGER",
    "CAST(n AS DECIMAL(12,2))",
    "try_cast(v AS INTEGER)",
    "n::INT + 1 -- plus\n * 2",
    "coalesce(n, 'none') || ', ' || coalesce(v, 'FROM')",
    "CASE WHEN v LIKE '%,%' THEN 'comma' ELSE v END",
    "CASE v WHEN 'it''s' THEN 1 END",
    "v IS DISTINCT FROM 'it''s'",
    "n IS NOT DISTINCT FROM NULL",
    "j->>'b'",
    "j->'a'->0",
    "json_extract_string(j, '$.b')",
    "(j::JSON)->>'$.a[1]'",
    "{'a': 1, 'b': [v, n]}",
    "[n, v, 'x'][2]",
    "[1, 2, 3][1:2]",
    "MAP {'k': v}",
    "list_transform([1, 2], lambda x: x + 1)",
    "[x * 2 for x in [1, 2, 3] if x > 1]",
    "list_filter([n], lambda e: e IS NOT NULL)",
    "DATE '2020-01-31' + INTERVAL 1 MONTH",
    "INTERVAL '1 day' * id::INT",
    "EXTRACT(year FROM DATE '2020-01-01')",
    "substring(v FROM 2 FOR 2)",
    "trim(BOTH 'a' FROM v)",
    "position('b' IN v)",
    "v NOT IN ('a,b', 'x')",
    "n::INT BETWEEN -5 AND 15",
    "NOT (n::INT > 0 OR v IS NULL)",
    "v SIMILAR TO '.*,.*'",
    "v ~ 'F.*'",
    "-n::INT",
    "2 ** 3 ^ 1",
    "7 // 2 % 3",
    "$$dollar, 'quoted' FROM$$",
    "E'a\\'b\\n'",
    "'\u00e9\U0001f600' || v",
    "f || r",
    "t.f",
    "strftime(DATE '2020-01-01', '%d, %m')",
    "format('{}, {{}}', v)",
    "v COLLATE NOCASE = 'FROMAGE'",
    "n IS NULL",
    "r[1:1]",
    "ifnull(v, '') ILIKE '%from%'",
    "struct_pack(a := 1, b := v).b",
    "(1, v)",
    "1e3 + .5",
    "TIMESTAMPTZ '2020-01-01 00:00:00+02'::VARCHAR",
    "greatest(n, v)",
    "regexp_replace(v, '(.)', '<\\1>', 'g')",
]
WHERES = [
    "",
    "n IS NOT NULL",
    "CASE WHEN n IS NULL THEN false ELSE n::INT >= 0 END",
    "v IS DISTINCT FROM 'it''s' -- no\n",
    "j->>'b' = 'x' OR n = '0'",
]


@pytest.fixture(scope="module")
def plain() -> duckdb.DuckDBPyConnection:
    """DuckDB with a table raw.shop.t, as an editor would run the file against."""
    db = duckdb.connect()
    db.execute("SET TimeZone = 'UTC'; ATTACH ':memory:' AS raw; CREATE SCHEMA raw.shop")
    db.register("cells", pa.table({name: pa.array(cells, pa.string()) for name, cells in COLUMNS.items()}))
    db.execute("CREATE TABLE raw.shop.t AS SELECT * FROM cells")
    return db


def staged() -> pa.Table:
    n = len(COLUMNS["id"])
    numbers = pa.array(range(1, n + 1), pa.int64())
    meta = {
        "_op": pa.array(["r"] * n),
        "_epoch": numbers,
        "_commit": numbers,
        "_ordinal": numbers,
        "_offset": numbers,
        "_committed_at": numbers,
        "_txid": numbers,
        "_unchanged": pa.nulls(n, UNCHANGED),
        "_before": pa.nulls(n, BEFORE),
    }
    return pa.table({name: pa.array(cells, pa.string()) for name, cells in COLUMNS.items()} | meta)


SCHEMA = TableSchema(TableId("public", "t"), tuple(Column(name, "text") for name in COLUMNS), ("id",))


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_model_gives_the_rows_that_its_file_gives_in_plain_duckdb(
    tmp_path: Path, plain: duckdb.DuckDBPyConnection, expression: str
) -> None:
    where = WHERES[EXPRESSIONS.index(expression) % len(WHERES)]
    text = f"SELECT id, {expression} AS x, n AS y FROM raw.shop.t{' WHERE ' + where if where else ''}"
    agree(tmp_path, plain, text)


@pytest.mark.parametrize("where", WHERES)
def test_a_filter_keeps_the_rows_that_the_file_keeps(
    tmp_path: Path, plain: duckdb.DuckDBPyConnection, where: str
) -> None:
    agree(tmp_path, plain, f"SELECT id, v FROM raw.shop.t{' WHERE ' + where if where else ''}")


def test_many_expressions_at_once_do_not_disturb_one_another(
    tmp_path: Path, plain: duckdb.DuckDBPyConnection
) -> None:
    outputs = ",\n".join(f"{expression} AS x{i}" for i, expression in enumerate(EXPRESSIONS))
    agree(tmp_path, plain, f"SELECT id, {outputs},\nFROM raw.shop.t\nWHERE id <> '9';\n")


def agree(folder: Path, plain: duckdb.DuckDBPyConnection, text: str) -> None:
    made = bind(read(folder, text), SCHEMA).prepare(staged())
    assert made.records.num_rows == 0, made.records["message"].to_pylist()
    expected = plain.sql(text.replace(";", "") if "';" not in text else text).to_arrow_table()
    ours = made.rows.drop_columns(["_source_key"])
    assert ours.schema.names == expected.schema.names
    assert ours.sort_by("id").to_pylist() == expected.sort_by("id").to_pylist()
