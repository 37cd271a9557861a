"""Outcomes whose rows would have the key of others: prepared again without the changes that made these."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from headrace.keys import quoted
from headrace.prepared import Contested, Prepared
from headrace.transform.engine import engine

if TYPE_CHECKING:
    from headrace.transform.model import RowModel

_Outcome = TypeVar("_Outcome")


def uncontested(model: RowModel, attempt: Callable[[RowModel], _Outcome]) -> _Outcome:
    """Return what an attempt returns, made again with what it found contested refused, until nothing is.

    It comes to an end: of the same changes each attempt refuses more.
    """
    while True:
        try:
            return attempt(model)
        except Contested as contested:
            model = model.refusing(contested)


def alone(prepared: Prepared) -> Prepared:
    """Return an outcome that is all there is. Raises Contested where rows of it would have one key: the row
    of the earliest change has it."""
    claims = prepared.claims
    if claims is None or not claims.keys:
        return prepared
    refused = dict[tuple[int, int, int], str | None]()
    with engine() as db:
        db.register("made", prepared.rows)
        db.register("places", claims.places)
        for key in claims.keys:
            columns = [f"m.{quoted(name)}" for name in key.columns]
            twins = db.execute(
                f"SELECT p.epoch, p.commit, p.ordinal FROM made m JOIN places p USING (_source_key) "
                f"WHERE {' AND '.join(f'{column} IS NOT NULL' for column in columns)} QUALIFY row_number() "
                f"OVER (PARTITION BY {', '.join(columns)} ORDER BY p.epoch, p.commit, p.ordinal) > 1"
            ).fetchall()
            for epoch, commit, ordinal in twins:
                refused.setdefault((epoch, commit, ordinal), key.name or None)
    if refused:
        raise Contested({claims.model: [(*place, name) for place, name in refused.items()]})
    return prepared
