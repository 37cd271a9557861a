"""Maintenance of the raw tables: small files become large ones, replaced files and old commits go.

A load of one row makes a file of one row. Files are merged as a log-structured store does it: in tiers of
like size, so that a row is written again once for each factor of 16 that its file grows, and neighbours
only, so that files stay apart by offset and a slice reads no more than the row groups that it needs.
"""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import pyarrow as pa

from headrace.change import Offset, TableId
from headrace.staging.delta import DeltaStaging
from headrace.staging.named import find_tables
from headrace.staging.table import DataFile, RawTable

logger = logging.getLogger("headrace.staging")

TARGET_BYTES = 128 << 20
TARGET_ROWS = 4_000_000
"""How large a merged file grows; one of half that size is left alone."""

FAN = 16
"""How many neighbours of one tier are merged."""

HEAD_FILES = 64
"""How many of the newest files may wait for a model that has not used them yet."""

CHECKPOINT_EVERY = 100
"""Commits between two checkpoints."""

GRACE = 300.0
"""Seconds that a replaced file stays for readers outside of this process."""

_TIERS = 7
_MOST_FILES = 1024  # that one merge replaces
_GROUP_BYTES, _GROUP_ROWS = 8 << 20, 50_000
_SLICE = 0.02  # seconds of work between two pauses


class _Stopped(Exception):
    """The process ends: what is half done is left."""


class _Pace:
    """Sleeps in proportion to the time worked, which is this thread's CPU time and as much again: delta-rs
    commits in threads of its own. `worked` is the time that passed without the sleep, in seconds."""

    def __init__(self, stop: threading.Event, share: float) -> None:
        self._stop = stop
        self._share = share
        self.worked = 0.0
        self._go_on()

    def _go_on(self) -> None:
        self._since, self._cpu_since = time.monotonic(), time.thread_time()

    def __call__(self, *, now: bool = False) -> None:
        """Pause as is due, or only once it is worth it unless `now`; raises _Stopped."""
        passed = time.monotonic() - self._since
        busy = min(passed, 2 * (time.thread_time() - self._cpu_since))
        if busy < _SLICE and not now:
            return
        if self._stop.wait(busy * (1 / self._share - 1)):
            raise _Stopped
        self.worked += passed
        self._go_on()


class Maintenance:
    """Maintains the raw tables of one source, beside whoever loads and reads them."""

    def __init__(
        self, staging: DeltaStaging, stop: threading.Event, *, share: float = 0.1, grace: float = GRACE
    ) -> None:
        """`share` is the part of one core's time that `step` may take (0: nothing is done), `grace` how many
        seconds a file or commit stays after it was replaced."""
        self._staging = staging
        self._stop = stop
        self._share = share
        self._grace = grace
        self._turn = 0
        self._working = threading.Lock()

    def step(self, seconds: float = 1.0, *, paced: bool = True) -> bool:
        """Do what is due at table after table, until `seconds` are worked; say whether more may be due.
        A merge that has begun is finished, unless `stop` is set: then it is given up.

        Pauses, unless it is not `paced`, so that it takes no more than its share.
        """
        if not self._share:
            return False
        pace = _Pace(self._stop, self._share if paced else 1.0)
        more = False
        try:
            with self._working:
                tables = list(self._staging.tables().items())
                for _ in tables:
                    if pace.worked >= seconds:
                        return True
                    table, raw = tables[self._turn % len(tables)]
                    self._turn += 1
                    more |= self._maintain(table, raw, pace)
                    pace(now=True)
        except _Stopped:
            return False
        return more

    @property
    def staging(self) -> DeltaStaging:
        """The raw tables that are maintained."""
        return self._staging

    def compact(self, table: TableId) -> dict[str, int]:
        """Merge all files of a table that are not large yet, now and without a pause.

        Returns `files_before`, `files`, `bytes_before` and `bytes` of its live files.
        """
        raw, pace = self._staging.tables()[table], _Pace(threading.Event(), 1.0)
        with self._working:
            before = raw.files
            while run := next_run(raw.files, everything=True):
                self._merge(table, raw, run, pace)
            raw.checkpoint(1, self._grace)
            raw.sweep(self._grace)
            return {
                "files_before": len(before),
                "files": len(raw.files),
                "bytes_before": sum(file.bytes for file in before),
                "bytes": sum(file.bytes for file in raw.files),
            }

    def _maintain(self, table: TableId, raw: RawTable, pace: _Pace) -> bool:
        """Do what is due at one table; say whether more may be due."""
        run = next_run(raw.files[: movable(raw.files, self._staging.used())])
        if run:
            self._merge(table, raw, run, pace)
        raw.checkpoint(CHECKPOINT_EVERY, self._grace)
        raw.sweep(self._grace)
        return bool(run)

    def _merge(self, table: TableId, raw: RawTable, run: Sequence[DataFile], pace: _Pace) -> None:
        parts = raw.chunks(run[0].first - 1, run[-1].last, use_threads=False)
        raw.merge(run, _row_groups(parts, pace))
        logger.debug("%s: %d files up to offset %d are one", table, len(run), run[-1].last)


