"""What prepare hands to apply: what a model makes of some changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace.change import Counts

if TYPE_CHECKING:
    import pyarrow as pa

    from headrace.steps import Steps


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
    deleted: pa.Table | None = None
    steps: Steps | None = None
