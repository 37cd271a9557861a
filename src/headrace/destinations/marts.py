"""Marts in a destination: views, and tables that are made again when what they read has changed.

A mart is changed in one transaction with what is said of it in headrace.marts. A table keeps its identity
while its columns stay the same: its rows are exchanged, so that grants on it and views over it stay.
"""

from __future__ import annotations

import time
from dataclasses import astuple
from typing import TYPE_CHECKING

from headrace.cells import json_of
from headrace.destinations.session import Session
from headrace.failpoints import failpoint
from headrace.keys import quoted
from headrace.mart import Mart, MartState

if TYPE_CHECKING:
    from headrace.destinations.database import Database

_MEMORY = 512 << 20
_LOCK = "marts"
"""What marts are changed under, in the place of a source."""
_NEW = "headrace_joining.mart"
_COLUMNS = 'mart, version, kind, state, reason, incomplete, missing, positions, "rows", seconds'


class Marts:
    """The marts of a destination."""

    def __init__(self, destination: Database) -> None:
        self._destination = destination

    def all(self) -> dict[str, MartState]:
        """See `headrace.mart.Marts.all`."""
        with self._destination.open() as db:
            self._destination.set_up(db)
            rows = db.execute(f"SELECT {_COLUMNS} FROM headrace.marts")
        return {str(row[0]): MartState(*row) for row in rows}

    def look(self) -> tuple[dict[str, str], str]:
        """See `headrace.mart.Marts.look`."""
        with self._destination.open() as db:
            self._destination.set_up(db)
            rows = db.execute(
                "SELECT model, state, open_records FROM headrace.models WHERE state <> 'retired'"
            )
            return {str(row[0]): _missing(*row) for row in rows}, _positions(db)

    def make(self, mart: Mart, former: MartState | None) -> MartState:
        """See `headrace.mart.Marts.make`."""
        begun = time.monotonic()
        missing = former.missing if former else ""
        try:
            with self._destination.writing(_LOCK, memory=_MEMORY) as db:
                if former is not None and former.kind != mart.kind:
                    db.execute(f"DROP {former.kind} IF EXISTS {self._destination.table_of(mart.name)}")
                is_view = mart.kind == "view"
                rows = self._view(db, mart) if is_view else self._table(db, mart)
                positions = "{}" if is_view else _positions(db)
                took = round(time.monotonic() - begun, 3)
                state = MartState(
                    mart.name, mart.version, mart.kind, "ok", "", bool(missing), missing, positions,
                    rows, took,
                )  # fmt: skip
                _save(db, state)
                failpoint("destination.mart.commit")
        except Exception as error:
            words = self._destination.fault_of(error)
            if words is None:
                raise
            kept = (former.kind, former.positions, former.rows) if former else (mart.kind, "{}", 0)
            kind, positions, rows = kept
            state = MartState(
                mart.name, mart.version, kind, "suspended", words, True, missing, positions, rows, 0.0
            )
            self.save(state)
        return state

    def save(self, state: MartState) -> None:
        """See `headrace.mart.Marts.save`."""
        with self._destination.writing(_LOCK) as db:
            _save(db, state)

    def _view(self, db: Session, mart: Mart) -> int:
        schema, _ = self._destination.place_of(mart.name)
        self._destination.make_schema(db, schema)
        db.execute(f"CREATE OR REPLACE VIEW {self._destination.table_of(mart.name)} AS {mart.query}")
        return 0

    def _table(self, db: Session, mart: Mart) -> int:
        """Fill a new table, then exchange rows, or tables where the columns differ."""
        place, new = self._destination.place_of(mart.name), self._destination.place_of(_NEW)
        live, beside = (self._destination.table_of(name) for name in (mart.name, _NEW))
        for schema in (place[0], new[0]):
            self._destination.make_schema(db, schema)
        db.execute(f"DROP TABLE IF EXISTS {beside}")
        db.execute(f"CREATE TABLE {beside} AS {mart.query}")
        ((rows,),) = db.execute(f"SELECT count(*) FROM {beside}")
        columns = db.columns(*new)
        if db.columns(*place) == columns:
            names = ", ".join(map(quoted, columns))
            db.execute(f"DELETE FROM {live}")
            db.execute(f"INSERT INTO {live} ({names}) SELECT {names} FROM {beside}")
        else:
            db.execute(f"DROP TABLE IF EXISTS {live}")
            db.execute(f"CREATE TABLE {live} AS SELECT * FROM {beside}")
        db.execute(f"DROP TABLE {beside}")
        return int(rows)


def _save(db: Session, state: MartState) -> None:
    db.execute("DELETE FROM headrace.marts WHERE mart = $1", [state.name])
    values = astuple(state)
    marks = ", ".join(f"${n}" for n in range(1, len(values) + 1))
    db.execute(f"INSERT INTO headrace.marts ({_COLUMNS}, refreshed_at) VALUES ({marks}, now())", values)


def _missing(model: str, state: str, records: int) -> str:
    what = [] if state == "in_sync" else [f"is {state}"]
    what += [f"has {records} open record{'s' * (records != 1)}"] if records else []
    return f"{model} {' and '.join(what)}" if what else ""


def _positions(db: Session) -> str:
    rows = db.execute('SELECT source, "offset", commit, committed_at FROM headrace.progress ORDER BY source')
    return json_of({str(s): {"offset": o, "commit": c, "committed_at": at} for s, o, c, at in rows})
