"""What staging knows of the copies of its tables, and how they fit between the streamed changes.

A copy's rows stand in staging where the log has them, between streamed changes that may be older or
newer than they are; only their positions tell. So they are never read along with the changes: a model
joins a copy by reading first its rows, then the changes that it does not contain.
"""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from headrace.change import ADDED, Copy, CopyMark, Offset, Position, TableId


class CopyHistory:
    """The markers of all copies, in the log's order."""

    def __init__(self) -> None:
        self._marks: dict[TableId, list[tuple[Offset, Position, CopyMark]]] = {}

    def add(self, offset: Offset, table: TableId, at: Position, mark: CopyMark) -> None:
        """Take over a marker; one that is known already changes nothing."""
        known = self._marks.setdefault(table, [])
        if not known or known[-1][0] < offset:
            known.append((offset, at, mark))

    def newest(self, table: TableId, through: Offset) -> Copy | None:
        """Return the newest copy of a table that is complete as of an offset, none from before the table was
        captured without a gap."""
        since = self.since(table, through)
        return next((copy for copy in reversed(self.complete(table, through)) if copy.begin >= since), None)

    def complete(self, table: TableId, through: Offset) -> list[Copy]:
        """Return all copies of a table that are complete as of an offset, the oldest first."""
        begin: tuple[Offset, CopyMark] | None = None
        found = list[Copy]()
        for offset, at, mark in self._marks.get(table, ()):
            if offset > through:
                break
            if mark.kind == "begin":
                begin = (offset, mark)
            elif mark.kind == "end" and begin is not None:
                floor, ceiling = (Position(at.epoch, commit, 0) for commit in (mark.floor, mark.ceiling))
                shape = begin[1].schema
                key = shape.key if shape else ()
                found.append(Copy(begin[0], offset, begin[1].after, floor, ceiling, key))
        return found

    def since(self, table: TableId, through: Offset) -> Offset:
        """Return where the copy began since which a table is captured without a gap, 0 if it always was."""
        marks = self._marks.get(table, ())
        added = (offset for offset, _, m in marks if m.kind == "begin" and m.reason == ADDED)
        return max((offset for offset in added if offset <= through), default=0)

    def between(self, table: TableId, after: Offset, through: Offset) -> bool:
        """Whether copied rows may stand in `(after, through]`: each chunk ends with its marker, which may
        stand behind the span."""
        for offset, _, mark in self._marks.get(table, ()):
            if offset > after:
                return offset <= through or mark.kind != "begin"
        return False


def streamed(changes: pa.Table) -> pa.Table:
    """Return the changes without copied rows."""
    return changes.filter(pc.not_equal(changes["_op"], "r"))


def copied(changes: pa.Table, copy: Copy) -> pa.Table:
    """Return the rows of one copy."""
    offsets = changes["_offset"]
    inside = pc.and_(pc.greater(offsets, copy.begin), pc.less(offsets, copy.end))
    return changes.filter(pc.and_(pc.equal(changes["_op"], "r"), inside))


def beyond(changes: pa.Table, floor: Position) -> pa.Table:
    """Return the streamed changes that a copy with this floor does not contain for certain.

    A change between the first and the last snapshot of a copy is among them; where the copy has the
    row's key, the row's own position decides: see `headrace.joining`.
    """
    epochs, commits = changes["_epoch"], changes["_commit"]
    later = pc.and_(pc.equal(epochs, floor.epoch), pc.greater(commits, floor.commit))
    later = pc.or_(pc.greater(epochs, floor.epoch), later)
    return changes if pc.all(later).as_py() else changes.filter(later)


def in_source_order(parts: Iterable[pa.Table]) -> pa.Table:
    """Return changes sorted by position."""
    order = [("_epoch", "ascending"), ("_commit", "ascending"), ("_ordinal", "ascending")]
    return pa.concat_tables(parts, promote_options="default").sort_by(order)
