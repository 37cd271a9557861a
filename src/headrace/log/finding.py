"""Finding in a log without reading all of it: the history of a key, transactions by their id or place.

Entries of a table come from the database's index; their key filters tell which may hold a key, and only
those are read. Transaction ids stand in the headers as ranges, places are found by bisection.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from headrace.change import LoggedEntry, Offset, Position, SourceMark, TableId, TableSchema
from headrace.errors import UserError
from headrace.keyfilter import may_hold
from headrace.log.places import Cut, Group, Shapes, group_of, groups, lone_commit, told
from headrace.log.sqlite import SQLiteLog
from headrace.payload import HEAD, decode_rows

OWN = "headrace"
"""The prefix of the messages that Headrace itself writes, such as heartbeats."""

_PAGE = 500  # key filters that are looked at at once

Cells = Mapping[str, str | None]
Messages = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class KeyChange:
    """One step of a key's history.

    `op` is one of Debezium's letters, or `gap` or `resync` for what the log says of the source. `old` and
    `new` are the cells before and after as far as the log tells them; None where there is no row, `old` also
    where nothing is known of it. `key_before` and `key_after` (texts in key order) differ where the row was
    given another key. `messages` are prefix and content of what the same transaction said with
    `pg_logical_emit_message`; of a gap they hold its reason.
    """

    op: str
    offset: Offset
    position: Position
    committed_at: int
    txid: int
    lsn: int
    old: Cells | None
    new: Cells | None
    key_before: tuple[str | None, ...] | None = None
    key_after: tuple[str | None, ...] | None = None
    messages: Messages = ()

    @property
    def changed(self) -> dict[str, tuple[str | None, str | None]]:
        """Old and new value of the cells that are known to differ."""
        old, new = self.old or {}, self.new or {}
        return {name: (old[name], value) for name, value in new.items() if name in old and old[name] != value}


@dataclass(slots=True)
class Transaction:
    """One source transaction: how many changes of each table and op, and what was said in it.

    `commit` is epoch and LSN of the end of its commit; its entries stand from `first` through `last`, among
    others.
    """

    commit: tuple[int, int]
    committed_at: int
    txid: int
    first: Offset
    last: Offset
    counts: dict[tuple[TableId, str], int] = field(default_factory=dict)
    messages: Messages = ()


def parse_key(shapes: Shapes, text: str) -> tuple[TableSchema, tuple[str, ...]]:
    """Take `TABLE:KEY` apart: `orders:7`, `sales.items:7,3` in key order, or `items:["a,b", "3"]`.

    Raises UserError for an unknown table, one without a key, or another number of cells than the key has.
    """
    table, rest = _parted(shapes, text)
    shape = shapes.newest(table)
    assert shape is not None
    if not shape.key:
        raise UserError(
            f"{table} has no key: nothing tells one row's changes from another's.",
            f"Write its changes out and search them: headrace log replay --from start --tables {table} "
            "--format json; or look for a transaction with --txid, --time or --lsn.",
        )
    cells = _key_cells(rest, len(shape.key))
    if len(cells) != len(shape.key):
        raise UserError(
            f"The key of {table} is {', '.join(shape.key)}: {len(shape.key)} cells; this has {len(cells)}.",
            f"Write {table}:{','.join(name.upper() for name in shape.key)}, or the cells as a JSON array.",
        )
    return shape, tuple(cells)


def history(log: SQLiteLog, shapes: Shapes, shape: TableSchema, key: Sequence[str]) -> Iterator[KeyChange]:
    """Yield what became of a key, in the log's order, truncates of its table and gaps of the source included.

    `shape` is the newest of its table, `key` its cells as Postgres prints them, in key order. Rows of a copy
    (op `r`) come where they stand, beside the stream. Raises LogTrimmed when it is trimmed meanwhile.
    """
    story = _Story(log, shapes, shape, tuple(key))
    gaps = _gaps(log)
    for offset in _candidates(log, shapes, shape, tuple(key)):
        while gaps and gaps[0] < offset:
            yield story.gap(_read(log, gaps.pop(0)))
        item = _read(log, offset)
        yield from story.truncate(item) if item.entry.kind == "truncate" else story.rows(item)
    yield from (story.gap(_read(log, offset)) for offset in gaps)


def transactions_from(log: SQLiteLog, begin: Cut) -> Iterator[Transaction]:
    """Yield the transactions behind a cut, in the source's order; those that only Headrace made are left
    out."""
    for group in groups(log, begin.offset, log.group_end(log.end().offset)):
        found = _Summary(log, group)
        for item in log.headers(*group):
            if begin.commit is None or item.entry.last[:2] >= begin.commit:
                found.add(item)
        for one in found.transactions():
            if begin.commit is None or one.commit >= begin.commit:
                yield one


def transactions_of(log: SQLiteLog, txid: int) -> Iterator[Transaction]:
    """Yield the transactions with an id, in the log's order: several where ids have come round again."""
    rows = log.raw_rows(
        'SELECT "offset" FROM entries WHERE min_txid <= ? AND max_txid >= ? AND "offset" > ? '
        'ORDER BY "offset"',
        (txid, txid, log.begin().offset),
    )
    offsets = [int(row[0]) for row in rows]
    while offsets:
        group = group_of(log, offsets[0])
        found = _Summary(log, group, txid)
        while offsets and offsets[0] <= group.through:
            offset = offsets.pop(0)
            found.add(next(log.headers(offset - 1, offset)))
        yield from (one for one in found.transactions() if one.txid == txid)


