"""The log outside of itself: exported to Parquet files, one for each day, and imported from them.

A log that is made of an export is the same log: the same offsets, times, hashes and id.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from headrace.change import Mark, Offset
from headrace.errors import LogDamaged, LogError, LogFull, LogTrimmed, UserError
from headrace.log.archive_file import BEFORE_ALL, Part, PartWriter, Reached, Record, file_name, read_part
from headrace.log.database import FULL, Database, sync_folder
from headrace.log.entries import COLUMNS, FORMAT, HIGH, INLINE, INSERT, INSERT_STOP, SCRIPT, High, row_of
from headrace.log.proof import verify
from headrace.log.segments import SegmentWriter
from headrace.log.sqlite import SEGMENT_BYTES, SQLiteLog

_PAGE = 200
_ATTEMPTS = 10
_COMMIT_BYTES = 32 << 20  # of payload that one transaction imports

_SELECT = (
    f"SELECT {COLUMNS}, filter, {HIGH} "
    'FROM entries LEFT JOIN filters USING ("offset") WHERE "offset" > ? AND "offset" <= ?'
)
_KEPT = " AND kind IN ('schema', 'marker', 'decision') AND table_name IS NOT NULL"
_STOP = (
    'SELECT "offset", lower(hex(hash)), epoch, "commit", ordinal, at, committed_at, rows, bytes FROM stops'
)


@dataclass(frozen=True, slots=True)
class Archived:
    """What was copied: files, entries with their rows and bytes of payload, and the head that was reached.

    `files` were written (of an import: read), `found` were there already.
    """

    files: int
    entries: int
    rows: int
    bytes: int
    head: Mark
    found: int = 0


def export(log: SQLiteLog, folder: Path, after: Offset | None = None) -> Archived:
    """Write the log to a folder of Parquet files, a file for each UTC day; goes on where files end.

    A new archive begins behind `after` if given, with a whole group. A group is of the day of its append;
    where the clock went back over midnight, of the day before it. Raises UserError where the files are of
    another log, LogTrimmed where the log no longer holds what comes next, LogDamaged.
    """
    with writing_to(folder), _alone(folder):
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return _export(log, folder, after)
            except LogTrimmed:  # while it was read: what is in files already stays
                if attempt == _ATTEMPTS:
                    raise
    raise AssertionError


def _export(log: SQLiteLog, folder: Path, after: Offset | None) -> Archived:
    end, notes = _end_and_notes(log)
    parts = _matching(log, folder, end)
    _check_beginning(folder, parts, after)
    begun = parts[-1].reached if parts else _beginning(log, after)
    day = parts[-1].day if parts else ""
    records = _from_log(log, begun.offset, end.offset)
    coming = next(records, None)
    if coming is None:
        return Archived(0, 0, 0, 0, Mark(log.id, begun.offset, begun.hash), len(parts))
    records = chain((coming,), records)
    if parts and _day(coming, day) == day:
        last = parts.pop()
        begun = last.before
        held = log.begin().offset <= begun.offset
        records = (
            _from_log(log, begun.offset, end.offset)
            if held
            else chain((item for item in last.records() if not item.kept), records)
        )
    writing = _Days(log, folder, end, notes)
    head = writing.write(records, begun, day)
    return Archived(writing.files, writing.entries, writing.rows, writing.bytes, head, len(parts))


class _Days:
    """Writes entries, a file for each day."""

    def __init__(self, log: SQLiteLog, folder: Path, end: Mark, notes: dict[str, str]) -> None:
        self._log, self._folder, self._end, self._notes = log, folder, end, notes
        self.files = self.entries = self.rows = self.bytes = 0

    def write(self, records: Iterable[Record], begun: Reached, day: str) -> Mark:
        """Write entries that follow `begun`; none is of a day before `day`. Returns the mark of the last."""
        file: PartWriter | None = None
        try:
            reached, ended = begun, True
            for record in records:
                own = _day(record, day) if ended else day
                if file is None or own != day:
                    if file is not None:
                        self._finish(file, reached, {})
                    file, day = self._file(own, reached), own
                reached = self._follow(reached, record)
                file.add(record)
                ended = bool(record.header.ends_group)
            if file is not None:
                self._finish(file, reached, self._notes if reached.offset == self._end.offset else {})
        except BaseException:
            if file is not None:
                file.abandon()
            raise
        return Mark(self._log.id, reached.offset, reached.hash)

    def _follow(self, reached: Reached, record: Record) -> Reached:
        self.entries += 1
        self.rows += record.header.rows
        self.bytes += len(record.payload)
        try:
            return reached.then(record)
        except ValueError as error:
            if self._log.begin().offset > reached.offset:
                raise _trimmed(self._log, reached.offset) from None
            raise LogDamaged(
                f"{self._log.path}: {error}.", "See `headrace log verify`, and restore a backup."
            ) from None

    def _file(self, day: str, before: Reached) -> PartWriter:
        path = self._folder / file_name(self._log.source, day)
        stops = _stops(self._log, before)
        part = Part(path, self._log.id, self._log.source, day, before, before, 0, stops, {})
        file = PartWriter(part)
        for record in _from_log(self._log, 0, before.offset, kept=True):
            file.add(record)
        return file

    def _finish(self, file: PartWriter, reached: Reached, notes: dict[str, str]) -> None:
        file.finish(reached, notes)
        self.files += 1


def _matching(log: SQLiteLog, folder: Path, end: Mark) -> list[Part]:
    """Return the files of a folder that are this log's, up to the first hole.

    Raises UserError where they cannot be gone on with, LogTrimmed where entries are missing by now.
    """
    parts: list[Part] = []
    for path in files_in(folder, log.source):
        part = read_part(path)
        if part.log_id != log.id:
            raise UserError(f"{path} is of another log ({part.log_id}).", "Export to another folder.")
        if parts and part.before != parts[-1].reached:
            break
        parts.append(part)
    if parts:
        reached = parts[-1].reached
        mark = log.mark(reached.offset)
        if reached.offset > end.offset or (mark is not None and mark.hash != reached.hash):
            raise UserError(
                f"{parts[-1].path} goes to offset {reached.offset}, but the log here ends at {end.offset} or "
                "differs there: it is an older copy.",
                "Restore the newest log, or export to another folder.",
            )
        if log.begin().offset > reached.offset:
            raise LogTrimmed(
                f"{parts[-1].path} ends at offset {reached.offset}, and the log of {log.source} begins "
                f"behind {log.begin().offset} by now: entries between have been deleted by retention.",
                "Export to another folder, and more often, or raise `keep` in [log].",
            )
    return parts


def files_in(folder: Path, source: str = "") -> list[Path]:
    """Return the files of an archive, of one source if given, by day."""
    days = f"{source or '*'}-[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9].parquet"
    return sorted(folder.glob(days))


def _check_beginning(folder: Path, parts: Sequence[Part], after: Offset | None) -> None:
    if after is None or not parts:
        return
    begin, end = parts[0].before.offset, parts[-1].reached.offset
    if not begin <= after <= end:
        raise UserError(
            f"{folder} holds offsets {begin + 1} to {end}, and is to begin behind {after}.",
            "Leave --after out to go on from there, or export to another folder.",
        )


def _beginning(log: SQLiteLog, after: Offset | None) -> Reached:
    """Return where a new archive begins: behind the last end of a group up to `after`."""
    begin = log.begin().offset
    if after is not None and after < begin:
        raise UserError(f"The log of {log.source} begins behind offset {begin}.", "Leave --after out.")
    at = begin if after is None else log.group_end(after)
    if at == 0:
        return BEFORE_ALL
    found = log.raw_rows(
        f'SELECT lower(hex(hash)), {HIGH} FROM entries WHERE "offset" = ? UNION ALL '
        'SELECT lower(hex(hash)), epoch, "commit", ordinal, at, committed_at FROM stops WHERE "offset" = ?',
        (at, at),
    )
    if not found:
        raise _trimmed(log, at)
    # An entry that retention has kept stands beside the stop of its offset, which comes last.
    return Reached(at, found[-1][0], High(*found[-1][1:]))


def _stops(log: SQLiteLog, before: Reached) -> list[list[Any]]:
    """Return the stops through where a file begins, which is one too."""
    rows = log.raw_rows(f'{_STOP} WHERE "offset" <= ? ORDER BY "offset"', (before.offset,))
    stops = [list(row) for row in rows]
    if before.offset and (not stops or stops[-1][0] != before.offset):
        stops.append([before.offset, before.hash, *before.high, 0, 0])
    return stops


def _from_log(log: SQLiteLog, after: Offset, through: Offset, *, kept: bool = False) -> Iterator[Record]:
    """Yield the log's entries of `(after, through]`, each compared with its hash.

    `kept`: only those that retention keeps. What has been deleted is left out.
    """
    while True:
        page = log.raw_rows(
            f'{_SELECT}{_KEPT if kept else ""} ORDER BY "offset" LIMIT {_PAGE}', (after, through)
        )
        for found in page:
            row, key_filter, high = row_of(found[:-6]), found[-6] or b"", High(*found[-5:])
            after = row.offset
            body = log.payload(row, key_filter)
            yield Record(row.header, high, row.hash, row.previous, key_filter, body, kept)
        if len(page) < _PAGE:
            return


def _end_and_notes(log: SQLiteLog) -> tuple[Mark, dict[str, str]]:
    """Return the end and the facts as of one moment: in one statement."""
    rows = log.raw_rows('SELECT (SELECT max("offset") FROM entries), key, value FROM facts')
    notes = {str(key): str(value) for _, key, value in rows if key != "log.id"}
    last = max(int(rows[0][0] or 0), log.begin().offset)
    return log.mark(last) or log.end(), notes


def _trimmed(log: SQLiteLog, after: Offset) -> LogTrimmed:
    return LogTrimmed(
        f"Retention has deleted offset {after + 1} of the log of {log.source} while it was exported.",
        "Export to another folder, and more often, or raise `keep` in [log].",
    )


def _day(record: Record, day: str) -> str:
    """Return the UTC day of an append, but none before `day`."""
    return max(day, datetime.fromtimestamp(record.header.appended_at // 1_000_000, UTC).strftime("%Y-%m-%d"))


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Make a folder if it is not there, and say of what goes wrong on its disk what to do about it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield
    except (OSError, LogFull) as error:
        if isinstance(error, LogFull) or error.errno in FULL:
            words = f"There is no room for more on the disk of {folder}."
            raise LogFull(words, "Make room, and run the command again.") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR):
            raise UserError(
                f"{folder} cannot be written: {error.strerror}.", "Mend its rights, or name another."
            ) from error
        raise


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep every other export or import from a folder."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"Another command writes to {folder}.", "Wait for its end.") from None
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------- the way back


def restore(files: Iterable[Path], into: Path) -> Archived:
    """Make a log, at `into`, of the files of an export, in whatever order they are given.

    Raises UserError where there is a log, or files of several; LogDamaged, with file and offset, where
    anything is not what was written, or missing. Then nothing is left behind; where it ends between the
    database and its segments, for whatever reason, the next one finishes it.
    """
    parts = _in_order(files)
    name = f"{parts[0].source}.db"
    if into.name != name:
        raise UserError(
            f"The log of source {parts[0].source} cannot be called {into.name}: its hashes cover that name.",
            f"Import it into {into.with_name(name)}.",
        )
    if not into.parent.is_dir():
        raise UserError(f"There is no folder {into.parent}.", "Make it first.")
    making = into.parent / f".{into.stem}.importing"
    with writing_to(making), _alone(making):
        try:
            return _finished(making, into, parts) or _begun(making, into, parts)
        finally:
            if not _waits(making, into):
                shutil.rmtree(making)


def _begun(making: Path, into: Path, parts: Sequence[Part]) -> Archived:
    """Make a log in a folder of its own, and put it in place: the database first, so that segments without
    one are never an import's, and what waits for its segments is told from a log."""
    segments = into.with_suffix(".segments")
    for path in (into, segments):
        if path.exists():
            raise _taken(f"{path} is there already.")
    for left in making.iterdir():  # of an import that was killed
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    made = _made(making / into.name, parts)
    (making / into.name).rename(into)
    sync_folder(into.parent)
    (making / segments.name).rename(segments)  # from here on it is a log
    sync_folder(into.parent)
    return made


