"""What the suite of a log needs: how to make one, and entries to append to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

from headrace import failpoints
from headrace.change import Column, CopyMark, Entry, LoggedEntry, Offset, Position, TableId, TableSchema
from headrace.protocols import LogIndex

TABLE, OTHER = TableId("public", "t"), TableId("sales", 'o\'ther "é"')
SHAPE = TableSchema(TABLE, (Column("id", "bigint", not_null=True),), ("id",))


class TestedLog(LogIndex, Protocol):
    """A log with what the tests ask it for besides."""

    def entries(
        self, after: Offset, through: Offset, *, table: TableId | None = None, kinds: Sequence[str] = ()
    ) -> Iterator[LoggedEntry]:
        """Yield the entries of `(after, through]` in order, of one table and of some kinds if given.

        Raises LogTrimmed where one of them has been deleted, also after the first ones were taken.
        """
        ...

    def entry(self, offset: Offset) -> LoggedEntry | None:
        """Return one entry, or None if the log has no such entry."""
        ...

    def size(self) -> int:
        """Return the bytes that the log takes."""
        ...


class Logs(Protocol):
    """What the suite needs to know of a kind of log."""

    steps: Sequence[tuple[str, bool]]
    """The failpoints that an append of rows passes, and whether its group is in the log behind each."""
    trim_steps: Sequence[str]
    """The failpoints that a trim passes."""

    def make(self) -> TestedLog:
        """Return a new, empty log, closed by its maker; its segments, if it has such, are small."""
        ...

    def reopen(self, log: TestedLog) -> TestedLog:
        """Return what a process that is started now sees of a log; the former object is not used again."""
        ...

    def verify(self, log: TestedLog) -> None:
        """Raise LogDamaged unless the log holds what was written."""
        ...

    def cut_off(self, log: TestedLog, through: Offset) -> TestedLog:
        """Remove the tail behind an end of a group, as if it had never been."""
        ...

    def forge(self, log: TestedLog) -> TestedLog:
        """Return an empty log that passes itself off as another: it has its id."""
        ...


class ProcessLogs(Logs, Protocol):
    """A kind of log that other processes can open."""

    def code(self, log: TestedLog, *, read_only: bool) -> str:
        """Return Python that opens a log in another process as `log`, by several lines if need be."""
        ...


# -- what is appended


def change(commit: int, ordinal: int = 1, payload: bytes = b"payload", **others: Any) -> Entry:
    """Return one entry of rows."""
    at = Position(others.pop("epoch", 0), commit, ordinal)
    made = Entry(
        "rows", TABLE, at, at, 1_000 + commit, 1, 1, payload, (commit, commit), filter=b"\0filter\xff"
    )
    return replace(made, **others)


def group(commit: int, size: int) -> list[Entry]:
    """Return a group of rows."""
    return [change(commit, i, b"%d/%d" % (commit, i)) for i in range(1, size + 1)]


def marker(commit: int, mark: CopyMark, table: TableId = TABLE) -> Entry:
    """Return a copy's marker."""
    at = Position(0, commit, 0)
    return Entry("marker", table, at, at, 0, 0, 1, mark.to_json().encode())


def schema(commit: int, shape: TableSchema) -> Entry:
    """Return the entry of a table's new shape."""
    text = shape.to_json().encode()
    return change(commit, payload=text, kind="schema", table=shape.table, rows=0, filter=b"")


@contextmanager
def armed(text: str) -> Iterator[None]:
    """Arm failpoints in this process."""
    failpoints._armed.update(failpoints._parse(text))
    try:
        yield
    finally:
        failpoints._armed.clear()


def offsets(entries: Iterable[LoggedEntry]) -> list[int]:
    """Return the offsets of entries."""
    return [item.offset for item in entries]


def everything(log: TestedLog) -> list[LoggedEntry]:
    """Return all that the log holds."""
    return list(log.entries(log.begin().offset, log.end().offset))
