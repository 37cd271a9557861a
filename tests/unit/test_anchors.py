"""Anchors: what is one, what a log is compared with, and how they are delivered."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from entries import rows, schema, shape
from headrace.change import TableId
from headrace.cli import main
from headrace.errors import LogDamaged, UserError
from headrace.log.proof import Anchor, anchor, check_anchor, read_anchors
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
    monkeypatch.setenv("HEADRACE_ANCHOR_KEY", "a key of anchors")
    signed = [made.signed("a key of anchors") for made in anchors]
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
