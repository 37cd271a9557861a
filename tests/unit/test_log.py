"""The embedded log: what is special to SQLite and segments; what every log keeps is in tests/contracts."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import apsw
import pytest

from headrace.change import Entry
from headrace.errors import (
    LogBusy,
    LogDamaged,
    LogError,
    LogFull,
    LogNotDurable,
    LogTrimmed,
    Verdict,
    verdict_of,
)
from headrace.log import proof
from headrace.log.database import Database
from headrace.log.proof import verify
from headrace.log.segments import segment_path
from headrace.log.sqlite import SQLiteLog
from headrace.state import forget_empty_logs
from headrace.testing.logs import OTHER, TABLE, armed, change, everything, group


@pytest.fixture
def log(tmp_path: Path) -> Iterator[SQLiteLog]:
    made = SQLiteLog(tmp_path / "log.db", segment_bytes=2_500)
    yield made
    made.close()


def filled(log: SQLiteLog, groups: int = 4, size: int = 1_000, first: int = 1) -> SQLiteLog:
    for commit in range(first, first + groups):
        log.append([change(commit, i, os.urandom(size)) for i in range(2)])
    return log


def reopened(log: SQLiteLog) -> SQLiteLog:
    log.close()
    return SQLiteLog(log.path, segment_bytes=2_500)


def segments(log: SQLiteLog) -> dict[int, int]:
    """First offset and size of each segment."""
    return {int(path.stem): path.stat().st_size for path in log.segments.glob("*.segment")}


# -- segments ------------------------------------------------------------------------------------------


def test_segments_roll_when_they_are_full_also_inside_a_group(log: SQLiteLog) -> None:
    log.append([change(1, i, os.urandom(1_000)) for i in range(7)])
    log.append([change(2, i, os.urandom(1_000)) for i in range(3)])
    assert segments(log) == {1: 3_000, 4: 3_000, 7: 3_000, 10: 1_000}
    log = reopened(log)
    log.append([change(3, 1, os.urandom(1_600)), change(3, 2, b"small")])
    assert segments(log) == {1: 3_000, 4: 3_000, 7: 3_000, 10: 2_600, 12: 5}
    assert verify(log).entries == 12
    log.close()


def test_a_segment_can_be_asked_to_end(log: SQLiteLog) -> None:
    log.append(group(1, 1))
    log.roll()
    log.append(group(2, 1))
    log.append(group(3, 1))
    assert segments(log) == {1: 3, 2: 6}
    assert verify(log).entries == 3


def test_small_facts_stand_in_the_database_and_take_no_segment(log: SQLiteLog) -> None:
    log.append([change(1, kind=kind, payload=b"{}") for kind in ("truncate", "message")])
    assert segments(log) == {}
    log.append([change(2), change(2, 2, b"")])
    assert segments(log) == {3: 7}
    assert verify(log).entries == 4


def test_payloads_of_any_size_come_back_as_they_were(log: SQLiteLog) -> None:
    payloads = [b"small", os.urandom(100_000), b"", os.urandom(12_345_678)]
    log.append([change(7, i, payload) for i, payload in enumerate(payloads, 1)])
    assert [item.entry.payload for item in everything(log)] == payloads
    assert verify(log).bytes == sum(map(len, payloads))


@pytest.mark.parametrize("torn", [1, 5_000])
def test_what_an_append_left_behind_is_removed_by_the_next_one(log: SQLiteLog, torn: int) -> None:
    before = segments(filled(log))
    with (log.segments / f"{7:020d}.segment").open("ab") as file:
        file.write(os.urandom(torn))
    for segment in (9, 11):
        (log.segments / f"{segment:020d}.segment").write_bytes(os.urandom(torn))
    log = reopened(log)
    assert segments(log) == {**before, 7: 2_000 + torn, 9: torn, 11: torn}, "opening it removes nothing"
    database = sum(path.stat().st_size for path in log.path.parent.glob("log.db*"))
    size = database + sum(before.values()) + torn
    assert (log.size(), log.beyond(size)) == (size, 0), "nothing is deleted for what is no part of the log"
    assert verify(log).end == log.end()
    log.append(group(9, 2))
    assert segments(log) == {**before, 7: 2_006}
    assert [item.offset for item in everything(log)] == list(range(1, 11))
    assert verify(log).entries == 10
    log.close()


def test_a_log_that_never_came_to_its_first_commit_is_empty(log: SQLiteLog) -> None:
    with armed("log.append.commit=raise"), pytest.raises(OSError, match="failpoint"):
        log.append(group(1, 3))
    (log.segments / f"{1:020d}.segment").write_bytes(b"torn")
    log = reopened(log)
    assert log.end().offset == 0
    log.append(group(1, 1))
    assert segments(log) == {1: 3}
    log.close()


@pytest.mark.parametrize("large", [0, 30])
def test_a_log_that_is_trimmed_to_a_size_has_no_more_than_that(log: SQLiteLog, large: int) -> None:
    """Groups go as a whole: also one larger than many segments, or that begins in one and ends in another."""
    log.append([change(1, i, os.urandom(1_000)) for i in range(large or 2)])
    filled(log, groups=12, first=2)
    for limit in (30_000, 20_000, 10_000):
        rest = log.size() - sum(segments(log).values())
        log.trim(log.beyond(rest + limit))
        assert 0 < sum(segments(log).values()) <= limit
        assert verify(log).end == log.end()
    assert log.beyond(log.size()) == 0


def test_a_size_that_the_newest_segment_alone_exceeds_takes_no_group_twice(log: SQLiteLog) -> None:
    filled(log, groups=3)
    log.trim(log.beyond(0))
    begin = log.begin().offset
    assert log.trim(log.beyond(0)) == 0
    assert log.begin().offset == begin


def held_open(log: SQLiteLog) -> list[str]:
    """Return the segments that this process has open to read them."""
    links = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return [link for link in links if str(log.segments) in link]


def test_a_segment_that_was_trimmed_is_closed_so_that_its_room_is_free(log: SQLiteLog) -> None:
    filled(log)
    assert len(everything(log)) == 8
    log.trim(6)
    assert segments(log) == {7: 2_000}
    assert not [path for path in held_open(log) if path.endswith("(deleted)")]


def test_a_reader_beside_holds_few_segments_open(log: SQLiteLog) -> None:
    filled(log, groups=20)
    own = len(held_open(log))
    reader = SQLiteLog(log.path, read_only=True)
    assert len(everything(reader)) == 40
    assert len(held_open(log)) - own <= 2
    reader.close()


# -- databases that do not belong to their segments ------------------------------------------------------


def files(log: SQLiteLog) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in log.segments.iterdir()}


def test_segments_without_their_database_are_refused_and_stay(log: SQLiteLog) -> None:
    filled(log).close()
    before = files(log)
    for left in ("nothing", "an empty file"):
        log.path.unlink()
        if left != "nothing":
            log.path.touch()
        with pytest.raises(LogDamaged, match=r"log.db is missing, and .*log.segments holds 3") as caught:
            SQLiteLog(log.path)
        assert "Put log.db back" in caught.value.remedy
        assert (files(log), log.path.exists()) == (before, left != "nothing")
        log.path.touch()
    log.path.unlink()
    for path in log.segments.glob("*.segment"):
        path.unlink()
    SQLiteLog(log.path).close()


@pytest.mark.parametrize("trimmed", [False, True])
def test_an_older_database_than_its_segments_is_refused(
    log: SQLiteLog, tmp_path: Path, trimmed: bool
) -> None:
    """Whole segments that a newer database has committed are no leftovers."""
    filled(log, groups=2)
    if trimmed:
        log.trim(4)
    log.close()
    older = log.path.read_bytes()
    log = filled(SQLiteLog(log.path, segment_bytes=2_500), first=3)
    log.close()
    before = files(log)
    newer = log.path.rename(tmp_path / "newer")
    log.path.write_bytes(older)
    with pytest.raises(
        LogDamaged, match=r"ends at offset 4, and a newer one .*[57].segment beyond"
    ) as caught:
        SQLiteLog(log.path)
    assert "the newest log.db" in caught.value.remedy
    assert files(log) == before
    newer.rename(log.path)
    log = reopened(log)
    assert verify(log).end.offset == 12
    log.close()


def test_what_a_killed_append_of_many_segments_left_is_never_refused(log: SQLiteLog) -> None:
    filled(log)
    with pytest.raises(RuntimeError, match="killed"):
        log.append(killed(log))
    before = segments(log)
    assert max(before) > 20
    again = SQLiteLog(log.path, segment_bytes=2_500)
    assert (again.end().offset, segments(again)) == (8, before)
    assert again.append(group(9, 1)).offset == 9
    assert segments(again) == {1: 3_000, 4: 3_000, 7: 2_003}
    assert verify(again).entries == 9
    again.close()


def killed(log: SQLiteLog) -> Iterator[Entry]:
    """Make the entries of a large group, and leave its segments as a kill does."""
    yield from (change(9, i, os.urandom(1_000)) for i in range(20))
    log._writer.undo = lambda: None  # type: ignore[method-assign,union-attr]
    raise RuntimeError("killed")


def test_a_group_that_fails_leaves_no_bytes(log: SQLiteLog) -> None:
    before = segments(filled(log))

    def broken(size: int) -> Iterator[Entry]:
        yield from (change(9, i, os.urandom(size)) for i in range(5))
        raise RuntimeError("source lost")

    open_before = len(list(Path("/proc/self/fd").iterdir()))
    for size in [10, 1_000] * 10:
        with pytest.raises(RuntimeError, match="source lost"):
            log.append(broken(size))
        assert segments(log) == before
    log.append(group(10, 1))
    assert verify(log).entries == 9
    open_after = len(list(Path("/proc/self/fd").iterdir()))
    assert open_after < open_before + 10, "files of segments that were undone are closed"


@pytest.mark.parametrize(
    "fault",
    [UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), OSError("no route"), apsw.CorruptError("spool")],
)
def test_a_fault_of_the_source_is_not_told_as_one_of_the_log(log: SQLiteLog, fault: Exception) -> None:
    def making() -> Iterator[Entry]:
        yield from group(1, 2)
        raise fault

    with pytest.raises(type(fault)) as caught:
        log.append(making())
    assert caught.value is fault
    assert log.append(group(1, 2)).offset == 2


def test_a_missing_or_short_segment_is_named(log: SQLiteLog) -> None:
    filled(log)
    first, last = (log.segments / f"{n:020d}.segment" for n in (1, 7))
    content = first.read_bytes()
    log._reader.close()
    first.unlink()
    for ask in (lambda: log.read(0, 1), lambda: verify(log)):
        with pytest.raises(LogDamaged, match=f"{first.name} is missing") as caught:
            ask()
        assert "backup" in caught.value.remedy
    first.write_bytes(content[:-1])
    log._reader.close()
    with pytest.raises(LogDamaged, match="offset 3 does not hold"):
        verify(log)
    first.write_bytes(content)
    log._reader.close()
    assert verify(log).entries == 8
    os.truncate(last, 1_999)
    with pytest.raises(LogDamaged, match=f"{last.name} is missing or shorter"):
        reopened(log)
    last.unlink()
    with pytest.raises(LogDamaged, match=f"{last.name} is missing or shorter"):
        SQLiteLog(log.path)


def test_a_proof_beside_a_writer_that_has_begun_further_segments(log: SQLiteLog) -> None:
    filled(log)

    def making() -> Iterator[Entry]:
        yield from (change(9, i, os.urandom(1_000)) for i in range(6))
        assert len(segments(log)) == 5
        assert verify(reader).end.offset == 8

    reader = SQLiteLog(log.path, read_only=True)
    log.append(making())
    assert verify(reader).end.offset == 14
    reader.close()


def test_a_proof_beside_a_trim_is_begun_again(log: SQLiteLog, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(log, groups=300, size=1)
    rows = proof._rows
    trims = iter([300, 500])

    def trimmed(log: SQLiteLog, after: int, through: int) -> Iterator[object]:
        log.trim(next(trims, 0))
        return rows(log, after, through)

    monkeypatch.setattr(proof, "_rows", trimmed)
    found = verify(log)
    assert (found.begin.offset, found.entries) == (500, 100)


def trims_each_walk(log: SQLiteLog, monkeypatch: pytest.MonkeyPatch, *, late: bool = False) -> list[int]:
    """Have retention delete a group as each walk begins; `late`: before that group is read. Returns where
    walks began."""
    walks: list[int] = []
    rows = proof._rows

    def trimmed(log: SQLiteLog, after: int, through: int) -> Iterator[object]:
        found = rows(log, after, through)
        if after == (begin := log.begin().offset):
            walks.append(after)
            read = [] if late else [next(found)]
            log.trim(begin + 2)
            yield from read
        yield from found

    monkeypatch.setattr(proof, "_rows", trimmed)
    return walks


def test_damage_is_told_at_once_while_retention_trims(
    log: SQLiteLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(log, groups=100)
    newest = segment_path(log.segments, max(segments(log)))
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    walks = trims_each_walk(log, monkeypatch)
    with pytest.raises(LogDamaged, match="hash of offset 200 does not hold"):
        verify(log)
    assert len(walks) == 1


def test_a_proof_that_retention_overtakes_each_time_is_given_up(
    log: SQLiteLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "_ATTEMPTS", 3)
    filled(log, groups=10, size=1)
    walks = trims_each_walk(log, monkeypatch, late=True)
    with pytest.raises(LogTrimmed, match="faster than it is read"):
        verify(log)
    assert walks == [0, 2, 4]


def test_a_segment_that_retention_removes_beside_a_proof_is_not_missed(
    log: SQLiteLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(log, groups=20)
    trims = iter([10])

    def path_of(folder: Path, segment: int) -> Path:
        log.trim(next(trims, 0))
        return segment_path(folder, segment)

    monkeypatch.setattr(proof, "segment_path", path_of)
    assert verify(log).end.offset == 40
    assert log.begin().offset == 10
    segment_path(log.segments, min(segments(log))).write_bytes(b"short")
    with pytest.raises(LogDamaged):
        verify(log)


# -- the disk ------------------------------------------------------------------------------------------


def test_a_full_disk_is_waited_for(log: SQLiteLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a payload came to the segment: its bytes go, also if the segment ends before they did."""
    filled(log)
    before = segments(log)
    pwrite = os.pwrite
    room = 700

    def full(file: int, data: memoryview, at: int) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = min(room, len(data))
        room -= taken
        return pwrite(file, data[:taken], at)

    monkeypatch.setattr(os, "pwrite", full)
    for _ in range(2):
        with pytest.raises(LogFull, match="no room") as caught:
            log.append([change(9, 1, os.urandom(1_000))])
        assert verdict_of(caught.value) is Verdict.RETRY
        assert (segments(log), log.end().offset) == (before, 8)
    monkeypatch.setattr(os, "pwrite", pwrite)
    log.append([change(9, 1, os.urandom(501)), change(9, 2, b"next")])
    assert segments(log) == {1: 3_000, 4: 3_000, 7: 2_501, 10: 4}
    assert verify(log).entries == 10