def compact_tables(works: Mapping[str, Maintenance], source: str, table: str) -> list[dict[str, Any]]:
    """Compact the tables that are meant, see `find_tables`; returns for each `source`, `table`, and what
    `Maintenance.compact` does."""
    stagings = {name: work.staging for name, work in works.items()}
    return [
        {"source": of, "table": str(found), **works[of].compact(found)}
        for of, found in find_tables(stagings, source, table)
    ]


def movable(files: Sequence[DataFile], used: Offset) -> int:
    """Return how many of the oldest files may be merged: all that everything has `used`, so that a slice
    near the head finds files of its own, and all but `HEAD_FILES` where a model stands still."""
    return max(bisect_right(files, used, key=lambda file: file.last), len(files) - HEAD_FILES)


def next_run(files: Sequence[DataFile], *, everything: bool = False) -> Sequence[DataFile]:
    """Return the neighbours to merge next, none if nothing is due.

    Small tiers come first. A run is due that has `FAN` files, unless one of them outweighs all the others:
    its rows would be written again for little. With `everything`, any two neighbours are due.
    """
    for tier in range(_TIERS):
        for joined, window in groupby(files, key=lambda file: not _full(file) and _tier(file) <= tier):
            neighbours = list(window) if joined else []
            run = _fitting(neighbours)
            if len(neighbours) >= (2 if everything else FAN) and (everything or _pays(run)):
                return run
    return ()


def _fitting(files: Sequence[DataFile]) -> Sequence[DataFile]:
    """Return the first files, as many as one file may hold."""
    size = rows = 0
    for i, file in enumerate(files[:_MOST_FILES]):
        size, rows = size + file.bytes, rows + file.rows
        if size > TARGET_BYTES or rows > TARGET_ROWS:
            return files[:i]
    return files[:_MOST_FILES]


def _pays(run: Sequence[DataFile]) -> bool:
    rows, size = sum(file.rows for file in run), sum(file.bytes for file in run)
    return 2 * max(file.rows for file in run) <= rows or size >= TARGET_BYTES // 2


def _full(file: DataFile) -> bool:
    return file.bytes >= TARGET_BYTES // 2 or file.rows >= TARGET_ROWS // 2


def _tier(file: DataFile) -> int:
    return min((file.rows.bit_length() - 1) // 4, _TIERS - 1)


def _row_groups(parts: Iterator[pa.Table], pace: _Pace) -> Iterator[pa.Table]:
    """Join small parts to row groups of a bounded size, pausing between them."""
    held: list[pa.Table] = []
    size = rows = 0
    for part in parts:
        if held and (size + part.nbytes > _GROUP_BYTES or rows + part.num_rows > _GROUP_ROWS):
            yield pa.concat_tables(held)
            held, size, rows = [], 0, 0
        pace()
        held.append(part)
        size, rows = size + part.nbytes, rows + part.num_rows
    if held:
        yield pa.concat_tables(held)
