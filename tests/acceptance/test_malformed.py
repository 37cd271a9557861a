"""Changes that do not decode: from the stream to the record, and until their table is copied again."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import headrace
from corrupting import CorruptingProxy, corrupting
from headrace.change import Entry, TableId
from headrace.config import Project, load_project
from headrace.log.sqlite import SQLiteLog
from headrace.testing.postgres import PostgresServer
from headrace.verify import verify
from live import LiveProject
from pipelines import running, until
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


def run_headrace(*words: str, cwd: Path) -> bytes:
    """What a command writes, in bytes."""
    command = [sys.executable, "-m", "headrace", *words, "--project", str(cwd)]
    return subprocess.run(command, check=True, capture_output=True).stdout


class Shop(LiveProject):
    """Two tables behind a network that damages rows; a model of newest rows and one of all changes."""

    def __init__(self, folder: Path, server: PostgresServer, proxy: CorruptingProxy) -> None:
        self.proxy = proxy
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

    def replayed(self) -> list[dict[str, Any]]:
        done = here("log", "replay", "--from", "start", cwd=self.project.root)
        assert done.code == 0, done.err
        return done.objects()

    def states(self) -> dict[str, str]:
        return {each["table"]: each["stage"] for each in self.command("tables", "list")}

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
    with headrace.open_log(shop.project.root) as log:
        told = [
            item for batch in log.read(None) for item in batch if getattr(item, "kind", "") == "undecodable"
        ]
        assert [(each.table, each.content["kind"].to_pylist()) for each in told] == [
            (TableId("public", "t"), ["I", "U"])
        ]

    shop.run()  # a restart changes nothing
    assert len(shop.records()) == 4

    assert here("tables", "resync", "t", cwd=shop.project.root).code == 0
    shop.run()
    assert shop.records() == []
    assert {record[1] for record in shop.records("all")} == {"superseded"}
    assert shop.rows("SELECT v FROM newest WHERE id IN (1, 7) ORDER BY id") == [("damaged",), ("damaged",)]
    shop.assert_verified()


def test_the_bytes_of_one_record_are_shown_and_its_change_is_discarded(shop: Shop) -> None:
    shop.sql("INSERT INTO t VALUES (6, 'damaged'), (7, 'damaged')")
    shop.run()
    one, other = shop.command("quarantine", "list", "--model", "newest")
    shown = run_headrace("quarantine", "show", one["id"], "--raw", cwd=shop.project.root)
    assert shown.startswith(b"I")
    assert BAD in shown

    tried = shop.command("quarantine", "redrive", "--model", "newest", "--all", "--dry-run")
    assert {(each["id"], each["outcome"]) for each in tried} == {(one["id"], "fails"), (other["id"], "fails")}
    for words in (("redrive", "--model", "newest", "--all"), ("patch", one["id"], "v=x")):
        said = here("quarantine", *words, cwd=shop.project.root)
        assert "headrace tables resync TABLE" in said.out + said.err

    assert here("quarantine", "discard", one["id"], "--reason", "tested", cwd=shop.project.root).code == 0
    found = shop.rows("SELECT id::VARCHAR, status FROM headrace.quarantine WHERE model = 'newest'")
    assert dict(found) == {one["id"]: "discarded", other["id"]: "quarantined"}
    assert here("ledger", "check", cwd=shop.project.root).code == 0
    # The decision is in the log: a table that is made anew has no such record.
    shop.model("SELECT id::INTEGER AS id, v, 1 AS more FROM raw.shop.t", "newest")
    shop.run()
    opened = shop.rows(
        "SELECT id::VARCHAR FROM headrace.quarantine WHERE model = 'newest' AND status = 'quarantined'"
    )
    assert opened == [(other["id"],)]
    assert here("ledger", "check", cwd=shop.project.root).code == 0


def test_a_truncate_ends_records_of_newest_rows_alone(shop: Shop) -> None:
    shop.sql("INSERT INTO t VALUES (6, 'damaged')")
    shop.run()
    shop.sql(
        "BEGIN; INSERT INTO t VALUES (7, 'damaged'); TRUNCATE t; INSERT INTO t VALUES (8, 'damaged');"
        "INSERT INTO t VALUES (9, 'good'); COMMIT"
    )
    shop.run()
    opened = [record[0] for record in shop.records()]
    assert (opened.count("newest"), opened.count("changes")) == (1, 3)
    for finding in verify(shop.project).findings:
        assert finding.ok or "= staging" in finding.what, finding


def test_a_rebuild_and_a_new_destination_find_the_same_records(shop: Shop) -> None:
    shop.sql("INSERT INTO t VALUES (6, 'damaged')", "TRUNCATE t", "INSERT INTO t VALUES (7, 'damaged')")
    shop.run()
    before = shop.records()
    assert len(before) == 3
    for model in ("newest", "changes"):
        assert here("rebuild", model, cwd=shop.project.root).code == 0
        shop.run()
    assert shop.records() == before
    (shop.project.root / "w.duckdb").unlink()
    shop.run()
    assert shop.records() == before
    for finding in verify(shop.project).findings:
        assert finding.ok or "= staging" in finding.what, finding


def test_what_names_no_table_is_told_and_kept(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    shop.proxy.alter = lambda message: (
        message[:1] + b"\0\0\0\1" + message[5:] if message[:1] == b"I" and BAD in message else message
    )
    shop.sql("INSERT INTO t VALUES (6, 'damaged'), (7, 'good')")
    shop.run()
    assert shop.rows("SELECT id FROM newest WHERE id > 5") == [(7,)]
    assert shop.records() == []
    (told,) = [record for record in caplog.records if "UNDECODABLE" in record.getMessage()]
    offset = re.search(r"headrace log show (\d+)", told.getMessage())
    assert offset is not None
    logged = shop.command("log", "show", offset[1])
    assert (logged[0]["table"], BAD in bytes.fromhex(logged[1]["message"])) == (None, True)
    (replayed,) = [each for each in shop.replayed() if each["op"] == "undecodable"]
    assert (replayed["table"], replayed["message"]) == (None, logged[1]["message"])
    words = ("log", "replay", "--from", "start", "--format", "debezium")
    assert "1 messages that do not decode are left out" in here(*words, cwd=shop.project.root).err
    wrong = [finding.what for finding in verify(shop.project).findings if not finding.ok]
    assert wrong == ["source table public.t = staging"]


def test_a_copy_that_does_not_decode_fails_alone(shop: Shop) -> None:
    shop.sql("INSERT INTO u VALUES (1, 'good')", "INSERT INTO t VALUES (6, 'good')")
    shop.proxy.alter_copy = lambda row: row.removesuffix(b"\n") if b"old" in row else row
    assert here("tables", "resync", "t", "u", cwd=shop.project.root).code == 0
    with running(shop.project):
        until(lambda: shop.states() == {"public.t": "failed", "public.u": "live"})
        shop.sql("INSERT INTO t VALUES (7, 'streamed')")
        until(lambda: (7,) in shop.rows("SELECT id FROM newest"))
        shop.proxy.alter_copy = bytes
        assert here("tables", "resync", "t", cwd=shop.project.root).code == 0
        until(lambda: shop.states() == {"public.t": "live", "public.u": "live"})
    shop.run()
    shop.assert_verified()


def test_an_entry_that_does_not_decode_when_it_is_staged_holds_up_nothing(shop: Shop) -> None:
    shop.sql("INSERT INTO u VALUES (0, 'good')")
    shop.run()
    with closing(SQLiteLog(shop.project.log_path("shop"))) as log:
        last = log.position()
        assert last is not None
        places = [last._replace(commit=last.commit + 1, ordinal=ordinal) for ordinal in (1, 3)]
        moment = time.time_ns() // 1000
        log.append([Entry("rows", TableId("public", "t"), *places, moment, 3, 1, b"no Arrow", (9, 9))])
    shop.sql("INSERT INTO u VALUES (1, 'good')", "INSERT INTO t VALUES (6, 'good')")
    shop.run()
    assert shop.rows("SELECT count(*) FROM shop.u") == [(2,)]
    assert shop.rows("SELECT id FROM newest WHERE id > 5") == [(6,)]
    kept = ("quarantined", "decode", "decode.payload", None, None)
    assert shop.records() == [("changes", *kept), ("newest", *kept)]
    assert shop.rows("SELECT DISTINCT blocked FROM headrace.quarantine") == [(2,)]
    assert here("ledger", "check", cwd=shop.project.root).code == 0
    shop.assert_verified()  # what the entry holds is in no table of the source

    (record, *_) = shop.command("quarantine", "list", "--model", "newest")
    assert run_headrace("quarantine", "show", record["id"], "--raw", cwd=shop.project.root) == b"no Arrow"
    shop.run()
    assert len(shop.records()) == 2
    assert here("quarantine", "discard", record["id"], "--reason", "lost", cwd=shop.project.root).code == 0
    assert here("ledger", "check", cwd=shop.project.root).code == 0
    shop.sql("TRUNCATE t")
    assert here("tables", "resync", "t", cwd=shop.project.root).code == 0
    shop.run()
    assert shop.records() == []
    shop.assert_verified()


def test_a_cell_that_was_not_sent_again_is_not_taken_from_before_what_does_not_decode(shop: Shop) -> None:
    shop.sql("ALTER TABLE t ADD n int", "ALTER TABLE t ALTER v SET STORAGE EXTERNAL")
    shop.model("SELECT id::INTEGER AS id, v, n::INTEGER AS n FROM raw.shop.t", "newest")
    shop.sql("INSERT INTO t VALUES (20, 'first' || repeat('a', 9000), 1), (21, repeat('c', 9000), 1)")
    shop.run()
    shop.sql("UPDATE t SET v = 'damaged' || repeat('b', 9000) WHERE id = 20")
    shop.run()
    shop.sql("UPDATE t SET n = 2 WHERE id > 19")
    shop.run()
    opened = "SELECT key, reason FROM headrace.quarantine WHERE model = 'newest' ORDER BY key NULLS FIRST"
    unknown = [(key, "decode.unchanged") for key in ("20", "21")]  # of whichever row it was
    assert shop.rows(opened) == [(None, "decode.message"), *unknown]
    assert shop.rows("SELECT id, left(v, 5), n FROM newest WHERE id > 19 ORDER BY id") == [
        (20, "first", 1),
        (21, "ccccc", 1),
    ]
    shop.sql("UPDATE t SET v = 'whole', n = 3 WHERE id > 19")
    shop.run()
    assert shop.rows("SELECT v, n FROM newest WHERE id > 19") == [("whole", 3)] * 2


def test_bytes_that_nobody_has_looked_through_are_not_kept_of_a_table_with_something_to_hide(
    shop: Shop,
) -> None:
    path = shop.project.root / "headrace.toml"
    hides = 'hash = ["public.t.v"]\nhash_salt = "0123456789abcdef0123"\n[destination]'
    path.write_text(path.read_text().replace("[destination]", hides))
    shop.project = load_project(shop.project.root)
    shop.sql("INSERT INTO t VALUES (6, 'damaged-SECRET'), (9, 'fine-SECRET')")
    shop.run()
    ((record,),) = shop.rows("SELECT message FROM headrace.quarantine WHERE model = 'newest' AND key IS NULL")
    assert "its bytes are not kept" in str(record)
    files = [path for path in shop.project.root.rglob("*") if path.is_file()]
    assert [path for path in files if b"SECRET" in path.read_bytes()] == []
