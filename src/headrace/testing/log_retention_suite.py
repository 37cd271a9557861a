"""What every log has to keep of retention and of anchors; a part of `headrace.testing.log_suite`."""
# ruff: noqa: D102 - the name of a test says what it tests

from __future__ import annotations

import os
import uuid
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.change import CopyMark, Mark, Offset, Position
from headrace.errors import LogDamaged, LogTrimmed, UserError
from headrace.log.proof import Anchor, anchor, check_anchor
from headrace.testing.logs import (
    OTHER,
    SHAPE,
    TABLE,
    Logs,
    TestedLog,
    change,
    everything,
    group,
    marker,
    offsets,
    schema,
)

SLICE_BYTES, SLICE_ROWS, STOP_ROWS = 16 << 20, 250_000, 300_000

many = settings(
    deadline=None,
    suppress_health_check=[
        HealthCheck.differing_executors,
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
    ],
)


class RetentionSuite:
    """What is left behind by retention: a beginning, stops, shapes, markers."""

    def _filled(self, logs: Logs, groups: int = 20, size: int = 3) -> TestedLog:
        log = logs.make()
        for commit in range(1, groups + 1):
            log.append([change(commit, i, os.urandom(2_000)) for i in range(size)])
        return log

    def test_a_trimmed_log_begins_behind_whole_groups(self, logs: Logs) -> None:
        log = self._filled(logs)
        before, end = everything(log), log.end()
        place, mark = log.place(30), log.mark(30)
        log.trim(32)
        for _ in range(2):
            assert log.begin() == mark, "offset 32 stands in the middle of a group"
            assert log.place(30) == place
            assert (log.group_end(31), log.group_end(30)) == (30, 30)
            assert everything(log) == before[30:]
            assert list(log.read(30, 1 << 30)) == before[30:]
            assert (log.entry(30), log.entry(31)) == (None, before[30])
            assert log.backlog(0) == log.backlog(30)
            assert (log.end(), log.last_commit()) == (end, (Position(0, 20, 2), 1_020))
            for after in (0, 29):
                with pytest.raises(LogTrimmed, match="begins behind offset 30"):
                    log.read(after, 1)
                with pytest.raises(LogTrimmed, match="begins behind offset 30"):
                    next(log.entries(after, 60))
            assert log.mark(29) is None
            logs.verify(log)
            log = logs.reopen(log)
        log.trim(10)
        assert log.begin() == mark, "it does not come back"

    def test_a_log_that_is_trimmed_to_its_end_goes_on(self, logs: Logs) -> None:
        log = self._filled(logs)
        end, commit = log.end(), log.last_commit()
        log.trim(1_000)
        for _ in range(2):
            assert log.begin() == log.end() == log.mark(60) == end
            assert (log.last_commit(), log.backlog(0), everything(log)) == (commit, (0, 0, None), [])
            with pytest.raises(LogTrimmed):
                log.read(0, 1)
            assert list(log.read(60, 1)) == []
            logs.verify(log)
            log = logs.reopen(log)
        assert log.append(group(21, 2)).offset == 62
        assert offsets(log.read(60, 1 << 20)) == [61, 62]
        logs.verify(logs.reopen(log))

    def test_space_is_given_back(self, logs: Logs) -> None:
        log = self._filled(logs, groups=100)
        before = log.size()
        freed = log.trim(270)
        assert freed > 400_000
        assert log.size() < before - 400_000
        log = logs.reopen(log)
        assert log.size() < before - 400_000

    def test_pinned_stops_stay_also_where_they_are_pinned_late(self, logs: Logs) -> None:
        log = self._filled(logs, groups=30)
        told = {offset: (log.mark(offset), log.place(offset)) for offset in range(3, 91, 3)}
        log.trim(21, pinned=[9])
        log.trim(30, pinned=[9, 21])
        log.trim(60, pinned=[9, 21, 45])
        log.trim(80, pinned=[9, 21, 45, 78])
        log = logs.reopen(log)
        for offset in (9, 21, 45, 78):
            assert (log.mark(offset), log.place(offset)) == told[offset]
            assert log.group_end(offset) == offset
            assert log.slice_end(offset, 90, SLICE_BYTES, SLICE_ROWS) > offset
            at = 0
            while at < offset:
                at = log.slice_end(at, offset, SLICE_BYTES, SLICE_ROWS)
            assert at == offset, "a walk to a pinned stop comes to it"
        for limit in (3, 18, 57, 78):
            assert 0 < log.slice_end(0, limit, SLICE_BYTES, SLICE_ROWS) <= limit
            assert 0 < log.table_slice_end(TABLE, 0, limit, ("rows",)) <= limit

    def test_shapes_and_copies_are_known_for_ever(self, logs: Logs) -> None:
        log = logs.make()
        log.append([schema(1, SHAPE), change(1)])
        log.append([marker(1, CopyMark("begin", SHAPE, after=2))])
        log.append([change(1, kind="copy", committed_at=0), marker(1, CopyMark("chunk", chunk=0, rows=1))])
        log.append([marker(2, CopyMark("end", floor=1, ceiling=2))])
        log.append([schema(3, replace(SHAPE, version=2)), change(3)])
        log.append([schema(3, replace(SHAPE, table=OTHER))])
        known = log.schemas(), list(log.copy_marks()), log.position()
        assert (len(known[0]), len(known[1])) == (2, 3)
        for through in (2, 5, 8, 9):
            log.trim(through)
            log = logs.reopen(log)
            assert (log.schemas(), list(log.copy_marks()), log.position()) == known
            assert offsets(everything(log)) == list(range(log.begin().offset + 1, 10))
            logs.verify(log)
        log.append([change(9)])
        assert offsets(everything(log)) == [10]
        assert list(log.truncates(TABLE, 0)) == []
        logs.verify(log)

    def test_a_log_that_begins_with_a_copy_can_be_trimmed_behind_it(self, logs: Logs) -> None:
        log = logs.make()
        log.append([marker(1, CopyMark("begin", SHAPE)), change(1, kind="copy", committed_at=0)])
        log.append([change(2)])
        log.trim(2)
        assert (log.place(2)[1], log.place(3)) == (0, (Position(0, 2, 1), 1_002))
        assert log.position() == Position(0, 2, 1)
        logs.verify(logs.reopen(log))

    @given(
        steps=st.lists(
            st.one_of(
                st.lists(st.sampled_from([0, 1, 20_000, 90_000, 150_000]), min_size=1, max_size=4),
                st.tuples(st.floats(0, 1), st.lists(st.floats(0, 1), max_size=2)),
            ),
            min_size=1,
            max_size=25,
        )
    )
    @many
    def test_any_mix_of_trims_and_appends_is_walked_in_bounded_slices(
        self, logs: Logs, steps: list[list[int] | tuple[float, list[float]]]
    ) -> None:
        log = logs.make()
        rows: list[int] = []
        ends: dict[int, tuple[Mark | None, tuple[Position, int]]] = {}
        pinned: set[int] = set()
        for commit, step in enumerate(steps, 1):
            if isinstance(step, list):
                end = log.append([change(commit, i, rows=n) for i, n in enumerate(step)])
                rows += step
                ends[end.offset] = end, log.place(end.offset)
            else:
                chosen = {log.group_end(round(pin * len(rows))) for pin in step[1]}
                pinned |= {pin for pin in chosen if log.mark(pin) is not None}
                log.trim(round(step[0] * len(rows)), pinned)
        logs.verify(log)
        limit = log.end().offset
        assert limit == len(rows)
        for bounded in (self._slice, self._table_slice):
            at, seen = 0, {0}
            while at < limit:
                at, before = bounded(log, at), at
                seen.add(at)
                assert at > before
                assert at in ends
                assert (log.mark(at), log.place(at)) == ends[at]
                assert sum(rows[before:at]) <= STOP_ROWS or not any(before < end < at for end in ends)
            assert {pin for pin in pinned if pin <= log.begin().offset} <= seen

    def _slice(self, log: TestedLog, after: Offset) -> Offset:
        return log.slice_end(after, log.end().offset, SLICE_BYTES, SLICE_ROWS)

    def _table_slice(self, log: TestedLog, after: Offset) -> Offset:
        return log.table_slice_end(TABLE, after, log.end().offset, ("rows",))


