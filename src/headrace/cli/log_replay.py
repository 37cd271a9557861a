"""`headrace log replay`: a stretch of the log written out, as JSON lines, Debezium's envelope or Parquet."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from cyclopts import Parameter

from headrace.change import STREAMED, LoggedEntry, Offset, SourceMark, TableId, TableSchema
from headrace.cli.log_parquet import ParquetFiles
from headrace.cli.log_where import WHERE, cut_before, cut_behind, time_text
from headrace.debezium import Envelope, Event
from headrace.errors import UserError
from headrace.log.finding import OWN
from headrace.log.places import Cut, Group, Shapes, group_of, groups, lone_commit, parted, told
from headrace.log.sqlite import SQLiteLog
from headrace.payload import HEAD, decode_rows
from headrace.reading import columns_of, only_log, table_named, with_place
from headrace.sources.postgres.lsn import format_lsn

_AT_ONCE = 5_000  # rows that are Python objects at a time
_encode = json.JSONEncoder(ensure_ascii=False).encode

Format = Literal["json", "debezium", "parquet"]


def replay(
    *,
    from_: Annotated[str, Parameter(name="--from", help=f"Where to begin: {WHERE}.")],
    to: Annotated[str, Parameter(help="Where to end, that included; the same words.")] = "end",
    tables: Annotated[str, Parameter(help="Only these tables: a,b; the schema public may be left out.")] = "",
    format: Format = "json",  # noqa: A002 - what users type
    output: Annotated[
        Path | None, Parameter(help="A new file instead of stdout; for parquet, a folder.")
    ] = None,
    prefix: Annotated[str, Parameter(help="Debezium's topic.prefix; the source's name if left out.")] = "",
    database: Annotated[str, Parameter(help="Debezium's source.db; the source's name if left out.")] = "",
    project: Annotated[Path, Parameter(help="The project's folder.")] = Path(),
    source: Annotated[str, Parameter(help="The source, where the project has several.")] = "",
) -> None:
    """Write out the changes between two places: whole transactions, also beside a running pipeline.

    A time or LSN begins with the first transaction committed there or later, and ends with the last one
    committed there or earlier; an offset means the whole group that holds it. The changes of a table are in
    the source's order; those of several tables are so from group to group. Rows of a copy (op r) come
    where they stand in the log, beside the stream.

    - json: a line per change: op, table, position (epoch/commit/ordinal), offset, committed_at, txid, lsn,
      key, row (cells as texts), unchanged (cells that the source did not send), before (the old row's known
      cells). Also truncates (t), messages (m: prefix, content), and gap and resync with their reason.
    - debezium: a line per record: topic, key, value, headers, as Debezium's Postgres connector makes them.
    - parquet: a file per table in the folder --output, with the columns of all its shapes, all texts.
    """
    with closing(SQLiteLog(only_log(project, source), read_only=True)) as log:
        stretch = _stretch(log, from_, to, tables)
        if format == "parquet":
            _parquet(stretch, output)
            return
        with ExitStack() as held:
            out = sys.stdout if output is None else held.enter_context(_new_file(output))
            if format == "json":
                _json(stretch, out)
            else:
                _debezium(stretch, out, prefix or log.source, database or log.source)


_KINDS = ("rows", "copy", "truncate", "message", "undecodable", "marker")


@dataclass(frozen=True, slots=True)
class Stretch:
    """What is between two cuts of a log, of some tables or of all."""

    log: SQLiteLog
    begin: Cut
    end: Cut
    through: Offset
    tables: frozenset[TableId]
    shapes: Shapes

    def groups(self) -> Iterator[Group]:
        """Yield the groups that have a part in it."""
        return groups(self.log, self.begin.offset, self.through)

    def entries(self, group: Group) -> Iterator[LoggedEntry]:
        """Yield the entries of a group that may have a part in it: rows, truncates, messages, what does not
        decode, marks of the source."""
        for item in self.log.entries(*group, kinds=_KINDS):
            entry = item.entry
            if self.tables and entry.table not in self.tables and not (entry.table is None and is_mark(item)):
                continue
            if entry.kind == "marker" and not is_mark(item):
                continue
            if entry.kind in ("truncate", "message") and not self._holds(entry.last[:2]):
                continue
            if entry.kind == "message" and told(entry.payload)["prefix"] == OWN:
                continue
            yield item

    def rows(self, item: LoggedEntry) -> pa.RecordBatch:
        """Return the rows of an entry that are in it, as the payload has them."""
        batch = decode_rows(item.entry.payload)
        if item.entry.kind == "copy":
            return batch
        return parted(batch, item.entry.first.epoch, self.begin, self.end)

    def shape(self, item: LoggedEntry) -> TableSchema:
        """Return the shape that an entry's rows have."""
        assert item.entry.table is not None
        return self.shapes.of(item.entry.table, item.entry.schema_version)

    def commits(self, group: Group) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Return the commits of a group, in the stretch or not; of messages outside of one their LSN."""
        found = [np.empty(0, np.int64)]
        for item in self.log.headers(*group):
            entry = item.entry
            if entry.kind not in STREAMED or entry.kind == "schema":
                continue
            if entry.kind in ("rows", "undecodable") and lone_commit(item) is None:
                found.append(pc.unique(decode_rows(self._payload(item))["_commit"]).to_numpy())
            elif entry.kind == "message" and not entry.txids[0]:
                words = told(self._payload(item))
                if words["prefix"] != OWN:  # ours may stand for what the server said, which is no commit
                    found.append(np.array([words["lsn"]]))
            else:
                found.append(np.array([entry.last.commit]))
        return np.concatenate(found)

    def last_before(self) -> list[Group]:
        """Return the last group before it that has commits, if the log still holds one."""
        found = self.log.raw_rows(
            'SELECT "offset" FROM entries WHERE "offset" <= ? '
            "AND kind IN ('rows', 'truncate', 'message', 'undecodable') "
            "AND NOT (kind = 'message' AND min_txid = 0 AND CAST(payload AS TEXT) ->> 'prefix' = ?) "
            'ORDER BY "offset" DESC LIMIT 1',
            (self.begin.offset, OWN),
        )
        return [group_of(self.log, int(offset)) for (offset,) in found]

    def _payload(self, item: LoggedEntry) -> bytes:
        return next(self.log.entries(item.offset - 1, item.offset)).entry.payload

    def _holds(self, commit: tuple[int, ...]) -> bool:
        behind_begin = self.begin.commit is None or commit >= self.begin.commit
        return behind_begin and (self.end.commit is None or commit < self.end.commit)


def is_mark(item: LoggedEntry) -> bool:
    """Whether an entry says something of the source as a whole: a gap, a new beginning."""
    return item.entry.kind == "marker" and item.entry.table is None


def _stretch(log: SQLiteLog, from_: str, to: str, tables: str) -> Stretch:
    shapes = Shapes(log)
    known = shapes.tables()
    chosen = frozenset(table_named(name.strip()) for name in tables.split(",") if name.strip())
    if missing := sorted(map(str, chosen - set(known))):
        names = ", ".join(map(str, known)) or "none"
        raise UserError(f"The log of {log.source} knows no table {', '.join(missing)}.", f"It has: {names}.")
    begin, end = cut_before(log, from_), cut_behind(log, to)
    if (end.offset, end.commit or (0, 0)) < (begin.offset, begin.commit or (0, 0)):
        raise UserError(f"{to} is before {from_}.", "Let --from be the earlier one.")
    through = end.offset if end.commit is None else group_of(log, end.offset + 1).through
    return Stretch(log, begin, end, through, chosen, shapes)


# -- JSON lines


def _json(stretch: Stretch, out: TextIO) -> None:
    for group in stretch.groups():
        for item in stretch.entries(group):
            for told_ in _lines(stretch, item):
                out.write(_encode(told_) + "\n")


def _lines(stretch: Stretch, item: LoggedEntry) -> Iterator[Mapping[str, Any]]:
    entry = item.entry
    if entry.kind in ("rows", "copy"):
        key = stretch.shape(item).key
        batch = stretch.rows(item)
        for start in range(0, batch.num_rows, _AT_ONCE):
            for row in batch.slice(start, _AT_ONCE).to_pylist():
                yield _change(item, key, row)
        return
    if entry.kind == "undecodable":
        for row in stretch.rows(item).to_pylist():
            yield _undecodable(item, row)
        return
    place = _place(item, entry.last.commit, entry.last.ordinal, entry.committed_at)
    if entry.kind == "marker":
        mark = SourceMark.from_json(entry.payload)
        yield {"op": mark.kind, **place, "reason": mark.reason}
        return
    words = told(entry.payload)
    where = {"txid": words["txid"], "lsn": format_lsn(words["lsn"])}
    if entry.kind == "truncate":
        yield {"op": "t", "table": str(entry.table), **place, **where}
    else:
        yield {"op": "m", **place, **where, "prefix": words["prefix"], "content": words["content"]}


def _change(item: LoggedEntry, key: tuple[str, ...], row: dict[str, Any]) -> dict[str, Any]:
    op, commit, ordinal, committed_at, txid, lsn = (row.pop(name) for name in HEAD)
    unchanged, before = row.pop("_unchanged", None) or [], row.pop("_before", None)
    cells = {name: value for name, value in row.items() if name not in unchanged}
    deleted = op == "d"
    return {
        "op": op,
        "table": str(item.entry.table),
        **_place(item, commit, ordinal, committed_at),
        "txid": txid or None,
        "lsn": format_lsn(lsn),
        "key": {name: row[name] for name in key} or None,
        "row": None if deleted else cells,
        "unchanged": [] if deleted else unchanged,
        "before": cells if deleted else None if before is None else dict(before),
    }


def _undecodable(item: LoggedEntry, row: dict[str, Any]) -> dict[str, Any]:
    _, commit, ordinal, committed_at, txid, lsn = (row[name] for name in HEAD)
    return {
        "op": "undecodable",
        "table": str(item.entry.table) if item.entry.table else None,
        **_place(item, commit, ordinal, committed_at),
        "txid": txid or None,
        "lsn": format_lsn(lsn),
        "kind": row["kind"],
        "why": row["why"],
        "message": row["message"].hex(),
    }


def _place(item: LoggedEntry, commit: int, ordinal: int, committed_at: int) -> dict[str, Any]:
    return {
        "position": f"{item.entry.first.epoch}/{commit}/{ordinal}",
        "offset": item.offset,
        "committed_at": time_text(committed_at),
    }


# -- Debezium


def _debezium(stretch: Stretch, out: TextIO, prefix: str, database: str) -> None:
    envelope = Envelope(prefix, database)
    for group in chain(stretch.last_before(), stretch.groups()):
        commits = stretch.commits(group)
        if commits.size:
            envelope.see(stretch.log.place(group.through)[0].epoch, commits)
        if group.through <= stretch.begin.offset:
            continue  # it is here for its commits only
        for item in stretch.entries(group):
            for event in _events(stretch, envelope, item):
                record = {
                    "topic": event.topic,
                    "key": event.key,
                    "value": event.value,
                    "headers": event.headers,
                }
                out.write(_encode(record) + "\n")


def _events(stretch: Stretch, envelope: Envelope, item: LoggedEntry) -> Iterator[Event]:
    if item.entry.kind == "truncate":
        yield envelope.truncate(item.entry)
    elif item.entry.kind == "message":
        yield envelope.message(item.entry)
    elif is_mark(item) or item.entry.kind == "undecodable":
        _warn(item)
    else:
        batch, shape = stretch.rows(item), stretch.shape(item)
        for start in range(0, batch.num_rows, _AT_ONCE):
            yield from envelope.rows(shape, batch.slice(start, _AT_ONCE))


# -- Parquet


def _parquet(stretch: Stretch, folder: Path | None) -> None:
    if folder is None:
        raise UserError("Parquet needs a folder.", "Name one with --output.")
    with ParquetFiles(folder, lambda table: columns_of(_names(stretch, table))) as files:
        for group in stretch.groups():
            for item in stretch.entries(group):
                if item.entry.kind in ("rows", "copy"):
                    assert item.entry.table is not None
                    files.add(item.entry.table, with_place(stretch.rows(item), item))
                elif item.entry.kind == "truncate":
                    assert item.entry.table is not None
                    files.add(item.entry.table, _truncated(item))
                elif is_mark(item) or item.entry.kind == "undecodable":
                    _warn(item)
    for table, count in sorted(files.rows.items()):
        print(f"{table}: {count} rows")
    if not files.rows:
        print("No changes there.")


def _names(stretch: Stretch, table: TableId) -> list[str]:
    """Return the columns of all shapes that a table has in the stretch."""
    versions = stretch.log.raw_rows(
        "SELECT DISTINCT schema_version FROM entries WHERE table_schema = ? AND table_name = ? "
        "AND kind IN ('rows', 'copy', 'truncate') AND \"offset\" > ? AND \"offset\" <= ? ORDER BY 1",
        (*table, stretch.begin.offset, stretch.through),
    )
    shapes = [stretch.shapes.of(table, int(version)) for (version,) in versions]
    return list(dict.fromkeys(column.name for shape in shapes for column in shape.columns))


def _truncated(item: LoggedEntry) -> pa.RecordBatch:
    """Return the row of a truncate: op t, and no cell."""
    entry, words = item.entry, told(item.entry.payload)
    head = ["t", entry.last.commit, entry.last.ordinal, entry.committed_at, words["txid"], words["lsn"]]
    batch = pa.RecordBatch.from_pydict({name: [value] for name, value in zip(HEAD, head, strict=True)})
    return with_place(batch, item)


def _warn(item: LoggedEntry) -> None:
    """Say on standard error what has no form in the output."""
    if item.entry.kind == "undecodable":
        of = f" of {item.entry.table}" if item.entry.table else ""
        what = f"{item.entry.rows} messages{of} that do not decode are left out"
        print(f"At offset {item.offset}, {what}: headrace log show {item.offset}", file=sys.stderr)
        return
    mark = SourceMark.from_json(item.entry.payload)
    print(f"At offset {item.offset}, {mark.kind} of the source: {mark.reason}", file=sys.stderr)


def _new_file(path: Path) -> TextIO:
    try:
        return path.open("x", encoding="utf-8")
    except FileExistsError:
        raise UserError(f"{path} is there already.", "Name a new file, or remove it.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.", "Name another file.") from error
