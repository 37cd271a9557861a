"""Retention on a real log and its real consumers; what staging and destination need is put in."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from headrace.change import Entry
from headrace.config import LogConfig
from headrace.lane import Lane
from headrace.log.retention import Needs
from headrace.log.sqlite import SQLiteLog
from headrace.testing.logs import change
from headrace.turns import Turns
from headrace.upkeep import Upkeep


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
