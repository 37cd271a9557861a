"""What every log has to keep, as tests: for the authors of another one.

    pytest.register_assert_rewrite("headrace.testing.log_suite")
    from headrace.testing.log_suite import LogSuite

    class TestMyLog(LogSuite):
        @pytest.fixture
        def logs(self, tmp_path):
            return MyLogs(tmp_path)

`MyLogs` is a `headrace.testing.logs.Logs`: it makes and re-opens logs, and tampers with them. The tests of a
log that several processes can open inherit `SharedLogSuite` instead, which also kills writers. Needs pytest
and hypothesis.
"""
# ruff: noqa: D102 - the name of a test says what it tests

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import failpoints
from headrace.change import CopyMark, Entry, LoggedEntry, Mark, Position
from headrace.errors import LogError, LogTrimmed
from headrace.testing.log_retention_suite import AnchorSuite, RetentionSuite, many
from headrace.testing.logs import (
    OTHER,
    SHAPE,
    TABLE,
    Logs,
    ProcessLogs,
    TestedLog,
    armed,
    change,
    everything,
    group,
    marker,
    offsets,
    schema,
)


class OrderSuite:
    """Order, whole groups, and the same answer to whoever asks again."""

    def test_a_new_log_is_empty(self, logs: Logs) -> None:
        log = logs.make()
        assert log.end() == log.begin() == log.mark(0) == (log.id, 0, "0" * 64)
        assert (log.position(), log.last_commit(), list(log.read(0, 100)), log.schemas()) == (
            None,
            None,
            [],
            {},
        )
        assert (log.mark(1), log.entry(0), log.entry(1), log.last_offsets()) == (None, None, None, {})
        assert (log.backlog(0), log.place(0), log.group_end(0)) == ((0, 0, None), (Position(0, 0, 0), 0), 0)
        assert not log.wait(0, 0.01)
        logs.verify(log)

    def test_offsets_are_dense_from_one_and_content_comes_back_as_written(self, logs: Logs) -> None:
        log = logs.make()
        odd = [
            schema(30, replace(SHAPE, table=OTHER)),
            change(30, 1, b"", table=OTHER, kind="truncate", rows=0, filter=b""),
            change(30, 2, b"{}", table=None, kind="message", rows=0, filter=b"", txids=(0, 0)),
            change(30, 3, os.urandom(300_000)),
        ]
        written = [group(10, 3), group(20, 1), odd]
        ends = [log.append(entries) for entries in written]
        assert [end.offset for end in ends] == [3, 4, 8]
        back = list(log.read(0, 1 << 20))
        assert offsets(back) == list(range(1, 9))
        assert [item.entry for item in back] == [entry for entries in written for entry in entries]
        assert [item.ends_group for item in back] == [False, False, True, True, False, False, False, True]
        assert [Mark(log.id, item.offset, item.hash) for item in back] == [log.mark(i) for i in range(1, 9)]
        assert log.end() == ends[-1] == log.mark(8)
        assert log.last_commit() == (Position(0, 30, 3), 1_030)
        assert [log.entry(offset) for offset in range(1, 9)] == back
        logs.verify(log)

    def test_entries_are_chosen_by_table_and_kind(self, logs: Logs) -> None:
        log = logs.make()
        log.append([change(1, 1), change(1, 2, table=OTHER), change(1, 3, kind="copy")])
        log.append([change(2, 1, b"again"), change(2, 2, b"{}", kind="truncate", filter=b"")])
        assert offsets(log.entries(0, 5, table=TABLE)) == [1, 3, 4, 5]
        assert offsets(log.entries(1, 4, table=TABLE, kinds=("rows", "copy"))) == [3, 4]
        assert offsets(log.entries(0, 5, kinds=("truncate",))) == [5]
        assert list(log.changes_of(TABLE, 0)) == [b"payload", b"again"]
        assert (list(log.truncates(TABLE, 0)), list(log.truncates(TABLE, 5))) == ([2], [])
        assert log.last_offsets() == {TABLE: 5, OTHER: 2}
        assert [log.before_unstaged(TABLE, n, n) for n in range(6)] == [0, 0, 0, 3, 3, 5]
        assert log.before_unstaged(OTHER, 2, 0) == 5

    def test_an_empty_group_changes_nothing(self, logs: Logs) -> None:
        log = logs.make()
        end = log.append(group(1, 1))
        assert log.append([]) == end == log.end()

    def test_read_gives_what_fits_and_at_least_one_entry(self, logs: Logs) -> None:
        log = logs.make()
        for commit, size in ((1, 3), (2, 2), (3, 1)):
            log.append([change(commit, i, b"x" * 100) for i in range(size)])
        assert offsets(log.read(0, 1)) == [1]
        assert offsets(log.read(1, 200)) == [2, 3]
        assert offsets(log.read(0, 499)) == [1, 2, 3, 4]
        assert offsets(log.read(3, 1 << 20)) == [4, 5, 6]
        assert list(log.read(6, 1)) == []

    def test_slices_stop_at_groups_bytes_rows_and_limit(self, logs: Logs) -> None:
        log = logs.make()
        for commit in (1, 2, 3):
            log.append([change(commit, i, b"x" * 10, rows=100_000) for i in range(2)])
        assert log.slice_end(0, 6, 1 << 20, 399_999) == 2
        assert log.slice_end(0, 6, 1 << 20, 400_000) == 4
        assert log.slice_end(0, 6, 1, 600_000) == 2, "a slice is never less than a group"
        assert log.slice_end(2, 5, 1 << 20, 600_000) == 4
        assert log.slice_end(4, 5, 1 << 20, 600_000) == 4, "no whole group fits"
        assert log.slice_end(0, 1, 1, 1) == 0, "no group ends there"
        assert [log.group_end(offset) for offset in range(7)] == [0, 0, 2, 2, 4, 4, 6]

    def test_a_tables_slice_ends_with_a_group_and_counts_only_its_kinds(self, logs: Logs) -> None:
        log = logs.make()
        for i in range(4):
            log.append([change(i + 1, rows=60_000), change(i + 1, rows=1)])
            log.append([change(i + 1, rows=90_000, kind="copy")])
        assert log.table_slice_end(TABLE, 0, 12, ("rows",)) == 3
        assert log.table_slice_end(TABLE, 3, 12, ("rows",)) == 6
        assert log.table_slice_end(TABLE, 9, 12, ("rows",)) == 12
        assert log.table_slice_end(TABLE, 0, 12, ("copy",)) == 5
        assert log.table_slice_end(TABLE, 0, 2, ("rows",)) == 2
        log.append([change(9, rows=200_000), change(9, rows=1)])
        assert log.table_slice_end(TABLE, 12, 14, ("rows",)) == 14

    def test_headers_place_and_backlog_tell_without_payloads(self, logs: Logs) -> None:
        log = logs.make()
        log.append(group(7, 2))
        log.append([change(9, 1, b"12345", rows=4)])
        found = [(h.offset, h.entry.rows, h.entry.payload) for h in log.headers(1, 3)]
        assert found == [(2, 1, b""), (3, 4, b"")]
        assert log.place(3) == (Position(0, 9, 1), 1_009)
        rows, size, oldest = log.backlog(2)
        assert (rows, size, oldest is not None) == (4, 5, True)
        assert log.backlog(3) == (0, 0, None)
        assert log.backlog(0, OTHER) == (0, 0, None)
        assert log.backlog(0, TABLE)[:2] == (6, 11)

    def test_copies_stand_between_and_do_not_move_the_position(self, logs: Logs) -> None:
        log = logs.make()
        marks = [
            CopyMark("begin", replace(SHAPE, version=3), (("a'b", "1"),), 7, "resync"),
            CopyMark("chunk", chunk=1, rows=0),
            CopyMark("end", floor=40, ceiling=50),
        ]
        log.append([change(30)])
        for commit, mark in zip((0, 40, 50), marks, strict=True):
            log.append([marker(commit, mark)])
        assert log.position() == Position(0, 30, 1)
        assert {log.place(offset) for offset in (1, 2, 3, 4)} == {(Position(0, 30, 1), 1_030)}
        told = [(offset, table, at.commit, mark) for offset, table, at, _, mark in log.copy_marks()]
        assert told == [(i, TABLE, at, m) for i, at, m in zip((2, 3, 4), (0, 40, 50), marks, strict=True)]
        assert log.schemas() == {TABLE: marks[0].schema}
        log.append([schema(35, replace(SHAPE, version=4))])
        assert (log.position(), log.schemas()[TABLE].version) == (Position(0, 35, 1), 4)
        log.append([change(5, epoch=1, kind="copy", committed_at=0)])
        assert (log.position(), log.place(6)) == (Position(0, 35, 1), (Position(1, 5, 1), 0))
        logs.verify(log)

    def test_commit_times_that_go_back_are_those_of_their_own_transactions(self, logs: Logs) -> None:
        """A source takes the time before it gives the place; a clock may be set back."""
        log = logs.make()
        log.append([change(20, committed_at=1_000, latest_at=1_500), change(30, committed_at=900)])
        log.append([change(25, kind="copy", committed_at=5_000)])
        for trimmed in (False, True):
            assert log.last_commit() == (Position(0, 30, 1), 900)
            assert log.place(2) == log.place(3) == (Position(0, 30, 1), 900) or trimmed
            log.trim(3)
        log.append([change(10, epoch=1, committed_at=700)])
        assert logs.reopen(log).last_commit() == (Position(1, 10, 1), 700)

    def test_a_stream_that_has_no_times_yet_keeps_its_place(self, logs: Logs) -> None:
        log = logs.make()
        log.append([change(50, committed_at=0)])
        log = logs.reopen(log)
        log.append([change(40, kind="copy", committed_at=0)])
        log.append([change(60)])
        assert log.last_commit() == (Position(0, 60, 1), 1_060)
        logs.verify(logs.reopen(log))

    @given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8), pieces=st.lists(st.integers(1, 400)))
    @many
    def test_a_replay_is_the_same_in_pieces_of_any_size(
        self, logs: Logs, sizes: list[int], pieces: list[int]
    ) -> None:
        log = logs.make()
        written = [[change(c, i, b"x" * (c * i * 7 % 90)) for i in range(n)] for c, n in enumerate(sizes, 1)]
        for entries in written:
            log.append(entries)
        again: list[LoggedEntry] = []
        turn = iter(pieces)
        while piece := log.read(len(again), next(turn, 50)):
            again += piece
        assert again == everything(log) == list(logs.reopen(log).read(0, 1 << 20))
        assert [item.entry for item in again] == [entry for entries in written for entry in entries]


