"""How a model's table takes in a copy: in many transactions, and seen as whole only after the last.

A table that is new is filled in place and stands as `joining` until it is attached. One that is live
already goes on as it is, while the new content grows beside it; at the end one transaction writes what
differs between the two, and nothing else. Its records grow beside as well, since those of the live table
are of other changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Literal

import duckdb

from headrace.change import Mark, Offset, Position
from headrace.destinations.books import heal, insert, move_progress, numbers, record, stand
from headrace.destinations.duckdb import DuckDBDestination
from headrace.destinations.multiset import take_off
from headrace.destinations.tables import CREATE, JOINING, OPEN, QUARANTINE, target_of
from headrace.errors import DestinationError
from headrace.failpoints import failpoint
from headrace.keys import literal, quoted
from headrace.protocols import Counts, Model, Prepared

BESIDE = "headrace_joining"
"""The schema of tables that grow beside a live one."""

_EXCHANGE_MEMORY = 256 << 20  # two hashes of every key, on both sides

Phase = Literal["copy", "stream", "done"]
Why = Literal["copy", "rebuild", "dry run"]

_EXAMPLES = 10  # source keys of each kind of difference that a rebuild keeps
_COLUMNS = 'model, source, version, "begin", "end", stands, phase, "offset", target, why'


def joins_of(source: str) -> str:
    """Return the query whose rows are the fields of `Join`, for one source."""
    return f"SELECT {_COLUMNS} FROM headrace.joins WHERE source = {literal(source)}"


@dataclass(frozen=True, slots=True)
class Join:
    """How far a model has taken in a copy, which the log holds between the offsets `begin` and `end`.

    The phase `copy` reads the copied rows, `stream` the changes that they do not contain, through
    `target`; `offset` is how far the phase is. `stands` is the end of the copy that the live table is
    made of, 0 if it is filled in place. `why`: a new copy, or all of history once more under the model as
    it is now, which a dry run only compares with the live table.
    """

    model: str
    source: str
    version: str
    begin: Offset
    end: Offset
    stands: Offset
    phase: Phase
    offset: Offset
    target: Offset
    why: Why = "copy"

    @property
    def beside(self) -> bool:
        """Whether the live table goes on meanwhile."""
        return self.stands > 0


class Joins:
    """The joins of all models of a destination."""

    def __init__(self, destination: DuckDBDestination) -> None:
        self._destination = destination

    def of(self, source: str) -> dict[str, Join]:
        """Return the newest join of every model of a source."""
        with self._destination.open() as db:
            db.execute(CREATE)
            rows = db.execute(joins_of(source)).fetchall()
        return {str(row[0]): Join(*row) for row in rows}

    def start(self, join: Join, model: Model) -> None:
        """Start a join with an empty table, in place or beside; one that did not end is given up."""
        target = _target(join, model)
        with self._destination.open() as db:
            db.execute(CREATE)
            db.execute("BEGIN")
            # Of an earlier join, which may have been of other columns.
            self._destination.drop_table(db, _Target(_beside(model), {}))
            db.execute(f"DELETE FROM {JOINING} WHERE model = ?", [model.name])
            self._destination.make_table(db, target)
            db.execute(f"DELETE FROM {target_of(target.name)} WHERE _source = ?", [join.source])
            _void(db, join)
            if not join.beside:
                stand(db, model, 0, Position(0, 0, 0), 0, in_sync=False)
            _save(db, join)
            db.execute("COMMIT")

    def step(self, join: Join, following: Join, model: Model, prepared: Prepared) -> Sequence[str]:
        """Take in one slice of a phase and move to `following`, in one transaction; returns the ids of
        issues that are new.

        Raises DestinationError when the join does not stand at `join`: another pipeline moved it.
        """
        through = following.offset if following.phase == join.phase else join.end
        records = JOINING if join.beside else QUARANTINE
        head = (join.source, model.name)
        with self._destination.open() as db:
            db.execute("BEGIN")
            _check(db, join)
            target = _target(join, model)
            self._destination.make_table(db, target)
            healed = heal(db, model.name, prepared, join.end, records)
            healed += take_off(db, join.source, model.name, target, prepared, join.end, records)
            self._destination.change_rows(db, join.source, target, prepared)
            issues = record(db, model, prepared.records, records)
            # The live table has accounted for the changes already, and for the rows of its own copy.
            if join.why == "copy" and (join.phase == "copy" or not join.beside):
                kind = "copy" if join.phase == "copy" else "apply"
                rows = [(*head, kind, join.offset, through, *numbers(prepared.counts), model.version)]
                if healed:
                    moved = numbers(Counts(superseded=healed, quarantined=-healed))
                    rows.append((*head, "superseded", join.offset, through, *moved, model.version))
                insert(db, "ledger", rows)
            _save(db, following)
            failpoint("destination.join.commit")
            db.execute("COMMIT")
        return [] if join.beside else issues

    def attach(
        self, join: Join, model: Model, at: Mark, position: Position, committed_at: int, *, in_sync: bool
    ) -> tuple[Difference, Sequence[str]]:
        """End a join: what grew beside replaces what differs, and the model stands at `at`.

        Returns in how many source keys the two differed, and the ids of issues that are new. A dry run
        leaves the live table as it is. Of a rebuild, headrace.rebuilds tells the same with examples.
        """
        difference, issues = NO_DIFFERENCE, list[str]()
        with self._destination.open(memory=_EXCHANGE_MEMORY if join.beside else 0) as db:
            db.execute("BEGIN")
            _check(db, join)
            if join.beside:
                self._destination.make_table(db, model)
                difference = _compare(db, join, model)
                if join.why != "copy":
                    _tell(db, join, model, at, difference)
                if join.why != "dry run":
                    _exchange(db, join, model)
                    issues = _exchange_records(db, join, model)
                db.execute(f"DELETE FROM {JOINING} WHERE model = ?", [model.name])
                self._destination.drop_table(db, _target(join, model))
            if join.why != "dry run":
                stand(db, model, at.offset, position, committed_at, in_sync=in_sync)
                _balance(db, join, model)
                move_progress(db, join.source, at, position, committed_at)
            _save(db, replace(join, phase="done", stands=join.end))
            failpoint("destination.join.attach")
            db.execute("COMMIT")
        return difference, issues


@dataclass(frozen=True, slots=True)
class Difference:
    """In how many source keys what grew beside a live table differs from it."""

    added: int
    removed: int
    changed: int


NO_DIFFERENCE = Difference(0, 0, 0)


@dataclass(frozen=True, slots=True)
class _Target:
    """The table that a join fills: the model's own, or one beside it."""

    name: str
    columns: dict[str, str]

    def types(self) -> dict[str, str]:
        return self.columns


