"""`headrace log …` as a user meets it: on logs made by hand, and on one that a real Postgres filled."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pyarrow.parquet as pq
import pytest

import headrace
from entries import SECOND, message, rows, schema, shape, truncate
from headrace.change import Entry, Position, SourceMark, TableId, source_marker
from headrace.cli import main
from headrace.config import load_project
from headrace.log.sqlite import SQLiteLog
from headrace.pipeline import Pipeline
from headrace.reading import Changes
from headrace.testing.postgres import PostgresServer
from pipelines import running

ORDERS, ITEMS = TableId("public", "orders"), TableId("sales", "it/ems")
SHAPE = shape(ORDERS, "id", "status")
ITEM = shape(ITEMS, "order_id", "line", "note", key=("order_id", "line"))


class Done(NamedTuple):
    code: int
    out: str
    err: str


def log(*arguments: str, cwd: Path) -> Done:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["log", *arguments, "--project", str(cwd)])
    return Done(code, out.getvalue(), err.getvalue())


def told(*arguments: str, cwd: Path) -> list[Any]:
    done = log(*arguments, cwd=cwd)
    assert (done.code, done.err) == (0, ""), done
    return [json.loads(line) for line in done.out.splitlines()]


def lines(*arguments: str, cwd: Path) -> list[str]:
    done = log(*arguments, cwd=cwd)
    assert done.code == 0, done
    return done.out.splitlines()


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[SQLiteLog]:
    """Groups of several interleaved transactions, a copy and a new shape between them."""
    folder = tmp_path / ".headrace" / "log"
    folder.mkdir(parents=True)
    made = SQLiteLog(folder / "shop.db", segment_bytes=4_000)
    made.append([schema(10, SHAPE), schema(10, ITEM)])
    for base in (100, 200, 300):
        orders = [("c", base + n, 1, (f"{base + n}", "new")) for n in (10, 20, 30)]
        made.append(
            [
                rows(ITEM, [("c", base + n, 2, ("i", str(base + n), "")) for n in (10, 20)]),
                message(base + 20, "app", f"at {base + 20}", 3),
                message(base + 20, "headrace", "heartbeat", 4),
                rows(SHAPE, orders),
            ]
        )
    made.append([rows(SHAPE, [("r", 250, 1, ("1", "copied"))], "copy")])
    wider = shape(ORDERS, "id", "note", version=2)
    made.append([schema(400, wider), rows(wider, [("u", 400, 1, ("110", None), ["note"], {"id": "9"})])])
    made.append([truncate(wider, 410), rows(wider, [("d", 420, 1, ("110", None), ["note"])])])
    yield made
    made.close()


@pytest.fixture
def project(writer: SQLiteLog, tmp_path: Path) -> Path:
    assert writer.end().offset
    return tmp_path


def streamed(found: list[Any]) -> list[int]:
    return [int(one["position"].split("/")[1]) for one in found if one["op"] != "r"]


# -- replay


def test_every_change_is_a_line_of_json(project: Path) -> None:
    found = told("replay", "--from", "start", cwd=project)
    assert len(found) == 3 * 6 + 1 + 3
    assert found[0] == {
        "op": "c", "table": "sales.it/ems", "position": "0/110/2", "offset": 3,
        "committed_at": "1970-01-01T00:01:50.000000Z", "txid": 810, "lsn": "0/3E",
        "key": {"order_id": "i", "line": "110"}, "row": {"order_id": "i", "line": "110", "note": ""},
        "unchanged": [], "before": None,
    }  # fmt: skip
    assert found[2] == {
        "op": "m", "position": "0/120/3", "offset": 4, "committed_at": "1970-01-01T00:02:00.000000Z",
        "txid": 820, "lsn": "0/6F", "prefix": "app", "content": "at 120",
    }  # fmt: skip
    copied, moved, cut, gone = found[-4:]
    assert (copied["op"], copied["row"], copied["txid"]) == ("r", {"id": "1", "status": "copied"}, None)
    assert (moved["key"], moved["before"], moved["unchanged"]) == ({"id": "110"}, {"id": "9"}, ["note"])
    assert moved["row"] == {"id": "110"}
    assert (cut["op"], cut["table"], cut["txid"]) == ("t", "public.orders", 1110)
    assert (gone["row"], gone["before"], gone["key"]) == (None, {"id": "110"}, {"id": "110"})


def test_a_stretch_has_whole_transactions_between_its_places(project: Path) -> None:
    everything = told("replay", "--from", "start", cwd=project)
    for at in (5, 110, 111, 120, 130, 131, 220, 400, 421):
        lsn, moment = f"0/{at:X}", f"1970-01-01T00:{at // 60:02}:{at % 60:02}"
        later = [one for one in everything if one["op"] != "r" and streamed([one])[0] >= at]
        earlier = [one for one in everything if one["op"] != "r" and streamed([one])[0] <= at]
        for where in (lsn, moment, moment + "Z", f"1970-01-01T02:{moment[14:]}+02:00"):
            found = told("replay", "--from", where, cwd=project)
            assert [one for one in found if one["op"] != "r"] == later, where
            found = told("replay", "--from", "start", "--to", where, cwd=project)
            assert [one for one in found if one["op"] != "r"] == earlier, where
    (one,) = {streamed([one])[0] for one in told("replay", "--from", "0/DC", "--to", "0/DC", cwd=project)}
    assert one == 220
    assert told("replay", "--from", "end", cwd=project) == []
    assert told("replay", "--from", "start", "--to", "start", cwd=project) == []


def test_offsets_are_whole_groups(project: Path, writer: SQLiteLog) -> None:
    for offset in range(1, writer.end().offset + 1):
        through, after = writer.group_end(offset), writer.group_end(offset - 1)
        found = {one["offset"] for one in told("replay", "--from", str(offset), cwd=project)}
        assert min(found) > after
        found = {one["offset"] for one in told("replay", "--from", "1", "--to", str(offset), cwd=project)}
        assert through == offset or not found or max(found) >= offset - 4
        assert offset in found or writer.entry(offset).entry.kind in ("schema", "message")  # type: ignore[union-attr]


def test_tables_can_be_chosen(project: Path) -> None:
    found = told("replay", "--from", "start", "--tables", "sales.it/ems, orders", cwd=project)
    assert {one["op"] for one in found} == {*"cudrt"}
    found = told("replay", "--from", "start", "--tables", "sales.it/ems", cwd=project)
    assert [one["table"] for one in found] == ["sales.it/ems"] * 6
    done = log("replay", "--from", "start", "--tables", "orders,other", cwd=project)
    assert done.code == 2
    assert "knows no table public.other" in done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--from", "yesterday"), '"yesterday" is no place in the log'),
        (("--from", "300", "--to", "2"), "2 is before 300"),
        (("--from", "0/DC", "--to", "0/6E"), "0/6E is before 0/DC"),
        (("--from", "start", "--format", "parquet"), "needs a folder"),
    ],
)
def test_what_is_no_stretch_is_refused(project: Path, arguments: tuple[str, ...], words: str) -> None:
    done = log("replay", *arguments, cwd=project)
    assert (done.code, done.out) == (2, "")
    assert words in done.err


def test_a_stretch_that_is_deleted_is_refused(project: Path, writer: SQLiteLog) -> None:
    writer.trim(11)
    for where in ("0/64", "1", "1970-01-01T00:01:00"):
        done = log("replay", "--from", where, cwd=project)
        assert done.code == 1
        assert "deleted by retention" in done.err
    assert streamed(told("replay", "--from", "start", cwd=project))[0] == 310


def test_debeziums_records_are_the_same_wherever_one_begins(project: Path, writer: SQLiteLog) -> None:
    def records(*where: str) -> list[Any]:
        found = told(
            "replay", "--format", "debezium", "--prefix", "p", "--database", "d", *where, cwd=project
        )
        for one in found:
            one["value"] = one["value"] and {
                name: cell for name, cell in one["value"].items() if not name.startswith("ts_")
            }
        return found

    whole = records("--from", "start")
    assert [(one["topic"], one["value"] and one["value"]["op"]) for one in whole[:4]] == [
        ("p.sales.it_ems", "c"), ("p.sales.it_ems", "c"), ("p.message", "m"), ("p.public.orders", "c"),
    ]  # fmt: skip
    assert [one["value"]["source"]["sequence"] for one in whole[:5]] == [
        '[null,"62"]', '["110","72"]', '["110","111"]', '[null,"61"]', '["110","71"]',
    ]  # fmt: skip
    assert whole[0]["value"]["source"]["db"] == "d"
    assert [one["value"] and one["value"]["op"] for one in whole[-6:]] == ["d", None, "c", "t", "d", None]
    for at in (120, 131, 230, 400):
        later = [
            one for one in whole if one["value"] is None or one["value"]["source"]["ts_us"] >= at * SECOND
        ]
        later = [one for one in later if one["value"] is None or one["value"]["op"] != "r"]
        found = [one for one in records("--from", f"0/{at:X}") if (one["value"] or {}).get("op") != "r"]
        assert found == later, at


def test_debeziums_sequences_begin_anew_with_an_epoch(project: Path, writer: SQLiteLog) -> None:
    def sequences(*where: str) -> list[str]:
        found = map(json.loads, lines("replay", "--format", "debezium", *where, cwd=project))
        return [one["value"]["source"]["sequence"] for one in found if one["value"]]

    wider = shape(ORDERS, "id", "note", version=2)
    heard = {"prefix": "headrace", "content": "heard", "lsn": 425, "txid": 0}
    at = Position(0, 425, 0)
    writer.append([Entry("message", None, at, at, 0, 0, 0, json.dumps(heard).encode())])
    writer.append([rows(wider, [("c", 430, 1, ("0", ""))])])
    for where in ("0/1A4", "0/1A5", "0/1AE"):
        assert sequences("--from", where)[-1] == '["420","381"]', "what a standby says is no commit"
    alone = {"prefix": "app", "content": "outside of transactions", "lsn": 434, "txid": 0}
    at = Position(0, 435, 0)
    writer.append([Entry("message", None, at, at, 0, 0, 0, json.dumps(alone).encode())])
    writer.append([rows(wider, [("c", 440, 1, ("1", ""))])])
    for where in ("start", "0/1AE", "0/1B8"):
        assert sequences("--from", where)[-1] == '["434","391"]', "its LSN stands for its commit"
    writer.append([source_marker(Position(1, 0, 0), SourceMark("resync", "epoch 1 begins"))])
    first = writer.end().offset
    for commit in (220, 230):
        entry = rows(wider, [("c", commit, 1, (str(commit), ""))])
        writer.append([replace(entry, first=Position(1, commit, 1), last=Position(1, commit, 1))])
    for where in ("start", str(first), str(first + 1)):
        assert sequences("--from", where)[-2:] == ['[null,"171"]', '["220","181"]'], where


def test_debeziums_sequence_of_what_follows_deleted_entries_is_unknown(
    project: Path, writer: SQLiteLog
) -> None:
    writer.trim(writer.end().offset)
    heard = {"prefix": "headrace", "content": "heard", "lsn": 425, "txid": 0}
    at = Position(0, 425, 0)
    writer.append([Entry("message", None, at, at, 0, 0, 0, json.dumps(heard).encode())])
    writer.append([rows(shape(ORDERS, "id", "note", version=2), [("c", 430, 1, ("0", ""))])])
    for where in ("start", "0/1AE"):
        (one,) = told("replay", "--format", "debezium", "--from", where, cwd=project)
        assert one["value"]["source"]["sequence"] == '[null,"381"]'


def test_parquet_has_a_file_per_table_with_all_shapes(project: Path, writer: SQLiteLog) -> None:
    folder = project / "out"
    writer.append([source_marker(Position(0, 420, 9), SourceMark("gap", "the slot is gone"))])
    done = log("replay", "--from", "0/78", "--format", "parquet", "--output", str(folder), cwd=project)
    assert done.code == 0, done
    assert done.out.splitlines() == ["public.orders: 12 rows", "sales.it/ems: 5 rows"]
    assert "gap of the source: the slot is gone" in done.err
    assert sorted(path.name for path in folder.iterdir()) == [
        "public.orders.parquet",
        "sales.it%2Fems.parquet",
    ]
    orders = pq.read_table(folder / "public.orders.parquet")
    assert orders.column_names[8:11] == ["id", "status", "note"]
    assert orders["_op"].to_pylist() == ["c"] * 8 + ["r", "u", "t", "d"]
    assert orders["_before"].to_pylist()[-3] == [("id", "9")]
    assert orders["status"].null_count == 3
    assert log("replay", "--from", "1", "--format", "parquet", "--output", str(folder), cwd=project).code == 2


def test_a_file_of_json_is_never_written_over(project: Path) -> None:
    file = project / "changes.jsonl"
    assert told("replay", "--from", "start", "--output", str(file), cwd=project) == []
    assert len(file.read_text().splitlines()) == 22
    done = log("replay", "--from", "start", "--output", str(file), cwd=project)
    assert done.code == 2
    assert "is there already" in done.err


def test_a_gap_is_told_in_json(project: Path, writer: SQLiteLog) -> None:
    writer.append([source_marker(Position(0, 420, 9), SourceMark("gap", "the slot is gone"))])
    last = told("replay", "--from", "0/190", "--tables", "sales.it/ems", cwd=project)[-1]
    assert (last["op"], last["reason"]) == ("gap", "the slot is gone")


# -- head, tail, show, consumers


def test_head_says_where_the_log_stands(project: Path, writer: SQLiteLog) -> None:
    (head,) = told("head", "--json", cwd=project)
    end = writer.end()
    assert (head["source"], head["id"], head["end"], head["hash"]) == (
        "shop",
        writer.id,
        end.offset,
        end.hash,
    )
    assert (head["position"], head["begin"], head["rows"], head["tables"]) == ("0/420/1", 0, 19, 2)
    assert "committed" not in head
    assert "1970-01-01T00:07:00.000000Z (" in log("head", cwd=project).out
    SQLiteLog(writer.path.with_name("empty.db")).close()
    assert [one["end"] for one in told("head", "--json", cwd=project)] == [0, end.offset]
    assert log("head", "--source", "empty", cwd=project).code == 0
    done = log("tail", cwd=project)
    assert done.code == 2
    assert "empty, shop" in done.err


def test_tail_lists_the_newest_entries(project: Path, writer: SQLiteLog) -> None:
    end = writer.end().offset
    found = told("tail", "-n", "4", "--json", cwd=project)
    assert [one["offset"] for one in found] == [end - 3, end - 2, end - 1, end]
    assert found[-1]["hash"] == writer.end().hash
    assert found[0]["what"] == "version 2: 2 columns, key id"
    assert found[2]["txids"] == [1110, 1110]
    header, *shown = lines("tail", "-n", "100", cwd=project)
    assert header.split()[:3] == ["offset", "kind", "table"]
    assert len(shown) == end
    assert "app: at 120" in "\n".join(shown)


def test_tail_follows(project: Path, writer: SQLiteLog) -> None:
    code = [sys.executable, "-m", "headrace", "log", "tail", "-n", "1", "-f", "--project", str(project)]
    with subprocess.Popen(code, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("   offset  kind")
        assert "public.orders" in process.stdout.readline()
        writer.append([message(500, "app", "late\x1b[31m")])
        assert process.stdout.readline().rstrip().endswith("app: late [31m")
        process.kill()


def test_show_has_the_rows_of_an_entry(project: Path, writer: SQLiteLog) -> None:
    first, *shown = told("show", "6", "--json", "--rows", "2", cwd=project)
    assert (first["offset"], first["kind"], first["rows"]) == (6, "rows", 3)
    assert [row["id"] for row in shown] == ["110", "120"]
    text = log("show", "6", "--rows", "2", cwd=project).out
    assert "and 1 more rows" in text
    assert '"prefix": "app"' in log("show", "4", cwd=project).out
    done = log("show", "99", cwd=project)
    assert done.code == 2
    assert f"It has 1 to {writer.end().offset}" in done.err


def test_consumers_are_listed_moved_and_forgotten(project: Path, writer: SQLiteLog) -> None:
    assert "No named consumers" in log("consumers", cwd=project).out
    with headrace.open_log(project) as opened:
        first, *_ = opened.read("reports", max_bytes=1)
        first.commit()
        assert opened._cursors.mark_lost("reports", 2, "it held 9 bytes")
    (one,) = told("consumers", "--json", cwd=project)
    assert (one["name"], one["offset"], one["state"], one["reason"]) == (
        "reports", 2, "lost", "it held 9 bytes",
    )  # fmt: skip
    assert one["entries"] == writer.end().offset - 2
    assert "lost" in log("consumers", cwd=project).out
    assert "behind offset 6" in log("consumers", "--reset", "reports", "--to", "7", cwd=project).out
    assert told("consumers", "--json", cwd=project)[0]["state"] == "reading"
    assert (
        f"offset {writer.end().offset}."
        in log("consumers", "--reset", "reports", "--to", "end", cwd=project).out
    )
    for wrong in (("--reset", "reports"), ("--to", "3"), ("--reset", "x", "--to", "1"), ("--forget", "x")):
        assert log("consumers", *wrong, cwd=project).code == 2
    assert "forgotten" in log("consumers", "--forget", "reports", cwd=project).out
    assert told("consumers", "--json", cwd=project) == []


# -- find


def test_find_shows_a_keys_history(project: Path, writer: SQLiteLog) -> None:
    made, moved, cut, gone = told("find", "--key", "orders:110", "--json", cwd=project)
    assert (made["op"], made["new"], made["key"], made["txid"]) == (
        "c",
        {"id": "110", "status": "new"},
        ["110"],
        810,
    )
    assert (moved["key_before"], moved["changed"]) == (["9"], {"id": ["9", "110"]})
    assert (cut["op"], gone["op"], gone["new"]) == ("t", "d", None)
    shown = lines("find", "--key", 'sales.it/ems:["i", "120"]', cwd=project)
    assert shown[1].split()[1:3] == ["insert", "820"]
    assert shown[1].endswith("app: at 120")
    assert shown[-1] == '1 changes of sales.it/ems:["i", "120"]'
    assert (
        "3 changes of orders:110; the newest 2 are shown"
        in lines("find", "--key", "orders:110", "--limit", "2", cwd=project)[-1]
    )
    assert "public.orders was truncated 1 times" in log("find", "--key", "orders:777", cwd=project).out
    assert "Nothing about" in log("find", "--key", "sales.it/ems:7,7", cwd=project).out
    done = log("find", "--key", "orders", cwd=project)
    assert done.code == 2
    assert "orders:7" in done.err


def test_find_shows_transactions(project: Path) -> None:
    (one,) = told("find", "--txid", "920", "--json", cwd=project)
    assert one == {
        "txid": 920, "epoch": 0, "lsn": "0/DC", "committed_at": "1970-01-01T00:03:40.000000Z",
        "first": 7, "last": 10, "messages": [{"prefix": "app", "content": "at 220"}],
        "changes": [
            {"table": "public.orders", "op": "c", "count": 1},
            {"table": "sales.it/ems", "op": "c", "count": 1},
        ],
    }  # fmt: skip
    by_lsn = told("find", "--lsn", "0/DC", "--json", cwd=project)
    assert by_lsn[0] == one
    assert [found["txid"] for found in by_lsn] == [920, 930, 1010, 1020, 1030, 1100, 1110, 1120]
    by_time = told("find", "--time", "1970-01-01 00:03:40", "--limit", "1", "--json", cwd=project)
    assert by_time == [one]
    shown = lines("find", "--txid", "920", cwd=project)
    assert shown[1].split()[1:] == ["920", "0/DC", "7", "to", "10", "public.orders", "1", "insert"]
    assert shown[3].endswith("said app: at 220")
    assert "No transaction" in log("find", "--txid", "1", cwd=project).out
    for wrong in ((), ("--txid", "1", "--key", "orders:1"), ("--lsn", "x"), ("--txid", "1", "--limit", "-1")):
        assert log("find", *wrong, cwd=project).code == 2


# -- on a real Postgres


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("pg")) as made:
        yield made


@pytest.fixture
def filled(server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project whose pipeline has run, and whose secret is not in the environment any more."""
    server.psql("CREATE DATABASE shop")
    url = server.url.removesuffix("postgres") + "shop"
    (tmp_path / "models").mkdir()
    (tmp_path / "headrace.toml").write_text(
        '[source.shop]\nurl = "${env:LOG_TEST_URL}"\nslot = "log_commands"\n'
    )
    monkeypatch.setenv("LOG_TEST_URL", url)
    with psycopg.connect(url, autocommit=True) as db:
        db.execute("CREATE TABLE orders (id int PRIMARY KEY, status text, amount numeric)")
        db.execute("CREATE TABLE bare (v text)")
        db.execute("ALTER TABLE bare REPLICA IDENTITY FULL")
        db.execute("INSERT INTO bare VALUES ('x')")
        db.execute("INSERT INTO orders SELECT g, 'new', g FROM generate_series(1, 500) g")
        Pipeline(load_project(tmp_path)).run_once()
        db.execute("UPDATE orders SET status = 'paid' WHERE id = 7")
        db.execute(
            "BEGIN; UPDATE orders SET status = 'held' WHERE id = 7; "
            "UPDATE orders SET amount = 0 WHERE id < 10; "
            "SELECT pg_logical_emit_message(true, 'backoffice', 'ticket 4711, by anna'); COMMIT"
        )
        db.execute("UPDATE orders SET id = 7000 WHERE id = 7")
        db.execute("ALTER TABLE orders ADD note text")
        db.execute("INSERT INTO orders VALUES (501, 'new', 1, 'ä')")
        Pipeline(load_project(tmp_path)).run_once()
    monkeypatch.delenv("LOG_TEST_URL")
    yield tmp_path
    server.psql("SELECT pg_drop_replication_slot('log_commands')")
    server.psql("DROP DATABASE shop WITH (FORCE)")


