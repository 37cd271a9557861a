"""What prepare hands to apply: what a model makes of some changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace.change import Counts

if TYPE_CHECKING:
    import pyarrow as pa

    from headrace.steps import Steps

Place = tuple[int, int, int]
"""Epoch, commit and ordinal of a change."""


@dataclass(frozen=True, slots=True)
class Claims:
    """The keys that an outcome's rows claim, where the source's key does not keep them apart: no other row of
    the model's table may have one when the transaction ends.

    `key` names the output columns. `places` (`_source_key`, `epoch`, `commit`, `ordinal`, `sole`) says of
    each row which change made it, and whether nothing else of its source key is in the outcome: with that
    change refused, the row is what it was before.
    """

    model: str
    key: tuple[str, ...]
    places: pa.Table


class Contested(Exception):
    """Rows that a transaction was to leave would have had the key of another row: nothing is changed.

    `refused` says by model which changes are to be refused, at least one: with them counted as bad
    (`RowModel.refusing`) the same is prepared again.
    """

    def __init__(self, refused: Mapping[str, frozenset[Place]]) -> None:
        super().__init__(f"rows of {', '.join(refused)} would have the key of another row")
        self.refused = refused


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
