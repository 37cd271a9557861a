"""Anchors: what is one, what a log is compared with, and how they are delivered."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from entries import rows, schema, shape
from headrace.change import TableId
from headrace.cli import main
from headrace.config import LogConfig, Secret
from headrace.errors import LogDamaged, UserError
from headrace.log.anchoring import Anchoring
from headrace.log.proof import Anchor, anchor, check_anchor, read_anchors
from headrace.log.sqlite import SQLiteLog

KEY = "a key of anchors"
SHAPE = shape(TableId("public", "orders"), "id", "status")


@pytest.fixture
def log(tmp_path: Path) -> Iterator[SQLiteLog]:
    folder = tmp_path / ".headrace" / "log"
    folder.mkdir(parents=True)
    made = SQLiteLog(folder / "shop.db", segment_bytes=2_000)
    made.append([schema(10, SHAPE)])
    yield made
    made.close()


def grow(log: SQLiteLog, *commits: int) -> None:
    for commit in commits:
        log.append([rows(SHAPE, [("c", commit, 1, (str(commit), "new"))])])


# ------------------------------------------------------------------------------ what an anchor is


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"offset": "5"}, "offset"),
        ({"offset": -1}, "offset"),
        ({"offset": True}, "offset"),
        ({"offset": 5.0}, "offset"),
        ({"hash": "00"}, "hash"),
        ({"hash": "Z" * 64}, "hash"),
        ({"hash": 7}, "hash"),
        ({"log_id": 7}, "log_id"),
        ({"log_id": ""}, "log_id"),
        ({"log_id": "\ud800"}, "log_id"),
        ({"source": None}, "source"),
        ({"position": "5"}, "position"),
        ({"position": 5}, "position"),
        ({"committed_at": "2024-01-01"}, "committed_at"),
        ({"anchored_at": None}, "anchored_at"),
        ({"anchored_at": -1}, "anchored_at"),
        ({"anchored_at": 10**30}, "anchored_at"),
        ({"signature": None}, "signature"),
        ({"signature": "é" * 64}, "signature"),
    ],
)
def test_a_field_that_no_anchor_has_is_named(log: SQLiteLog, change: dict[str, Any], fault: str) -> None:
    raw = json.loads(anchor(log, "a key").to_json()) | change
    with pytest.raises(UserError, match=f"This is no anchor: {fault} must be ") as caught:
        Anchor.from_json(json.dumps(raw))
    assert "headrace log anchor" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "it is not JSON"),
        ("offset 5", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ("[1]", "it is not a JSON object"),
        ("null", "it is not a JSON object"),
        ('"offset"', "it is not a JSON object"),
        ("{}", "it lacks log_id"),
    ],
)
def test_what_is_no_anchor_at_all_is_said(text: str, fault: str) -> None:
    with pytest.raises(UserError, match=f"This is no anchor: {fault}"):
        Anchor.from_json(text)


def test_an_anchor_has_no_other_fields_and_may_be_unsigned(log: SQLiteLog) -> None:
    raw = json.loads(anchor(log).to_json())
    with pytest.raises(UserError, match="it has a field that no anchor has"):
        Anchor.from_json(json.dumps(raw | {"hunter2": 1}))
    del raw["signature"]
    assert Anchor.from_json(json.dumps(raw)) == replace(anchor(log), anchored_at=raw["anchored_at"])


def test_the_line_and_the_file_of_what_is_no_anchor_are_told(
    log: SQLiteLog, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = anchor(log).to_json()
    with pytest.raises(UserError, match="Line 3 of anchors is no anchor: it is not a JSON object"):
        read_anchors(f"{good}\n\n[]\n", "anchors")
    file = tmp_path / "anchors.jsonl"
    file.write_text(f"{good}\n{good[:20]}\n")
    command = ["log", "verify", "--project", str(tmp_path), "--against"]
    assert main([*command, str(file)]) == 2
    assert f"Line 2 of {file} is no anchor: it is not JSON" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    assert main([*command, "-"]) == 2
    assert "stdin cannot be read: UnicodeDecodeError" in capsys.readouterr().err


# ------------------------------------------------------------------------- what a log is compared with


def verify(tmp_path: Path, anchors: list[Anchor], *flags: str) -> int:
    """Run `headrace log verify --against` and return its exit code."""
    file = tmp_path / "anchors.jsonl"
    file.write_text("".join(made.to_json() + "\n" for made in anchors))
    try:
        return main(["log", "verify", "--project", str(tmp_path), "--against", str(file), *flags])
    except SystemExit as stopped:
        return int(str(stopped.code))


def scheduled(log: SQLiteLog) -> list[Anchor]:
    """Note six heads, and trim the log beyond the first three."""
    anchors = []
    for commit in range(20, 80, 10):
        grow(log, commit)
        anchors.append(anchor(log))
    log.trim(anchors[3].offset)
    assert log.begin().offset == anchors[3].offset
    return anchors


def test_anchors_from_before_the_log_begins_are_left_out_and_counted(
    log: SQLiteLog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    anchors = scheduled(log)
    assert verify(tmp_path, anchors) == 0
    told = capsys.readouterr().out
    assert "and what 3 anchors noted (3 more are from before its beginning)" in told
    assert verify(tmp_path, anchors, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["anchors"], report["skipped"], report["entries"]) == (3, 3, 2)
    assert verify(tmp_path, anchors[5:]) == 0
    assert "before its beginning" not in capsys.readouterr().out


def test_one_of_the_anchors_must_be_comparable_and_the_chain_is_walked_before(
    log: SQLiteLog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    anchors = scheduled(log)
    assert verify(tmp_path, anchors[:3]) == 1
    told = capsys.readouterr().out
    assert "begins behind offset 5: none of 3 anchors can be compared" in told
    assert "newer anchor" in told
    log.raw_rows('UPDATE entries SET rows = 77 WHERE "offset" = 6')
    for compared in (anchors[:3], anchors):
        assert verify(tmp_path, compared) == 1
        assert "the hash of offset 6 does not hold" in capsys.readouterr().out


def test_old_anchors_are_still_of_this_log_and_signed(
    log: SQLiteLog,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    anchors = scheduled(log)
    assert verify(tmp_path, [replace(anchors[0], log_id="another"), *anchors]) == 1
    assert "is of log another" in capsys.readouterr().out
    monkeypatch.setenv("HEADRACE_ANCHOR_KEY", KEY)
    signed = [made.signed(KEY) for made in anchors]
    assert verify(tmp_path, signed) == 0
    assert verify(tmp_path, [signed[0].signed("another key"), *signed]) == 1
    assert "not signed with this key" in capsys.readouterr().out


def test_an_entry_that_is_missing_is_no_old_anchor(log: SQLiteLog) -> None:
    anchors = scheduled(log)
    assert not check_anchor(log, anchors[0])
    assert check_anchor(log, anchors[3])
    assert check_anchor(log, anchors[4])
    log.raw_rows('DELETE FROM entries WHERE "offset" = ?', (anchors[4].offset,))
    with pytest.raises(LogDamaged, match=f"offset {anchors[4].offset} is missing"):
        check_anchor(log, anchors[4])


def test_a_file_of_anchors_of_several_sources_serves_each(
    log: SQLiteLog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(SQLiteLog(log.path.with_name("billing.db"))) as other:
        other.append([schema(10, SHAPE)])
        anchors = [anchor(log), anchor(other)]
    for flags in ([], ["--source", "shop"], ["--source", "billing"]):
        assert verify(tmp_path, anchors, *flags) == 0
        assert capsys.readouterr().out.count("and what an anchor noted") == (1 if flags else 2)
    assert verify(tmp_path, anchors[:1]) == 0
    assert verify(tmp_path, anchors[:1], "--source", "billing") == 2
    assert "There is no anchor of billing" in capsys.readouterr().err
    assert verify(tmp_path, [*anchors, replace(anchors[0], source="strange")], "--source", "shop") == 2
    assert "There is no log of strange" in capsys.readouterr().err


# ------------------------------------------------------------------------- how they are delivered


class Webhook:
    """A server that answers as it is told: a status, or nothing for None."""

    def __init__(self) -> None:
        self.answer: int | None = 204
        self.posts: list[dict[str, Any]] = []
        self.gets = 0
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                hook.posts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                if hook.answer is not None:
                    self.send_response(hook.answer)
                    self.send_header("Location", "/hunter2/elsewhere")
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            def do_GET(self) -> None:
                hook.gets += 1
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hunter2"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    made = Webhook()
    yield made
    made.close()


def offsets_in(file: Path) -> list[int]:
    return [made.offset for made in read_anchors(file.read_text(), file.name)] if file.exists() else []


def alarms(caplog: pytest.LogCaptureFixture) -> list[str]:
    assert "hunter2" not in caplog.text
    words = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return words


def test_each_place_gets_each_head_once(log: SQLiteLog, webhook: Webhook, tmp_path: Path) -> None:
    file = tmp_path / "anchors.jsonl"
    config = LogConfig(
        anchor_every=60, anchor_file=file, anchor_url=Secret(webhook.url), anchor_key=Secret(KEY)
    )
    anchoring = Anchoring(log, config)
    for now in (0, 59, 60, 120):
        anchoring.step(now)
    grow(log, 20)
    anchoring.step(179)
    assert offsets_in(file) == [1]
    anchoring.step(180)
    assert offsets_in(file) == [1, 2]
    assert [json.dumps(post, sort_keys=True) for post in webhook.posts] == file.read_text().splitlines()
    assert all(made.is_signed_with(KEY) for made in read_anchors(file.read_text(), "it"))


def test_nothing_is_delivered_of_an_empty_log_or_without_a_schedule(tmp_path: Path, log: SQLiteLog) -> None:
    file = tmp_path / "anchors.jsonl"
    Anchoring(log, LogConfig(anchor_file=file)).step(0)
    with closing(SQLiteLog(tmp_path / "empty.db")) as empty:
        anchoring = Anchoring(empty, LogConfig(anchor_every=60, anchor_file=file))
        anchoring.step(0)
        assert not file.exists()
        empty.append([schema(10, SHAPE)])
        anchoring.step(1)
    assert offsets_in(file) == [1], "as soon as there is a head"


@pytest.mark.parametrize("answer", [301, 302, 303, 307, 308, 304, 400, 401, 404, 500, 503, None])
def test_only_an_answer_of_2xx_is_a_delivery(
    log: SQLiteLog, webhook: Webhook, caplog: pytest.LogCaptureFixture, answer: int | None
) -> None:
    webhook.answer = answer
    anchoring = Anchoring(log, LogConfig(anchor_every=60, anchor_url=Secret(webhook.url)))
    anchoring.step(0)
    assert len(webhook.posts) == 1
    why = "RemoteDisconnected before it answered" if answer is None else f"it answered {answer}"
    assert alarms(caplog) == [
        f"ANCHOR of shop could not be delivered to anchor_url: {why}. It is tried again until it works."
    ]
    webhook.answer = 200
    anchoring.step(60)
    assert [post["offset"] for post in webhook.posts] == [1, 1]
    assert webhook.gets == 0, "it went nowhere else"


def test_an_outage_is_told_once_waited_out_longer_and_longer_and_over_once(
    log: SQLiteLog, webhook: Webhook, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    webhook.answer = 503
    file = tmp_path / "anchors.jsonl"
    config = LogConfig(anchor_every=600, anchor_file=file, anchor_url=Secret(webhook.url))
    anchoring = Anchoring(log, config)
    tried = []
    for now in range(0, 4000, 10):
        before = len(webhook.posts)
        anchoring.step(now)
        tried += [now] * (len(webhook.posts) - before)
    assert tried == [0, 10, 30, 70, 150, 310, 630, 1230, 1830, 2430, 3030, 3630]
    assert offsets_in(file) == [1], "what the file holds is not written again"
    assert len(alarms(caplog)) == 1
    grow(log, 20)
    anchoring.step(4200)
    assert offsets_in(file) == [1, 2], "the file does not wait for the webhook"
    webhook.answer = 204
    anchoring.step(4230)
    assert webhook.posts[-1]["offset"] == 2, "not what was the head when it failed first"
    assert alarms(caplog) == ["RESOLVED ANCHOR of shop: offset 2 is delivered to anchor_url"]
    grow(log, 30)
    webhook.answer = 500
    anchoring.step(4840)
    anchoring.step(4850)
    assert len(alarms(caplog)) == 1, "another outage"


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://127.0.0.1:1/hunter2", "ConnectionRefusedError"),
        ("http://user:hunter2@127.0.0.1/", "InvalidURL"),
        ("http://127.0.0.1:hunter2/", "InvalidURL"),
        ("http://[hunter2/", "ValueError"),
        ("http://127.0.0.1:1/hunter2é", "UnicodeEncodeError"),
        ("https://{webhook}/hunter2", "SSLError"),
    ],
)
def test_what_cannot_be_reached_is_told_without_its_address(
    log: SQLiteLog, webhook: Webhook, caplog: pytest.LogCaptureFixture, url: str, why: str
) -> None:
    address = url.replace("{webhook}", webhook.url.split("/")[2])
    Anchoring(log, LogConfig(anchor_every=60, anchor_url=Secret(address))).step(0)
    (told,) = alarms(caplog)
    assert f"to anchor_url: {why} before it answered" in told


def test_a_file_that_cannot_be_written_is_told_of(
    log: SQLiteLog, webhook: Webhook, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "missing" / "anchors.jsonl"
    config = LogConfig(anchor_every=60, anchor_file=file, anchor_url=Secret(webhook.url))
    anchoring = Anchoring(log, config)
    anchoring.step(0)
    assert f"to anchor_file: {file} cannot be written, No such file or directory" in alarms(caplog)[0]
    file.parent.mkdir()
    anchoring.step(10)
    assert alarms(caplog) == ["RESOLVED ANCHOR of shop: offset 1 is delivered to anchor_file"]
    assert offsets_in(file) == [1]
    assert len(webhook.posts) == 1


FULL = """
import resource, sys
from pathlib import Path
from headrace.log.proof import append_anchor, read_anchors
made = read_anchors(sys.stdin.read(), "stdin")[0]
size = len(made.to_json()) + 1
resource.setrlimit(resource.RLIMIT_FSIZE, (2 * size + 50, 2 * size + 50))
for _ in range(2):
    append_anchor(Path(sys.argv[1]), made)
try:
    append_anchor(Path(sys.argv[1]), made)
except OSError as error:
    print(error.strerror)
"""


def test_a_line_that_did_not_fit_leaves_nothing_behind(log: SQLiteLog, tmp_path: Path) -> None:
    file = tmp_path / "anchors.jsonl"
    command = [sys.executable, "-c", FULL, str(file)]
    ended = subprocess.run(
        command, input=anchor(log).to_json(), capture_output=True, text=True, check=True, timeout=60
    )
    assert "File too large" in ended.stdout
    assert offsets_in(file) == [1, 1]
