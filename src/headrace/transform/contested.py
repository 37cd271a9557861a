"""Outcomes whose rows would have the key of others: prepared again without the changes that made these."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from headrace.keys import quoted
from headrace.prepared import Contested, Place, Prepared, Refused
from headrace.transform.engine import engine

if TYPE_CHECKING:
    from headrace.transform.model import RowModel

_Outcome = TypeVar("_Outcome")


def uncontested(model: RowModel, attempt: Callable[[RowModel], _Outcome]) -> _Outcome:
    """Return what an attempt returns, made again with what it found contested refused, until nothing is.

    It comes to an end: of the same changes each attempt refuses more. Raises Contested where one does not.
    """
    while True:
        try:
            return attempt(model)
        except Contested as contested:
            refusing = model.refusing(contested)
            if {each[:3] for each in refusing.refused} == {each[:3] for each in model.refused}:
                raise
            model = refusing


def alone(prepared: Prepared) -> Prepared:
    """Return an outcome that is all there is. Raises Contested where rows of it would have one key: the row
    of the earliest change has it."""
    claims = prepared.claims
    if claims is None or not claims.keys:
        return prepared
    refused = dict[Place, Refused]()
    with engine() as db:
        db.register("made", prepared.rows)
        db.register("places", claims.places)
        for key in claims.keys:
            place = "{'epoch': epoch, 'commit': commit, 'ordinal': ordinal}"
            columns = [f"m.{quoted(name)}" for name in key.columns]
            twins = db.execute(
                f"SELECT epoch, commit, ordinal, first({place}) OVER w "
                "FROM made m JOIN places p USING (_source_key) "
                f"WHERE {' AND '.join(f'{column} IS NOT NULL' for column in columns)} "
                f"WINDOW w AS (PARTITION BY {', '.join(columns)} ORDER BY epoch, commit, ordinal) "
                "QUALIFY row_number() OVER w > 1"
            ).fetchall()
            for epoch, commit, ordinal, winner in twins:
                first = (winner["epoch"], winner["commit"], winner["ordinal"])
                change = Refused(epoch, commit, ordinal, key.name or None, first)
                refused.setdefault(change[:3], change)
    if refused:
        raise Contested({claims.model: list(refused.values())})
    return prepared
