"""Places as people name them, and what staging has to show as of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from entries import rows, shape
from headrace.change import TableId
from headrace.errors import LogTrimmed, UserError
from headrace.log.sqlite import SQLiteLog
from headrace.place import AsOf, as_of

SHAPE = shape(TableId("public", "t"), "id", "v")


@pytest.fixture
def log(tmp_path: Path) -> Iterator[SQLiteLog]:
    """Groups of the commits 10; 20, 30, 40 in one entry; 50, 60 in an entry each; 70. An LSN is a commit, and
    was committed as many seconds after 1970."""
    made = SQLiteLog(tmp_path / "shop.db")
    for group in ([[10]], [[20, 30, 40]], [[50], [60]], [[70]]):
        made.append([rows(SHAPE, [("c", commit, 1, (str(commit), "x")) for commit in e]) for e in group])
    yield made
    made.close()


@pytest.mark.parametrize(
    ("text", "newest"),
    [
        ("start", 0),
        ("end", 70),
        ("2", 40),
        ("3", 60),  # with the whole group that holds it
        ("0/A", 10),
        ("0/9", 0),
        ("0/1E", 30),
        ("0/1D", 20),
        ("0/32", 50),
        ("1970-01-01T00:00:30", 30),
        ("1970-01-01T00:00:29.999999", 20),
        ("1970-01-01T00:01:10Z", 70),
    ],
)
def test_what_a_place_shows(log: SQLiteLog, text: str, newest: int) -> None:
    through, before = as_of(log, text)
    staged = {10: 1, 20: 2, 30: 2, 40: 2, 50: 3, 60: 4, 70: 5}
    shown = [c for c, at in staged.items() if at <= through and (before is None or (0, c) < before)]
    assert shown == [c for c in staged if c <= newest]


@pytest.mark.parametrize("text", ["6", "0/47", "1970-01-01T00:01:10.000001"])
def test_what_is_not_captured_yet_is_refused(log: SQLiteLog, text: str) -> None:
    with pytest.raises(UserError, match="beyond what is captured: the log of shop has come to"):
        as_of(log, text)


def test_what_names_no_place_is_refused(log: SQLiteLog) -> None:
    with pytest.raises(UserError, match="is no place in the log"):
        as_of(log, "yesterday")


def test_what_retention_deleted_is_still_in_staging(log: SQLiteLog) -> None:
    log.trim(4, pinned=[2])
    assert as_of(log, "0/1E") == AsOf(2, (0, 31))
    assert as_of(log, "0/32") == AsOf(4, (0, 51))
    assert as_of(log, "2") == AsOf(2)
    assert as_of(log, "0/46") == AsOf(5)
    with pytest.raises(LogTrimmed, match="around 3 has been deleted") as raised:
        as_of(log, "3")
    assert raised.value.remedy == "Name 2 or 4, or an LSN."
    with pytest.raises(LogTrimmed, match="that time"):
        as_of(log, "1970-01-01T00:00:30")