def _target(join: Join, model: Model) -> _Target:
    return _Target(_beside(model) if join.beside else model.name, model.types())


def _beside(model: Model) -> str:
    return f"{BESIDE}.{model.name}"


def _save(db: duckdb.DuckDBPyConnection, join: Join) -> None:
    db.execute("DELETE FROM headrace.joins WHERE model = ?", [join.model])
    db.execute("INSERT INTO headrace.joins VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", list(astuple(join)))


def _void(db: duckdb.DuckDBPyConnection, join: Join) -> None:
    """Take back what the ledger says of what is now emptied."""
    if join.why != "copy":
        return
    since = f"AND kind = 'copy' AND \"after\" >= {join.stands}" if join.beside else ""
    db.execute(f"UPDATE headrace.ledger SET kind = 'void' WHERE model = ? {since}", [join.model])
    if not join.beside:
        db.execute(
            f"UPDATE {QUARANTINE} SET status = 'superseded', resolution = 'rebuilt', "
            f"resolved_at = now() WHERE model = ? AND {OPEN}",
            [join.model],
        )


def _check(db: duckdb.DuckDBPyConnection, join: Join) -> None:
    rows = db.execute(f"SELECT {_COLUMNS} FROM headrace.joins WHERE model = ?", [join.model]).fetchall()
    if rows != [astuple(join)]:
        raise DestinationError(
            f"The join of {join.model} does not stand at offset {join.offset}.", "Run one pipeline only."
        )