class _Summary:
    """Counts the changes of one group by transaction, without a row in memory but those of one entry."""

    def __init__(self, log: SQLiteLog, group: Group, txid: int | None = None) -> None:
        self._log = log
        self._group = group
        self._txid = txid
        self._found: dict[tuple[int, int], Transaction] = {}

    def add(self, header: LoggedEntry) -> None:
        entry = header.entry
        if entry.kind == "rows":
            self._count(_read(self._log, header.offset))
        elif entry.kind in ("truncate", "message") and (commit := lone_commit(header)):
            one = self._of(commit, entry.committed_at, entry.txids[0], header.offset)
            if entry.kind == "truncate":
                assert entry.table is not None
                _more(one, entry.table, "t", 1)

    def transactions(self) -> list[Transaction]:
        """Return what has changes or messages, in the source's order."""
        said = _messages(self._log, self._group)
        for one in self._found.values():
            one.messages = said.get(one.commit, ())
        return [one for _, one in sorted(self._found.items()) if one.counts or one.messages]

    def _count(self, item: LoggedEntry) -> None:
        table, epoch = item.entry.table, item.entry.first.epoch
        assert table is not None
        batch = decode_rows(item.entry.payload)
        if self._txid is not None:
            batch = batch.filter(pc.equal(batch["_txid"], self._txid))
        counted = (
            pa.table({name: batch[name] for name in HEAD})
            .group_by(["_commit", "_op"])
            .aggregate([("_committed_at", "min"), ("_txid", "min"), ([], "count_all")])
        )
        for row in counted.to_pylist():
            commit = (epoch, row["_commit"])
            one = self._of(commit, row["_committed_at_min"], row["_txid_min"], item.offset)
            _more(one, table, row["_op"], row["count_all"])

    def _of(self, commit: tuple[int, int], committed_at: int, txid: int, offset: Offset) -> Transaction:
        one = self._found.setdefault(commit, Transaction(commit, committed_at, txid, offset, offset))
        one.last = offset
        return one


