"""How a model's table takes in a copy: how far it is, and what a destination does for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from headrace.change import Counts, Mark, Offset, Position

if TYPE_CHECKING:
    from headrace.prepared import Prepared
    from headrace.protocols import Model

Phase = Literal["copy", "keys", "stream", "done"]
Why = Literal["copy", "rebuild", "dry run"]


@dataclass(frozen=True, slots=True)
class Join:
    """How far a model has taken in a copy, which the log holds between the offsets `begin` and `end`.

    The phase `copy` reads the copied rows, `stream` the changes that they do not contain, through
    `target`; `offset` is how far the phase is. Where what was before the copy counts too, `keys` comes
    instead of `copy`: it reads all of history through `end`, each time of some keys, and `offset` is how
    many times it has. `stands` is the end of the copy that the live table is
    made of, 0 if it is filled in place. `why`: a new copy, or all of history once more under the model as
    it is now, which a dry run only compares with the live table.
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


class Joins(Protocol):
    """The joins of a destination's models: how their tables take in a copy, see `Join`."""

    def of(self, source: str) -> dict[str, Join]:
        """Return the newest join of every model of a source."""
        ...

    def start(self, join: Join, model: Model) -> None:
        """Start a join with an empty table, in place or beside; one that did not end is given up."""
        ...

    def step(
        self,
        join: Join,
        following: Join,
        model: Model,
        prepared: Prepared,
        accounts: Sequence[Account] | None = None,
    ) -> Sequence[str]:
        """Take in one slice of a phase and move to `following`, in one transaction; returns the ids of
        issues that are new. `accounts` are what the ledger is to say instead of the slice's own counts.

        Raises DestinationError when the join does not stand at `join`: another pipeline moved it.
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
