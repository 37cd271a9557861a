"""`headrace log find`: a key's history, a transaction, a position, a time, without reading all of the log."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from headrace.cells import json_of
from headrace.change import TableSchema
from headrace.cli.log_where import lsn_of, pii_of, time_text
from headrace.cli.tables import print_table
from headrace.errors import UserError
from headrace.log.finding import (
    KeyChange,
    Messages,
    Transaction,
    history,
    parse_key,
    transactions_from,
    transactions_of,
)
from headrace.log.places import Shapes, cut_at_commit, cut_at_time
from headrace.log.sqlite import SQLiteLog
from headrace.masking import MASK, marked_in, mask_cells, masks_key
from headrace.raw.place import moment_of
from headrace.reading import only_log
from headrace.sources.postgres.lsn import format_lsn

_OPS = {"c": "insert", "u": "update", "d": "delete", "t": "truncate", "r": "copied"}
_WIDTH = 40  # of a cell that is shown
_CELLS = 8
_SAID = 60


def find(
    *,
    key: Annotated[str, Parameter(help='TABLE:KEY: orders:7, items:7,3, items:["a,b", "3"].')] = "",
    txid: Annotated[int | None, Parameter(help="The id of a transaction, as Postgres counts them.")] = None,
    lsn: Annotated[str, Parameter(help="An LSN: the transactions committed there or later.")] = "",
    time: Annotated[str, Parameter(help="A time, UTC unless it says otherwise: those from then on.")] = "",
    limit: Annotated[int | None, Parameter(help="How many at most; 0 for all.")] = None,
    json: Annotated[bool, Parameter(help="Print one JSON object a line.", negative="")] = False,
    project: Annotated[Path, Parameter(help="The project's folder.")] = Path(),
    source: Annotated[str, Parameter(help="The source, where the project has several.")] = "",
    unmask: Annotated[bool, Parameter(help="Show the values of pii columns, too.", negative="")] = False,
) -> None:
    """Find a key's history, a transaction, a position or a time; one of --key, --txid, --lsn, --time.

    --key shows what changed, old to new as far as the log tells it, when, in which transaction, and what
    that transaction said with pg_logical_emit_message. Truncates of the table and gaps of the source are
    part of it, and rows of copies (op r), which stand beside the stream. The newest 1000 are shown.

    The others show transactions: how many changes of which tables, and what was said; of --time and --lsn
    the first 10 from there on.

    With --json of a key: op, table, key, key_before, position (epoch/commit/ordinal), offset, committed_at,
    txid, lsn, old, new (cells as far as they are known), changed (column: [old, new]), messages. Of a
    transaction: txid, epoch, lsn, committed_at, first, last (offsets), changes (table, op, count), messages.
    """
    if sum((bool(key), txid is not None, bool(lsn), bool(time))) != 1:
        raise UserError("What to find is not clear.", "Give one of: --key, --txid, --lsn, --time.")
    if limit is not None and limit < 0:
        raise UserError("--limit is a number of results.", "0 shows all.")
    with closing(SQLiteLog(only_log(project, source), read_only=True)) as log:
        if key:
            pii = () if unmask else pii_of(project, log.source)
            _key(log, key, 1000 if limit is None else limit, pii, json=json)
            return
        if txid is not None:
            found = transactions_of(log, txid)
        elif lsn:
            found = transactions_from(log, cut_at_commit(log, lsn_of(lsn)))
        else:
            found = transactions_from(log, cut_at_time(log, moment_of(time)))
        most = (0 if txid is not None else 10) if limit is None else limit
        _transactions(islice(found, most) if most else found, json=json)


# -- a key


def _key(log: SQLiteLog, text: str, limit: int, pii: Sequence[str], *, json: bool) -> None:
    shapes = Shapes(log)
    shape, key = parse_key(shapes, text)
    counts: Counter[str] = Counter()
    shown: deque[KeyChange] = deque(maxlen=limit or None)
    for change in history(log, shapes, shape, key):
        counts[change.op] += 1
        shown.append(_masked(change, shape, pii))
    if json:
        for change in shown:
            print(json_of(_object(str(shape.table), change)))
        return
    begin = log.begin().offset
    since = f", behind offset {begin}; what is before it has been deleted" if begin else ""
    count = sum(counts[op] for op in "crud")
    if not count:
        cuts = f" {shape.table} was truncated {counts['t']} times." if counts["t"] else ""
        text = text.partition(":")[0] if _hidden(shape, pii)[1] else text
        print(f"Nothing about {text} in the log of {log.source}{since}.{cuts}")
        print("A key is found by its text as Postgres prints it.")
        return
    columns = ("committed_at", "op", "txid", "lsn", "offset", "what", "said")
    print_table(columns, [_cells(change) for change in shown])
    more = f"; the newest {limit} are shown" if limit and counts.total() > limit else ""
    text = f"a key of {shape.table}" if _hidden(shape, pii)[1] else text
    print(f"{count} changes of {text}{more}{since}")


def _hidden(shape: TableSchema, pii: Sequence[str]) -> tuple[frozenset[str], bool]:
    """Return which cells of a table are not shown, and whether its key is not."""
    cells = marked_in(pii, shape.table, [column.name for column in shape.columns])
    return cells, masks_key(shape, cells)


def _masked(change: KeyChange, shape: TableSchema, pii: Sequence[str]) -> KeyChange:
    cells, is_key = _hidden(shape, pii)
    if not cells:
        return change
    before, after = ((MASK,) if key and is_key else key for key in (change.key_before, change.key_after))
    old, new = (mask_cells(row, cells) if row else row for row in (change.old, change.new))
    return replace(change, old=old, new=new, key_before=before, key_after=after)


def _cells(change: KeyChange) -> tuple[object, ...]:
    at = time_text(change.committed_at, "milliseconds")
    if change.op in ("gap", "resync"):
        return (at, change.op, None, None, change.offset, change.messages[0][1], "")
    op = _OPS[change.op]
    where = (change.txid or None, format_lsn(change.lsn), change.offset)
    return (at, op, *where, _what(change), _said(change.messages))


def _what(change: KeyChange) -> str:
    if change.op in "ud" and change.new is not None and change.old is not None:
        known = [f"{name}: {_short(old)} → {_short(new)}" for name, (old, new) in change.changed.items()]
        unknown = [f"{name} = {_short(new)}" for name, new in change.new.items() if name not in change.old]
        return _listed(known + unknown) or "no cell differs"
    cells = change.new if change.new is not None else change.old
    if cells is None:
        return ""
    return _listed([f"{name} = {_short(value)}" for name, value in cells.items()])


def _listed(parts: list[str]) -> str:
    more = f", and {len(parts) - _CELLS} more" if len(parts) > _CELLS else ""
    return ", ".join(parts[:_CELLS]) + more


def _short(value: str | None) -> str:
    if value is None:
        return "NULL"
    return repr(value if len(value) <= _WIDTH else value[: _WIDTH - 1] + "…")


def _object(table: str, change: KeyChange) -> dict[str, Any]:
    return {
        "op": change.op,
        "table": table,
        "key": change.key_after,
        "key_before": change.key_before,
        "position": "/".join(map(str, change.position)),
        "offset": change.offset,
        "committed_at": time_text(change.committed_at),
        "txid": change.txid or None,
        "lsn": format_lsn(change.lsn),
        "old": change.old,
        "new": change.new,
        "changed": {name: list(cells) for name, cells in change.changed.items()},
        "messages": _messages(change.messages),
    }


# -- transactions


def _transactions(found: Iterable[Transaction], *, json: bool) -> None:
    if json:
        for one in found:
            print(json_of(_transaction(one)))
        return
    rows = [row for one in found for row in _lines(one)]
    if rows:
        print_table(("committed_at", "txid", "commit", "offsets", "table", "changes"), rows)
    else:
        print("No transaction there.")


def _lines(one: Transaction) -> Iterator[tuple[object, ...]]:
    offsets = str(one.first) if one.first == one.last else f"{one.first} to {one.last}"
    commit = format_lsn(one.commit[1])
    head = (time_text(one.committed_at, "milliseconds"), one.txid or None, commit, offsets)
    tables: dict[str, list[str]] = {}
    for (table, op), count in sorted(one.counts.items()):
        tables.setdefault(str(table), []).append(f"{count} {_OPS[op]}{'s' if count > 1 else ''}")
    for name, parts in tables.items():
        yield (*head, name, ", ".join(parts))
    for message in one.messages:
        yield (*head, "", f"said {_said((message,))}")


def _transaction(one: Transaction) -> dict[str, Any]:
    return {
        "txid": one.txid,
        "epoch": one.commit[0],
        "lsn": format_lsn(one.commit[1]),
        "committed_at": time_text(one.committed_at),
        "first": one.first,
        "last": one.last,
        "changes": [
            {"table": str(table), "op": op, "count": count}
            for (table, op), count in sorted(one.counts.items())
        ],
        "messages": _messages(one.messages),
    }


def _messages(messages: Messages) -> list[dict[str, str]]:
    return [{"prefix": prefix, "content": content} for prefix, content in messages]


def _said(messages: Messages) -> str:
    texts = [f"{prefix}: {content}" for prefix, content in messages]
    return "; ".join(text if len(text) <= _SAID else text[: _SAID - 1] + "…" for text in texts)
