"""What the headers of the log tell without a payload: places, ends of groups, backlogs, shapes, copies.

Entries that retention has deleted have left their stops behind: ends of groups, never further apart than
a slice is large unless one group is. Whoever reads staging from before the log's beginning goes from stop
to stop.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from headrace.change import (
    CopyMark,
    Kind,
    LoggedEntry,
    Mark,
    Offset,
    Position,
    TableId,
    TableSchema,
    shape_in,
)
from headrace.log.database import Database
from headrace.log.entries import COLUMNS, HIGH, NO_HASH, NOTHING, High, row_of

MAX_SLICE_ROWS = 100_000
_MAX_SLICE_BYTES = 16 << 20
_PAGE = 1000  # headers that are read at once

_MINE = "table_schema = ? AND table_name = ?"


class Index(ABC):
    """The questions that a log answers from its headers."""

    _db: Database
    id: str

    @abstractmethod
    def end(self) -> Mark:
        """See `Log.end`."""

    def begin(self) -> Mark:
        """See `Log.begin`."""
        row = self._db.row('SELECT "offset", hash FROM stops ORDER BY "offset" DESC LIMIT 1')
        return Mark(self.id, int(row[0]), row[1].hex()) if row else Mark(self.id, 0, NO_HASH)

    def mark(self, offset: Offset) -> Mark | None:
        """See `Log.mark`."""
        if offset == 0:
            return Mark(self.id, 0, NO_HASH)
        row = self._db.row(
            'SELECT hash FROM entries WHERE "offset" = ? UNION ALL SELECT hash FROM stops WHERE "offset" = ?',
            (offset, offset),
        )
        return Mark(self.id, offset, row[0].hex()) if row else None

    def place(self, offset: Offset) -> tuple[Position, int]:
        """See `Log.place`."""
        row = self._db.row(
            'SELECT epoch, "commit", ordinal, committed_at, epoch FROM stops WHERE "offset" = ? UNION ALL '
            "SELECT high_epoch, high_commit, high_ordinal, high_committed_at, last_epoch FROM entries "
            'WHERE "offset" = ?',
            (offset, offset),
        )
        if row is None:
            return Position(0, 0, 0), 0
        if row[0] == row[4] and row[3]:
            return Position(*row[:3]), int(row[3])
        own = 'SELECT last_epoch, last_commit, last_ordinal, committed_at FROM entries WHERE "offset" = ?'
        *place, at = self._db.row(own, (offset,)) or row[:4]  # a stop has but the place of the stream
        return Position(*place), int(at)

    def last_commit(self) -> tuple[Position, int] | None:
        """See `Log.last_commit`."""
        high = self._read_high()
        return (high.position, high.committed_at) if high.at else None

    def _read_high(self) -> High:
        """Return how far the stream has come through the whole log."""
        row = self._db.row(
            f'SELECT * FROM (SELECT {HIGH}, "offset" FROM entries UNION ALL '
            'SELECT epoch, "commit", ordinal, at, committed_at, "offset" FROM stops) '
            'ORDER BY "offset" DESC LIMIT 1'
        )
        return High(*row[:5]) if row else NOTHING

    def position(self) -> Position | None:
        """See `Log.position`."""
        last = self.last_commit()
        return last[0] if last else None

    def slice_end(self, after: Offset, limit: Offset, max_bytes: int, max_rows: int) -> Offset:
        """See `Log.slice_end`."""
        if (stop := self._stop_after(after)) is not None:
            return min(stop, limit)
        through, end = self.reach(after, limit, max_bytes, max_rows)
        if end > after or through == limit:
            return end
        following = self._ending(after + 1)
        return following if following is not None and following <= limit else after

    def table_slice_end(self, table: TableId, after: Offset, limit: Offset, kinds: Sequence[Kind]) -> Offset:
        """See `Log.table_slice_end`."""
        if (stop := self._stop_after(after)) is not None:
            return min(stop, limit)
        rows = total = 0
        marks = ", ".join("?" * len(kinds))
        for offset, count, size in self._db.rows(
            f'SELECT "offset", rows, bytes FROM entries WHERE {_MINE} '
            f'AND "offset" > ? AND "offset" <= ? AND kind IN ({marks}) ORDER BY "offset" LIMIT ?',
            (*table, after, limit, *kinds, MAX_SLICE_ROWS + 1),
        ):
            rows += int(count)
            total += int(size)
            if rows > MAX_SLICE_ROWS or total > _MAX_SLICE_BYTES:
                before = self.group_end(int(offset) - 1)
                return before if before > after else min(limit, self._ending(int(offset)) or limit)
        return limit

    def group_end(self, offset: Offset) -> Offset:
        """See `Log.group_end`."""
        row = self._db.row(
            'SELECT "offset" FROM entries WHERE ends_group AND "offset" <= ? AND "offset" > '
            '(SELECT coalesce(max("offset"), 0) FROM stops) ORDER BY "offset" DESC LIMIT 1',
            (offset,),
        ) or self._db.row(
            'SELECT "offset" FROM stops WHERE "offset" <= ? ORDER BY "offset" DESC LIMIT 1', (offset,)
        )
        return int(row[0]) if row else 0

    def _stop_after(self, after: Offset) -> Offset | None:
        row = self._db.row('SELECT min("offset") FROM stops WHERE "offset" > ?', (after,))
        return None if row is None or row[0] is None else int(row[0])

    def _ending(self, offset: Offset) -> Offset | None:
        """Return the first end of a group at or behind an offset."""
        row = self._db.row(
            'SELECT "offset" FROM entries WHERE ends_group AND "offset" >= ? ORDER BY "offset" LIMIT 1',
            (offset,),
        )
        return int(row[0]) if row else None

    def reach(self, after: Offset, limit: Offset, max_bytes: int, max_rows: int) -> tuple[Offset, Offset]:
        """Return the last entry up to `limit` that keeps `(after, …]` within `max_bytes` of payload and
        `max_rows` rows, at least one if there is one, and the last group end up to there."""
        through = end = after
        total = rows = 0
        while True:
            page = self._db.rows(
                'SELECT "offset", rows, bytes, ends_group FROM entries '
                'WHERE "offset" > ? AND "offset" <= ? ORDER BY "offset" LIMIT ?',
                (through, limit, _PAGE),
            )
            for offset, count, size, ends in page:
                total += int(size)
                rows += int(count)
                if through > after and (total > max_bytes or rows > max_rows):
                    return through, end
                through = int(offset)
                end = through if ends else end
            if len(page) < _PAGE:
                return through, end

    def headers(self, after: Offset, through: Offset) -> Iterator[LoggedEntry]:
        """See `Log.headers`."""
        while True:
            page = self._db.rows(
                f'SELECT {COLUMNS} FROM entries WHERE "offset" > ? AND "offset" <= ? '
                'ORDER BY "offset" LIMIT ?',
                (after, through, _PAGE),
            )
            for found in page:
                item = row_of(found).logged(b"")
                after = item.offset
                yield item
            if len(page) < _PAGE:
                return

    def backlog(self, after: Offset, table: TableId | None = None) -> tuple[int, int, int | None]:
        """See `Log.backlog`."""
        mine = "" if table is None else f" AND {_MINE}"
        row = self._db.row(
            "SELECT coalesce(sum(rows), 0), coalesce(sum(bytes), 0), min(appended_at) FROM entries "
            f'WHERE "offset" > max(?, (SELECT coalesce(max("offset"), 0) FROM stops)){mine}',
            (after, *(table or ())),
        )
        assert row is not None
        return int(row[0]), int(row[1]), row[2]

    def volume(
        self, table: TableId, after: Offset, through: Offset, kinds: Sequence[Kind] = ()
    ) -> tuple[int, int]:
        """Return rows and bytes of a table's entries in `(after, through]`, of some kinds or all, of those
        that the log holds."""
        chosen = f" AND kind IN ({', '.join('?' * len(kinds))})" if kinds else ""
        row = self._db.row(
            "SELECT coalesce(sum(rows), 0), coalesce(sum(bytes), 0) FROM entries "
            f'WHERE {_MINE} AND "offset" > ? AND "offset" <= ?{chosen}',
            (*table, after, through, *kinds),
        )
        assert row is not None
        return int(row[0]), int(row[1])

    def first_commit(self, after: Offset, table: TableId) -> int | None:
        """Return when the first rows of a table after an offset, of those that the log holds, were committed
        (microseconds); None if there are none."""
        row = self._db.row(
            f'SELECT committed_at FROM entries WHERE "offset" > ? AND rows > 0 AND {_MINE} '
            'ORDER BY "offset" LIMIT 1',
            (after, *table),
        )
        return int(row[0]) if row else None

    def bytes_between(self, after: Offset, through: Offset) -> int:
        """Return the bytes of payload in `(after, through]`."""
        row = self._db.row(
            'SELECT coalesce(sum(bytes), 0) FROM entries WHERE "offset" > ? AND "offset" <= ?',
            (after, through),
        )
        return int(row[0]) if row else 0

    def appended_before(self, moment: int) -> Offset:
        """Return the last offset before the first entry that was appended at `moment` (microseconds)
        or later."""
        low, high = self.begin().offset, self.end().offset
        while low < high:
            middle = (low + high + 1) // 2
            row = self._db.row('SELECT appended_at < ? FROM entries WHERE "offset" = ?', (moment, middle))
            low, high = (middle, high) if row and row[0] else (low, middle - 1)
        return low

    def schemas(self) -> dict[TableId, TableSchema]:
        """See `Log.schemas`."""
        rows = self._db.rows(
            "SELECT kind, payload FROM entries WHERE kind IN ('schema', 'marker') "
            'AND table_name IS NOT NULL ORDER BY "offset"'
        )
        shapes = (shape_in(str(kind), payload) for kind, payload in rows)
        return {shape.table: shape for shape in shapes if shape}

    def copy_marks(self) -> list[tuple[Offset, TableId, Position, int, CopyMark]]:
        """See `Log.copy_marks`."""
        rows = self._db.rows(
            'SELECT "offset", table_schema, table_name, first_epoch, first_commit, first_ordinal, '
            "appended_at, payload FROM entries WHERE kind IN ('schema', 'marker') "
            # The first condition is that of the index.
            "AND kind = 'marker' AND table_name IS NOT NULL ORDER BY \"offset\""
        )
        return [
            (int(offset), TableId(schema, name), Position(*place), int(appended), CopyMark.from_json(text))
            for offset, schema, name, *place, appended, text in rows
        ]

    def truncates(self, table: TableId, after: Offset) -> list[int]:
        """See `Log.truncates`."""
        rows = self._db.rows(
            f"SELECT first_commit FROM entries WHERE {_MINE} AND \"offset\" > ? AND kind = 'truncate'",
            (*table, after),
        )
        return [int(row[0]) for row in rows]

    def last_offsets(self) -> dict[TableId, Offset]:
        """See `Log.last_offsets`."""
        rows: list[tuple[Any, ...]] = self._db.rows(
            'SELECT table_schema, table_name, max("offset") FROM entries '
            "WHERE table_name IS NOT NULL GROUP BY 1, 2"
        )
        return {TableId(str(s), str(n)): int(o) for s, n, o in rows}

    def before_unstaged(
        self, table: TableId, rows_through: Offset, schemas_through: Offset, aside: Sequence[Offset] = ()
    ) -> Offset:
        """See `Log.before_unstaged`."""
        row = self._db.row(
            f'SELECT min("offset") FROM entries WHERE {_MINE} '
            "AND \"offset\" > CASE WHEN kind IN ('schema', 'marker', 'decision') THEN ? ELSE ? END "
            'AND "offset" NOT IN (SELECT value FROM json_each(?))',
            (*table, schemas_through, rows_through, json.dumps(list(aside))),
        )
        return self.end().offset if row is None or row[0] is None else self.group_end(int(row[0]) - 1)
