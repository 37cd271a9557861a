"""Open records that wait for a row, or for a key to be free, see `headrace.reference`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pyarrow as pa

from headrace.change import Counts
from headrace.decisions import Outcome
from headrace.destinations.books import count_open, fingerprint, insert, numbers
from headrace.destinations.issues import count_opening
from headrace.destinations.references import can_be_judged, forget, lapsed, put_off
from headrace.destinations.refolding import refold
from headrace.destinations.session import Session
from headrace.destinations.tables import OPEN, QUARANTINE
from headrace.failpoints import failpoint
from headrace.keys import literal, quoted
from headrace.prepared import FOREIGN_KEY, UNIQUE, Prepared, Reference
from headrace.protocols import Model
from headrace.reference import NO_CONSTRAINTS, NOTHING_DECIDED, Due, Key

if TYPE_CHECKING:
    from headrace.destinations.database import Database

_WHOLE = ("TINYINT", "SMALLINT", "INTEGER", "UINTEGER")
_LONGEST = 64
"""How many records in a row may wait for each other before the last learns later whose issue it is of."""


class Waits:
    """The records of a destination that wait."""

    def __init__(self, destination: Database) -> None:
        self._destination = destination

    def refold(
        self,
        source: str,
        outcomes: Sequence[tuple[Model, Prepared]],
        references: Collection[Reference] = (),
        *,
        dry_run: bool = False,
        decided: Mapping[str, Outcome] = NOTHING_DECIDED,
    ) -> dict[str, int]:
        """See `headrace.reference.Waits.refold`."""
        with self._destination.writing(source, keep=not dry_run, references=references) as db:
            found = [
                refold(self._destination, db, model, prepared, decided.get(model.name))
                for model, prepared in outcomes
            ]
            for model, _ in outcomes:
                count_open(db, model.name)
            failpoint("destination.redrive.commit")
        return {
            "resolved": sum(each.resolved for each in found),
            "still_quarantined": sum(each.still_open for each in found),
        } | ({"discarded": sum(each.discarded for each in found)} if decided else {})

    def due(
        self,
        source: str,
        references: Collection[Reference],
        keys: Collection[Key],
        limit: int,
        constraints: Mapping[str, Collection[str]] = NO_CONSTRAINTS,
    ) -> Due:
        """See `headrace.reference.Waits.due`."""
        with self._looking(source) as db:
            judged = can_be_judged(db, source, references)
            ((waiting,),) = db.execute(
                f"SELECT count(*) FROM {QUARANTINE} WHERE source = $1 AND {OPEN} AND waiting_on IS NOT NULL",
                [source],
            )
            asked = [self._asking(db, each) for each in judged]
            asked += [self._contesting(db, each) for each in keys]
            asked += [_gone(db, source, constraints)] if constraints else []
            ready = self._ready(db, asked, limit) if waiting and asked else {}
            late, gone = put_off(db, source, judged), lapsed(db, source, constraints)
            return Due(late, ready, int(waiting), gone)

    def _ready(self, db: Session, asked: Sequence[str], limit: int) -> Mapping[str, pa.Array]:
        """Return the source keys of records that might pass, of those that some queries choose.

        Each record asks for one row: where that is not there, but a record of it is, it asks for what that
        one asks for. So with each step all ask twice as far, and what asks for ever is in a circle.
        """
        db.keep("_hr_asks", _newest(" UNION ALL ".join(asked)))
        self._go_on(db)
        rows = db.execute(
            "SELECT DISTINCT model, key, state <> 'there' AS connected FROM _hr_asks "
            "WHERE state IN ('there', 'asks', 'with') ORDER BY connected DESC, model, key"
        )
        connected = sum(1 for row in rows if row[2])
        chosen: dict[str, list[str]] = {}
        for model, key, _ in rows[: max(limit, connected)]:
            chosen.setdefault(str(model), []).append(str(key))
        return {model: pa.array(each, pa.string()) for model, each in chosen.items()}

    def forget(self, source: str, foreign_keys: Sequence[tuple[str, str]]) -> None:
        """See `headrace.reference.Waits.forget`."""
        with self._destination.writing(source) as db:
            forget(db, foreign_keys)

    def expire(
        self, source: str, references: Collection[Reference], after: Mapping[str, float]
    ) -> Sequence[str]:
        """See `headrace.reference.Waits.expire`."""
        # Looked at often: what changes nothing is no transaction that is kept, and no news for readers.
        with self._looking(source) as db:
            if not _expired(db, source, references, after, self._destination.table_of)[0]:
                return []
        with self._destination.writing(source) as db:
            return _expired(db, source, references, after, self._destination.table_of)[1]

    @contextmanager
    def _looking(self, source: str) -> Iterator[Session]:
        """Open a transaction that keeps nothing but what it needs itself."""
        with self._destination.open() as db:
            self._destination.set_up(db)
            db.begin(source)
            try:
                yield db
            finally:
                db.rollback()

    def _asking(self, db: Session, each: Reference) -> str:
        """Return the query of the records that lack a row of a reference."""
        parent = self._destination.table_of(each.parent)
        has = _has(db, each.to, each.types)
        there = f"EXISTS (SELECT 1 FROM {parent} r WHERE r._source = q.source AND {has})"
        # Where no key tells whose record would bring the row, all of a circle of models are tried.
        otherwise = "asks" if each.by_key else "with" if each.cycle else "missing"
        return (
            f"SELECT q.model, q.key, q.epoch, q.commit, q.ordinal, CASE WHEN {there} THEN 'there' "
            f"ELSE '{otherwise}' END AS state, {literal(each.parent)} AS to_model, "
            f"{db.json_text('q.waiting_on', 'key')} AS to_key FROM {QUARANTINE} q WHERE {_lacking(db, each)}"
        )

    def _contesting(self, db: Session, key: Key) -> str:
        """Return the query of the records whose key no row has now."""
        table = self._destination.table_of(key.model)
        return (
            "SELECT q.model, q.key, q.epoch, q.commit, q.ordinal, 'there' AS state, '' AS to_model, "
            f"'' AS to_key FROM {QUARANTINE} q WHERE q.model = {literal(key.model)} "
            f"AND q.reason = '{UNIQUE}' AND q.{OPEN} AND q.waiting_on IS NOT NULL "
            f"AND {db.json_text('q.waiting_on', 'constraint')} = {literal(key.name)} "
            f"AND NOT EXISTS (SELECT 1 FROM {table} r WHERE r._source = q.source "
            f"AND {_has(db, key.columns, key.types)})"
        )

    def _go_on(self, db: Session) -> None:
        """Let what asks for a row that has a record ask for what that one does, until there is no more to
        learn."""
        ((left,),) = db.execute("SELECT count(*) FROM _hr_asks WHERE state = 'asks'")
        for _ in range(int(left).bit_length() + 1):
            if not left:
                return
            db.keep(
                "_hr_asks_on",
                """SELECT w.model, w.key, w.is_newest,
                CASE WHEN w.state = 'asks' THEN coalesce(n.state, 'missing') ELSE w.state END AS state,
                CASE WHEN n.state = 'asks' THEN n.to_model ELSE w.to_model END AS to_model,
                CASE WHEN n.state = 'asks' THEN n.to_key ELSE w.to_key END AS to_key
                FROM _hr_asks w LEFT JOIN _hr_asks n ON w.state = 'asks' AND n.is_newest
                AND n.model = w.to_model AND n.key = w.to_key""",
            )
            db.keep("_hr_asks", "SELECT * FROM _hr_asks_on")
            ((left,),) = db.execute("SELECT count(*) FROM _hr_asks WHERE state = 'asks'")


def _newest(query: str) -> str:
    """Return a query of records with whether each is the newest of its key, whose row would come."""
    return (
        "SELECT model, key, state, to_model, to_key, row_number() OVER ("
        "PARTITION BY model, key ORDER BY epoch DESC, commit DESC, ordinal DESC) = 1 AS is_newest "
        f"FROM ({query}) a"
    )


def _has(db: Session, columns: Sequence[str], types: Sequence[str]) -> str:
    """Return the condition that a row `r` has what a record `q` waits for."""
    return " AND ".join(
        f"r.{quoted(name)} = CAST({db.json_text('q.waiting_on', 'values', i)} "
        f"AS {'BIGINT' if type_ in _WHOLE else type_})"
        for i, (name, type_) in enumerate(zip(columns, types, strict=True))
    )


def _gone(db: Session, source: str, constraints: Mapping[str, Collection[str]]) -> str:
    """Return the query of records for a foreign or unique key that their model has no more."""
    named = db.json_text("q.waiting_on", "constraint")
    others = []
    for model, names in constraints.items():
        other = f"AND {named} NOT IN ({', '.join(map(literal, names))})" if names else ""
        others.append(f"(q.model = {literal(model)} {other})")
    return (
        "SELECT q.model, q.key, q.epoch, q.commit, q.ordinal, 'there' AS state, '' AS to_model, "
        f"'' AS to_key FROM {QUARANTINE} q WHERE q.source = {literal(source)} "
        f"AND q.reason IN ('{FOREIGN_KEY}', '{UNIQUE}') AND q.waiting_on IS NOT NULL AND q.{OPEN} "
        f"AND ({' OR '.join(others)})"
    )


def _lacking(db: Session, each: Reference) -> str:
    """Return the condition that a record `q` is open since it lacks a row of a reference."""
    return (
        f"q.model = {literal(each.model)} AND q.reason = '{FOREIGN_KEY}' AND q.{OPEN} "
        f"AND {db.json_text('q.waiting_on', 'constraint')} = {literal(each.name)}"
    )


def _join_issue(db: Session, each: Reference) -> int:
    """Let what waits for a row with a record be of that one's issue, if that is one of failures; returns how
    many became so, or are so no more."""
    own, parents = fingerprint("'waiting'", "q"), fingerprint("'waiting'", "p")
    key = db.json_text("q.waiting_on", "key")
    failed = (
        f"SELECT p.key, min(p.issue) AS issue FROM {QUARANTINE} p WHERE p.model = {literal(each.parent)} "
        f"AND p.{OPEN} AND (p.status = 'quarantined' OR p.issue <> {parents}) GROUP BY p.key"
    )
    waiting = f"{_lacking(db, each)} AND q.status = 'waiting'"
    left = db.change(
        f"UPDATE {QUARANTINE} q SET issue = {own} WHERE {waiting} AND q.issue <> {own} "
        f"AND NOT EXISTS (SELECT 1 FROM ({failed}) f WHERE f.key = {key})"
    )
    joined = db.change(
        f"UPDATE {QUARANTINE} q SET issue = f.issue FROM ({failed}) f WHERE {waiting} "
        f"AND f.key = {key} AND q.issue <> f.issue"
    )
    return left + joined


def _expired(
    db: Session,
    source: str,
    references: Collection[Reference],
    after: Mapping[str, float],
    table_of: Callable[[str], str],
) -> tuple[int, list[str]]:
    """Let what waits join the issues of its parents, and quarantine what waits in vain; returns how many
    records are others by it, and the ids of issues that are new."""
    changed, issues = 0, list[str]()
    ((waits,),) = db.execute(
        f"SELECT count(*) FROM {QUARANTINE} WHERE source = $1 AND status = 'waiting'", [source]
    )
    if not waits:
        return changed, issues
    for _ in range(_LONGEST):
        if not (joined := sum(_join_issue(db, each) for each in references if each.by_key)):
            break
        changed += joined
    for each in references:
        orphans, new = _orphan(db, source, each, after[each.model], table_of(each.parent))
        changed, issues = changed + orphans, issues + new
    return changed, issues


def _orphan(db: Session, source: str, each: Reference, after: float, parent: str) -> tuple[int, list[str]]:
    """Quarantine what waits for a row of a reference in vain, the rows of the `parent` being in that table;
    returns how many records, and the ids of issues that are new."""
    late = f"q.waiting_since <= now() - INTERVAL '{after:.3f} seconds'"
    of_parent = f"SELECT 1 FROM {QUARANTINE} p WHERE p.model = {literal(each.parent)} AND p.key = "
    of_parent += db.json_text("q.waiting_on", "key")
    if each.by_key:
        late = (
            f"({late} OR EXISTS ({of_parent} AND p.status = 'discarded')) "
            f"AND NOT EXISTS ({of_parent} AND p.{OPEN})"
        )
    there = f"SELECT 1 FROM {parent} r WHERE r._source = q.source AND {_has(db, each.to, each.types)}"
    where = f"{_lacking(db, each)} AND q.status = 'waiting' AND {late} AND NOT EXISTS ({there})"
    cause = fingerprint(record="q")
    db.keep(
        "_hr_orphans",
        f"SELECT q.id, {cause} AS issue, 'quarantined' AS status, q.source, q.model, q.stage, q.reason, "
        f"q.columns, q.constraint_name, q.message FROM {QUARANTINE} q WHERE {where}",
    )
    rows = db.execute(
        f"SELECT DISTINCT issue FROM _hr_orphans WHERE issue NOT IN (SELECT issue FROM {QUARANTINE})"
    )
    ((version,),) = db.execute("SELECT version FROM headrace.models WHERE model = $1", [each.model])
    count_opening(db, version, "_hr_orphans")
    orphans = db.change(
        f"UPDATE {QUARANTINE} q SET status = 'quarantined', issue = o.issue FROM _hr_orphans o "
        "WHERE q.id = o.id"
    )
    if orphans:
        moved = numbers(Counts(quarantined=orphans, waiting=-orphans))
        insert(db, "ledger", [(source, each.model, "orphaned", 0, 0, *moved, "")])
    return orphans, [str(issue) for (issue,) in rows]
