"""Named cursors and `headrace.open_log`: whole transactions, at least once, and what is refused."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import headrace
from entries import SECOND, message, rows, schema, shape, truncate
from headrace.change import (
    CopyMark,
    Entry,
    Mark,
    Position,
    SourceMark,
    TableId,
    source_marker,
)
from headrace.errors import (
    ConsumersUnknown,
    CursorLost,
    LogError,
    LogTrimmed,
    UserError,
    Verdict,
    verdict_of,
)
from headrace.log.consumers import Cursor, Cursors
from headrace.log.sqlite import SQLiteLog
from headrace.reading import Batch, Changes, Event, Message, OpenLog, find_logs

ORDERS, ITEMS = TableId("public", "orders"), TableId("sales", "items")


SHAPE = shape(ORDERS, "id", "status")
ITEM = shape(ITEMS, "order_id", "line", "note", key=("order_id", "line"))


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[SQLiteLog]:
    folder = tmp_path / ".headrace" / "log"
    folder.mkdir(parents=True)
    made = SQLiteLog(folder / "shop.db", segment_bytes=2_000)
    made.append([schema(10, SHAPE), rows(SHAPE, [("c", 10, 1, ("1", "new"))])])
    for commit in range(20, 100, 10):
        change = [("c", commit, 1, (str(commit), "new")), ("u", commit, 3, ("1", f"at {commit}"))]
        item = [("c", commit, 2, (str(commit), "1", "x" * 50))]
        made.append(([schema(20, ITEM)] if commit == 20 else []) + [rows(ITEM, item), rows(SHAPE, change)])
    yield made
    made.close()


@pytest.fixture
def log(writer: SQLiteLog, tmp_path: Path) -> Iterator[OpenLog]:
    assert writer.end().offset
    with headrace.open_log(tmp_path) as opened:
        yield opened


def statuses(batches: Iterator[Batch] | list[Batch]) -> list[str]:
    found: list[str] = []
    for batch in batches:
        for change in batch:
            if isinstance(change, Changes) and change.table == ORDERS:
                found += change.rows["status"].to_pylist()
    return found


# -- cursors


@contextlib.contextmanager
def as_another_user() -> Iterator[None]:
    """Be nobody for a while where this is root, whom no mode keeps out."""
    user, group, groups = os.geteuid(), os.getegid(), os.getgroups()
    if user == 0:
        os.setgroups([])
        os.setegid(65534)
        os.seteuid(65534)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(user)
            os.setegid(group)
            os.setgroups(groups)


@pytest.mark.parametrize("spoilt", ["s.cursors", "s.cursors-wal"])
def test_consumers_whose_file_is_of_another_user_are_unknown_for_a_while(spoilt: str) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,  # pytest's own are closed to other users
        closing(Cursors(path := Path(folder) / "s.cursors")) as theirs,
        closing(Cursors(path)) as cursors,
    ):
        path.parent.chmod(0o777)
        theirs.commit("reports", Mark("L", 5, "five"))
        for file in path.parent.iterdir():
            file.chmod(0o000 if file.name == spoilt else 0o666)
        with as_another_user(), pytest.raises(ConsumersUnknown) as caught:
            cursors.all()
        assert str(caught.value).startswith(f"It is not known who reads the log: {path}")
        assert "Let the user that Headrace runs as read and write that file" in caught.value.remedy
        (path.parent / spoilt).chmod(0o666)
        with as_another_user():
            assert [cursor.name for cursor in cursors.all()] == ["reports"]


def test_consumers_whose_file_is_damaged_are_unknown_for_a_while(tmp_path: Path) -> None:
    path = tmp_path / "s.cursors"
    path.write_bytes(b"no database " * 1000)
    with closing(Cursors(path)) as cursors:
        with pytest.raises(ConsumersUnknown, match="is not what was written") as caught:
            cursors.all()
        assert verdict_of(caught.value) is Verdict.RETRY
        path.unlink()
        assert cursors.all() == []


def test_a_file_of_consumers_that_was_replaced_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "s.cursors"
    with closing(Cursors(path)) as theirs:
        theirs.commit("old", Mark("L", 5, "five"))
    with closing(Cursors(path)) as pipeline:
        assert [cursor.name for cursor in pipeline.all()] == ["old"]
        for file in list(tmp_path.iterdir()):
            file.rename(tmp_path / f"was-{file.name}")
        for _ in range(2):
            with pytest.raises(ConsumersUnknown, match="is missing"):
                pipeline.all()
        with pytest.raises(LogError, match="is missing"):
            pipeline.commit("old", Mark("L", 6, "six"))
        shutil.copy(tmp_path / "was-s.cursors", path)
        with closing(Cursors(path)) as theirs:
            theirs.commit("new", Mark("L", 1, "one"))
            for _ in range(2):
                assert [cursor.name for cursor in pipeline.all()] == ["new", "old"]
            theirs.commit("new", Mark("L", 2, "two"))
            assert pipeline.mark_lost("new", 2, "it held 12 bytes")
            assert [cursor.lost for cursor in theirs.all()] == [True, False]


def test_a_file_of_consumers_that_was_restored_in_place_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "s.cursors"
    with closing(Cursors(path)) as theirs:
        theirs.commit("old", Mark("L", 5, "five"))
    whole = path.read_bytes()
    with closing(Cursors(path)) as pipeline:
        assert len(pipeline.all()) == 1
        with closing(Cursors(path)) as theirs:
            theirs._made().rows("DROP TABLE cursors")
            with pytest.raises(ConsumersUnknown, match="no such table"):
                pipeline.all()
        for file in tmp_path.glob("s.cursors-*"):
            file.unlink()
        path.write_bytes(whole)
        assert [cursor.name for cursor in pipeline.all()] == ["old"]


def test_a_cursor_is_durable_and_only_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "s.cursors"
    with closing(Cursors(path)) as cursors:
        assert cursors.all() == []
        assert not path.exists()
        made = cursors.commit("reports", Mark("L", 5, "five"))
        again = cursors.commit("reports", Mark("L", 5, "five"))
        assert again.created_at == made.created_at <= again.updated_at
        cursors.commit("reports", Mark("L", 9, "nine"))
        with pytest.raises(UserError, match="committed offset 9 already; 7 is behind"):
            cursors.commit("reports", Mark("L", 7, "seven"))
        for other in (Mark("M", 12, "twelve"), Mark("L", 9, "other")):
            with pytest.raises(UserError, match="another log"):
                cursors.commit("reports", other)
        for name in ("", "a\nb", "x" * 300):
            with pytest.raises(UserError, match="no name"):
                cursors.commit(name, Mark("L", 1, "one"))
    with closing(Cursors(path)) as cursors:
        (cursor,) = cursors.all()
        assert cursor.mark == Mark("L", 9, "nine")
        assert cursors.get("other") is None
        assert not cursors.mark_lost("reports", 5, "it held 12 bytes"), "it has committed since"
        assert not cursors.mark_lost("other", 9, "there is none")
        cursors.commit("reports", Mark("L", 9, "nine"))
        assert cursors.mark_lost("reports", 9, "it held 12 bytes")
        with pytest.raises(CursorLost, match="it held 12 bytes"):
            cursors.commit("reports", Mark("L", 10, "ten"))
        assert cursors.reset("reports", Mark("M", 2, "two")).lost is False
        assert cursors.get("reports") == cursors.all()[0]
        cursors.commit("reports", Mark("M", 3, "three"))
        cursors.forget("reports")
        for act in (cursors.forget, lambda name: cursors.reset(name, Mark("L", 1, "one"))):
            with pytest.raises(UserError, match="There is no consumer reports"):
                act("reports")


def test_consumers_may_come_at_once(tmp_path: Path) -> None:
    faults: list[BaseException] = []

    def work(name: str) -> None:
        try:
            with closing(Cursors(tmp_path / "s.cursors")) as cursors:
                for offset in range(1, 6):
                    cursors.commit(name, Mark("L", offset, str(offset)))
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(f"c{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    with closing(Cursors(tmp_path / "s.cursors")) as cursors:
        assert [(cursor.name, cursor.offset) for cursor in cursors.all()] == [(f"c{i}", 5) for i in range(8)]


def test_a_commit_does_not_wait_for_the_logs_writer(writer: SQLiteLog, log: OpenLog) -> None:
    (batch,) = log.read("reports")
    with writer._db.transaction():
        db = writer._db.connection()
        db.execute("UPDATE facts SET value = value")
        batch.commit()
    assert log.consumers()[0].offset == batch.through.offset


# -- batches


def test_what_is_not_committed_comes_again(log: OpenLog) -> None:
    expected = statuses(log.read(None))
    assert expected == ["new", *[text for c in range(20, 100, 10) for text in ("new", f"at {c}")]]
    first, second, *_ = log.read("reports", max_bytes=1)
    first.commit()
    assert second.after == first.through
    again = list(log.read("reports", max_bytes=1))
    assert again[0].through == second.through
    assert statuses([first, *again]) == expected
    assert statuses(again) == statuses(again), "a batch can be iterated as often as wanted"
    again[-1].commit()
    assert list(log.read("reports")) == []
    with pytest.raises(UserError, match="committed offset"):
        again[0].commit()


@pytest.mark.parametrize("max_bytes", [1, 2_500, 6_000, 1 << 30])
def test_batches_are_whole_groups_within_bounds(log: OpenLog, writer: SQLiteLog, max_bytes: int) -> None:
    batches = list(log.read(None, max_bytes=max_bytes))
    ends = [item.offset for item in writer.headers(0, writer.end().offset) if item.ends_group]
    assert {batch.through.offset for batch in batches} <= set(ends)
    for batch in batches:
        one = len([end for end in ends if batch.after.offset < end <= batch.through.offset]) == 1
        assert one or writer.bytes_between(batch.after.offset, batch.through.offset) <= max_bytes
    if max_bytes == 1:
        assert len(batches) == len(ends)
        assert batches[3].position == Position(0, 40, 3)
        assert batches[3].committed_at == 40 * SECOND
    torn = list(log.read(None, max_bytes=1, torn=True))
    assert [batch.through.offset for batch in torn] == list(range(1, writer.end().offset + 1))


def test_rows_have_all_columns_and_events_stand_in_order(writer: SQLiteLog, log: OpenLog) -> None:
    start = log.head
    wider = shape(ORDERS, "id", "note", "status", version=2)
    begin = CopyMark("begin", schema=wider, reason="again")
    at = Position(0, 200, 0)
    writer.append(
        [
            rows(SHAPE, [("u", 200, 1, ("2", None), ["status"], {"id": "1"})]),
            message(200, "app", "by hand", 2),
            truncate(SHAPE, 200, 3),
            schema(200, wider),
            rows(wider, [("c", 200, 5, ("3", "n", "s"))]),
        ]
    )
    writer.append([Entry("marker", ORDERS, at, at, 0, 0, 2, begin.to_json().encode())])
    writer.append([rows(SHAPE, [("r", 150, 1, ("1", "copied"))], "copy")])
    writer.append([source_marker(Position(1, 0, 0), SourceMark("gap", "the slot is gone"))])
    (batch,) = log.read(None, after=start)
    told = list(batch)
    kinds = [(item.kind, item.offset - start.offset) for item in told]
    assert [kind for kind, _ in kinds] == [
        "rows", "message", "truncate", "schema", "rows", "marker", "copy", "marker",
    ]  # fmt: skip
    assert [offset for _, offset in kinds] == list(range(1, 9))
    one, said, cut, seen, two, begun, copied, gap = told
    assert isinstance(one, Changes)
    assert one.rows.to_pylist() == [
        {
            "_op": "u", "_epoch": 0, "_commit": 200, "_ordinal": 1, "_offset": one.offset,
            "_committed_at": 200 * SECOND, "_txid": 900, "_lsn": 151, "id": "2", "status": None,
            "_unchanged": ["status"], "_before": [("id", "1")],
        }
    ]  # fmt: skip
    assert isinstance(said, Event)
    assert (said.content, said.txid, said.lsn) == (Message("app", "by hand"), 900, 191)
    assert isinstance(cut, Event)
    assert (cut.table, cut.txid, cut.content) == (ORDERS, 900, None)
    assert isinstance(seen, Event)
    assert isinstance(two, Changes)
    assert seen.content == two.schema == wider
    assert isinstance(begun, Event)
    assert begun.content == begin
    assert isinstance(copied, Changes)
    assert copied.schema == SHAPE
    assert copied.rows["_op"].to_pylist() == ["r"]
    assert isinstance(gap, Event)
    assert gap.content == SourceMark("gap", "the slot is gone")
    table = batch.table("public.orders")
    assert table["note"].to_pylist() == [None, "n", None]
    assert table["status"].to_pylist() == [None, "s", "copied"]
    assert table.column_names[-2:] == ["_unchanged", "_before"]
    assert batch.tables == (ORDERS,)


def test_tables_can_be_chosen(log: OpenLog) -> None:
    (batch,) = log.read(None, tables=["sales.items"])
    assert {item.table for item in batch} == {ITEMS}
    assert batch.tables == (ITEMS,)
    assert batch.table("sales.items").num_rows == 8
    with pytest.raises(UserError, match="is not read"):
        batch.table("orders")
    with pytest.raises(UserError, match=r"no table public\.nothing"):
        log.read(None, tables=["nothing"])
    first = next(log.read(None, max_bytes=1))
    assert first.table(ITEMS).num_rows == 0
    assert first.table(ITEMS).column_names[8:11] == ["order_id", "line", "note"]


def test_a_follower_gets_what_comes(writer: SQLiteLog, log: OpenLog) -> None:
    batches = log.read("live", after=log.head, follow=True)
    timer = threading.Timer(0.3, writer.append, [[rows(SHAPE, [("c", 500, 1, ("500", "late"))])]])
    timer.start()
    batch = next(batches)
    assert statuses([batch]) == ["late"]
    timer.join()


def test_a_large_group_is_read_an_entry_at_a_time(
    writer: SQLiteLog, log: OpenLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.append(rows(SHAPE, [("c", 300, i, (f"k{i}", "big"))]) for i in range(1, 301))
    decoded = []
    original = headrace.reading.decode_rows
    monkeypatch.setattr(
        headrace.reading, "decode_rows", lambda payload: decoded.append(1) or original(payload)
    )
    *_, batch = log.read(None, max_bytes=1)
    changes = iter(batch)
    next(changes)
    next(changes)
    assert len(decoded) == 2
    assert sum(1 for _ in changes) == 298


class _Crash(Exception):
    """The consumer died."""


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    max_bytes=st.sampled_from([1, 1_500, 4_000, 1 << 20]),
    crashes=st.lists(st.sampled_from(["before", "stored", "committed"]), max_size=6),
    torn=st.booleans(),
)
def test_whatever_dies_nothing_is_lost_and_with_the_recipe_nothing_doubled(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    max_bytes: int,
    crashes: list[str],
    torn: bool,
) -> None:
    folder = tmp_path_factory.mktemp("crashes")
    with closing(SQLiteLog(folder / "s.db", segment_bytes=3_000)) as writer:
        writer.append([schema(1, SHAPE)])
        for commit, size in enumerate(sizes, 2):
            changes = [("c", commit, n, (f"{commit}/{n}", "x")) for n in range(size)]
            writer.append([rows(SHAPE, [change]) for change in changes])
    written = [f"{commit}/{n}" for commit, size in enumerate(sizes, 2) for n in range(size)]
    once: list[str] = []
    stored: Mark | None = None
    seen: list[str] = []
    for crash in [*crashes, ""]:
        with contextlib.suppress(_Crash), headrace.open_log(folder / "s.db") as log:
            for batch in log.read("c", after=stored or log.begin, max_bytes=max_bytes, torn=torn):
                ids = batch.table("orders")["id"].to_pylist()
                seen += ids
                if crash == "before":
                    raise _Crash
                once, stored = [*once, *ids], batch.through  # one transaction of the consumer's database
                if crash == "stored":
                    raise _Crash
                batch.commit()
                if crash == "committed":
                    raise _Crash
    assert once == written
    assert set(seen) == set(written)


class Target:
    """A consumer's own database, which holds the mark with the data."""

    def __init__(self) -> None:
        self._db = sqlite3.connect(":memory:", isolation_level=None)
        self._db.execute("CREATE TABLE data (id TEXT, status TEXT)")
        self._db.execute("CREATE TABLE mark (log_id TEXT, at INTEGER, hash TEXT)")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN")
        with self._db:
            yield

    def last_mark(self) -> Mark | None:
        row = self._db.execute("SELECT * FROM mark").fetchone()
        return Mark(*row) if row else None

    def store_mark(self, *mark: object) -> None:
        self._db.execute("DELETE FROM mark")
        self._db.execute("INSERT INTO mark VALUES (?, ?, ?)", mark)

    def write(self, batch: Batch) -> None:
        rows = batch.table("orders").select(["id", "status"]).to_pylist()
        self._db.executemany("INSERT INTO data VALUES (:id, :status)", rows)

    def held(self) -> list[tuple[str, str]]:
        return self._db.execute("SELECT * FROM data ORDER BY rowid").fetchall()


