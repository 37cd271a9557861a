"""Marts in a destination: views, and tables that are made again when what they read has changed.

A mart is changed in one transaction with what is said of it in headrace.marts. A table keeps its identity
while its columns stay the same: its rows are exchanged, so that grants on it and views over it stay.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, replace
from typing import TYPE_CHECKING

from headrace.cells import json_of
from headrace.destinations.session import Session
from headrace.errors import ModelBroken
from headrace.failpoints import failpoint
from headrace.keys import quoted
from headrace.mart import Mart, MartState

if TYPE_CHECKING:
    from headrace.destinations.database import Database

_MEMORY = 512 << 20
_LOCK = "marts"
"""What marts are changed under, in the place of a source."""
_NEW = "headrace.new_mart"  # in a schema that no model has
_COLUMNS = 'mart, version, kind, state, reason, incomplete, missing, positions, "rows", seconds, made, inputs'


class _Refused(Exception):
    """What the engine has against a mart, in words that quote no cell."""


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

    def look(self) -> tuple[dict[str, str], dict[str, int]]:
        """See `headrace.mart.Marts.look`."""
        with self._destination.open() as db:
            self._destination.set_up(db)
            rows = db.execute(
                "SELECT model, state, open_records FROM headrace.models WHERE state <> 'retired'"
            )
            return {str(row[0]): _missing(*row) for row in rows}, _changes(db)

    def make(self, mart: Mart, former: MartState | None, inputs: Sequence[str]) -> MartState:
        """See `headrace.mart.Marts.make`."""
        made = former is not None and former.made
        if not made and self._is_taken(mart):
            return self._suspend(mart, former, f"{mart.name} is there already, and is no mart's")
        words = ""
        # An engine may refuse to give a view that is there other columns: then it is made anew.
        for anew in (False, True) if made and mart.kind == "view" else (False,):
            try:
                return self._make(mart, former, inputs, anew=anew)
            except (_Refused, ModelBroken) as error:
                words = str(error)
        return self._suspend(mart, former, words)

    def _make(self, mart: Mart, former: MartState | None, inputs: Sequence[str], *, anew: bool) -> MartState:
        begun = time.monotonic()
        with self._destination.writing(_LOCK, memory=_MEMORY, steady=True) as db:
            is_view = mart.kind == "view"
            counts = _changes(db)
            db.touched[self._destination.place_of(mart.name)] = mart.name
            db.resolve_in(self._destination.main)
            with self._refusing():
                if former is not None and former.made and (anew or former.kind != mart.kind):
                    db.execute(f"DROP {former.kind} IF EXISTS {self._destination.table_of(mart.name)}")
                rows = self._view(db, mart) if is_view else self._table(db, mart)
            positions = "{}" if is_view else _positions(db)
            missing = former.missing if former else ""
            took = round(time.monotonic() - begun, 3)
            state = MartState(
                mart.name, mart.version, mart.kind, "ok", "", bool(missing), missing, positions, rows, took,
                made=True, inputs=json_of({name: counts.get(name, 0) for name in sorted(inputs)}),
            )  # fmt: skip
            _save(db, state)
            db.changed.add(mart.name)
            failpoint("destination.mart.commit")
        return state

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Tell what the engine has against a mart from all else."""
        try:
            yield
        except Exception as error:
            words = self._destination.fault_of(error)
            if words is None:
                raise
            raise _Refused(words) from error

    def _is_taken(self, mart: Mart) -> bool:
        """Whether there is a table of a mart's name that no mart has made: it is not to be dropped. An engine
        may take upper and lower case for the same."""
        with self._destination.open() as db:
            self._destination.set_up(db)
            ((found,),) = db.execute(
                "SELECT count(*) FROM information_schema.tables WHERE lower(table_schema) = lower($1) "
                "AND lower(table_name) = lower($2)",
                list(self._destination.place_of(mart.name)),
            )
            return bool(found)

    def give_way(self, db: Session, model: str) -> None:
        """Drop a mart whose name a model has now."""
        for (kind,) in db.execute("SELECT kind FROM headrace.marts WHERE mart = $1 AND made", [model]):
            db.execute(f"DROP {kind} IF EXISTS {self._destination.table_of(model)}")
        db.execute("DELETE FROM headrace.marts WHERE mart = $1", [model])

    def _suspend(self, mart: Mart, former: MartState | None, reason: str) -> MartState:
        kept = former or MartState(mart.name, "", mart.kind, "", "", True, "", "{}", 0, 0.0, made=False)
        state = replace(kept, version=mart.version, state="suspended", reason=reason, incomplete=True)
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
        self._destination.make_schema(db, place[0])
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


def _changes(db: Session) -> dict[str, int]:
    return {str(name): int(count) for name, count in db.execute("SELECT name, changes FROM headrace.changes")}


def _positions(db: Session) -> str:
    rows = db.execute('SELECT source, "offset", commit, committed_at FROM headrace.progress ORDER BY source')
    return json_of({str(s): {"offset": o, "commit": c, "committed_at": at} for s, o, c, at in rows})
