"""Partitions that come and go: what one brings when it is attached, or takes when it is detached or
dropped, is in no stream.

The trees of the captured tables stand in the note `partitions`, as they were before a table's copy and at
every look since. A partition that was made as one came empty, and all its rows are streamed; the row
versions of the catalogs tell it from one that was attached.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import NamedTuple

import psycopg

from headrace.alarms import tell
from headrace.change import TableId
from headrace.protocols import LogIndex
from headrace.sources.postgres.catalog import Connection, qualified

_NOTE = "partitions"

# Of catalogs alone, so that no lock of the application's is waited for. ctid's row in pg_attribute (-1) is
# written when a table is made, and never again; to attach one writes its other columns anew.
_TREES = """
WITH RECURSIVE tree AS (
  SELECT t.n, c.oid AS relid, NULL::text AS link, true AS born
  FROM unnest(%s::text[]) WITH ORDINALITY AS t(name, n) JOIN pg_class c ON c.oid = to_regclass(t.name)
  WHERE c.relkind = 'p'
  UNION ALL
  SELECT tree.n, i.inhrelid, i.xmin::text, i.xmin = made.xmin AND NOT EXISTS (
    SELECT FROM pg_attribute a WHERE a.attrelid = i.inhrelid AND a.attnum > 0
    AND a.xmin = made.xmin AND NOT a.cmin = made.cmin)
  FROM tree JOIN pg_inherits i ON i.inhparent = tree.relid AND NOT i.inhdetachpending
  JOIN pg_attribute made ON made.attrelid = i.inhrelid AND made.attnum = -1)
SELECT n::int, relid::bigint, relid::regclass::text, link, born FROM tree
"""
_HAVE_ROWS = """
SELECT coalesce(bool_or(pg_relation_size(oid) > 0), false) FROM pg_class
WHERE oid = ANY (%s::oid[]) AND relkind = 'r'
"""


class _Partition(NamedTuple):
    """A partition by its name; `link` is another one each time that it is attached."""

    name: str
    link: str
    born: bool = True


_Tree = dict[int, _Partition]  # by oid


def remember_partitions(db: Connection, log: LogIndex, tables: list[TableId]) -> None:
    """Take note of the partitions of tables that are about to be copied: from here on changes are told."""
    _write(log, _known(log) | _trees(db, tables))


def changed_partitions(db: Connection, log: LogIndex, tables: list[TableId]) -> Iterator[tuple[TableId, str]]:
    """Yield the tables that got rows by a partition that was attached, with the reason.

    Those that lost some have an alert: what a source drops to make room is often what its copy is to keep.
    What is found is noted at the end: whoever stops before is told again. A table of which the application
    has a new partition locked is left for the next time.
    """
    known, found = _known(log), _trees(db, tables)
    for table, tree in found.items():
        before = known.get(table, tree)
        try:
            names = [tree[oid].name for oid in _attached(db, before, tree)]
        except psycopg.errors.LockNotAvailable:
            found[table] = before
            continue
        gone = [before[oid].name for oid in sorted(before.keys() - tree.keys())]
        if names:
            yield table, f"partitions were attached: {', '.join(names)}"
        elif gone:
            tell(
                "PARTITIONS of %s were detached or dropped: %s. Their rows stay here; to take them out: "
                "`headrace tables resync %s`.", table, ", ".join(gone), table, source=log.source,
            )  # fmt: skip
    _write(log, found)


def _attached(db: Connection, before: _Tree, tree: _Tree) -> list[int]:
    """Return the partitions by which a table may have got rows: those that were away meanwhile, and new ones
    that were not made as partitions, if any new one has rows."""
    new = tree.keys() - before.keys()
    again = {oid for oid in tree.keys() & before.keys() if tree[oid].link != before[oid].link}
    attached = {oid for oid in new if not tree[oid].born}
    if attached and not _have_rows(db, new):
        attached = set()
    return sorted(attached | again)


def _trees(db: Connection, tables: list[TableId]) -> dict[TableId, _Tree]:
    """Return the partitions of every level of those tables that are partitioned."""
    found: dict[TableId, _Tree] = {}
    for n, oid, name, link, born in db.execute(_TREES, [[qualified(table) for table in tables]]):
        tree = found.setdefault(tables[n - 1], {})
        if link is not None:
            tree[oid] = _Partition(name, link, born)
    return found


def _have_rows(db: Connection, oids: set[int]) -> bool:
    row = db.execute(_HAVE_ROWS, [sorted(oids)]).fetchone()
    return row is not None and bool(row[0])


def _known(log: LogIndex) -> dict[TableId, _Tree]:
    noted = json.loads(log.note(_NOTE) or "[]")
    return {TableId(*table): {oid: _Partition(*rest) for oid, *rest in tree} for table, tree in noted}


def _write(log: LogIndex, trees: dict[TableId, _Tree]) -> None:
    rows = [
        (table, [(oid, part.name, part.link) for oid, part in sorted(tree.items())])
        for table, tree in sorted(trees.items())
    ]
    if (note := json.dumps(rows, ensure_ascii=False)) != log.note(_NOTE):
        log.set_note(_NOTE, note)
