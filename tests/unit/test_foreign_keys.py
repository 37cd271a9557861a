"""Foreign keys between models: what refers to a row that is not there waits for it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from family import Family, gone, put, shape_of
from headrace.decisions import Decided, Decision
from headrace.errors import ModelError
from headrace.sources.postgres.tables import TableStates
from headrace.transform.sql import read_model

CUSTOMERS = shape_of("customers", "name")
ORDERS = shape_of("orders", "customer_id", "amount")
ORDERS_SQL = """/* headrace
key = ["order_id"]
orphan_after = "{after}"
[[foreign_key]]
columns = ["customer_id"]
references = "shop.customers"
*/
SELECT id::BIGINT AS order_id, customer_id::BIGINT AS customer_id, amount::INTEGER AS amount
FROM raw.shop.orders"""


@pytest.fixture
def shop(tmp_path: Path) -> Family:
    family = Family(tmp_path, [CUSTOMERS, ORDERS], {"orders": ORDERS_SQL.format(after="15m")})
    family.bring()
    return family


def order(key: str, customer: str | None, amount: str = "1") -> tuple:
    return put("orders", key, customer_id=customer, amount=amount)


def test_a_child_waits_for_its_parent(shop: Family) -> None:
    shop.takes(order("1", "7"), order("2", None))
    assert shop.keys("orders") == ["2"]
    assert shop.opened() == [("orders", "1", "waiting")]
    (record,) = shop.ask("SELECT stage, reason, columns, message, waiting_on FROM headrace.quarantine")
    assert record == (
        "constraint",
        "constraint.foreign_key",
        "customer_id",
        "customer_id: shop.customers has no such row",
        '{"constraint":"customer_id_fkey","model":"shop.customers","columns":["id"],"values":["7"],"key":"7"}',
    )
    shop.verified()
    shop.takes(put("customers", "7", name="Ada"))
    assert shop.keys("orders") == ["1", "2"]
    assert shop.opened() == []
    shop.verified()


def test_a_row_that_changed_often_is_refused_at_once(shop: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts, apply = [], shop.lane.destination.apply
    monkeypatch.setattr(shop.lane.destination, "apply", lambda work: (attempts.append(work), apply(work))[1])
    shop.commits(put("customers", "6", name="Bob"), order("1", "6", "5"))
    for n in range(40):
        shop.commits(order("1", "7", str(n)))
    shop.bring()
    assert len(attempts) <= 3  # and not one for each change
    assert shop.ask("SELECT customer_id, amount FROM orders") == [(6, 5)]
    assert len(shop.opened()) == 40
    shop.verified()


def test_a_parent_that_goes_takes_no_row_for_granted(shop: Family) -> None:
    shop.takes(put("customers", "7", name="Ada"), order("1", "7"), order("2", "7", "5"))
    shop.takes(order("2", "7", "6"))
    shop.takes(gone("customers", "7"))
    assert (shop.keys("orders"), len(shop.opened())) == ([], 3)
    shop.verified()
    shop.takes(put("customers", "7", name="Eve"))
    assert (shop.keys("orders"), shop.opened()) == (["1", "2"], [])
    shop.verified()
    # In the source's own order nothing waits.
    shop.takes(gone("orders", "1"), gone("orders", "2"), gone("customers", "7"))
    assert (shop.keys("orders"), shop.opened()) == ([], [])
    shop.verified()


NODES = shape_of("nodes", "parent_id", "v")
NODES_SQL = """/* headrace
key = ["id"]
orphan_after = "{after}"
[contract]
v = "INTEGER"
[[foreign_key]]
columns = ["parent_id"]
references = "nodes"
*/
SELECT id::BIGINT AS id, parent_id::BIGINT AS parent_id, v AS v FROM raw.shop.nodes"""


@pytest.fixture
def tree(tmp_path: Path) -> Family:
    family = Family(tmp_path, [NODES], {"nodes": NODES_SQL.format(after="15m")})
    family.bring()
    return family


def node(key: str, parent: str | None, v: str = "1") -> tuple:
    return put("nodes", key, parent_id=parent, v=v)


def test_a_chain_in_the_wrong_order_comes_with_its_first(tree: Family) -> None:
    for n in range(6, 1, -1):
        tree.takes(node(str(n), str(n - 1)))
    assert tree.keys("nodes") == []
    assert {status for _, _, status in tree.opened()} == {"waiting"}
    tree.takes(node("1", None))
    assert (tree.keys("nodes"), tree.opened()) == (["1", "2", "3", "4", "5", "6"], [])
    tree.verified()
    # Its first goes, and with it all that hangs on it, in the same transaction.
    tree.takes(gone("nodes", "1"))
    assert tree.keys("nodes") == []
    assert len(tree.opened()) == 5
    tree.verified()
    tree.takes(node("1", "1"))
    assert (len(tree.keys("nodes")), tree.opened()) == (6, [])
    tree.verified()


def test_rows_that_need_each_other_pass_together(tree: Family) -> None:
    tree.takes(node("1", "2"), node("2", "1"), node("3", "3"))
    assert (tree.keys("nodes"), tree.opened()) == (["1", "2", "3"], [])
    # In different slices, and with one that hangs on them, and one that nothing helps.
    tree.takes(node("4", "6"), node("7", "4"), node("8", "9"))
    tree.takes(node("5", "4"))
    assert (len(tree.keys("nodes")), len(tree.opened())) == (3, 4)
    tree.takes(node("6", "5"))
    assert tree.keys("nodes") == [str(n) for n in range(1, 8)]
    assert tree.opened() == [("nodes", "8", "waiting")]
    tree.verified()


def test_a_change_that_cannot_stand_leaves_its_row_where_it_was(tree: Family) -> None:
    tree.takes(node("1", None), node("2", "1", "5"))
    tree.takes(node("2", "9", "6"), node("3", "2"))
    assert tree.ask("SELECT id, parent_id, v FROM nodes") == [(1, None, 1), (2, 1, 5), (3, 2, 1)]
    assert tree.opened() == [("nodes", "2", "waiting")]
    tree.verified()
    tree.takes(node("2", "1", "7"))
    assert tree.ask("SELECT status FROM headrace.quarantine") == [("superseded",)]
    tree.takes(node("4", "8"))
    tree.takes(gone("nodes", "4"))
    assert tree.opened() == []
    # The key of a parent changes: what hangs on the old one waits for it.
    tree.takes(("u", "nodes", "20", {"before": "2", "parent_id": "1", "v": "7"}))
    assert (tree.keys("nodes"), tree.opened()) == (["1", "20"], [("nodes", "3", "waiting")])
    tree.takes(("t", "nodes", "", {}))
    assert (tree.keys("nodes"), tree.opened()) == ([], [])
    tree.verified()


def test_any_history_comes_to_what_the_source_is_once_nothing_is_missing(tmp_path: Path) -> None:
    chance = random.Random(1)
    tree = Family(tmp_path, [NODES], {"nodes": NODES_SQL.format(after="15m")})
    state: dict[str, str | None] = {}
    for _ in range(8):
        rows = []
        for _ in range(chance.randint(1, 6)):
            key, parent = str(chance.randint(1, 9)), chance.choice([None, *map(str, range(1, 10))])
            if key in state and chance.random() < 0.25:
                rows.append(gone("nodes", key))
                del state[key]
            elif key in state and (new := str(chance.randint(1, 9))) not in state and chance.random() < 0.3:
                rows.append(("u", "nodes", new, {"before": key, "parent_id": parent, "v": "1"}))
                del state[key]
                state[new] = parent
            else:
                rows.append(node(key, parent))
                state[key] = parent
        tree.commits(*rows)
        if chance.random() < 0.7:
            tree.bring()
            tree.verified()
            idle = "status = 'waiting' AND waiting_on ->> 'key' IN (SELECT _source_key FROM nodes)"
            assert tree.ask(f"SELECT key FROM headrace.quarantine WHERE {idle}") == []
    missing = {parent for parent in state.values() if parent is not None} - state.keys()
    tree.takes(node("10", None), *(node(key, "10") for key in missing))
    state |= dict.fromkeys(missing, "10") | {"10": None}
    found = {
        str(key): None if up is None else str(up) for key, up in tree.ask("SELECT id, parent_id FROM nodes")
    }
    assert (found, tree.opened()) == (state, [])
    tree.verified()


def test_a_parent_in_quarantine_has_its_children_in_its_issue(tree: Family) -> None:
    tree.takes(node("1", None, "one"), node("2", "1"), node("3", "2"))
    tree.lane.waiting._looks_at = 0.0
    tree.bring()
    rows = tree.ask("SELECT key, status, issue FROM headrace.quarantine")
    assert [row[:2] for row in rows] == [("1", "quarantined"), ("2", "waiting"), ("3", "waiting")]
    assert len({issue for _, _, issue in rows}) == 1
    text = NODES_SQL.format(after="15m").replace("v AS v", "TRY_CAST(v AS INTEGER) AS v")
    (tree.folder / "models" / "nodes.sql").write_text(text)
    assert tree.lane.redrive("nodes", ["1"])["resolved"] == 1
    tree.bring()
    assert (tree.keys("nodes"), tree.opened()) == (["1", "2", "3"], [])
    tree.verified()


def test_what_waits_too_long_is_an_orphan_and_still_applied(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = Family(tmp_path, [NODES], {"nodes": NODES_SQL.format(after="0s")})
    for n in range(10, 50, 10):
        tree.takes(*(node(str(i), "1") for i in range(n, n + 10)))
        tree.takes(*(node(str(100 + i), str(i)) for i in range(n, n + 10)))
    tree.lane.waiting._looks_at = 0.0
    tree.bring()
    found = {(status, key) for _, key, status in tree.opened()}
    assert found == {("quarantined", str(n)) for n in range(10, 50)} | {
        ("waiting", str(100 + n)) for n in range(10, 50)
    }
    assert len(tree.ask("SELECT DISTINCT issue FROM headrace.quarantine")) == 1
    assert sum("NEW CAUSE" in message for message in caplog.messages) == 1
    tree.verified()
    tree.takes(node("60", "1"))
    tree.lane.waiting._looks_at = 0.0
    tree.bring()
    assert sum("NEW CAUSE" in message for message in caplog.messages) == 1
    tree.takes(node("1", None))
    assert (len(tree.keys("nodes")), tree.opened()) == (82, [])
    tree.verified()


def test_looking_for_what_waits_too_long_changes_nothing_where_nothing_does(shop: Family) -> None:
    shop.takes(order("1", "7"))
    destination = shop.lane.destination
    before = destination.commits
    shop.lane.waiting._looks_at = 0.0
    shop.bring()
    assert shop.lane.waiting._looks_at > 0.0, "it has looked"
    assert destination.commits == before  # else readers would get a new copy every few seconds


@pytest.mark.parametrize("is_paused", [False, True])
def test_a_decision_that_takes_a_parent_takes_no_row_for_granted(shop: Family, is_paused: bool) -> None:
    shop.takes(put("customers", "7", name="Ada"))
    change = Decided(0, shop.commit, 1, shop.lane.log.end().offset, "7")
    shop.takes(order("1", "7"))
    tables = TableStates(shop.lane.log)
    tables.move([shape.table for shape in (CUSTOMERS, ORDERS)], "live")
    tables.pause([ORDERS.table], is_paused)
    shop.lane.decide(Decision("discard", "shop.customers", (change,), "ada", "so"))
    shop.bring()
    assert (shop.keys("shop.customers"), shop.keys("orders")) == ([], ["1"] if is_paused else [])
    tables.pause([ORDERS.table], False)  # judged once it goes on
    shop.bring()
    assert (shop.keys("orders"), shop.opened()) == ([], [("orders", "1", "waiting")])
    shop.verified()


def test_what_waits_and_is_redriven_counts_for_the_bound_of_the_quarantine(tmp_path: Path) -> None:
    model = ORDERS_SQL.format(after="15m")
    shop = Family(tmp_path, [CUSTOMERS, ORDERS], {"orders": model}, "[quarantine]\nmax_records = 3\n")
    shop.takes(order("1", "7", "1"), order("2", None))
    shop.takes(order("1", "7", "x"))
    assert len(shop.opened()) == 2
    # Two changes of one key fail under the new version, of which only the last one did: both are counted.
    (tmp_path / "models" / "orders.sql").write_text(
        model.replace("amount::INTEGER", "(amount || 'y')::INTEGER")
    )
    shop.lane.redrive("orders", ["1", "2"])
    assert len(shop.opened()) == 3
    shop.takes(order("3", None))
    assert "max_records" in shop.lane.suspended()["orders"]


ITEMS = shape_of("items", "region", "v", key=("orderid", "line_id"))
STOCK = shape_of("stock", "item_orderid", "item_line_id")
_HEAD = '/* headrace\n[[foreign_key]]\ncolumns = ["{}"]\nreferences = "{}"\n{}*/\n'
_STOCK = "SELECT id::BIGINT AS id, {}item_line_id::{} AS line_id FROM raw.shop.stock"


def test_a_key_of_two_columns_is_one_and_a_part_that_is_null_refers_to_none(tmp_path: Path) -> None:
    head = _HEAD.format('order_id", "line_id', "shop.items", 'to = ["orderid", "line_id"]\n')
    shop = Family(
        tmp_path,
        [ITEMS, STOCK],
        {"stock": head + _STOCK.format("item_orderid::BIGINT AS order_id, ", "BIGINT")},
    )
    shop.takes(
        put("stock", "1", item_orderid="1", item_line_id="2"),
        put("stock", "2", item_orderid="1", item_line_id=None),
        put("items", "2,1"),
    )
    assert (shop.keys("stock"), shop.opened()) == (["2"], [("stock", "1", "waiting")])
    ((waits,),) = shop.ask("SELECT waiting_on ->> 'key' FROM headrace.quarantine")
    assert waits == '["1","2"]'
    shop.takes(put("items", "1,2"))
    assert (shop.keys("stock"), shop.opened()) == (["1", "2"], [])
    shop.verified()


@pytest.mark.parametrize(
    ("head", "type_", "words"),
    [
        (_HEAD.format("line_id", "shop.item", ""), "BIGINT", "is no model of source shop"),
        (_HEAD.format("line_id", "shop.items", ""), "BIGINT", "has 1 columns, and the key of shop.items is"),
        (_HEAD.format("line_id", "shop.items", 'to = ["lines"]\n'), "BIGINT", "which there is not"),
        (_HEAD.format("line_id", "shop.items", 'to = ["line_id"]\n'), "VARCHAR", "line_id is VARCHAR, and"),
        (_HEAD.format("line_id", "shop.items", 'to = ["line_id"]\n'), "DOUBLE", "cannot be held to agree"),
    ],
)
def test_a_foreign_key_that_cannot_be_kept_suspends_its_model_with_words(
    tmp_path: Path, head: str, type_: str, words: str
) -> None:
    shop = Family(tmp_path, [ITEMS, STOCK], {"stock": head + _STOCK.format("", type_)})
    shop.bring()
    (reason,) = shop.lane.suspended().values()
    assert words in reason


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ('foreign_key = "x"', "must be a list of tables"),
        ('[[foreign_key]]\ncolumns = ["nothing"]\nreferences = "x"', "which is no output column"),
        ('[[foreign_key]]\ncolumns = ["id"]', "needs columns and the model they refer to"),
        (
            '[[foreign_key]]\ncolumns = ["id"]\nreferences = "x"\nto = ["a", "b"]',
            "1 columns, and refers to 2",
        ),
        ('[[foreign_key]]\ncolumns = ["id"]\nreferences = "x"\nreferencs = "x"', "unknown key 'referencs'"),
        ('orphan_after = "soon"', "orphan_after"),
    ],
)
def test_what_is_no_foreign_key_is_refused(tmp_path: Path, more: str, words: str) -> None:
    path = tmp_path / "m.sql"
    path.write_text(f"/* headrace\n{more}\n*/ SELECT id::BIGINT AS id FROM raw.shop.t")
    with pytest.raises(ModelError, match=words):
        read_model(path)


def test_a_parent_that_is_away_puts_the_check_off(tmp_path: Path) -> None:
    customers = "/* headrace\nkey = ['id']\n*/ SELECT id::BIGINT AS id, {} AS name FROM raw.shop.customers"
    sql = ORDERS_SQL.format(after="15m").replace("shop.customers", "customers")
    shop = Family(tmp_path, [CUSTOMERS, ORDERS], {"orders": sql, "customers": customers.format("nothing")})
    shop.takes(order("1", "7"), order("2", "8"))
    assert (shop.keys("orders"), shop.opened()) == (["1", "2"], [])
    off = "SELECT name, unchecked_since IS NOT NULL FROM headrace.foreign_keys"
    (shop.folder / "models" / "customers.sql").write_text(customers.format("upper(name)"))
    shop.reopen()
    shop.takes(put("customers", "7", name="Ada"), order("3", "9"))
    assert (shop.keys("orders"), [key for _, key, _ in shop.opened()]) == (["1"], ["2", "3"])
    assert shop.ask(off) == [("customer_id_fkey", False)]
    shop.verified()
    # A rebuild of either makes all of its rows anew, and all references are judged.
    for model in ("customers", "orders"):
        assert shop.lane.rebuild(model)
        shop.bring()
        assert (shop.keys("orders"), [key for _, key, _ in shop.opened()]) == (["1"], ["2", "3"])
        assert shop.ask(off) == [("customer_id_fkey", False)]
        shop.verified()
    # What a parent's model missed takes its children along when it comes back, though they had no change.
    (shop.folder / "models" / "customers.sql").write_text(customers.format("nothing::INTEGER"))
    shop.reopen()
    shop.takes(gone("customers", "7"))
    assert "customers" in shop.lane.suspended()
    assert shop.keys("orders") == ["1"]
    (shop.folder / "models" / "customers.sql").write_text(customers.format("upper(name)"))
    shop.reopen()
    shop.bring()
    assert (shop.keys("orders"), [key for _, key, _ in shop.opened()]) == ([], ["1", "2", "3"])
    shop.verified()


def test_what_waits_for_a_parent_that_is_away_goes_on_waiting(tmp_path: Path) -> None:
    products, lines = shape_of("products", "name"), shape_of("orders", "customer_id", "product_id")
    sql = """/* headrace
key = ["id"]
[[foreign_key]]
columns = ["customer_id"]
references = "shop.customers"
[[foreign_key]]
columns = ["product_id"]
references = "shop.products"
*/
SELECT id::BIGINT AS id, customer_id::BIGINT AS customer_id, product_id::BIGINT AS product_id
FROM raw.shop.orders"""
    shop = Family(tmp_path, [CUSTOMERS, products, lines], {"orders": sql})
    shop.takes(put("customers", "1", name="Ada"), put("orders", "1", customer_id="1", product_id="5"))
    assert (shop.keys("orders"), shop.opened()) == ([], [("orders", "1", "waiting")])
    shop.lane.hold("shop.products", "month end")
    shop.bring()
    shop.takes(put("customers", "2", name="Bob"))
    assert (shop.keys("orders"), shop.opened()) == ([], [("orders", "1", "waiting")])
    shop.lane.release("shop.products")
    shop.takes(put("products", "5", name="pen"))
    assert (shop.keys("orders"), shop.opened()) == (["1"], [])
    shop.verified()


def test_what_waited_is_applied_when_its_model_has_no_foreign_key_any_more(shop: Family) -> None:
    shop.takes(order("1", "7"))
    assert shop.opened() == [("orders", "1", "waiting")]
    sql = ORDERS_SQL.format(after="15m")
    begin, end = sql.index("[[foreign_key]]"), sql.index("*/")
    (shop.folder / "models" / "orders.sql").write_text(sql[:begin] + sql[end:])
    shop.reopen()
    shop.bring()
    assert (shop.keys("orders"), shop.opened()) == (["1"], [])
    shop.verified()


def test_a_key_that_becomes_free_is_taken_by_who_waited_for_it(tmp_path: Path) -> None:
    sql = '/* headrace\nkey = ["name"]\n*/ SELECT name, id::BIGINT AS id FROM raw.shop.customers'
    shop = Family(tmp_path, [CUSTOMERS], {"customers": sql})
    shop.takes(put("customers", "1", name="Ada"), put("customers", "2", name="Ada"))
    assert (shop.keys("customers"), shop.opened()) == (["1"], [("customers", "2", "quarantined")])
    shop.takes(put("customers", "1", name="Eve"))
    assert (shop.keys("customers"), shop.opened()) == (["1", "2"], [])
    shop.verified()


PYTHON = """
from dataclasses import dataclass
import headrace

