"""Places in a source up to which raw is read: an offset of the log, an LSN, or a time of commit.

The log's headers tell in which group a place lies; where retention has deleted them, its stops do, and the
staged rows themselves, none of which is ever deleted.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import pyarrow.compute as pc

from headrace.change import Offset, Position, shape_in
from headrace.errors import LogTrimmed, UserError
from headrace.log.places import Cut, cut_at_commit, cut_at_time, group_of
from headrace.log.sqlite import SQLiteLog
from headrace.sources.postgres.lsn import parse_lsn
from headrace.staging.delta import DeltaStaging
from headrace.staging.rows import HISTORY, INTERNAL

AsOf = str | int | datetime
"""An offset (an integer or its digits), an LSN (`0/16B3748`) or a time of commit (ISO, in UTC unless it says
otherwise)."""

LSN = re.compile(r"[0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_WRITE = "Write an offset (123), an LSN (0/16B3748), or a time (2026-11-23T15:09:17, UTC)."


class Place(NamedTuple):
    """Up to where a source's changes count: entries through the offset `through`, and of these only
    transactions before the commit `before` (epoch and LSN), all of them if it is None.

    Shapes count through the offset `shapes`.
    """

    through: Offset
    before: tuple[int, int] | None
    shapes: Offset

    def holds(self, position: Position) -> bool:
        """Whether a commit counts, of those whose entries do."""
        return self.before is None or position[:2] < self.before


def place_of(log: SQLiteLog, staging: DeltaStaging, as_of: AsOf | None) -> Place:
    """Return the place that is meant, by default the end of what is staged.

    Whole transactions count: an offset means the end of the group that holds it, an LSN or a time what was
    committed there or earlier. Positions of several epochs cannot be compared: an LSN is one of the newest.
    Raises UserError for what is no place, or is not staged yet.
    """
    staged = staging.through()
    if as_of is None:
        return Place(staged, None, staged)
    text = as_of if isinstance(as_of, str) else ""
    if text.isdecimal() and text.isascii():
        as_of = int(text)
    if isinstance(as_of, int):
        through = _group(log, as_of, staged)
        return Place(through, None, through)
    if LSN.fullmatch(text):
        last = log.last_commit()
        before = (last[0].epoch if last else 0, parse_lsn(text) + 1)
        try:
            cut = cut_at_commit(log, before[1])
        except LogTrimmed:
            cut = Cut(_stops(log, '(epoch, "commit") >= (?, ?)', before)[0], before)
        return _placed(log, staging, cut._replace(commit=before))
    moment = moment_of(as_of) + 1
    try:
        cut = cut_at_time(log, moment)
    except LogTrimmed:
        span = _stops(log, "at >= ?", (moment,))
        cut = Cut(span[0], _first_commit(staging, *span, moment))
    if cut.commit is None:
        position, _ = log.place(cut.offset)
        cut = cut._replace(commit=(position.epoch, position.commit + 1))
    return _placed(log, staging, cut)


def moment_of(as_of: str | datetime) -> int:
    """Return a time, or its ISO text, as microseconds since 1970; in UTC unless it says otherwise. Raises
    UserError."""
    try:
        moment = as_of if isinstance(as_of, datetime) else datetime.fromisoformat(as_of)
    except ValueError:
        raise UserError(f'"{as_of}" is no place in the log.', _WRITE) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - _EPOCH) // timedelta(microseconds=1)


def _group(log: SQLiteLog, offset: Offset, staged: Offset) -> Offset:
    """Return the end of the group that holds an offset."""
    if offset > staged:
        raise UserError(f"Source {log.source} is staged through offset {staged}, not {offset}.", _WRITE)
    begin = log.begin().offset
    if offset > begin:
        return group_of(log, offset).through
    if (stop := log.group_end(offset)) != offset:
        raise UserError(
            f"Retention has deleted from the log of {log.source} where the transactions at offset {offset} "
            "end.",
            f"Take offset {stop}, one behind {begin - 1}, or an LSN or time, which staging tells of itself.",
        )
    return offset


def _placed(log: SQLiteLog, staging: DeltaStaging, cut: Cut) -> Place:
    """Return the place of a cut, whose commit says what counts of the group behind its offset."""
    staged, end = staging.through(), log.end().offset
    through = cut.offset
    if cut.offset < end:
        stop = log.raw_rows('SELECT min("offset") FROM stops WHERE "offset" > ?', (cut.offset,))[0][0]
        through = stop if stop is not None else group_of(log, cut.offset + 1).through
    if staged < through and cut.offset < log.group_end(end):
        raise UserError(
            f"Source {log.source} is staged through offset {staged}, and that place is at {through}.",
            "Wait until it is staged: `headrace status` says how far it is.",
        )
    through = min(through, staged)
    return Place(through, cut.commit, _shapes_through(staging, cut, through))


def _shapes_through(staging: DeltaStaging, cut: Cut, through: Offset) -> Offset:
    """Return through which offset shapes count: before the first one that came with a later commit."""
    if HISTORY in staging.tables() and through > cut.offset and cut.commit is not None:
        for row in staging.read(HISTORY, cut.offset, through).to_pylist():
            if shape_in(row["kind"], row["content"]) and (row["_epoch"], row["_commit"]) >= cut.commit:
                return int(row["_offset"]) - 1
    return through


def _stops(log: SQLiteLog, condition: str, values: tuple[int, ...]) -> tuple[Offset, Offset]:
    """Return the span `(after, through]` of the first stop that fulfils a condition."""
    ((stop,),) = log.raw_rows(f'SELECT min("offset") FROM stops WHERE {condition}', values)
    return (log.group_end(int(stop) - 1), int(stop)) if stop is not None else (log.begin().offset,) * 2


def _first_commit(
    staging: DeltaStaging, after: Offset, through: Offset, moment: int
) -> tuple[int, int] | None:
    """Return the first commit (epoch, LSN) in a span made at `moment` or later, as staging has it."""
    columns = ("_op", "_epoch", "_commit", "_committed_at", "_offset")
    found: set[tuple[int, int]] = set()
    for table, raw in staging.tables().items():
        for part in raw.chunks(after, through, columns) if table not in INTERNAL else ():
            late = pc.and_(pc.not_equal(part["_op"], "r"), pc.greater_equal(part["_committed_at"], moment))
            pairs = part.filter(late).select(["_epoch", "_commit"]).group_by(["_epoch", "_commit"])
            found.update((row["_epoch"], row["_commit"]) for row in pairs.aggregate([]).to_pylist())
    return min(found, default=None)
