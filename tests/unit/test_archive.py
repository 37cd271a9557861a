"""The log in files: what was exported comes back as it was, and damage is named by file and offset."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.change import Column, CopyMark, Entry, Position, SourceMark, TableId, TableSchema
from headrace.errors import LogDamaged, LogFull, LogTrimmed, UserError
from headrace.log import archive, archive_file
from headrace.log.archive import Archived, export, files_in, restore
from headrace.log.backup import backup
from headrace.log.proof import verify
from headrace.log.sqlite import SQLiteLog

TABLE, OTHER = TableId("public", "t"), TableId("sales", "ö")
SHAPES = [TableSchema(t, (Column("id", "bigint", "", True),), ("id",), 1) for t in (TABLE, OTHER)]
DAY = 86_400_000_000
MIDNIGHT = 1_795_824_000_000_000  # 2026-11-28


class Clock:
    """Gives the log the time of its appends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = MIDNIGHT
        monkeypatch.setattr("headrace.log.sqlite.time.time_ns", lambda: self.now * 1000)

    def day(self, number: int, second: float = 0) -> None:
        self.now = MIDNIGHT + number * DAY + int(second * 1_000_000)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[SQLiteLog]:
    made = SQLiteLog(tmp_path / "shop.db", segment_bytes=4000)
    yield made
    made.close()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def into(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in" / "shop.db"


def rows(commit: int, ordinal: int = 1, size: int = 500, table: TableId = TABLE) -> Entry:
    at = Position(0, commit, ordinal)
    return Entry(
        "rows", table, at, at, 1_000 + commit, 3, 1, os.urandom(size), (5, 9), filter=b"filter %d" % commit
    )


def other(kind: str, commit: int, payload: str, table: TableId | None = TABLE) -> Entry:
    at = Position(0, commit, 0)
    return Entry(kind, table, at, at, commit, 0, 1, payload.encode())  # type: ignore[arg-type]


def fill(log: SQLiteLog, clock: Clock) -> None:
    """Every kind of entry, groups of several, on three days."""
    log.append([other("schema", 1, shape.to_json(), shape.table) for shape in SHAPES])
    log.append([other("marker", 1, CopyMark("begin", SHAPES[0], reason="ü").to_json())])
    at = Position(0, 1, 1)
    log.append(
        [Entry("copy", TABLE, at, at, 0, 2, 1, b"copied"), other("marker", 1, CopyMark("chunk").to_json())]
    )
    log.append([other("marker", 1, CopyMark("end").to_json())])
    clock.day(1)
    log.append([rows(2), rows(2, 2, 0), other("message", 2, "{}", None), other("truncate", 2, "{}", OTHER)])
    for commit in range(3, 20):
        log.append([rows(commit), rows(commit, 2, table=OTHER)])
    clock.day(2)
    log.append([other("marker", 20, SourceMark("gap", "x").to_json(), None)])
    log.append([rows(21), rows(21, 2)])


def content(log: SQLiteLog) -> tuple[object, ...]:
    """All that a reader of a log can see."""
    begin, end = log.begin(), log.end()
    return (
        log.id,
        begin,
        end,
        list(log.entries(begin.offset, end.offset)),
        log.schemas(),
        log.copy_marks(),
        [log.place(offset) for offset in range(begin.offset, end.offset + 1)],
        log.last_commit(),
        log.raw_rows("SELECT * FROM stops"),
        log.raw_rows("SELECT * FROM filters"),
        log.raw_rows("SELECT * FROM facts"),
        log.raw_rows('SELECT "offset", previous, hash, high_commit, high_at, appended_at FROM entries'),
    )


def read(path: Path) -> tuple[object, ...]:
    log = SQLiteLog(path, read_only=True)
    try:
        verify(log)
        return content(log)
    finally:
        log.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- there and back ------------------------------------------------------------------------------------


def test_what_was_exported_is_imported_as_it_was(log: SQLiteLog, out: Path, into: Path, clock: Clock) -> None:
    fill(log, clock)
    log.set_note("slot", "headrace_shop")
    done = export(log, out)
    assert names(out) == [f"shop-2026-11-{day}.parquet" for day in (28, 29, 30)]
    end = log.end()
    size = sum(len(item.entry.payload) for item in log.entries(0, end.offset))
    assert done == Archived(3, end.offset, 2 + 38 * 3, size, end)
    back = restore(reversed(files_in(out)), into)
    assert (back.entries, back.rows, back.bytes, back.head) == (done.entries, done.rows, done.bytes, end)
    assert names(into.parent) == ["shop.db", "shop.segments"]
    assert read(into) == content(log)


def test_an_imported_log_goes_on(log: SQLiteLog, out: Path, into: Path, clock: Clock) -> None:
    fill(log, clock)
    export(log, out)
    restore(files_in(out), into)
    for written in (log, SQLiteLog(into)):
        written.append([Entry("rows", TABLE, *(Position(0, 50, 1),) * 2, 1, 1, 1, b"the same")])
        assert verify(written).end == written.end()
        if written is not log:
            assert content(written) == content(log), "the chain goes on as the first log's does"
            written.close()


def test_a_trimmed_log_comes_back_with_its_beginning(
    log: SQLiteLog, out: Path, into: Path, clock: Clock
) -> None:
    fill(log, clock)
    log.trim(20, pinned=[6])
    assert log.begin().offset == 20
    export(log, out)
    assert names(out) == ["shop-2026-11-29.parquet", "shop-2026-11-30.parquet"]
    restore(files_in(out), into)
    assert read(into) == content(log)
    assert SQLiteLog(into, read_only=True).schemas() == {shape.table: shape for shape in SHAPES}


def test_any_later_day_can_be_the_first(log: SQLiteLog, out: Path, into: Path, clock: Clock) -> None:
    """What is made of it is what retention would have left."""
    fill(log, clock)
    export(log, out)
    restore(files_in(out)[1:], into)
    log.trim(6)
    assert read(into)[:8] == content(log)[:8]


def test_the_first_entries_of_an_export_can_be_chosen(
    log: SQLiteLog, out: Path, into: Path, clock: Clock
) -> None:
    fill(log, clock)
    assert export(log, out, after=8).entries == log.end().offset - 6, "with the whole of its group"
    assert names(out) == ["shop-2026-11-29.parquet", "shop-2026-11-30.parquet"]
    restore(files_in(out), into)
    with pytest.raises(UserError, match="is to begin behind 2"):
        export(log, out, after=2)


def test_a_group_is_of_the_day_of_its_append_and_never_torn(
    log: SQLiteLog, out: Path, into: Path, clock: Clock
) -> None:
    clock.day(0, 86_399.9)

    def over_midnight() -> Iterator[Entry]:
        yield rows(1)
        clock.day(1)
        yield rows(1, 2)

    log.append(over_midnight())
    log.append([rows(2)])
    clock.day(0)  # and the clock goes back
    log.append([rows(3), rows(3, 2)])
    clock.day(2)
    log.append([rows(4)])
    export(log, out)
    held = {path.name[5:15]: pq.read_table(path)["offset"].to_pylist() for path in files_in(out)}
    assert held == {"2026-11-28": [1, 2], "2026-11-29": [3, 4, 5], "2026-11-30": [6]}
    restore(files_in(out), into)
    assert read(into) == content(log)


def test_row_groups_are_bounded_and_a_large_payload_has_its_own(
    log: SQLiteLog, out: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_file, "ROW_GROUP_BYTES", 100_000)
    log.append([rows(1, i, 30_000) for i in range(1, 20)])
    log.append([rows(2, 1, 5_000_000), rows(2, 2, 10)])
    export(log, out)
    (path,) = files_in(out)
    with pq.ParquetFile(path) as file:
        groups = [file.read_row_group(i)["payload"].to_pylist() for i in range(file.num_row_groups)]
    assert [len(group) for group in groups] == [3, 3, 3, 3, 3, 3, 1, 1, 1]
    restore([path], into)
    assert read(into) == content(log)


def test_files_say_what_they_hold_in_columns_that_others_read(
    log: SQLiteLog, out: Path, clock: Clock
) -> None:
    fill(log, clock)
    export(log, out)
    table = pq.read_table(files_in(out)[1])
    assert table.schema.field("payload").type == pa.large_binary()
    assert str(table["appended_at"][5]) == "2026-11-29 00:00:00+00:00"
    entry = log.entry(7)
    assert entry is not None
    place = table["offset"].to_pylist().index(7)
    assert table["payload"][place].as_py() == entry.entry.payload
    assert table["hash"][place].as_py().hex() == entry.hash
    assert table["kept"].to_pylist().count(True) == 5, "shapes and markers of tables from the day before"
    assert (files_in(out)[1].stat().st_mode & 0o777, out.stat().st_mode & 0o777) == (0o600, 0o700)


def test_an_empty_log_has_no_files(log: SQLiteLog, out: Path) -> None:
    assert export(log, out) == Archived(0, 0, 0, 0, log.end())


# -- again ---------------------------------------------------------------------------------------------


def test_an_export_goes_on_where_it_ended(log: SQLiteLog, out: Path, into: Path, clock: Clock) -> None:
    fill(log, clock)
    export(log, out)
    first = {path.name: path.stat().st_ino for path in files_in(out)}
    again = export(log, out)
    assert (again.files, again.entries, again.found, again.head) == (0, 0, 3, log.end())
    log.append([rows(30)])
    grown = export(log, out)
    assert (grown.files, grown.entries, grown.found) == (1, 4, 2), "the last day, anew"
    clock.day(3)
    log.append([rows(31)])
    assert (export(log, out).found, len(files_in(out))) == (3, 4)
    now = {path.name: path.stat().st_ino for path in files_in(out)}
    assert [name for name in first if now[name] != first[name]] == ["shop-2026-11-30.parquet"]
    restore(files_in(out), into)
    assert read(into) == content(log)


def test_a_day_that_retention_has_begun_to_delete_is_still_completed(
    log: SQLiteLog, out: Path, into: Path, clock: Clock
) -> None:
    fill(log, clock)
    export(log, out)
    before = content(log)
    log.append([rows(30)])
    whole = content(log)
    log.trim(log.end().offset - 1)
    assert log.begin().offset == 47, "in the middle of the last day"
    export(log, out)
    restore(files_in(out), into)
    assert read(into)[:4] == whole[:4]
    assert whole[:2] == before[:2]


def test_what_retention_took_before_it_was_exported_is_said(log: SQLiteLog, out: Path, clock: Clock) -> None:
    fill(log, clock)
    export(log, out)
    for commit in (30, 31):
        log.append([rows(commit)])
    log.trim(log.end().offset - 1)
    with pytest.raises(LogTrimmed, match=r"2026-11-30.parquet ends at offset 47, .* begins behind 48"):
        export(log, out)


def test_a_log_that_is_trimmed_while_it_is_exported_is_exported_from_its_new_beginning(
    log: SQLiteLog, out: Path, into: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for commit in range(1, 40):
        log.append([rows(commit)])
    monkeypatch.setattr(archive, "_PAGE", 4)
    real = log.raw_rows
    pages = iter(range(1000))

    def trimmed(sql: str, values: tuple[object, ...] = ()) -> object:
        if "LIMIT 4" in sql and next(pages) == 1:
            log.trim(12)
        return real(sql, values)

    monkeypatch.setattr(log, "raw_rows", trimmed)
    export(log, out)
    monkeypatch.undo()
    restore(files_in(out), into)
    assert read(into)[:8] == content(log)[:8]
    assert log.begin().offset == 12


def test_files_of_another_log_are_left_alone(log: SQLiteLog, out: Path, tmp_path: Path) -> None:
    log.append([rows(1)])
    export(log, out)
    before = [path.read_bytes() for path in files_in(out)]
    (tmp_path / "b").mkdir()
    second = SQLiteLog(tmp_path / "b" / "shop.db")
    second.append([rows(1)])
    with pytest.raises(UserError, match="is of another log"):
        export(second, out)
    second.close()
    assert [path.read_bytes() for path in files_in(out)] == before


def test_an_older_copy_of_the_log_is_refused(log: SQLiteLog, out: Path, tmp_path: Path) -> None:
    log.append([rows(1)])
    backup(log, tmp_path / "old")
    log.append([rows(2)])
    export(log, out)
    old = SQLiteLog(tmp_path / "old" / "shop.db")
    for what in ("shorter", "other"):
        with pytest.raises(UserError, match="it is an older copy"):
            export(old, out)
        old.append([rows(3 if what == "shorter" else 4)])
    old.close()


def test_a_missing_day_is_written_again_while_the_log_holds_it(
    log: SQLiteLog, out: Path, into: Path, clock: Clock
) -> None:
    fill(log, clock)
    export(log, out)
    files_in(out)[1].unlink()
    export(log, out)
    restore(files_in(out), into)
    assert read(into) == content(log)


def test_an_export_that_is_killed_leaves_whole_files_and_goes_on(
    log: SQLiteLog, out: Path, into: Path, clock: Clock
) -> None:
    fill(log, clock)
    out.mkdir()
    (out / "shop-2026-11-28.parquet.tmp").write_bytes(b"half")
    export(log, out)
    assert len(names(out)) == 3
    restore(files_in(out), into)
    assert read(into) == content(log)


def test_a_full_disk_is_said_and_leaves_nothing_half(
    log: SQLiteLog, out: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(log, clock)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archive_file.os, "fsync", full)
    with pytest.raises(LogFull, match="no room for more on the disk of"):
        export(log, out)
    assert names(out) == []


# -- damage --------------------------------------------------------------------------------------------


def rewritten(path: Path, change: pa.Table) -> None:
    """Write a file with other rows under its own footer, as one who knows the format could."""
    with pq.ParquetFile(path) as file:
        facts = {k: v for k, v in file.metadata.metadata.items() if k.startswith(b"headrace")}
    with pq.ParquetWriter(path, change.schema) as writer:
        writer.write_table(change)
        writer.add_key_value_metadata(facts)


def refused(out: Path, into: Path, match: str) -> None:
    with pytest.raises(LogDamaged, match=match):
        restore(files_in(out), into)
    assert names(into.parent) == [], "nothing is left behind"


def test_a_removed_altered_or_swapped_row_is_named(
    log: SQLiteLog, out: Path, into: Path, clock: Clock
) -> None:
    fill(log, clock)
    export(log, out)
    path = files_in(out)[1]
    table = pq.read_table(path)
    place = table["offset"].to_pylist().index(12)
    rest = table.num_rows - place - 1
    without = pa.concat_tables([table.slice(0, place), table.slice(place + 1)])
    rewritten(path, without)
    refused(out, into, r"shop-2026-11-29.parquet: offset 12 is missing")
    rewritten(path, table.slice(0, table.num_rows - 1))
    refused(out, into, r"shop-2026-11-29.parquet: offset 44 is missing")
    rewritten(path, table.slice(1))
    refused(out, into, r"shop-2026-11-29.parquet: of 5 entries kept from before offset 7 it holds 4")
    swapped = [table.slice(0, place), table.slice(place + 1, 1), table.slice(place, 1)]
    rewritten(path, pa.concat_tables([*swapped, table.slice(place + 2)]))
    refused(out, into, r"shop-2026-11-29.parquet: offset 12 is missing")
    for column, value in (("rows", 4), ("payload", b"x"), ("filter", b"x"), ("hash", bytes(32))):
        cells = table[column].to_pylist()
        cells[place] = value
        at = table.schema.get_field_index(column)
        rewritten(
            path, table.set_column(at, table.schema.field(at), pa.array(cells, table.schema.field(at).type))
        )
        refused(out, into, r"shop-2026-11-29.parquet: the hash of offset 12 does not hold")
    cells = table["high_at"].to_pylist()
    cells[place] += 1
    at = table.schema.get_field_index("high_at")
    rewritten(path, table.set_column(at, "high_at", pa.array(cells)))
    refused(out, into, r"shop-2026-11-29.parquet: offset 12 has another place in the stream")
    assert rest > 0
    rewritten(path, table)
    restore(files_in(out), into)


def test_no_flipped_byte_changes_what_is_imported(
    log: SQLiteLog, out: Path, into: Path, clock: Clock
) -> None:
    """One that nothing depends on may pass; then what is made is what was exported."""
    fill(log, clock)
    export(log, out)
    (path,) = files_in(out)[1:2]
    whole = path.read_bytes()
    found = missed = 0
    places = range(0, len(whole), max(1, len(whole) // 150))
    for at in places:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        try:
            restore(files_in(out), into)
        except LogDamaged as error:
            found += "shop-2026-11-29.parquet" in str(error) and names(into.parent) == []
        else:
            assert read(into) == content(log)
            shutil.rmtree(into.parent)
            into.parent.mkdir()
            missed += 1
    assert found + missed == len(places)
    assert found > 100


def test_missing_swapped_and_foreign_files_are_named(
    log: SQLiteLog, out: Path, into: Path, clock: Clock, tmp_path: Path
) -> None:
    fill(log, clock)
    export(log, out)
    one, two, three = files_in(out)
    two.rename(tmp_path / "aside")
    refused(out, into, r"30.parquet: it begins at offset 45, and the one before, .*28.parquet, ends at 6")
    three.rename(two)
    refused(out, into, r"29.parquet: it is shop-2026-11-30.parquet, from offset 45 on, renamed or swapped")
    two.rename(three)
    (tmp_path / "aside").rename(two)
    two.write_bytes(two.read_bytes()[:-100])
    refused(out, into, r"29.parquet: it cannot be opened")
    two.write_bytes(b"")
    refused(out, into, r"29.parquet: it cannot be opened")
    assert one.exists()


def test_a_log_that_is_there_is_never_touched(log: SQLiteLog, out: Path, into: Path, clock: Clock) -> None:
    fill(log, clock)
    export(log, out)
    restore(files_in(out), into)
    before = into.read_bytes()
    with pytest.raises(UserError, match="is there already"):
        restore(files_in(out), into)
    assert into.read_bytes() == before
    with pytest.raises(UserError, match="its hashes cover that name"):
        restore(files_in(out), into.with_name("other.db"))


def test_an_import_that_was_killed_is_begun_anew(log: SQLiteLog, out: Path, into: Path, clock: Clock) -> None:
    fill(log, clock)
    export(log, out)
    left = into.parent / ".shop.importing"
    (left / "shop.segments").mkdir(parents=True)
    (left / "shop.segments" / f"{1:020}.segment").write_bytes(b"half")
    (left / "shop.db").write_bytes(b"half")
    restore(files_in(out), into)
    assert names(into.parent) == ["shop.db", "shop.segments"]
    assert read(into) == content(log)


KILLED = """
import os, signal, sys
from pathlib import Path
from headrace.log.archive import files_in, restore
rename = Path.rename
def once(path, to):
    rename(path, to)
    if path.parent.name == ".shop.importing":
        os.kill(os.getpid(), signal.SIGKILL)
Path.rename = once
restore(files_in(Path(sys.argv[1])), Path(sys.argv[2]))
"""


def killed_between_its_renames(out: Path, into: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, out, into], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert ".shop.importing" in names(into.parent)


def test_an_import_that_was_killed_between_its_renames_is_finished(
    log: SQLiteLog, out: Path, into: Path, clock: Clock
) -> None:
    fill(log, clock)
    export(log, out)
    killed_between_its_renames(out, into)
    with pytest.raises(LogDamaged):  # a pipeline that is started now
        SQLiteLog(into)
    done = restore(files_in(out), into)
    assert (done.head, done.entries) == (log.end(), log.end().offset)
    assert names(into.parent) == ["shop.db", "shop.segments"]
    assert read(into) == content(log)


@pytest.mark.parametrize("fault", [OSError(errno.EIO, "the disk is gone"), KeyboardInterrupt()])
@pytest.mark.parametrize("when", ["sync", "rename"])
def test_an_import_that_fails_between_its_renames_is_finished(
    log: SQLiteLog, out: Path, into: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch,
    fault: BaseException, when: str,
) -> None:  # fmt: skip
    fill(log, clock)
    export(log, out)
    rename, sync = Path.rename, archive.sync_folder

    def failing_rename(path: Path, to: Path) -> Path:
        if when == "rename" and path.suffix == ".segments":
            raise fault
        return rename(path, to)

    def failing_sync(path: Path) -> None:
        if when == "sync" and path == into.parent:
            raise fault
        sync(path)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "rename", failing_rename)
        broken.setattr(archive, "sync_folder", failing_sync)
        for _ in range(2):  # the second one is to finish the first
            with pytest.raises(type(fault)):
                restore(files_in(out), into)
            if when == "rename":
                assert names(into.parent) == [".shop.importing", "shop.db"]
    if when == "rename" or ".shop.importing" in names(into.parent):
        done = restore(files_in(out), into)
        assert done.head == log.end()
    assert names(into.parent) == ["shop.db", "shop.segments"]
    assert read(into) == content(log)


def test_an_import_of_more_than_the_one_that_was_killed_says_what_is_there(
    log: SQLiteLog, out: Path, into: Path, clock: Clock
) -> None:
    fill(log, clock)
    export(log, out)
    killed_between_its_renames(out, into)
    before = content(log)
    log.append([rows(1 << 40)])
    export(log, out)
    with pytest.raises(UserError, match="finished now: it ends at offset 47"):
        restore(files_in(out), into)
    assert names(into.parent) == ["shop.db", "shop.segments"]
    assert read(into) == before


def test_segments_and_databases_of_others_are_left_alone(
    log: SQLiteLog, out: Path, into: Path, clock: Clock
) -> None:
    """What a killed import left is beside a log whose database, or whose segments, were lost."""
    fill(log, clock)
    export(log, out)
    for lost in ("shop.db", "shop.segments"):
        restore(files_in(out), into)
        for path in into.parent.iterdir():
            if path.name == lost:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        left = into.parent / ".shop.importing"
        (left / "shop.segments").mkdir(parents=True)
        (left / "shop.segments" / f"{1:020}.segment").write_bytes(b"half")
        before = {path: path.read_bytes() for path in into.parent.glob("shop*/*")} | {
            path: path.read_bytes() for path in into.parent.glob("shop.db")
        }
        with pytest.raises(UserError, match="is there already"):
            restore(files_in(out), into)
        assert {path: path.read_bytes() for path in before} == before
        assert len(names(into.parent)) == 1
        shutil.rmtree(into.parent)
        into.parent.mkdir()


# -- backup --------------------------------------------------------------------------------------------

WRITER = """
import os, sys, time
from pathlib import Path
from headrace.change import Entry, Position, TableId
from headrace.log.sqlite import SQLiteLog
log = SQLiteLog(Path(sys.argv[1]), segment_bytes=200_000)
commit = 0
while True:
    commit += 1
    at = Position(0, commit, 1)
    log.append([Entry("rows", TableId("public", "t"), at, at, commit, 1, 1, os.urandom(20_000))] * 2)
    if commit % 20 == 0:
        log.trim(log.end().offset - 400)
    if commit == 250:
        print("ready", flush=True)
    if commit > 250:
        time.sleep(0.005)
"""


def test_backups_beside_a_writer_that_appends_and_trims(tmp_path: Path) -> None:
    path = tmp_path / "live" / "shop.db"
    path.parent.mkdir()
    writer = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        live = SQLiteLog(path, read_only=True)
        heads = []
        for number in range(6):
            done = backup(live, tmp_path / f"b{number}")
            copy = SQLiteLog(tmp_path / f"b{number}" / "shop.db")
            assert verify(copy).end == done.head
            assert copy.id == live.id
            heads.append(done.head.offset)
            copy.append([rows(1 << 40)])
            assert verify(copy).end.offset == done.head.offset + 1
            copy.close()
        assert heads == sorted(heads)
        assert heads[0] < heads[-1], "the writer went on meanwhile"
        out = tmp_path / "out"
        export(live, out)
        (tmp_path / "in").mkdir()
        back = restore(files_in(out), tmp_path / "in" / "shop.db")
        assert back.head.log_id == live.id
        live.close()
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        assert writer.stdout is not None
        writer.stdout.close()


def test_a_backup_begins_again_when_a_segment_goes(
    log: SQLiteLog, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(log, clock)
    monkeypatch.setattr("headrace.log.backup._ATTEMPTS", 3)
    import headrace.log.backup as module

    real, trims = module._copy_segments, iter([20, 30])

    def trimmed(*arguments: object) -> None:
        if (through := next(trims, None)) is not None:
            log.trim(through)
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_copy_segments", trimmed)
    done = backup(log, tmp_path / "copy")
    assert read(tmp_path / "copy" / "shop.db") == content(log)
    assert done.entries == log.end().offset - 30
    kept = [p.name for p in log.segments.glob("*.segment")]
    assert sorted(kept) == names(tmp_path / "copy" / "shop.segments"), "no segment that nothing refers to"


def test_a_backup_that_never_holds_is_given_up(
    log: SQLiteLog, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(log, clock)

    def gone(*_: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("headrace.log.backup._copy_segments", gone)
    with pytest.raises(LogTrimmed, match="faster than they are copied"):
        backup(log, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_backup_of_a_damaged_log_is_none(log: SQLiteLog, tmp_path: Path, clock: Clock) -> None:
    fill(log, clock)
    segment = sorted(log.segments.glob("*.segment"))[1]
    data = bytearray(segment.read_bytes())
    data[100] ^= 1
    segment.write_bytes(data)
    (tmp_path / "copy").mkdir()
    with pytest.raises(LogDamaged, match="the hash of offset"):
        backup(log, tmp_path / "copy")
    assert names(tmp_path / "copy") == []


def test_a_backup_needs_an_empty_folder_and_takes_the_consumers_along(
    log: SQLiteLog, tmp_path: Path, clock: Clock
) -> None:
    fill(log, clock)
    import apsw

    cursors = apsw.Connection(str(log.path.with_suffix(".cursors")))
    assert cursors.pragma("journal_mode", "WAL") == "wal"
    cursors.execute("CREATE TABLE c (n); INSERT INTO c VALUES (7)")
    done = backup(log, tmp_path / "copy")
    cursors.close()
    assert names(tmp_path / "copy") == ["shop.cursors", "shop.db", "shop.segments"]
    assert done.files == 2 + len(names(tmp_path / "copy" / "shop.segments"))
    copied = apsw.Connection(str(tmp_path / "copy" / "shop.cursors"))
    assert copied.execute("SELECT n FROM c").fetchall() == [(7,)]
    copied.close()
    with pytest.raises(UserError, match="not an empty folder"):
        backup(log, tmp_path / "copy")