class AnchorSuite:
    """The head of a log, noted elsewhere."""

    def _anchored(self, logs: Logs) -> tuple[TestedLog, Anchor]:
        log = logs.make()
        for commit in range(1, 6):
            log.append(group(commit, 2))
        return log, Anchor.from_json(anchor(log).to_json())

    def test_an_anchor_holds_while_the_log_grows_and_until_it_is_trimmed_beyond_it(self, logs: Logs) -> None:
        log, noted = self._anchored(logs)
        assert (noted.log_id, noted.offset, noted.hash) == log.end()
        assert (noted.position, noted.committed_at, noted.source) == ("0/5/2", 1_005, log.source)
        assert check_anchor(log, noted)
        log.append(group(9, 2))
        log.trim(10)
        assert check_anchor(logs.reopen(log), noted)
        log, noted = self._anchored(logs)
        log.append(group(9, 2))
        early = replace(noted, offset=3, hash="00" * 32)
        log.trim(10)
        assert not check_anchor(log, early), "nothing is left to compare it with"

    def test_a_tail_that_was_cut_off_is_seen(self, logs: Logs) -> None:
        log, noted = self._anchored(logs)
        log = logs.cut_off(log, 8)
        logs.verify(log)
        with pytest.raises(LogDamaged, match="held offset 10, now it ends at 8: its tail was cut off"):
            check_anchor(log, noted)

    def test_a_chain_that_was_computed_anew_is_seen(self, logs: Logs) -> None:
        log, noted = self._anchored(logs)
        forged = logs.forge(log)
        for commit in range(1, 8):
            forged.append([change(commit, i, b"forged") for i in range(2)])
        logs.verify(forged)
        with pytest.raises(LogDamaged, match="offset 10 has another hash"):
            check_anchor(forged, noted)

    def test_another_log_is_refused(self, logs: Logs) -> None:
        _, noted = self._anchored(logs)
        other, _ = self._anchored(logs)
        with pytest.raises(LogDamaged, match=f"is of log {noted.log_id}"):
            check_anchor(other, noted)

    def test_a_signature_vouches_for_every_word_of_an_anchor(self, logs: Logs) -> None:
        log, _ = self._anchored(logs)
        noted = Anchor.from_json(anchor(log, "secret").to_json())
        check_anchor(log, noted, "secret")
        bad: list[Anchor] = [anchor(log), noted.signed("other"), replace(noted, hash="00" * 32)]
        bad += [replace(noted, offset=9), replace(noted, position="0/5/1"), replace(noted, anchored_at=1)]
        bad += [replace(noted, log_id=uuid.uuid4().hex), replace(noted, source="x")]
        bad.append(replace(noted, committed_at=1))
        for wrong in bad:
            with pytest.raises(LogDamaged, match="not signed with this key"):
                check_anchor(log, wrong, "secret")
        for text in (
            "",
            "{}",
            "[]",
            "null",
            '{"hash": 1}',
            noted.to_json().replace('"hash": "', '"hash": "z'),
        ):
            with pytest.raises(UserError, match="This is no anchor"):
                Anchor.from_json(text)
