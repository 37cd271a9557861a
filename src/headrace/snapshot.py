"""A model's table as it stood at a place in the past, under the model as it is now: a table that stays so.

It is made of staging, beside everything that runs, and comes to be in one transaction.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import astuple, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from headrace.change import START, Copy
from headrace.errors import UserError
from headrace.history import History
from headrace.join import Snapshot
from headrace.lane import Lane
from headrace.log.sqlite import SQLiteLog
from headrace.prepared import Prepared
from headrace.protocols import Destination
from headrace.raw.place import LSN, Place, moment_of, place_of
from headrace.rebuilding import PHASES, Rebuilding, newest_decides
from headrace.recopied import copies_of
from headrace.sources.postgres.lsn import format_lsn, parse_lsn
from headrace.staging.contained import not_contained
from headrace.staging.copies import copied
from headrace.staging.delta import DeltaStaging
from headrace.staging.unchanged import fill_unchanged
from headrace.transform.contested import uncontested
from headrace.transform.model import RowModel, preparing

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)?", re.ASCII)
_OURS = re.compile(r"headrace(_\w*)?\.", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Past:
    """What a model's table was made of at a place: the copy that counted then, and what had come since."""

    staging: DeltaStaging
    model: RowModel
    copy: Copy
    at: Place

    def prepared(self, spill: Path, stopped: threading.Event) -> Generator[Prepared]:
        """Yield what the model makes of it, to be applied in this order. Raises ModelBroken, and
        InterruptedError once `stopped` is set."""
        model, through = self.model, self.at.through
        history = History(
            self.staging, model.table, model.schema.key, self.copy, through,
            before=self.at.before, spill=spill, stopped=stopped,
        )  # fmt: skip
        with preparing(model.name):
            yield from self._by_key(history) if newest_decides(model) else self._in_order(history)

    def _by_key(self, history: History) -> Iterator[Prepared]:
        bad: list[pa.Array] = []

        def bad_keys(limit: int) -> pa.Array | None:
            return pa.concat_arrays(bad) if sum(map(len, bad)) <= limit else None

        rebuilding = Rebuilding(self.staging, self.model, self.copy, history, bad_keys)
        bad.append(pa.array([], pa.string()))
        for phase in PHASES:
            after = history.begin
            while after < self.at.through:
                after, parts = rebuilding.prepare(phase, after, self.at.through)
                for prepared in parts:
                    if phase == PHASES[0]:
                        bad.append(prepared.records["key"].combine_chunks())
                    yield prepared

    def _in_order(self, history: History) -> Iterator[Prepared]:
        model, copy, staging = self.model, self.copy, self.staging
        table, key = model.table, model.schema.key
        for part in staging.chunks(table, copy.begin, copy.end):
            yield model.prepare(copied(part, copy))
        for part in staging.pieces(table, copy.after, self.at.through):
            changes = fill_unchanged(staging, table, key, history.kept(part), newest=copy.end)
            yield model.prepare(not_contained(staging, table, key, copy, changes))


def take_snapshot(
    lane: Lane, model: str, place: str, into: str | None, spill: Path, stopped: threading.Event
) -> dict[str, Any]:
    """Make a table of what a model's was at a place, beside everything that runs; see `write_snapshot`.

    Raises what `past_of` and that raise, and UserError for a model that does not run, and once `stopped`.
    """
    with lane.applying:
        lane.reload_models(now=True)
        now = next((each for each in lane.models() if each.name == model), None)
    if now is None:
        raise UserError(f"Model {model} does not run now, or there is none.", "`headrace status` says more.")
    past = past_of(lane.log, lane.staging, now, place)
    try:
        outcome = write_snapshot(past, lane.destination, into, spill, stopped)
    except InterruptedError as error:
        raise UserError("The pipeline stops.", "Start it, and ask again.") from error
    return {"model": model, "as_of": place, "into": into, **outcome}


def past_of(log: SQLiteLog, staging: DeltaStaging, model: RowModel, text: str) -> Past:
    """Return what a model's table was made of at a place that a person names: an offset, an LSN, or a time.

    Raises UserError for what names no place, for one that is not staged yet or lies before the table was
    copied whole, and for a model whose table holds its past itself, or what one copy does not tell.
    """
    if model.kind.materialize != "latest":
        raise UserError(
            f"{model.name} is {model.kind.materialize}: its table shows the past by itself.",
            "Ask for rows by `valid_from` and `valid_to`, or by `_commit`.",
        )
    _refuse_beyond(log, text)
    at = place_of(log, staging, text)
    copy = staging.copy(model.table, at.through)
    if copy is None or (at.before is not None and copy.ceiling[:2] >= at.before):
        raise UserError(
            f"{text} lies before what is known of {model.table}: {_first_known(log, staging, model)}",
            "Name a later place.",
        )
    if model.kind.remembers and len(copies_of(staging, model, copy)) > 1:
        raise UserError(
            f"{model.name} keeps what was deleted, also before {model.table} was copied again, and the past "
            "is made of one copy alone.",
            "Ask its table for rows by `_deleted_at`, or name a place before the table was copied again.",
        )
    return Past(staging, model, copy, at)


def _refuse_beyond(log: SQLiteLog, text: str) -> None:
    """Raise UserError for an LSN or a time that the log has not come to: nobody knows what will be there."""
    position, committed_at = log.last_commit() or (START, 0)
    if text.isdecimal() and text.isascii():
        return
    if LSN.fullmatch(text):
        beyond, reached = parse_lsn(text) > position.commit, f"LSN {format_lsn(position.commit)}"
    else:
        beyond, reached = moment_of(text) > committed_at, f"commits of {_time(committed_at)}"
    if beyond:
        raise UserError(
            f"{text} lies beyond what is captured: the log of {log.source} has come to {reached}.",
            "Name an earlier place.",
        )


def _first_known(log: SQLiteLog, staging: DeltaStaging, model: RowModel) -> str:
    ends = (
        (offset, copy)
        for offset, table, _, _, mark in log.copy_marks()
        if table == model.table and mark.kind == "end" and (copy := staging.copy(table, offset)) is not None
    )
    offset, copy = next(ends, (0, None))
    if copy is None:
        return "its copy is not complete yet."
    at = _time(log.place(offset)[1])
    return f"its copy was complete at offset {offset}, LSN {format_lsn(copy.ceiling.commit)} ({at})."


def _time(micros: int) -> str:
    return datetime.fromtimestamp(micros // 1_000_000, UTC).isoformat()


def write_snapshot(
    past: Past, destination: Destination, into: str | None, spill: Path, stopped: threading.Event
) -> dict[str, Any]:
    """Make the table `into` of what a model's was, or, where that is None, only find out what it would be.

    Returns `rows` and `open_records`, and in how many source keys the live table differs from it (`added`,
    `removed`, `changed` since then) with `examples`; None where that has other columns or is not there.
    Raises UserError for a name that is no table's, or in use.
    """
    if into is not None and (not _NAME.fullmatch(into) or _OURS.match(into)):
        raise UserError(f'"{into}" is no name for a table.', "Write NAME or SCHEMA.NAME, in plain letters.")

    def attempt(model: RowModel) -> Snapshot:
        with closing(replace(past, model=model).prepared(spill, stopped)) as slices:
            return destination.joins.write_snapshot(model, into, past.copy.end, slices)

    found = uncontested(past.model, attempt)
    differs = astuple(found.difference) if found.difference else (None, None, None)
    counts = dict(zip(("added", "removed", "changed"), differs, strict=True))
    return {"rows": found.rows, "open_records": found.open_records, **counts, "examples": found.examples}
