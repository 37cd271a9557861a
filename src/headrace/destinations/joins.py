"""How a model's table takes in a copy: in many transactions, and seen as whole only after the last.

A table that is new is filled in place and stands as `joining` until it is attached. One that is live
already goes on as it is, while the new content grows beside it; at the end one transaction writes what
differs between the two, and nothing else. Its records grow beside as well, since those of the live table
are of other changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pyarrow as pa

from headrace.cells import json_of
from headrace.change import Counts, Mark, Position, TableId
from headrace.destinations.books import (
    close_records,
    heal,
    insert,
    move_progress,
    numbers,
    overtaken,
    record,
    record_from,
    stand,
)
from headrace.destinations.multiset import take_off
from headrace.destinations.references import judge_anew
from headrace.destinations.session import Session
from headrace.destinations.steps import StepBook
from headrace.destinations.tables import JOINING, OPEN, QUARANTINE
from headrace.errors import DestinationError, UserError
from headrace.failpoints import failpoint
from headrace.join import Account, Difference, Join, Snapshot
from headrace.keys import literal, quoted
from headrace.masking import MASK, Masked, mask_cells
from headrace.prepared import Prepared
from headrace.protocols import Model, Table

if TYPE_CHECKING:
    from headrace.destinations.database import Database

BESIDE = "headrace_joining"
"""The schema of tables that grow beside a live one."""

_LONGEST_NAME = 63  # bytes
_EXCHANGE_MEMORY = 256 << 20  # two hashes of every key, on both sides

_EXAMPLES = 10  # source keys of each kind of difference that a rebuild keeps
_COLUMNS = 'model, source, version, "begin", "end", stands, phase, "offset", target, why'


def joins_of(source: str) -> str:
    """Return the query whose rows are the fields of `Join`, for one source."""
    return f"SELECT {_COLUMNS} FROM headrace.joins WHERE source = {literal(source)}"


class Joins:
    """The joins of all models of a destination."""

    def __init__(self, destination: Database) -> None:
        self._destination = destination

    def of(self, source: str) -> dict[str, Join]:
        """Return the newest join of every model of a source."""
        with self._destination.open() as db:
            self._destination.set_up(db)
            rows = db.execute(joins_of(source))
        return {str(row[0]): Join(*row) for row in rows}

    def bad_keys(self, join: Join, limit: int) -> pa.Array | None:
        """See `headrace.join.Joins.bad_keys`."""
        with self._destination.open() as db:
            rows = db.execute(
                f"SELECT DISTINCT key FROM {JOINING} WHERE model = $1 AND key IS NOT NULL LIMIT {limit + 1}",
                [join.model],
            )
        return None if len(rows) > limit else pa.array([key for (key,) in rows], pa.string())

    def start(self, join: Join, model: Model) -> None:
        """Start a join with an empty table, in place or beside; one that did not end is given up."""
        target = _target(join, model)
        table = self._destination.table_of(target.name)
        with self._destination.writing(join.source) as db:
            # Of an earlier join, which may have been of other columns.
            self._destination.drop_table(db, _Target(_beside(model), {}))
            if not join.beside:
                self._destination.marts.give_way(db, model.name)
            db.execute(f"DELETE FROM {JOINING} WHERE model = $1", [model.name])
            self._destination.make_table(db, target)
            db.execute(f"DELETE FROM {table} WHERE _source = $1", [join.source])
            db.changed.add(target.name)
            _void(db, join)
            if not join.beside:
                stand(db, model, 0, Position(0, 0, 0), 0, in_sync=False)
            _save(db, join)

    def step(
        self,
        join: Join,
        following: Join,
        model: Model,
        pieces: Iterable[Prepared],
        accounts: Sequence[Account] | None = None,
    ) -> Sequence[str]:
        """See `headrace.join.Joins.step`."""
        through = following.offset if following.phase == join.phase else join.end
        records = JOINING if join.beside else QUARANTINE
        head = (join.source, model.name)
        target = _target(join, model)
        table = self._destination.table_of(target.name)
        moved, counts, issues = Counts(), Counts(), list[str]()
        with self._destination.writing(join.source) as db:
            _check(db, join)
            self._destination.make_table(db, target)
            steps = StepBook(self._destination, db, join.source, records)
            for prepared in pieces:
                if prepared.steps is not None:
                    steps.add(model, target, prepared)
                    del prepared
                    continue
                moved += heal(db, model.name, prepared, join.end, records)
                moved += overtaken(take_off(db, join.source, model.name, table, prepared, join.end, records))
                self._destination.change_rows(db, join.source, target, prepared)
                issues += record(db, model, prepared.records, records)
                counts += prepared.counts
                del prepared  # before the next one is made
            for settled in steps.settle():
                counts += settled.counts
                issues += settled.issues
            # The live table has accounted for the changes already, and for the rows of its own copy.
            if join.why == "copy" and (join.phase != "stream" or not join.beside):
                own = Account("copy" if join.phase == "copy" else "apply", join.offset, through, counts)
                told = [own] if accounts is None else accounts
                rows = [(*head, *each[:3], *numbers(each.counts), model.version) for each in told]
                if moved.superseded:
                    span = (join.offset, through)
                    rows.append((*head, "superseded", *span, *numbers(moved), model.version))
                insert(db, "ledger", rows)
            _save(db, following)
            failpoint("destination.join.commit")
        return [] if join.beside else issues

    def attach(
        self, join: Join, model: Model, at: Mark, position: Position, committed_at: int, *, in_sync: bool
    ) -> tuple[Difference, Sequence[str]]:
        """See `headrace.join.Joins.attach`."""
        difference, issues = Difference(), list[str]()
        memory = _EXCHANGE_MEMORY if join.beside else 0
        with self._destination.writing(join.source, memory=memory) as db:
            _check(db, join)
            if join.beside:
                self._destination.make_table(db, model)
                difference = _compare(db, model, *self._tables(join, model))
                if join.why != "copy":
                    self._tell(db, join, model, at, difference)
                if join.why != "dry run":
                    self._exchange(db, join, model)
                    issues = _exchange_records(db, join, model)
                db.execute(f"DELETE FROM {JOINING} WHERE model = $1", [model.name])
                self._destination.drop_table(db, _target(join, model))
            if join.why != "dry run":
                stand(db, model, at.offset, position, committed_at, in_sync=in_sync)
                judge_anew(db, model.name, position.commit)
                _balance(db, join, model)
                move_progress(db, join.source, at, position, committed_at)
            _save(db, replace(join, phase="done", stands=join.end))
            failpoint("destination.join.attach")
        return difference, issues

    def write_snapshot(
        self, model: Model, into: str | None, commit: int, slices: Iterable[Prepared]
    ) -> Snapshot:
        """See `headrace.join.Joins.write_snapshot`."""
        named = _Renamed(into or f"{BESIDE}.{uuid4().hex}", model)
        table, live = (self._destination.table_of(name) for name in (named.name, model.name))
        # A turn of its own: what runs meanwhile is not to wait for it.
        whose = f"{model.source} {named.name}"
        with self._destination.writing(whose, memory=_EXCHANGE_MEMORY, keep=into is not None) as db:
            known = db.execute("SELECT 1 FROM headrace.models WHERE model = $1", [named.name])
            if known or db.columns(*self._destination.place_of(named.name)):
                raise UserError(
                    f"There is a table {into} in the destination already.", "Give --into a name that is free."
                )
            self._destination.make_table(db, named)
            for prepared in slices:
                heal(db, named.name, prepared, commit, JOINING)
                take_off(db, model.source, named.name, table, prepared, commit, JOINING)
                self._destination.change_rows(db, model.source, named, prepared)
                record(db, named, prepared.records, JOINING)
            ((rows,),) = db.execute(f"SELECT count(*) FROM {table}")
            opened = db.change(f"DELETE FROM {JOINING} WHERE model = $1 AND {OPEN}", [named.name])
            db.execute(f"DELETE FROM {JOINING} WHERE model = $1", [named.name])
            difference, examples = None, list[dict[str, Any]]()
            if db.columns(*self._destination.place_of(model.name)) == db.types(model):
                difference = _compare(db, model, table, live)
                examples = _examples(db, model, table, live)
            self._destination.release_table(db, named)
            failpoint("destination.join.snapshot")
        return Snapshot(rows, opened, difference, examples)

    def _tables(self, join: Join, model: Model) -> tuple[str, str]:
        """Return the live table and the one beside it."""
        return self._destination.table_of(model.name), self._destination.table_of(_target(join, model).name)

    def _exchange(self, db: Session, join: Join, model: Model) -> None:
        """Write to the live table what differs from the one beside it, key by key."""
        live, beside = self._tables(join, model)
        columns = ", ".join([*map(quoted, model.types()), "_source", "_source_key"])
        chosen = f"_source = {literal(join.source)} AND _source_key IN (SELECT k FROM _hr_differs)"
        delete = f"DELETE FROM {live} WHERE {chosen}"
        insert_ = f"INSERT INTO {live} ({columns}) SELECT {columns} FROM {beside} WHERE {chosen}"
        ((keys,),) = db.execute("SELECT count(*) FROM _hr_differs")
        db.make_room(live, keys)
        self._destination.exchange_rows(db, model, [delete, insert_])

    def _tell(self, db: Session, join: Join, model: Model, at: Mark, difference: Difference) -> None:
        """Write what a rebuild comes to: rows, records, differences, and some of these with both rows."""
        live, beside = self._tables(join, model)
        examples = _examples(db, model, live, beside)
        ((rows_made,),) = db.execute(f"SELECT count(*) FROM {beside}")
        ((opened,),) = db.execute(f"SELECT count(*) FROM {JOINING} WHERE model = $1 AND {OPEN}", [model.name])
        counts = (rows_made, opened, *astuple(difference))
        facts = (model.name, join.source, model.version, join.why == "dry run", at.offset, *counts)
        insert(db, "rebuilds", [(*facts, json_of(examples))])


def _compare(db: Session, model: Model, before: str, after: str) -> Difference:
    """Find the source keys in which two tables of a model differ: `_hr_differs`."""
    names = [quoted(name) for name in model.types()]
    sums = ", ".join(f"sum({each}) AS h{i}" for i, each in enumerate(db.fingerprints(names)))
    state = (
        f"SELECT _source_key AS k, count(*) AS n, {sums} FROM {{}} "
        f"WHERE _source = {literal(model.source)} GROUP BY _source_key"
    )
    db.keep(
        "_hr_differs",
        f"""SELECT coalesce(a.k, b.k) AS k,
        CASE WHEN a.n IS NULL THEN 'added' WHEN b.n IS NULL THEN 'removed' ELSE 'changed' END AS how
        FROM ({state.format(before)}) a FULL JOIN ({state.format(after)}) b ON a.k = b.k
        WHERE a.n IS DISTINCT FROM b.n OR a.h0 IS DISTINCT FROM b.h0 OR a.h1 IS DISTINCT FROM b.h1""",
    )
    found = db.execute("SELECT how, count(*) FROM _hr_differs GROUP BY how")
    return Difference(**{how: int(count) for how, count in found})


def _examples(db: Session, model: Model, before: str, after: str) -> list[dict[str, Any]]:
    """Return some of the differences that `_compare` has found, with the rows of both tables."""
    db.keep(
        "_hr_examples",
        "SELECT k, how FROM (SELECT *, row_number() OVER (PARTITION BY how ORDER BY k) AS n "
        f"FROM _hr_differs) d WHERE n <= {_EXAMPLES}",
    )
    hidden = model.masked
    examples: dict[str, dict[str, Any]] = {
        key: {"how": how, "key": key, "before": [], "after": []}
        for key, how in db.execute("SELECT k, how FROM _hr_examples ORDER BY how, k")
    }
    names = list(model.types())
    # As text: a client may not have every value that an engine has, such as a date that is infinity.
    cells = ", ".join(f"CAST({quoted(name)} AS VARCHAR)" for name in names)
    for table, when in ((before, "before"), (after, "after")):
        rows = db.execute(
            f"SELECT _source_key, {cells} FROM {table} "
            f"WHERE _source = $1 AND _source_key IN (SELECT k FROM _hr_examples)",
            [model.source],
        )
        for key, *row in rows:
            examples[key][when].append(mask_cells(dict(zip(names, row, strict=True)), hidden.outputs))
    return [example | ({"key": MASK} if hidden.key else {}) for example in examples.values()]


@dataclass(frozen=True, slots=True)
class _Renamed:
    """A model whose table has another name."""

    name: str
    model: Model

    @property
    def table(self) -> TableId:
        return self.model.table

    @property
    def source(self) -> str:
        return self.model.source

    @property
    def version(self) -> str:
        return self.model.version

    @property
    def schema_version(self) -> int:
        return self.model.schema_version

    @property
    def supersedes(self) -> bool:
        return self.model.supersedes

    @property
    def numbered(self) -> str | None:
        return self.model.numbered

    @property
    def masked(self) -> Masked:
        return self.model.masked

    def types(self) -> dict[str, str]:
        return self.model.types()

    def prepare(self, changes: pa.Table) -> Prepared:
        return self.model.prepare(changes)


@dataclass(frozen=True, slots=True)
class _Target:
    """The table that a join fills: the model's own, or one beside it."""

    name: str
    columns: dict[str, str]
    numbered: str | None = None

    def types(self) -> dict[str, str]:
        return self.columns


