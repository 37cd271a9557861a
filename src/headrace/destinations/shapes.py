"""The columns that each model's table has been given, kept in the destination, so that what others have
changed since is found and not written over."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from headrace.destinations.session import Session
from headrace.errors import ModelBroken
from headrace.protocols import DestinationFinding

if TYPE_CHECKING:
    from headrace.destinations.database import Database

_LONGEST_TYPE = 60


class Shape(NamedTuple):
    """With which columns Headrace left a table, and the one that was `Table.numbered` of every model that has
    written to it, None if none was."""

    columns: Mapping[str, str]
    numbered: str | None


def recorded(db: Session, model: str) -> Shape | None:
    """Return how a model's table was left, None if nothing is known of it."""
    rows = db.execute("SELECT columns, numbered FROM headrace.shapes WHERE model = $1", [model])
    return Shape(json.loads(rows[0][0]), rows[0][1]) if rows else None


def record_shape(db: Session, model: str, shape: Shape | None) -> None:
    """Remember how a model's table is left; None: there is no table."""
    db.execute("DELETE FROM headrace.shapes WHERE model = $1", [model])
    if shape is not None:
        row = [model, json.dumps(shape.columns), shape.numbered]
        db.execute("INSERT INTO headrace.shapes VALUES ($1, $2, $3)", row)


def refuse_drift(model: str, left: Shape | None, found: Mapping[str, str]) -> None:
    """Refuse a table that others have changed. Raises ModelBroken, which says how."""
    if left is not None and left.columns != found:
        raise ModelBroken(model, *_words(model, left.columns, found))


def drifts(destination: Database, db: Session) -> Iterator[DestinationFinding]:
    """Yield the tables that others have changed."""
    if not db.columns("headrace", "shapes"):
        return
    rows = db.execute(
        "SELECT s.model, s.columns FROM headrace.shapes s JOIN headrace.models m ON m.model = s.model "
        "WHERE m.state <> 'retired' ORDER BY s.model"
    )
    for model, columns in rows:
        left, found = json.loads(columns), db.columns(*destination.place_of(model), hidden=True)
        if left != found:
            yield DestinationFinding("fail", *_words(model, left, found))


def _words(model: str, left: Mapping[str, str], found: Mapping[str, str]) -> tuple[str, str]:
    changes = [f"column {name} is gone" for name in left if name not in found]
    changes += [f"column {name} was added" for name in found if name not in left]
    changes += [
        f"column {name} is {_short(found[name])}, and was {_short(type_)}"
        for name, type_ in left.items()
        if found.get(name, type_) != type_
    ]
    what = f"was changed by somebody else: {', '.join(changes)}" if found else "was dropped by somebody else"
    remedy = f"or have it built anew from staging: headrace rebuild {model}"
    undo = "Undo that and start the pipeline again" if found else "Put it back and start the pipeline again"
    return f"Table {model} {what}.", f"{undo}, {remedy}"


def _short(type_: str) -> str:
    return type_ if len(type_) <= _LONGEST_TYPE else f"{type_[:_LONGEST_TYPE]}…"
