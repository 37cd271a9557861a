"""Changes that do not decode: from the stream to the record, and until their table is copied again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from corrupting import CorruptingProxy, corrupting
from headrace.config import Project, load_project
from headrace.testing.postgres import PostgresServer
from headrace.verify import verify
from live import LiveProject
from projects import here

BAD = b"damaged"


def damage(message: bytes) -> bytes:
    """Have a row that holds a word claim one column more than its table has."""
    if message[:1] not in b"IU" or BAD not in message:
        return message
    at = message.index(b"N") + 2
    return message[:at] + bytes([message[at] + 1]) + message[at + 1 :]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("pg"), 16) as server:
        yield server


class Shop(LiveProject):
    """Two tables behind a network that damages rows; a model of newest rows and one of all changes."""

    def __init__(self, folder: Path, server: PostgresServer, proxy: CorruptingProxy) -> None:
        super().__init__(
            folder,
            server,
            "DROP TABLE IF EXISTS t, u",
            "CREATE TABLE t (id int PRIMARY KEY, v text)",
            "CREATE TABLE u (id int PRIMARY KEY, v text)",
            "INSERT INTO t SELECT i, 'old' FROM generate_series(1, 5) i",
        )
        (folder / "headrace.toml").write_text(
            f'[source.shop]\nurl = "{proxy.url}"\n[destination]\ntype = "duckdb"\npath = "w.duckdb"\n'
        )
        self.project: Project = load_project(folder)
        self.model("SELECT id::INTEGER AS id, v FROM raw.shop.t", "newest")
        self.model("SELECT id::INTEGER AS id, v FROM raw.shop.t", "changes", header='materialize = "append"')

    def command(self, *words: str) -> list[dict[str, Any]]:
        done = here(*words, "--json", cwd=self.project.root)
        assert done.code == 0, done.err
        return done.objects()

    def records(self, status: str = "open") -> list[tuple[Any, ...]]:
        found = self.command("quarantine", "list", "--status", status)
        return sorted((r["model"], r["status"], r["stage"], r["reason"], r["key"], r["op"]) for r in found)


@pytest.fixture
def shop(server: PostgresServer, tmp_path: Path) -> Iterator[Shop]:
    with corrupting(server, damage) as proxy:
        shop = Shop(tmp_path, server, proxy)
        shop.run()
        yield shop


def test_what_does_not_decode_is_kept_and_all_else_goes_on(shop: Shop) -> None:
    shop.sql(
        "BEGIN; INSERT INTO t VALUES (6, 'good'); INSERT INTO t VALUES (7, 'damaged');"
        "UPDATE t SET v = 'damaged' WHERE id = 1; INSERT INTO u VALUES (1, 'good');"
        "INSERT INTO t VALUES (8, 'good'); COMMIT",
        "INSERT INTO u VALUES (2, 'good')",
    )
    shop.run()
    assert shop.rows("SELECT id FROM newest ORDER BY id") == [(i,) for i in (1, 2, 3, 4, 5, 6, 8)]
    assert shop.rows("SELECT count(*) FROM shop.u") == [(2,)]
    kept = [("quarantined", "decode", "decode.message", None, op) for op in "cu"]
    assert shop.records() == [(model, *record) for model in ("changes", "newest") for record in kept]
    assert len(shop.rows("SELECT DISTINCT issue FROM headrace.quarantine WHERE model = 'newest'")) == 1
    wrong = [finding.what for finding in verify(shop.project).findings if not finding.ok]
    assert wrong == ["source table public.t = staging"]  # which lacks what did not decode

    (record, *_) = shop.command("quarantine", "list", "--model", "newest")
    (shown,) = shop.command("quarantine", "show", record["id"])
    assert "damaged" not in json.dumps(shown, default=str)
    assert shown["redrive"][0].startswith("headrace tables resync public.t")
    logged = shop.command("log", "show", str(record["offset"]))
    assert (logged[0]["kind"], logged[0]["rows"]) == ("undecodable", 2)
    assert BAD in bytes.fromhex(logged[1]["message"])

    shop.run()  # a restart changes nothing
    assert len(shop.records()) == 4

    assert here("tables", "resync", "t", cwd=shop.project.root).code == 0
    shop.run()
    assert shop.records() == []
    assert {record[1] for record in shop.records("all")} == {"superseded"}
    assert shop.rows("SELECT v FROM newest WHERE id IN (1, 7) ORDER BY id") == [("damaged",), ("damaged",)]
    shop.assert_verified()
