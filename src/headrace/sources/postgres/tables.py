"""The state of each captured table, kept as a note in the log.

    requested → copying → catching_up → live
                   └──────────┴──→ failed (with its reason), removed

`requested` waits to be copied, `copying` has a copy under way beside the stream, `catching_up` has all
its rows and waits until the stream has passed the last snapshot they were read under. `paused` is a
switch beside that: its changes are captured and staged, its models stand still.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Literal

from headrace.change import Offset, TableId
from headrace.protocols import LogIndex

Stage = Literal["requested", "copying", "catching_up", "live", "failed", "removed"]

NOTE = "tables"
DROPPED = "dropped at the source"
"""Why a table is removed that is taken in again should the source make it anew."""
UNFINISHED: tuple[Stage, ...] = ("requested", "copying", "catching_up")


@dataclass(frozen=True, slots=True)
class TableState:
    """Where a table stands; `reason` says why it is copied, or why that failed."""

    stage: Stage
    reason: str = ""
    paused: bool = False


def read_states(log: LogIndex) -> dict[TableId, TableState]:
    """Return the state of every table that was ever captured."""
    raw = json.loads(log.note(NOTE) or "[]")
    return {TableId(*table): TableState(**state) for table, state in raw}


def captured_tables(log: LogIndex) -> list[TableId]:
    """Return the tables that are captured, or will be as soon as the source can be asked."""
    return [table for table, state in read_states(log).items() if state.stage != "removed"]


def held_by_copies(log: LogIndex) -> Offset:
    """Return the offset behind which copies look things up in the log; its end where none is to come."""
    waiting = {table for table, state in read_states(log).items() if state.stage in UNFINISHED}
    if not waiting:
        return log.end().offset
    # One that has not begun yet will look from where the log ended when it was requested.
    begun = dict.fromkeys(waiting, log.begin().offset)
    for offset, table, _, _, mark in log.copy_marks():
        if mark.kind == "begin" and table in waiting:
            begun[table] = min(offset - 1, mark.after)
    return min(begun.values())


def copied_since(log: LogIndex, offset: Offset) -> bool:
    """Whether a copy of every captured table has begun behind an offset: it holds what was before."""
    begun = {table: at for at, table, _, _, mark in log.copy_marks() if mark.kind == "begin"}
    return all(begun.get(table, 0) > offset for table in captured_tables(log))


class TableStates:
    """The states, changed by one process; safe to use from any thread."""

    def __init__(self, log: LogIndex) -> None:
        self._log = log

    def all(self) -> dict[TableId, TableState]:
        """Return all states."""
        return read_states(self._log)

    def move(self, tables: Iterable[TableId], stage: Stage, reason: str = "") -> None:
        """Put tables into a stage, durably."""
        with self._log.writing():
            states = self.all()
            for table in tables:
                known = states.get(table, TableState("requested"))
                states[table] = replace(known, stage=stage, reason=reason)
            self._save(states)

    def pause(self, tables: Iterable[TableId], paused: bool) -> None:
        """Set the switch of tables, durably."""
        with self._log.writing():
            states = self.all()
            for table in tables:
                states[table] = replace(states[table], paused=paused)
            self._save(states)

    def _save(self, states: dict[TableId, TableState]) -> None:
        rows = [(table, asdict(state)) for table, state in sorted(states.items())]
        self._log.set_note(NOTE, json.dumps(rows, ensure_ascii=False))
