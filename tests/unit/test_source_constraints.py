"""Constraints that models take over from the source: what is kept, and what is left out and told of."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from entries import schema
from family import Family, put, shape_of
from headrace.authoring.recorded import read_shapes, write_shapes
from headrace.change import Column, Constraint, TableId, TableSchema
from headrace.config import load_project
from headrace.defaults import ModelDefaults
from headrace.evolution import Evolution
from headrace.staging.timeline import timeline
from headrace.transform.header import file_version
from headrace.transform.linking import link
from headrace.transform.model import RowModel, bind, mirror
from headrace.transform.python.text import read_python
from headrace.transform.source_checks import Cell, Unlike, duckdb_condition
from headrace.transform.sql import read_model

SOURCE = ModelDefaults("source")
PARENT = TableId("public", "customers")
FOREIGN = Constraint("foreign_key", "orders_customer_fkey", ("customer_id",), "", PARENT, ("id",))
POSITIVE = Constraint("check", "orders_amount_check", ("amount",), "(amount > (0)::numeric)")
CODE = Constraint("unique", "orders_code_key", ("code",))
NOTED = Constraint("not_null", "note not null", ("note",))
CUSTOMERS = shape_of("customers", "name")
ORDERS = TableSchema(
    TableId("public", "orders"),
    (
        Column("id", "bigint"),
        Column("customer_id", "bigint"),
        Column("amount", "numeric(12,2)"),
        Column("code", "text"),
        Column("note", "text"),
    ),
    ("id",),
    constraints=(POSITIVE, FOREIGN, NOTED, CODE),
)
SQL = """/* headrace
constraints = "source"
*/
SELECT id::BIGINT AS order_id, customer_id::BIGINT AS customer, amount::DECIMAL(12,2) AS amount, code, note
FROM raw.shop.orders"""


def order(key: str, customer: str | None = None, amount: str = "1", **more: str | None) -> tuple:
    cells = {"code": f"c{key}", "note": "n", **more}
    return put("orders", key, customer_id=customer, amount=amount, **cells)


def bound(folder: Path, text: str = SQL, shape: TableSchema = ORDERS, more: object = None) -> RowModel:
    path = folder / "orders.sql"
    path.write_text(text)
    return bind(read_model(path), shape)


def test_rows_are_held_to_what_the_source_holds_them_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shop = Family(tmp_path, [CUSTOMERS, ORDERS], {"orders": SQL})
    shop.takes(order("1", "7"), order("2", amount="-1"), order("3", note=None), order("4"), order("5"))
    shop.takes(order("5", code="c4"), order("6", code=None), order("7", code=None))
    assert shop.keys("orders") == ["4", "5", "6", "7"]
    records = {
        ("1", "constraint.foreign_key", "customer", "waiting"),
        ("2", "constraint.check", "amount", "quarantined"),
        ("3", "constraint.not_null", "note", "quarantined"),
        ("5", "constraint.unique", "code", "quarantined"),
    }
    ask = "SELECT key, reason, columns, status FROM headrace.quarantine WHERE status <> 'resolved'"
    assert set(shop.ask(ask)) == records
    named = "SELECT waiting_on ->> 'constraint' FROM headrace.quarantine WHERE waiting_on IS NOT NULL"
    assert shop.ask(named) == [("orders_code_key",), ("orders_customer_fkey",)]
    shop.verified()
    shop.takes(put("customers", "7", name="Ada"), order("4", code="other"))
    assert (shop.keys("orders"), len(shop.opened())) == (["1", "4", "5", "6", "7"], 2)
    shop.verified()
    # The source drops all of them, while some rows that they stand against are there.
    shop.takes(order("8", "9"), order("9", code="c4"), order("10", amount="-5"))
    assert len(shop.opened()) == 5
    (was,) = (model for model in shop.lane.models() if model.name == "orders")
    shop.becomes(replace(ORDERS, version=2, constraints=()))
    with caplog.at_level(logging.INFO, "headrace"):
        shop.bring()
        shop.lane.redriver.close()  # which waits for what was tried
    (now,) = (model for model in shop.lane.models() if model.name == "orders")
    assert was.version != now.version == file_version(was.version)
    # What waits for others passes by itself; of the rest it is told that it would.
    assert [key for _, key, _ in shop.opened()] == ["10", "2", "3"]
    assert "open records of model orders would pass under its new version" in caplog.text
    shop.reopen()
    assert shop.lane.redrive("orders", ["2", "3", "10"])["resolved"] == 3
    shop.verified()
    shop.becomes(replace(ORDERS, version=3, constraints=(CODE, FOREIGN)))
    shop.bring()
    assert shop.opened() == [("orders", "8", "waiting")], "a foreign key holds of all rows at once"
    events = timeline(shop.lane.staging, ORDERS.table, shop.lane.staging.through())
    told = [event.what for event in events if event.kind == "constraints"]
    assert told[1] == "orders_code_key added; orders_customer_fkey added"
    shop.lane.close()


def test_a_mirror_keeps_them_too_where_the_project_says_so(tmp_path: Path) -> None:
    more = '[models]\nconstraints = "source"\n[destination]\ntype = "duckdb"\n'
    shop = Family(tmp_path, [CUSTOMERS, ORDERS], {}, more)
    shop.takes(order("1", "7"), order("2", amount="0"), order("3"))
    assert shop.keys("shop.orders") == ["3"]
    assert shop.opened() == [("shop.orders", "1", "waiting"), ("shop.orders", "2", "quarantined")]
    shop.takes(put("customers", "7", name="Ada"))
    assert shop.keys("shop.orders") == ["1", "3"]
    shop.verified()
    shop.lane.close()


@pytest.mark.parametrize(
    ("constraint", "model", "words"),
    [
        (replace(POSITIVE, beyond="not validated"), SQL, "it is not validated"),
        (CODE, SQL.replace(" code,", " lower(code) AS code,"), "no output of orders is code"),
        (
            CODE,
            SQL.replace(" code,", " code::INTEGER AS code,"),
            "code does not tell all values of code apart",
        ),
        (CODE, SQL.replace("*/", 'materialize = "history"\n*/'), "the model keeps rows of the past"),
        (POSITIVE, SQL.replace("DECIMAL(12,2)", "VARCHAR"), "the output amount is VARCHAR"),
        (replace(POSITIVE, expression="(amount > f(amount))"), SQL, "f is not known to be the same"),
        (
            NOTED,
            SQL.replace("*/", "[contract]\nnote = \"CHECK (note <> '') ON VIOLATION null\"\n*/"),
            "nulls note",
        ),
        (replace(FOREIGN, references=TableId("public", "gone")), SQL, "public.gone is not captured"),
        (replace(FOREIGN, to=("name",)), SQL, "customer is BIGINT, and shop.customers.name is VARCHAR"),
        (replace(FOREIGN, to=("mail",)), SQL, "no output of shop.customers is mail"),
    ],
)
def test_what_cannot_be_kept_is_left_out_and_told(
    tmp_path: Path, constraint: Constraint, model: str, words: str
) -> None:
    orders = bound(tmp_path, model, replace(ORDERS, constraints=(constraint,)))
    found = link([orders, mirror("shop", CUSTOMERS)], {})
    assert not found.faults
    (left_out,) = found.models[0].left_out
    assert left_out.startswith(constraint.name)
    assert words in left_out
    assert (found.models[0].checks, found.models[0].unique, found.models[0].references) == (
        tuple(check for check in orders.checks if check.on_violation == "null"), (), (),
    )  # fmt: skip


def test_a_foreign_key_refers_to_the_model_that_keeps_constraints_or_to_the_only_one(tmp_path: Path) -> None:
    orders = bound(tmp_path)
    parents = [
        replace(mirror("shop", CUSTOMERS), name=name, constraints=constraints)
        for name, constraints in (("a", "own"), ("b", "own"), ("c", "source"))
    ]
    for chosen, parent in ((parents[:1], "a"), (parents, "c")):
        (reference,) = link([orders, *chosen], {}).models[0].references
        assert (reference.name, reference.columns, reference.parent) == (FOREIGN.name, ("customer",), parent)
    (left_out,) = link([orders, *parents[:2]], {}).models[0].left_out
    assert "may refer to any of a, b" in left_out
    # One that does not bind now is not looked at, and nothing that waits for it is let go.
    path = tmp_path / "customers.sql"
    path.write_text("SELECT id FROM raw.shop.customers")
    away = link([orders], {"customers": read_model(path)}, {"customers"}).models[0]
    assert (away.foreign_keys, away.references, away.left_out) == ((FOREIGN.name,), (), ())


def test_what_the_model_says_itself_goes_first(tmp_path: Path) -> None:
    own = '[[foreign_key]]\ncolumns = ["customer"]\nreferences = "shop.customers"\nto = ["id"]\nname = "mine"'
    said = (
        f'key = ["code"]\non_violation = "null"\n{own}\n[contract]\nnote = "NOT NULL ON VIOLATION warn"\n*/'
    )
    model = bound(tmp_path, SQL.replace("*/", said))
    assert [(check.column, check.on_violation) for check in model.checks] == [
        ("code", "quarantine"), ("note", "warn"), ("amount", "null"),
    ]  # fmt: skip
    assert [key.columns for key in model.unique] == [("code",)]
    assert (model.foreign_keys, model.source_keys, model.left_out) == (("mine",), (), ())


def test_outputs_of_python_stand_for_the_columns_of_their_names(tmp_path: Path) -> None:
    path = tmp_path / "orders.py"
    path.write_text(
        "from dataclasses import dataclass\nimport headrace\n"
        "@dataclass\nclass Order:\n    order_id: int\n    code: str\n    note: str | None\n\n"
        '@headrace.model(reads="raw.shop.orders", key=["order_id"], constraints="source")\n'
        "def orders(row: headrace.Row) -> Order:\n    "
        'return Order(int(row["id"]), row["code"], row["note"])\n'
    )
    model = bind(read_python(path), ORDERS)
    assert ("note", "") in [(check.column, check.expression) for check in model.checks]
    assert [key.columns for key in model.unique] == [("code",)]
    assert len(model.left_out) == 2
    model.python and model.python.close()


def test_shapes_carry_constraints_and_older_ones_are_read(tmp_path: Path) -> None:
    assert TableSchema.from_json(ORDERS.to_json()) == ORDERS
    old = replace(ORDERS, constraints=())
    without = old.to_json().replace('"constraints": [], ', "")
    assert '"constraints"' not in without
    assert TableSchema.from_json(without) == old
    assert not old.agrees(ORDERS)
    follows = Evolution(old, old).follow(replace(ORDERS, version=2), lambda _: "suspend")
    assert (follows.raw.constraints, follows.awaits) == (ORDERS.constraints, "")
    (tmp_path / "headrace.toml").write_text('[source.shop]\nurl = "postgresql://u@h:1/d"\n')
    project = load_project(tmp_path)
    odd = Constraint("check", 'a "b"', ("code", "note"), "(code <> '\\'::text)", beyond="not validated")
    shape = replace(ORDERS, constraints=(*ORDERS.constraints, odd))
    write_shapes(project, "shop", {ORDERS.table: shape})
    assert read_shapes(project, "shop") == {ORDERS.table: shape}


CELLS = {
    name: Cell(Column(name, source), name, type_)
    for name, source, type_ in (
        ("n", "integer", "BIGINT"),
        ("m", "numeric(9,4)", "DECIMAL(9,4)"),
        ("t", "text", "VARCHAR"),
        ("b", "boolean", "BOOLEAN"),
        ("at", "timestamp with time zone", "TIMESTAMP WITH TIME ZONE"),
        ("d", "date", "DATE"),
        ("c", "character(3)", "VARCHAR"),
    )
}


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("(t > 'a'::text)", "collation"),
        ("(lower(t) = t)", "lower"),
        ("(t ~~* 'a%'::text)", "ilike"),
        ("(t ~~ 'a\\%'::text)", "pattern"),
        ("(t ~ '^[[:alpha:]]+$'::text)", "pattern"),
        ("(t ~ '\\m'::text)", "pattern"),
        ("(t ~ n::text)", "pattern"),
        ("((n)::text = t)", "a cast to"),
        ("(c = 'ab'::bpchar)", "character(3)"),
        ("((n / 2) > 1)", "div"),
        ("(at < now())", "currenttimestamp"),
        ("((at)::date = d)", "a cast to DATE"),
        ("(t = 'x'::mood)", "a cast to"),
        ("((t)::character varying(1) = 'x'::text)", "a cast to"),
        ("(m > 'NaN'::numeric)", "a cast to"),
        ("(n = t)", "number against text"),
        ("(n)", "no condition"),
        ("(n > ", "parsed"),
    ],
)
def test_a_condition_that_may_mean_another_thing_is_not_taken(expression: str, words: str) -> None:
    with pytest.raises(Unlike, match=words.replace("(", r"\(").replace(")", r"\)")):
        duckdb_condition(expression, CELLS)


def test_a_schema_entry_brings_constraints_into_staging(tmp_path: Path) -> None:
    shop = Family(tmp_path, [CUSTOMERS, replace(ORDERS, constraints=())], {"orders": SQL})
    shop.bring()
    shop.lane.log.append([schema(20, replace(ORDERS, version=2))])
    shop.bring()
    shop.reopen()
    (model,) = (each for each in shop.lane.models() if each.name == "orders")
    assert [key.name for key in model.unique] == [CODE.name]
    shop.lane.close()
