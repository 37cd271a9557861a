"""How a table is cut for its copy: into ranges of its key that weigh about the same.

The cuts come from a sample of the table's pages, sorted by the server in the key's own order, so any
type and any skew will do. A table without a key is cut by blocks instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from headrace.change import TableSchema
from headrace.sources.postgres.catalog import Connection, qualified, quoted

_PAGES_PER_CHUNK = 10

_SIZE = """
SELECT c.relkind = 'p', coalesce(sum(pg_table_size(t.oid)), 0)::int8,
       coalesce(sum(pg_relation_size(t.oid)), 0)::int8 / current_setting('block_size')::int8
FROM pg_class c LEFT JOIN LATERAL (
  SELECT c.oid WHERE c.relkind <> 'p' UNION ALL
  SELECT relid FROM pg_partition_tree(c.oid) WHERE c.relkind = 'p' AND isleaf) t ON true
WHERE c.oid = to_regclass(%s) GROUP BY c.relkind
"""

Bounds = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Range:
    """One chunk: the rows from bound `lower` on and before bound `upper`, None is open; or those of
    single `keys`."""

    number: int
    lower: tuple[str, ...] | None
    upper: tuple[str, ...] | None
    keys: tuple[tuple[str, ...], ...] = ()

    @property
    def ordinal(self) -> int:
        """The ordinal that its rows follow: beyond those of a transaction that ends where the snapshot is."""
        return (self.number + 1) << 32


def ranges(bounds: Bounds) -> list[Range]:
    """Return the chunks between bounds: one more than there are bounds."""
    edges = [None, *bounds, None]
    return [Range(i, lower, upper) for i, (lower, upper) in enumerate(pairwise(edges))]


def cut(db: Connection, schema: TableSchema, chunk_bytes: int) -> Bounds:
    """Return the bounds that cut a table into chunks of about `chunk_bytes` on the source's disk."""
    found = db.execute(_SIZE, [qualified(schema.table)]).fetchone()
    if found is None:
        return ()
    partitioned, size, blocks = found
    chunks = min(-(-size // chunk_bytes), blocks)
    if chunks < 2:
        return ()
    if not schema.key:
        step = -(-blocks // chunks)
        return () if partitioned else tuple((str(block),) for block in range(step, blocks, step))
    percent = min(100.0, 100.0 * chunks * _PAGES_PER_CHUNK / blocks)
    key = ", ".join(quoted(name) for name in schema.key)
    texts = ", ".join(f"pg_catalog.format('%%s', {quoted(name)})" for name in schema.key)
    rows = db.execute(
        f"""WITH sample AS (SELECT {texts}, row_number() OVER (ORDER BY {key}) AS n, count(*) OVER () AS total
          FROM {"" if partitioned else "ONLY "}{qualified(schema.table)} TABLESAMPLE SYSTEM (%s))
        SELECT * FROM sample WHERE (n * %s) / total > ((n - 1) * %s) / total AND n < total ORDER BY n""",
        [percent, chunks, chunks],
    ).fetchall()
    return tuple(tuple(map(str, row[:-2])) for row in rows)


def condition(schema: TableSchema, part: Range) -> str:
    """Return the SQL condition of a chunk, `true` for a whole table.

    Bounds are compared as values of the key's types, in the order of its index.
    """
    if part.keys:
        names = ", ".join(quoted(name) for name in schema.key)
        listed = ", ".join(f"({_cells(schema, key)})" for key in part.keys)
        return f"({names}) IN ({listed})"
    if part.lower is None and part.upper is None:
        return "true"
    edges = ((">=", part.lower), ("<", part.upper))
    return " AND ".join(_compare(schema, sign, bound) for sign, bound in edges if bound is not None)


def _compare(schema: TableSchema, sign: str, bound: Sequence[str]) -> str:
    if not schema.key:
        return f"ctid {sign} '({bound[0]},0)'::tid"
    names = ", ".join(quoted(name) for name in schema.key)
    cells = _cells(schema, bound)
    return f"({names}) {sign} ({cells})" if len(bound) > 1 else f"{names} {sign} {cells}"


def _cells(schema: TableSchema, key: Sequence[str]) -> str:
    """Return the texts of a key as values of its types."""
    types = {column.name: column.type for column in schema.columns}
    return ", ".join(f"{_literal(text)}::{types[name]}" for name, text in zip(schema.key, key, strict=True))


def _literal(text: str) -> str:
    plain = text.replace("'", "''")
    return f"'{plain}'" if "\\" not in text else "E'" + plain.replace("\\", "\\\\") + "'"
