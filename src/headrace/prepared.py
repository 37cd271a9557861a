"""What prepare hands to apply: what a model makes of some changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from headrace.change import Counts

if TYPE_CHECKING:
    import pyarrow as pa

    from headrace.steps import Steps

UNIQUE = "constraint.unique"
"""The reason of a change that would give its row the key of another."""

FOREIGN_KEY = "constraint.foreign_key"
"""The reason of a change that would have its row refer to one that is not there."""

MESSAGE = "decode.message"
"""The reason of a message of the source that does not decode."""

PAYLOAD = "decode.payload"
"""The reason of an entry of the log whose changes do not decode."""

Place = tuple[int, int, int]
"""Epoch, commit and ordinal of a change."""

BEFORE_ALL: Place = (-1, 0, 0)


class Refused(NamedTuple):
    """A change that is refused, and the name of the foreign or unique key for which it is, None for the
    model's own. With it earlier changes of its row are that say the same of that key, as far as they are
    behind the place `since`."""

    epoch: int
    commit: int
    ordinal: int
    name: str | None
    since: Place | None = None


class UniqueKey(NamedTuple):
    """Output columns: no two rows of a model have the same in all of them, unless one is null. The name is ''
    for the key that the model's file says."""

    name: str
    columns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reference:
    """A foreign key: a row of `model`, unless one of its `columns` is null, has them from `to` of a row of
    the model `parent`.

    `by_key` says in which order the columns make the parent's source key as its text is made; empty where
    they do not. `cycle` is whether the parent refers, over others or itself, to `model` again.
    """

    model: str
    name: str
    columns: tuple[str, ...]
    parent: str
    to: tuple[str, ...]
    types: tuple[str, ...] = ()
    """DuckDB's names of the types of `to`."""
    by_key: tuple[int, ...] = ()
    cycle: bool = False


@dataclass(frozen=True, slots=True)
class Claims:
    """What an outcome's rows claim, and what is to hold of all rows of the source when the transaction ends:
    no two rows of the model have the same of one of `keys` (none where the source's key keeps rows apart),
    and whatever a row refers to is there.

    `references` are those of the model's rows and those to them. `places` (`_source_key`, `epoch`, `commit`,
    `ordinal`, `sole`) says of each row which change made it, and whether nothing else of its source key is in
    the outcome: with that change refused, the row is what it was before.
    """

    model: str
    keys: tuple[UniqueKey, ...]
    places: pa.Table
    references: tuple[Reference, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns whose values others must not have, or refer to."""
        referred = (name for each in self.references if each.parent == self.model for name in each.to)
        unique = (name for key in self.keys for name in key.columns)
        return tuple(dict.fromkeys((*unique, *referred)))


class Contested(Exception):
    """Rows that a transaction was to leave would have had the key of another row, or referred to none:
    nothing is changed.

    `refused` says by model which changes are to be refused: with them counted as bad (`RowModel.refusing`)
    the same is prepared again. `dangling` are by model source keys of rows that the transaction did not
    touch, and whose parents it takes away: they are to be made of their histories in it, too. At least one
    of both has something.
    """

    def __init__(
        self, refused: Mapping[str, Sequence[Refused]], dangling: Mapping[str, pa.Array] | None = None
    ) -> None:
        self.refused = refused
        self.dangling = dangling or {}
        models = ", ".join({**refused, **self.dangling})
        super().__init__(f"rows of {models} would have the key of another row, or refer to none")


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a model makes of some changes: a value, the same whoever computes it, however often.

    Applied in this order: if `reset`, all rows of the model's source go; then the rows of `removed`
    (string array of source keys, each key that has settled); then `rows` come (`_source_key` and
    the output columns, one row per source key). `records` has the columns of headrace.quarantine
    that a change determines.

    Of a table without a key, whose rows are a multiset, a source key has as many rows as it came to, and
    `fewer` (`_source_key`, `count`) says how many of those that were there before go: of the key's open
    records first, the newest first, then of its rows.
    """

    reset: bool
    removed: pa.Array
    rows: pa.Table
    records: pa.Table
    counts: Counts
    fewer: pa.Table | None = None
    claims: Claims | None = None
    deleted: pa.Table | None = None
    steps: Steps | None = None
