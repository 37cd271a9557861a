"""What the tables of the stream look like: compared with what the log knows, and logged where it differs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from headrace.change import RESERVED, Column, TableId, TableSchema
from headrace.config import SourceConfig
from headrace.errors import RESYNC, SourceGap
from headrace.sources.postgres.catalog import (
    Connection,
    empty_columns,
    filled_columns,
    name_types,
    read_shapes,
)
from headrace.sources.postgres.columns import HASHED, Policy
from headrace.sources.postgres.ddl import rewritten
from headrace.sources.postgres.events import Relation

logger = logging.getLogger("headrace.capture")


OnRewrite = Callable[[TableId, str, bool], None]
"""Called with a table and a reason when rows that it has are no longer what the log says, because the source
changed them without a word in the stream; and whether its rows are known by another key now, so that nothing
but a copy of it can be told from what there is."""


class Shapes:
    """The newest shape of every captured table."""

    def __init__(
        self,
        known: Mapping[TableId, TableSchema],
        catalog: Connection,
        config: SourceConfig,
        on_rewrite: OnRewrite,
        waiting: Collection[TableId] = (),
        announced: Callable[[str, str], TableSchema | None] = lambda _, __: None,
        amend: Callable[[Sequence[TableId]], None] = lambda _: None,
    ) -> None:
        """Tables `waiting` for a copy may have become anything since the log knew them.

        `on_rewrite` is called before the group with such a change is out, and again if that group is built
        again. `announced` returns the shape that a message, of a prefix and a content, announces; `amend`
        has the publication give out what these tables have gained."""
        self._known = dict(known)
        self._catalog = catalog
        self._config = config
        self._policy = Policy(config)
        self._on_rewrite = on_rewrite
        self._waiting = set(waiting)
        self._announced = announced
        self._amend = amend

    def __getitem__(self, table: TableId) -> TableSchema:
        return self._known[table]

    def __contains__(self, table: TableId) -> bool:
        return table in self._known

    def adopt(self, shape: TableSchema) -> None:
        """Take over the shape that a copy has logged for its table."""
        self._known[shape.table] = shape
        self._waiting.discard(shape.table)

    def learn(self, relation: Relation) -> TableSchema | None:
        """Return the shape of a relation if it is another than the one that is known, which it replaces.

        Raises SourceGap when rows already applied are known by what is no longer so.
        """
        table = TableId(relation.schema, relation.name)
        known = self._known.get(table)
        if known is not None and self._policy.excludes_of(table):
            # Where columns are listed in the publication, one that the table has gained is not among them.
            self._amend([table])
        return self._replace(known, self._shape(relation, known))

    def announced(self, prefix: str, content: str) -> TableSchema | None:
        """Like `learn`, of the shape that a message announces; None for one that announces nothing new."""
        shape = self._announced(prefix, content)
        known = self._known.get(shape.table) if shape else None
        if shape is None or known is None:
            return None
        return self._replace(known, replace(shape, version=known.version + 1))

    def _replace(self, known: TableSchema | None, shape: TableSchema) -> TableSchema | None:
        if known is not None and known.agrees(shape):
            return None
        if known is not None and shape.table not in self._waiting:
            self._compare(known, shape)
        self._known[shape.table] = shape
        return shape

    def _shape(self, relation: Relation, known: TableSchema | None) -> TableSchema:
        types = name_types(self._catalog, [(c.type_oid, c.type_modifier) for c in relation.columns])
        columns = tuple(
            Column(column.name, type_, base)
            for column, (type_, base) in zip(relation.columns, types, strict=True)
        )
        table = TableId(relation.schema, relation.name)
        key = tuple(column.name for column in relation.columns if column.is_key)
        if relation.replica_identity == "f":
            key = self._key_of_full(table, key, known)
        elif not key:
            raise self._gap(
                f"Table {table} has lost its key: its changes cannot be told apart.",
                f"Give it a primary key again, or `headrace tables remove {table}`.",
            )
        taken = [column.name for column in columns if column.name.lower() in RESERVED]
        if taken:
            raise self._gap(
                f"Table {table} has a column called {taken[0]}, a name that Headrace uses itself.",
                f"Rename the column at the source, or `headrace tables remove {table}`.",
            )
        # The stream does not tell of constraints: those stand until others are announced.
        version, constraints = (known.version + 1, known.constraints) if known else (1, ())
        return self._policy.shape(TableSchema(table, columns, key, version, constraints))

    def _key_of_full(
        self, table: TableId, columns: tuple[str, ...], known: TableSchema | None
    ) -> tuple[str, ...]:
        """Return the key of a table whose replica identity is all of its `columns`: the catalog knows the
        primary key; without one it is none, and the rows are a multiset."""
        if known is not None and table not in self._waiting and set(known.key) <= set(columns):
            return known.key
        shape = read_shapes(self._catalog, [table]).get(table)
        return shape.key if shape is not None and set(shape.key) <= set(columns) else ()

    def _compare(self, known: TableSchema, shape: TableSchema) -> None:
        """Stop at a change that would make one row two; report one that changed rows at rest, or the key by
        which they are known."""
        table = shape.table
        hashes = {c.name: _hash_of(c) for c in known.columns}
        if any(c.name in known.key and hashes.get(c.name, "") != _hash_of(c) for c in shape.columns):
            raise self._gap(
                f"The key of table {table} is hashed in another way than before: hash or hash_salt changed.",
                "Take the change back.",
            )
        if known.key != shape.key:
            self._on_rewrite(table, f"the key changed from {list(known.key)} to {list(shape.key)}", True)
            return
        if not shape.key:
            self._check_content(known, shape)
        if reason := rewritten(known, shape, filled_columns(self._catalog, table)):
            self._on_rewrite(table, reason, False)
        else:
            logger.info("table %s has another shape now, version %d", table, shape.version)

    def _check_content(self, known: TableSchema, shape: TableSchema) -> None:
        """Let a table without a key take only such new columns as are null in every row there is: its rows
        are known by their content, and any other change of it would part them from what was captured."""
        added = [column.name for column in shape.columns[len(known.columns) :]]
        empty = set(empty_columns(self._catalog, shape.table))
        if shape.columns[: len(known.columns)] != known.columns or not empty.issuperset(added):
            raise self._gap(
                f"Columns of table {shape.table} changed, which has no key: its rows are known by their "
                "content, which is another now.",
                "With a primary key it could have gone on.",
            )

    def _gap(self, what: str, remedy: str) -> SourceGap:
        return SourceGap(what, f"{remedy} {RESYNC.format(source=self._config.name)}".strip())


def _hash_of(column: Column) -> str:
    return column.base if column.base.startswith(HASHED) else ""
