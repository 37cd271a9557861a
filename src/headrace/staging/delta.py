"""Staging on Delta tables: `<root>/raw/<source>/<schema>/<table>`, one file per table and load.

delta-rs does not fsync on a local disk (18 of 18 simulated power cuts destroyed a table), so a load
is durable in this order, and done only after the last step:

1. the data file, fsynced, and its folder;
2. the Delta commit that names it, which carries `txn(appId = log id, version = offset)`;
3. that commit's file, fsynced, and the log folder.

A table whose version is at or above an entry's offset holds that entry already: staging it again
changes nothing. delta-rs's own checkpoints and log clean-up stay off, since they are not synced.
"""

from __future__ import annotations

import json
import threading
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Field, PostCommitHookProperties, Schema, Transaction
from deltalake.schema import PrimitiveType
from deltalake.transaction import AddAction

from headrace.change import Copy, CopyMark, LoggedEntry, Offset, Position, TableId, TableSchema, shape_in
from headrace.errors import HeadraceError, LogError
from headrace.failpoints import failpoint
from headrace.staging.copies import CopyHistory, beyond, copied, in_source_order, streamed
from headrace.staging.folders import commit_name, decode, encode, fsync, mend_tail
from headrace.staging.naming import physical_names
from headrace.staging.rows import HISTORY, META, as_the_source_says, event_row, no_rows, staged, with_columns

_NO_HOOKS = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)
PIECE_BYTES = 16 << 20
"""How much is decoded at once: of one write, and of what `pieces` yields. An entry is never cut."""
_PIECE_ROWS = 100_000
_CACHE_BYTES = 8 << 20
# Positions grow in small steps, and zstd finds what text repeats: with dictionaries in their place files are
# 2.6 times as large, and take twice as long to write and to read.
_ENCODING = {name: "DELTA_BINARY_PACKED" for name, type_ in META.items() if type_ == pa.int64()}


