"""How a person names a place in the log: `start`, `end`, an offset, an LSN, a time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from headrace.config import FILE_NAME, load_project
from headrace.errors import UserError
from headrace.log.places import Cut, cut_at_commit, cut_at_offset, cut_at_time, group_of
from headrace.log.sqlite import SQLiteLog
from headrace.raw.place import LSN, moment_of
from headrace.sources.postgres.lsn import parse_lsn

WHERE = "`start`, `end`, an offset (123), an LSN (0/16B3748), or a time (2026-11-23T15:09:17, UTC)"

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def cut_before(log: SQLiteLog, text: str) -> Cut:
    """Return the cut before what `text` names: the first transaction committed there or later.

    Raises UserError for what names nothing, LogTrimmed for what has been deleted.
    """
    if text == "start":
        return Cut(log.begin().offset)
    if text == "end":
        return Cut(log.group_end(log.end().offset))
    if text.isdecimal() and text.isascii():
        return cut_at_offset(log, int(text))
    if LSN.fullmatch(text):
        return cut_at_commit(log, parse_lsn(text))
    return cut_at_time(log, moment_of(text))


def cut_behind(log: SQLiteLog, text: str) -> Cut:
    """Return the cut behind what `text` names: behind the last transaction committed there or earlier."""
    if text.isdecimal() and text.isascii():
        offset = min(int(text), log.end().offset)
        cut_at_offset(log, offset)
        return Cut(group_of(log, offset).through if offset else 0)
    if LSN.fullmatch(text):
        return cut_at_commit(log, parse_lsn(text) + 1)
    return cut_before(log, text) if text in ("start", "end") else cut_at_time(log, moment_of(text) + 1)


def pii_of(project: Path, source: str) -> tuple[str, ...]:
    """Return which columns the project in a folder marks `pii`; none for a log that is no project's."""
    if not (project / FILE_NAME).is_file():
        return ()
    known = load_project(project, secrets=False).sources
    return next((config.pii for config in known if config.name == source), ())


def lsn_of(text: str) -> int:
    """Read an LSN. Raises UserError."""
    if not LSN.fullmatch(text):
        raise UserError(f'"{text}" is no LSN.', "Write it as Postgres does: 0/16B3748.")
    return parse_lsn(text)


def time_text(micros: int, timespec: str = "microseconds") -> str:
    """Return a time as ISO 8601 in UTC."""
    moment = (_EPOCH + timedelta(microseconds=micros)).replace(tzinfo=None)
    return moment.isoformat(timespec=timespec) + "Z"
