"""What every SQL database does as a destination; an engine adds its connection, its types and its errors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import pyarrow as pa
import pyarrow.compute as pc

from headrace.change import Mark, Offset
from headrace.decisions import Outcome
from headrace.destinations import issues, suspending
from headrace.destinations.books import (
    Books,
    close_records,
    count_changes,
    move_progress,
    read_progress,
)
from headrace.destinations.joins import Joins
from headrace.destinations.marts import Marts
from headrace.destinations.references import judge_references
from headrace.destinations.refolding import refold
from headrace.destinations.session import Session, Unfit
from headrace.destinations.shapes import Shape, record_shape, recorded, refuse_drift
from headrace.destinations.steps import StepBook
from headrace.destinations.tables import OPEN, refuse_other_version
from headrace.destinations.unique import note_claims, refuse_contested
from headrace.destinations.waiting import Waits
from headrace.errors import CommitUnknown, DestinationError, ForeignDestination, ModelBroken
from headrace.failpoints import failpoint
from headrace.keys import literal, quoted
from headrace.prepared import Prepared, Reference
from headrace.protocols import DestinationFinding, Model, Scanned, Slice, Table
from headrace.reference import NOTHING_DECIDED
from headrace.standing import ModelState

_REFUSES = "cannot take the model's rows"


class Database(ABC):
    """A destination whose engine speaks SQL. See `Destination` for what each method promises."""

    name: str
    fresh: str
    main: str
    """The schema of models whose name has none."""

    def __init__(self) -> None:
        self._shaped: dict[str, tuple[dict[str, str], str | None]] = {}
        self._numbered: dict[str, str | None] = {}
        self.joins = Joins(self)
        self.marts = Marts(self)
        self.waits = Waits(self)
        self.commits = 0
        self._quiet = 0
        self._is_known = False  # that Headrace's own tables are as this version has them

    @property
    def changes(self) -> int:
        """How many transactions of this process have changed more than how far a source is applied."""
        return self.commits - self._quiet

    # -- what an engine adds

    @abstractmethod
    def open(self, *, memory: int = 0) -> AbstractContextManager[Session]:
        """Open a session for a moment; `memory` (bytes) is for work that needs more than an apply does.

        Raises DestinationBusy and DestinationUnavailable, which pass, and DestinationError, which does not.
        """

    @abstractmethod
    def create(self, db: Session) -> None:
        """Make Headrace's own tables where they are missing."""

    @abstractmethod
    def fault_of(self, error: Exception) -> str | None:
        """Say what the engine has against a table or its rows, quoting no cell; None for any other error."""

    @abstractmethod
    def read(self, queries: Sequence[str], *, read_only: bool = False) -> list[pa.Table]:
        """See `Destination.read`."""

    @contextmanager
    def scan(self, queries: Sequence[str], *, read_only: bool = False) -> Iterator[Iterator[Scanned]]:
        """See `Destination.scan`."""
        tables = self.read(queries, read_only=read_only)
        yield ((table.schema, iter(table.to_batches())) for table in tables)

    @abstractmethod
    def exists(self) -> bool:
        """See `Destination.exists`."""

    @abstractmethod
    def inspect(self) -> Iterator[DestinationFinding]:
        """See `Destination.inspect`."""

    @abstractmethod
    def misnamed(self, model: str) -> tuple[str, str] | None:
        """See `Destination.misnamed`."""

    @abstractmethod
    def tables_may_differ(self) -> bool:
        """Whether others may have changed tables since this was asked last, in an open session."""

    def limits(self, model: Table) -> Sequence[tuple[str, str]]:
        """See `Destination.limits`."""
        del model
        return ()

    def referred_by(self, schema: str, table: str, constraint: str) -> tuple[str, str] | None:
        """Return the table that a foreign key refers to, as schema and name; None if a constraint is none, as
        for an engine that checks none at the end of a transaction."""
        del schema, table, constraint
        return None

    def close(self) -> None:  # noqa: B027 - most engines keep nothing open
        """See `Destination.close`."""

    # -- what is the same for all

    def set_up(self, db: Session) -> None:
        """Make Headrace's own tables where they are missing. Raises DestinationError for those of another
        version."""
        self.create(db)
        if not self._is_known:
            refuse_other_version(db, self.name, self.fresh)
            self._is_known = True

    def place_of(self, model: str) -> tuple[str, str]:
        """Return schema and name of a model's table."""
        schema, dot, table = model.partition(".")
        return (schema, table) if dot else (self.main, schema)

    def folded(self, model: str) -> tuple[str, str]:
        """See `Destination.folded`."""
        return self.place_of(model)

    def table_of(self, model: str) -> str:
        """See `Destination.table_of`."""
        return ".".join(map(quoted, self.place_of(model)))

    @contextmanager
    def writing(
        self,
        source: str,
        *,
        memory: int = 0,
        keep: bool = True,
        steady: bool = False,
        references: Collection[Reference] = (),
    ) -> Iterator[Session]:
        """Open a transaction that changes what is of a source; committed at the end, unless not to `keep`.

        At its end some `references` are judged, too, whose rows it does not change. Raises ModelBroken where
        a constraint that waited for the end refuses a model's rows, and Contested where rows would have the
        keys of others, or refer to none.
        """
        try:
            with self.open(memory=memory) as db:
                if self.tables_may_differ():
                    self._shaped.clear()
                if not self._shaped:
                    self.set_up(db)
                db.begin(source, steady=steady)
                yield db
                judge_references(db, source, self.table_of, references)
                refuse_contested(db)
                if db.counts_issues:
                    issues.settle(db)
                if db.changed:
                    count_changes(db, db.changed)
                db.commit() if keep else db.rollback()
        except Unfit as error:
            self._shaped.clear()
            places = (error.table, self.referred_by(*error.table, error.constraint))
            model = next((db.touched[place] for place in places if place in db.touched), None)
            if model is None:
                raise DestinationError(f"{self.name} refuses the slice: {error}.") from error
            raise _broken(model, str(error)) from error
        except BaseException:
            self._shaped.clear()  # what was made in the transaction is not there
            raise
        self.commits += 1
        if not keep:
            self._shaped.clear()

    def progress(self, source: str) -> Mark | None:
        """See `Destination.progress`. Makes Headrace's own tables if need be."""
        with self.open() as db:
            self.set_up(db)
            return read_progress(db, source)

    def models(self, source: str) -> dict[str, ModelState]:
        """See `Destination.models`."""
        with self.open() as db:
            self.set_up(db)
            rows = db.execute(suspending.STATES, [source])
        return {str(row[0]): ModelState(*row) for row in rows}

    def apply(self, work: Slice) -> Sequence[str]:
        """See `Destination.apply`. In this order, in one transaction:

        1. progress is compared with what the slice says it starts from;
        2. part by part: the model's table is made or widened, its rows are changed, its open records
           that a later good change has healed become superseded, its new records are written; where all
           states of a row are kept, once for all parts of a model at their end;
        3. the ledger has one row per model, the models' and the source's progress move; commit.
        """
        try:
            with self.writing(work.source) as db:
                self._check(db, work)
                books, steps = Books(db, work), StepBook(self, db, work.source)
                for part in work.parts:
                    if part.refolded:
                        books.write_records()
                        books.refolded(part.model, refold(self, db, part.model, part.prepared))
                        continue
                    self.make_table(db, part.model)
                    with self._blaming(part.model.name):
                        books.admit(part, self.table_of(part.model.name))
                        if part.prepared.steps is not None:
                            steps.add(part.model, part.model, part.prepared)
                        else:
                            self._change_rows(db, work.source, part.model, part.prepared)
                        books.take(part)
                    failpoint("destination.apply.part")
                    del part  # before the next one is made
                for settled in steps.settle():
                    books.settle(settled)
                books.close()
                move_progress(db, work.source, work.through, work.position, work.committed_at)
                failpoint("destination.apply.commit")
            self._quiet += not db.changed
        except CommitUnknown:
            # Asked behind whatever is left of that transaction: either it is done, or it never will be.
            if self._settled(work.source) != work.through:
                raise
        failpoint("destination.apply.committed")
        return books.new_issues

    def _settled(self, source: str) -> Mark | None:
        with self.writing(source) as db:
            return read_progress(db, source)

    def redrive(
        self, model: Model, prepared: Prepared, *, dry_run: bool = False, decided: Outcome | None = None
    ) -> dict[str, int]:
        """See `Destination.redrive`."""
        outcome = {model.name: decided} if decided else NOTHING_DECIDED
        return self.waits.refold(model.source, [(model, prepared)], dry_run=dry_run, decided=outcome)

    def decided(self, source: str) -> dict[str, Offset]:
        """See `Destination.decided`."""
        with self.open() as db:
            rows = db.execute(
                'SELECT model, "offset" FROM headrace.decided WHERE model IN '
                "(SELECT model FROM headrace.models WHERE source = $1)",
                [source],
            )
        return {str(model): int(offset) for model, offset in rows}

    def archive_issue(self, issue: str, actor: str) -> None:
        """See `Destination.archive_issue`."""
        with self.writing("") as db:
            issues.archive(db, issue, actor)

    def suspend(self, model: str, source: str, version: str, reason: str, *, tripped: bool = False) -> bool:
        """See `Destination.suspend`."""
        with self.writing(source) as db:
            return suspending.suspend(db, model, source, version, reason, tripped=tripped)

    def hold(self, model: str, source: str, reason: str) -> None:
        """See `Destination.hold`."""
        with self.writing(source) as db:
            suspending.hold(db, model, source, reason)

    def release(self, model: str, source: str) -> bool:
        """See `Destination.release`."""
        with self.writing(source) as db:
            return suspending.release(db, model)

    def reconsider(self, source: str) -> None:
        """See `Destination.reconsider`."""
        with self.writing(source) as db:
            suspending.reconsider(db, source)

    def retire(self, model: str, source: str) -> None:
        """See `Destination.retire`."""
        with self.writing(source) as db:
            db.execute(
                "UPDATE headrace.models SET state = 'retired', updated_at = now() WHERE model = $1", [model]
            )

    def forget_if_reshaped(self, model: Model, *, mend: bool = False, dry_run: bool = False) -> bool:
        """See `Destination.forget_if_reshaped`."""
        self._shaped.clear()
        with self.writing(model.source) as db:
            place = self.place_of(model.name)
            left, found = recorded(db, model.name), db.columns(*place, hidden=True)
            if not mend:
                refuse_drift(model.name, left, found)
            drifted = left is not None and left.columns != found
            is_other = drifted if mend else db.columns(*place) not in ({}, db.types(model))
            if is_other and not dry_run:
                self._forget(db, model)
        return is_other

    def _forget(self, db: Session, model: Model) -> None:
        with self._blaming(model.name, "cannot be built again"):
            self.drop_table(db, model)
        close_records(
            db, f"model = {literal(model.name)} AND {OPEN}", "'superseded', resolution = 'rebuilt'",
            version=model.version,
        )  # fmt: skip
        db.execute("UPDATE headrace.ledger SET kind = 'void' WHERE model = $1", [model.name])
        for table in ("models", "joins", "decided"):
            db.execute(f"DELETE FROM headrace.{table} WHERE model = $1", [model.name])
        db.changed.add(model.name)

    def issue(self, issue: str) -> tuple[str, str, str, str, int]:
        """See `Destination.issue`."""
        with self.open() as db:
            ((model, reason, columns, message, count),) = db.execute(
                "SELECT min(model), min(reason), min(columns), min(message), count(*) "
                "FROM headrace.quarantine WHERE issue = $1",
                [issue],
            )
        return model, reason, columns, message, count

    def foreign(self, source: str) -> ForeignDestination:
        """See `Destination.foreign`."""
        return ForeignDestination(
            f"{self.name} was filled from another log than the one in this state folder (source {source}): "
            "the state folder was deleted, restored or copied.",
            f"Restore the state folder that belongs to it, or {self.fresh} and let it be filled again.",
        )

    def _check(self, db: Session, work: Slice) -> None:
        progress = read_progress(db, work.source)
        if progress is None and work.after.offset:
            raise ForeignDestination(f"{self.name} has no progress for source {work.source}.")
        if progress is not None and progress.log_id != work.after.log_id:
            raise self.foreign(work.source)
        if progress is not None and work.through.offset > progress.offset and progress != work.after:
            raise ForeignDestination(
                f"{self.name} stands at offset {progress.offset}, this pipeline at {work.after.offset}: "
                "another pipeline writes to it.",
                "Run one pipeline only.",
            )

    # -- tables and rows

    def make_table(self, db: Session, model: Table) -> None:
        """Make or widen a model's table; raises ModelBroken when it cannot take the columns, or when others
        have changed it."""
        wanted = (model.types(), model.numbered)
        if self._shaped.get(model.name) != wanted:
            with self._blaming(model.name, "cannot take the model's columns"):
                self._shape(db, model)
            self._shaped[model.name] = wanted
        db.touched[self.place_of(model.name)] = model.name

    def _shape(self, db: Session, model: Table) -> None:
        """Make the model's table, or add what it lacks; columns that the model lost stay, null from now."""
        schema, table = self.place_of(model.name)
        target = self.table_of(model.name)
        wanted = db.types(model)
        left, found = recorded(db, model.name), db.columns(schema, table, hidden=True)
        refuse_drift(model.name, left, found)
        known = db.columns(schema, table)
        if not known:
            self.make_schema(db, schema)
            columns = ", ".join(f"{quoted(name)} {type_}" for name, type_ in wanted.items())
            db.execute(f"CREATE TABLE {target} ({columns}, _source VARCHAR, _source_key VARCHAR)")
        for name, type_ in wanted.items() if known else ():
            column = quoted(name)
            if name not in known:
                db.execute(f"ALTER TABLE {target} ADD COLUMN {column} {type_}")
            elif known[name] != type_:
                # What a mirror cannot convert is copied again; of no other table may a value be lost.
                db.retype(target, column, type_, lenient=getattr(model, "is_mirror", False))
        numbered = self._number_of(db, model, left) if known else model.numbered
        if not known or (left is not None and left.numbered != numbered):
            db.prepare_table(target, numbered)
        now = Shape(found if known == wanted else db.columns(schema, table, hidden=True), numbered)
        if now != left:
            record_shape(db, model.name, now)
        self._numbered[model.name] = numbered

    def _number_of(self, db: Session, model: Table, left: Shape | None) -> str | None:
        """Return the column of a table that is the source key in all of its rows, also in those of earlier
        versions of the model; None if none is."""
        name = model.numbered
        if name is None or left is None or left.numbered != name:
            return None
        # Of another type it may not have every value, which is null then.
        query = f"SELECT count(*) FROM {self.table_of(model.name)} WHERE {quoted(name)} IS NULL"
        is_same = left.columns[name] == db.types(model)[name]
        return name if is_same or db.execute(query) == [(0,)] else None

    def make_schema(self, db: Session, schema: str) -> None:
        """Make a schema where it is missing."""
        db.execute(f"CREATE SCHEMA IF NOT EXISTS {quoted(schema)}")

    def drop_table(self, db: Session, model: Table) -> None:
        """Drop a model's table, if there is one."""
        self._shaped.pop(model.name, None)
        db.execute(f"DROP TABLE IF EXISTS {self.table_of(model.name)}")
        record_shape(db, model.name, None)

    def release_table(self, db: Session, model: Table) -> None:
        """Leave a table that was made here to the user: nothing is known of it any more."""
        self._shaped.pop(model.name, None)
        record_shape(db, model.name, None)
        db.changed.discard(model.name)

    def change_rows(self, db: Session, source: str, model: Table, prepared: Prepared) -> None:
        """Write an outcome to a model's table; raises ModelBroken when it cannot take the rows."""
        with self._blaming(model.name):
            self._change_rows(db, source, model, prepared)

    def _change_rows(self, db: Session, source: str, model: Table, prepared: Prepared) -> None:
        target = self.table_of(model.name)
        note_claims(db, source, target, model.name, prepared)
        if prepared.counts.read or prepared.rows.num_rows:  # a share of whole histories counts no changes
            db.changed.add(model.name)
        if prepared.deleted is not None:
            _mark_deleted(db, source, target, prepared.deleted)
        elif prepared.reset:
            db.execute(f"DELETE FROM {target} WHERE _source = $1", [source])
        if len(prepared.removed):
            numbered = self._numbered[model.name]
            number = (numbered, model.types()[numbered]) if numbered else None
            db.remove(target, source, pa.table({"key": prepared.removed}), number)
        if prepared.rows.num_rows:
            db.append(target, model.types(), source, prepared.rows)

    def exchange_rows(self, db: Session, model: Table, statements: Sequence[str]) -> int:
        """Run statements that change a model's rows; returns how many."""
        db.changed.add(model.name)
        with self._blaming(model.name):
            return sum(db.change(statement) for statement in statements)

    @contextmanager
    def _blaming(self, model: str, what: str = _REFUSES) -> Iterator[None]:
        """Turn what the engine has against a model's table into ModelBroken."""
        try:
            yield
        except Exception as error:
            words = self.fault_of(error)
            if words is None:
                raise
            raise _broken(model, words, what) from error


def _mark_deleted(db: Session, source: str, target: str, deleted: pa.Table) -> None:
    """Mark rows as deleted, see `Prepared.deleted`."""
    live = "_source = $1 AND _deleted_at IS NULL"
    keyed = deleted.filter(pc.is_valid(deleted["key"]))
    if keyed.num_rows:
        db.execute(
            f"UPDATE {target} SET _deleted_at = d.moment FROM _hr_given d "
            f"WHERE {live} AND {db.same_key('_source_key', 'd.key')}",
            [source],
            keyed,
        )
    if keyed.num_rows < deleted.num_rows:
        moment = deleted["moment"].slice(deleted.num_rows - 1)
        db.execute(
            f"UPDATE {target} SET _deleted_at = d.moment FROM _hr_given d WHERE {live}",
            [source],
            pa.table({"moment": moment}),
        )


def _broken(model: str, words: str, what: str = _REFUSES) -> ModelBroken:
    return ModelBroken(
        model, f"Table {model} {what}: {words}", "Mend the table, then start the pipeline again."
    )
