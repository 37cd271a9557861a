"""How a person names a place in the log: `start`, `end`, an offset, an LSN, a time."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from headrace.change import Offset
from headrace.errors import LogTrimmed, UserError
from headrace.log.places import Cut, cut_at_commit, cut_at_offset, cut_at_time, group_of
from headrace.log.sqlite import SQLiteLog
from headrace.sources.postgres.lsn import format_lsn, parse_lsn

WHERE = "`start`, `end`, an offset (123), an LSN (0/16B3748), or a time (2026-11-23T15:09:17, UTC)"

_LSN = re.compile(r"[0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class AsOf(NamedTuple):
    """The past of a source, for who reads staging: all that stands through the end of a group.

    Where `before` is not None, only transactions whose commit (epoch and LSN) stands before it.
    """

    through: Offset
    before: tuple[int, int] | None = None


def as_of(log: SQLiteLog, text: str) -> AsOf:
    """Return what staging has to show of a source as of a place: every transaction committed there or before.

    An offset counts with the whole group that holds it. What retention has deleted from the log still is in
    staging: there LSNs, and offsets that end a group. Raises UserError for what names nothing or lies
    beyond the log's end, LogTrimmed for what only the log could have told.
    """
    _refuse_beyond(log, text)
    begin = log.begin().offset
    if begin and _is_offset(text) and int(text) <= begin:
        near = log.group_end(int(text))
        if near != int(text):
            raise LogTrimmed(
                f"The log of {log.source} begins behind offset {begin}: where groups ended around {text} has "
                "been deleted by retention.",
                f"Name {near} or {_stop_after(log, near)}, or an LSN.",
            )
        return AsOf(near)
    if begin and _LSN.fullmatch(text):
        wanted = (log.place(log.end().offset)[0].epoch, parse_lsn(text) + 1)
        if log.place(begin)[0][:2] >= wanted:  # its group is gone, staging has its rows
            return AsOf(_stop_at(log, wanted), wanted)
    offset, before = cut_behind(log, text)
    return AsOf(group_of(log, offset + 1).through if before else offset, before)


def cut_before(log: SQLiteLog, text: str) -> Cut:
    """Return the cut before what `text` names: the first transaction committed there or later.

    Raises UserError for what names nothing, LogTrimmed for what has been deleted.
    """
    if text == "start":
        return Cut(log.begin().offset)
    if text == "end":
        return Cut(log.group_end(log.end().offset))
    if _is_offset(text):
        return cut_at_offset(log, int(text))
    if _LSN.fullmatch(text):
        return cut_at_commit(log, parse_lsn(text))
    return cut_at_time(log, moment_of(text))


def cut_behind(log: SQLiteLog, text: str) -> Cut:
    """Return the cut behind what `text` names: behind the last transaction committed there or earlier."""
    if _is_offset(text):
        offset = min(int(text), log.end().offset)
        cut_at_offset(log, offset)
        return Cut(group_of(log, offset).through if offset else 0)
    if _LSN.fullmatch(text):
        return cut_at_commit(log, parse_lsn(text) + 1)
    return cut_before(log, text) if text in ("start", "end") else cut_at_time(log, moment_of(text) + 1)


def lsn_of(text: str) -> int:
    """Read an LSN. Raises UserError."""
    if not _LSN.fullmatch(text):
        raise UserError(f'"{text}" is no LSN.', "Write it as Postgres does: 0/16B3748.")
    return parse_lsn(text)


def moment_of(text: str) -> int:
    """Return an ISO time as microseconds since 1970, in UTC unless it says otherwise. Raises UserError."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f'"{text}" is no place in the log.', f"Write {WHERE}.") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - _EPOCH) // timedelta(microseconds=1)


def time_text(micros: int, timespec: str = "microseconds") -> str:
    """Return a time as ISO 8601 in UTC."""
    moment = (_EPOCH + timedelta(microseconds=micros)).replace(tzinfo=None)
    return moment.isoformat(timespec=timespec) + "Z"


def _is_offset(text: str) -> bool:
    return text.isdecimal() and text.isascii()


def _refuse_beyond(log: SQLiteLog, text: str) -> None:
    """Raise UserError for a place that the log has not come to: nobody knows what will be there."""
    if text in ("start", "end"):
        return
    position, committed_at = log.last_commit() or (None, 0)
    end = log.end().offset
    if _is_offset(text):
        beyond, reached = int(text) > end, f"offset {end}"
    elif _LSN.fullmatch(text):
        commit = position.commit if position else 0
        beyond, reached = parse_lsn(text) > commit, f"LSN {format_lsn(commit)}"
    else:
        beyond, reached = moment_of(text) > committed_at, f"commits of {time_text(committed_at)}"
    if beyond:
        raise UserError(
            f"{text} lies beyond what is captured: the log of {log.source} has come to {reached}.",
            "Name an earlier place, or `end`.",
        )


def _stop_after(log: SQLiteLog, offset: Offset) -> Offset:
    ((stop,),) = log.raw_rows('SELECT min("offset") FROM stops WHERE "offset" > ?', (offset,))
    return int(stop)


def _stop_at(log: SQLiteLog, commit: tuple[int, int]) -> Offset:
    """Return the first end of a group, of those that retention has deleted, that has come to a commit."""
    ((stop,),) = log.raw_rows('SELECT min("offset") FROM stops WHERE (epoch, "commit") >= (?, ?)', commit)
    return int(stop)
