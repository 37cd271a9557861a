"""What stands beside the stream: fair turns, leftovers of copies, what a server says it has sent, notes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from headrace.change import CopyMark, Entry, Position, TableId, TableSchema
from headrace.config import source_config
from headrace.errors import SourceGap
from headrace.log.sqlite import SQLiteLog
from headrace.secret import Secret
from headrace.sources.postgres.assembly import Assembler
from headrace.sources.postgres.continuity import Continuity
from headrace.sources.postgres.copier import Copier, Group, _Table
from headrace.sources.postgres.events import Relation, Transaction
from headrace.sources.postgres.roster import Roster
from headrace.sources.postgres.slot import POINT
from headrace.sources.postgres.spool import SpoolSpace
from headrace.sources.postgres.tables import TableStates, read_states

T = TableId("public", "t")
CONFIG = source_config("shop", Secret("postgresql://nobody@127.0.0.1:1/none"))


@pytest.fixture
def log(tmp_path: Path) -> Iterator[SQLiteLog]:
    log = SQLiteLog(tmp_path / "log.db")
    yield log
    log.close()


def marker(mark: CopyMark, commit: int = 0, epoch: int = 0) -> Entry:
    at = Position(epoch, commit, 0)
    return Entry("marker", T, at, at, 0, 0, 1, mark.to_json().encode())


def change(commit: int, at: int) -> Entry:
    place = Position(0, commit, 1)
    return Entry("message", None, place, place, at, 0, 0, b"{}")


# -- copies --------------------------------------------------------------------------------------------


def under_copy(log: SQLiteLog) -> tuple[Copier, _Table, Callable[[], None]]:
    """A copier with one table, and what hands over one more group of it."""
    copier, table = Copier(CONFIG, log, 0), _Table(T, "", 0, 0)
    copier._tables[T] = table

    def hand_over() -> None:
        copier._hand_over((table, Group(iter([marker(CopyMark("chunk"))]), lambda: None)))

    return copier, table, hand_over


def test_workers_faster_than_the_log_leave_the_stream_its_turn(log: SQLiteLog) -> None:
    copier, _, hand_over = under_copy(log)
    hand_over()
    taken = 0
    for _ in copier.ready(0):
        taken += 1
        hand_over()
        assert taken < 10
    assert taken == 1
    assert sum(1 for _ in copier.ready(0)) == 1


def test_what_is_left_of_a_former_copy_is_dropped(log: SQLiteLog) -> None:
    """Its chunks would count as those of the copy that has begun since."""
    copier, _, hand_over = under_copy(log)
    hand_over()
    copier._tables[T] = _Table(T, "resync", 0, 1)
    assert list(copier.ready(0)) == []


@pytest.mark.parametrize(("stage", "epoch"), [("catching_up", 0), ("requested", 0), ("catching_up", 1)])
def test_a_copy_whose_end_is_durable_is_not_made_again(log: SQLiteLog, stage: str, epoch: int) -> None:
    """Unless it was asked for anew, or the end belongs to another slot's positions."""
    shape = TableSchema(T, (), (), 1)
    for mark in (CopyMark("begin", shape), CopyMark("chunk"), CopyMark("end", floor=5, ceiling=5)):
        log.append([marker(mark, 5)])
    TableStates(log).move([T], stage)  # type: ignore[arg-type]
    copier = Copier(CONFIG, log, epoch)
    copier._add = Mock()  # type: ignore[method-assign]
    copier.resume()
    is_complete = (stage, epoch) == ("catching_up", 0)
    assert read_states(log)[T].stage == ("live" if is_complete else "requested")
    assert copier.busy is not is_complete


def test_changes_before_an_expected_copy_are_dropped_without_a_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    relations = {name: Relation(oid, "public", name, "d", ()) for oid, name in enumerate("tuv")}
    roster = Roster("shop", [T], dict, lambda: [T, TableId("public", "u")])
    assert [roster.admits(relations[name]) for name in "tuvuv"] == [True, False, False, False, False]
    assert [record.getMessage().split(" is ")[0] for record in caplog.records] == ["source shop: public.v"]
    roster.add(TableId("public", "u"))
    assert roster.admits(relations["u"])


# -- the stream ----------------------------------------------------------------------------------------


def test_a_server_that_has_sent_all_without_the_logs_last_commit_lacks_it(log: SQLiteLog) -> None:
    log.set_note(POINT, "50")
    log.append([change(100, 7)])
    continuity = Continuity(CONFIG, log, "another run", confirmed=60)
    continuity.check_heard(100)
    continuity.check([Transaction(0, 80, 1, 5, 1)])
    assert continuity.confirmable(100) == 0
    with pytest.raises(SourceGap, match="has sent everything up to 0/65: it was restored"):
        continuity.check_heard(101)
    continuity.check([Transaction(1, 100, 2, 7, 1)])
    continuity.check_heard(101)
    assert continuity.confirmable(150) == 150, "a stream starts at the log's end as it is now"


@pytest.mark.parametrize("linger", [0.0, 5.0])
@pytest.mark.parametrize("is_whole", [True, False])
def test_a_wait_ends_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linger: float, is_whole: bool
) -> None:
    space = SpoolSpace("shop", tmp_path, 1000)
    assembler = Assembler(CONFIG, Mock(), space, 1000, linger, 0, lambda _: None)
    assert assembler.pause(0.2) == 0.2
    monkeypatch.setattr(assembler, "_decoder", Mock(pending_bytes=1, in_transaction=not is_whole))
    assembler._due()
    assert assembler.pause(0.2) == (0.0 if is_whole and not linger else 0.2), "not asked in vain meanwhile"


# -- notes ---------------------------------------------------------------------------------------------


def test_notes_wait_for_an_append_and_not_for_each_other(log: SQLiteLog) -> None:
    """A large group is made while it is appended: its maker may note something, and so may another thread."""
    TableStates(log).move([T], "copying")
    other = TableId("public", "other")
    worker = threading.Thread(target=lambda: TableStates(log).move([other], "failed", "why"))

    def made() -> Iterator[Entry]:
        yield change(100, 7)
        worker.start()
        worker.join(0.3)
        assert worker.is_alive()
        TableStates(log).move([T], "requested", "rewritten")
        yield change(101, 7)

    log.append(made())
    worker.join(10)
    assert {table: state.stage for table, state in read_states(log).items()} == {
        T: "requested",
        other: "failed",
    }


def test_a_note_made_in_an_append_that_fails_is_none(log: SQLiteLog) -> None:
    TableStates(log).move([T], "live")

    def made() -> Iterator[Entry]:
        yield change(100, 7)
        TableStates(log).move([T], "requested")
        raise SourceGap("broken off", "")

    with pytest.raises(SourceGap):
        log.append(made())
    assert read_states(log)[T].stage == "live"
    assert log.end().offset == 0
