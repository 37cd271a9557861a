"""The embedded log: groups are whole, durable and in order, and damage is seen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import apsw
import pytest

from headrace.change import Column, CopyMark, Entry, Position, TableId, TableSchema
from headrace.errors import LogDamaged, LogError
from headrace.failpoints import VARIABLE
from headrace.log.sqlite import NO_HASH, SQLiteLog

TABLE = TableId("public", "t")


def entry(
    commit: int, ordinal: int = 1, payload: bytes = b"payload", rows: int = 1, kind: str = "rows"
) -> Entry:
    at = Position(0, commit, ordinal)
    return Entry(kind, TABLE, at, at, 1_000 + commit, rows, 1, payload)  # type: ignore[arg-type]


def marker(table: TableId, commit: int, mark: CopyMark) -> Entry:
    at = Position(0, commit, 0)
    return Entry("marker", table, at, at, 0, 0, 1, mark.to_json().encode())


def group(commit: int, size: int) -> list[Entry]:
    return [entry(commit, i, b"%d/%d" % (commit, i)) for i in range(1, size + 1)]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[SQLiteLog]:
    made = SQLiteLog(tmp_path / "log.db")
    yield made
    made.close()


def offsets(entries: Sequence[object]) -> list[int]:
    return [item.offset for item in entries]  # type: ignore[attr-defined]


# -- order, groups, reading ----------------------------------------------------------------------------


def test_a_new_log_is_empty(log: SQLiteLog) -> None:
    assert log.end() == (log.id, 0, NO_HASH)
    assert (log.position(), log.read(0, 100), log.schemas(), log.verify().offset) == (None, [], {}, 0)
    assert log.mark(0) == (log.id, 0, NO_HASH)
    assert log.mark(1) is None


def test_a_very_large_payload_is_as_any_other(log: SQLiteLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written page by page, into the same transaction."""
    monkeypatch.setattr("headrace.log.sqlite._LARGE", 100_000)
    payloads = [b"small", os.urandom(100_000), b"", os.urandom(1_234_567)]
    log.append([entry(7, i, payload) for i, payload in enumerate(payloads, 1)])
    assert [item.entry.payload for item in log.read(0, 1 << 30)] == payloads
    assert log.verify() == log.end()

    def broken() -> Iterator[Entry]:
        yield entry(8, 1, payloads[-1])
        raise RuntimeError

    with pytest.raises(RuntimeError):
        log.append(broken())
    assert log.verify().offset == len(payloads)


def test_offsets_are_dense_from_one_and_content_comes_back_as_written(log: SQLiteLog) -> None:
    written = [group(10, 3), group(20, 1), group(30, 2)]
    ends = [log.append(entries) for entries in written]
    assert [end.offset for end in ends] == [3, 4, 6]
    back = log.read(0, 1 << 20)
    assert offsets(back) == [1, 2, 3, 4, 5, 6]
    assert [item.entry for item in back] == [e for entries in written for e in entries]
    assert [item.ends_group for item in back] == [False, False, True, True, False, True]
    assert log.end() == ends[-1] == log.mark(6)
    assert log.position() == Position(0, 30, 2)


def test_an_empty_group_changes_nothing(log: SQLiteLog) -> None:
    end = log.append(group(1, 1))
    assert log.append([]) == end == log.end()


def test_read_gives_what_fits_and_at_least_one_entry(log: SQLiteLog) -> None:
    """Also in the middle of a group: a group of any size is read in pieces."""
    for commit, size in ((1, 3), (2, 2), (3, 1)):
        log.append([entry(commit, i, b"x" * 100) for i in range(size)])
    assert offsets(log.read(0, 1)) == [1]
    assert offsets(log.read(1, 200)) == [2, 3]
    assert offsets(log.read(0, 499)) == [1, 2, 3, 4]
    assert offsets(log.read(3, 1 << 20)) == [4, 5, 6]
    assert log.read(6, 1) == []
    assert log.slice_end(0, 6, 1, 250_000) == 3, "a slice is never less than a group"
    assert log.slice_end(0, 6, 499, 250_000) == 3
    assert log.slice_end(0, 2, 499, 250_000) == 0, "no group ends there"


