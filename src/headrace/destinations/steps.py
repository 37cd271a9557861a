"""Steps of source keys on top of what a table holds of them, see `headrace.steps`.

The steps of all parts of a slice are gathered first: a part may end in the middle of a source transaction,
of which a history takes the last state alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pyarrow.compute as pc

from headrace.change import Counts
from headrace.destinations.books import dated, record_from
from headrace.destinations.session import Session
from headrace.destinations.tables import OPEN, QUARANTINE
from headrace.keys import literal, quoted
from headrace.prepared import Prepared
from headrace.steps import COLUMNS, Standing, judge, made_rows, make_versions

if TYPE_CHECKING:
    from headrace.destinations.database import Database
    from headrace.protocols import Model, Table


@dataclass(slots=True)
class Settled:
    """What came of a model's steps: where its changes went, how many records are new, and new issues."""

    model: Model
    counts: Counts
    records: int
    issues: list[str]


@dataclass(slots=True)
class _Gathered:
    """The steps of one model so far: in the temporary relation `steps`, their records in `records`."""

    model: Model
    target: Table
    makes: str
    outputs: list[str]
    steps: str
    records: str
    counts: Counts
    truncates: int = 0


class StepBook:
    """Gathers the steps of models in one transaction, and settles them at its end."""

    def __init__(self, destination: Database, db: Session, source: str, records: str = QUARANTINE) -> None:
        """Open records of the models are in the table `records`."""
        self._destination = destination
        self._db = db
        self._source = source
        self._records = records
        self._gathered: dict[str, _Gathered] = {}

    def add(self, model: Model, target: Table, prepared: Prepared) -> None:
        """Take the steps of a model, which go to the table `target`."""
        made = prepared.steps
        assert made is not None
        known = self._gathered.get(model.name)
        if known is None:
            number = len(self._gathered)
            names = (f"_hr_steps_{number}", f"_hr_records_{number}")
            known = _Gathered(model, target, made.makes, made.outputs, *names, Counts())
            self._gathered[model.name] = known
            self._prepare(known, prepared)
        types = {name: type_ for name, type_ in target.types().items() if name in made.outputs} | COLUMNS
        self._db.append(known.steps, types, self._source, made.table)
        self._db.execute(
            f"INSERT INTO {known.records} SELECT * FROM _hr_given", given=dated(prepared.records)
        )
        known.counts += prepared.counts
        known.truncates += pc.sum(pc.equal(made.table["_what"], "truncate")).as_py() or 0

    def _prepare(self, known: _Gathered, prepared: Prepared) -> None:
        cells = "".join(f"{quoted(name)}, " for name in known.outputs)
        own = ", ".join(f"CAST(NULL AS {type_}) AS {name}" for name, type_ in COLUMNS.items())
        table = self._destination.table_of(known.target.name)
        self._db.keep(known.steps, f"SELECT {cells}_source, {own} FROM {table} WHERE false")
        self._db.keep(known.records, "SELECT * FROM _hr_given", dated(prepared.records.slice(0, 0)))

    def settle(self) -> Iterator[Settled]:
        """Change the tables and write the records, model by model."""
        for known in self._gathered.values():
            yield self._settle(known)

    def _settle(self, known: _Gathered) -> Settled:
        db, model = self._db, known.model
        table = self._destination.table_of(known.target.name)
        opened = f"SELECT key FROM {self._records} WHERE model = {literal(model.name)} AND {OPEN}"
        standing = Standing(table, self._source, opened, db.same_key)
        judge(db.keep, known.makes, known.steps, standing, truncated=known.truncates > 0)
        statements = []
        if known.makes == "history":
            make_versions(db.keep, known.steps, standing, db.fingerprints(list(map(quoted, known.outputs))))
            statements = [_closing(table, self._source, db)]
        columns = ", ".join(["_source_key", *map(quoted, known.target.types())])
        rows = made_rows(known.makes, known.steps, known.outputs, standing)
        own = literal(self._source)
        statements.append(f"INSERT INTO {table} (_source, {columns}) SELECT {own}, {columns} FROM ({rows}) r")
        self._destination.exchange_rows(db, known.target, statements)
        opened_records, issues = self._record(known)
        found = db.execute("SELECT outcome, count(*) FROM _hr_judged WHERE own GROUP BY outcome")
        judged = Counts(**{str(outcome): int(count) for outcome, count in found})
        counts = replace(known.counts, applied=known.truncates) + judged
        return Settled(model, counts, opened_records, issues)

    def _record(self, known: _Gathered) -> tuple[int, list[str]]:
        """Write the records of the changes that are bad and not blocked, and what each open one blocks."""
        db, model = self._db, known.model
        db.keep(
            "_hr_bad",
            f"""SELECT r.* FROM {known.records} r JOIN _hr_judged j ON j.k = r.key AND j._epoch = r.epoch
            AND j._commit = r.commit AND j._ordinal = r.ordinal WHERE j.outcome = 'quarantined'""",
        )
        ((count,),) = db.execute("SELECT count(*) FROM _hr_bad")
        issues = record_from(db, model, "_hr_bad", self._records) if count else []
        db.execute(
            f"""UPDATE {self._records} SET blocked = blocked + b.count FROM (
              SELECT k, count(*) AS count FROM _hr_judged WHERE own AND outcome = 'blocked' GROUP BY k) b
            WHERE model = {literal(model.name)} AND {OPEN} AND key = b.k"""
        )
        return int(count), issues


def _closing(table: str, source: str, db: Session) -> str:
    """Return the statement that ends the versions which stand and are others now."""
    return (
        f"UPDATE {table} SET valid_to = v.until, is_current = false FROM _hr_versions v "
        f"WHERE _source = {literal(source)} AND {table}.is_current AND v.n = 0 AND v.is_row "
        f"AND v.until IS NOT NULL AND {db.same_key('_source_key', 'v.k')}"
    )
