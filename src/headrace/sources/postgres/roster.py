"""Which relations of the stream are captured: what the project asked for, and nothing beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from headrace.alarms import tell
from headrace.change import TableId
from headrace.sources.postgres.events import Relation


class Roster:
    """The tables whose rows are kept.

    The publication may hold more than the project selects: another tool or FOR ALL TABLES put it
    there. Such a table has no history here and its rows would be a fragment, so they are dropped.
    """

    def __init__(
        self,
        source: str,
        tables: Iterable[TableId],
        oids: Callable[[], Mapping[int, TableId]] = dict,
        known: Callable[[], Iterable[TableId]] = tuple,
        moved: Callable[[TableId, TableId], None] = lambda _, __: None,
    ) -> None:
        """`oids` returns the oids of those tables that are published, to know a renamed one by. `known`
        tells which are passed over in silence: those asked for since, whose changes are part of their
        copy until that begins, and those removed. `moved` takes a table's former name and its name."""
        self._source = source
        self._tables = set(tables)
        self._oids = oids
        self._known = known
        self._moved = moved
        self._warned: set[int] = set()
        self._newest: dict[int, tuple[TableId, bool]] = {}  # by oid: the name that came last, and the verdict

    def add(self, table: TableId) -> None:
        """Capture one table more from now on."""
        self._tables.add(table)
        self._newest.clear()

    def admits(self, relation: Relation) -> bool:
        """Whether rows of a relation are kept; says once of each that they are not.

        `moved` is called with a captured table each time that it comes under another name: its rows are
        part of the copy that it is to have then.
        """
        table = TableId(relation.schema, relation.name)
        newest = self._newest.get(relation.id)
        if newest is None or newest[0] != table:
            newest = self._newest[relation.id] = (table, self._judge(relation.id, table))
        return newest[1]

    def table_of(self, oid: int, named: TableId | None) -> TableId | None:
        """Return of which captured table a relation is that cannot be read; None if nobody can tell.

        `named` is what is known of its name. Raises LookupError if it is of a table that is not captured.
        """
        table = self._oids().get(oid, named)
        if table is not None and table not in self._tables:
            raise LookupError(table)
        return table

    def _judge(self, oid: int, table: TableId) -> bool:
        owner = self._oids().get(oid, table)
        if owner != table:
            self._moved(owner, table)
            return False
        if table in self._tables:
            return True
        if oid not in self._warned and table not in self._known():
            self._warned.add(oid)
            tell(
                "source %s: %s is in the publication but not captured: its changes are dropped. Take it out "
                "of the publication, or `headrace tables add` it.",
                self._source, table, source=self._source, severity="warning",
            )  # fmt: skip
        return False
