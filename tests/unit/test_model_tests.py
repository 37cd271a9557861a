"""`headrace test` and `headrace ci`: what passes, what fails and in which words; no database anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headrace.authoring.recorded import (
    Promise,
    breaking,
    read_promises,
    read_shapes,
    write_promises,
    write_shapes,
)
from headrace.change import Column, TableId, TableSchema
from headrace.config import Project, load_project
from projects import SALES, here

SCHEMA = """[schema]
key = ["id"]
columns = { id = "integer", status = "text", amount = "text" }
"""
GOOD = """
[[test]]
name = "amounts are numbers, drafts are left out"
given = [
  { id = 1, status = "paid", amount = 9.90 },
  { id = 2, status = "draft" },
  { id = 3, status = "paid", amount = "free" },
  { id = 4, status = "paid" },
]
expect = [{ order_id = 1, status = "PAID", amount = "9.9" }]
quarantine = [
  { key = 3, reason = "transform.cast", column = "amount" },
  { key = "4", reason = "constraint.not_null" },
]
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "models").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "models" / "sales.sql").write_text(SALES)
    (tmp_path / "headrace.toml").write_text('[source.shop]\nurl = "${env:NO_SUCH_URL}"\n')
    return load_project(tmp_path, secrets=False)


def write(project: Project, cases: str, schema: str = SCHEMA, model: str = "sales", name: str = "t") -> None:
    (project.root / "tests" / f"{name}.toml").write_text(f'model = "{model}"\n{schema}\n{cases}')


def problems(project: Project, code: int = 1) -> list[str]:
    done = here("test", "--json", cwd=project.root)
    assert done.code == code, done
    return [problem for outcome in done.objects() for problem in outcome["problems"]]


def test_a_test_that_passes(project: Project) -> None:
    write(project, GOOD)
    done = here("test", cwd=project.root)
    assert done.code == 0
    assert "ok   tests/t.toml:7 amounts are numbers, drafts are left out\n1 test, 0 failed." in done.out


def test_of_two_rows_with_one_key_the_second_is_a_record(project: Project) -> None:
    keyed = SALES.replace('key = ["order_id"]', 'key = ["status"]')
    assert keyed != SALES
    (project.root / "models" / "sales.sql").write_text(keyed)
    given = """
[[test]]
name = "one row per status"
given = [
  { id = 1, status = "paid", amount = 1 },
  { id = 2, status = "paid", amount = 2 },
  { id = 3, status = "sent", amount = 3 },
]
expect = [
  { order_id = 1, status = "PAID", amount = "1" },
  { order_id = 3, status = "SENT", amount = "3" },
]
quarantine = [{ key = 2, reason = "constraint.unique", column = "status" }]
"""
    write(project, given)
    assert problems(project, code=0) == []


def test_without_tests_and_with_an_unknown_name(project: Project) -> None:
    assert "No tests" in here("test", cwd=project.root).out
    write(project, GOOD)
    assert 'Did you mean "t"' in here("test", "tt", cwd=project.root).err
    for name in ("t", "sales"):
        assert here("test", name, cwd=project.root).out.endswith("1 test, 0 failed.\n")


@pytest.mark.parametrize(
    ("was", "now", "problem"),
    [
        ('"9.9"', '"9.8"', "order_id=1: amount is 9.90, expected 9.80"),
        ('"PAID"', '"paid"', 'order_id=1: status is "PAID", expected "paid"'),
        ("order_id = 1", "order_id = 5", 'missing: order_id=5 status="PAID" amount=9.90'),
        ("{ order_id = 1", "{ order_id = 9 }, { order_id = 1", "missing: order_id=9 status=null amount=null"),
        ('status = "draft"', 'status = "x", amount = 1', 'unexpected: order_id=2 status="X" amount=1.00'),
        (', amount = "9.9"', "", "order_id=1: amount is 9.90, expected null"),
        ("transform.cast", "constraint.check", "quarantine, missing: key 3 constraint.check amount"),
        ("key = 3", "key = 5", "quarantine, missing: key 5 transform.cast amount"),
        ('amount = "free"', 'amount = "1"', "quarantine, missing: key 3 transform.cast amount"),
        ('amount = "9.9"', 'amount = "x"', "expected row 1 does not fit the model's types"),
        ('amount = "9.9"', "total = 1", "The model has no output column total."),
        ("{ id = 2,", "{ ide = 2,", 'no column ide. Did you mean "id"?'),
        ("{ id = 2,", "{", "Given row 2: it lacks id, which the table's key has."),
    ],
)
def test_a_test_that_fails_says_how(project: Project, was: str, now: str, problem: str) -> None:
    assert was in GOOD
    write(project, GOOD.replace(was, now, 1))
    found = problems(project)
    assert any(problem in line for line in found), found


