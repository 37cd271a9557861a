"""Where the models of a source stand, as its meter is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from headrace.change import Offset
from headrace.join import Join
from headrace.protocols import Part
from headrace.scaling.measure import Stand
from headrace.transform.model import RowModel
from headrace.transform.sql import ModelText


def stands_of(
    active: Sequence[RowModel],
    offsets: Mapping[str, Offset],
    joins: Iterable[tuple[Join, int | None]],
    texts: Iterable[ModelText],
    freshness: float,
) -> list[Stand]:
    """Return a stand for each active model that runs, which has one of `offsets`, and one for each that
    joins: `joins` are not at their end, and what is left of them is work.

    A model's target is that of its file, or `freshness`.
    """
    targets = {text.name: text.alerts.freshness for text in texts}
    tables = {model.name: model.table for model in active}
    stands = [
        Stand(model.name, model.table, offsets[model.name], targets.get(model.name) or freshness)
        for model in active
        if model.name in offsets
    ]
    for join, left in joins:
        if table := tables.get(join.model):
            end = max(join.end, join.target)
            after = min(join.begin if join.phase == "keys" else join.offset, end)
            stands.append(Stand(join.model, table, after, targets.get(join.model) or freshness, end, left))
    return stands


def counted(part: Part) -> tuple[str, int]:
    """Return what work a part of a slice is of, and of how many changes it was made."""
    return part.model.name, part.prepared.counts.read
