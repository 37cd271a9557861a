"""Writing an outcome and taking it back: does the destination take it, or anything at all?"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from headrace.destinations.session import Session
from headrace.destinations.steps import StepBook
from headrace.errors import DestinationUnavailable, ModelBroken
from headrace.failpoints import failpoint
from headrace.prepared import Contested, Prepared
from headrace.protocols import Model

if TYPE_CHECKING:
    from headrace.destinations.database import Database

_HASH = 32  # bytes of what fills a row of no meaning
_ROWS = 3
"""Rows of which one has to be written anew: the first may be the very one that the destination dies of."""


def rehearse(destination: Database, model: Model, prepared: Prepared | int) -> None:
    """See `Destination.rehearse`."""
    if isinstance(prepared, int):
        with destination.writing(model.source, keep=False) as db:
            _fill(db, prepared)
        _write_any_anew(destination, model)
        return
    with suppress(Contested, ModelBroken), destination.writing(model.source, keep=False) as db:
        destination.make_table(db, model)
        if prepared.steps is not None:
            steps = StepBook(destination, db, model.source)
            steps.add(model, model, prepared)
            list(steps.settle())
        else:
            destination.change_rows(db, model.source, model, prepared)
        db.check_constraints()
        failpoint("destination.rehearse")


def _fill(db: Session, room: int) -> None:
    """Write so many bytes that are not to be compressed, to a table of their own."""
    db.execute(
        "CREATE TABLE headrace.rehearsal AS SELECT md5(CAST(random() AS VARCHAR)) AS filler "
        f"FROM generate_series(1, {room // _HASH + 1}) AS r(n)"
    )


def _write_any_anew(destination: Database, model: Model) -> None:
    """Take a row that is there out of a table, and put it in again; raises only where no row can be."""
    target = destination.table_of(model.name)
    for row in range(_ROWS):
        at = f"LIMIT 1 OFFSET {row}"
        try:
            with destination.writing(model.source, keep=False) as db:
                destination.make_table(db, model)
                db.keep("_hr_there", f"SELECT * FROM {target} {at}")
                place = f"(SELECT {db.row_id} FROM {target} {at})"
                db.execute(f"DELETE FROM {target} WHERE {db.row_id} = {place}")
                db.execute(f"INSERT INTO {target} SELECT * FROM _hr_there")
            return
        except DestinationUnavailable:
            if row == _ROWS - 1:
                raise
