"""Marts: made in the order of what they read, made again when an input has changed, flagged where one lacks
rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from entries import rows as entry
from headrace.change import Column, CopyMark, Entry, Position, TableId, TableSchema
from headrace.config import load_project
from headrace.destinations.duckdb import DuckDBDestination
from headrace.errors import ModelError, UserError
from headrace.mart import MartState
from headrace.marts import MartKeeper
from headrace.pipeline import open_lanes
from headrace.transform.folder import ModelFolder
from headrace.transform.mart import in_order, read_mart

_COLUMNS = (Column("id", "bigint"), Column("customer", "bigint"), Column("amount", "numeric"))
ORDERS = TableSchema(TableId("public", "orders"), _COLUMNS, ("id",), 1)
CUSTOMERS = TableSchema(
    TableId("public", "customers"), (Column("id", "bigint"), Column("name", "text")), ("id",), 1
)
CLEAN = """/* headrace
key = ["id"]
*/
SELECT id::BIGINT AS id, customer::BIGINT AS customer, amount::DECIMAL(12,2) AS amount FROM raw.shop.orders"""
PER_CUSTOMER = """/* headrace
materialize = "table"
refresh_every = "1h"
*/
WITH sums AS (SELECT customer, sum(amount) AS amount FROM clean GROUP BY customer)
SELECT name, sums.amount FROM sums JOIN shop.customers ON customers.id = sums.customer"""
TOP = "SELECT name FROM per_customer ORDER BY amount DESC LIMIT 1"


class Shop:
    """A lane whose log a test writes itself, and the keeper of its marts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "models").mkdir()
        (folder / "headrace.toml").write_text('[source.shop]\nurl = "postgresql://nobody@127.0.0.1:1/x"\n')
        (folder / ".headrace" / "log").mkdir(parents=True)
        self.commit = 10
        self.put(clean=CLEAN)
        self.reopen()
        for shape in (ORDERS, CUSTOMERS):
            at = Position(0, 1, 0)
            for mark in (CopyMark("begin", shape), CopyMark("chunk"), CopyMark("end", floor=1, ceiling=1)):
                self.lane.log.append([Entry("marker", shape.table, at, at, 1, 0, 1, mark.to_json().encode())])

    def reopen(self) -> None:
        (self.lane,) = open_lanes(load_project(self.folder))
        self.keeper = MartKeeper(self.lane.folder, self.lane.destination)

    def put(self, **files: str) -> None:
        for name, text in files.items():
            (self.folder / "models" / f"{name}.sql").write_text(text)

    def bring(self, shape: TableSchema, *cells: tuple[str, ...], step: bool = True) -> None:
        """Commit rows at the source, apply them, and let the keeper take a step."""
        self.commit += 1
        self.lane.log.append([entry(shape, [("c", self.commit, i, row) for i, row in enumerate(cells, 1)])])
        while self.lane.load():
            pass
        while self.lane.apply():
            pass
        if step:
            self.step()

    def step(self, *, now: bool = True) -> None:
        self.lane.reload_models(now=True)
        self.keeper.step(now=now)

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        (table,) = self.lane.destination.read([query])
        return [tuple(row.values()) for row in table.to_pylist()]

    def mart(self, name: str) -> MartState:
        return self.lane.destination.marts.all()[name]


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    made = Shop(tmp_path)
    made.bring(CUSTOMERS, ("1", "Ada"), ("2", "Bob"), step=False)
    made.bring(ORDERS, ("1", "1", "10"), ("2", "2", "30"), step=False)
    yield made
    made.lane.close()


def test_marts_follow_what_they_read_in_order(shop: Shop) -> None:
    shop.put(a_top=TOP, per_customer=PER_CUSTOMER)
    shop.step()
    assert shop.ask("SELECT name, amount::INT FROM per_customer ORDER BY name") == [("Ada", 10), ("Bob", 30)]
    assert shop.ask("FROM a_top") == [("Bob",)]
    shop.bring(ORDERS, ("3", "1", "50"))
    assert shop.ask("FROM a_top") == [("Ada",)]
    made = shop.mart("per_customer")
    assert (made.kind, made.state, made.rows, made.incomplete) == ("table", "ok", 2, False)
    progress = shop.lane.destination.progress("shop")
    assert progress is not None
    assert json.loads(made.positions)["shop"]["offset"] == progress.offset
    assert json.loads(shop.mart("a_top").positions) == {}