def _finished(making: Path, into: Path, parts: Sequence[Part]) -> Archived | None:
    """Finish an import that ended with its database in place and its segments not; None if there is no
    such one. Nothing is removed that is not in `making`."""
    if not _waits(making, into):
        return None
    segments, waiting = into.with_suffix(".segments"), making / f"{into.stem}.segments"
    waiting.rename(segments)
    try:
        made = _proven(into, parts)
    except BaseException as error:
        is_another = isinstance(error, LogError) and not isinstance(error, LogFull)
        segments.rename(making / "of another database" if is_another else waiting)
        if is_another:
            raise _taken(f"{into} is there already.") from None
        raise
    sync_folder(into.parent)
    last = parts[-1].reached
    if made.head != (parts[0].log_id, last.offset, last.hash):
        words = f"{into} is there already: an import that was killed is finished now"
        raise _taken(f"{words}: it ends at offset {made.head.offset}.")
    return made


def _waits(making: Path, into: Path) -> bool:
    """Whether a database is in place and its segments, in `making`, are not."""
    name = into.with_suffix(".segments").name
    is_here = into.exists() and not (making / into.name).exists()
    return is_here and (making / name).exists() and not into.with_name(name).exists()


def _taken(words: str) -> UserError:
    return UserError(words, "Name another file with --into, or move it away.")