class DurabilitySuite:
    """A group is whole or not there, whatever happens while it is appended; what was returned stays."""

    def test_what_append_returned_is_there_for_whoever_opens_the_log(self, logs: Logs) -> None:
        log = logs.make()
        for commit in range(1, 6):
            end = log.append(group(commit, commit))
            log.set_note("slot", f"b'é{commit}")
            held, identity = everything(log), log.id
            log = logs.reopen(log)
            assert (log.end(), log.id, log.note("slot"), log.note("none")) == (
                end,
                identity,
                f"b'é{commit}",
                None,
            )
            assert everything(log) == held
            logs.verify(log)

    def test_a_group_that_fails_leaves_nothing_nor_its_notes(self, logs: Logs) -> None:
        log = logs.make()
        end = log.append(group(1, 2))

        def making(fails: bool) -> Iterator[Entry]:
            yield from group(2, 5)
            log.set_note("roster", "new")
            if fails:
                raise RuntimeError("source lost")

        for _ in range(2):
            with pytest.raises(RuntimeError, match="source lost"):
                log.append(making(fails=True))
            assert (log.end(), log.note("roster"), offsets(everything(log))) == (end, None, [1, 2])
            logs.verify(log)
        assert log.append(making(fails=False)).offset == 7
        log = logs.reopen(log)
        assert (log.note("roster"), log.end().offset) == ("new", 7)
        logs.verify(log)

    def test_a_group_is_not_seen_before_it_is_whole(self, logs: Logs) -> None:
        log = logs.make()
        log.append(group(1, 1))
        seen: list[tuple[int, list[int]]] = []

        def look() -> None:
            seen.append((log.end().offset, offsets(log.read(0, 1 << 20))))

        def making() -> Iterator[Entry]:
            for entry in group(2, 3):
                yield entry
                thread = threading.Thread(target=look)
                thread.start()
                thread.join(30)

        assert log.append(making()).offset == 4
        assert seen == [(1, [1])] * 3

    def test_an_append_that_fails_at_any_step_leaves_all_of_it_or_nothing(self, logs: Logs) -> None:
        for step, is_there in logs.steps:
            log = logs.make()
            log.append(group(1, 2))
            with armed(f"{step}=raise"), pytest.raises((OSError, LogError)):
                log.append(group(2, 3))
            log = logs.reopen(log)
            assert log.end().offset == (5 if is_there else 2), step
            logs.verify(log)
            assert log.append(group(3, 1)).offset == log.end().offset == (6 if is_there else 3)
            logs.verify(log)

    def test_what_fails_before_the_sync_stops_nothing(self, logs: Logs) -> None:
        for step, is_there in logs.steps:
            log = logs.make()
            with armed(f"{step}=raise"), pytest.raises((OSError, LogError)) as caught:
                log.append(group(1, 2))
            if not isinstance(caught.value, LogError):
                assert log.append(group(2, 1)).offset == (3 if is_there else 1)
                assert offsets(everything(log)) == list(range(1, log.end().offset + 1))
                logs.verify(log)

    def test_a_trim_that_fails_can_be_done_again(self, logs: Logs) -> None:
        for step in logs.trim_steps:
            log = logs.make()
            for commit in range(1, 11):
                log.append(group(commit, 3))
            with armed(f"{step}=raise"), pytest.raises(OSError, match="failpoint"):
                log.trim(12)
            log = logs.reopen(log)
            assert log.begin().offset in (0, 12)
            logs.verify(log)
            log.trim(12)
            assert offsets(everything(log)) == list(range(13, 31))
            logs.verify(log)


