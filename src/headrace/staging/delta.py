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
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Field, PostCommitHookProperties, Schema, Transaction
from deltalake.schema import PrimitiveType
from deltalake.transaction import AddAction

from headrace.change import LoggedEntry, Offset, TableId, TableSchema
from headrace.errors import HeadraceError, LogError
from headrace.failpoints import failpoint
from headrace.payload import BEFORE, HEAD, UNCHANGED, decode_rows
from headrace.staging.naming import logical_name, physical_names

SCHEMAS = TableId("", "_schemas")
"""The internal table that holds the schema history: one row per schema entry."""

_META = {
    "_op": pa.string(),
    "_epoch": pa.int64(),
    "_commit": pa.int64(),
    "_ordinal": pa.int64(),
    "_offset": pa.int64(),
    "_committed_at": pa.int64(),
    "_txid": pa.int64(),
    "_unchanged": UNCHANGED,
    "_before": BEFORE,
}
_NO_HOOKS = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)
_CACHE_BYTES = 48 << 20


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
class _Table:
    path: Path
    delta: DeltaTable
    version: Offset
    columns: dict[str, pa.DataType]
    files: list[_File] = field(default_factory=list)


class DeltaStaging:
    """The raw tables of one source. One writer; `read` may be called from other threads."""

    def __init__(self, root: Path, source: str, log_id: str, *, read_only: bool = False) -> None:
        """Open what is there and, unless `read_only`, repair what a power cut left half written.

        Raises StagingForeign when the folder belongs to another log.
        """
        self._root = root / "raw" / _encode(source)
        self._log_id = log_id
        self._read_only = read_only
        self._tables: dict[TableId, _Table] = {}
        self._cache: OrderedDict[Path, pa.Table] = OrderedDict()
        self._cached_bytes = 0
        self._through: Offset = 0
        self._schemas: list[tuple[Offset, TableSchema]] = []
        for path in sorted(self._root.glob("*/*/_delta_log")):
            schema, name = path.parent.parent.name, path.parent.name
            self._open(TableId(_decode(schema), _decode(name)))
        if SCHEMAS in self._tables:
            rows = self._read(SCHEMAS, 0, self._tables[SCHEMAS].version)
            texts = zip(rows["_offset"].to_pylist(), rows["schema"].to_pylist(), strict=True)
            self._schemas = [(offset, TableSchema.from_json(text)) for offset, text in texts]

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
        schemas = self._version(SCHEMAS)
        lagging = [
            before_unstaged(table, self._version(table), schemas if table in self._tables else 0)
            for table, last in last_offsets.items()
            if self._version(table) < last
        ]
        self._through = min(lagging, default=end)
        ahead = max((table.version for table in self._tables.values()), default=0)
        if ahead > end:
            raise LogError(
                f"{self._root} holds changes up to offset {ahead}, the log ends at {end}: the log was "
                "restored from an older copy or cut off.",
                f"Restore the whole state folder, or delete {self._root} to stage the log anew.",
            )

    def write(self, entries: Sequence[LoggedEntry]) -> None:
        """See `Staging.write`."""
        if not entries:
            return
        through = entries[-1].offset
        pending: dict[TableId, list[pa.Table]] = {}
        shapes: list[tuple[Offset, TableSchema]] = []
        for item in entries:
            table = item.entry.table
            if item.entry.kind == "schema":
                shape = TableSchema.from_json(item.entry.payload)
                shapes.append((item.offset, shape))
                if item.offset > self._version(SCHEMAS):
                    pending.setdefault(SCHEMAS, []).append(_schema_row(item))
                pending.setdefault(shape.table, []).append(_no_rows(shape))
            elif table is not None and item.offset > self._version(table):
                pending.setdefault(table, []).append(_staged(item))
        try:
            for table, parts in pending.items():
                self._append(table, parts, through)
        except BaseException:
            self._look_again(pending)
            raise
        known = {offset for offset, _ in self._schemas}
        self._schemas += [pair for pair in shapes if pair[0] not in known]
        self._through = through

    def through(self) -> Offset:
        """See `Staging.through`."""
        return self._through

    def read(self, table: TableId, after: Offset, through: Offset) -> pa.Table:
        """See `Staging.read`."""
        return self._read(table, after, through)

    def read_back(
        self, table: TableId, before: Offset, columns: Sequence[str], rows: int
    ) -> tuple[pa.Table, Offset]:
        """Read at least `rows` changes (if there are as many) that end at offset `before`, backwards
        by whole files; return them in order with the offset before the first file's."""
        staged = self._tables[table]
        chosen: list[_File] = []
        for file in reversed(staged.files):
            if file.first > before:
                continue
            chosen.append(file)
            if sum(f.rows for f in chosen) >= rows:
                break
        if not chosen:
            return _as_the_source_says(self._empty(staged)).select(columns), 0
        return self._load(staged, reversed(chosen), 0, before).select(columns), chosen[-1].first - 1

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

    def schemas(self, through: Offset) -> dict[TableId, TableSchema]:
        """See `Staging.schemas`."""
        return {shape.table: shape for offset, shape in self._schemas if offset <= through}

    def size(self) -> int:
        """Return the bytes that the raw tables take on disk."""
        return sum(path.stat().st_size for path in self._root.rglob("*") if path.is_file())

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
        return _as_the_source_says(pa.concat_tables(parts, promote_options="default"))

    def _empty(self, staged: _Table) -> pa.Table:
        return pa.schema(list(staged.columns.items())).empty_table()

    def _content(self, path: Path) -> pa.Table:
        table = self._cache.get(path)
        return pq.read_table(path) if table is None else table

    def _remember(self, path: Path, table: pa.Table) -> None:
        """Keep what was just written: prepare reads it within moments."""
        self._cache[path] = table
        self._cached_bytes += table.nbytes
        while self._cached_bytes > _CACHE_BYTES and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= oldest.nbytes

    def _look_again(self, tables: Iterable[TableId]) -> None:
        """Ask the tables themselves how far they got: a commit may stand although its write failed."""
        for table in tables:
            if self._folder(table).exists():
                self._open(table)

    def _folder(self, table: TableId) -> Path:
        return self._root / _encode(table.schema) / _encode(table.name)

    def _version(self, table: TableId) -> Offset:
        staged = self._tables.get(table)
        return staged.version if staged else 0

    def _append(self, table: TableId, parts: list[pa.Table], through: Offset) -> None:
        columns: dict[str, pa.DataType] = {}
        for part in parts:
            columns.update({f.name: f.type for f in part.schema if f.name not in _META})
        known = self._tables.get(table)
        names = physical_names(known.columns if known else _META, columns)
        columns = {names[name]: type_ for name, type_ in columns.items()}
        parts = [part.rename_columns([names[name] for name in part.column_names]) for part in parts]
        staged = known or self._create(table, columns)
        if parts:
            self._widen(staged, columns)
            data = pa.concat_tables([self._empty(staged), *parts], promote_options="default")
            if data.num_rows:
                self._commit(staged, data.combine_chunks(), through)

    def _commit(self, staged: _Table, data: pa.Table, through: Offset) -> None:
        name = f"{through:020d}.parquet"
        path = staged.path / name
        pq.write_table(data, path, compression="zstd", compression_level=1, write_statistics=["_offset"])
        _fsync(path)
        _fsync(staged.path)
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
        full = {**columns, **_META}
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
        _fsync(path / "_delta_log" / _commit_name(0))
        for folder in (path / "_delta_log", path, *list(path.parents)[:5]):  # up to the state folder
            _fsync(folder)
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
            _fsync(log / _commit_name(version))
        _fsync(log)

    def _open(self, table: TableId) -> None:
        path = self._folder(table)
        if not self._read_only:
            _mend_tail(path)
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