def test_a_table_is_made_again_only_when_an_input_has_changed_and_its_time_has_come(shop: Shop) -> None:
    shop.put(per_customer=PER_CUSTOMER)
    shop.step()
    first = shop.ask("SELECT refreshed_at FROM headrace.marts")
    shop.step()
    assert shop.ask("SELECT refreshed_at FROM headrace.marts") == first, "nothing has changed"
    shop.bring(ORDERS, ("3", "1", "50"), step=False)
    shop.step(now=False)
    assert shop.ask("SELECT refreshed_at FROM headrace.marts") == first, "its hour has not passed"
    shop.step()
    assert shop.ask("SELECT refreshed_at FROM headrace.marts") > first
    last = shop.ask("SELECT refreshed_at FROM headrace.marts")
    shop.lane.close()
    shop.reopen()
    shop.step()
    assert shop.ask("SELECT refreshed_at FROM headrace.marts") == last, "it is as its inputs are"


def test_views_over_a_table_and_its_identity_survive_a_refresh(shop: Shop) -> None:
    shop.put(per_customer=PER_CUSTOMER)
    shop.step()
    with shop.lane.destination.open() as db:
        db.execute("CREATE VIEW mine AS SELECT count(*) AS n FROM per_customer")
    table = "SELECT table_oid FROM duckdb_tables() WHERE table_name = 'per_customer'"
    before = shop.ask(table)
    shop.bring(CUSTOMERS, ("3", "Cy"), step=False)
    shop.bring(ORDERS, ("3", "3", "1"))
    assert shop.ask("FROM mine") == [(3,)]
    assert shop.ask(table) == before
    shop.put(per_customer=PER_CUSTOMER.replace("sums.amount", "sums.amount::INT AS amount, 1 AS one"))
    shop.step()
    assert shop.ask("SELECT name, amount, one FROM per_customer ORDER BY 1 LIMIT 1") == [("Ada", 10, 1)]
    assert shop.ask("FROM mine") == [(3,)]
    shop.put(per_customer=TOP.replace("per_customer", "shop.customers").replace("amount", "name"))
    shop.step()
    assert shop.ask("FROM per_customer") == [("Cy",)]
    assert shop.mart("per_customer").kind == "view"


def test_a_mart_over_open_records_is_flagged_until_they_are_healed(shop: Shop) -> None:
    shop.put(per_customer=PER_CUSTOMER, top=TOP)
    shop.bring(ORDERS, ("3", "1", "many"))
    for name in ("per_customer", "top"):
        made = shop.mart(name)
        assert (made.incomplete, made.missing) == (True, "clean has 1 open record"), name
    shop.commit += 1
    shop.lane.log.append([entry(ORDERS, [("u", shop.commit, 1, ("3", "1", "5"))])])
    shop.bring(CUSTOMERS, ("9", "Eve"))
    for name in ("per_customer", "top"):
        assert not shop.mart(name).incomplete, name


