"""Proof that a log holds what was written: the chain, walked from end to end, and anchors outside of it.

A chain shows what was altered, removed, swapped or repeated in its middle. That its tail was cut off, or
that all of it was computed anew, shows only by comparison with a head that was noted elsewhere: an anchor.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from headrace.change import STREAMED, Mark, Offset, Position
from headrace.errors import LogDamaged, LogTrimmed, UserError
from headrace.log.database import RESTORE
from headrace.log.entries import COLUMNS, HIGH, NOTHING, High, Row, row_of
from headrace.log.segments import Place, segment_path
from headrace.log.sqlite import SQLiteLog

_PAGE = 200
_ATTEMPTS = 100  # each ends with what one step of retention deletes
_YEAR_10000 = 253_402_300_800_000_000  # microseconds: what follows is no time that can be told


@dataclass(frozen=True, slots=True)
class Verified:
    """What a verification has walked through: entries behind `begin` through `end`, `bytes` of payload."""

    begin: Mark
    end: Mark
    entries: int
    rows: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Anchor:
    """The head of a log at some time, to be kept elsewhere.

    `position` is `epoch/commit/ordinal` of the stream there, `committed_at` its commit time and
    `anchored_at` the time of the note, both microseconds since 1970 UTC; `signature` is an HMAC-SHA256
    (hex) over all else, or ''.
    """

    log_id: str
    source: str
    offset: Offset
    hash: str
    position: str
    committed_at: int
    anchored_at: int
    signature: str = ""

    def to_json(self) -> str:
        """Render as one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, what: str = "This") -> Anchor:
        """Read back what `to_json` wrote. Raises UserError for anything else, which it calls `what`."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError):
            fault = "it is not JSON"
        else:
            fault = _fault(raw)
        if fault:
            raise UserError(
                f"{what} is no anchor: {fault}.",
                "An anchor is a line that `headrace log anchor` printed, or a running pipeline wrote.",
            )
        return cls(**raw)

    def signed(self, key: str) -> Anchor:
        """Return the anchor with its signature under `key`."""
        return Anchor(**{**asdict(self), "signature": self._signature(key)})

    def is_signed_with(self, key: str) -> bool:
        """Whether the signature is that of `key`."""
        return hmac.compare_digest(self.signature, self._signature(key))

    def _signature(self, key: str) -> str:
        told = {name: value for name, value in asdict(self).items() if name != "signature"}
        body = json.dumps(told, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        return hmac.new(key.encode(), body.encode(), hashlib.sha256).hexdigest()


def _text(pattern: str) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and value.isprintable() and bool(re.fullmatch(pattern, value))


def _integer(least: int, most: int) -> Callable[[object], bool]:
    return lambda value: type(value) is int and least <= value <= most


_HEX = "[0-9a-f]{64}"
_FIELDS = {
    "log_id": (_text(".+"), "text"),
    "source": (_text(".+"), "text"),
    "offset": (_integer(0, 2**63 - 1), "an integer, 0 or more"),
    "hash": (_text(_HEX), "64 hex digits"),
    "position": (_text("[0-9]+/[0-9]+/[0-9]+"), "epoch/commit/ordinal"),
    "committed_at": (_integer(-(2**63), 2**63 - 1), "microseconds since 1970"),
    "anchored_at": (_integer(0, _YEAR_10000 - 1), "microseconds since 1970"),
    "signature": (_text(f"({_HEX})?"), "64 hex digits, or empty"),
}
"""What each field of an anchor must be, in words too."""


def _fault(raw: object) -> str:
    """Say why a value of JSON is no anchor, without quoting it; '' if it is one."""
    if not isinstance(raw, dict):
        return "it is not a JSON object"
    if raw.keys() - _FIELDS.keys():
        return "it has a field that no anchor has"
    for name, (fits, shape) in _FIELDS.items():
        if name in raw and not fits(raw[name]):
            return f"{name} must be {shape}"
        if name not in raw and name != "signature":
            return f"it lacks {name}"
    return ""


class Chained(Protocol):
    """A log whose head can be noted: all that an anchor needs of it."""

    id: str
    source: str

    def begin(self) -> Mark:
        """See `Log.begin`."""
        ...

    def end(self) -> Mark:
        """See `Log.end`."""
        ...

    def mark(self, offset: Offset) -> Mark | None:
        """See `Log.mark`."""
        ...

    def place(self, offset: Offset) -> tuple[Position, int]:
        """See `Log.place`."""
        ...


def anchor(log: Chained, key: str = "") -> Anchor:
    """Return the log's head as an anchor, signed if a key is given."""
    end = log.end()
    place, at = log.place(end.offset)
    position = "/".join(map(str, place))
    made = Anchor(log.id, log.source, end.offset, end.hash, position, at, time.time_ns() // 1000)
    return made.signed(key) if key else made


def append_anchor(path: Path, made: Anchor) -> None:
    """Append an anchor to a file of anchors, a line each, and make it durable.

    Raises OSError, and then takes back what it wrote: a line that is not whole would spoil the file.
    """
    line = made.to_json().encode() + b"\n"
    with path.open("ab", buffering=0) as file:
        with suppress(OSError):  # some network disks have no locks
            fcntl.flock(file, fcntl.LOCK_EX)  # other sources may have the same file
        end = file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[file.write(line) :]
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                file.truncate(end)
            raise


def read_anchors(text: str, name: str) -> list[Anchor]:
    """Return the anchors of the text of file `name`, one a line.

    Raises UserError where there is none, or something else.
    """
    anchors = [
        Anchor.from_json(line, f"Line {number} of {name}")
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip()
    ]
    if not anchors:
        raise UserError(f"There is no anchor in {name}.", "Make one with `headrace log anchor`.")
    return anchors


def check_anchor(log: Chained, noted: Anchor, key: str = "") -> bool:
    """Compare a log with an anchor; False if it cannot be compared, since the log no longer reaches back
    to it.

    Raises LogDamaged when the log is another than the one that was anchored, has been cut off before it
    or computed anew, lacks its entry, or when the signature is not that of `key`.
    """
    if key and not noted.is_signed_with(key):
        raise LogDamaged(
            f"The anchor of offset {noted.offset} is not signed with this key.", "Use the key that signed it."
        )
    if noted.log_id != log.id:
        raise LogDamaged(
            f"The anchor is of log {noted.log_id}, this one is {log.id}: it was made anew, or is of another "
            "project.",
            RESTORE,
        )
    end, when = log.end(), datetime.fromtimestamp(noted.anchored_at / 1e6, UTC).isoformat(" ", "seconds")
    if noted.offset > end.offset:
        raise LogDamaged(
            f"The log of {log.source}: at {when} it held offset {noted.offset}, now it ends at {end.offset}: "
            "its tail was cut off.",
            RESTORE,
        )
    mark = log.mark(noted.offset)
    if mark is None:
        if noted.offset < log.begin().offset:  # asked after the mark, which may have been trimmed
            return False
        raise LogDamaged(f"The log of {log.source}: offset {noted.offset} is missing.", RESTORE)
    if mark.hash != noted.hash:
        raise LogDamaged(
            f"The log of {log.source}: offset {noted.offset} has another hash than at {when}: the chain was "
            "computed anew.",
            RESTORE,
        )
    return True


def verify(log: SQLiteLog) -> Verified:
    """Walk the whole log as it stands now, beside a writer if there is one.

    Raises LogDamaged with the first bad offset: a page's checksum, a hash, a missing, swapped or repeated
    entry, positions that go back from one group to the next or are
    not those of the stream, a last group without an end, a database
    whose indexes do not fit, bytes in a segment that no entry accounts for. Raises LogTrimmed where
    retention overtakes it again and again.
    """
    for _ in range(_ATTEMPTS):
        walk = _Walk(log, log.begin())
        try:
            return _verified(log, walk)
        except LogDamaged:
            if walk.expected > log.begin().offset:
                raise  # otherwise what it looked at was deleted meanwhile, rightly
        except LogTrimmed:
            pass
    raise LogTrimmed(
        f"Retention deletes the log of {log.source} faster than it is read: it was begun {_ATTEMPTS} times.",
        "Try again later.",
    )


def _verified(log: SQLiteLog, walk: _Walk) -> Verified:
    begin, end = walk.begin, log.end()
    for row, key_filter, high in _rows(log, begin.offset, end.offset):
        walk.take(row, key_filter, high)
    if walk.expected <= end.offset:
        raise _damaged(log, f"offset {walk.expected} is missing")
    if not walk.ended:
        raise _damaged(log, f"the group at offset {end.offset} has no end")
    _check_kept(log, begin)
    log.check_structure()
    _check_segments(log)
    return Verified(begin, end, end.offset - begin.offset, walk.rows, walk.bytes)


class _Walk:
    """One step per entry, in order."""

    def __init__(self, log: SQLiteLog, begin: Mark) -> None:
        self._log, self.begin = log, begin
        self._previous = bytes.fromhex(begin.hash)
        stop = log.raw_rows(
            'SELECT epoch, "commit", ordinal, at, committed_at FROM stops WHERE "offset" = ?', (begin.offset,)
        )
        self._high = High(*stop[0]) if stop else NOTHING
        self._last = self._high.position
        # What retention has deleted may have begun the first segment.
        self._place = None if begin.offset else Place(0, 0)
        self.expected = begin.offset + 1
        self.ended = True
        self.rows = self.bytes = 0

    def take(self, row: Row, key_filter: bytes, high: tuple[int, ...]) -> None:
        """Compare one entry with what must stand there."""
        if row.offset != self.expected:
            raise _damaged(self._log, f"offset {self.expected} is missing")
        if row.previous != self._previous:
            raise _damaged(self._log, f"the hash of offset {row.offset} does not hold")
        body = self._log.payload(row, key_filter)
        if len(body) != row.size:
            raise _damaged(self._log, f"offset {row.offset} has another size than its payload")
        self._check_place(row)
        entry = row.logged(b"").entry
        if entry.kind in STREAMED:
            if self.ended and entry.last < self._last:
                raise _damaged(self._log, f"offset {row.offset} goes back in the source")
            self._last = max(self._last, entry.last)
        self._high = self._high.through(row.header)
        if self._high != high:
            raise _damaged(
                self._log, f"offset {row.offset} has another place in the stream than its entries say"
            )
        self._previous, self.ended = row.hash, bool(row.header.ends_group)
        self.expected += 1
        self.rows += entry.rows
        self.bytes += row.size

    def _check_place(self, row: Row) -> None:
        """Payloads stand one behind the other: no byte of a segment is nobody's."""
        if row.place is None:
            return
        following, self._place = self._place, Place(row.place.segment, row.place.start + row.size)
        if following is not None and following.segment != row.place.segment:
            following = Place(row.offset, 0)
        if following not in (None, row.place):
            raise _damaged(self._log, f"offset {row.offset} stands elsewhere than behind the one before")


def _rows(log: SQLiteLog, after: Offset, through: Offset) -> Iterator[tuple[Row, bytes, tuple[int, ...]]]:
    while True:
        page = log.raw_rows(
            f"SELECT {COLUMNS}, filter, {HIGH} "
            'FROM entries LEFT JOIN filters USING ("offset") '
            f'WHERE "offset" > ? AND "offset" <= ? ORDER BY "offset" LIMIT {_PAGE}',
            (after, through),
        )
        for found in page:
            row = row_of(found[:-6])
            after = row.offset
            yield row, found[-6] or b"", found[-5:]
        if len(page) < _PAGE:
            return


def _check_kept(log: SQLiteLog, begin: Mark) -> None:
    """Shapes and markers that retention has kept: each by its own hash, which says what was before it."""
    for row, key_filter, _ in _rows(log, 0, begin.offset):
        log.payload(row, key_filter)


def _check_segments(log: SQLiteLog) -> None:
    """Each segment but the newest ends with its last payload; that one may hold what is being written."""
    ends = log.raw_rows(
        'SELECT segment, max(start + bytes), max("offset") FROM entries WHERE segment IS NOT NULL '
        "GROUP BY 1 ORDER BY 1"
    )
    for segment, end, last in ends[:-1]:
        path = segment_path(log.segments, segment)
        size = path.stat().st_size if path.exists() else 0
        if size != end and last > log.begin().offset:  # otherwise it was removed meanwhile
            raise _damaged(log, f"{path.name} has {size} bytes and should have {end}")


def _damaged(log: SQLiteLog, what: str) -> LogDamaged:
    return LogDamaged(f"{log.path}: {what}.", RESTORE)