def _staged(item: LoggedEntry) -> pa.Table:
    """Turn one log entry into staged rows. A truncate and the begin of a copy are one row of op `t`:
    everything before it is over."""
    entry = item.entry
    if entry.kind == "rows":
        batch = pa.Table.from_batches([decode_rows(entry.payload)])
    else:
        head = ["t", entry.last.commit, entry.last.ordinal, entry.committed_at, 0]
        batch = pa.table({name: [value] for name, value in zip(HEAD, head, strict=True)})
    constant = pa.array([entry.first.epoch, item.offset], pa.int64())
    for name, value in zip(("_epoch", "_offset"), constant, strict=True):
        batch = batch.append_column(name, pa.repeat(value, batch.num_rows))
    return batch


def _as_the_source_says(table: pa.Table) -> pa.Table:
    return table.rename_columns([logical_name(name) for name in table.column_names])


def _no_rows(shape: TableSchema) -> pa.Table:
    """Return a table's columns without a row: the raw table has them from its schema entry on."""
    columns = [(column.name, pa.string()) for column in shape.columns]
    return pa.schema([*columns, *_META.items()]).empty_table()


def _schema_row(item: LoggedEntry) -> pa.Table:
    return _staged(item).append_column("schema", pa.array([item.entry.payload.decode()]))


def _overlapping(files: Sequence[_File], after: Offset, through: Offset) -> list[_File]:
    return [file for file in files if file.last > after and file.first <= through]


def _arrow_columns(delta: DeltaTable) -> dict[str, pa.DataType]:
    known: dict[str, Any] = dict(_META)
    return {f.name: known.get(f.name, pa.string()) for f in delta.schema().fields}


def _mend_tail(path: Path) -> None:
    """Delete trailing commits that a power cut tore (unreadable, or naming a file of another size) and
    sync the last whole one, which a crash may have left unsynced.

    Nothing acknowledged is lost: a load is done only when commit and files are synced.
    """
    for commit in sorted((path / "_delta_log").glob("*.json"), reverse=True):
        try:
            actions = [json.loads(line) for line in commit.read_text().splitlines()]
            adds = [action["add"] for action in actions if "add" in action]
            if actions and all((path / add["path"]).stat().st_size == add["size"] for add in adds):
                for file in (*(path / add["path"] for add in adds), path, commit, commit.parent):
                    _fsync(file)
                return
        except (ValueError, OSError):
            pass
        commit.unlink()


def _commit_name(version: int) -> str:
    return f"{version:020d}.json"


def _encode(name: str) -> str:
    """Make any table name a safe folder name: never hidden, `.`, empty or read as an escape.

    Percent encoding with `~` for `%`, which object stores would decode.
    """
    if name == "_delta_log":  # Delta's own
        return "~5Fdelta_log"
    return quote(name, safe="").replace("~", "%7E").replace(".", "%2E").replace("%", "~") or "~"


def _decode(folder: str) -> str:
    return "" if folder == "~" else unquote(folder.replace("~", "%"))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
