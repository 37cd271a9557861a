"""A destination that fails on one row each time: the row is quarantined, the rest applied; and that a world
which is broken makes no record."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from harness import start, stop

from headrace import isolation
from headrace.config import Project, load_project
from headrace.pipeline import Pipeline
from headrace.server import ask
from headrace.testing.postgres import PostgresServer
from headrace.verify import verify
from pipelines import running, until
from projects import here

TABLES = """
CREATE TABLE items (id int PRIMARY KEY, v text);
CREATE TABLE others (id int PRIMARY KEY, v text);
INSERT INTO items SELECT i, 'good' FROM generate_series(1, 50) i;
"""
TRIGGER = """
CREATE OR REPLACE FUNCTION deny() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  {when} THEN {what}; END IF;
  RETURN coalesce(NEW, OLD);
END $$;
CREATE OR REPLACE TRIGGER deny BEFORE INSERT OR DELETE ON shop.items FOR EACH ROW EXECUTE FUNCTION deny()
"""
DIES = "PERFORM pg_terminate_backend(pg_backend_pid())"
OPEN = (
    "SELECT key, reason, stage, status, message FROM headrace.quarantine "
    "WHERE status = 'quarantined' ORDER BY 1"
)


class Pair:
    """A source and a warehouse, each on a server of its own."""

    def __init__(self, folder: Path) -> None:
        self.servers = [PostgresServer(folder / name) for name in ("source", "warehouse")]
        for server in self.servers:
            server.start()
        self.project: Project

    def sql(self, *statements: str, warehouse: bool = False) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.servers[warehouse].url, autocommit=True) as db:
            for statement in statements:
                cursor = db.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def deny(self, what: str, when: str = "IF TG_OP = 'INSERT' AND NEW.v LIKE 'poison%'") -> None:
        self.sql(TRIGGER.format(what=what, when=when), warehouse=True)

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        return self.sql(query, warehouse=True)

    def assert_verified(self) -> None:
        wrong = [finding for finding in verify(self.project).findings if not finding.ok]
        assert not wrong, wrong


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("isolation"))
    yield pair
    for server in pair.servers:
        server.stop("immediate")


@pytest.fixture
def pair(servers: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    monkeypatch.setattr(isolation, "_PAUSE", 0.01)
    servers.sql(
        "DROP PUBLICATION IF EXISTS headrace_shop",
        "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT active",
        "DROP TABLE IF EXISTS items, others",
        TABLES,
    )
    servers.sql("DROP SCHEMA IF EXISTS shop, headrace, headrace_joining CASCADE", warehouse=True)
    url = servers.servers[1].url
    (tmp_path / "headrace.toml").write_text(
        f'[source.shop]\nurl = "{servers.servers[0].url}"\n'
        f'[destination]\ntype = "postgres"\nurl = "{url}"\nlock_timeout = "1s"\n'
    )
    servers.project = load_project(tmp_path)
    Pipeline(servers.project).run_once()
    return servers


@pytest.mark.parametrize(
    ("what", "state"), [(DIES, "57P01"), ("RAISE 'a defect' USING ERRCODE = 'XX000'", "XX000")]
)
def test_a_row_that_the_destination_dies_of_is_quarantined_and_the_rest_applied(
    pair: Pair, what: str, state: str
) -> None:
    pair.deny(what)
    pair.sql(
        "INSERT INTO items SELECT i, CASE WHEN i % 100 = 77 THEN 'poison' ELSE 'good' END "
        "FROM generate_series(51, 350) i; "
        "INSERT INTO others SELECT i, 'good' FROM generate_series(1, 100) i; "
        "UPDATE items SET v = 'poison again' WHERE id = 7"
    )
    Pipeline(pair.project).run_once()
    assert pair.ask("SELECT (SELECT count(*) FROM shop.items), (SELECT count(*) FROM shop.others)") == [
        (347, 100)
    ]
    found = pair.ask(OPEN)
    assert [row[:4] for row in found] == [
        (key, "crash.destination", "crash", "quarantined") for key in ("177", "277", "7", "77")
    ]
    assert {row[4] for row in found} == {
        f"the destination fails each time it is written alone, and takes others: SQLSTATE {state}"
    }
    assert pair.ask("SELECT v FROM shop.items WHERE id = 7") == [("good",)]
    pair.assert_verified()
    # What is known is known after a restart; a later good change heals; a redrive tries once more.
    pair.sql("UPDATE items SET v = 'healed' WHERE id = 77", "UPDATE items SET v = 'poison' WHERE id = 8")
    Pipeline(pair.project).run_once()
    assert [row[0] for row in pair.ask(OPEN)] == ["177", "277", "7", "8"]
    pair.assert_verified()


def test_a_redrive_and_a_patch_try_it_once_more(pair: Pair) -> None:
    pair.deny("RAISE 'no room for %', NEW.v USING ERRCODE = '53100'")
    pair.sql("UPDATE items SET v = 'poison ' || id WHERE id <= 3")
    Pipeline(pair.project).run_once()
    assert [row[0] for row in pair.ask(OPEN)] == ["1", "2", "3"]
    pair.deny(DIES, "IF TG_OP = 'INSERT' AND NEW.v = 'poison 2'")
    with running(pair.project):
        request = {"op": "redrive", "source": "shop", "model": "shop.items", "keys": ["1", "2", "3"]}
        tried = ask(pair.project, {**request, "dry_run": True, "each": True})
        assert [(each["key"], each["outcome"]) for each in tried["records"]] == [
            ("1", "passes"), ("2", "fails"), ("3", "passes"),
        ]  # fmt: skip
        assert ask(pair.project, {**request, "dry_run": False})["still_quarantined"] == 1
        assert pair.ask("SELECT id, v FROM shop.items WHERE id <= 3 ORDER BY 1") == [
            (1, "poison 1"), (2, "good"), (3, "poison 3"),
        ]  # fmt: skip
        ((record,),) = pair.ask("SELECT id::text FROM headrace.quarantine WHERE status = 'quarantined'")
        for cell, status in (("poison 2", "quarantined"), ("mended", "resolved")):
            done = here("quarantine", "patch", record, f"v={cell}", cwd=pair.project.root)
            assert f"is {status}" in done.out, done
    assert pair.ask("SELECT v FROM shop.items WHERE id = 2") == [("mended",)]
    pair.assert_verified()


def test_a_delete_that_the_destination_dies_of_leaves_the_row(pair: Pair) -> None:
    pair.deny(DIES, "IF TG_OP = 'DELETE' AND OLD.id = 5")
    pair.sql("DELETE FROM items WHERE id < 10")
    Pipeline(pair.project).run_once()
    assert pair.ask("SELECT min(id), count(*) FROM shop.items") == [(5, 42)]
    assert [row[:2] for row in pair.ask(OPEN)] == [("5", "crash.destination")]
    pair.assert_verified()


def test_a_world_that_is_broken_makes_no_record(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_PAUSE", 0.2)
    server = pair.servers[1]
    with running(pair.project):
        pair.sql("INSERT INTO items VALUES (100, 'good')")
        server.stop("immediate")
        pair.sql("INSERT INTO items VALUES (101, 'poison')")
        time.sleep(2)
        server.start()
        until(lambda: pair.ask("SELECT count(*) FROM shop.items") == [(52,)])
        # Each write fails, and so does what has no meaning where it takes the place of a row.
        pair.deny("RAISE 'x' USING ERRCODE = '53100'", "IF true")
        pair.sql("INSERT INTO items VALUES (102, 'good')")
        until(lambda: ask(pair.project, {"op": "status"})["waiting"], what="nothing waits")
        time.sleep(1.5)
        assert pair.ask(OPEN) == []
        pair.sql("DROP TRIGGER deny ON shop.items", warehouse=True)
        # A row that somebody else holds is no fault of its change.
        with psycopg.connect(server.url) as db:
            db.execute("SELECT * FROM shop.items WHERE id = 1 FOR UPDATE")
            pair.sql("UPDATE items SET v = 'held' WHERE id = 1")
            time.sleep(6)
            assert pair.ask(OPEN) == []
        until(lambda: pair.ask("SELECT v FROM shop.items WHERE id = 1") == [("held",)])
    assert pair.ask("SELECT count(*) FROM headrace.quarantine") == [(0,)]
    pair.assert_verified()


def test_a_kill_while_it_is_found_leaves_nothing_undone(pair: Pair) -> None:
    pair.deny(DIES)
    pair.sql("UPDATE items SET v = 'poison' WHERE id = 9", "UPDATE items SET v = 'fine' WHERE id = 10")
    process = start(pair.project, failpoints="destination.rehearse=kill")
    assert process.wait(60) == -signal.SIGKILL
    assert pair.ask(OPEN) == []
    process = start(pair.project, failpoints="destination.apply.commit=kill")
    assert process.wait(60) == -signal.SIGKILL
    assert pair.ask(OPEN) == []
    process = start(pair.project)
    until(lambda: [row[0] for row in pair.ask(OPEN)] == ["9"])
    assert pair.ask("SELECT v FROM shop.items WHERE id IN (9, 10) ORDER BY id") == [("good",), ("fine",)]
    assert stop(process) == 0
    pair.assert_verified()