class _Story:
    """Follows one key: what is known of its row, from change to change."""

    def __init__(
        self, log: SQLiteLog, shapes: Shapes, shape: TableSchema, key: tuple[str | None, ...]
    ) -> None:
        self._log = log
        self._shapes = shapes
        self._newest = shape
        self._key = key
        self._state: Cells | None = None
        self._at = Position(0, 0, 0)
        self._group = Group(0, 0)
        self._said: dict[tuple[int, int], Messages] = {}

    def gap(self, item: LoggedEntry) -> KeyChange:
        """What was known is no longer sure."""
        mark = SourceMark.from_json(item.entry.payload)
        self._state = None
        at = (item.offset, item.entry.last, item.entry.committed_at)
        return KeyChange(mark.kind, *at, 0, 0, None, None, messages=((mark.kind, mark.reason),))

    def truncate(self, item: LoggedEntry) -> Iterator[KeyChange]:
        entry, words = item.entry, told(item.entry.payload)
        old, self._state, self._at = self._state, None, entry.last
        place = (item.offset, entry.last, entry.committed_at, words["txid"], words["lsn"])
        yield KeyChange("t", *place, old, None, messages=self._messages(item, entry.last))

    def rows(self, item: LoggedEntry) -> Iterator[KeyChange]:
        entry = item.entry
        assert entry.table is not None
        names = _key_names(self._shapes.of(entry.table, entry.schema_version), self._newest)
        batch = decode_rows(entry.payload)
        if not set(names) <= set(batch.schema.names):
            return
        for row in batch.filter(_holds(batch, names, self._key)).to_pylist():
            yield self._step(item, names, row)

    def _step(self, item: LoggedEntry, names: Sequence[str], row: dict[str, Any]) -> KeyChange:
        op, commit, ordinal, committed_at, txid, lsn = (row.pop(name) for name in HEAD)
        unknown, before = row.pop("_unchanged", None) or (), row.pop("_before", None)
        cells: Cells = {name: value for name, value in row.items() if name not in unknown}
        told_before: Cells | None = None if before is None else dict(before)
        place = Position(item.entry.first.epoch, commit, ordinal)
        key_after = tuple(row[name] for name in names)
        key_before = key_after
        if told_before is not None and all(name in told_before for name in names):
            key_before = tuple(told_before[name] for name in names)
        old, new = self._images(op, cells, told_before, moved=(key_before, key_after))
        if op != "r" or self._state is None or place > self._at:
            self._state, self._at = new if key_after == self._key else None, place
        messages = () if op == "r" else self._messages(item, place)
        where = (item.offset, place, committed_at, txid, lsn)
        return KeyChange(
            op,
            *where,
            old,
            new,
            key_before if op in "ud" else None,
            None if op == "d" else key_after,
            messages,
        )

    def _images(
        self,
        op: str,
        cells: Cells,
        before: Cells | None,
        moved: tuple[tuple[str | None, ...], tuple[str | None, ...]],
    ) -> tuple[Cells | None, Cells | None]:
        """Return the row before and after a change as far as they are known."""
        if op in "cr":
            return None, cells
        known = (self._state or {}) if moved[0] == self._key else {}
        if op == "d":
            return {**known, **cells}, None
        old = {**known, **(before or {})}
        kept = {name: value for name, value in old.items() if name not in cells}
        return old or None, {**kept, **cells}

    def _messages(self, item: LoggedEntry, place: Position) -> Messages:
        if not self._group.after < item.offset <= self._group.through:
            self._group = group_of(self._log, item.offset)
            self._said = _messages(self._log, self._group)
        return self._said.get(place[:2], ())


def _candidates(
    log: SQLiteLog, shapes: Shapes, newest: TableSchema, key: tuple[str, ...]
) -> Iterator[Offset]:
    """Yield the entries of a table that may hold a key, and its truncates."""
    after, end = log.begin().offset, log.end().offset
    while True:
        page = log.raw_rows(
            'SELECT "offset", kind, schema_version, filter FROM entries LEFT JOIN filters USING ("offset") '
            "WHERE table_schema = ? AND table_name = ? AND kind IN ('rows', 'copy', 'truncate') "
            f'AND "offset" > ? AND "offset" <= ? ORDER BY "offset" LIMIT {_PAGE}',
            (*newest.table, after, end),
        )
        for offset, kind, version, held in page:
            after = int(offset)
            own = shapes.of(newest.table, version)
            if kind == "truncate" or _may_hold(held or b"", own, newest, key):
                yield after
        if len(page) < _PAGE:
            return


