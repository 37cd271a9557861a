"""Retention on a real log and its real consumers; what staging and destination need is put in."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest

from headrace.change import Entry
from headrace.config import LogConfig
from headrace.errors import LogTrimmed
from headrace.lane import Lane
from headrace.log.consumers import Cursors
from headrace.log.retention import Needs
from headrace.log.sqlite import SQLiteLog
from headrace.reading import OpenLog
from headrace.testing.logs import change
from headrace.turns import Turns
from headrace.upkeep import Upkeep

Meanwhile = Callable[[Callable[[OpenLog], object]], None]


class OneLane:
    """A lane of which all is applied."""

    def __init__(self, log: SQLiteLog) -> None:
        self.log = log
        self.applying = Turns()

    def needs(self) -> Needs:
        return Needs(self.log.end().offset, frozenset())


@pytest.fixture
def lane(tmp_path: Path) -> Iterator[OneLane]:
    """A lane whose log has 20 groups of one entry, in segments of ten."""
    log = SQLiteLog(tmp_path / "shop.db", segment_bytes=20_000)
    for commit in range(1, 21):
        log.append([change(commit, payload=os.urandom(2_000))])
    yield OneLane(log)
    log.close()


def upkeep_of(lane: OneLane, **config: Any) -> Upkeep:
    """Return the upkeep of a lane whose every entry is old."""
    settings = {"keep": None, "keep_bytes": 1, **config}
    return Upkeep(cast(Lane, lane), LogConfig(**settings), threading.Event())


def test_a_trim_that_waits_for_an_append_keeps_nobody_from_applying(lane: OneLane) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def huge() -> Iterator[Entry]:
        yield change(21)
        begun.set()
        goes_on.wait(30)
        yield change(21, 2)

    upkeep = upkeep_of(lane)
    threads = [threading.Thread(target=lane.log.append, args=(huge(),)), threading.Thread(target=upkeep.step)]
    threads[0].start()
    assert begun.wait(10)
    threads[1].start()
    try:
        for _ in range(5):
            time.sleep(0.2)
            since = time.monotonic()
            with lane.applying:
                assert time.monotonic() - since < 1
        assert lane.log.begin().offset == 0, "there was nothing to wait for"
    finally:
        goes_on.set()
        for thread in threads:
            thread.join(30)
        upkeep.close()
    assert lane.log.begin().offset > 0


@pytest.fixture
def meanwhile(
    lane: OneLane, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[OpenLog], object]], None]:
    """What somebody does once upkeep has looked at the consumers, and before it trims."""

    def take_step(doing: Callable[[OpenLog], object]) -> None:
        trim = lane.log.trim

        def late(*arguments: Any) -> int:
            monkeypatch.setattr(lane.log, "trim", trim)
            with OpenLog(lane.log.path) as log:
                doing(log)
            return trim(*arguments)

        monkeypatch.setattr(lane.log, "trim", late)
        with closing(upkeep_of(lane)) as upkeep:
            upkeep.step()

    return take_step


def test_a_consumer_that_joins_while_the_log_is_trimmed_begins_behind_what_goes(
    lane: OneLane, meanwhile: Meanwhile
) -> None:
    meanwhile(lambda log: log.read("reports"))
    with OpenLog(lane.log.path) as log:
        (cursor,) = log.consumers()
        assert cursor.offset == log.begin.offset > 0
        assert next(log.read("reports")).through == log.head


def test_a_reset_to_what_is_about_to_go_is_refused(lane: OneLane, meanwhile: Meanwhile) -> None:
    with closing(Cursors(lane.log.path.with_suffix(".cursors"))) as cursors:
        cursors.commit("reports", lane.log.end())

    def reset(log: OpenLog) -> None:
        with pytest.raises(LogTrimmed, match="What follows offset 5 is being deleted") as caught:
            log.reset("reports", 5)
        offset = int(caught.value.remedy.split()[1].rstrip(","))
        assert log.begin.offset < offset == log.reset("reports", offset).offset

    meanwhile(reset)
    with OpenLog(lane.log.path) as log:
        assert log.consumers()[0].offset == log.begin.offset
        next(log.read("reports"))


def test_what_was_about_to_go_and_stayed_can_be_read_again(lane: OneLane, meanwhile: Meanwhile) -> None:
    def killed(log: OpenLog) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        meanwhile(killed)
    with closing(upkeep_of(lane, keep_bytes=0)) as upkeep:
        upkeep.step()
    with OpenLog(lane.log.path) as log:
        log.read("reports", after=1)
        assert log.reset("reports", 0).offset == log.begin.offset == 0
