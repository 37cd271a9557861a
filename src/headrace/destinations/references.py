"""Foreign keys: every row refers to rows that are there when a transaction ends.

It is judged over what the transaction leaves, as sets: of the rows that it has made, those that refer to
none; of those that it has not touched, the ones whose parents it has taken away; and what refers to these in
turn, until there is no more. Rows that need each other pass. The changes that made the former are refused;
the latter are to be made of their histories, in the same transaction, to find the changes that made them.

A reference is judged where child and parent are in sync with each other, that is show one commit. While they
are not, it is put off: `headrace.foreign_keys` says since when, and once they are again, a transaction of its
own judges all rows. So who has a transaction judged has both models at hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import pyarrow as pa

from headrace.destinations.books import insert
from headrace.destinations.session import Session
from headrace.destinations.unique import Claimed
from headrace.keys import literal, quoted
from headrace.prepared import BEFORE_ALL, Contested, Reference, Refused


def judge_references(
    db: Session, source: str, table_of: Callable[[str], str], wanted: Collection[Reference] = ()
) -> None:
    """Judge the references of what a transaction has changed, but for those that were put off, of which all
    rows are judged if they are `wanted`.

    Raises Contested for rows that refer to none.
    """
    claimed = {each.model: each for each in db.claimed.values()}
    found = {each for claims in claimed.values() for each in claims.references} | set(wanted)
    if not found:
        return
    # Of a model that comes alone to where the other stands, nobody has looked on the way.
    kept = [
        each
        for each in can_be_judged(db, source, found)
        if (each.model in db.moving) == (each.parent in db.moving)
    ]
    known = _known(db, source)
    late = put_off(db, source, kept)
    due = [each for each in late if each in wanted]
    for each in {*found.difference(kept), *late}.difference(due):
        definition, since = known.get((each.model, each.name), ("", None))
        if definition != _definition(each) or since is None:
            _record(db, source, each, _commit_of(db, each.model))
    kept = [each for each in kept if each in due or each not in late]
    for each in due:
        db.make_findable(table_of(each.model), each.columns)
        db.make_findable(table_of(each.parent), each.to)
    _Judgement(db, source, table_of, claimed).judge(kept, due)
    for each in due:
        _record(db, source, each, None)


def can_be_judged(db: Session, source: str, references: Collection[Reference]) -> list[Reference]:
    """Return in a fixed order those of some references whose models are in sync with each other."""
    rows = db.execute('SELECT model, state, "offset" FROM headrace.models WHERE source = $1', [source])
    stands = {str(model): (state, offset) for model, state, offset in rows}
    return [
        each
        for each in sorted(references, key=lambda reference: (reference.model, reference.name))
        if stands.get(each.model, ("",))[0] == "in_sync" and stands[each.model] == stands.get(each.parent)
    ]


def put_off(db: Session, source: str, references: Collection[Reference]) -> list[Reference]:
    """Return those of some references that were put off, or never judged."""
    known = _known(db, source)
    return [each for each in references if known.get((each.model, each.name)) != (_definition(each), None)]


def judge_anew(db: Session, model: str, commit: int) -> None:
    """Have the references from and to a model judged anew, over all rows, since they may be others."""
    db.execute(
        'UPDATE headrace.foreign_keys SET unchecked_since = $1 WHERE (model = $2 OR "references" = $2) '
        "AND unchecked_since IS NULL",
        [commit, model],
    )


def lapsed(db: Session, source: str, constraints: Mapping[str, Collection[str]]) -> list[tuple[str, str]]:
    """Return the foreign keys (model, name) that are known of models, and not among the names of what these
    have."""
    return [(model, name) for model, name in _known(db, source) if name not in constraints.get(model, [name])]


def forget(db: Session, foreign_keys: Collection[tuple[str, str]]) -> None:
    """Forget what is known of foreign keys (model, name)."""
    for key in foreign_keys:
        db.execute("DELETE FROM headrace.foreign_keys WHERE model = $1 AND name = $2", list(key))


def _known(db: Session, source: str) -> Mapping[tuple[str, str], tuple[str, int | None]]:
    rows = db.execute(
        "SELECT model, name, definition, unchecked_since FROM headrace.foreign_keys WHERE source = $1",
        [source],
    )
    return {(model, name): (definition, since) for model, name, definition, since in rows}


def _definition(reference: Reference) -> str:
    """Return what a reference is, as `headrace.foreign_keys` shows it."""
    what = {"columns": reference.columns, "references": reference.parent, "to": reference.to}
    return json.dumps(what, ensure_ascii=False)


def _commit_of(db: Session, model: str) -> int:
    rows = db.execute("SELECT commit FROM headrace.models WHERE model = $1", [model])
    return int(rows[0][0]) if rows else 0


def _record(db: Session, source: str, reference: Reference, since: int | None) -> None:
    model, name = reference.model, reference.name
    forget(db, [(model, name)])
    insert(db, "foreign_keys", [(model, source, name, reference.parent, _definition(reference), since)])


@dataclass(slots=True)
class _Judgement:
    """The rows of one transaction that refer to none: `_hr_refused` of those that it made, `_hr_dangling` of
    others, and in `_hr_gone` those of both that will not be there, as far as is known: of the former that is
    `certain`, the latter may come out as they are."""

    db: Session
    source: str
    table_of: Callable[[str], str]
    claimed: Mapping[str, Claimed]

    def judge(self, references: Collection[Reference], unchecked: Collection[Reference]) -> None:
        """Judge references, all rows of those that are `unchecked`. Raises Contested."""
        if not references:
            return
        self._prepare()
        new = 0
        for each in references:
            if each.model in self.claimed:
                new += self._refuse(each, "")
            if each in unchecked:
                new += self._dangle(each, "")
            elif each.parent in self.claimed and self._lost(each):
                new += self._dangle(
                    each, f"AND EXISTS (SELECT 1 FROM _hr_lost s WHERE {_refers(each, 't', 's')})"
                )
        is_chained = {each.parent for each in references} & {each.model for each in references}
        while new and is_chained:
            new = self._follow(references)
        self._raise()

    def _prepare(self) -> None:
        text, number = "CAST(NULL AS VARCHAR)", "CAST(NULL AS BIGINT)"
        self.db.keep(
            "_hr_refused",
            f"SELECT {text} AS model, {text} AS k, {text} AS name, {number} AS epoch, {number} AS commit, "
            f"{number} AS ordinal, true AS sole WHERE false",
        )
        self.db.keep("_hr_dangling", f"SELECT {text} AS model, {text} AS k WHERE false")
        self.db.keep("_hr_gone", f"SELECT {text} AS model, {text} AS k, true AS certain, 0 AS n WHERE false")

    def _refuse(self, each: Reference, among: str) -> int:
        """Refuse what the transaction made and refers to none."""
        places = self.claimed[each.model].places
        return self.db.change(
            f"INSERT INTO _hr_refused SELECT {literal(each.model)}, p._source_key, {literal(each.name)}, "
            f"p.epoch, p.commit, p.ordinal, p.sole FROM {self.table_of(each.model)} t JOIN {places} p "
            f"ON {self.db.same_key('t._source_key', 'p._source_key')} "
            f"WHERE {self._lacks(each, 'AND g.certain')} "
            f"AND NOT EXISTS (SELECT 1 FROM _hr_refused d WHERE d.model = {literal(each.model)} "
            f"AND d.k = p._source_key) {among}",
            [self.source],
        )

    def _dangle(self, each: Reference, among: str) -> int:
        """Find what the transaction did not touch and refers to none."""
        touched = ""
        if each.model in self.claimed:
            touched = f"AND t._source_key NOT IN (SELECT _source_key FROM {self.claimed[each.model].places})"
        return self.db.change(
            f"INSERT INTO _hr_dangling SELECT {literal(each.model)}, t._source_key "
            f"FROM {self.table_of(each.model)} t WHERE {self._lacks(each, '')} {touched} "
            f"AND NOT EXISTS (SELECT 1 FROM _hr_dangling d WHERE d.model = {literal(each.model)} "
            f"AND d.k = t._source_key) {among}",
            [self.source],
        )

    def _lacks(self, each: Reference, gone: str) -> str:
        """Return the condition that a row `t` refers to none that stays."""
        some = " AND ".join(f"t.{quoted(name)} IS NOT NULL" for name in each.columns)
        return (
            f"t._source = $1 AND {some} AND NOT EXISTS (SELECT 1 FROM {self.table_of(each.parent)} r "
            f"WHERE r._source = $1 AND {_refers(each, 't', 'r')} AND NOT EXISTS (SELECT 1 FROM _hr_gone g "
            f"WHERE g.model = {literal(each.parent)} AND g.k = r._source_key {gone}))"
        )

    def _lost(self, each: Reference) -> int:
        """Find the values that rows referred to before the transaction and can no more: `_hr_lost`."""
        values = ", ".join(f"f.{quoted(name)}" for name in each.to)
        same = " AND ".join(f"r.{quoted(name)} = f.{quoted(name)}" for name in each.to)
        self.db.keep(
            "_hr_lost",
            f"SELECT DISTINCT {values} FROM {self.claimed[each.parent].former} f WHERE NOT EXISTS (SELECT 1 "
            f"FROM {self.table_of(each.parent)} r WHERE r._source = {literal(self.source)} AND {same})",
        )
        return int(self.db.execute("SELECT count(*) FROM _hr_lost")[0][0])

    def _follow(self, references: Collection[Reference]) -> int:
        """Find what refers to the rows that were found last; returns how many there are."""
        ((n,),) = self.db.execute("SELECT coalesce(max(n), 0) + 1 FROM _hr_gone")
        for parent in {each.parent for each in references}:
            claimed = self.claimed.get(parent)
            # Of a row that was there before, or has more changes, it is not known what it falls back to.
            if claimed:
                self.db.execute(
                    f"INSERT INTO _hr_gone SELECT model, k, true, {n} FROM _hr_refused d WHERE sole "
                    f"AND model = {literal(parent)} AND k NOT IN (SELECT _source_key FROM {claimed.former}) "
                    "AND NOT EXISTS (SELECT 1 FROM _hr_gone g WHERE g.model = d.model AND g.k = d.k)"
                )
            self.db.execute(
                f"INSERT INTO _hr_gone SELECT model, k, false, {n} FROM _hr_dangling d "
                f"WHERE model = {literal(parent)} "
                "AND NOT EXISTS (SELECT 1 FROM _hr_gone g WHERE g.model = d.model AND g.k = d.k)"
            )
        new = 0
        for each in references:
            among = (
                f"AND EXISTS (SELECT 1 FROM {self.table_of(each.parent)} r JOIN _hr_gone g "
                f"ON {self.db.same_key('r._source_key', 'g.k')} WHERE g.model = {literal(each.parent)} "
                f"AND g.n = {n} AND r._source = $1 AND {_refers(each, 't', 'r')})"
            )
            if each.model in self.claimed:
                new += self._refuse(each, among)
            new += self._dangle(each, among)
        return new

    def _raise(self) -> None:
        refused: dict[str, list[Refused]] = {}
        for model, epoch, commit, ordinal, name in self.db.execute(
            "SELECT model, epoch, commit, ordinal, name FROM _hr_refused"
        ):
            refused.setdefault(model, []).append(Refused(epoch, commit, ordinal, name, BEFORE_ALL))
        keys: dict[str, list[str]] = {}
        for model, key in self.db.execute("SELECT model, k FROM _hr_dangling"):
            keys.setdefault(model, []).append(key)
        if refused or keys:
            raise Contested(refused, {model: pa.array(each, pa.string()) for model, each in keys.items()})


def _refers(each: Reference, child: str, parent: str) -> str:
    """Return the condition that a row has the values of another."""
    pairs = zip(each.columns, each.to, strict=True)
    return " AND ".join(f"{parent}.{quoted(to)} = {child}.{quoted(name)}" for name, to in pairs)
