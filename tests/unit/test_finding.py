"""Finding in the log: the history of a key, transactions by id, place and time; only candidates are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from entries import SECOND, message, rows, schema, shape, truncate
from headrace.change import CopyMark, Entry, Offset, Position, SourceMark, TableId, source_marker
from headrace.errors import LogTrimmed, UserError
from headrace.log import finding
from headrace.log.finding import KeyChange, history, parse_key, transactions_from, transactions_of
from headrace.log.places import Cut, Shapes, cut_at_commit, cut_at_offset, cut_at_time
from headrace.log.sqlite import SQLiteLog
from headrace.payload import decode_rows

ORDERS, ITEMS, LINES = TableId("public", "orders"), TableId("sales", "items"), TableId("public", "lines")
SHAPE = shape(ORDERS, "id", "status", "note")
ITEM = shape(ITEMS, "order_id", "line", "note", key=("order_id", "line"))
LINE = shape(LINES, "text", key=())


@pytest.fixture
def log(tmp_path: Path) -> Iterator[SQLiteLog]:
    made = SQLiteLog(tmp_path / "shop.db")
    yield made
    made.close()


def of(log: SQLiteLog, text: str) -> list[KeyChange]:
    shapes = Shapes(log)
    return list(history(log, shapes, *parse_key(shapes, text)))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Offset]:
    """Which entries were read, in order."""
    read: list[Offset] = []
    original = finding._read

    def noted(log: SQLiteLog, offset: Offset) -> object:
        read.append(offset)
        return original(log, offset)

    monkeypatch.setattr(finding, "_read", noted)
    return read


# -- a key's history


def test_a_key_tells_what_changed_when_and_by_whom(log: SQLiteLog) -> None:
    log.append(
        [schema(10, SHAPE), rows(SHAPE, [("c", 10, 1, ("1", "new", "a")), ("c", 10, 2, ("2", "x", ""))])]
    )
    log.append(
        [
            message(20, "app", "job 17", 1),
            message(20, "headrace", "heartbeat", 1),
            message(30, "app", "another transaction's", 1),
            rows(SHAPE, [("u", 20, 2, ("1", "paid", None), ["note"]), ("u", 30, 2, ("2", "y", ""))]),
        ]
    )
    log.append([rows(SHAPE, [("d", 40, 1, ("1", None, None), ["status", "note"])])])
    made, paid, gone = of(log, "orders:1")
    assert (made.op, made.old, made.new) == ("c", None, {"id": "1", "status": "new", "note": "a"})
    assert (made.position, made.committed_at, made.txid, made.lsn) == (
        Position(0, 10, 1),
        10 * SECOND,
        710,
        -39,
    )
    assert paid.changed == {"status": ("new", "paid")}
    assert paid.new == {"id": "1", "status": "paid", "note": "a"}, "what was not sent is known from before"
    assert paid.messages == (("app", "job 17"),)
    assert (gone.op, gone.new, gone.messages) == ("d", None, ())
    assert gone.old == {"id": "1", "status": "paid", "note": "a"}
    assert of(log, "public.orders:3") == []


def test_old_values_that_the_source_sent_are_known_without_a_history(log: SQLiteLog) -> None:
    whole = {"id": "1", "status": "old", "note": None}
    log.append([schema(10, SHAPE), rows(SHAPE, [("u", 10, 1, ("1", "new", "n"), None, whole)])])
    log.append([rows(SHAPE, [("u", 20, 1, ("2", "new", "n"))])])
    (change,) = of(log, "orders:1")
    assert change.changed == {"status": ("old", "new"), "note": (None, "n")}
    (change,) = of(log, "orders:2")
    assert (change.old, change.changed) == (None, {})


def test_a_row_that_gets_another_key_is_found_under_both(log: SQLiteLog) -> None:
    log.append([schema(10, SHAPE), rows(SHAPE, [("c", 10, 1, ("1", "new", "a"))])])
    log.append([rows(SHAPE, [("u", 20, 1, ("2", "new", "b"), None, {"id": "1"})])])
    log.append([rows(SHAPE, [("u", 30, 1, ("2", "paid", "b")), ("c", 30, 2, ("1", "again", ""))])])
    made, moved, again = of(log, "orders:1")
    assert (moved.key_before, moved.key_after) == (("1",), ("2",))
    assert moved.changed == {"id": ("1", "2"), "note": ("a", "b")}
    assert (made.op, again.op, again.old) == ("c", "c", None)
    came, paid = of(log, "orders:2")
    assert (came.op, came.key_before, came.changed) == ("u", ("1",), {"id": ("1", "2")})
    assert paid.changed == {"status": ("new", "paid")}


def test_composite_keys_and_cells_with_commas(log: SQLiteLog) -> None:
    log.append(
        [
            schema(10, ITEM),
            rows(ITEM, [("c", 10, 1, ("7", "3", "yes")), ("c", 10, 2, ("3", "7", "no"))]),
            rows(ITEM, [("c", 10, 3, ("a,b", "3", "yes"))]),
        ]
    )
    for text in (
        "sales.items:7,3",
        'sales.items:["7", "3"]',
        "sales.items:[7, 3]",
        'sales.items:["a,b", "3"]',
    ):
        (change,) = of(log, text)
        assert change.new is not None
        assert change.new["note"] == "yes"
    log.append([schema(20, SHAPE), rows(SHAPE, [("c", 20, 1, ("a,b:[c", "s", "n"))])])
    for text in ("orders:a,b:[c", 'orders:["a,b:[c"]'):
        assert len(of(log, text)) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("orders", "no table and key"),
        ("nothing:1", "knows no table nothing"),
        ("sales.items:7", "order_id, line: 2 cells; this has 1"),
        ("lines:1", r"public\.lines has no key"),
    ],
)
def test_what_is_no_key_is_refused(log: SQLiteLog, text: str, words: str) -> None:
    log.append([schema(10, SHAPE), schema(10, ITEM), schema(10, LINE)])
    with pytest.raises(UserError, match=words):
        of(log, text)


def test_truncates_gaps_and_copies_are_of_every_history(log: SQLiteLog) -> None:
    log.append([schema(10, SHAPE), rows(SHAPE, [("c", 10, 1, ("1", "new", "a"))])])
    log.append([message(20, "app", "clean up"), truncate(SHAPE, 20), truncate(ITEM, 20, 2)])
    log.append([rows(SHAPE, [("c", 40, 1, ("1", "newer", "a"))])])
    log.append([rows(SHAPE, [("r", 30, 1, ("1", "stale", "a"))], "copy")])
    log.append([rows(SHAPE, [("u", 50, 1, ("1", "newest", "a"))])])
    log.append([source_marker(Position(1, 0, 0), SourceMark("gap", "the slot is gone"))])
    log.append([rows(SHAPE, [("u", 60, 1, ("1", "after the gap", "a"))])])
    _, cut, _, copied, newest, gap, last = of(log, "orders:1")
    assert (cut.op, cut.old, cut.new) == ("t", {"id": "1", "status": "new", "note": "a"}, None)
    assert (cut.messages, cut.txid, cut.lsn) == ((("app", "clean up"),), 720, 15)
    assert (copied.op, copied.txid, copied.messages) == ("r", 0, ())
    assert newest.changed == {"status": ("newer", "newest")}, "a copy of before tells nothing newer"
    assert (gap.op, gap.messages) == ("gap", (("gap", "the slot is gone"),))
    assert last.old is None


def test_a_key_is_found_across_shapes(log: SQLiteLog) -> None:
    wide = shape(ORDERS, "id", "part", "status", key=("id", "part"), version=2)
    renamed = shape(ORDERS, "ident", "part", "status", key=("ident", "part"), version=3)
    log.append([schema(10, SHAPE), rows(SHAPE, [("c", 10, 1, ("1", "one", ""))])])
    log.append([schema(20, wide), rows(wide, [("c", 20, 1, ("1", "p", "two"))])])
    log.append([schema(30, renamed), rows(renamed, [("u", 30, 1, ("1", "p", "three"))])])
    assert [change.new and change.new["status"] for change in of(log, "orders:1,p")] == ["two", "three"]


def test_a_key_that_moved_to_another_column_is_looked_for_in_that_column(log: SQLiteLog) -> None:
    by_note = shape(ORDERS, "id", "status", "note", key=("note",), version=2)
    log.append(
        [
            schema(10, SHAPE),
            rows(SHAPE, [("c", 10, 1, ("7", "no", "9"))]),
            rows(SHAPE, [("c", 10, 2, ("8", "yes", "7"))]),
            rows(SHAPE, [("d", 11, 1, ("7", None, None), ["status", "note"])]),
        ]
    )
    log.append([schema(20, by_note), rows(by_note, [("u", 20, 1, ("8", "paid", "7"))])])
    made, paid = of(log, "orders:7")
    assert (made.op, made.new) == ("c", {"id": "8", "status": "yes", "note": "7"})
    assert (made.key_after, paid.changed) == (("7",), {"status": ("yes", "paid")})
    added = shape(ORDERS, "id", "status", "note", "uuid", key=("uuid",), version=3)
    log.append([schema(30, added), rows(added, [("u", 30, 1, ("8", "sent", "7", "7"))])])
    (sent,) = of(log, "orders:7")
    assert sent.op == "u", "no older entry has the column, and none of their keys is another name of it"


def test_a_key_is_found_where_one_of_its_columns_was_renamed(log: SQLiteLog) -> None:
    renamed = shape(ITEMS, "of", "line", "note", key=("line", "of"), version=2)
    both = [("c", 10, 1, ("7", "3", "one")), ("c", 10, 2, ("3", "7", ""))]
    log.append([schema(10, ITEM), rows(ITEM, both)])
    log.append([schema(20, renamed), rows(renamed, [("u", 20, 1, ("7", "3", "two"))])])
    made, changed = of(log, "sales.items:3,7")
    assert (made.op, changed.changed) == ("c", {"note": ("one", "two")})


def test_a_key_whose_columns_come_in_another_order_is_found(log: SQLiteLog) -> None:
    turned = shape(ITEMS, "order_id", "line", "note", key=("line", "order_id"), version=2)
    both = [("c", 10, 1, ("7", "3", "one")), ("c", 10, 2, ("3", "7", "no"))]
    log.append([schema(10, ITEM), rows(ITEM, both)])
    log.append([schema(20, turned), rows(turned, [("u", 20, 1, ("7", "3", "two"))])])
    made, changed = of(log, "sales.items:3,7")
    assert (made.op, changed.changed) == ("c", {"note": ("one", "two")})


def test_only_entries_whose_filter_says_so_are_read(log: SQLiteLog, decoded: list[Offset]) -> None:
    log.append([schema(10, SHAPE)])
    for commit in range(20, 320):
        log.append([rows(SHAPE, [("c", commit, n, (f"{commit}-{n}", "s", "")) for n in range(1, 20)])])
    (change,) = of(log, "orders:107-5")
    assert change.position == Position(0, 107, 5)
    assert len(decoded) < 15
    assert decoded == sorted(decoded)


def test_an_entry_without_a_filter_is_read(log: SQLiteLog) -> None:
    entry = rows(SHAPE, [("c", 10, 1, ("1", "new", "a"))])
    log.append([schema(10, SHAPE), replace(entry, filter=b"")])
    assert len(of(log, "orders:1")) == 1


# -- places


@pytest.fixture
def many(log: SQLiteLog) -> SQLiteLog:
    """Groups of several transactions, with a copy in between, whose entries are of several commits."""
    mark = CopyMark("begin", schema=SHAPE)
    at = Position(0, 1, 0)
    log.append([Entry("marker", ORDERS, at, at, 0, 0, 1, mark.to_json().encode()), schema(10, ITEM)])
    for base in range(100, 1100, 100):
        log.append(
            [
                rows(ITEM, [("c", base + 20, 2, ("i", str(base), ""))]),
                message(base + 20, "app", f"at {base + 20}", 3),
                rows(SHAPE, [("c", base + n, 1, (f"{base + n}", "s", "")) for n in (10, 20, 30)]),
            ]
        )
        log.append([rows(SHAPE, [("r", base + 25, 1, (f"copied {base}", "s", ""))], "copy")])
    return log


def naive(log: SQLiteLog, commit: int) -> Iterator[tuple[int, int]]:
    """Offsets and commits of what is behind a place."""
    for item in log.entries(log.begin().offset, log.end().offset, kinds=("rows",)):
        for found in decode_rows(item.entry.payload)["_commit"].to_pylist():
            if found >= commit:
                yield item.offset, found


def behind(log: SQLiteLog, cut: Cut) -> list[tuple[int, int]]:
    return [
        (o, c) for o, c in naive(log, 0) if o > cut.offset and (cut.commit is None or (0, c) >= cut.commit)
    ]


def test_places_are_where_a_scan_finds_them(many: SQLiteLog) -> None:
    commits = sorted({commit for _, commit in naive(many, 0)})
    for commit in [5, *commits, *(c + 1 for c in commits)]:
        expected = list(naive(many, commit))
        assert behind(many, cut_at_commit(many, commit)) == expected
        assert behind(many, cut_at_time(many, commit * SECOND)) == expected
        assert behind(many, cut_at_time(many, commit * SECOND - 1)) == expected
    for offset in range(1, many.end().offset + 1):
        cut = cut_at_offset(many, offset)
        assert cut.offset < offset
        assert cut.offset == many.group_end(cut.offset)
        assert many.group_end(offset - 1) == cut.offset
    assert cut_at_offset(many, 9_999).offset == many.end().offset


def test_times_that_go_back_are_cut_at_the_first_that_reaches(log: SQLiteLog) -> None:
    log.append([schema(1, SHAPE)])
    for commit, second in ((10, 10), (20, 25), (30, 23), (40, 40)):
        entry = rows(SHAPE, [("c", commit, 1, (str(commit), "s", ""))])
        log.append([replace(entry, committed_at=second * SECOND)])
    assert cut_at_time(log, 24 * SECOND).commit == (0, 20)
    assert cut_at_time(log, 26 * SECOND).commit == (0, 40)
    assert cut_at_time(log, 41 * SECOND) == Cut(5)
    log.trim(4)
    for second in (24, 25):
        with pytest.raises(LogTrimmed, match="that time has been deleted"):
            cut_at_time(log, second * SECOND)
    assert cut_at_time(log, 26 * SECOND).commit == (0, 40)


def test_places_that_are_deleted_are_refused(many: SQLiteLog) -> None:
    begin = many.group_end(20)
    many.trim(begin)
    for act in (
        lambda: cut_at_time(many, 300 * SECOND),
        lambda: cut_at_commit(many, 300),
        lambda: cut_at_offset(many, begin),
    ):
        with pytest.raises(LogTrimmed, match="deleted by retention"):
            act()
    assert cut_at_offset(many, begin + 1) == Cut(begin)
    assert behind(many, cut_at_commit(many, 910)) == list(naive(many, 910))
    assert {c.op for c in of(many, "orders:1010")} == {"c"}


# -- transactions


def test_transactions_are_told_whole_in_the_sources_order(many: SQLiteLog) -> None:
    found = list(transactions_from(many, cut_at_commit(many, 520)))
    assert [one.commit[1] for one in found][:4] == [520, 530, 610, 620]
    one = found[0]
    assert one.counts == {(ITEMS, "c"): 1, (ORDERS, "c"): 1}
    assert one.messages == (("app", "at 520"),)
    assert (one.txid, one.committed_at, one.last - one.first) == (1220, 520 * SECOND, 2)
    assert found[1].counts == {(ORDERS, "c"): 1}
    (same,) = transactions_of(many, 1220)
    assert same == one
    assert list(transactions_of(many, 1221)) == []
    assert list(transactions_of(many, 999_999)) == []


def test_a_transaction_is_found_by_its_id_in_the_entries_that_may_have_it(
    many: SQLiteLog, decoded: list[Offset]
) -> None:
    many.append([message(1_200, "headrace", "heartbeat"), truncate(SHAPE, 1_300)])
    (one,) = transactions_of(many, 2_000)
    assert one.counts == {(ORDERS, "t"): 1}
    assert list(transactions_of(many, 1_900)) == [], "heartbeats are nobody's"
    assert decoded == []
    (one,) = transactions_of(many, 730 + 300)
    assert len(decoded) == 1
    assert one.counts == {(ORDERS, "c"): 1}
