"""What a destination's engine offers to the bookkeeping that is written once for all of them.

SQL that passes through here is what the engines have in common. Where they differ, a session says how:
a few expressions, the types, and how Arrow tables come in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import pyarrow as pa

    from headrace.destinations.unique import Claimed
    from headrace.protocols import Table


class Session(Protocol):
    """An open connection.

    A statement's parameters are `$1`, `$2`, …; an Arrow table that comes with it (`given`) is the relation
    `_hr_given` in it. Statements between `begin` and `commit` are one transaction.
    """

    row_id: str
    """The hidden column that tells a table's rows apart, and grows with each insert, more or less."""

    touched: dict[tuple[str, str], str]
    """The tables (schema, name) that were changed here, with the models that they are of."""

    changed: set[str]
    """Models and marts whose rows the transaction changes: those that read them are due after it."""

    moving: set[str]
    """The models that go on to another offset."""

    counts_issues: bool
    """Whether records were changed here, so that the states of their issues are to be settled."""

    claimed: dict[str, Claimed]
    """What was changed here of tables with a key that is to be kept unique, by table (quoted)."""

    def begin(self, source: str, *, steady: bool = False) -> None:
        """Begin a transaction, which alone changes what is of a source until it ends. If `steady`, all of its
        statements see one state of the database."""
        ...

    def commit(self) -> None:
        """Make the transaction durable. Raises CommitUnknown where it may or may not be, and Unfit for
        a constraint that waited until now."""
        ...

    def rollback(self) -> None:
        """Undo the transaction."""
        ...

    def resolve_in(self, schema: str) -> None:
        """Let names without a schema be those of this one, until the transaction ends."""
        ...

    def execute(
        self, statement: str, parameters: Sequence[Any] = (), given: pa.Table | None = None
    ) -> list[tuple[Any, ...]]:
        """Run a statement and return its rows, none if it has no result."""
        ...

    def change(self, statement: str, parameters: Sequence[Any] = (), given: pa.Table | None = None) -> int:
        """Run a DELETE, INSERT or UPDATE and return how many rows it changed."""
        ...

    def keep(self, name: str, query: str, given: pa.Table | None = None) -> None:
        """Keep what a query returns as the temporary relation `name`, in place of an earlier one."""
        ...

    def append(self, target: str, types: Mapping[str, str], source: str, rows: pa.Table) -> None:
        """Insert rows (`_source_key` and columns) into a table whose columns have these types, in
        DuckDB's words; `_source` is the same for all."""
        ...

    def remove(self, target: str, source: str, keys: pa.Table, number: tuple[str, str] | None = None) -> None:
        """Delete a source's rows of some source keys (the only column) from a model's table, in which the
        column `number`, with its type in DuckDB's words, if there is one, is the source key as a whole
        number."""
        ...

    def make_room(self, target: str, keys: int) -> None:
        """Be ready to change the rows of so many more source keys of a table, wherever in it they are."""
        ...

    def columns(self, schema: str, table: str, *, hidden: bool = False) -> dict[str, str]:
        """Return a table's columns with the engine's types, with `_source` and `_source_key` if `hidden`;
        empty if there is none."""
        ...

    def types(self, table: Table) -> dict[str, str]:
        """Return a model's columns with the engine's types, as `columns` would. Raises ModelBroken for a
        name or a type that the engine does not have."""
        ...

    def same_key(self, left: str, right: str) -> str:
        """Return the condition that two source keys are equal, `left` one of a model's table."""
        ...

    def json_text(self, document: str, *path: str | int) -> str:
        """Return the expression of what stands in a JSON text at a path of names and places, as text."""
        ...

    def make_findable(self, target: str, columns: Sequence[str]) -> None:
        """See to it that rows of a table are found by their values in some columns, however many others there
        are."""
        ...

    def fingerprints(self, columns: Sequence[str]) -> Sequence[str]:
        """Return expressions of numbers that can be summed; all are equal where the columns (quoted) are."""
        ...

    def retype(self, target: str, column: str, type_: str, *, lenient: bool) -> None:
        """Give a column of a table (both quoted) another type. If `lenient`, values that cannot have it are
        null; else they are refused in the engine's words."""
        ...

    def prepare_table(self, target: str, number: str | None) -> None:
        """Add to a model's table what finding its rows by source key needs, or by the column `number` where
        that is the key."""
        ...


class Unfit(Exception):
    """Rows that a constraint does not admit, found at the end of a transaction.

    `table` and `constraint` are as the engine names them; `words` quote no cell.
    """

    def __init__(self, table: tuple[str, str], constraint: str, words: str) -> None:
        super().__init__(words)
        self.table = table
        self.constraint = constraint