def test_changes_in_their_order_and_cells_that_were_not_sent(project: Project) -> None:
    write(
        project,
        """
[[test]]
given = [
  { id = 1, status = "new", amount = 1 },
  { _op = "u", id = 1, status = "paid", _unchanged = ["amount"] },
  { id = 2, status = "new", amount = 2 },
  { _op = "d", id = 2 },
  { id = 3, status = "new", amount = 3 },
  { _op = "u", id = 4, status = "new", amount = 3, _before = { id = 3 } },
  { _op = "u", id = 9, status = "new", _unchanged = ["amount"] },
]
expect = [{ order_id = 1, amount = 1 }, { order_id = 4, amount = 3 }]
columns = ["order_id", "amount"]
quarantine = [{ key = 9, reason = "decode.unchanged" }]
""",
    )
    assert problems(project, 0) == []


def test_a_truncate_and_a_time_of_commit(project: Project) -> None:
    (project.models / "sales.sql").write_text(
        "SELECT id::INT AS id, _committed_at AS at FROM raw.shop.orders WHERE _op <> 'r'"
    )
    write(
        project,
        """
[[test]]
given = [
  { id = 1 },
  { _op = "t" },
  { id = 2, _committed_at = 2026-01-31T12:00:00Z },
  { id = 3, _op = "r" },
]
expect = [{ id = 2, at = "2026-01-31 13:00:00+01" }]
""",
    )
    assert problems(project, 0) == []


def test_rows_of_a_table_without_a_key_and_keys_of_two_columns(project: Project) -> None:
    (project.models / "lines.sql").write_text(
        '/* headrace\nkey = ["a", "b"]\n*/\nSELECT a AS a, b::INT AS b, c::INT[] AS c FROM raw.shop.lines'
    )
    write(
        project,
        'name = "two"\n'.join(
            ["\n[[test]]\n", 'given = [{ a = "x", b = 1, c = "[1, 2]" }, { a = "y", b = 2, c = "z" }]\n']
        )
        + 'expect = [{ a = "x", b = 1, c = [1, 2] }]\nquarantine = [{ key = ["y", 2] }]\n',
        '[schema]\nkey = ["a", "b"]\ncolumns = { a = "text", b = "integer", c = "text" }\n',
        "lines",
    )
    (project.models / "visits.sql").write_text("SELECT page AS page FROM raw.shop.visits")
    write(
        project,
        '[[test]]\ngiven = [{ page = "a" }, { page = "a" }, { page = "b" }, { _op = "d", page = "b" }]\n'
        'expect = [{ page = "a" }, { page = "a" }]\n',
        '[schema]\ncolumns = { page = "text" }\n',
        "visits",
        "visits",
    )
    assert problems(project, 0) == []
    path = project.root / "tests" / "visits.toml"
    path.write_text(path.read_text().replace('[{ page = "a" }, { page = "a" }]', '[{ page = "a" }]'))
    assert problems(project) == ['unexpected: page="a"']


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model = ", "not valid TOML"),
        ("[[test]]\n", "does not say which model"),
        ('model = "sales"\n', "no [[test]]"),
        ('model = "sales"\nmodle = 1\n', 'unknown key "modle". Did you mean "model"?'),
        ('model = "sales"\n[[test]]\ngivne = []\n', 't.toml:2: unknown key "givne". Did you mean "given"?'),
        ('model = "sales"\n[[test]]\ngiven = [{ id = true }]\n', "given row 1: id is no text"),
        ('model = "sales"\n[[test]]\ngiven = [{ id = 2026-01-01 }]\n', "the text as Postgres writes it"),
        ('model = "sales"\n[[test]]\ngiven = [{ _op = "x", id = 1 }]\n', "_op is one of c, r, u, d, t"),
        ('model = "sales"\n[[test]]\nquarantine = [{ reason = "x" }]\n', "needs the row's key"),
        ('model = "sales"\n[schema]\ncolumns = ["id"]\n[[test]]\n', "columns are names with Postgres types"),
        (
            'model = "sales"\n[schema]\nkey = ["x"]\ncolumns = { id = "text" }\n[[test]]\n',
            "key lists columns",
        ),
        ('model = "slaes"\n[[test]]\n', 'There is no model "slaes". Did you mean "sales"?'),
        ('model = "sales"\n[[test]]\n', "The types of raw.shop.orders are not known."),
    ],
)
def test_a_file_that_is_not_what_it_should_be(project: Project, text: str, words: str) -> None:
    (project.root / "tests" / "t.toml").write_text(text)
    (found,) = problems(project)
    assert words in found


