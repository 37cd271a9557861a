"""How a model's table takes in a copy: how far it is, and what a destination does for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from headrace.change import Counts, Mark, Offset, Position

if TYPE_CHECKING:
    import pyarrow as pa

    from headrace.prepared import Prepared
    from headrace.protocols import Model

Phase = Literal["newest", "older copy", "older", "copy", "keys", "stream", "done"]
Why = Literal["copy", "rebuild", "dry run"]


@dataclass(frozen=True, slots=True)
class Join:
    """How far a model has taken in a copy, which the log holds between the offsets `begin` and `end`.

    The phase `copy` reads the copied rows, `stream` the changes that they do not contain, through
    `target`; `offset` is how far the phase is. Where the newest change of a key decides, all of history
    through `target` goes quicker: `newest` reads these alone, `older copy` and `older` what else there is of
    keys whose newest change is bad, and `stream` goes on from there. Where what was before the newest copy
    counts too, `keys` reads all of history through `end`, each time of a share of the keys, and `offset` is
    how many times it has. `stands` is the end of the copy that the
    live table is made of, 0 if it is filled in place. `why`: a new copy, or all of history once more under
    the model as it is now, which a dry run only compares with the live table.
    """

    model: str
    source: str
    version: str
    begin: Offset
    end: Offset
    stands: Offset
    phase: Phase
    offset: Offset
    target: Offset
    why: Why = "copy"

    @property
    def beside(self) -> bool:
        """Whether the live table goes on meanwhile."""
        return self.stands > 0


class Account(NamedTuple):
    """What the ledger says of a span of the log: kind `copy` or `apply`, `after`, `through`, and counts."""

    kind: str
    after: Offset
    through: Offset
    counts: Counts


@dataclass(frozen=True, slots=True)
class Difference:
    """In how many source keys what grew beside a live table differs from it."""

    added: int = 0
    removed: int = 0
    changed: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A table of the past: its rows, its records that were open then, and in how many source keys the live
    table differs from it, with examples; None where that has other columns or is not there."""

    rows: int
    open_records: int
    difference: Difference | None
    examples: Sequence[dict[str, Any]]


class Joins(Protocol):
    """The joins of a destination's models: how their tables take in a copy, see `Join`."""

    def of(self, source: str) -> dict[str, Join]:
        """Return the newest join of every model of a source."""
        ...

    def bad_keys(self, join: Join, limit: int) -> pa.Array | None:
        """Return the source keys of which what grows beside the live table has met bad changes; None if they
        are more than `limit`."""
        ...

    def start(self, join: Join, model: Model) -> None:
        """Start a join with an empty table, in place or beside; one that did not end is given up."""
        ...

    def step(
        self,
        join: Join,
        following: Join,
        model: Model,
        pieces: Iterable[Prepared],
        accounts: Sequence[Account] | None = None,
    ) -> Sequence[str]:
        """Take in one slice of a phase, piece by piece, and move to `following`, in one transaction; returns
        the ids of issues that are new. `accounts` are what the ledger is to say instead of the slice's own
        counts. Whatever taking the pieces raises is raised here, and nothing changes.

        Raises DestinationError when the join does not stand at `join`: another pipeline moved it; and
        Contested for changes to prepare once more.
        """
        ...

    def attach(
        self, join: Join, model: Model, at: Mark, position: Position, committed_at: int, *, in_sync: bool
    ) -> tuple[Difference, Sequence[str]]:
        """End a join: what grew beside replaces what differs, and the model stands at `at`.

        Returns in how many source keys the two differed, and the ids of issues that are new. A dry run
        leaves the live table as it is. Of a rebuild headrace.rebuilds tells the same, with examples.
        """
        ...

    def write_snapshot(
        self, model: Model, into: str | None, commit: int, slices: Iterable[Prepared]
    ) -> Snapshot:
        """Make a table that stays as it is, of slices that come one after another, in one transaction, which
        `into` None takes back at its end. `commit` is what overtakes records meanwhile.

        Raises UserError for a name that is in use, ModelBroken for a table that cannot take the rows,
        Contested for changes to prepare once more, and whatever taking the slices raises; then there is no
        table.
        """
        ...