def test_a_mart_that_cannot_be_made_is_suspended_alone_and_goes_on_when_mended(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    shop.put(per_customer=PER_CUSTOMER, good="SELECT count(*) AS n FROM clean")
    shop.step()
    held = shop.ask("FROM per_customer ORDER BY name")
    shop.put(per_customer=PER_CUSTOMER.replace("SELECT name", "SELECT nam"))
    for _ in range(2):
        shop.step()
    assert shop.ask("FROM per_customer ORDER BY name") == held, "what there was of it stays"
    assert shop.ask("FROM good") == [(2,)]
    made = shop.mart("per_customer")
    assert made.state == "suspended"
    assert "nam" in made.reason
    assert made.incomplete
    alarms = [record for record in caplog.records if record.getMessage().startswith("SUSPENDED mart")]
    assert len(alarms) == 1
    shop.put(per_customer=PER_CUSTOMER)
    shop.step()
    assert (shop.mart("per_customer").state, shop.keeper.suspended()) == ("ok", {})


def test_data_that_breaks_a_mart_lets_it_go_on_when_it_is_gone(shop: Shop) -> None:
    shop.put(
        ratio='/* headrace\nmaterialize = "table" */ SELECT error(name) AS x FROM shop.customers WHERE id = 7'
    )
    shop.step()
    assert shop.mart("ratio").state == "ok"
    shop.bring(CUSTOMERS, ("7", "a secret name"))
    made = shop.mart("ratio")
    assert made.state == "suspended"
    assert "secret" not in made.reason, "what an engine says of data may quote it"
    shop.commit += 1
    shop.lane.log.append([entry(CUSTOMERS, [("d", shop.commit, 1, ("7", None))])])
    shop.bring(ORDERS, ("8", "1", "1"))
    assert shop.mart("ratio").state == "ok"


def test_one_that_the_project_no_longer_has_is_retired_and_stays(shop: Shop) -> None:
    shop.put(per_customer=PER_CUSTOMER)
    shop.step()
    (shop.folder / "models" / "per_customer.sql").unlink()
    shop.step()
    assert shop.mart("per_customer").state == "retired"
    assert len(shop.ask("FROM per_customer")) == 2
    shop.put(per_customer=PER_CUSTOMER)
    shop.step()
    assert shop.mart("per_customer").state == "ok"


def test_a_circle_is_told_and_the_others_go_on(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    shop.put(good="SELECT count(*) AS n FROM clean", a="SELECT 1 AS x FROM b", b="SELECT 1 AS x FROM a")
    shop.step()
    assert "in a circle, and stand still: " in caplog.text
    assert set(shop.keeper.suspended()) == {"a", "b"}
    shop.put(b="SELECT 2 AS x")
    shop.step()
    assert shop.ask("SELECT n FROM good, a") == [(2,)]
    assert not shop.keeper.suspended()
    texts = {"a": "b", "b": "a", "c": "clean"}
    order, circles = in_order(
        (read_mart(n, f"SELECT 1 FROM {m}", "duckdb") for n, m in texts.items()), "main"
    )
    assert [mart.name for mart in order] == ["c"]
    assert circles in (["a → b → a"], ["b → a → b"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("SELECT FROM WHERE FROM clean", "a.sql"),
        ("DELETE FROM clean", "a mart is one SELECT"),
        ("SELECT 1 FROM clean; SELECT 2 FROM clean", "a mart is one SELECT"),
        ('/* headrace\nmaterialise = "table" */ SELECT 1 FROM clean', 'did you mean "materialize"'),
        ('/* headrace\nmaterialize = "cube" */ SELECT 1 FROM clean', '"view" or "table"'),
        ('/* headrace\nrefresh_every = "soon" */ SELECT 1 FROM clean', "refresh_every: .* is not a duration"),
    ],
)
def test_what_is_no_mart_is_refused_with_its_file(text: str, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        read_mart("a", text, "duckdb")
    assert "a.sql" in str(caught.value)


def test_what_a_file_reads_tells_whether_it_is_a_mart(tmp_path: Path) -> None:
    (tmp_path / "m.sql").write_text(CLEAN)
    (tmp_path / "n.sql").write_text("WITH clean AS (FROM m) SELECT x.id FROM clean AS x, shop.customers")
    folder = ModelFolder(tmp_path, {"shop"}, DuckDBDestination(tmp_path / "w.duckdb").folded)
    assert [text.name for text in folder.current()] == ["m"]
    (mart,) = folder.marts()
    assert set(mart.reads) == {"m", "shop.customers", "clean"}, (
        "a WITH may have the name of what it is made of"
    )
    (tmp_path / "o.sql").write_text("SELECT 1 AS x FROM raw.shop.orders JOIN m ON true")
    with pytest.raises((ModelError, UserError), match=r"o\.sql: a row model reads one raw table"):
        ModelFolder(tmp_path, {"shop"}, DuckDBDestination(tmp_path / "w.duckdb").folded)
