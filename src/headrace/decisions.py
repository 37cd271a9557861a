"""What people decide about single changes: patched, discarded, or left as the source wrote them after all.

A decision is an entry of the log and staged like data, so that whatever is prepared after it, be it all of
history, says the same. The change itself is never edited: a decision names it by its position, for one model,
and of several about one change the latest counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.change import Entry, Offset, Position, TableId, TableSchema
from headrace.keys import identity, literal, quoted

if TYPE_CHECKING:
    import numpy.typing as npt

Verb = Literal["patch", "discard", "undo"]

PLACE = ("epoch", "commit", "ordinal")
"""What names a change: its position in the source."""

_ABOUT = pa.schema([*((name, pa.int64()) for name in PLACE), ("actor", pa.string()), ("reason", pa.string())])


class Decided(NamedTuple):
    """The change that a decision is about: its position, its offset in the log, and its source key, None
    where that is not known since the change could not be decoded."""

    epoch: int
    commit: int
    ordinal: int
    offset: Offset
    key: str | None


@dataclass(frozen=True, slots=True)
class Decision:
    """What one person decided about some changes, for one model.

    - `patch`: the model reads `cells` (the source's text, or None) in the place of the row's own.
    - `discard`: the model does not see the changes; their keys stand at what they were.
    - `undo`: nothing that was decided before counts.
    """

    verb: Verb
    model: str
    changes: tuple[Decided, ...]
    actor: str
    reason: str = ""
    cells: Mapping[str, str | None] | None = None

    def to_json(self) -> str:
        """Render as one line of JSON, the payload of a decision's entry."""
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Decision:
        """Read back what `to_json` wrote."""
        raw = json.loads(text)
        raw["changes"] = tuple(Decided(*change) for change in raw["changes"])
        return cls(**raw)

    def entry(self, table: TableId, at: Position, now: int) -> Entry:
        """Return its entry: of a table, made at a time (microseconds) with the stream at a position."""
        return Entry("decision", table, at, at, now, 0, 0, self.to_json().encode())


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a redrive of some keys is to write of the decisions about their changes.

    `discarded` has their places with `actor` and `reason`, `patched` those of patched ones with `actor`;
    `records` are those that the discarded changes would have. All decisions `through` an offset are in it, 0
    while there are others yet.
    """

    through: Offset
    discarded: pa.Table
    patched: pa.Table
    records: pa.Table


class Decisions:
    """What was decided about the changes of one model's table, of all decisions through an offset."""

    def __init__(self, decisions: Sequence[tuple[Offset, Decision]]) -> None:
        """Take decisions with the offsets of their entries, in the log's order."""
        latest = {change[:3]: (change, decision) for _, decision in decisions for change in decision.changes}
        self.all = tuple(decisions)
        self._changes = [change for change, _ in latest.values()]
        self._decisions = [decision for _, decision in latest.values()]
        self._table = pa.table(
            {
                **{
                    f"_{name}": pa.array([getattr(change, name) for change in self._changes], pa.int64())
                    for name in PLACE
                },
                "_hr_which": pa.array(range(len(latest)), pa.int64()),
            }
        )
        self._at = pa.array({change.offset for change in self._changes}, pa.int64())

    @property
    def identity(self) -> object:
        """All that was decided."""
        return self.all

    def last(self, through: Offset) -> Offset:
        """Return the offset of the last decision through an offset, 0 if there is none."""
        return max((offset for offset, _ in self.all if offset <= through), default=0)

    def keys(self, after: Offset | None = None, through: Offset | None = None) -> list[str | None]:
        """Return the source keys of the changes that decisions in `(after, through]` are about."""
        decided = (
            decision
            for offset, decision in self.all
            if (after is None or offset > after) and (through is None or offset <= through)
        )
        return list(dict.fromkeys(change.key for decision in decided for change in decision.changes))

    def about(self, verb: Verb, keys: Sequence[str | None]) -> pa.Table:
        """Return the places of the changes of some source keys that are decided on so, with `actor` and
        `reason`."""
        wanted = set(keys)
        chosen = [
            (*change[:3], decision.actor, decision.reason)
            for change, decision in zip(self._changes, self._decisions, strict=True)
            if decision.verb == verb and change.key in wanted
        ]
        return pa.Table.from_pylist([dict(zip(_ABOUT.names, each, strict=True)) for each in chosen], _ABOUT)

    def taken(self, schema: TableSchema, changes: pa.Table) -> pa.Table:
        """Return changes (as `Staging.read` gives them) as they are decided to be read.

        Patched cells have their new text. What is discarded is left out; of a change of the key itself it is
        still so that the old key's row goes.
        """
        rows, which = self._found(changes)
        if not len(rows):
            return changes
        verbs = np.array([self._decisions[i].verb for i in which])
        changes = self._patched(schema, changes, rows[verbs == "patch"], which[verbs == "patch"])
        discarded = rows[verbs == "discard"]
        if not len(discarded):
            return changes
        kept = np.ones(changes.num_rows, dtype=bool)
        kept[discarded] = False
        numbered = changes.append_column("_hr_row", pa.array(np.arange(changes.num_rows)))
        gone = _old_halves(schema, numbered.take(pa.array(discarded)))
        rest = numbered.filter(pa.array(kept))
        if gone.num_rows:
            rest = pa.concat_tables([rest, gone.cast(rest.schema)]).sort_by("_hr_row")
        return rest.drop_columns("_hr_row")

    def _found(self, changes: pa.Table) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the numbers of the changes that were decided on, and of what was decided."""
        near = np.flatnonzero(pc.is_in(changes["_offset"], value_set=self._at).to_numpy())
        if not len(near):
            return near, near
        names = [f"_{name}" for name in PLACE]
        some = changes.select(names).take(pa.array(near)).append_column("_hr_row", pa.array(near))
        found = some.join(self._table, names, join_type="inner").sort_by("_hr_row")
        return found["_hr_row"].to_numpy(), found["_hr_which"].to_numpy()

    def _patched(
        self,
        schema: TableSchema,
        changes: pa.Table,
        rows: npt.NDArray[np.int64],
        which: npt.NDArray[np.int64],
    ) -> pa.Table:
        """Return changes with the cells of some rows replaced; a cell that is patched is known."""
        if not len(rows):
            return changes
        cells: dict[str, dict[int, str | None]] = {}
        for row, i in zip(rows.tolist(), which.tolist(), strict=True):
            for name, value in (self._decisions[i].cells or {}).items():
                cells.setdefault(name, {})[row] = value
        present = {column.name for column in schema.columns} & set(changes.column_names)
        for name in present & cells.keys():
            changes = _replaced(changes, name, cells[name])
        return _known(changes, rows.tolist(), cells)


def _replaced(changes: pa.Table, name: str, cells: Mapping[int, str | None]) -> pa.Table:
    mask = np.zeros(changes.num_rows, dtype=bool)
    mask[list(cells)] = True
    values = pa.array([cells[row] for row in sorted(cells)], pa.string())
    column = pc.replace_with_mask(changes[name].combine_chunks(), pa.array(mask), values)
    return changes.set_column(changes.schema.get_field_index(name), name, column)


def _known(changes: pa.Table, rows: Sequence[int], cells: Mapping[str, Mapping[int, object]]) -> pa.Table:
    """Clear `_unchanged` of rows in which no cell is unknown any more."""
    lists = changes["_unchanged"].combine_chunks()
    mask = np.zeros(changes.num_rows, dtype=bool)
    for row in rows:
        unknown = lists[row].as_py() or ()
        mask[row] = all(row in cells.get(name, ()) for name in unknown)
    cleared = pc.if_else(pa.array(mask), pa.scalar(None, lists.type), lists)
    return changes.set_column(changes.schema.get_field_index("_unchanged"), "_unchanged", cleared)


def _old_halves(schema: TableSchema, changes: pa.Table) -> pa.Table:
    """Return of changes that gave their rows another key the half that is of the old one: its row goes."""
    import duckdb

    moved = changes.filter(pc.is_valid(changes["_before"]))
    if not moved.num_rows:
        return moved
    own, before = identity(schema)
    names = schema.key or [column.name for column in schema.columns]
    cells = ", ".join(f"_before[{literal(name)}] AS {quoted(name)}" for name in names)
    with duckdb.connect() as db:
        db.register("moved", moved)
        return db.sql(
            f"SELECT * REPLACE ('d' AS _op, NULL AS _before, {cells}) FROM moved "
            f"WHERE {before} IS DISTINCT FROM {own}"
        ).to_arrow_table()
