"""Staging on Delta tables: `<root>/raw/<source>/<schema>/<table>`, one file per table and load until
maintenance merges them.

A table whose version is at or above an entry's offset holds that entry already: staging it again
changes nothing. How a load becomes durable: see `headrace.staging.table`.
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from headrace.change import (
    EVENTS,
    Copy,
    CopyMark,
    LoggedEntry,
    Offset,
    Position,
    TableId,
    TableSchema,
    shape_in,
)
from headrace.decisions import Decision, Decisions
from headrace.errors import LogError
from headrace.protocols import LogIndex
from headrace.staging.aside import Aside, BeforeUnstaged
from headrace.staging.copies import CopyHistory, beyond, copied, in_source_order, streamed
from headrace.staging.folders import decode, encode
from headrace.staging.naming import logical_name, physical_names
from headrace.staging.recent import Recent
from headrace.staging.rows import (
    HISTORY,
    INTERNAL,
    META,
    UNDECODABLE,
    as_the_source_says,
    event_row,
    no_rows,
    staged,
    undecodable,
    with_columns,
)
from headrace.staging.table import RawTable, RowGroup

logger = logging.getLogger("headrace.lane")

_NO_ROWS = (pa.ArrowException, OSError, ValueError, LookupError, TypeError, StopIteration)
"""What Arrow raises for bytes that hold no rows as they should."""

PIECE_BYTES = 16 << 20
"""How much is decoded at once: of one write, and of what `pieces` yields. An entry is never cut."""
_PIECE_ROWS = 100_000


@dataclass(slots=True)
class _Pending:
    """What one write is going to commit: staged rows by table, and entries that are no rows."""

    parts: dict[TableId, list[pa.Table]] = field(default_factory=dict)
    events: list[LoggedEntry] = field(default_factory=list)
    bytes: int = 0
    through: Offset = 0
    group_end: Offset = 0

    def add(self, table: TableId, part: pa.Table) -> None:
        self.parts.setdefault(table, []).append(part)
        self.bytes += part.nbytes


class DeltaStaging:
    """The raw tables of one source. One writer; `read` may be called from other threads."""

    def __init__(
        self,
        root: Path,
        source: str,
        log_id: str,
        *,
        read_only: bool = False,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        """Open what is there and, unless `read_only`, repair what a power cut left half written.

        `piece_bytes` bounds how much is decoded at once.

        Raises StagingForeign when the folder belongs to another log.
        """
        self.source = source
        self.root = root
        self._root = root / "raw" / encode(source)
        self._log_id = log_id
        self._read_only = read_only
        self.piece_bytes = piece_bytes
        self._tables: dict[TableId, RawTable] = {}
        self._recent = Recent()
        self._used: Offset = 0
        self._moved = threading.Condition()
        self._through = self._written = 0
        self._schemas: list[tuple[Offset, TableSchema]] = []
        self._copies = CopyHistory()
        self._decisions: dict[str, list[tuple[Offset, Decision]]] = {}
        self._decided_through: Offset = 0
        self._indexed: dict[str, tuple[int, Decisions]] = {}
        for path in sorted(self._root.glob("*/*/_delta_log")):
            schema, name = path.parent.parent.name, path.parent.name
            self._open(TableId(decode(schema), decode(name)))
        self._remember_events(0)
        self._aside = Aside()
        self._aside.learn(self._tables.get(UNDECODABLE))

    def recover(
        self,
        last_offsets: dict[TableId, Offset],
        end: Offset,
        before_unstaged: BeforeUnstaged = lambda _, staged, __, ___: staged,
    ) -> None:
        """Work out how far every table is staged, from where the log last wrote to each.

        A table that lags pulls `through` back to the group before its first entry that is not staged
        (`before_unstaged`, see `LogIndex`); without that look-up, to what it holds. Groups after that are
        read from the log again and skipped where they are staged already.
        """
        self._reach(last_offsets, end, before_unstaged)
        self._check_not_ahead(end)

    def _reach(
        self,
        last_offsets: dict[TableId, Offset],
        end: Offset,
        before_unstaged: BeforeUnstaged,
    ) -> None:
        schemas, aside = self._version(HISTORY), self._aside.of
        lagging = [
            before_unstaged(
                table, self._version(table), schemas if table in self._tables else 0, aside(table)
            )
            for table, last in last_offsets.items()
            if self._version(table) < last
        ]
        with self._moved:
            self._through = self._written = min(lagging, default=end)
            self._moved.notify_all()

    def _check_not_ahead(self, end: Offset) -> None:
        ahead = max((table.version for table in self._tables.values()), default=0)
        if ahead > end:
            raise LogError(
                f"{self._root} holds changes up to offset {ahead}, the log ends at {end}: the log was "
                "restored from an older copy or cut off.",
                f"Restore the whole state folder, or delete {self._root} to stage the log anew.",
            )

    def follow(self, log: LogIndex) -> bool:
        """Take over what another process has staged of a log, see `recover`; says whether `through` has
        moved. Both go on meanwhile."""
        before = self._through
        end = log.end().offset  # before it is asked what there is: of all through it that tells
        last_offsets = log.last_offsets()
        self.refresh([table for table, last in last_offsets.items() if self._version(table) < last])
        self._reach(last_offsets, end, log.before_unstaged)
        self._check_not_ahead(log.end().offset)
        return self._through > before

    def refresh(self, tables: Iterable[TableId]) -> None:
        """Take over what another process has staged of some tables."""
        known = self._version(HISTORY)
        # Shapes after rows, so that no row is seen without its shape.
        for table in (*tables, *INTERNAL):
            self._open(table)
        self._remember_events(known)
        self._aside.learn(self._tables.get(UNDECODABLE))

    def write(self, entries: Sequence[LoggedEntry]) -> None:
        """See `Staging.write`. Commits whenever `piece_bytes` are decoded, and at the end."""
        pending = _Pending()
        for item in entries:
            self._take(item, pending)
            if pending.bytes >= self.piece_bytes:
                self._flush(pending)
                pending = _Pending()
        self._flush(pending)

    def _take(self, item: LoggedEntry, pending: _Pending) -> None:
        """Add to what is pending what an entry brings that is not staged yet."""
        entry = item.entry
        if entry.kind in EVENTS and entry.table is not None:
            pending.events.append(item)
            if item.offset > self._version(HISTORY):
                pending.add(HISTORY, event_row(item))
            if shape := shape_in(entry.kind, entry.payload):
                pending.add(shape.table, no_rows(shape))
        elif entry.table is not None:
            self._take_changes(item, entry.table, pending)
        pending.through = item.offset
        if item.ends_group:
            pending.group_end = item.offset

    def _take_changes(self, item: LoggedEntry, table: TableId, pending: _Pending) -> None:
        """Add what an entry brings of a table; as bytes what does not decode."""
        if item.entry.kind != "undecodable":
            if item.offset <= self._version(table) or self._aside.any(table, item.offset - 1, item.offset):
                return
            try:
                pending.add(table, staged(item))
            except MemoryError:
                raise
            except _NO_ROWS as error:
                logger.warning(
                    "offset %d of %s does not decode: %s", item.offset, table, type(error).__name__
                )
            else:
                return
        if item.offset > self._version(UNDECODABLE):
            pending.add(UNDECODABLE, undecodable(item))

    def _flush(self, pending: _Pending) -> None:
        """Make what is pending durable, table by table, then say so. The end of what apply may use moves
        only where a group ends: a transaction is never applied in part.

        What does not decode comes first: a table that is staged beyond it would be taken for whole."""
        try:
            for table in sorted(pending.parts, key=UNDECODABLE.__ne__):
                self._append(table, pending.parts[table], pending.through)
        except BaseException:
            self._look_again(pending.parts)
            raise
        if UNDECODABLE in pending.parts:
            self._aside.learn(self._tables.get(UNDECODABLE))
        for item in pending.events:
            entry = item.entry
            assert entry.table is not None
            self._remember_event(item.offset, entry.kind, entry.table, entry.last, entry.payload.decode())
        with self._moved:
            self._written = max(self._written, pending.through)
            self._through = max(self._through, pending.group_end)
            self._moved.notify_all()

    def skip(self, offset: Offset) -> None:
        """Go on behind an offset although entries before it are missing: copies that come later hold them."""
        with self._moved:
            self._written = max(self._written, offset)
            self._through = max(self._through, offset)

    def written(self) -> Offset:
        """See `Staging.written`."""
        return self._written

    def through(self) -> Offset:
        """See `Staging.through`."""
        return self._through

    def wait(self, after: Offset, timeout: float) -> bool:
        """Wait up to `timeout` seconds until `through` is past `after`; say whether it is."""
        with self._moved:
            return self._moved.wait_for(lambda: self._through > after, timeout)

    def read(self, table: TableId, after: Offset, through: Offset) -> pa.Table:
        """See `Staging.read`."""
        changes = self._read(table, after, through)
        return streamed(changes) if self._copies.between(table, after, through) else changes

    def read_copied(self, table: TableId, copy: Copy, after: Offset, through: Offset) -> pa.Table:
        """See `Staging.read_copied`."""
        return copied(self._read(table, after, through), copy)

    def copied_parts(
        self, table: TableId, copy: Copy, columns: Sequence[str] | None = None
    ) -> Iterator[pa.Table]:
        """Yield a copy's rows, or some columns of them, in parts of a bounded size."""
        needed = columns and [*columns, "_op", "_offset"]
        for part in self.chunks(table, copy.begin, copy.end, needed):
            rows = copied(part, copy)
            yield rows.select(columns) if columns else rows

    def streamed_rows(self, table: TableId, after: Offset, through: Offset) -> int:
        """Return how many streamed changes of a table are in `(after, through]`."""
        parts = self.chunks(table, after, through, ["_op"])
        return sum(streamed(part).num_rows for part in parts)

    def copy(self, table: TableId, through: Offset) -> Copy | None:
        """See `Staging.copy`."""
        return self._copies.newest(table, through)

    def copies(self, table: TableId, through: Offset) -> list[Copy]:
        """Return all copies of a table that are complete as of an offset, the oldest first."""
        return self._copies.complete(table, through)

    def captured_since(self, table: TableId, through: Offset) -> Offset:
        """Return the offset of the copy's begin since which a table is captured without a gap."""
        return self._copies.since(table, through)

    def history(self, table: TableId, copy: Copy | None, through: Offset) -> pa.Table:
        """See `Staging.history`."""
        if copy is None:
            return self.read(table, 0, through)
        rows = self.read_copied(table, copy, copy.begin, min(copy.end, through))
        return in_source_order([rows, beyond(self.read(table, copy.after, through), copy.floor)])

    def pieces(self, table: TableId, after: Offset, through: Offset) -> Iterator[pa.Table]:
        """See `Staging.pieces`. Cut between row groups, each of which was one piece when it was written."""
        held: list[pa.Table] = []
        copies = self._copies.between(table, after, through)
        for part in self.chunks(table, after, through):
            held.append(streamed(part) if copies else part)
            del part
            full = sum(part.nbytes for part in held) >= self.piece_bytes // 2
            if full or sum(part.num_rows for part in held) >= _PIECE_ROWS // 2:
                piece, held = pa.concat_tables(held), []
                if piece.num_rows:
                    yield piece
                del piece  # nothing here holds what the caller is done with
        if sum(part.num_rows for part in held):
            yield pa.concat_tables(held)

    def read_back(
        self, table: TableId, before: Offset, columns: Sequence[str], rows: int
    ) -> tuple[pa.Table, Offset]:
        """Read at least `rows` changes, or `piece_bytes` (if there are as many), that end at offset
        `before`, backwards by whole row groups; return them in order with the offset before the first."""
        parts = [self.empty(table).select(columns)]
        first = 1
        for part in self.chunks(table, 0, before, [*columns, "_offset"], backwards=True):
            first = part["_offset"][0].as_py()
            parts.insert(1, part.select(columns))
            full = sum(part.nbytes for part in parts) >= self.piece_bytes
            if full or sum(part.num_rows for part in parts) >= rows:
                break
        return pa.concat_tables(parts), first - 1

    def count(self, table: TableId, after: Offset, through: Offset) -> int:
        """See `Staging.count`."""
        total = pc.sum(self.undecodable(table, after, through)["changes"]).as_py() or 0
        staged = self._tables.get(table)
        if staged is None:
            return int(total)
        for file in staged.overlapping(after, through):
            if file.first > after and file.last <= through:
                total += file.rows
            else:
                begin, end = max(after, file.first - 1), min(through, file.last)
                total += sum(part.num_rows for part in staged.chunks(begin, end, ["_offset"]))
        return int(total)

    def undecodable(self, table: TableId, after: Offset, through: Offset, *, whole: bool = False) -> pa.Table:
        """See `Staging.undecodable`."""
        if not self._aside.any(table, after, through):
            return self._aside.nothing
        return self._aside.read(self._tables[UNDECODABLE], table, after, through, whole=whole)

    def forget(self, through: Offset) -> None:
        """Let go of what is kept in memory of changes up to an offset: everything has used them."""
        self._used = max(self._used, through)
        self._recent.forget(through)

    def used(self) -> Offset:
        """Return through which offset everything that runs has used the changes; 0 while unknown."""
        return self._used

    def row_groups(self, table: TableId, after: Offset, through: Offset) -> Iterator[RowGroup]:
        """Yield what there is of a table in `(after, through]`, see `RawTable.row_groups`."""
        staged = self._tables.get(table)
        return staged.row_groups(after, through) if staged else iter(())

    def tables(self) -> dict[TableId, RawTable]:
        """Return the raw tables, among them the internal ones."""
        return dict(self._tables)

    def schemas(self, through: Offset) -> dict[TableId, TableSchema]:
        """See `Staging.schemas`."""
        return {shape.table: shape for offset, shape in self._schemas if offset <= through}

    def decisions(self, model: str, through: Offset) -> Decisions | None:
        """Return what was decided for a model up to an offset; None if nothing was."""
        mine = self._decisions.get(model, [])
        count = bisect_right(mine, through, key=itemgetter(0))
        if not count:
            return None
        known = self._indexed.get(model)
        if known is None or known[0] != count:
            known = self._indexed[model] = (count, Decisions(mine[:count]))
        return known[1]

    def shapes_of(self, table: TableId) -> list[tuple[Offset, TableSchema]]:
        """Return every shape of a table with the offset from which on it holds, the oldest first."""
        return [known for known in self._schemas if known[1].table == table]

    def gone_at(self, table: TableId, column: str, through: Offset) -> Offset:
        """Return the offset of the shape since which a table lacks a column that it once had; 0 where none,
        of those up to an offset, tells."""
        found = 0
        for offset, shape in self._schemas:
            if shape.table == table and offset <= through:
                has = any(each.name == column for each in shape.columns)
                found = 0 if has else found or offset
        return found

    def columns(self, table: TableId) -> list[str]:
        """Return the source's columns of a raw table, also those that it has dropped."""
        return [logical_name(name) for name in self._tables[table].columns if name not in META]

    def _remember_events(self, after: Offset) -> None:
        """Take over the shapes and markers that are staged behind an offset."""
        if HISTORY in self._tables:
            for row in self._read(HISTORY, after, self._tables[HISTORY].version).to_pylist():
                at = Position(row["_epoch"], row["_commit"], row["_ordinal"])
                table = TableId(row["table_schema"], row["table_name"])
                self._remember_event(row["_offset"], row["kind"], table, at, row["content"])

    def _remember_event(self, offset: Offset, kind: str, table: TableId, at: Position, text: str) -> None:
        known = self._schemas[-1][0] if self._schemas else 0
        shape = shape_in(kind, text)
        if shape and offset > known:
            self._schemas.append((offset, shape))
        if kind == "marker":
            self._copies.add(offset, table, at, CopyMark.from_json(text))
        if kind == "decision" and offset > self._decided_through:
            decision = Decision.from_json(text)
            self._decisions.setdefault(decision.model, []).append((offset, decision))
            self._decided_through = offset

    def _read(self, table: TableId, after: Offset, through: Offset) -> pa.Table:
        parts = [self.empty(table), *self.chunks(table, after, through)]
        # A part that was read before a column came lacks it.
        return pa.concat_tables(parts, promote_options="default")

    def chunks(
        self,
        table: TableId,
        after: Offset,
        through: Offset,
        columns: Sequence[str] | None = None,
        *,
        backwards: bool = False,
    ) -> Iterator[pa.Table]:
        """Yield the changes and copied rows of a table in `(after, through]`, row group by row group; nothing
        if there is no such table. `columns` as the source names them (None: all)."""
        staged = self._tables.get(table)
        if staged is None:
            return
        physical = columns and [name for name in staged.columns if logical_name(name) in columns]
        for part in staged.chunks(after, through, physical, backwards=backwards):
            yield as_the_source_says(part)

    def empty(self, table: TableId) -> pa.Table:
        """Return no changes of a raw table that there is."""
        columns = self._tables[table].columns
        return as_the_source_says(pa.schema(list(columns.items())).empty_table())

    def _look_again(self, tables: Iterable[TableId]) -> None:
        """Ask the tables themselves how far they got: a commit may stand although its write failed."""
        for table in tables:
            if self._folder(table).exists():
                self._open(table)

    def _folder(self, table: TableId) -> Path:
        return self._root / encode(table.schema) / encode(table.name)

    def _version(self, table: TableId) -> Offset:
        staged = self._tables.get(table)
        return staged.version if staged else 0

    def _append(self, table: TableId, parts: list[pa.Table], through: Offset) -> None:
        columns: dict[str, pa.DataType] = {}
        for part in parts:
            columns.update({f.name: f.type for f in part.schema if f.name not in META})
        known = self._tables.get(table)
        names = physical_names(known.columns if known else META, columns)
        columns = {names[name]: type_ for name, type_ in columns.items()}
        parts = [part.rename_columns([names[name] for name in part.column_names]) for part in parts]
        staged = known or self._create(table, columns)
        staged.widen(columns)
        whole = [with_columns(part, staged.columns) for part in parts if part.num_rows]
        if whole:  # one part is not copied: it may be one large value
            data = whole[0] if len(whole) == 1 else pa.concat_tables(whole).combine_chunks()
            staged.append(data, through)

    def _create(self, table: TableId, columns: dict[str, pa.DataType]) -> RawTable:
        made = self._table(table)
        made.create(columns)
        self._tables[table] = made
        return made

    def _open(self, table: TableId) -> None:
        found = self._tables.get(table) or self._table(table)
        if found.load():
            self._tables[table] = found
        else:
            self._tables.pop(table, None)

    def _table(self, table: TableId) -> RawTable:
        return RawTable(self._folder(table), self._log_id, self._recent, read_only=self._read_only)