def _in_order(files: Iterable[Path]) -> list[Part]:
    parts = sorted((read_part(path) for path in files), key=lambda part: part.first)
    if not parts:
        raise UserError("There is no file of an export.", "Name SOURCE-DAY.parquet, or a folder of them.")
    if len(sources := {part.source for part in parts}) > 1:
        raise UserError(
            f"The files are of several sources: {', '.join(sorted(sources))}.", "Choose: --source."
        )
    for one, two in pairwise(parts):
        if one.log_id != two.log_id:
            raise UserError(f"{one.path} and {two.path} are of two logs.", "Import those of one.")
        if two.first != one.reached.offset + 1:
            raise two.damaged(
                f"it begins at offset {two.first}, and the one before, {one.path.name}, ends at "
                f"{one.reached.offset}: a file is missing or doubled"
            )
        if two.before != one.reached:
            raise two.damaged(f"offset {two.first} does not follow the end of {one.path.name}")
    return parts


def _made(path: Path, parts: Sequence[Part]) -> Archived:
    """Make the log of the files, and verify it."""
    with (
        closing(Database(path, script=SCRIPT, version=FORMAT)) as database,
        closing(SegmentWriter(path.with_suffix(".segments"), SEGMENT_BYTES, None)) as segments,
    ):
        _begin(database, parts)
        records = (r for i, part in enumerate(parts) for r in part.records() if i == 0 or not r.kept)
        while _write_some(database, segments, records):
            pass
    last = parts[-1].reached
    try:
        made = _proven(path, parts)
    except LogDamaged as error:
        raise parts[-1].damaged(f"with those before it it makes no whole log: {error}") from error
    if made.head != (parts[0].log_id, last.offset, last.hash):
        raise parts[-1].damaged(f"offset {last.offset} is not the end of what was made of it")
    return made