def follow_the_recipe(log: OpenLog, target: Target) -> None:
    """Run the code that docs/log.md has under "Exactly once"."""
    page = Path(__file__).parents[2] / "docs" / "log.md"
    code = page.read_text().partition("### Exactly once")[2].partition("```python\n")[2].partition("```")[0]
    exec(code, {"db": target, "log": log, "write": Target.write})


def test_the_recipe_begins_where_a_trimmed_log_does_and_never_behind_what_it_lacks(
    writer: SQLiteLog, log: OpenLog
) -> None:
    writer.trim(12)
    (batch,) = log.read(None)
    expected = [(row["id"], row["status"]) for row in batch.table("orders").to_pylist()]
    assert 0 < len(expected) < 17
    target = Target()
    for _ in range(2):
        follow_the_recipe(log, target)
        assert target.held() == expected
    writer.append([rows(SHAPE, [("c", 500, 1, ("500", "late"))])])
    follow_the_recipe(log, target)
    assert target.held() == [*expected, ("500", "late")]

    fresh = Target()
    with pytest.raises(UserError, match="Consumer reports has committed offset"):
        follow_the_recipe(log, fresh)
    log.reset("reports", log.begin.offset)
    follow_the_recipe(log, fresh)
    assert fresh.held() == target.held()


