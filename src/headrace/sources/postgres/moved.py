"""Rows that change their key while their table is copied under several snapshots.

A row that moves from a part of the table that is read later to one that was read before is in neither:
under the later snapshot its old key is gone, under the earlier one its new key had not come. Its UPDATE is
in the stream, but without the large values that it did not change (TOAST), and they are nowhere else. Such
keys are read once more, at the end.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from headrace.change import TableId
from headrace.payload import decode_rows
from headrace.protocols import LogIndex

Key = tuple[str | None, ...]


def moved_keys(
    log: LogIndex,
    table: TableId,
    key: Sequence[str],
    offset: int,
    window: tuple[int, int],
    among: Collection[Key] | None = None,
) -> set[Key]:
    """Return the keys that rows moved to by changes that leave out a value, committed in `window` (LSNs,
    the first exclusive), in entries after `offset`; if `among` is given, only from one of these keys."""
    found: set[Key] = set()
    for payload in log.changes_of(table, offset):
        batch = decode_rows(payload)
        if not {"_before", "_unchanged"} <= set(batch.schema.names):
            continue
        commits = batch["_commit"]
        inside = pc.and_(pc.greater(commits, window[0]), pc.less_equal(commits, window[1]))
        partial = pc.and_(pc.is_valid(batch["_before"]), pc.is_valid(batch["_unchanged"]))
        rows = pa.Table.from_batches([batch]).filter(pc.and_(inside, partial)).select([*key, "_before"])
        for row in rows.to_pylist():
            before = dict(row["_before"])
            old, new = tuple(before.get(name) for name in key), tuple(row[name] for name in key)
            if old != new and (among is None or old in among):
                found.add(new)
    return found