# ------------------------------------------------------------------------------------------- recorded

ORDERS = TableSchema(
    TableId("public", "orders"),
    (Column("id", "integer"), Column("status", "text"), Column("amount", "text")),
    ("id",),
)


def test_what_is_recorded_is_read_back_whatever_it_is_called(project: Project) -> None:
    odd = TableSchema(
        TableId("sales", 'a "b" \\ c.d\n\x7f'),
        (Column("naïve col\tumn", "numeric(12,2)"), Column("ünï", "t[]")),
        (),
    )
    shapes = {ORDERS.table: ORDERS, odd.table: odd}
    path = write_shapes(project, "shop", shapes)
    assert read_shapes(project, "shop") == shapes
    first = path.read_text()
    write_shapes(project, "shop", dict(reversed(shapes.items())))
    assert path.read_text() == first
    promises = {"sales": Promise(("id",), {"id": ("BIGINT", True), "x y": ("STRUCT(a INTEGER)", False)})}
    assert read_promises(project) is None
    write_promises(project, promises)
    assert read_promises(project) == promises
    path.write_text("[orders]\nkey = 1\n")
    assert "Record it again" in here("ci", cwd=project.root).err


def test_what_breaks_and_what_does_not() -> None:
    was = Promise(("id",), {"id": ("BIGINT", True), "a": ("VARCHAR", False)})
    wider = Promise(("id",), {**was.columns, "b": ("VARCHAR", False), "a": ("VARCHAR", True)})
    assert list(breaking("m", was, was)) == list(breaking("m", was, wider)) == []
    assert list(breaking("m", was, None)) == ["model m is gone"]
    now = Promise(("a",), {"id": ("INTEGER", False)})
    assert list(breaking("m", was, now)) == [
        "model m: column id is INTEGER, and was BIGINT",
        "model m: column id may be null now, and was NOT NULL",
        "model m: column a is gone",
        "model m: its key is ['a'], and was ['id']",
    ]


def lock(project: Project) -> None:
    write_shapes(project, "shop", {ORDERS.table: ORDERS})
    columns = {"order_id": ("BIGINT", True), "status": ("VARCHAR", False), "amount": ("DECIMAL(12,2)", True)}
    write_promises(project, {"sales": Promise(("order_id",), columns)})


@pytest.mark.parametrize(
    ("was", "now", "words"),
    [
        ("upper(status)", "upper(state)", 'Referenced column "state" not found'),
        ("SELECT", "SELECT DISTINCT", "no DISTINCT"),
        ("raw.shop.orders", "raw.shop.order", 'Did you mean "orders"'),
        ("raw.shop.orders", "raw.other.orders", "there is no [source.other]"),
        (", upper(status) AS status", "", "model sales: column status is gone"),
        ("upper(status)", "length(status)", "column status is BIGINT, and was VARCHAR"),
        (" NOT NULL", "", "column amount may be null now, and was NOT NULL"),
    ],
)
def test_ci_fails_in_words(project: Project, was: str, now: str, words: str) -> None:
    lock(project)
    write(project, GOOD, schema="")
    done = here("ci", cwd=project.root)
    assert (done.code, done.out.splitlines()[0]) == (0, "ok   models/sales.sql"), done
    path = project.models / "sales.sql"
    assert was in SALES
    path.write_text(SALES.replace(was, now))
    done = here("ci", cwd=project.root)
    assert done.code == 1
    assert words in done.out