def _target(join: Join, model: Model) -> Table:
    return _Target(_beside(model), model.types(), model.numbered) if join.beside else model


def _beside(model: Model) -> str:
    # No engine has names of any length, and this one is longer than the model's.
    short = len(model.name.encode()) <= _LONGEST_NAME
    return f"{BESIDE}.{model.name if short else blake2b(model.name.encode(), digest_size=16).hexdigest()}"


def _save(db: Session, join: Join) -> None:
    db.execute("DELETE FROM headrace.joins WHERE model = $1", [join.model])
    db.execute(
        "INSERT INTO headrace.joins VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)", list(astuple(join))
    )


def _void(db: Session, join: Join) -> None:
    """Take back what the ledger says of what is now emptied."""
    if join.why != "copy":
        return
    since = f"AND kind = 'copy' AND \"after\" >= {join.stands}" if join.beside else ""
    db.execute(f"UPDATE headrace.ledger SET kind = 'void' WHERE model = $1 {since}", [join.model])
    if not join.beside:
        mine = f"model = {literal(join.model)} AND {OPEN}"
        close_records(db, mine, "'superseded', resolution = 'rebuilt'")


def _check(db: Session, join: Join) -> None:
    rows = db.execute(f"SELECT {_COLUMNS} FROM headrace.joins WHERE model = $1", [join.model])
    if rows != [astuple(join)]:
        raise DestinationError(
            f"The join of {join.model} does not stand at offset {join.offset}.", "Run one pipeline only."
        )