@dataclass
class Node:
    node: int
    up: int | None
    v: int

@headrace.model(
    reads="raw.shop.nodes", key=["node"], foreign_key=[{"columns": ["up"], "references": "nodes"}], AFTER
)
def nodes(row: headrace.Row) -> Node:
    return Node(int(row["id"]), row["parent_id"] and int(row["parent_id"]), int(row["v"]))
"""


def test_a_python_model_refers_as_one_of_sql_does(tmp_path: Path) -> None:
    files = {"nodes.py": PYTHON.replace("AFTER", 'orphan_after="15m"')}
    tree = Family(tmp_path, [NODES], files, '[models]\norphan_after = "0s"\n')
    tree.takes(node("2", "1"), node("3", "2"), node("5", "6"), node("6", "5"))
    assert (tree.keys("nodes"), {status for _, _, status in tree.opened()}) == (["5", "6"], {"waiting"})
    # Its key is known to be its table's: a record knows whose row it waits for.
    assert ("2", "1") in tree.ask("SELECT key, waiting_on ->> 'key' FROM headrace.quarantine")
    tree.takes(node("1", None))
    assert (tree.keys("nodes"), tree.opened()) == (["1", "2", "3", "5", "6"], [])
    tree.takes(gone("nodes", "1"))
    tree.takes(node("7", "8", "no number"))
    assert (tree.keys("nodes"), len(tree.opened())) == (["5", "6"], 3)
    tree.lane.waiting._looks_at = 0.0
    tree.bring()
    assert tree.opened()[0] == ("nodes", "2", "waiting"), "its own orphan_after counts"
    (tmp_path / "models" / "nodes.py").write_text(PYTHON.replace("AFTER", ""))
    tree.lane.reload_models(now=True)
    tree.lane.waiting._looks_at = 0.0
    tree.bring()
    assert tree.opened()[0] == ("nodes", "2", "quarantined"), "the project's does"
    tree.takes(node("1", None))
    assert tree.opened() == [("nodes", "7", "quarantined")]
    tree.verified()
    text = PYTHON.replace('["up"]', '["v", "node"]').replace("AFTER", "")
    (tmp_path / "models" / "nodes.py").write_text(text)
    tree.lane.reload_models(now=True)
    tree.bring()
    assert "has 2 columns, and the key of nodes is ['node']" in tree.lane.suspended()["nodes"]
    tree.lane.close()