def test_the_log_of_a_real_source(filled: Path) -> None:
    history = told("find", "--key", "orders:7", "--json", cwd=filled)
    assert [one["op"] for one in history] == ["r", "u", "u", "u", "u"]
    assert [one["changed"] for one in history[1:]] == [
        {"status": ["new", "paid"]}, {"status": ["paid", "held"]},
        {"amount": ["7", "0"]}, {"id": ["7", "7000"]},
    ]  # fmt: skip
    said = [{"prefix": "backoffice", "content": "ticket 4711, by anna"}]
    assert [one["messages"] for one in history] == [[], [], said, said, []]
    (one,) = told("find", "--txid", str(history[2]["txid"]), "--json", cwd=filled)
    assert one["changes"] == [{"table": "public.orders", "op": "u", "count": 10}]
    assert one["messages"] == said
    (same,) = told("find", "--lsn", one["lsn"], "--limit", "1", "--json", cwd=filled)
    assert same == one
    (same,) = told("find", "--time", one["committed_at"], "--limit", "1", "--json", cwd=filled)
    assert same == one
    found = told("replay", "--from", one["committed_at"], cwd=filled)
    mine = [line for line in found if line["txid"] == one["txid"]]
    assert sorted(line["op"] for line in mine) == ["m", *"uuuuuuuuuu"]
    assert {line["txid"] for line in found} == {one["txid"], history[4]["txid"], found[-1]["txid"]}
    assert found[-1]["row"] == {"id": "501", "status": "new", "amount": "1", "note": "ä"}
    records = told("replay", "--from", one["lsn"], "--format", "debezium", cwd=filled)
    assert {record["topic"] for record in records} == {"shop.message", "shop.public.orders"}
    first = next(record["value"] for record in records if record["topic"] == "shop.public.orders")
    assert (first["op"], first["after"]) == (
        "u",
        {"id": 7, "status": "held", "amount": {"scale": 0, "value": "Bw=="}},
    )
    (head,) = told("head", "--json", cwd=filled)
    assert head["tables"] >= 1
    assert main(["status", "--project", str(filled)]) == 2, "which needs the secret"
    assert "has no key" in log("find", "--key", "bare:x", cwd=filled).err