def _exchange_records(db: Session, join: Join, model: Model) -> list[str]:
    """Put the open records from beside in the place of the live table's; return new issues."""
    name = literal(model.name)
    resolution = "resync" if join.why == "copy" else "rebuilt"
    status = f"'superseded', resolution = '{resolution}'"
    close_records(db, f"model = {name} AND {OPEN}", status, version=model.version)
    db.keep("_hr_beside", f"SELECT * FROM {JOINING} WHERE model = {name} AND {OPEN}")
    return record_from(db, model, "_hr_beside")


def _balance(db: Session, join: Join, model: Model) -> None:
    """Let the ledger say how many records are open, and what they block, where a join has changed that."""
    name = literal(model.name)
    now = db.execute(
        "SELECT count(*) FILTER (WHERE status <> 'waiting'), count(*) FILTER (WHERE status = 'waiting'), "
        f"coalesce(sum(blocked), 0)::BIGINT FROM {QUARANTINE} WHERE model = {name} AND {OPEN}"
    )
    known = db.execute(
        "SELECT coalesce(sum(quarantined), 0)::BIGINT, coalesce(sum(waiting), 0)::BIGINT, "
        "coalesce(sum(blocked), 0)::BIGINT "
        f"FROM headrace.ledger WHERE model = {name} AND kind <> 'void'"
    )
    opened, waiting, blocked = (each - before for each, before in zip(now[0], known[0], strict=True))
    if opened or waiting or blocked:
        kind = "resync" if join.why == "copy" else "rebuild"
        gone = -opened - waiting - blocked
        moved = numbers(Counts(superseded=gone, quarantined=opened, waiting=waiting, blocked=blocked))
        insert(db, "ledger", [(model.source, model.name, kind, 0, 0, *moved, model.version)])
