"""What people decide about single changes, and the issues that records make: on a live Postgres."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from headrace.authoring.files import find_model
from headrace.authoring.preview import preview
from headrace.server import ask
from headrace.testing.postgres import PostgresServer
from live import LiveProject
from pipelines import running
from projects import Done, here

STRICT = "SELECT id::INT AS id, amount::INT AS amount, note FROM raw.shop.t"
LOOSE = "SELECT id::INT AS id, TRY_CAST(amount AS INT) AS amount, note FROM raw.shop.t"


class Shop(LiveProject):
    """One table `t(id, amount, note)`, one model `m` over it."""

    def command(self, *arguments: str) -> Done:
        return here("quarantine", *arguments, cwd=self.project.root)

    def answer(self, *arguments: str) -> Any:
        done = self.command(*arguments, "--json")
        assert done.code == 0, done
        return json.loads(done.out)

    def rows(self, query: str = "SELECT id, amount FROM main.m ORDER BY id") -> list[tuple[object, ...]]:
        return super().rows(query)

    def records(self) -> dict[str, str]:
        found = self.rows("SELECT key, status FROM headrace.quarantine ORDER BY epoch, commit, ordinal")
        return {str(key): str(status) for key, status in found}

    def id(self, key: str) -> str:
        found = f"SELECT id::VARCHAR FROM headrace.quarantine WHERE key = '{key}' ORDER BY commit DESC"
        return str(self.rows(found)[0][0])

    def issue(self) -> tuple[object, ...]:
        ((state, records, opened),) = self.rows("SELECT state, records, open FROM headrace.issues")
        return state, records, opened

    def issues(self) -> str:
        ((issue,),) = self.rows("SELECT issue FROM headrace.issues")
        return str(issue)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("decisions") / "pg") as started:
        yield started


@pytest.fixture
def shop(tmp_path: Path, server: PostgresServer) -> Shop:
    made = Shop(
        tmp_path / "project",
        server,
        "DROP TABLE IF EXISTS t",
        "CREATE TABLE t (id int PRIMARY KEY, amount text, note text)",
        "INSERT INTO t VALUES (1, '1', 'a'), (2, 'two', 'b'), (3, '3', 'c'), (4, 'four', 'd')",
    )
    made.model(STRICT)
    return made


def test_decisions_survive_a_rebuild_and_a_deleted_destination(shop: Shop) -> None:
    shop.run()
    shop.sql("UPDATE t SET amount = 'three' WHERE id = 3")
    shop.sql("UPDATE t SET id = 50, amount = 'fifty' WHERE id = 1")
    shop.run()
    assert shop.rows() == [(3, 3)]
    assert shop.issue() == ("new", 4, 4)

    tried = shop.answer("patch", shop.id("2"), "amount=22", "--dry-run")
    assert (tried["outcome"], shop.records()["2"]) == ("passes", "quarantined")
    assert shop.answer("patch", shop.id("2"), "amount=22", "--actor", "ada")["status"] == "resolved"
    assert shop.answer("patch", shop.id("4"), "--null", "amount")["status"] == "resolved"
    assert shop.answer("discard", shop.id("3"), "--reason", "typed twice")["discarded"] == 1
    where = ("discard", "--where", "key = '50'", "--reason", "no such thing", "--actor", "bo")
    assert shop.answer(*where)["discarded"] == 1
    expected = [(2, 22), (3, 3), (4, None)]

    def holds() -> None:
        assert shop.rows() == expected
        about = "SELECT key, status, resolution, actor FROM headrace.quarantine WHERE key IN ('3', '50')"
        assert [row[:3] for row in shop.rows(f"{about} ORDER BY key")] == [
            ("3", "discarded", "typed twice"),
            ("50", "discarded", "no such thing"),
        ]
        shop.assert_verified()

    holds()
    seen = preview(shop.project, find_model(shop.project, "m"))
    assert seen.difference is not None
    assert seen.difference.nothing
    assert shop.rows("SELECT resolution, actor FROM headrace.quarantine WHERE key = '2'") == [
        ("patched", "ada")
    ]
    assert shop.issue() == ("resolved", 4, 0)
    assert here("rebuild", "m", cwd=shop.project.root).code == 0
    holds()
    for path in shop.project.root.glob("warehouse*"):
        path.unlink()
    shop.run()
    holds()
    assert shop.issue() == ("resolved", 2, 0)

    # The latest decision counts; a later change of the source is another change.
    undone = shop.answer("undo", shop.id("3"))
    assert (undone["status"], shop.issue()) == ("quarantined", ("ongoing", 2, 1))
    shop.sql("UPDATE t SET amount = '33' WHERE id = 3; UPDATE t SET note = 'x' WHERE id IN (2, 50)")
    shop.run()
    assert shop.rows() == [(2, 22), (3, 33), (4, None)]
    assert shop.records() == {"2": "quarantined", "3": "superseded", "50": "quarantined"}
    shop.assert_verified()


def test_beside_a_running_pipeline_commands_take_turns(shop: Shop) -> None:
    shop.sql("INSERT INTO t SELECT i, 'x', 'many' FROM generate_series(10, 69) i")
    shop.run()
    with running(shop.project):
        assert shop.answer("patch", shop.id("2"), "amount=22")["status"] == "resolved"
        shop.model(LOOSE)

        def redrive(first: int) -> int:
            keys = [str(key) for key in range(first, first + 10)]
            request = {"op": "redrive", "source": "shop", "model": "m", "keys": keys, "dry_run": False}
            return int(ask(shop.project, request)["resolved"])

        with ThreadPoolExecutor(6) as many:
            resolved = list(many.map(redrive, [10, 20, 20, 30, 40, 50]))
        shop.sql("INSERT INTO t VALUES (70, '70', 'meanwhile')")
        assert sum(resolved) == 50
        where = ("discard", "--where", "note_is_not_a_column = 1", "--reason", "none")
        assert shop.command(*where).code == 2
        assert shop.answer("discard", "--issue", shop.issues(), "--reason", "tests")["discarded"] == 11
    shop.run()
    assert shop.rows("SELECT count(*), count(amount) FROM main.m") == [(54, 4)]
    shop.assert_verified()
