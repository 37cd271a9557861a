"""Which relations of the stream are captured: what the project asked for, and nothing beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

from headrace.change import TableId
from headrace.errors import RESYNC, SourceGap
from headrace.sources.postgres.events import Relation

alerts = logging.getLogger("headrace.alert")


class Roster:
    """The tables whose rows are kept.

    The publication may hold more than the project selects: another tool or FOR ALL TABLES put it
    there. Such a table has no history here and its rows would be a fragment, so they are dropped.
    """

    def __init__(
        self,
        source: str,
        tables: Iterable[TableId],
        oids: Mapping[int, TableId],
        known: Callable[[], Iterable[TableId]] = tuple,
    ) -> None:
        """`oids` are the oids of those tables that were published, to know a renamed one by. `known`
        tells which are passed over in silence: those asked for since, whose changes are part of their
        copy until that begins, and those removed."""
        self._source = source
        self._tables = set(tables)
        self._oids = dict(oids)
        self._known = known
        self._dropped: set[int] = set()

    def add(self, table: TableId) -> None:
        """Capture one table more from now on."""
        self._tables.add(table)

    def admits(self, relation: Relation) -> bool:
        """Whether rows of a relation are kept; says once of each that they are not.

        Raises SourceGap when it is a captured table under another name.
        """
        table = TableId(relation.schema, relation.name)
        if table in self._tables:
            return True
        if (before := self._oids.get(relation.id)) is not None:
            raise SourceGap(
                f"Source {self._source}: the table {before} is called {table} now.",
                f"Give it its name back, or mend tables and models. {RESYNC.format(source=self._source)}",
            )
        if relation.id not in self._dropped and table not in self._known():
            self._dropped.add(relation.id)
            alerts.warning(
                "source %s: %s is in the publication but not captured: its changes are dropped. Take it out "
                "of the publication, or `headrace tables add` it.",
                self._source, table,
            )  # fmt: skip
        return False
