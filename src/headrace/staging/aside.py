"""What staging knows of changes that could not be decoded: where they are, and of which tables.

All of a source are in one internal table, as bytes (see `headrace.staging.rows.undecodable`). They are few,
so that where they stand is kept in memory.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from headrace.change import Offset, TableId
from headrace.payload import UNDECODABLE
from headrace.staging.rows import META
from headrace.staging.table import RawTable

BeforeUnstaged = Callable[[TableId, Offset, Offset, Sequence[Offset]], Offset]
"""See `LogIndex.before_unstaged`."""

_PLACE = ["table_schema", "table_name", "_offset"]


class Aside:
    """The offsets of the entries that could not be decoded, by table."""

    def __init__(self) -> None:
        self._offsets: dict[TableId, list[Offset]] = {}
        self._learned: Offset = 0
        own = [(field.name, field.type) for field in UNDECODABLE]
        columns = [*own, ("_epoch", META["_epoch"]), ("_offset", META["_offset"]), ("changes", pa.int64())]
        self.nothing = pa.schema(columns).empty_table()
        """What `read` returns where there is nothing."""
        self._told = [*(name for name in self.nothing.column_names if name != "message"), *_PLACE[:2]]

    def learn(self, raw: RawTable | None) -> None:
        """Take over what the internal table has gained."""
        if raw is None or raw.version <= self._learned:
            return
        for part in raw.chunks(self._learned, raw.version, _PLACE):
            for schema, name, offset in zip(*(part[column].to_pylist() for column in _PLACE), strict=True):
                known = self._offsets.setdefault(TableId(schema, name), [])
                if not known or known[-1] < offset:
                    known.append(offset)
        self._learned = raw.version

    def of(self, table: TableId) -> Sequence[Offset]:
        """Return the offsets of a table's entries that could not be decoded, in order."""
        return self._offsets.get(table, ())

    def any(self, table: TableId, after: Offset, through: Offset) -> bool:
        """Whether a table has any in `(after, through]`."""
        known = self.of(table)
        return bisect_right(known, after) < bisect_right(known, through)

    def read(self, raw: RawTable, table: TableId, after: Offset, through: Offset, *, whole: bool) -> pa.Table:
        """Return those of a table in `(after, through]`; their bytes only if `whole`."""
        parts = []
        for part in raw.chunks(after, through, None if whole else self._told):
            own = pc.and_(
                pc.equal(part["table_schema"], table.schema), pc.equal(part["table_name"], table.name)
            )
            rows = part.filter(own)
            absent = [name for name in self.nothing.column_names if name not in rows.column_names]
            for name in absent:
                rows = rows.append_column(name, pa.nulls(rows.num_rows, self.nothing.schema.field(name).type))
            parts.append(rows.select(self.nothing.column_names))
        return pa.concat_tables([self.nothing, *parts])
