"""`headrace log head`, `tail`, `show` and `consumers`: what stands in a log, and who has read how far."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from headrace.cells import json_of
from headrace.change import CopyMark, LoggedEntry, SourceMark, TableSchema
from headrace.cli.log_where import pii_of, time_text
from headrace.cli.tables import print_json_lines, print_table
from headrace.decisions import Decision
from headrace.errors import UserError
from headrace.log.consumers import Cursor, Cursors
from headrace.log.places import told
from headrace.log.sqlite import SQLiteLog
from headrace.masking import MASK, marked_in, mask_cells, mask_columns, masks_key
from headrace.payload import decode_rows
from headrace.reading import OpenLog, find_logs, only_log, rows_of
from headrace.sources.postgres.health import age_text, size_text
from headrace.sources.postgres.lsn import format_lsn

if TYPE_CHECKING:
    import pyarrow as pa

_FOLDER = Parameter(help="The project's folder.")
_SOURCE = Parameter(help="The source, where the project has several.")
_POLL = 0.2
_ROWS = 20

_TAIL = ("offset", "kind", "table", "rows", "bytes", "commit", "committed_at", "txids", "what")
_WIDTHS = (9, 11, 28, 7, 9, 12, 24, 11, 0)
_NUMBERS = ("offset", "rows", "bytes")


def head(
    *,
    project: Annotated[Path, _FOLDER] = Path(),
    source: Annotated[str, Parameter(help="Its source; all of them if left out.")] = "",
    json: Annotated[bool, Parameter(help="Print one JSON object a log.", negative="")] = False,
) -> None:
    """Show where a log ends and begins, and what it holds.

    With --json: source, id, begin and end (offsets), hash (of the end), position (epoch/commit/ordinal),
    lsn, committed_at, entries, rows, payload_bytes, bytes (on the disk), tables, consumers.
    """
    for path in find_logs(project, source):
        with closing(SQLiteLog(path, read_only=True)) as log, closing(_cursors(log)) as cursors:
            found = _head(log, cursors)
        committed = found.pop("committed")
        if json:
            print(json_of(found))
            continue
        age = age_text(max(time.time() - committed, 0)) if found["end"] else ""
        shown = {
            **found,
            "payload_bytes": size_text(found["payload_bytes"]),
            "bytes": size_text(found["bytes"]),
        }
        if age:
            shown["committed_at"] = f"{found['committed_at']} ({age} ago)"
        width = max(map(len, shown))
        for name, value in shown.items():
            print(f"{name:<{width}}  {value}")


def tail(
    *,
    number: Annotated[int, Parameter(name=["--number", "-n"], help="How many entries.")] = 10,
    follow: Annotated[
        bool, Parameter(name=["--follow", "-f"], help="Go on with those to come.", negative="")
    ] = False,
    project: Annotated[Path, _FOLDER] = Path(),
    source: Annotated[str, _SOURCE] = "",
    json: Annotated[bool, Parameter(help="Print one JSON object an entry.", negative="")] = False,
) -> None:
    """List the newest entries of a log, and with --follow those to come, until it is interrupted.

    `commit` is the LSN of the last commit in it. With --json: offset, kind, table, rows, bytes, first and
    last (epoch/commit/ordinal), committed_at, appended_at, txids (least, greatest), schema_version,
    ends_group, hash, what.
    """
    if number < 0:
        raise UserError("-n is a number of entries.", "headrace log tail -n 20")
    with closing(SQLiteLog(only_log(project, source), read_only=True)) as log:
        end = log.end().offset
        items = _headers(log, max(log.begin().offset, end - number), end)
        if not follow and not json:
            print_table(_TAIL, (_line(*item) for item in items))
            return
        if not json:
            print(_padded(_TAIL))
        while True:
            for item in items:
                print(json_of(_header(*item)) if json else _padded(_line(*item)))
            if not follow:
                return
            sys.stdout.flush()
            time.sleep(_POLL)
            after, end = end, log.end().offset
            items = _headers(log, after, end)


def show(
    offset: int,
    *,
    rows: Annotated[int, Parameter(help="How many rows at most.")] = _ROWS,
    project: Annotated[Path, _FOLDER] = Path(),
    source: Annotated[str, _SOURCE] = "",
    json: Annotated[
        bool, Parameter(help="Print JSON: the entry, and then a line a row.", negative="")
    ] = False,
    unmask: Annotated[bool, Parameter(help="Show the values of pii columns, too.", negative="")] = False,
) -> None:
    """Show one entry with its rows, or with what it says. Its hash is verified.

    Parameters
    ----------
    offset
        The entry's place in the log.
    """
    with OpenLog(only_log(project, source)) as opened:
        log = opened._log
        item = log.entry(offset)
        if item is None:
            begin, end = log.begin().offset, log.end().offset
            raise UserError(
                f"The log of {log.source} has no offset {offset}.", f"It has {begin + 1} to {end}."
            )
    found = _header(item, len(item.entry.payload))
    if json:
        print(json_of(found))
    else:
        width = max(map(len, found))
        for name, value in found.items():
            print(f"{name:<{width}}  {json_of(value) if isinstance(value, list) else value}")
    if item.entry.kind == "undecodable":
        hidden = bool(pii_of(project, log.source)) and not unmask
        _print_undecodable(decode_rows(item.entry.payload).slice(0, max(rows, 0)), hidden=hidden, json=json)
        return
    if item.entry.kind not in ("rows", "copy"):
        content = item.entry.payload.decode()
        if item.entry.kind == "decision" and item.entry.table is not None and not unmask:
            content = _masked_decision(content, log.schemas()[item.entry.table], pii_of(project, log.source))
        print(content if json else f"{'content':<{width}}  {content}")
        return
    batch = rows_of(item)
    part = batch.slice(0, max(rows, 0))
    if not unmask and item.entry.table is not None:
        part = _masked(part, marked_in(pii_of(project, log.source), item.entry.table, part.schema.names))
    names = [name for name in part.schema.names if part[name].null_count < part.num_rows or name[0] != "_"]
    cells = zip(*(part[name].to_pylist() for name in names), strict=True)
    if json:
        print_json_lines(names, cells)
        return
    print()
    print_table(names, cells)
    if part.num_rows < batch.num_rows:
        print(f"… and {batch.num_rows - part.num_rows} more rows; --rows {batch.num_rows} shows them all.")


def _print_undecodable(messages: pa.RecordBatch, *, hidden: bool, json: bool) -> None:
    """Print messages that do not decode: which cells are in their bytes, nobody can tell."""
    found = [
        [format_lsn(row["_lsn"]), row["kind"], row["why"], MASK if hidden else row["message"].hex()]
        for row in messages.to_pylist()
    ]
    names = ("lsn", "kind", "why", "message")
    if json:
        print_json_lines(names, found)
    else:
        print()
        print_table(names, found)


def _masked_decision(content: str, shape: TableSchema, pii: Sequence[str]) -> str:
    """Return a decision without the keys and cells that are not shown."""
    cells = marked_in(pii, shape.table, [column.name for column in shape.columns])
    if not cells:
        return content
    decision = Decision.from_json(content.encode())
    is_key = masks_key(shape, cells)
    changes = tuple(each._replace(key=MASK) if is_key else each for each in decision.changes)
    patched = decision.cells and mask_cells(decision.cells, cells)
    return replace(decision, changes=changes, cells=patched).to_json()


def _masked(rows: pa.RecordBatch, cells: frozenset[str]) -> pa.RecordBatch:
    """Return rows with the values of some columns masked, also those that they had before."""
    import pyarrow as pa

    if not cells:
        return rows
    table = mask_columns(pa.table(rows), cells)
    before = [old and list(mask_cells(dict(old), cells).items()) for old in table["_before"].to_pylist()]
    at = table.column_names.index("_before")
    table = table.set_column(at, "_before", pa.array(before, table["_before"].type))
    return table.combine_chunks().to_batches()[0] if table.num_rows else rows


def consumers(
    *,
    forget: Annotated[str, Parameter(help="Remove this consumer: it holds nothing any more.")] = "",
    reset: Annotated[str, Parameter(help="Put this consumer at --to, also one that is lost.")] = "",
    to: Annotated[str, Parameter(help="An offset that it is then done with, `start` or `end`.")] = "",
    project: Annotated[Path, _FOLDER] = Path(),
    source: Annotated[str, _SOURCE] = "",
    json: Annotated[bool, Parameter(help="Print one JSON object a consumer.", negative="")] = False,
) -> None:
    """List the named consumers of a log and how far each has read; forget one, or put it elsewhere.

    With --json: source, name, offset, hash, state (reading, lost), reason, entries and bytes that it has
    still to read, created_at, updated_at.
    """
    if bool(reset) != bool(to) or (forget and reset):
        raise UserError(
            "What to do with which consumer is not clear.",
            "headrace log consumers [--forget NAME | --reset NAME --to OFFSET]",
        )
    if forget or reset:
        with OpenLog(only_log(project, source)) as log:
            if forget:
                log.forget(forget)
                print(f"Consumer {forget} of {log.source} is forgotten.")
            else:
                moved = log.reset(reset, _offset(log, to))
                print(f"Consumer {reset} of {log.source} goes on behind offset {moved.offset}.")
        return
    found = [one for path in find_logs(project, source) for one in _consumers(path)]
    if json:
        for one in found:
            print(json_of(one))
    elif found:
        shown = ("source", "name", "offset", "state", "entries", "bytes", "updated_at", "reason")
        print_table(shown, [[one[name] for name in shown] for one in found])
    else:
        print('No named consumers. In Python: headrace.open_log(".").read("NAME")')


def _cursors(log: SQLiteLog) -> Cursors:
    return Cursors(log.path.with_suffix(".cursors"))


def _head(log: SQLiteLog, cursors: Cursors) -> dict[str, Any]:
    begin, end = log.begin(), log.end()
    place, at = log.place(end.offset)
    rows, size, _ = log.backlog(begin.offset)
    return {
        "source": log.source,
        "id": log.id,
        "begin": begin.offset,
        "end": end.offset,
        "hash": end.hash,
        "position": "/".join(map(str, place)),
        "lsn": format_lsn(place.commit),
        "committed_at": time_text(at) if end.offset else None,
        "entries": end.offset - begin.offset,
        "rows": rows,
        "payload_bytes": size,
        "bytes": log.size(),
        "tables": len(log.schemas()),
        "consumers": len(cursors.all()),
        "committed": at / 1e6,
    }


def _headers(log: SQLiteLog, after: int, through: int) -> Iterator[tuple[LoggedEntry, int]]:
    """Yield entries with the sizes of their payloads; payloads of rows are not read."""
    sizes = dict(
        log.raw_rows(
            'SELECT "offset", bytes FROM entries WHERE "offset" > ? AND "offset" <= ?', (after, through)
        )
    )
    for item in log.headers(after, through):
        small = item.entry.kind not in ("rows", "copy", "undecodable")
        whole = log.entry(item.offset) if small else None
        yield whole or item, int(sizes[item.offset])


def _line(item: LoggedEntry, size: int) -> tuple[object, ...]:
    entry = item.entry
    at = time_text(entry.committed_at, "milliseconds")
    low, high = entry.txids
    txids = "" if not high else str(low) if low == high else f"{low}..{high}"
    table = "" if entry.table is None else str(entry.table)
    commit = format_lsn(entry.last.commit)
    return (item.offset, entry.kind, table, entry.rows, size, commit, at, txids, _what(item))


def _padded(cells: tuple[object, ...]) -> str:
    texts = [
        f"{cell!s:>{width}}" if name in _NUMBERS else f"{cell!s:<{width}}"
        for name, cell, width in zip(_TAIL, cells, _WIDTHS, strict=True)
    ]
    return "  ".join(texts).rstrip()


def _header(item: LoggedEntry, size: int) -> dict[str, Any]:
    entry = item.entry
    return {
        "offset": item.offset,
        "kind": entry.kind,
        "table": None if entry.table is None else str(entry.table),
        "rows": entry.rows,
        "bytes": size,
        "first": "/".join(map(str, entry.first)),
        "last": "/".join(map(str, entry.last)),
        "lsn": format_lsn(entry.last.commit),
        "committed_at": time_text(entry.committed_at),
        "appended_at": time_text(item.appended_at),
        "txids": list(entry.txids),
        "schema_version": entry.schema_version,
        "ends_group": item.ends_group,
        "hash": item.hash,
        "what": _what(item),
    }


def _what(item: LoggedEntry) -> str:
    """Return what an entry that is no rows says, in a few words."""
    entry = item.entry
    if not entry.payload:
        return ""  # deleted meanwhile
    match entry.kind:
        case "schema":
            shape = TableSchema.from_json(entry.payload)
            return (
                f"version {shape.version}: {len(shape.columns)} columns, key {', '.join(shape.key) or 'none'}"
            )
        case "message":
            words = told(entry.payload)
            return _one_line(f"{words['prefix']}: {words['content']}")
        case "marker" if entry.table is None:
            mark = SourceMark.from_json(entry.payload)
            return _one_line(f"{mark.kind}: {mark.reason}")
        case "marker":
            copy = CopyMark.from_json(entry.payload)
            return f"copy's chunk {copy.chunk}" if copy.kind == "chunk" else f"copy's {copy.kind}"
    return _decided(Decision.from_json(entry.payload)) if entry.kind == "decision" else ""


def _decided(made: Decision) -> str:
    changes = f"{len(made.changes)} change{'s' * (len(made.changes) != 1)}"
    return _one_line(f"{made.verb} {changes} of {made.model}, by {made.actor}")


def _one_line(text: str) -> str:
    plain = "".join(letter if letter.isprintable() else " " for letter in text)
    return plain if len(plain) <= 60 else plain[:59] + "…"


def _consumers(path: Path) -> list[dict[str, Any]]:
    with closing(SQLiteLog(path, read_only=True)) as log, closing(_cursors(log)) as cursors:
        return [_consumer(log, cursor) for cursor in cursors.all()]


def _consumer(log: SQLiteLog, cursor: Cursor) -> dict[str, Any]:
    end = log.end().offset
    return {
        "source": log.source,
        "name": cursor.name,
        "offset": cursor.offset,
        "hash": cursor.hash,
        "state": "lost" if cursor.lost else "reading",
        "reason": cursor.reason,
        "entries": max(end - cursor.offset, 0),
        "bytes": log.bytes_between(cursor.offset, end),
        "created_at": time_text(cursor.created_at),
        "updated_at": time_text(cursor.updated_at),
    }


def _offset(log: OpenLog, text: str) -> int:
    if text in ("start", "end"):
        return log.begin.offset if text == "start" else log.head.offset
    if not (text.isdecimal() and text.isascii()):
        raise UserError(f'"{text}" is no place for a consumer.', "Give --to an offset, `start` or `end`.")
    return int(text)
