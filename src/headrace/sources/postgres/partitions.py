"""Partitions that come and go: what one brings when it is attached, or takes when it is detached or
dropped, is in no stream.

The trees of the captured tables stand in the note `partitions`. A partition that was made as one came
empty, and all its rows are streamed; the row versions of the catalog tell it from one that was attached.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from headrace.change import TableId
from headrace.protocols import Log
from headrace.sources.postgres.catalog import Connection, qualified

_NOTE = "partitions"

# pg_attribute's row of ctid (-1) is written when a table is made, and never again.
_TREES = """
SELECT t.n::int, p.relid::oid::bigint, p.relid::regclass::text, p.isleaf,
  p.isleaf AND pg_relation_size(p.relid) > 0,
  coalesce((SELECT i.xmin = a.xmin FROM pg_inherits i JOIN pg_attribute a
            ON a.attrelid = i.inhrelid AND a.attnum = -1 WHERE i.inhrelid = p.relid), true)
FROM unnest(%s::text[]) WITH ORDINALITY AS t(name, n)
JOIN pg_class c ON c.oid = to_regclass(t.name) AND c.relkind = 'p', pg_partition_tree(c.oid) p
"""


def changed_partitions(db: Connection, log: Log, tables: list[TableId]) -> Iterator[tuple[TableId, str]]:
    """Yield the tables whose rows other partitions changed since the last look, with the reason.

    What is found is remembered when the next is asked for: whoever stops in between is told again.
    """
    known = {TableId(*table): dict(tree) for table, tree in json.loads(log.note(_NOTE) or "[]")}
    found: dict[TableId, dict[int, str]] = {}
    attached: dict[TableId, list[str]] = {}
    filled: set[TableId] = set()
    for n, oid, name, is_leaf, has_rows, is_born in db.execute(_TREES, [[qualified(t) for t in tables]]):
        table = tables[n - 1]
        found.setdefault(table, {})
        if is_leaf:
            found[table][oid] = name
        if table in known and oid not in known[table]:
            if not is_born:
                attached.setdefault(table, []).append(name)
            if has_rows:
                filled.add(table)
    for table, tree in found.items():
        gone = [name for oid, name in known.get(table, {}).items() if oid not in tree]
        come = attached.get(table, []) if table in filled else []
        what = ", ".join(
            f"{verb} {' '.join(names)}"
            for verb, names in (("attached", come), ("detached or dropped", gone))
            if names
        )
        if what:
            yield table, f"partitions were {what}"
    rows = [(table, sorted(tree.items())) for table, tree in sorted(found.items())]
    if (note := json.dumps(rows, ensure_ascii=False)) != log.note(_NOTE):
        log.set_note(_NOTE, note)
