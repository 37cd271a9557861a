"""The mark of a gap: where changes of the source are missing in its log."""

from __future__ import annotations

from headrace.change import START, SourceMark, source_marker
from headrace.log.sqlite import SQLiteLog


def mark_gap(log: SQLiteLog, reason: str) -> None:
    """Let every reader of a log know that changes are missing here; said once, while it lasts."""
    last = log.entry(log.end().offset)
    mark = SourceMark("gap", reason)
    if last is None or last.entry.payload != mark.to_json().encode():
        log.append([source_marker(log.position() or START, mark)])
