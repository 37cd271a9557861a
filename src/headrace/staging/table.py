"""One raw table: a Delta table whose files follow one another in the order of the log.

delta-rs does not fsync on a local disk (18 of 18 simulated power cuts destroyed a table), so what is
written is durable in this order, and done only after the last step:

1. the data file, fsynced, and its folder;
2. the Delta commit that names it; for a load it carries `txn(appId = log id, version = offset)`;
3. that commit's file, fsynced, and the log folder.

A commit and its sync are one under the table's lock, so that at most the last commit can be torn. Files
that are listed no longer are deleted later, by `sweep`: whoever opened one keeps it, and whoever finds
it gone looks at the list again, where other files hold the same rows.
"""

from __future__ import annotations

import json
import os
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Field, PostCommitHookProperties, Schema, Transaction
from deltalake.schema import PrimitiveType
from deltalake.transaction import AddAction, RemoveAction

from headrace.change import Offset
from headrace.errors import HeadraceError
from headrace.failpoints import failpoint
from headrace.staging.checkpoints import (
    clean_log,
    drop_unproven,
    newest_checkpoint,
    prove_checkpoint,
    write_checkpoint,
)
from headrace.staging.folders import commit_name, fsync, mend_tail
from headrace.staging.recent import Recent
from headrace.staging.rows import META, with_columns

_PLAIN = {"long": pa.int64(), "binary": pa.binary()}
"""The Arrow types of the types in Delta that internal tables have beside text."""

_NO_HOOKS = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)
_PROPERTIES = {
    "delta.logRetentionDuration": "interval 36500 days",
    # Without this, Delta keeps no statistics of any column past the 32nd.
    "delta.dataSkippingStatsColumns": "_offset",
    # Every checkpoint holds the removed files of this time.
    "delta.deletedFileRetentionDuration": "interval 1 hours",
}
# Positions grow in small steps, and zstd finds what text repeats: with dictionaries in their place files are
# 2.6 times as large, and take twice as long to write and to read.
FORMAT: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 1,
    "write_statistics": ["_offset"],
    "use_dictionary": False,
    "column_encoding": {name: "DELTA_BINARY_PACKED" for name, type_ in META.items() if type_ == pa.int64()},
}
"""How data files are written."""