class ReaderSuite:
    """Readers beside the writer."""

    def test_another_thread_reads_and_waits_beside_the_writer(self, logs: Logs) -> None:
        log = logs.make()
        seen: list[int] = []

        def consume() -> None:
            while len(seen) < 200 and log.wait(len(seen), 10):
                entries = log.read(len(seen), 1 << 20)
                assert entries[-1].ends_group
                seen.extend(offsets(entries))

        thread = threading.Thread(target=consume)
        thread.start()
        for commit in range(1, 101):
            log.append(group(commit, 2))
        thread.join(30)
        assert seen == list(range(1, 201))
        assert not log.wait(200, 0.01)

    def test_who_holds_writing_keeps_others_from_it(self, logs: Logs) -> None:
        log = logs.make()
        log.set_note("n", "0")

        def count() -> None:
            for _ in range(50):
                with log.writing():
                    log.set_note("n", str(int(log.note("n") or 0) + 1))

        threads = [threading.Thread(target=count) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert log.note("n") == "150"

    def test_who_has_little_patience_goes_on_without_writing(self, logs: Logs) -> None:
        log = logs.make()
        told: list[bool] = []

        def look() -> None:
            with log.writing(0.05) as is_held:
                told.append(is_held)

        def other() -> None:
            thread = threading.Thread(target=look)
            thread.start()
            thread.join(10)

        with log.writing():
            other()
            look()
        other()
        assert told == [False, True, True]

    def test_a_reader_beside_a_trim_misses_nothing_unseen(self, logs: Logs) -> None:
        """It gets entry after entry, or is told that they are gone: never a gap."""
        log = logs.make()
        for commit in range(1, 251):
            log.append(group(commit, 2))
        reading = log.entries(0, 500)
        seen = [next(reading).offset]
        log.trim(400)
        with pytest.raises(LogTrimmed):
            seen.extend(item.offset for item in reading)
        assert seen == list(range(1, len(seen) + 1))


class ProcessSuite:
    """What several processes may do with a log, and what is left when one is killed."""

    def _write(
        self, logs: ProcessLogs, log: TestedLog, doing: str, points: str = ""
    ) -> subprocess.Popen[str]:
        code = f"from headrace.testing.logs import group\n{logs.code(log, read_only=False)}\n{doing}"
        variables = {**os.environ, failpoints.VARIABLE: points}
        return subprocess.Popen(
            [sys.executable, "-c", code], env=variables, stdout=subprocess.PIPE, text=True
        )

    def test_a_writer_killed_at_any_step_leaves_whole_groups(self, logs: ProcessLogs) -> None:
        doing = "for n in range(1, 9): print(log.append(group(n, n % 3 + 1)).offset, flush=True)"
        for step, is_there in logs.steps:
            log = logs.make()
            process = self._write(logs, log, doing, f"{step}=kill@4")
            printed, _ = process.communicate(timeout=60)
            assert process.returncode == -signal.SIGKILL, step
            assert [int(line) for line in printed.split()] == [2, 5, 6]
            log = logs.reopen(log)
            assert log.end().offset == (8 if is_there else 6), step
            assert everything(log)[-1].ends_group
            logs.verify(log)
            assert log.append(group(5_000, 1)).offset == log.end().offset
            logs.verify(log)

    def test_a_trim_that_is_killed_can_be_done_again(self, logs: ProcessLogs) -> None:
        doing = "for n in range(1, 11): log.append(group(n, 3))\nlog.trim(12)"
        for step in logs.trim_steps:
            log = logs.make()
            process = self._write(logs, log, doing, f"{step}=kill")
            process.communicate(timeout=60)
            assert process.returncode == -signal.SIGKILL
            log = logs.reopen(log)
            assert log.begin().offset in (0, 12)
            logs.verify(log)
            log.trim(12)
            assert offsets(everything(log)) == list(range(13, 31))
            logs.verify(log)

    def test_another_process_reads_whole_groups_while_one_writes(self, logs: ProcessLogs) -> None:
        log = logs.make()
        reading = (
            "seen = 0\nwhile seen < 600:\n  found = log.read(seen, 1 << 20)\n"
            "  assert not found or found[-1].ends_group\n"
            "  for item in found:\n    seen += 1\n    assert item.offset == seen\n"
        )
        code = f"{logs.code(log, read_only=True)}\n{reading}"
        with subprocess.Popen([sys.executable, "-c", code]) as reader:
            commit = 0
            while reader.poll() is None and commit < 20_000:
                commit += 1
                log.append(group(commit, commit % 3 + 1))
            assert reader.wait(60) == 0
        assert log.end().offset >= 600


class LogSuite(OrderSuite, DurabilitySuite, ReaderSuite, RetentionSuite, AnchorSuite):
    """All that every log has to keep."""


class SharedLogSuite(LogSuite, ProcessSuite):
    """All of it, and what a log has to keep that several processes open."""
