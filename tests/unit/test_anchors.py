"""Anchors: what is one, what a log is compared with, and how they are delivered."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from entries import rows, schema, shape
from headrace.change import TableId
from headrace.cli import main
from headrace.errors import UserError
from headrace.log.proof import Anchor, anchor, read_anchors
from headrace.log.sqlite import SQLiteLog

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
    assert Anchor.from_json(json.dumps(raw)) == anchor_without_time(log, raw["anchored_at"])


def anchor_without_time(log: SQLiteLog, anchored_at: int) -> Anchor:
    made = anchor(log)
    return Anchor(
        made.log_id, made.source, made.offset, made.hash, made.position, made.committed_at, anchored_at
    )


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
