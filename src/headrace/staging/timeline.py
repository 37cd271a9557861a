"""What a raw table was at which time: its shapes, one after another, and its copies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from headrace.change import CopyMark, Offset, Position, TableId, TableSchema, shape_in
from headrace.evolution import changes_between
from headrace.staging.delta import DeltaStaging
from headrace.staging.rows import HISTORY


@dataclass(frozen=True, slots=True)
class Event:
    """One change of a shape or a step of a copy.

    `kind` is `shape` (the first one), a kind of `headrace.schema_policy.ChangeKind`, `reordered`,
    `constraints`, `copy` or `copied`; `committed_at` is in microseconds since 1970; `what` says what is new,
    in words; `version` is that of the shape, 0 for a copy.
    """

    offset: Offset
    position: Position
    committed_at: int
    kind: str
    what: str
    version: int = 0


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
        if shape and not (before and shape.agrees(before)):
            for kind, what in _differences(before, shape):
                yield Event(row["_offset"], at, row["_committed_at"], kind, what, shape.version)
            before = shape
        if row["kind"] == "marker":
            mark = CopyMark.from_json(row["content"])
            copied = 0 if mark.kind == "begin" else copied + mark.rows
            if mark.kind == "begin":
                yield Event(row["_offset"], at, row["_committed_at"], "copy", mark.reason or "begun")
            elif mark.kind == "end":
                yield Event(row["_offset"], at, row["_committed_at"], "copied", f"{copied} rows")


def _differences(before: TableSchema | None, after: TableSchema) -> Iterator[tuple[str, str]]:
    """Yield the kind of each difference between two shapes of a table, and what it is."""
    if before is None:
        key = f"key ({', '.join(after.key)})" if after.key else "no key"
        yield "shape", f"{len(after.columns)} columns, {key}"
        return
    changes: list[tuple[str, str]] = [(change.kind, change.what) for change in changes_between(before, after)]
    if not changes and not before.same_shape(after):
        changes = [("reordered", ", ".join(column.name for column in after.columns))]
    yield from changes
    if words := "; ".join(_of_constraints(before, after)):
        yield "constraints", words


def _of_constraints(before: TableSchema, after: TableSchema) -> Iterator[str]:
    """Yield in words which constraints came, went or became others."""
    was, now = ({each.name: each for each in shape.constraints} for shape in (before, after))
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            yield f"{name} {'added' if name not in was else 'dropped' if name not in now else 'changed'}"