class StagingForeign(HeadraceError):
    """The staging folder was written from another log."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class DataFile:
    """A live file: the offsets of its first and last change, its rows, its size in bytes, and when it was
    written (milliseconds since 1970)."""

    name: str
    first: Offset
    last: Offset
    rows: int
    bytes: int
    written_at: int


class RowGroup(NamedTuple):
    """Rows that are read at once: the offsets of the first and the last change, how many rows, and how many
    bytes they take, about."""

    first: Offset
    last: Offset
    rows: int
    bytes: int


class RawTable:
    """One raw table. One thread appends, another maintains; any may read."""

    def __init__(self, path: Path, log_id: str, recent: Recent, *, read_only: bool = False) -> None:
        """Name a table; `load` opens it, `create` makes it."""
        self.path = path
        self.columns: dict[str, pa.DataType] = {}
        self.version: Offset = 0
        self.files: Sequence[DataFile] = []
        self._log = path / "_delta_log"
        self._log_id = log_id
        self._recent = recent
        self._read_only = read_only
        self._lock = threading.RLock()
        self._unlisted: set[str] = set()
        self._checkpoint = -1
        self._delta: DeltaTable

    def load(self) -> bool:
        """Open the table, also again after a failure; False if there is none. Repairs what a power cut
        left half written, unless the table is read only.

        Raises StagingForeign when it belongs to another log.
        """
        with self._lock:
            if not self._read_only and self._log.exists():
                drop_unproven(self._log)
                mend_tail(self.path, newest_checkpoint(self._log))
            if not any(self._log.glob("*.json")):
                return False
            self._delta = DeltaTable(self.path)
            version = self._delta.transaction_version(self._log_id)
            actions = pa.table(self._delta.get_add_actions(flatten=True))
            if version is None and actions.num_rows:
                raise StagingForeign(
                    f"{self.path} was staged from another log than the one in this state folder.",
                    f"Restore the state folder that belongs to it, or delete {self.path.parents[1]} and the "
                    "destination to load everything from this log.",
                )
            self.version = version or 0
            self.columns = _arrow_columns(self._delta)
            self.files = _files(actions)
            self._checkpoint = newest_checkpoint(self._log)
            self._unlisted = {path.name for path in self.path.glob("*.parquet")}
            self._unlisted.difference_update(file.name for file in self.files)
            return True

    def create(self, columns: dict[str, pa.DataType]) -> None:
        """Make the table, with the columns of the source and those that every raw table has."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.columns = {**columns, **META}
        self._delta = DeltaTable.create(
            self.path,
            schema=self._schema(),
            configuration=_PROPERTIES,
            post_commithook_properties=_NO_HOOKS,
        )
        fsync(self._log / commit_name(0))
        for folder in (self._log, self.path, *list(self.path.parents)[:5]):  # up to the state folder
            fsync(folder)

    def widen(self, columns: dict[str, pa.DataType]) -> None:
        """Add columns that the source has and the raw table has not: a new column just appears."""
        new = {name: type_ for name, type_ in columns.items() if name not in self.columns}
        if new:
            fields = [Field(name, PrimitiveType("string"), nullable=True) for name in new]
            with self._lock:
                self._delta.alter.add_columns(fields, post_commithook_properties=_NO_HOOKS)
                self._sync()
                self.columns = {**self.columns, **new}

    def append(self, data: pa.Table, through: Offset) -> None:
        """Write rows as a file, so that the table holds everything up to `through`; durable on return."""
        name = f"{through:020d}.parquet"
        path = self._begin_file(name)
        # One row group: an entry is never cut between two.
        pq.write_table(data, path, row_group_size=data.num_rows, **FORMAT)
        file = self._end_file(name, data["_offset"][0].as_py(), data["_offset"][-1].as_py(), data.num_rows)
        with self._lock:
            self._commit([file], (), CommitProperties(app_transactions=[Transaction(self._log_id, through)]))
            failpoint("staging.commit_synced")
            self.files = [*self.files, file]
            self.version = through
        self._recent.add(path, file.last, data)

    def merge(self, run: Sequence[DataFile], groups: Iterable[pa.Table]) -> None:
        """Put one file in the place of a run of neighbouring files; durable on return.

        `groups` are the rows of the run in order, each to become a row group. The replaced files stay until
        `sweep`; if one of them is listed no longer, nothing changes.
        """
        first, last, rows = run[0].first, run[-1].last, sum(file.rows for file in run)
        name = f"{first:020d}-{last:020d}.parquet"
        path = self._begin_file(name)
        columns = self.columns
        try:
            with pq.ParquetWriter(path, pa.schema(list(columns.items())), **FORMAT) as writer:
                for group in groups:
                    writer.write_table(with_columns(group, columns), row_group_size=group.num_rows)
            found = pq.read_metadata(path).num_rows
            assert found == rows, f"{path} would hold {found} rows in the place of {rows}"
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        failpoint("staging.merge_written")
        file = self._end_file(name, first, last, rows)
        for old in run:
            with suppress(FileNotFoundError):
                os.utime(self.path / old.name)  # the grace period begins
        with self._lock:
            begin = bisect_right(self.files, first - 1, key=lambda file: file.last)
            if list(self.files[begin : begin + len(run)]) != list(run):
                self._unlisted.add(name)
                return
            try:
                self._commit([file], run, CommitProperties(custom_metadata={"headrace": "merge"}))
            except BaseException:
                self.load()  # the commit may stand although it failed
                raise
            self.files = [*self.files[:begin], file, *self.files[begin + len(run) :]]
            self._unlisted.update(old.name for old in run)
        failpoint("staging.merge_synced")

    def checkpoint(self, every: int, grace: float) -> bool:
        """Write a checkpoint when `every` commits have come since the last, and clean up behind the
        last that is older than `grace` seconds; say whether anything was done."""
        with self._lock:
            version = self._delta.version()
            due = version - self._checkpoint >= every
            if due:
                self._set_properties()
                version = write_checkpoint(self._delta)
                files, through = {file.name for file in self.files}, self.version
        if due:
            prove_checkpoint(self._log, version, files, self._log_id, through)
            self._checkpoint = version
        return clean_log(self._log, self._checkpoint, grace) > 0 or due

    def sweep(self, grace: float) -> int:
        """Delete files that no list has named for `grace` seconds; return how many."""
        before, gone = time.time() - grace, 0
        with self._lock:
            for name in sorted(self._unlisted):
                path = self.path / name
                with suppress(FileNotFoundError):
                    if path.stat().st_mtime > before:
                        continue
                    path.unlink()
                    gone += 1
                    failpoint("staging.swept")
                self._unlisted.discard(name)
        return gone

    def overlapping(self, after: Offset, through: Offset) -> Sequence[DataFile]:
        """Return the files with changes in `(after, through]`."""
        files = self.files
        begin = bisect_right(files, after, key=lambda file: file.last)
        return files[begin : bisect_right(files, through, key=lambda file: file.first)]

    def chunks(
        self,
        after: Offset,
        through: Offset,
        columns: Collection[str] | None = None,
        *,
        backwards: bool = False,
        use_threads: bool = True,
    ) -> Iterator[pa.Table]:
        """Yield the rows in `(after, through]`, row group by row group; none is empty, none cuts an entry.

        `columns` names what is needed at least (None: all). `backwards` yields the last row group first.
        """
        types = self.columns
        wanted = {name: type_ for name, type_ in types.items() if columns is None or name in columns}
        names = [*wanted, "_offset"]
        waiting = self._waiting(after, through, backwards)
        while waiting:
            file = waiting.popleft()
            path = self.path / file.name
            source = self._recent.get(path)
            if source is None:
                try:
                    source = pq.ParquetFile(path)
                except FileNotFoundError:
                    self._look_again(file)
                    waiting = self._waiting(after, through, backwards)
                    continue
            for part in _row_groups(
                source, after, through, names, backwards=backwards, use_threads=use_threads
            ):
                if file.first <= after or file.last > through:
                    offsets = part["_offset"]
                    inside = pc.and_(pc.greater(offsets, after), pc.less_equal(offsets, through))
                    part = part.filter(inside)  # noqa: PLW2901
                if part.num_rows:
                    yield with_columns(part, wanted)
                del part
            after, through = (after, file.first - 1) if backwards else (file.last, through)

    def row_groups(self, after: Offset, through: Offset) -> Iterator[RowGroup]:
        """Yield the row groups with changes in `(after, through]`, without reading them; one at an end of the
        span may reach beyond it."""
        waiting = self._waiting(after, through, backwards=False)
        while waiting:
            file = waiting.popleft()
            path = self.path / file.name
            if (kept := self._recent.get(path)) is not None:
                yield RowGroup(file.first, file.last, file.rows, kept.nbytes)
                after = file.last
                continue
            try:
                metadata = pq.read_metadata(path)
            except FileNotFoundError:
                self._look_again(file)
                waiting = self._waiting(after, through, backwards=False)
                continue
            yield from (
                group for group in _groups_in(metadata) if group.last > after and group.first <= through
            )
            after = file.last

    def _waiting(self, after: Offset, through: Offset, backwards: bool) -> deque[DataFile]:
        files = self.overlapping(after, through)
        return deque(reversed(files) if backwards else files)

    def _look_again(self, missing: DataFile) -> None:
        """Find what took the place of a file that is gone; raises FileNotFoundError if nothing did."""
        if self._read_only:
            self.load()
        if missing in self.files:
            raise FileNotFoundError(f"{self.path / missing.name} is missing, and the Delta log names it")

    def _begin_file(self, name: str) -> Path:
        """Return where to write a new file, which may lie there already from an attempt that died."""
        with self._lock:
            self._unlisted.discard(name)
        return self.path / name

    def _end_file(self, name: str, first: Offset, last: Offset, rows: int) -> DataFile:
        path = self.path / name
        fsync(path)
        fsync(self.path)
        failpoint("staging.data_synced")
        return DataFile(name, first, last, rows, path.stat().st_size, time.time_ns() // 1_000_000)

    def _commit(
        self, added: Sequence[DataFile], removed: Sequence[DataFile], properties: CommitProperties
    ) -> None:
        now = time.time_ns() // 1_000_000
        # A merge changes no data: who follows the table as a stream must not see rows again.
        changes = not removed
        adds = [AddAction(f.name, f.bytes, {}, f.written_at, changes, _stats(f)) for f in added]
        removes = [RemoveAction(f.name, changes, now, f.bytes, {}) for f in removed]
        self._delta.create_write_transaction(
            [*adds, *removes],
            "append",
            self._schema(),
            commit_properties=properties,
            post_commithook_properties=_NO_HOOKS,
        )
        failpoint("staging.committed")
        self._sync()

    def _sync(self) -> None:
        before = self._delta.version()
        self._delta.update_incremental()
        for version in range(before, self._delta.version() + 1):
            with suppress(FileNotFoundError):  # the one before may be cleaned up
                fsync(self._log / commit_name(version))
        fsync(self._log)

    def _set_properties(self) -> None:
        """Give a table that an older version made the properties of a new one."""
        known = self._delta.metadata().configuration
        missing = {name: value for name, value in _PROPERTIES.items() if known.get(name) != value}
        if missing:
            self._delta.alter.set_table_properties(missing, post_commithook_properties=_NO_HOOKS)
            self._sync()

    def _schema(self) -> Schema:
        return Schema.from_arrow(pa.schema(list(self.columns.items())))


def _row_groups(
    source: pa.Table | pq.ParquetFile,
    after: Offset,
    through: Offset,
    columns: Sequence[str],
    *,
    backwards: bool,
    use_threads: bool,
) -> Iterator[pa.Table]:
    """Yield the row groups of a file that overlap `(after, through]`; closes it."""
    if isinstance(source, pa.Table):
        yield source
        return
    with source:
        metadata = source.metadata
        at = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == "_offset")
        chosen = []
        for i in range(metadata.num_row_groups):
            offsets = metadata.row_group(i).column(at).statistics
            if offsets is None or (offsets.max > after and offsets.min <= through):
                chosen.append(i)
        for i in reversed(chosen) if backwards else chosen:
            yield source.read_row_group(i, columns=columns, use_threads=use_threads)


def _groups_in(metadata: pq.FileMetaData) -> Iterator[RowGroup]:
    at = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == "_offset")
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        offsets = group.column(at).statistics
        yield RowGroup(offsets.min, offsets.max, group.num_rows, group.total_byte_size)


def _stats(file: DataFile) -> str:
    return json.dumps(
        {
            "numRecords": file.rows,
            "minValues": {"_offset": file.first},
            "maxValues": {"_offset": file.last},
            "nullCount": {},
        }
    )


def _files(actions: pa.Table) -> Sequence[DataFile]:
    names = ("path", "min._offset", "max._offset", "num_records", "size_bytes", "modification_time")
    cells = zip(*(actions[name].to_pylist() for name in names), strict=True) if actions.num_rows else ()
    return sorted((DataFile(*row) for row in cells), key=lambda file: file.first)


def _arrow_columns(delta: DeltaTable) -> dict[str, pa.DataType]:
    known: dict[str, Any] = dict(META)
    return {
        field.name: known.get(field.name) or _PLAIN.get(getattr(field.type, "type", ""), pa.string())
        for field in delta.schema().fields
    }
