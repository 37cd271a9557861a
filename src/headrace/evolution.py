"""How a table's models follow its shape: what differs between two shapes, and what is done about it.

What was judged stands in the log's note `evolution`: a change is judged once, by the policy of that day. It
is judged when it is staged, before any row of the new shape is applied.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from headrace.change import Column, TableId, TableSchema
from headrace.protocols import LogIndex
from headrace.schema_policy import Action, ChangeKind

_NOTE = "evolution"
_KEPT = 200
"""Judgements that the note keeps of one table, the newest ones."""

_INTEGERS = ("smallint", "integer", "bigint", "numeric")
_SIZED = re.compile(r"(character varying|numeric|bit varying)\((\d+)(?:,(-?\d+))?\)")
_UNBOUNDED = {"character varying": ("character varying", "text"), "bit varying": ("bit varying",)}


class ShapeChange(NamedTuple):
    """One difference between two shapes of a table, in words, and the names of the columns that it is of."""

    kind: ChangeKind
    columns: tuple[str, ...]
    what: str


class Judgement(NamedTuple):
    """What was done about a change that came with a version of the shape."""

    version: int
    kind: ChangeKind
    what: str
    action: Action


@dataclass(frozen=True, slots=True)
class Evolution:
    """How the models of one table follow it.

    `raw` is the newest shape that was judged, `shown` the one that a mirror has. `awaits` says what a
    person has to look at before the models go on, '' if nothing. `judged` are the newest judgements.
    """

    raw: TableSchema
    shown: TableSchema
    awaits: str = ""
    judged: tuple[Judgement, ...] = ()

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Evolution:
        """Read back what `asdict` gave."""
        shown, seen = TableSchema.from_dict(raw["shown"]), TableSchema.from_dict(raw["raw"])
        return cls(seen, shown, raw["awaits"], tuple(Judgement(*each) for each in raw["judged"]))

    def follow(self, shape: TableSchema, action: Callable[[ChangeKind], Action]) -> Evolution:
        """Return what becomes of it with the next shape, by the policy `action`."""
        changes = [(change, action(change.kind)) for change in changes_between(self.raw, shape)]
        frozen = {name for change, done in changes if done == "freeze" for name in change.columns}
        judged = tuple(Judgement(shape.version, c.kind, c.what, done) for c, done in changes)
        waits = [self.awaits, *(change.what for change, done in changes if done == "suspend")]
        return Evolution(
            shape,
            replace(shape, columns=tuple(self._columns(shape, frozen))),
            "; ".join(filter(None, waits)),
            (*self.judged, *judged)[-_KEPT:],
        )

    def _columns(self, shape: TableSchema, frozen: set[str]) -> Iterator[Column]:
        """Yield the columns that a mirror shows from now on."""
        before = {column.name: column for column in self.raw.columns}
        shown = {column.name: column for column in self.shown.columns}
        now = {column.name for column in shape.columns}
        for column in shape.columns:
            was, has = before.get(column.name), shown.get(column.name)
            if was is None and has is None:
                if column.name not in frozen:
                    yield column
            elif has is not None:
                yield has if was == column or column.name in frozen else column
        # Those that the source has dropped: null from now on, where the shape is to stay.
        yield from (
            c for c in self.shown.columns if c.name not in now and (c.name in frozen or c.name not in before)
        )


class Evolutions:
    """The evolution of every table of a source, as the log's note has it."""

    def __init__(self, log: LogIndex, action: Callable[[TableId, ChangeKind], Action]) -> None:
        self._log = log
        self._action = action
        self._text: str | None = None
        self._known: dict[TableId, Evolution] = {}
        self.reload()

    def reload(self) -> bool:
        """Take over what others have noted; True if anything has changed."""
        if (text := self._log.note(_NOTE)) == self._text:
            return False
        self._text, self._known = text, read_evolutions(self._log)
        return True

    def of(
        self, shapes: Iterable[TableSchema], *, keep: bool
    ) -> dict[TableId, tuple[Evolution, tuple[Judgement, ...]]]:
        """Return how the models of tables follow their newest shapes, and what of that is judged just now.

        Unless to `keep` it, it is as if nothing had been asked.
        """
        found = {shape.table: self._of(shape) for shape in shapes}
        fresh = {table: each for table, (each, _, is_new) in found.items() if is_new}
        if keep and fresh:
            # Once for all of them: the note holds every table.
            with self._log.writing():
                self._known = read_evolutions(self._log) | fresh
                self._text = _write(self._log, self._known)
        return {table: (each, judged) for table, (each, judged, _) in found.items()}

    def _of(self, shape: TableSchema) -> tuple[Evolution, tuple[Judgement, ...], bool]:
        """Return how a table's models follow a shape, what is judged just now, and whether that is new."""
        known = self._known.get(shape.table)
        if known is None:
            return Evolution(shape, shape), (), True
        if known.raw.agrees(shape):
            return known, (), False
        if shape.version < known.raw.version:
            return Evolution(shape, shape), (), False  # staged anew: what comes was judged long ago
        found = known.follow(shape, lambda kind: self._action(shape.table, kind))
        return found, tuple(each for each in found.judged if each.version == shape.version), True