def _may_hold(held: bytes, own: TableSchema, newest: TableSchema, key: tuple[str, ...]) -> bool:
    cells = dict(zip(_key_names(own, newest), key, strict=True))
    if set(cells) != set(own.key):
        return True  # the filter is of other columns: of the key of then
    return may_hold(held, tuple(cells[name] for name in own.key))


def _key_names(own: TableSchema, newest: TableSchema) -> tuple[str, ...]:
    """Return the columns of an entry that are the key which is looked for, in its order.

    They are those of the newest shape. One that the entry lacks has been renamed since, where its own key
    has a column that the newest shape lacks: they are the same in the order of the keys.
    """
    here, now = ({column.name for column in shape.columns} for shape in (own, newest))
    later = [name for name in newest.key if name not in here]
    former = [name for name in own.key if name not in now]
    if len(own.key) != len(newest.key) or len(later) != len(former):
        return newest.key
    renamed = dict(zip(later, former, strict=True))
    return tuple(renamed.get(name, name) for name in newest.key)


def _holds(batch: pa.RecordBatch, names: Sequence[str], key: Sequence[str | None]) -> pa.Array:
    """Return which rows have a key, or had it before."""
    mask = _all_equal([batch[name] for name in names], key)
    if "_before" in batch.schema.names and batch["_before"].null_count < batch.num_rows:
        before = batch["_before"]
        mask = pc.or_(mask, _all_equal([pc.map_lookup(before, name, "first") for name in names], key))
    return mask


def _all_equal(columns: Sequence[pa.Array], key: Sequence[str | None]) -> pa.Array:
    mask = pc.equal(columns[0], key[0])
    for column, cell in zip(columns[1:], key[1:], strict=True):
        mask = pc.and_(mask, pc.equal(column, cell))
    return pc.fill_null(mask, fill_value=False)


def _messages(log: SQLiteLog, group: Group) -> dict[tuple[int, int], Messages]:
    """Return what the transactions of a group said, by their commits."""
    rows = log.raw_rows(
        "SELECT last_epoch, last_commit, payload FROM entries WHERE kind = 'message' AND max_txid > 0 "
        'AND "offset" > ? AND "offset" <= ? ORDER BY "offset"',
        group,
    )
    said: dict[tuple[int, int], list[tuple[str, str]]] = {}
    for epoch, commit, payload in rows:
        one = told(payload)
        if one["prefix"] != OWN:
            said.setdefault((epoch, commit), []).append((one["prefix"], one["content"]))
    return {commit: tuple(words) for commit, words in said.items()}


def _gaps(log: SQLiteLog) -> list[Offset]:
    rows = log.raw_rows(
        "SELECT \"offset\" FROM entries WHERE kind IN ('schema', 'marker') AND kind = 'marker' "
        'AND table_name IS NULL AND "offset" > ? ORDER BY "offset"',
        (log.begin().offset,),
    )
    return [int(row[0]) for row in rows]


def _read(log: SQLiteLog, offset: Offset) -> LoggedEntry:
    return next(log.entries(offset - 1, offset))


def _more(one: Transaction, table: TableId, op: str, count: int) -> None:
    one.counts[table, op] = one.counts.get((table, op), 0) + count


def _parted(shapes: Shapes, text: str) -> tuple[TableId, str]:
    known = shapes.tables()
    for at in (i for i, letter in enumerate(text) if letter == ":"):
        for table in known:
            if text[:at] in (str(table), table.label):
                return table, text[at + 1 :]
    if ":" not in text:
        raise UserError("This is no table and key.", "Write them as TABLE:KEY, such as orders:7.")
    listed = ", ".join(map(str, known)) or "none"
    raise UserError(f"The log knows no table {text.partition(':')[0]}.", f"It has: {listed}.")


def _key_cells(text: str, width: int) -> list[str]:
    if text.startswith("["):
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if isinstance(found, list) and (width > 1 or len(found) == 1):
            return [cell if isinstance(cell, str) else json.dumps(cell) for cell in found]
    return [text] if width == 1 else text.split(",")
