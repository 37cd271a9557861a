"""Reading a log in Python: `headrace.open_log`, for consumers beside the pipeline.

A consumer reads batches, each of whole source transactions, and commits each when it is done with it. What
it did not commit comes again: at least once. For exactly once it stores `Batch.through` in the transaction
of its data, and reads from there with `after`, or from `OpenLog.begin` while it has stored nothing.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import pyarrow as pa

from headrace.change import CopyMark, LoggedEntry, Mark, Offset, Position, SourceMark, TableId, TableSchema
from headrace.config import state_folder
from headrace.decisions import Decision
from headrace.errors import LogError, LogTrimmed, UserError
from headrace.log.consumers import Cursor, Cursors, check, lost
from headrace.log.places import Shapes, told
from headrace.log.sqlite import SQLiteLog
from headrace.payload import BEFORE, HEAD, UNCHANGED, decode_rows

MAX_BYTES = 16 << 20
"""Bytes of payload, compressed, that a batch has unless one group has more."""

_ALL_ROWS = 1 << 62
_POLL = 0.1
_PAGE = 1000
_LEADING = ("_op", "_epoch", "_commit", "_ordinal", "_offset", "_committed_at", "_txid", "_lsn")


@dataclass(frozen=True, slots=True)
class Changes:
    """Rows of one table from one entry of the log, in the order of the source.

    `rows` has `_op`, `_epoch`, `_commit`, `_ordinal`, `_offset`, `_committed_at` (microseconds), `_txid` and
    `_lsn`, the source's columns as texts, `_unchanged` (names of cells that the source did not send) and
    `_before` (map of the old row's known cells). `kind` is `rows` for what was streamed, `copy` for rows of
    a copy (op `r`), which stand beside the stream, not in its order.
    """

    table: TableId
    rows: pa.RecordBatch
    schema: TableSchema
    offset: Offset
    kind: Literal["rows", "copy"]


@dataclass(frozen=True, slots=True)
class Message:
    """What an application wrote with `pg_logical_emit_message`."""

    prefix: str
    content: str


@dataclass(frozen=True, slots=True)
class Event:
    """What is no row. `content` by kind: schema: the new shape; truncate: None; message, decision: what it
    says; marker: how a table's copy goes or, without a table, a gap or a new beginning of the source;
    undecodable: messages that do not decode, with the columns of `headrace.payload.UNDECODABLE`.

    `lsn` and `txid` are those of truncates and messages, else 0.
    """

    kind: Literal["schema", "truncate", "message", "marker", "decision", "undecodable"]
    table: TableId | None
    offset: Offset
    position: Position
    committed_at: int
    content: TableSchema | Message | CopyMark | SourceMark | Decision | pa.RecordBatch | None
    lsn: int = 0
    txid: int = 0


class Batch:
    """Whole groups of a log, behind `after` through `through`; read as it is iterated, as often as wanted."""

    def __init__(self, log: OpenLog, name: str | None, after: Mark, through: Mark, tables: _Tables) -> None:
        self.after = after
        """The mark behind which the batch begins."""
        self.through = through
        """The mark of its last entry: what to store with the data, and to pass as `after`."""
        self._log = log
        self._name = name
        self._chosen = tables

    def __iter__(self) -> Iterator[Changes | Event]:
        """Yield changes and events in the log's order, one entry in memory at a time.

        Raises LogTrimmed, or CursorLost for a named consumer, when the log was trimmed beyond it.
        """
        for item in self._log._entries(self._name, self.after.offset, self.through.offset, self._chosen):
            yield self._log._made(item)

    @property
    def tables(self) -> tuple[TableId, ...]:
        """The tables that have rows in it, by name. Raises as iterating does."""
        found = self._log._log.raw_rows(
            'SELECT DISTINCT table_schema, table_name FROM entries WHERE "offset" > ? AND "offset" <= ? '
            "AND kind IN ('rows', 'copy')",
            (self.after.offset, self.through.offset),
        )
        if self._log.begin.offset > self.after.offset:
            raise self._log._trimmed(self._name, self.after.offset)
        tables = sorted(TableId(*row) for row in found)
        return tuple(table for table in tables if self._chosen is None or table in self._chosen)

    @property
    def position(self) -> Position:
        """The place in the source up to which the log has its stream at the batch's end."""
        return self._place()[0]

    @property
    def committed_at(self) -> int:
        """The commit time (microseconds) that belongs to `position`."""
        return self._place()[1]

    def _place(self) -> tuple[Position, int]:
        """Raises as iterating does."""
        place = self._log._log.place(self.through.offset)
        if self._log._log.mark(self.through.offset) is None:
            raise self._log._trimmed(self._name, self.after.offset)
        return place

    def table(self, name: str | TableId) -> pa.Table:
        """Return all rows of one table, `schema.table`, in memory; columns are those of all its shapes here.

        Raises UserError for a table that the log does not know or the read has not chosen, else as iterating.
        """
        table = self._log._known(name)
        if self._chosen is not None and table not in self._chosen:
            raise UserError(f"{table} is not read.", "Name it in `tables`.")
        items = self._log._entries(self._name, self.after.offset, self.through.offset, frozenset([table]))
        parts = [
            pa.Table.from_batches([changes.rows])
            for changes in map(self._log._made, items)
            if isinstance(changes, Changes)
        ]
        if not parts:
            shape = self._log._shapes.newest(table)
            return columns_of([column.name for column in shape.columns] if shape else []).empty_table()
        whole = pa.concat_tables(parts, promote_options="default")
        last = [name for name in ("_unchanged", "_before") if name in whole.column_names]
        return whole.select([name for name in whole.column_names if name not in last] + last)

    def commit(self) -> None:
        """Record durably that the consumer is done through this batch: it does not come again.

        Raises CursorLost, or UserError for one behind what is committed, or without a consumer's name.
        """
        if self._name is None:
            raise UserError("Nothing can be committed without a name.", 'Read with one: log.read("reports").')
        self._log._cursors.commit(self._name, self.through)


_Tables = frozenset[TableId] | None


class OpenLog:
    """A source's log, open to be read beside its writer; a context manager."""

    def __init__(self, path: Path) -> None:
        """Open the log at `path`. Raises LogError when there is none."""
        self._log = SQLiteLog(path, read_only=True)
        self._cursors = Cursors(path.with_suffix(".cursors"))
        self._shapes = Shapes(self._log)

    def __enter__(self) -> OpenLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def id(self) -> str:
        """The log's identity."""
        return self._log.id

    @property
    def source(self) -> str:
        """The name of the source."""
        return self._log.source

    @property
    def head(self) -> Mark:
        """The mark of the last durable entry."""
        return self._log.end()

    @property
    def begin(self) -> Mark:
        """The mark of the last entry that retention has deleted; offset 0 while all is there."""
        return self._log.begin()

    def schemas(self) -> dict[TableId, TableSchema]:
        """Return the newest shape of every table."""
        return self._log.schemas()

    def consumers(self) -> list[Cursor]:
        """Return the named consumers and how far each has read."""
        return self._cursors.all()

    def reset(self, name: str, offset: Offset) -> Cursor:
        """Put a consumer at the last end of a group at or before an offset, behind which it then reads.

        Raises LogTrimmed before the log's beginning, UserError for an unknown consumer or offset.
        """
        begin, end = self.begin.offset, self.head.offset
        if offset < begin:
            raise LogTrimmed(
                f"The log of {self.source} begins behind offset {begin}: {offset} has been deleted.",
                f"Take {begin}, or a later one.",
            )
        mark = self._log.mark(self._log.group_end(offset))
        if offset > end or mark is None:
            raise UserError(f"The log of {self.source} ends at offset {end}.", f"Take {begin} to {end}.")
        return self._cursors.reset(name, mark)

    def forget(self, name: str) -> None:
        """Remove a consumer. Raises UserError for an unknown one."""
        self._cursors.forget(name)

    def read(
        self,
        name: str | None,
        *,
        after: Offset | Mark | None = None,
        tables: Iterable[str | TableId] | None = None,
        max_bytes: int = MAX_BYTES,
        follow: bool = False,
        torn: bool = False,
    ) -> Iterator[Batch]:
        """Yield batches behind what `name` has committed, or behind `after`, to the end; with `follow`, wait
        there for more.

        A name that is new begins where the log does, and holds the log from then on. `None` reads without a
        name and holds nothing. A batch has whole source transactions of at most `max_bytes` of payload, but
        at least one group, and with `torn` it may end anywhere. The next batch is read from the end of the
        one before, committed or not; what was not committed comes again with the next `read`.

        Raises CursorLost, LogTrimmed, LogError for a cursor or mark of another log, UserError.
        """
        chosen = None if tables is None else frozenset(map(self._known, tables))
        start = self._start(name, after)
        return self._batches(name, start, chosen, (max_bytes, follow, torn))

    def close(self) -> None:
        """Close the files."""
        self._log.close()
        self._cursors.close()

    def _start(self, name: str | None, after: Offset | Mark | None) -> Mark:
        cursor = None if name is None else self._cursors.get(name)
        if cursor is not None:
            check(cursor, self._log)
        start = self._mark(after)
        if name is None:
            return start
        if cursor is None:
            return self._joined(name, after)
        if after is not None and start.offset < cursor.offset:
            raise UserError(
                f"Consumer {name} has committed offset {cursor.offset}, and `after` is {start.offset}.",
                f"To read that again: headrace log consumers --reset {name} --to {start.offset}",
            )
        return start if after is not None else cursor.mark

    def _joined(self, name: str, after: Offset | Mark | None) -> Mark:
        """Make a consumer's cursor. Retention may pass it before it is there; then it begins anew."""
        while True:
            start = self._mark(after)
            if after is None and (planned := self._cursors.planned(self.id)) > start.offset:
                start = self._mark(planned)
            try:
                cursor = self._cursors.commit(name, start, joins=True)
            except LogTrimmed:
                if after is not None:
                    raise
                continue  # it has been planned meanwhile
            if self.begin.offset <= cursor.offset:
                return cursor.mark
            self._cursors.forget(name)

    def _mark(self, after: Offset | Mark | None) -> Mark:
        if after is None:
            return self.begin
        offset = after.offset if isinstance(after, Mark) else after
        end = self.head.offset
        if isinstance(after, Mark) and after.log_id != self.id:
            raise LogError(
                f"This log of {self.source} is {self.id}, not {after.log_id}, which was read through offset "
                f"{offset}.",
                "See that it is the right project; to read this one from its beginning, leave `after` out.",
            )
        if offset > end:
            raise LogError(
                f"The log of {self.source} ends at offset {end}: there is no {offset}.",
                "If it was there before, the log was restored or cut off: see `headrace log verify`.",
            )
        mark = self._log.mark(offset)  # before the beginning, which may pass it meanwhile
        if offset < (begin := self.begin.offset):
            raise LogTrimmed(
                f"The log of {self.source} begins behind offset {begin}: what follows {offset} is deleted.",
                "Import an export, or read staging.",
            )
        if mark is None or (isinstance(after, Mark) and mark.hash != after.hash):
            raise LogError(
                f"Offset {offset} of the log of {self.source} has another hash than what was read.",
                "It is another log, or was computed anew: see `headrace log verify`.",
            )
        return mark

    def _batches(
        self, name: str | None, after: Mark, tables: _Tables, how: tuple[int, bool, bool]
    ) -> Generator[Batch]:
        max_bytes, follow, torn = how
        while True:
            through = self._through(name, after, max_bytes, torn=torn)
            if through is not None:
                yield Batch(self, name, after, through, tables)
                after = through
            elif follow:
                time.sleep(_POLL)
            else:
                return

    def _through(self, name: str | None, after: Mark, max_bytes: int, *, torn: bool) -> Mark | None:
        """Return the end of the batch behind `after`, or None if there is nothing."""
        end = self.head.offset
        if end <= after.offset:
            return None
        if self.begin.offset > after.offset:
            raise self._trimmed(name, after.offset)
        if torn:
            offset, _ = self._log.reach(after.offset, end, max_bytes, _ALL_ROWS)
        else:
            offset = self._log.slice_end(after.offset, end, max_bytes, _ALL_ROWS)
        mark = self._log.mark(offset)
        if mark is None or self.begin.offset > after.offset:
            raise self._trimmed(name, after.offset)
        return mark if offset > after.offset else None

    def _entries(
        self, name: str | None, after: Offset, through: Offset, tables: _Tables
    ) -> Iterator[LoggedEntry]:
        try:
            if tables is None:
                yield from self._log.entries(after, through)
                return
            for first, last in self._runs(after, through, tables):
                yield from self._log.entries(first - 1, last)
        except LogTrimmed as error:
            raise self._trimmed(name, after) from error

    def _runs(
        self, after: Offset, through: Offset, tables: frozenset[TableId]
    ) -> Iterator[tuple[Offset, Offset]]:
        """Yield first and last offsets of what is of some tables or of none. Raises LogTrimmed."""
        while True:
            page = self._log.raw_rows(
                'SELECT "offset", table_schema, table_name FROM entries WHERE "offset" > ? AND "offset" <= ? '
                f'ORDER BY "offset" LIMIT {_PAGE}',
                (after, through),
            )
            self._log.check_held(after, through)  # after the page was read: none of it was missing
            for is_chosen, run in groupby(page, lambda row: row[2] is None or TableId(*row[1:]) in tables):
                if is_chosen:
                    offsets = [int(row[0]) for row in run]
                    yield offsets[0], offsets[-1]
            if len(page) < _PAGE:
                return
            after = int(page[-1][0])

    def _trimmed(self, name: str | None, after: Offset) -> LogTrimmed:
        cursor = None if name is None else self._cursors.get(name)
        if cursor is not None:
            return lost(cursor, self._log)
        return LogTrimmed(
            f"The log of {self.source} was trimmed to offset {self.begin.offset} while it was read behind "
            f"{after}.",
            "Read with a name, which holds the log; import an export, or read staging.",
        )

    def _known(self, name: str | TableId) -> TableId:
        table = table_named(name)
        if table not in (known := self._shapes.tables()):
            names = ", ".join(map(str, known)) or "none"
            raise UserError(f"The log of {self.source} knows no table {table}.", f"It has: {names}.")
        return table

    def _made(self, item: LoggedEntry) -> Changes | Event:
        entry = item.entry
        if entry.kind in ("rows", "copy"):
            assert entry.table is not None
            shape = self._shapes.of(entry.table, entry.schema_version)
            return Changes(entry.table, rows_of(item), shape, item.offset, entry.kind)
        return _event(item)


def open_log(folder: Path | str, source: str | None = None) -> OpenLog:
    """Open the log of a source to read it, also beside a running pipeline; needs no headrace.toml.

    `folder` is a project, a state folder (`.headrace`) or the file of a log; `source` may be left out when
    there is one. Raises UserError when there is none, or several and no `source`.
    """
    return OpenLog(only_log(Path(folder), source or ""))


def find_logs(project: Path, source: str = "") -> list[Path]:
    """Return the files of the logs of a project, or of a state folder, or the one that is named, by source.

    Raises UserError when there is none, or none of `source`.
    """
    folder = project.expanduser()
    if folder.is_file():
        return [folder]
    state = state_folder(folder)
    found = list(((state if state.is_dir() else folder) / "log").glob("*.db"))
    if not found:
        raise UserError(f"There is no log in {folder.resolve()}.", "Start the pipeline once: headrace run")
    chosen = sorted(path for path in found if not source or path.stem == source)
    if not chosen:
        names = ", ".join(sorted(path.stem for path in found))
        raise UserError(f"There is no log of a source {source}.", f"There are: {names}.")
    return chosen


def only_log(project: Path, source: str = "") -> Path:
    """Return the file of one log. Raises UserError where several are meant, or none."""
    found = find_logs(project, source)
    if len(found) > 1:
        names = ", ".join(path.stem for path in found)
        raise UserError("There are the logs of several sources.", f"Name one: {names}.")
    return found[0]


def rows_of(item: LoggedEntry) -> pa.RecordBatch:
    """Return the rows of an entry with the columns of `Changes`."""
    return with_place(decode_rows(item.entry.payload), item)


def with_place(batch: pa.RecordBatch, item: LoggedEntry) -> pa.RecordBatch:
    """Give some rows of an entry, as its payload has them, the columns of `Changes`."""
    count, present = batch.num_rows, set(batch.schema.names)
    own = [name for name in batch.schema.names if name not in (*HEAD, "_unchanged", "_before")]
    constant = {"_epoch": item.entry.first.epoch, "_offset": item.offset}
    cells = [
        pa.repeat(pa.scalar(constant[name], pa.int64()), count) if name in constant else batch[name]
        for name in _LEADING
    ]
    cells += [batch[name] for name in own]
    for name, kind in (("_unchanged", UNCHANGED), ("_before", BEFORE)):
        cells.append(batch[name] if name in present else pa.nulls(count, kind))
    return pa.RecordBatch.from_arrays(cells, schema=columns_of(own))


def columns_of(own: Sequence[str]) -> pa.Schema:
    """Return the columns of `Changes.rows` for a source's own columns."""
    first, *numbers = _LEADING
    kinds = [(first, pa.string()), *((name, pa.int64()) for name in numbers)]
    kinds += [(name, pa.string()) for name in own]
    return pa.schema([*kinds, ("_unchanged", UNCHANGED), ("_before", BEFORE)])


def table_named(name: str | TableId) -> TableId:
    """Return the table that a name means, `schema.table`; the schema public may be left out."""
    if isinstance(name, TableId):
        return name
    schema, dot, rest = name.partition(".")
    return TableId(schema, rest) if dot else TableId("public", name)


def _event(item: LoggedEntry) -> Event:
    entry = item.entry
    place = (entry.table, item.offset, entry.last, entry.committed_at)
    if entry.kind == "schema":
        return Event("schema", *place, TableSchema.from_json(entry.payload))
    if entry.kind == "marker":
        kind = SourceMark if entry.table is None else CopyMark
        return Event("marker", *place, kind.from_json(entry.payload))
    if entry.kind == "decision":
        return Event("decision", *place, Decision.from_json(entry.payload))
    if entry.kind == "undecodable":
        return Event("undecodable", *place, decode_rows(entry.payload))
    words = told(entry.payload)
    if entry.kind == "truncate":
        return Event("truncate", *place, None, words["lsn"], words["txid"])
    content = Message(words["prefix"], words["content"])
    return Event("message", *place, content, words["lsn"], words["txid"])