def accept(log: LogIndex, tables: list[TableId]) -> None:
    """Let the models of tables go on, whatever waits for a person."""
    with log.writing():
        known = read_evolutions(log)
        waiting = {t: replace(known[t], awaits="") for t in tables if t in known and known[t].awaits}
        if waiting:
            _write(log, known | waiting)


def read_evolutions(log: LogIndex) -> dict[TableId, Evolution]:
    """Return the evolution of every table that has models."""
    raw = json.loads(log.note(_NOTE) or "[]")
    return {evolution.raw.table: evolution for evolution in map(Evolution.from_dict, raw)}


def _write(log: LogIndex, known: Mapping[TableId, Evolution]) -> str:
    text = json.dumps([asdict(known[table]) for table in sorted(known)], ensure_ascii=False)
    log.set_note(_NOTE, text)
    return text


def changes_between(before: TableSchema, after: TableSchema) -> Iterator[ShapeChange]:
    """Yield what differs between two shapes of a table.

    A column that went while another of its type came in its place is taken for renamed: the source's stream
    does not tell.
    """
    old = {column.name: column for column in before.columns}
    new = {column.name: column for column in after.columns}
    renamed: dict[str, str] = {}
    if len(before.columns) == len(after.columns):
        renamed = {
            was.name: now.name
            for was, now in zip(before.columns, after.columns, strict=True)
            if was.name not in new and now.name not in old and was.type == now.type
        }
    for name in old:
        if name in renamed:
            yield ShapeChange("column_renamed", (name, renamed[name]), f"{name} renamed to {renamed[name]}")
        elif name not in new:
            yield ShapeChange("column_dropped", (name,), f"{name} dropped")
    for name, column in new.items():
        was_column = old.get(name)
        if was_column is None:
            if name not in renamed.values():
                yield ShapeChange("column_added", (name,), f"{name} added: {_type(column)}")
        elif _type(was_column) != _type(column):
            kind: ChangeKind = "type_widened" if keeps_text(was_column.type, column.type) else "type_changed"
            yield ShapeChange(kind, (name,), f"{name}: {_type(was_column)} is {_type(column)}")
    if before.key != after.key:
        yield ShapeChange("key_changed", (), f"{_key(before)} is {_key(after)}")


def keeps_text(before: str, after: str) -> bool:
    """Whether every value of one type of Postgres has the same text in the other."""
    if before == after:
        return True
    if before in _INTEGERS and after in _INTEGERS:
        return _INTEGERS.index(before) < _INTEGERS.index(after)
    if before == "character varying" and after == "text":
        return True
    old, new = _SIZED.fullmatch(before), _SIZED.fullmatch(after)
    if old is None:
        return False
    if new is None:
        return after in _UNBOUNDED.get(old[1], ())
    return old[1] == new[1] and old[3] == new[3] and int(old[2]) <= int(new[2])


def _key(shape: TableSchema) -> str:
    return f"key ({', '.join(shape.key)})" if shape.key else "no key"


def _type(column: Column) -> str:
    return f"{column.type}{' not null' if column.not_null else ''}"