def test_no_room_for_the_database_is_told_as_that(log: SQLiteLog) -> None:
    end = filled(log).end()
    before = segments(log)
    db = log._db.connection()
    pages = db.pragma("max_page_count", db.pragma("page_count") + 2)
    with pytest.raises(LogFull, match="no room"):
        log.append([change(9, payload=os.urandom(100_000), kind="message") for _ in range(2)])
    with pytest.raises(LogFull, match="no room"):
        log.set_note("large", "x" * 100_000)
    assert (log.end(), segments(log)) == (end, before)
    db.pragma("max_page_count", pages + 1_000)
    assert log.append([change(9, payload=os.urandom(100_000), kind="message")]).offset == 9
    assert verify(log).entries == 9


def test_the_reserve_is_made_with_the_second_segment_and_is_no_part_of_the_log(
    log: SQLiteLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve = log.path.with_suffix(".reserve")
    log.append([change(1, 1, os.urandom(2_600))])
    assert not reserve.exists(), "a single segment is never given back"
    log.append([change(2, 1, os.urandom(2_600))])
    assert reserve.stat().st_size == 2_500 // 4
    size = log.size()
    reserve.unlink()
    assert log.size() == size

    def full(file: int, at: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    log.append([change(3, 1, os.urandom(2_600))])
    assert not reserve.exists(), "one that is not whole is none"
    monkeypatch.undo()
    log.trim(1)
    assert reserve.exists()


def test_after_a_failed_sync_nothing_is_appended_any_more(
    log: SQLiteLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = filled(log).end()
    synced = os.fdatasync

    def fails(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fails)
    with pytest.raises(LogNotDurable, match="could not be synced") as caught:
        log.append(group(9, 2))
    assert "Mend the disk" in caught.value.remedy
    monkeypatch.setattr(os, "fdatasync", synced)
    for _ in range(2):
        with pytest.raises(LogNotDurable):
            log.append(group(9, 2))
    assert (log.end(), len(everything(log))) == (end, 8)
    log = reopened(log)
    assert (verify(log).end, log.append(group(9, 2)).offset) == (end, 10)
    log.close()


class FailingDouble:
    """The database's `rows`, of which one kind of statement raises: SQLite fails at no test's wish."""

    def __init__(self, log: SQLiteLog, monkeypatch: pytest.MonkeyPatch, verb: str, error: LogError) -> None:
        self._rows, self._verb, self._error = log._db.rows, verb, error
        self.failed: list[str] = []
        self.written: list[str] = []
        monkeypatch.setattr(log._db, "rows", self)

    def __call__(self, sql: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        if sql.startswith(self._verb):
            self.failed.append(sql)
            raise self._error
        if not sql.lstrip().startswith(("SELECT", "ROLLBACK")):
            self.written.append(sql)
        return self._rows(sql, values)


@pytest.mark.parametrize("verb", ["INSERT OR REPLACE", "COMMIT", "PRAGMA incremental_vacuum"])
def test_after_a_failed_sync_of_the_database_nothing_is_written_any_more(
    log: SQLiteLog, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    filled(log)
    error = LogNotDurable("could not be synced")
    writes = {
        "note": lambda: log.set_note("n", "1"),
        "trim": lambda: log.trim(6),
        "append": lambda: log.append(group(9, 1)),
    }
    failing = FailingDouble(log, monkeypatch, verb, error)
    with pytest.raises(LogNotDurable):
        writes["note" if verb.startswith("INSERT") else "trim"]()
    failing._verb = "nothing"
    failing.written.clear()
    for write in writes.values():
        with pytest.raises(LogNotDurable):
            write()
    assert (failing.written, log.note("n"), log.end().offset) == ([], None, 8)


@pytest.mark.parametrize("is_committed", [False, True])
def test_nothing_is_written_from_a_state_that_is_not_known(
    log: SQLiteLog, monkeypatch: pytest.MonkeyPatch, is_committed: bool
) -> None:
    """An append fails, and so does what would tell how far it came; that is asked again before the next."""
    filled(log)
    error = LogFull("no room for the index of the WAL")
    failing = FailingDouble(log, monkeypatch, 'SELECT "offset", hash FROM entries', error)
    if is_committed:
        monkeypatch.setattr(log._db, "transaction", told_as_failed(log))
    with armed(f"log.append.commit={'sleep:0' if is_committed else 'raise'}"), pytest.raises(LogFull):
        log.append([change(9, i, os.urandom(1_000)) for i in range(4)])
    monkeypatch.undo()
    monkeypatch.setattr(log._db, "rows", failing)
    failing.written.clear()
    for write in (lambda: log.append(group(10, 1)), lambda: log.set_note("n", "1"), lambda: log.trim(6)):
        with pytest.raises(LogFull):
            write()
    assert failing.written == []
    monkeypatch.undo()
    end = 12 if is_committed else 8
    assert log.append(group(10, 1)).offset == end + 1
    assert verify(log).entries == end + 1


def told_as_failed(log: SQLiteLog) -> Callable[[], AbstractContextManager[None]]:
    """Return a double of the database's `transaction`, which commits and says that it could not."""
    transaction = log._db.transaction

    @contextmanager
    def double() -> Iterator[None]:
        with transaction():
            yield
        raise LogError("could not be read or written")

    return double


def test_a_failed_sync_of_the_folder_counts_as_one(log: SQLiteLog, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("headrace.log.segments.sync_folder", fails)
    with pytest.raises(LogNotDurable):
        log.append(group(1, 1))
    assert log.end().offset == 0


def test_payloads_are_synced_before_their_headers_are_committed(
    log: SQLiteLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    synced = os.fdatasync

    def sync(file: int) -> None:
        reader = SQLiteLog(log.path, read_only=True)
        order.append(f"segment synced at {reader.end().offset}")
        reader.close()
        synced(file)

    monkeypatch.setattr(os, "fdatasync", sync)
    log.append([change(1, i, os.urandom(1_000)) for i in range(7)])
    assert order == ["segment synced at 0"] * 3


# -- the database --------------------------------------------------------------------------------------


def test_commits_are_synced_and_pages_have_checksums(log: SQLiteLog) -> None:
    for connection in (log._db.connection(), SQLiteLog(log.path, read_only=True)._db.connection()):
        assert (connection.pragma("journal_mode"), connection.pragma("synchronous")) == ("wal", 2)
        assert (connection.pragma("auto_vacuum"), connection.reserve_bytes(None, -1)) == (2, 8)
        assert connection.pragma("checksum_verification") == "1"


def test_the_database_shrinks_when_it_is_trimmed(log: SQLiteLog) -> None:
    for commit in range(1, 200):
        log.append([change(commit, payload=os.urandom(5_000), kind="message")])
    log = reopened(log)
    before = log.path.stat().st_size
    log.trim(190)
    assert log._db.connection().pragma("freelist_count") == 0
    log = reopened(log)
    assert log.path.stat().st_size < before // 5
    log.close()


def test_a_thread_comes_to_read_while_a_long_group_is_appended(log: SQLiteLog) -> None:
    filled(log)
    found: list[int] = []

    def making() -> Iterator[Entry]:
        yield from group(9, 3)
        thread = threading.Thread(target=lambda: found.append(len(log.read(0, 1 << 20))))
        thread.start()
        thread.join(5)
        yield change(9, 4)

    log.append(making())
    assert found == [8]


def test_a_missing_log_is_not_created_by_a_reader(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="There is no log") as caught:
        SQLiteLog(tmp_path / "log.db", read_only=True)
    assert "headrace run" in caught.value.remedy
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("version", "words"),
    [(6, "has format 6, this Headrace knows 5"), (4, "has format 4, of a Headrace before its first release")],
)
def test_another_format_is_refused(log: SQLiteLog, version: int, words: str) -> None:
    log._db.connection().pragma("user_version", version)
    log.close()
    for read_only in (True, False):
        with pytest.raises(LogError, match=words):
            SQLiteLog(log.path, read_only=read_only)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.db").write_bytes(b"no database at all, " * 1000)
    with pytest.raises(LogDamaged, match="is not what was written"):
        SQLiteLog(tmp_path / "log.db")


def test_an_empty_file_is_no_log_for_a_reader(tmp_path: Path) -> None:
    (tmp_path / "log.db").touch()
    with pytest.raises(LogError, match="holds no log yet"):
        SQLiteLog(tmp_path / "log.db", read_only=True)


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="cannot be opened"):
        SQLiteLog(tmp_path / "absent" / "log.db")


def test_files_are_for_their_owner_alone(log: SQLiteLog) -> None:
    filled(log)
    names = {"log.db", "log.db-wal", "log.db-shm", "log.segments", "log.reserve"}
    assert {path.name for path in log.path.parent.iterdir()} == names
    modes = {path.stat().st_mode & 0o777 for path in log.path.parent.rglob("*") if path.is_file()}
    assert (modes, log.segments.stat().st_mode & 0o777) == ({0o600}, 0o700)


def test_a_log_that_a_refused_start_has_made_goes_as_a_whole_and_no_other_does(tmp_path: Path) -> None:
    """So that the right state folder can come back."""
    (tmp_path / "log").mkdir()
    logs = [SQLiteLog(tmp_path / "log" / f"{name}.db") for name in ("made", "known", "torn", "used")]
    logs[1].set_note("system", "7")
    (logs[2].segments / f"{1:020d}.segment").write_bytes(b"torn")
    logs[3].append(group(1, 1))
    for log in logs:
        log.close()
    forget_empty_logs(tmp_path)
    left = {path.name for path in (tmp_path / "log").iterdir() if path.suffix in (".db", ".segments")}
    assert left == {
        f"{name}{suffix}" for name in ("known", "torn", "used") for suffix in (".db", ".segments")
    }


def test_errors_of_other_databases_are_told_in_our_words(tmp_path: Path) -> None:
    db = Database(tmp_path / "x.db", script="CREATE TABLE t (a)", version=1)
    for error, told in (
        (apsw.IOError("disk I/O error"), LogError),
        (apsw.FullError("full"), LogFull),
        (apsw.CorruptError("malformed"), LogDamaged),
    ):
        with pytest.raises(told), db.told():
            raise error
    for extended, told in (
        (apsw.SQLITE_IOERR_DATA, LogDamaged),
        (apsw.SQLITE_IOERR_FSYNC, LogNotDurable),
        (apsw.SQLITE_IOERR_DIR_FSYNC, LogNotDurable),
        (apsw.SQLITE_IOERR_SHMSIZE, LogFull),
        (apsw.SQLITE_IOERR_WRITE, LogError),
    ):
        failure = apsw.IOError("disk I/O error")
        failure.extendedresult = extended
        with pytest.raises(LogError) as caught, db.told():
            raise failure
        assert type(caught.value) is told
    db.close()


@pytest.mark.parametrize("cause", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("kind", [apsw.IOError, apsw.CantOpenError])
def test_an_error_whose_cause_is_no_room_is_waited_for(
    tmp_path: Path, kind: type[apsw.Error], cause: int
) -> None:
    class ConnectionDouble:
        """SQLite's connection after a system call has failed, which no quota of a test can bring about."""

        system_errno = cause

    db = Database(tmp_path / "x.db", script="CREATE TABLE t (a)", version=1)
    db._local.connection = ConnectionDouble()
    failure = kind("a failed call")
    with pytest.raises(LogFull), db.told():
        raise failure
    failure.extendedresult = apsw.SQLITE_IOERR_FSYNC
    with pytest.raises(LogNotDurable), db.told():
        raise failure
    db.close()


def test_a_log_that_another_process_holds_is_waited_for(
    log: SQLiteLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log._db.connection().set_busy_timeout(50)
    with closing(apsw.Connection(str(log.path), vfs="cksmvfs")) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LogBusy, match="held by another process") as caught:
            log.set_note("slot", "s")
        assert verdict_of(caught.value) is Verdict.RETRY
        other.execute("ROLLBACK")
    log.set_note("slot", "s")
    assert log.note("slot") == "s"


def test_what_a_table_brought_between_two_offsets_is_told_without_its_other_entries(log: SQLiteLog) -> None:
    log.append([change(1, 1, b"12345", rows=4), change(1, 2, b"123", table=OTHER, rows=9)])
    log.append([change(2, 1, b"1234567", rows=2)])
    assert log.volume(TABLE, 0, 3) == log.volume(TABLE, 0, 9, ("rows", "copy")) == (6, 12)
    assert log.volume(TABLE, 1, 3) == (2, 7)
    assert log.volume(TABLE, 0, 2, ("rows",)) == (4, 5)
    assert log.volume(OTHER, 0, 3) == (9, 3)
    assert log.volume(TABLE, 0, 3, ("copy",)) == log.volume(TABLE, 3, 3) == (0, 0)
