"""Writing an outcome and taking it back: does the destination take it, or anything at all?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.destinations.session import Session
from headrace.destinations.steps import StepBook
from headrace.errors import ModelBroken
from headrace.failpoints import failpoint
from headrace.prepared import Contested, Prepared
from headrace.protocols import Model

if TYPE_CHECKING:
    from headrace.destinations.database import Database

_HASH = 32  # bytes of what fills a row of no meaning


def rehearse(destination: Database, model: Model, prepared: Prepared, room: int) -> None:
    """See `Destination.rehearse`."""
    try:
        with destination.writing(model.source, keep=False) as db:
            destination.make_table(db, model)
            if room:
                _fill(db, room)
                _write_anew(db, destination.table_of(model.name))
            if prepared.steps is not None:
                steps = StepBook(destination, db, model.source)
                steps.add(model, model, prepared)
                list(steps.settle())
            else:
                destination.change_rows(db, model.source, model, prepared)
            db.check_constraints()
            failpoint("destination.rehearse")
    except (Contested, ModelBroken):
        return  # the destination has answered


def _fill(db: Session, room: int) -> None:
    """Write so many bytes that are not to be compressed, to a table of their own."""
    db.execute(
        "CREATE TABLE headrace.rehearsal AS SELECT md5(CAST(random() AS VARCHAR)) AS filler "
        f"FROM generate_series(1, {room // _HASH + 1}) AS r(n)"
    )


def _write_anew(db: Session, target: str) -> None:
    """Take a row that is there out of a table, and put it in again."""
    db.keep("_hr_there", f"SELECT * FROM {target} LIMIT 1")
    first = f"(SELECT {db.row_id} FROM {target} LIMIT 1)"
    db.execute(f"DELETE FROM {target} WHERE {db.row_id} = {first}")
    db.execute(f"INSERT INTO {target} SELECT * FROM _hr_there")