def test_slice_end_stops_at_groups_bytes_rows_and_limit(log: SQLiteLog) -> None:
    for commit in (1, 2, 3):
        log.append([entry(commit, i, b"x" * 10, rows=100_000) for i in range(2)])
    assert log.slice_end(0, 6, 1 << 20, 399_999) == 2
    assert log.slice_end(0, 6, 1 << 20, 400_000) == 4
    assert log.slice_end(0, 6, 1, 600_000) == 2
    assert log.slice_end(2, 5, 1 << 20, 600_000) == 4
    assert log.slice_end(4, 5, 1 << 20, 600_000) == 4, "no whole group fits"
    assert [log.group_end(offset) for offset in range(7)] == [0, 0, 2, 2, 4, 4, 6]


def test_headers_place_and_backlog_tell_without_payloads(log: SQLiteLog) -> None:
    log.append(group(7, 2))
    log.append([entry(9, 1, b"12345", rows=4)])
    assert [(h.offset, h.entry.rows, h.entry.payload) for h in log.headers(1, 3)] == [
        (2, 1, b""),
        (3, 4, b""),
    ]
    assert log.place(3) == (Position(0, 9, 1), 1_009)
    rows, size, oldest = log.backlog(2)
    assert (rows, size) == (4, 5)
    assert oldest is not None
    assert log.backlog(3) == (0, 0, None)


def test_schemas_gives_the_newest_shape_of_each_table(log: SQLiteLog) -> None:
    shapes = [
        TableSchema(TABLE, tuple(Column(f"c{i}", "text") for i in range(n)), ("c0",), n) for n in (1, 2)
    ]
    for shape in shapes:
        log.append([entry(shape.version, payload=shape.to_json().encode(), kind="schema")])
    assert log.schemas() == {TABLE: shapes[1]}


def test_markers_of_copies_come_back_in_order_and_do_not_move_the_position(log: SQLiteLog) -> None:
    shape = TableSchema(TABLE, (Column("id", "bigint"),), ("id",), 3)
    marks = [
        CopyMark("begin", shape, (("a'b", "1"),), 7, "resync"),
        CopyMark("chunk", chunk=1),
        CopyMark("end", floor=40, ceiling=50),
    ]
    log.append([entry(30)])
    for commit, mark in zip((0, 40, 50), marks, strict=True):
        log.append([marker(TABLE, commit, mark)])
    assert log.position() == Position(0, 30, 1)
    assert {log.place(offset) for offset in (1, 2, 3, 4)} == {(Position(0, 30, 1), 1_030)}
    assert [(offset, table, at.commit, mark) for offset, table, at, _, mark in log.copy_marks()] == [
        (2, TABLE, 0, marks[0]),
        (3, TABLE, 40, marks[1]),
        (4, TABLE, 50, marks[2]),
    ]
    assert log.schemas() == {TABLE: shape}
    log.append([entry(35)])
    assert log.position() == Position(0, 35, 1)
    assert log.verify() == log.end()


def test_a_tables_slice_ends_with_a_group_and_counts_only_its_kinds(log: SQLiteLog) -> None:
    for i in range(4):
        log.append([entry(i + 1, rows=60_000), entry(i + 1, rows=1)])
        log.append([entry(i + 1, rows=90_000, kind="copy")])
    assert log.table_slice_end(TABLE, 0, 12, ("rows",)) == 3
    assert log.table_slice_end(TABLE, 3, 12, ("rows",)) == 6
    assert log.table_slice_end(TABLE, 9, 12, ("rows",)) == 12
    assert log.table_slice_end(TABLE, 0, 12, ("copy",)) == 5
    assert log.table_slice_end(TABLE, 0, 2, ("rows",)) == 2
    log.append([entry(9, rows=200_000), entry(9, rows=1)])
    assert log.table_slice_end(TABLE, 12, 14, ("rows",)) == 14


def test_notes_are_kept_over_a_reopening(log: SQLiteLog, tmp_path: Path) -> None:
    assert log.note("slot") is None
    log.set_note("slot", "a")
    log.set_note("slot", "b'é")
    log.close()
    again = SQLiteLog(tmp_path / "log.db")
    assert again.note("slot") == "b'é"
    assert again.id == log.id
    again.close()


# -- one group, whole or not at all ----------------------------------------------------------------------


def test_an_append_that_fails_in_the_middle_leaves_nothing(log: SQLiteLog, tmp_path: Path) -> None:
    end = log.append(group(1, 2))

    def broken() -> Iterator[Entry]:
        yield from group(2, 5)
        raise RuntimeError("source lost")

    with pytest.raises(RuntimeError, match="source lost"):
        log.append(broken())
    assert log.end() == end == log.verify()
    assert offsets(log.read(0, 1 << 20)) == [1, 2]
    assert log.append(group(2, 1)).offset == 3
    log.close()
    again = SQLiteLog(tmp_path / "log.db")
    assert again.verify() == again.end()
    assert again.end().offset == 3
    again.close()


WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_log
log = test_log.SQLiteLog(Path(sys.argv[2]))
for commit in range(1, 1000):
    print(log.append(test_log.group(commit, commit % 3 + 1)).offset, flush=True)
"""


def writer(path: Path, failpoints: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(Path(__file__).parent), str(path)],
        env={**os.environ, VARIABLE: failpoints},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("place", "held"), [("log.append.commit", 6), ("log.append.committed", 7)])
def test_a_writer_killed_at_the_fourth_commit_leaves_whole_groups(
    tmp_path: Path, place: str, held: int
) -> None:
    process = writer(tmp_path / "log.db", f"{place}=kill@4")
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert [int(line) for line in printed.split()] == [2, 5, 6]
    log = SQLiteLog(tmp_path / "log.db")
    assert log.verify() == log.end()
    assert log.end().offset == (6 if held == 6 else 8)
    assert log.read(0, 1 << 20)[-1].ends_group
    assert log.append(group(5_000, 1)).offset == log.verify().offset
    log.close()


def test_another_process_reads_whole_groups_while_one_writes(tmp_path: Path) -> None:
    process = writer(tmp_path / "log.db", "")
    assert process.stdout is not None
    process.stdout.readline()
    reader, seen = SQLiteLog(tmp_path / "log.db", read_only=True), 0
    while process.poll() is None or seen < reader.end().offset:
        entries = reader.read(seen, 4_000) if reader.end().offset > seen else []
        for item in entries:
            seen += 1
            assert item.offset == seen
        assert not entries or entries[-1].ends_group
        if seen > 300:
            break
    process.kill()
    process.communicate(timeout=30)
    assert seen > 300
    assert reader.verify().offset >= seen
    reader.close()


def test_another_thread_reads_and_waits_beside_the_writer(log: SQLiteLog) -> None:
    seen: list[int] = []

    def consume() -> None:
        while len(seen) < 200 and log.wait(len(seen), 10):
            entries = log.read(len(seen), 200)
            assert entries[-1].ends_group
            seen.extend(offsets(entries))

    thread = threading.Thread(target=consume)
    thread.start()
    for commit in range(1, 101):
        log.append(group(commit, 2))
    thread.join(30)
    assert seen == list(range(1, 201))
    assert not log.wait(200, 0.01)


# -- opening -------------------------------------------------------------------------------------------


def test_a_missing_log_is_not_created_by_a_reader(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="There is no log") as caught:
        SQLiteLog(tmp_path / "log.db", read_only=True)
    assert "headrace run" in caught.value.remedy
    assert not (tmp_path / "log.db").exists()


def test_a_newer_format_is_refused(log: SQLiteLog, tmp_path: Path) -> None:
    log.close()
    with apsw.Connection(str(tmp_path / "log.db")) as db:
        db.execute("PRAGMA user_version = 3")
    db.close()
    with pytest.raises(LogError, match="has format 3, this Headrace knows 2"):
        SQLiteLog(tmp_path / "log.db")


def test_a_format_from_before_the_first_release_is_refused(log: SQLiteLog, tmp_path: Path) -> None:
    log.close()
    with apsw.Connection(str(tmp_path / "log.db")) as db:
        db.execute("PRAGMA user_version = 1")
    db.close()
    with pytest.raises(LogError, match="has format 1, of a Headrace before its first release"):
        SQLiteLog(tmp_path / "log.db")


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.db").write_bytes(b"no database at all, " * 1000)
    with pytest.raises(LogDamaged, match="is not a log"):
        SQLiteLog(tmp_path / "log.db")


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="cannot be opened"):
        SQLiteLog(tmp_path / "absent" / "log.db")


def test_the_file_is_for_its_owner_alone(log: SQLiteLog, tmp_path: Path) -> None:
    assert (tmp_path / "log.db").stat().st_mode & 0o077 == 0


def test_commits_are_synced(log: SQLiteLog) -> None:
    db = log._connection()
    assert (db.pragma("journal_mode"), db.pragma("synchronous")) == ("wal", 2)


# -- damage --------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(log: SQLiteLog) -> tuple[SQLiteLog, apsw.Connection]:
    for commit in range(1, 21):
        log.append(group(commit, 3))
    return log, log._connection()


def is_seen(log: SQLiteLog, match: str) -> None:
    with pytest.raises(LogDamaged, match=match) as caught:
        log.verify()
    assert "backup" in caught.value.remedy


@pytest.mark.parametrize("offset", [1, 2, 3, 30, 58, 60])
@pytest.mark.parametrize("byte", [0, -1])
def test_a_flipped_byte_of_a_payload_is_seen(
    damaged: tuple[SQLiteLog, apsw.Connection], offset: int, byte: int
) -> None:
    log, db = damaged
    payload = bytearray(
        db.execute('SELECT payload FROM entries WHERE "offset" = ?', (offset,)).fetchall()[0][0]
    )
    payload[byte] ^= 1
    db.execute('UPDATE entries SET payload = ? WHERE "offset" = ?', (bytes(payload), offset))
    is_seen(log, f"the hash of offset {offset} does not hold")


HEADER = [
    "kind",
    "table_schema",
    "table_name",
    "first_epoch",
    "first_commit",
    "first_ordinal",
    "last_epoch",
    "last_commit",
    "last_ordinal",
    "committed_at",
    "rows",
    "schema_version",
    "appended_at",
    "ends_group",
]


@pytest.mark.parametrize("column", HEADER)
@pytest.mark.parametrize("offset", [1, 30, 60])
def test_an_altered_header_is_seen(
    damaged: tuple[SQLiteLog, apsw.Connection], column: str, offset: int
) -> None:
    log, db = damaged
    text = column in {"kind", "table_schema", "table_name"}
    change = f"{column} || 'x'" if text else f"1 - {column}" if column == "ends_group" else f"{column} + 1"
    db.execute(f'UPDATE entries SET {column} = {change} WHERE "offset" = ?', (offset,))
    is_seen(log, f"the hash of offset {offset} does not hold")


@pytest.mark.parametrize("offset", [1, 30, 60])
def test_an_altered_hash_is_seen(damaged: tuple[SQLiteLog, apsw.Connection], offset: int) -> None:
    log, db = damaged
    other = "CASE WHEN hash LIKE 'f%' THEN 'e' ELSE 'f' END || substr(hash, 2)"
    db.execute(f'UPDATE entries SET hash = {other} WHERE "offset" = ?', (offset,))
    is_seen(log, f"the hash of offset {offset} does not hold")


@pytest.mark.parametrize("offset", [1, 2, 30, 59])
def test_a_removed_entry_is_seen(damaged: tuple[SQLiteLog, apsw.Connection], offset: int) -> None:
    log, db = damaged
    db.execute('DELETE FROM entries WHERE "offset" = ?', (offset,))
    is_seen(log, f"offset {offset} is missing")


def test_a_removed_and_closed_up_entry_is_seen(damaged: tuple[SQLiteLog, apsw.Connection]) -> None:
    log, db = damaged
    db.execute('DELETE FROM entries WHERE "offset" = 30')
    for offset in range(31, 61):
        db.execute('UPDATE entries SET "offset" = "offset" - 1 WHERE "offset" = ?', (offset,))
    is_seen(log, "the hash of offset 30 does not hold")


def test_the_lost_end_of_a_group_is_seen(damaged: tuple[SQLiteLog, apsw.Connection]) -> None:
    log, db = damaged
    db.execute('DELETE FROM entries WHERE "offset" = 60')
    is_seen(log, "the group at offset 59 has no end")


@pytest.mark.parametrize(("one", "other"), [(1, 2), (29, 31), (1, 60)])
def test_swapped_entries_are_seen(damaged: tuple[SQLiteLog, apsw.Connection], one: int, other: int) -> None:
    log, db = damaged
    for old, new in ((one, -1), (other, one), (-1, other)):
        db.execute('UPDATE entries SET "offset" = ? WHERE "offset" = ?', (new, old))
    is_seen(log, f"the hash of offset {one} does not hold")


def test_a_repeated_entry_is_seen(damaged: tuple[SQLiteLog, apsw.Connection]) -> None:
    log, db = damaged
    columns = ", ".join([*HEADER, "hash", "bytes", "payload"])
    db.execute(
        f'INSERT INTO entries ("offset", {columns}) SELECT 61, {columns} FROM entries WHERE "offset" = 60'
    )
    is_seen(log, "the hash of offset 61 does not hold")


def test_a_source_that_went_back_is_seen(log: SQLiteLog) -> None:
    log.append(group(5, 1))
    log.append(group(4, 1))
    is_seen(log, "offset 2 goes back in the source")
