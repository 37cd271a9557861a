"""Damage of every kind to a log of 10 MB is found by its proof, and the first bad offset is named."""

from __future__ import annotations

import os
import random
import re
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.change import CopyMark
from headrace.errors import LogDamaged
from headrace.log.proof import Verified, verify
from headrace.log.sqlite import SQLiteLog
from headrace.testing.logs import OTHER, SHAPE, change, marker, schema

SEGMENT = 1_500_000
FLIPS = 2_000  # over all files, by size
FLIPS_IN_DATABASE = 300  # besides those of the 2,000 that fall upon it


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log with all that one may hold, and with a beginning: some of it was trimmed."""
    path = tmp_path_factory.mktemp("whole") / "log.db"
    log = SQLiteLog(path, segment_bytes=SEGMENT)
    made = random.Random(7)
    for commit in range(1, 241):
        table = OTHER if commit % 5 == 0 else SHAPE.table
        group = [
            change(commit, i, made.randbytes(made.randrange(40_000)), table=table, filter=made.randbytes(900))
            for i in range(made.randrange(1, 6))
        ]
        if commit % 30 == 1:
            shape = replace(SHAPE, version=commit)
            group = [schema(commit, shape), *group, marker(commit, CopyMark("begin", shape, (("a",),)))]
        if commit % 4 == 0:
            content = made.randbytes(2_000).hex().encode()
            group.append(change(commit, 9, content, kind="message", table=None, filter=b""))
            group.append(change(commit, 10, b"{}", kind="truncate", filter=b""))
        log.append(group)
    log.trim(60, pinned=[log.group_end(20)])
    log.set_note("slot", "headrace_shop")
    assert log.size() > 10_000_000
    log.close()
    return path


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole.parent, tmp_path / "copy")
    return tmp_path / "copy" / "log.db"


@contextmanager
def flipped(path: Path, at: int, mask: int) -> Iterator[None]:
    """Flip bits of one byte in place, and flip them back."""
    file = os.open(path, os.O_RDWR)
    (byte,) = os.pread(file, 1, at)
    os.pwrite(file, bytes([byte ^ mask]), at)
    try:
        yield
    finally:
        os.pwrite(file, bytes([byte]), at)
        os.close(file)


def proved(path: Path) -> Verified:
    """Open a log as a reader that is started now does, and prove it."""
    log = SQLiteLog(path, read_only=True)
    try:
        return verify(log)
    finally:
        log.close()


def owners(log: SQLiteLog) -> Callable[[str, int], int]:
    """Return what tells whose payload a byte of a segment belongs to."""
    rows = log.raw_rows(
        'SELECT segment, start, "offset" FROM entries WHERE bytes > 0 AND segment IS NOT NULL'
    )
    known = sorted((f"{segment:020d}.segment", start, offset) for segment, start, offset in rows)
    return lambda name, at: known[bisect_right(known, (name, at, 1 << 62)) - 1][2]


def sampled(files: list[Path], number: int, seed: int, dead: tuple[str, int]) -> list[tuple[Path, int, int]]:
    """Sample bytes of files evenly over all of them, with the bits to flip; the same ones each time.

    `dead` is the segment in which the log begins, and how many of its bytes stand before the beginning:
    they are nobody's any more.
    """
    chosen = random.Random(seed)
    sizes = [path.stat().st_size for path in files]
    found: list[tuple[Path, int, int]] = []
    while len(found) < number:
        at, i = chosen.randrange(sum(sizes)), 0
        while at >= sizes[i]:
            at, i = at - sizes[i], i + 1
        mask = chosen.choice([1 << chosen.randrange(8), chosen.randrange(1, 256)])
        if files[i].name != dead[0] or at >= dead[1]:
            found.append((files[i], at, mask))
    return found


def unseen(
    flips: list[tuple[Path, int, int]], prove: Callable[[], object], owner: Callable[[str, int], int]
) -> list[tuple[str, int, int]]:
    """Flip one after the other and return those that the proof does not see."""
    found = []
    for path, at, mask in flips:
        with flipped(path, at, mask):
            try:
                prove()
            except LogDamaged as error:
                told = str(error)
            else:
                found.append((path.name, at, mask))
                continue
        if path.suffix == ".segment":
            assert f"the hash of offset {owner(path.name, at)} does not hold" in told
    return found


def test_every_flipped_byte_is_found(copy: Path) -> None:
    segments = sorted(copy.with_suffix(".segments").glob("*.segment"))
    assert len(segments) >= 4
    log = SQLiteLog(copy, read_only=True)
    owner = owners(log)
    ((first, start),) = log.raw_rows(
        'SELECT segment, start FROM entries WHERE segment IS NOT NULL ORDER BY "offset" LIMIT 1'
    )
    files, dead = [copy, *segments], (f"{first:020d}.segment", start)
    flips = sampled(files, FLIPS, 1, dead)
    in_database = [flip for flip in flips if flip[0] == copy] + sampled([copy], FLIPS_IN_DATABASE, 2, dead)
    in_segments = [flip for flip in flips if flip[0] != copy]
    assert min(len(in_segments), len(in_database) - FLIPS_IN_DATABASE) > 100
    # Payloads are read from their files each time, pages of the database once: it is opened for each flip.
    assert unseen(in_segments, lambda: verify(log), owner) == []
    log.close()
    assert unseen(in_database, lambda: proved(copy), owner) == []
    header = [(copy, at, 1 << bit) for at in range(100) for bit in (0, at % 8, 7)]
    assert unseen(header, lambda: proved(copy), owner) == []
    assert proved(copy).entries > 300, "all was flipped back"


# -- whoever writes to the database, so that its pages' checksums are right ------------------------------


@pytest.fixture
def log(copy: Path) -> Iterator[SQLiteLog]:
    made = SQLiteLog(copy, segment_bytes=SEGMENT)
    yield made
    made.close()


def is_seen(log: SQLiteLog, words: str) -> None:
    with pytest.raises(LogDamaged, match=re.escape(words)) as caught:
        verify(log)
    assert "backup" in caught.value.remedy


def altered(log: SQLiteLog, sql: str, *values: object) -> None:
    with log._db.transaction():
        db = log._db.connection()
        db.execute(sql, values)
        assert db.changes() == 1, "nothing was altered"


HEADER = (
    "kind", "table_schema", "table_name", "first_epoch", "first_commit", "first_ordinal", "last_epoch",
    "last_commit", "last_ordinal", "min_txid", "max_txid", "committed_at", "latest_at", "rows",
    "schema_version", "appended_at", "ends_group",
)  # fmt: skip


def some(log: SQLiteLog, condition: str = "true") -> list[int]:
    """Return the first, a middle and the last offset of entries of some kind that are not trimmed."""
    found = log.raw_rows(
        f'SELECT "offset" FROM entries WHERE "offset" > ? AND ({condition}) ORDER BY 1', (log.begin().offset,)
    )
    return [found[0][0], found[len(found) // 2][0], found[-1][0]]


@pytest.mark.parametrize("column", HEADER)
def test_an_altered_header_is_seen(log: SQLiteLog, column: str) -> None:
    text = column in {"kind", "table_schema", "table_name"}
    change = f"{column} || 'x'" if text else f"1 - {column}" if column == "ends_group" else f"{column} + 1"
    back = f"substr({column}, 1, length({column}) - 1)" if text else change.replace("+", "-")
    for offset in some(log, f"{column} IS NOT NULL"):
        altered(log, f'UPDATE entries SET {column} = {change} WHERE "offset" = ?', offset)
        is_seen(log, f"the hash of offset {offset} does not hold")
        altered(log, f'UPDATE entries SET {column} = {back} WHERE "offset" = ?', offset)
    assert verify(log).entries > 300


def test_an_altered_hash_is_seen(log: SQLiteLog) -> None:
    for offset in some(log):
        for column in ("hash", "previous"):
            ((good,),) = log.raw_rows(f'SELECT {column} FROM entries WHERE "offset" = ?', (offset,))
            bad = bytes([good[0] ^ 1, *good[1:]])
            altered(log, f'UPDATE entries SET {column} = ? WHERE "offset" = ?', bad, offset)
            is_seen(log, f"the hash of offset {offset} does not hold")
            altered(log, f'UPDATE entries SET {column} = ? WHERE "offset" = ?', good, offset)
    assert verify(log).entries > 300


@pytest.mark.parametrize("change", ["NULL", "zeroblob(900)", "CAST(filter || x'00' AS BLOB)"])
def test_an_altered_filter_is_seen(log: SQLiteLog, change: str) -> None:
    offset = some(log, '"offset" IN (SELECT "offset" FROM filters)')[1]
    if change == "NULL":
        altered(log, 'DELETE FROM filters WHERE "offset" = ?', offset)
    else:
        altered(log, f'UPDATE filters SET filter = {change} WHERE "offset" = ?', offset)
    is_seen(log, f"the hash of offset {offset} does not hold")


@pytest.mark.parametrize(
    "column", ["high_epoch", "high_commit", "high_ordinal", "high_at", "high_committed_at"]
)
def test_an_altered_place_in_the_stream_is_seen(log: SQLiteLog, column: str) -> None:
    """No hash covers it, but it is made of what they cover."""
    for offset in some(log):
        altered(log, f'UPDATE entries SET {column} = {column} + 1 WHERE "offset" = ?', offset)
        is_seen(log, f"offset {offset} has another place in the stream")
        altered(log, f'UPDATE entries SET {column} = {column} - 1 WHERE "offset" = ?', offset)


@pytest.mark.parametrize("column", ["bytes", "start", "payload"])
def test_an_altered_place_or_payload_is_seen(log: SQLiteLog, column: str) -> None:
    kinds = (
        "kind IN ('message', 'schema', 'marker')" if column == "payload" else "kind = 'rows' AND bytes > 9"
    )
    offset = some(log, kinds)[1]
    change = "CAST(payload || ' ' AS BLOB)" if column == "payload" else f"{column} - 1"
    altered(log, f'UPDATE entries SET {column} = {change} WHERE "offset" = ?', offset)
    is_seen(log, f"the hash of offset {offset} does not hold")


def test_text_in_the_place_of_bytes_is_seen(log: SQLiteLog) -> None:
    altered(log, "UPDATE filters SET filter = filter || 'x' WHERE \"offset\" = ?", log.begin().offset + 1)
    is_seen(log, "is not what was written")


def test_an_altered_shape_that_retention_has_kept_is_seen(log: SQLiteLog) -> None:
    ((offset,),) = log.raw_rows("SELECT min(\"offset\") FROM entries WHERE kind = 'schema'")
    assert offset < log.begin().offset
    change = "CAST(replace(CAST(payload AS TEXT), 'bigint', 'bigins') AS BLOB)"
    altered(log, f'UPDATE entries SET payload = {change} WHERE "offset" = ?', offset)
    is_seen(log, f"the hash of offset {offset} does not hold")


def test_a_removed_entry_is_seen(log: SQLiteLog) -> None:
    for offset in reversed(some(log, "NOT ends_group")):
        altered(log, 'DELETE FROM entries WHERE "offset" = ?', offset)
        is_seen(log, f"offset {offset} is missing")


def test_a_removed_and_closed_up_entry_is_seen(log: SQLiteLog) -> None:
    offset, end = some(log, "NOT ends_group")[1], log.end().offset
    altered(log, 'DELETE FROM entries WHERE "offset" = ?', offset)
    for moved in range(offset + 1, end + 1):
        altered(log, 'UPDATE entries SET "offset" = "offset" - 1 WHERE "offset" = ?', moved)
    is_seen(log, f"the hash of offset {offset} does not hold")


def test_the_lost_end_of_a_group_is_seen(log: SQLiteLog) -> None:
    end = log.append([change(900, 1), change(900, 2)]).offset
    altered(log, 'DELETE FROM entries WHERE "offset" = ?', end)
    log.close()
    again = SQLiteLog(log.path, read_only=True)
    is_seen(again, f"the group at offset {end - 1} has no end")
    again.close()


def test_a_removed_beginning_is_seen(log: SQLiteLog) -> None:
    begin = log.begin().offset
    altered(log, 'UPDATE stops SET hash = randomblob(32) WHERE "offset" = ?', begin)
    is_seen(log, f"the hash of offset {begin + 1} does not hold")
    altered(log, 'DELETE FROM stops WHERE "offset" = ?', begin)
    is_seen(log, "is missing")


def test_swapped_entries_are_seen(log: SQLiteLog) -> None:
    first, middle, last = some(log)
    for one, other in ((middle, middle + 1), (first, middle), (middle, last)):
        for _ in range(2):
            for old, new in ((one, -1), (other, one), (-1, other)):
                altered(log, 'UPDATE entries SET "offset" = ? WHERE "offset" = ?', new, old)
            if log.raw_rows('SELECT previous FROM entries WHERE "offset" = ?', (one,)) != before(log, one):
                is_seen(log, f"the hash of offset {one} does not hold")
    assert verify(log).entries > 300, "all was swapped back"


def before(log: SQLiteLog, offset: int) -> list[tuple[bytes]]:
    """Return the hash that must stand before an offset."""
    mark = log.mark(offset - 1)
    assert mark is not None
    return [(bytes.fromhex(mark.hash),)]


def test_a_repeated_entry_is_seen(log: SQLiteLog) -> None:
    end = log.end().offset
    names = [str(row[1]) for row in log.raw_rows("PRAGMA table_info(entries)")][1:]
    columns = ", ".join(names)
    altered(
        log,
        f'INSERT INTO entries ("offset", {columns}) SELECT ?, {columns} FROM entries WHERE "offset" = ?',
        end + 1, end,
    )  # fmt: skip
    log.close()
    again = SQLiteLog(log.path, read_only=True)
    is_seen(again, f"the hash of offset {end + 1} does not hold")
    again.close()


def test_a_source_that_went_back_is_seen(log: SQLiteLog) -> None:
    end = log.append([change(5)]).offset
    is_seen(log, f"offset {end} goes back in the source")


def test_an_index_that_misses_an_entry_is_seen(log: SQLiteLog) -> None:
    with log._db.transaction():
        db = log._db.connection()
        # Without the index's knowledge: SQLite is told that there is none.
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_schema SET sql = replace(sql, 'WHERE kind IN', 'WHERE kind NOT IN') "
                   "WHERE name = 'markers'")  # fmt: skip
        db.execute("PRAGMA writable_schema = RESET")
    with pytest.raises(LogDamaged, match="markers"):
        proved(log.path)


# -- segments ------------------------------------------------------------------------------------------


def sealed(log: SQLiteLog) -> Path:
    return sorted(log.segments.glob("*.segment"))[1]


def test_a_removed_segment_is_seen(log: SQLiteLog) -> None:
    path = sealed(log)
    path.unlink()
    is_seen(log, f"{path.name} is missing (offset {int(path.stem)})")


@pytest.mark.parametrize("less", [1, 10_000])
def test_a_truncated_segment_is_seen(log: SQLiteLog, less: int) -> None:
    path, owner = sealed(log), owners(log)
    first = owner(path.name, path.stat().st_size - less)
    os.truncate(path, path.stat().st_size - less)
    is_seen(log, f"the hash of offset {first} does not hold")


@pytest.mark.parametrize("more", [1, 10_000])
def test_extra_bytes_in_a_sealed_segment_are_seen(log: SQLiteLog, more: int) -> None:
    path = sealed(log)
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"x" * more)
    is_seen(log, f"{path.name} has {size + more} bytes and should have {size}")


def test_swapped_segments_are_seen(log: SQLiteLog) -> None:
    one, other = sorted(log.segments.glob("*.segment"))[1:3]
    aside = one.with_suffix(".aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    is_seen(log, f"the hash of offset {int(one.stem)} does not hold")


@pytest.mark.parametrize("is_first", [True, False])
def test_bytes_between_payloads_are_seen(log: SQLiteLog, is_first: bool) -> None:
    """Whoever moves payloads and says so in the database: each hash holds, but some bytes are nobody's."""
    path = sealed(log)
    rows = log.raw_rows('SELECT "offset", start FROM entries WHERE segment = ? ORDER BY 1', (int(path.stem),))
    offset, start = rows[0 if is_first else len(rows) // 2]
    content = path.read_bytes()
    path.write_bytes(content[:start] + b"hidden" + content[start:])
    with log._db.transaction():
        db = log._db.connection()
        moved = 'UPDATE entries SET start = start + 6 WHERE segment = ? AND "offset" >= ?'
        db.execute(moved, (int(path.stem), offset))
    is_seen(log, f"offset {offset} stands elsewhere than behind the one before")