def test_a_consumer_in_python_rebuilds_the_table(filled: Path) -> None:
    with headrace.open_log(filled) as opened:
        state: dict[str, str | None] = {}
        at: dict[str, Position] = {}
        while True:
            batch = next(opened.read("reports", max_bytes=1), None)
            if batch is None:
                break
            for change in batch:
                if isinstance(change, Changes) and change.table == ORDERS:
                    apply(state, at, change)
            batch.commit()
        assert len(state) == 501
        assert (state["7000"], state.get("7"), state["1"], state["501"]) == ("held", None, "new", "new")
        assert [cursor.offset for cursor in opened.consumers()] == [opened.head.offset]
        assert list(opened.read("reports")) == []


def test_a_follower_sees_whole_transactions_beside_a_running_pipeline(
    server: PostgresServer, tmp_path: Path
) -> None:
    server.psql("CREATE DATABASE live")
    url = server.url.removesuffix("postgres") + "live"
    (tmp_path / "headrace.toml").write_text(f'[source.live]\nurl = "{url}"\nslot = "live"\n')
    seen: list[str] = []
    with psycopg.connect(url, autocommit=True) as db:
        for name in ("debit", "credit"):
            db.execute(f"CREATE TABLE {name} (id int PRIMARY KEY, note text)".encode())
        Pipeline(load_project(tmp_path)).run_once()
        with running(load_project(tmp_path)), headrace.open_log(tmp_path) as opened:

            def write() -> None:
                for n in range(300):
                    with db.transaction():
                        db.execute("INSERT INTO debit VALUES (%s, %s)", [n, "x" * (n % 50)])
                        db.execute("INSERT INTO credit VALUES (%s, 'y')", [n])

            writing = threading.Thread(target=write)
            writing.start()
            for batch in opened.read("live", after=opened.head, follow=True, max_bytes=1):
                found = {table.name: batch.table(table)["id"].to_pylist() for table in batch.tables}
                assert found.get("debit") == found.get("credit"), "no transaction is torn"
                seen += found.get("debit", [])
                batch.commit()
                if len(seen) == 300:
                    break
            writing.join()
    assert seen == [str(n) for n in range(300)]
    server.psql("SELECT pg_drop_replication_slot('live')")
    server.psql("DROP DATABASE live WITH (FORCE)")


def apply(state: dict[str, str | None], at: dict[str, Position], change: Changes) -> None:
    for row in change.rows.to_pylist():
        place = Position(row["_epoch"], row["_commit"], row["_ordinal"])
        key = row["id"]
        if row["_op"] == "r" and place < at.get(key, Position(0, 0, 0)):
            continue
        if row["_before"]:
            state.pop(dict(row["_before"])["id"], None)
        state[key], at[key] = row["status"], place
