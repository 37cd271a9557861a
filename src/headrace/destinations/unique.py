"""Keys that no two rows of a model's table may have, where the source's primary key does not see to it; and
which rows a transaction makes and takes away, for these and for what refers to them.

It is judged when a transaction ends, over what it leaves, as sets: within it rows may swap their keys. Of
rows with one key the one stays that was not touched, or else had the key before, or else came of the earliest
change; the changes that made the others are refused, and nothing of the transaction is kept. When it is made
again without them, rows stand at what they were before: so each time more are refused, until no key is
contested.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from headrace.destinations.session import Session
from headrace.keys import quoted
from headrace.prepared import BEFORE_ALL, Contested, Place, Prepared, Reference, Refused, UniqueKey


@dataclass(slots=True)
class Claimed:
    """What a transaction has changed of a table with a key to keep, or with references from or to it: in the
    temporary relation `places` the rows that it has made, each with its change, in `former` those that it has
    removed, with the columns of `Claims.columns`; in both with the number of the outcome by which it did."""

    model: str
    source: str
    keys: tuple[UniqueKey, ...]
    references: tuple[Reference, ...]
    places: str
    former: str
    outcomes: int = 0
    """How many were noted."""


def note_claims(db: Session, source: str, target: str, name: str, prepared: Prepared) -> None:
    """Note whose keys an outcome takes and gives up, before it is written to the table `target`, which `name`
    names: nothing is referred to in one that only grows beside a model's."""
    claims = prepared.claims
    if claims is not None and name != claims.model:
        claims = replace(claims, references=())
    if claims is None or not (claims.keys or claims.references):
        return
    columns = ("_source_key", *map(quoted, claims.columns))
    claimed = db.claimed.get(target)
    if claimed is None:
        number = len(db.claimed)
        relations = (f"_hr_places_{number}", f"_hr_former_{number}")
        claimed = db.claimed[target] = Claimed(
            claims.model, source, claims.keys, claims.references, *relations
        )
        db.keep(claimed.places, "SELECT *, 0 AS _outcome FROM _hr_given", claims.places.slice(0, 0))
        db.keep(claimed.former, f"SELECT {', '.join(columns)}, 0 AS _outcome FROM {target} t WHERE false")
    claimed.outcomes += 1
    removed = pa.table({"key": prepared.removed})
    if prepared.reset or removed.num_rows:
        given = None if prepared.reset else removed
        # What a truncate removes is not there again if something behind it is refused.
        outcome = "NULL" if prepared.reset else claimed.outcomes
        gone = "" if prepared.reset else f"JOIN _hr_given g ON {db.same_key('t._source_key', 'g.key')}"
        db.execute(
            f"INSERT INTO {claimed.former} SELECT {', '.join(f't.{each}' for each in columns)}, {outcome} "
            f"FROM {target} t {gone} WHERE t._source = $1 "
            f"AND t._source_key NOT IN (SELECT _source_key FROM {claimed.places})",
            [source],
            given,
        )
        where = "" if prepared.reset else "WHERE _source_key IN (SELECT key FROM _hr_given)"
        db.execute(f"DELETE FROM {claimed.places} {where}", given=given)
    db.execute(
        f"INSERT INTO {claimed.places} SELECT *, {claimed.outcomes} FROM _hr_given", given=claims.places
    )


def refuse_contested(db: Session) -> None:
    """Raise Contested if rows that the transaction has made have the keys of others."""
    keyed = {target: claimed for target, claimed in db.claimed.items() if claimed.keys}
    found = {claimed.model: _contested(db, target, claimed) for target, claimed in keyed.items()}
    if refused := {model: changes for model, changes in found.items() if changes}:
        raise Contested(refused)


def _contested(db: Session, target: str, claimed: Claimed) -> list[Refused]:
    """Return the changes to refuse, and those that have to go as the rows of these stand where they were,
    each with the name of a key for which it has to."""
    refused, follows = dict[Place, Refused](), defaultdict[Place, list[Refused]](list)
    for key in claimed.keys:
        for place, winner in _twins(db, target, claimed, key.columns):
            refused.setdefault(place, Refused(*place, key.name or None, winner))
    for key in claimed.keys if refused else ():
        for first, second in _in_the_way(db, target, claimed, key.columns):
            follows[first].append(Refused(*second, key.name or None))
    due = list(refused)
    while due:
        new = {change[:3]: change for change in follows[due.pop()] if change[:3] not in refused}
        refused |= new
        due += new
    return list(refused.values())


def _twins(db: Session, target: str, claimed: Claimed, key: Sequence[str]) -> Iterator[tuple[Place, Place]]:
    """Yield the changes that made rows of which others have the key first, each with the place of the change
    that made that other one, before all where it has the key whatever the transaction does."""
    made = f"{claimed.places} p ON {db.same_key('t._source_key', 'p._source_key')}"
    rows = db.execute(
        f"""SELECT epoch, commit, ordinal, has_it, first_epoch, first_commit, first_ordinal FROM (
          SELECT p.epoch, p.commit, p.ordinal, row_number() OVER w AS place,
            first_value(p.epoch IS NULL OR f._source_key IS NOT NULL) OVER w AS has_it,
            first_value(p.epoch) OVER w AS first_epoch, first_value(p.commit) OVER w AS first_commit,
            first_value(p.ordinal) OVER w AS first_ordinal
          FROM {target} t LEFT JOIN {made}
          LEFT JOIN {claimed.former} f ON {db.same_key("t._source_key", "f._source_key")}
            AND {_same("f", "t", key)}
          WHERE t._source = $1 AND EXISTS (
            SELECT 1 FROM {target} o JOIN {claimed.places} c
            ON {db.same_key("o._source_key", "c._source_key")}
            WHERE o._source = $1 AND {_same("o", "t", key)})
          WINDOW w AS (PARTITION BY {_columns("t", key)}
            ORDER BY p.epoch IS NOT NULL, f._source_key IS NULL, p.epoch, p.commit, p.ordinal)) r
        WHERE place > 1 AND epoch IS NOT NULL""",
        [claimed.source],
    )
    for *place, has_it, epoch, commit, ordinal in rows:
        yield _place(place), BEFORE_ALL if has_it else _place((epoch, commit, ordinal))


def _in_the_way(
    db: Session, target: str, claimed: Claimed, key: Sequence[str]
) -> Iterator[tuple[Place, Place]]:
    """Yield pairs of changes: where the row of the first is what it was before, it has its key again, which
    the row of the second cannot have then."""
    made = f"{claimed.places} p ON {db.same_key('t._source_key', 'p._source_key')}"
    rows = db.execute(
        f"""SELECT b.epoch, b.commit, b.ordinal, p.epoch, p.commit, p.ordinal
        FROM {claimed.places} b
        JOIN {claimed.former} f ON f._source_key = b._source_key AND f._outcome = b._outcome
        JOIN {target} t ON {_same("t", "f", key)} JOIN {made}
        WHERE b.sole AND t._source = $1 AND p._source_key <> b._source_key""",
        [claimed.source],
    )
    for row in rows:
        yield _place(row[:3]), _place(row[3:])


def _place(cells: Sequence[Any]) -> Place:
    epoch, commit, ordinal = cells
    return int(epoch), int(commit), int(ordinal)


def _columns(relation: str, key: Sequence[str]) -> str:
    return ", ".join(f"{relation}.{quoted(name)}" for name in key)


def _same(left: str, right: str, key: Sequence[str]) -> str:
    return " AND ".join(f"{left}.{quoted(name)} = {right}.{quoted(name)}" for name in key)