def _compare(db: duckdb.DuckDBPyConnection, join: Join, model: Model) -> Difference:
    """Find the source keys in which the live table and the one beside it differ: `_hr_differs`."""
    live, beside = target_of(model.name), target_of(_target(join, model).name)
    names = [quoted(name) for name in model.types()]
    # Two hashes: one of 64 bits may meet by chance, both do not.
    hashes = (f"hash({', '.join(cells)})::HUGEINT" for cells in (names, [*names[::-1], "'again'"]))
    sums = ", ".join(f"sum({each}) AS h{i}" for i, each in enumerate(hashes))
    state = (
        f"SELECT _source_key AS k, count(*) AS n, {sums} FROM {{}} "
        f"WHERE _source = {literal(join.source)} GROUP BY k"
    )
    db.execute(
        f"""CREATE OR REPLACE TEMP TABLE _hr_differs AS SELECT coalesce(a.k, b.k) AS k,
        CASE WHEN a.n IS NULL THEN 'added' WHEN b.n IS NULL THEN 'removed' ELSE 'changed' END AS how
        FROM ({state.format(live)}) a FULL JOIN ({state.format(beside)}) b ON a.k = b.k
        WHERE a.n IS DISTINCT FROM b.n OR a.h0 IS DISTINCT FROM b.h0 OR a.h1 IS DISTINCT FROM b.h1"""
    )
    counts = db.execute(
        "SELECT count(*) FILTER (how = 'added'), count(*) FILTER (how = 'removed'), "
        "count(*) FILTER (how = 'changed') FROM _hr_differs"
    ).fetchall()
    return Difference(*counts[0])


def _exchange(db: duckdb.DuckDBPyConnection, join: Join, model: Model) -> None:
    """Write to the live table what differs from the one beside it, key by key."""
    live, beside = target_of(model.name), target_of(_target(join, model).name)
    chosen = f"_source = {literal(join.source)} AND _source_key IN (SELECT k FROM _hr_differs)"
    db.execute(f"DELETE FROM {live} WHERE {chosen}")
    db.execute(f"INSERT INTO {live} BY NAME SELECT * FROM {beside} WHERE {chosen}")


def _exchange_records(db: duckdb.DuckDBPyConnection, join: Join, model: Model) -> list[str]:
    """Put the open records from beside in the place of the live table's; return new issues."""
    name = literal(model.name)
    resolution = "resync" if join.why == "copy" else "rebuilt"
    db.execute(
        f"UPDATE {QUARANTINE} SET status = 'superseded', resolution = '{resolution}', resolved_at = now() "
        f"WHERE model = {name} AND {OPEN}"
    )
    records = db.sql(
        f"SELECT * REPLACE (epoch_us(committed_at) AS committed_at) FROM {JOINING} "
        f"WHERE model = {name} AND {OPEN}"
    ).to_arrow_table()
    return record(db, model, records)


def _tell(db: duckdb.DuckDBPyConnection, join: Join, model: Model, at: Mark, difference: Difference) -> None:
    """Write what a rebuild came to: rows, records, differences, and some of these with both rows."""
    live, beside = target_of(model.name), target_of(_target(join, model).name)
    cells = ", ".join(f"{literal(name)}: {quoted(name)}" for name in model.types())
    some = f"(FROM _hr_differs QUALIFY row_number() OVER (PARTITION BY how ORDER BY k) <= {_EXAMPLES})"

    def rows(table: str) -> str:
        return (
            f"(SELECT _source_key AS k, to_json(list({{{cells}}})) AS rows FROM {table} WHERE _source = "
            f"{literal(join.source)} AND _source_key IN (SELECT k FROM {some}) GROUP BY k)"
        )

    ((examples,),) = db.execute(
        f"""SELECT to_json(coalesce(list({{'how': how, 'key': d.k, 'before': a.rows, 'after': b.rows}}
        ORDER BY how, d.k), [])) FROM {some} d
        LEFT JOIN {rows(live)} a USING (k) LEFT JOIN {rows(beside)} b USING (k)"""
    ).fetchall()
    ((count, opened),) = db.execute(
        f"SELECT (SELECT count(*) FROM {beside}), "
        f"(SELECT count(*) FROM {JOINING} WHERE model = {literal(model.name)} AND {OPEN})"
    ).fetchall()
    counts = (count, opened, *astuple(difference))
    facts = (model.name, join.source, model.version, join.why == "dry run", at.offset, *counts, examples)
    insert(db, "rebuilds", [facts])


def _balance(db: duckdb.DuckDBPyConnection, join: Join, model: Model) -> None:
    """Let the ledger say how many records are open, where a join has changed that."""
    name = literal(model.name)
    records = f"SELECT count(*) FROM {QUARANTINE} WHERE model = {name} AND {OPEN}"
    known = (
        f"SELECT coalesce(sum(quarantined), 0) FROM headrace.ledger WHERE model = {name} AND kind <> 'void'"
    )
    ((difference,),) = db.execute(f"SELECT (({records}) - ({known}))::BIGINT").fetchall()
    if difference:
        kind = "resync" if join.why == "copy" else "rebuild"
        moved = numbers(Counts(superseded=-difference, quarantined=difference))
        insert(db, "ledger", [(model.source, model.name, kind, 0, 0, *moved, model.version)])