# -- where reading begins, and what is refused


def test_the_mark_that_is_stored_with_the_data_is_where_reading_goes_on(log: OpenLog) -> None:
    first, second, *_ = log.read("reports", max_bytes=1)
    stored = second.through
    (rest,) = log.read("reports", after=stored)
    assert rest.after == stored
    first.commit()
    (rest,) = log.read("reports", after=stored)
    rest.commit()
    with pytest.raises(UserError, match="has committed offset"):
        log.read("reports", after=stored)
    with pytest.raises(LogError, match="another hash"):
        log.read(None, after=stored._replace(hash="00"))
    with pytest.raises(LogError, match="not other"):
        log.read(None, after=stored._replace(log_id="other"))
    with pytest.raises(LogError, match="there is no 999"):
        log.read(None, after=999)
    with pytest.raises(UserError, match="without a name"):
        next(log.read(None)).commit()


def test_a_new_name_holds_the_log_from_its_first_read(log: OpenLog) -> None:
    log.read("reports")
    assert [(cursor.name, cursor.offset) for cursor in log.consumers()] == [("reports", 0)]
    log.read(None)
    assert len(log.consumers()) == 1


def test_a_new_name_begins_where_the_log_does_however_that_moves_meanwhile(
    writer: SQLiteLog, log: OpenLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    trims = [5, 12]
    commit = Cursors.commit

    def late(self: Cursors, name: str, mark: Mark, *, joins: bool) -> Cursor:
        if trims:
            writer.trim(trims.pop(0))
        return commit(self, name, mark, joins=joins)

    monkeypatch.setattr(Cursors, "commit", late)
    batches = log.read("reports")
    assert not trims
    (cursor,) = log.consumers()
    assert cursor.mark == log.begin
    assert statuses(batches)[-1] == "at 90"
    trims = [14]
    with pytest.raises(LogTrimmed):
        log.read("others", after=log.begin)
    assert [one.name for one in log.consumers()] == ["reports"]


def test_a_lost_consumer_is_told_what_is_deleted(writer: SQLiteLog, log: OpenLog) -> None:
    first, second, *_ = log.read("reports", max_bytes=1)
    first.commit()
    writer.trim(12)
    assert log._cursors.mark_lost("reports", 2, "it held 4096 bytes, more than hold_max")
    begin = log.begin.offset
    with pytest.raises(CursorLost) as told:
        log.read("reports")
    assert f"offsets 3 to {begin} have been deleted" in str(told.value)
    assert "more than hold_max" in str(told.value)
    assert f"--reset reports --to {begin}" in told.value.remedy
    with pytest.raises(CursorLost):
        second.commit()
    with pytest.raises(CursorLost):
        list(second)
    with pytest.raises(LogTrimmed):
        log.read(None, after=2)
    with pytest.raises(LogTrimmed):
        log.reset("reports", 2)
    with pytest.raises(UserError, match="ends at"):
        log.reset("reports", 1000)
    assert log.reset("reports", begin + 1).offset == begin, "a reader begins with a whole group"
    assert statuses(log.read("reports"))[-1] == "at 90"
    log.forget("reports")
    assert log.consumers() == []


def test_a_consumer_whose_entries_go_while_it_reads_is_lost(writer: SQLiteLog, log: OpenLog) -> None:
    batches = log.read("reports", max_bytes=1)
    batch = next(batches)
    writer.trim(12)
    with pytest.raises(CursorLost, match="offsets 1 to"):
        list(batch)
    with pytest.raises(CursorLost):
        next(batches)


@pytest.mark.parametrize("through", [12, 18])
@pytest.mark.parametrize(("name", "error"), [("reports", CursorLost), (None, LogTrimmed)])
def test_chosen_tables_lack_nothing_that_was_deleted(
    writer: SQLiteLog, log: OpenLog, through: int, name: str | None, error: type[LogTrimmed]
) -> None:
    (batch,) = log.read(name, after=2)
    (chosen,) = log.read(name, after=2, tables=["orders"])
    writer.trim(through)
    for ask in (lambda: batch.table("orders"), lambda: list(chosen), lambda: batch.tables):
        with pytest.raises(error):
            ask()


def test_chosen_tables_lack_nothing_that_goes_while_they_are_read(
    writer: SQLiteLog, log: OpenLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headrace.reading, "_PAGE", 3)
    (batch,) = log.read(None, tables=["orders"])
    items = iter(batch)
    before = [next(items) for _ in range(3)]
    writer.trim(before[-1].offset)
    assert [item.offset for item in items] == list(range(before[-1].offset + 2, writer.end().offset + 1, 2))
    (batch,) = log.read(None, tables=["orders"])
    items = iter(batch)
    next(items)
    writer.trim(18)
    with pytest.raises(LogTrimmed):
        list(items)


def test_the_place_of_a_batch_that_was_deleted_is_not_told(writer: SQLiteLog, log: OpenLog) -> None:
    first = next(log.read(None, max_bytes=1))
    assert (first.position, first.committed_at) == (Position(0, 10, 1), 10 * SECOND)
    writer.trim(12)
    for ask in (lambda: first.position, lambda: first.committed_at):
        with pytest.raises(LogTrimmed):
            ask()


@pytest.mark.parametrize("name", ["reports", None])
def test_a_mark_that_is_deleted_while_it_is_compared_is_not_of_another_log(
    writer: SQLiteLog, log: OpenLog, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    if name:
        next(log.read(name, max_bytes=1)).commit()
    mark = log._log.mark

    def late(offset: int) -> Mark | None:
        writer.trim(12)
        return mark(offset)

    monkeypatch.setattr(log._log, "mark", late)
    with pytest.raises(CursorLost if name else LogTrimmed, match="deleted"):
        log.read(name, after=None if name else 2)


def test_another_log_is_noticed(writer: SQLiteLog, log: OpenLog, tmp_path: Path) -> None:
    (batch,) = log.read("reports")
    batch.commit()
    other = SQLiteLog(tmp_path / "other" / "shop.db") if (tmp_path / "other").mkdir() is None else None
    assert other is not None
    cursors = log._cursors._path
    (tmp_path / "other" / "shop.cursors").write_bytes(cursors.read_bytes())
    subprocess.run(["cp", f"{cursors}-wal", tmp_path / "other" / "shop.cursors-wal"], check=True)
    with headrace.open_log(other.path) as opened, pytest.raises(LogError, match="is another"):
        opened.read("reports")
    other.set_note("log.id", log.id)
    with headrace.open_log(other.path) as opened, pytest.raises(LogError, match="it now ends at 0"):
        opened.read("reports")
    for commit in range(30):
        other.append([rows(SHAPE, [("c", commit + 100, 1, ("1", "forged"))])])
    with headrace.open_log(other.path) as opened, pytest.raises(LogError, match="another hash"):
        opened.read("reports")
    other.close()


# -- opening


def test_a_log_is_found_from_project_state_folder_and_file(writer: SQLiteLog, tmp_path: Path) -> None:
    for where in (tmp_path, tmp_path / ".headrace", writer.path, str(tmp_path)):
        with headrace.open_log(where) as log:
            assert (log.source, log.id, log.head) == ("shop", writer.id, writer.end())
            assert set(log.schemas()) == {ORDERS, ITEMS}
    with pytest.raises(UserError, match="no log of a source other"):
        headrace.open_log(tmp_path, "other")
    SQLiteLog(writer.path.with_name("crm.db")).close()
    with pytest.raises(UserError, match="several sources"):
        headrace.open_log(tmp_path)
    headrace.open_log(tmp_path, "crm").close()
    assert [path.stem for path in find_logs(tmp_path)] == ["crm", "shop"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="There is no log in"):
        headrace.open_log(tmp_path / "empty")
    (tmp_path / "log").mkdir()
    SQLiteLog(tmp_path / "log" / "application.db").close()
    assert [path.stem for path in find_logs(tmp_path)] == ["crm", "shop"], "a project's own folder is its own"
    with pytest.raises(AttributeError):
        _ = headrace.nothing


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, headrace; assert not {'pyarrow', 'apsw', 'numpy'} & set(sys.modules); headrace.open_log"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