class StagingForeign(HeadraceError):
    """The staging folder was written from another log."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    first: Offset
    last: Offset
    rows: int


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


@dataclass(slots=True)
class _Table:
    path: Path
    delta: DeltaTable
    version: Offset
    columns: dict[str, pa.DataType]
    files: list[_File] = field(default_factory=list)


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
        self._root = root / "raw" / encode(source)
        self._log_id = log_id
        self._read_only = read_only
        self.piece_bytes = piece_bytes
        self._tables: dict[TableId, _Table] = {}
        self._cache: OrderedDict[Path, pa.Table] = OrderedDict()
        self._cached_bytes = 0
        self._cache_lock = threading.Lock()
        self._moved = threading.Condition()
        self._through: Offset = 0
        self._written: Offset = 0
        self._schemas: list[tuple[Offset, TableSchema]] = []
        self._copies = CopyHistory()
        for path in sorted(self._root.glob("*/*/_delta_log")):
            schema, name = path.parent.parent.name, path.parent.name
            self._open(TableId(decode(schema), decode(name)))
        if HISTORY in self._tables:
            for row in self._read(HISTORY, 0, self._tables[HISTORY].version).to_pylist():
                at = Position(row["_epoch"], row["_commit"], row["_ordinal"])
                table = TableId(row["table_schema"], row["table_name"])
                self._remember_event(row["_offset"], row["kind"], table, at, row["content"])

    def recover(
        self,
        last_offsets: dict[TableId, Offset],
        end: Offset,
        before_unstaged: Callable[[TableId, Offset, Offset], Offset] = lambda _, staged, __: staged,
    ) -> None:
        """Work out how far every table is staged, from where the log last wrote to each.

        A table that lags pulls `through` back to the group before its first entry that is not staged
        (`before_unstaged`, from the table, the last staged offset of its rows and of schemas); without
        that look-up, to what it holds. Groups after that are read from the log again and skipped where
        they are staged already.
        """
        schemas = self._version(HISTORY)
        lagging = [
            before_unstaged(table, self._version(table), schemas if table in self._tables else 0)
            for table, last in last_offsets.items()
            if self._version(table) < last
        ]
        self._through = self._written = min(lagging, default=end)
        ahead = max((table.version for table in self._tables.values()), default=0)
        if ahead > end:
            raise LogError(
                f"{self._root} holds changes up to offset {ahead}, the log ends at {end}: the log was "
                "restored from an older copy or cut off.",
                f"Restore the whole state folder, or delete {self._root} to stage the log anew.",
            )

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
        if entry.kind in ("schema", "marker") and entry.table is not None:
            pending.events.append(item)
            if item.offset > self._version(HISTORY):
                pending.add(HISTORY, event_row(item))
            if shape := shape_in(entry.kind, entry.payload):
                pending.add(shape.table, no_rows(shape))
        elif entry.table is not None and item.offset > self._version(entry.table):
            pending.add(entry.table, staged(item))
        pending.through = item.offset
        if item.ends_group:
            pending.group_end = item.offset

    def _flush(self, pending: _Pending) -> None:
        """Make what is pending durable, table by table, then say so. The end of what apply may use moves
        only where a group ends: a transaction is never applied in part."""
        try:
            for table, parts in pending.parts.items():
                self._append(table, parts, pending.through)
        except BaseException:
            self._look_again(pending.parts)
            raise
        for item in pending.events:
            entry = item.entry
            assert entry.table is not None
            self._remember_event(item.offset, entry.kind, entry.table, entry.last, entry.payload.decode())
        with self._moved:
            self._written = max(self._written, pending.through)
            self._through = max(self._through, pending.group_end)
            self._moved.notify_all()

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

    def copied_parts(self, table: TableId, copy: Copy, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield some columns of a copy's rows, file by file."""
        staged = self._tables[table]
        for file in _overlapping(staged.files, copy.begin, copy.end):
            yield copied(self._load(staged, [file], copy.begin, copy.end), copy).select(columns)

    def copy(self, table: TableId, through: Offset) -> Copy | None:
        """See `Staging.copy`."""
        return self._copies.newest(table, through)

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
        """See `Staging.pieces`. Cut between files, each of which was one piece when it was written."""
        staged = self._tables.get(table)
        held: list[pa.Table] = []
        if staged is None:
            return
        copies = self._copies.between(table, after, through)
        for file in _overlapping(staged.files, after, through):
            part = self._load(staged, [file], after, through)
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
        `before`, backwards by whole files; return them in order with the offset before the first file's."""
        staged = self._tables[table]
        parts = [as_the_source_says(self._empty(staged)).select(columns)]
        first = 1
        for file in reversed(_overlapping(staged.files, 0, before)):
            parts.insert(1, self._load(staged, [file], 0, before).select(columns))
            first = file.first
            full = sum(part.nbytes for part in parts) >= self.piece_bytes
            if full or sum(part.num_rows for part in parts) >= rows:
                break
        return pa.concat_tables(parts), first - 1

    def count(self, table: TableId, after: Offset, through: Offset) -> int:
        """See `Staging.count`."""
        staged = self._tables.get(table)
        if staged is None:
            return 0
        total = 0
        for file in _overlapping(staged.files, after, through):
            if file.first > after and file.last <= through:
                total += file.rows
            else:
                total += self._load(staged, [file], after, through).num_rows
        return total

    def forget(self, through: Offset) -> None:
        """Let go of what is kept in memory of changes up to an offset: everything has used them."""
        with self._cache_lock:
            for path in [path for path in self._cache if int(path.stem) <= through]:
                self._cached_bytes -= self._cache.pop(path).nbytes

    def schemas(self, through: Offset) -> dict[TableId, TableSchema]:
        """See `Staging.schemas`."""
        return {shape.table: shape for offset, shape in self._schemas if offset <= through}

    def size(self) -> int:
        """Return the bytes that the raw tables take on disk."""
        return sum(path.stat().st_size for path in self._root.rglob("*") if path.is_file())

    def _remember_event(self, offset: Offset, kind: str, table: TableId, at: Position, text: str) -> None:
        known = self._schemas[-1][0] if self._schemas else 0
        shape = shape_in(kind, text)
        if shape and offset > known:
            self._schemas.append((offset, shape))
        if kind == "marker":
            self._copies.add(offset, table, at, CopyMark.from_json(text))

    def _read(self, table: TableId, after: Offset, through: Offset) -> pa.Table:
        staged = self._tables[table]
        return self._load(staged, _overlapping(staged.files, after, through), after, through)

    def _load(self, staged: _Table, files: Iterable[_File], after: Offset, through: Offset) -> pa.Table:
        parts = [self._empty(staged)]
        for file in files:
            part = self._content(staged.path / file.name)
            if file.first <= after or file.last > through:
                offsets = part["_offset"]
                part = part.filter(pc.and_(pc.greater(offsets, after), pc.less_equal(offsets, through)))
            parts.append(part)
        return as_the_source_says(pa.concat_tables(parts, promote_options="default"))

    def _empty(self, staged: _Table) -> pa.Table:
        return pa.schema(list(staged.columns.items())).empty_table()

    def _content(self, path: Path) -> pa.Table:
        table = self._cache.get(path)
        return pq.read_table(path) if table is None else table

    def _remember(self, path: Path, table: pa.Table) -> None:
        """Keep what was just written: prepare reads it within moments."""
        with self._cache_lock:
            self._cache[path] = table
            self._cached_bytes += table.nbytes
            while self._cached_bytes > _CACHE_BYTES:
                _, oldest = self._cache.popitem(last=False)
                self._cached_bytes -= oldest.nbytes

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
        self._widen(staged, columns)
        whole = [with_columns(part, staged.columns) for part in parts if part.num_rows]
        if whole:  # one part is not copied: it may be one large value
            data = whole[0] if len(whole) == 1 else pa.concat_tables(whole).combine_chunks()
            self._commit(staged, data, through)

    def _commit(self, staged: _Table, data: pa.Table, through: Offset) -> None:
        name = f"{through:020d}.parquet"
        path = staged.path / name
        pq.write_table(
            data, path, compression="zstd", compression_level=1, write_statistics=["_offset"],
            use_dictionary=False, column_encoding=_ENCODING,
        )  # fmt: skip
        fsync(path)
        fsync(staged.path)
        failpoint("staging.data_synced")
        first, last = data["_offset"][0].as_py(), data["_offset"][-1].as_py()
        stats = {
            "numRecords": data.num_rows,
            "minValues": {"_offset": first},
            "maxValues": {"_offset": last},
            "nullCount": {},
        }
        size = path.stat().st_size
        action = AddAction(name, size, {}, time.time_ns() // 1_000_000, True, json.dumps(stats))
        staged.delta.create_write_transaction(
            [action],
            "append",
            Schema.from_arrow(pa.schema(list(staged.columns.items()))),
            commit_properties=CommitProperties(app_transactions=[Transaction(self._log_id, through)]),
            post_commithook_properties=_NO_HOOKS,
        )
        failpoint("staging.committed")
        self._sync(staged)
        failpoint("staging.commit_synced")
        staged.files.append(_File(name, first, last, data.num_rows))
        staged.version = through
        self._remember(path, data)

    def _create(self, table: TableId, columns: dict[str, pa.DataType]) -> _Table:
        path = self._folder(table)
        path.mkdir(parents=True, exist_ok=True)
        full = {**columns, **META}
        delta = DeltaTable.create(
            path,
            schema=Schema.from_arrow(pa.schema(list(full.items()))),
            configuration={
                "delta.logRetentionDuration": "interval 36500 days",
                # Without this, Delta keeps no statistics of any column past the 32nd.
                "delta.dataSkippingStatsColumns": "_offset",
            },
            post_commithook_properties=_NO_HOOKS,
        )
        staged = _Table(path, delta, 0, full)
        fsync(path / "_delta_log" / commit_name(0))
        for folder in (path / "_delta_log", path, *list(path.parents)[:5]):  # up to the state folder
            fsync(folder)
        self._tables[table] = staged
        return staged

    def _widen(self, staged: _Table, columns: dict[str, pa.DataType]) -> None:
        """Add columns that the source has and the raw table has not: a new column just appears."""
        new = {name: type_ for name, type_ in columns.items() if name not in staged.columns}
        if new:
            fields = [Field(name, PrimitiveType("string"), nullable=True) for name in new]
            staged.delta.alter.add_columns(fields, post_commithook_properties=_NO_HOOKS)
            self._sync(staged)
            staged.columns.update(new)

    def _sync(self, staged: _Table) -> None:
        log = staged.path / "_delta_log"
        before = staged.delta.version()
        staged.delta.update_incremental()
        for version in range(before, staged.delta.version() + 1):
            fsync(log / commit_name(version))
        fsync(log)

    def _open(self, table: TableId) -> None:
        path = self._folder(table)
        if not self._read_only:
            mend_tail(path)
        if not any((path / "_delta_log").glob("*.json")):
            self._tables.pop(table, None)
            return
        delta = DeltaTable(path)
        version = delta.transaction_version(self._log_id)
        actions = pa.table(delta.get_add_actions(flatten=True))
        if version is None and actions.num_rows:
            raise StagingForeign(
                f"{path} was staged from another log than the one in this state folder.",
                f"Restore the state folder that belongs to it, or delete {self._root} and the "
                "destination to load everything from this log.",
            )
        staged = _Table(path, delta, version or 0, _arrow_columns(delta))
        staged.files = sorted(
            (
                _File(a["path"], a["min._offset"], a["max._offset"], a["num_records"])
                for a in actions.to_pylist()
            ),
            key=lambda file: file.first,
        )
        self._tables[table] = staged


def _overlapping(files: Sequence[_File], after: Offset, through: Offset) -> Sequence[_File]:
    """Return the files of a table, which follow one another, with changes in `(after, through]`."""
    begin = bisect_right(files, after, key=lambda file: file.last)
    return files[begin : bisect_right(files, through, key=lambda file: file.first)]


def _arrow_columns(delta: DeltaTable) -> dict[str, pa.DataType]:
    known: dict[str, Any] = dict(META)
    return {f.name: known.get(f.name, pa.string()) for f in delta.schema().fields}
