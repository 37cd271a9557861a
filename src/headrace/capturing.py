"""Capture: from a source to its log, group by group; only then is the source told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing

from headrace.change import START, SourceMark, source_marker
from headrace.errors import SourceGap
from headrace.log.sqlite import SQLiteLog
from headrace.sources.postgres.slot import durable_commit
from headrace.sources.postgres.source import PostgresSource
from headrace.sources.postgres.tables import UNFINISHED, read_states

Works = Callable[[bool], None]


def capture(
    source: PostgresSource,
    log: SQLiteLog,
    stop: threading.Event,
    until: int | None,
    works: Works | None,
) -> None:
    """Copy from a source to its log until `stop`, or until the log is past LSN `until`.

    `works` is called when the source has answered, with whether something was appended to the log.
    """
    try:
        with closing(source.read(log)) as groups:
            for group in groups:
                if group:
                    log.append(group)
                    if position := log.position():
                        source.confirm(position)
                if works is not None:
                    works(bool(group))
                if stop.is_set() or (until is not None and _is_past(log, until)):
                    return
    except SourceGap as gap:
        _mark_gap(log, str(gap))
        raise


def _mark_gap(log: SQLiteLog, reason: str) -> None:
    """Let every reader of the log know that changes are missing here; said once, while it lasts."""
    last = log.entry(log.end().offset)
    mark = SourceMark("gap", reason)
    if last is None or last.entry.payload != mark.to_json().encode():
        log.append([source_marker(log.position() or START, mark)])


def _is_past(log: SQLiteLog, lsn: int) -> bool:
    states = read_states(log).values()
    if not states or any(state.stage in UNFINISHED for state in states):
        return False
    # What the slot was made behind is in the copies.
    return durable_commit(log) > lsn