def _proven(path: Path, parts: Sequence[Part]) -> Archived:
    """Verify the log that was made of files. Raises LogDamaged."""
    try:
        with closing(SQLiteLog(path, read_only=True)) as log:
            proven = verify(log)
    finally:
        settle(path)
    return Archived(len(parts), proven.entries, proven.rows, proven.bytes, proven.end)


def _begin(database: Database, parts: Sequence[Part]) -> None:
    facts = {**parts[-1].notes, "log.id": parts[0].log_id}
    with database.transaction():
        for fact in facts.items():
            database.rows("INSERT INTO facts VALUES (?, ?)", fact)
        for offset, digest, *rest in parts[0].stops:
            database.rows(INSERT_STOP, (offset, bytes.fromhex(digest), *rest))


def _write_some(database: Database, segments: SegmentWriter, records: Iterator[Record]) -> bool:
    """Write entries in one transaction; False when there are none any more."""
    size = through = 0
    more = False
    with database.transaction():
        for record in records:
            _insert(database, segments, record)
            size += len(record.payload)
            through = record.offset
            if more := size >= _COMMIT_BYTES:
                break
        segments.sync()
    segments.commit(through)
    return more


def _insert(database: Database, segments: SegmentWriter, record: Record) -> None:
    inline = record.header.kind in INLINE
    place = (None, None) if inline else segments.write(record.offset, record.payload)
    facts = (*record.header, *record.high, record.hash, record.previous, len(record.payload))
    database.rows(INSERT, (*facts, *place, record.payload if inline else None))
    if record.filter:
        database.rows("INSERT INTO filters VALUES (?, ?)", (record.offset, record.filter))


def settle(path: Path) -> None:
    """Leave a log's database as one file, without those that SQLite has beside it while it is open."""
    Database(path, script=SCRIPT, version=FORMAT).close()
