"""What a raw table was at which time: its shapes, one after another, and its copies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from headrace.change import Column, CopyMark, Offset, Position, TableId, TableSchema, shape_in
from headrace.staging.delta import DeltaStaging
from headrace.staging.rows import HISTORY


@dataclass(frozen=True, slots=True)
class Event:
    """A new shape or a step of a copy. `kind` is `shape`, `copy` or `copied`; `committed_at` is in
    microseconds since 1970; `what` says what is new, in words."""

    offset: Offset
    position: Position
    committed_at: int
    kind: str
    what: tuple[str, ...]


def timeline(staging: DeltaStaging, table: TableId, through: Offset) -> Iterator[Event]:
    """Yield what happened to a table up to an offset, in the log's order.

    A shape that repeats the one before it, as a restart makes it, is left out.
    """
    before: TableSchema | None = None
    copied = 0
    if HISTORY not in staging.tables():
        return
    for row in staging.read(HISTORY, 0, through).to_pylist():
        if TableId(row["table_schema"], row["table_name"]) != table:
            continue
        at = Position(row["_epoch"], row["_commit"], row["_ordinal"])
        shape = shape_in(row["kind"], row["content"])
        if shape and not (before and shape.same_shape(before)):
            what = tuple(_changes(before, shape))
            yield Event(row["_offset"], at, row["_committed_at"], "shape", what)
            before = shape
        if row["kind"] == "marker":
            mark = CopyMark.from_json(row["content"])
            copied = 0 if mark.kind == "begin" else copied + mark.rows
            if mark.kind == "begin":
                yield Event(row["_offset"], at, row["_committed_at"], "copy", (mark.reason or "begun",))
            elif mark.kind == "end":
                yield Event(row["_offset"], at, row["_committed_at"], "copied", (f"{copied} rows",))


def _changes(before: TableSchema | None, after: TableSchema) -> Iterator[str]:
    """Say what differs between two shapes of a table."""
    old = {column.name: column for column in before.columns} if before else {}
    new = {column.name: column for column in after.columns}
    if before is None:
        yield f"{len(new)} columns, {_key(after)}"
        return
    for name in old:
        if name not in new:
            yield f"{name} dropped"
    for name, column in new.items():
        was = old.get(name)
        if was is None:
            yield f"{name} added: {_type(column)}"
        elif _type(was) != _type(column):
            yield f"{name}: {_type(was)} is {_type(column)}"
    if before.key != after.key:
        yield f"{_key(before)} is {_key(after)}"


def _key(shape: TableSchema) -> str:
    return f"key ({', '.join(shape.key)})" if shape.key else "no key"


def _type(column: Column) -> str:
    return f"{column.type}{' not null' if column.not_null else ''}"