def test_ci_fails_on_a_test_and_on_a_model_that_is_gone_and_takes_additions(project: Project) -> None:
    lock(project)
    path = project.models / "sales.sql"
    path.write_text(SALES.replace("upper(status) AS status", "upper(status) AS status, amount AS raw_amount"))
    (project.models / "more.sql").write_text("SELECT id AS id FROM raw.shop.orders")
    assert here("ci", cwd=project.root).code == 0
    write(project, GOOD, schema="")
    done = here("ci", "--json", cwd=project.root)
    assert done.code == 1
    answer = json.loads(done.out)
    assert not answer["ok"]
    assert "raw_amount" in answer["tests"][0]["problems"][0]
    path.unlink()
    assert "model sales is gone" in here("ci", cwd=project.root).out


def test_ci_needs_what_is_recorded(project: Project) -> None:
    done = here("ci", cwd=project.root)
    assert done.code == 1
    assert "schemas/shop.toml is not there. Record it where the pipeline runs" in done.out
    assert "No source has run yet" in here("ci", "--record", cwd=project.root).err


def test_ci_binds_marts_to_what_their_models_put_out(project: Project) -> None:
    orders = TableSchema(
        TableId("public", "orders"),
        (Column("id", "integer"), Column("status", "text"), Column("amount", "text")),
        ("id",),
    )
    customers = TableSchema(TableId("public", "customers"), (Column("id", "integer"),), ("id",))
    write_shapes(project, "shop", {orders.table: orders, customers.table: customers})
    write_promises(project, {"totals": Promise((), {"n": ("BIGINT", False), "amount": ("DOUBLE", False)})})
    marts = {
        "totals": "SELECT count(*) AS n, sum(amount)::DECIMAL(18,2) AS amount FROM doubled",
        "doubled": "SELECT order_id, amount * 2 AS amount FROM sales, shop.customers WHERE id = order_id",
        "theirs": "SELECT * FROM sales JOIN their_own_table USING (order_id)",
        "wrong": "SELECT no_such_column FROM sales",
        "a": "SELECT 1 AS x FROM b",
        "b": "SELECT 1 AS x FROM a",
    }
    for name, text in marts.items():
        (project.root / "models" / f"{name}.sql").write_text(text)
    done = here("ci", "--json", cwd=project.root)
    found = {model["model"]: model for (report,) in [done.objects()] for model in report["models"]}
    assert done.code == 1
    assert found["totals"]["breaks"] == ["model totals: column amount is DECIMAL(18,2), and was DOUBLE"]
    assert not found["doubled"]["problems"]
    assert not found["doubled"]["unbound"]
    assert "their_own_table" in found["theirs"]["unbound"]
    assert not found["theirs"]["problems"]
    assert "no_such_column" in found["wrong"]["problems"][0]
    assert all("reads itself" in found[name]["problems"][0] for name in "ab")


MART_TEST = """
model = "per_customer"
tables = { regions = { customer = "INTEGER", region = "VARCHAR" } }

[[test]]
name = "paid per region"
given.sales = [
  { order_id = 1, amount = 9.90 },
  { order_id = 2, amount = "0.10" },
]
given.regions = [{ customer = 1, region = "north" }, { customer = 2, region = "north" }]
expect = [{ region = "north", amount = 10 }]
"""


def test_a_mart_is_tested_over_rows_of_the_tables_that_it_reads(project: Project) -> None:
    raw = '[orders]\nkey = ["id"]\n[orders.columns]\nid = "integer"\nstatus = "text"\namount = "text"\n'
    (project.root / "schemas").mkdir()
    (project.root / "schemas" / "shop.toml").write_text(raw)
    (project.root / "models" / "per_customer.sql").write_text(
        "SELECT region, sum(amount) AS amount FROM sales JOIN regions ON customer = order_id GROUP BY region"
    )
    place = project.root / "tests" / "m.toml"
    place.write_text(MART_TEST)
    assert problems(project, code=0) == []
    place.write_text(MART_TEST.replace("amount = 10 ", "amount = 11 "))
    assert problems(project) == ['region="north": amount is 10.00, expected 11.00']
    place.write_text(MART_TEST.replace("order_id = 1", "order = 1"))
    assert 'it has no column order. Did you mean "order_id"?' in problems(project)[0]
    place.write_text(MART_TEST.replace('"0.10"', '"free"'))
    assert "given row of sales 2 does not fit" in problems(project)[0]
    place.write_text(MART_TEST.replace("regions =", "areas ="))
    assert "regions" in problems(project)[0]
    place.write_text(MART_TEST + "quarantine = [{ key = 1 }]\n")
    assert "has no quarantine" in problems(project)[0]
