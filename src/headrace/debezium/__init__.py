"""Changes in the envelope of Debezium 3's Postgres connector, as JSON without schemas.

What a consumer of that connector reads, it can read from here: keys, values, tombstones, headers and
placeholders are those that the connector makes with its default settings, but for what stands at
`Envelope`. See docs/design/debezium.md for where it cannot be the same.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from headrace.change import Entry, TableId, TableSchema
from headrace.debezium.values import PLACEHOLDER as PLACEHOLDER
from headrace.debezium.values import Converter, bytes_of, converter
from headrace.payload import HEAD

VERSION = "headrace"
NEW_KEY, OLD_KEY = "__debezium.newkey", "__debezium.oldkey"

_NOT_IN_TOPICS = re.compile(r"[^a-zA-Z0-9._-]")  # each of its UTF-16 units becomes an underscore
_NO_COMMITS = np.empty(0, np.int64)
_NO_LSN = np.zeros(1, np.int64)  # as Postgres has it

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Event:
    """One record: `key`, `value` and the values of `headers` are objects that `json.dumps` writes.

    A tombstone has no value; what belongs to no row, or to a table without a key, has no key.
    """

    topic: str
    key: Row | None
    value: Row | None
    headers: Mapping[str, Row] = field(default_factory=dict)


class Envelope:
    """Makes the events of one source.

    Events of a table come in the source's order, with those that belong together behind one another: a
    delete and its tombstone; for a row whose key changed, the delete of the old key, its tombstone, and the
    creation of the new one.

    `sequence` has the commit before each transaction. As rows of one table may come before those of
    another, of earlier transactions, `see` has to be told all commits of a group before its events.

    The source's entries do not say what the connector also knows, so here it is otherwise: in the old row
    of a table whose replica identity is its key, the columns beside the key are null, where the connector
    has the defaults of those that are NOT NULL; `origin` is null; copied rows have no `txId`, and
    `snapshot` is "true" for each.
    """

    def __init__(
        self,
        topic_prefix: str,
        database: str,
        domains: Mapping[str, str] | None = None,
        last_commit: tuple[int, int] | None = None,
    ) -> None:
        """`domains` gives the type underneath of each domain by its name, both as `Column.type` has them;
        others are text. `last_commit` is the epoch, and the LSN at which the transaction before the first
        one ended."""
        self._prefix = topic_prefix
        self._database = database
        self._domains = dict(domains or {})
        self._epoch, commit = last_commit or (0, None)
        self._commits = _NO_COMMITS if commit is None else np.array([commit], np.int64)

    def see(self, epoch: int, commits: ArrayLike) -> None:
        """Take note of the ends of all transactions of the next group, in any order.

        Of a message outside of one, that is its LSN. A new epoch has no commit before its first.
        """
        last = self._commits[-1:] if epoch == self._epoch else _NO_COMMITS
        self._epoch = epoch
        self._commits = np.union1d(last, np.asarray(commits, np.int64))

    def rows(self, schema: TableSchema, batch: pa.RecordBatch) -> Iterator[Event]:
        """Yield the events of a batch as `payload.decode_rows` gives it, of the shape `schema`.

        Raises ValueError for a commit that `see` was not told.
        """
        topic = self._topic(schema.table)
        head = [batch.column(i).to_pylist() for i in range(len(HEAD))]
        after, before = _images(schema, batch, self._domains)
        copied = head[0][:1] == ["r"]  # then all are
        earlier = [None] * batch.num_rows if copied else self._earlier(batch["_commit"])
        now = time.time_ns()
        for i, (op, _, _, committed_at, txid, lsn) in enumerate(zip(*head, strict=True)):
            source = self._source(schema.table, committed_at, txid, earlier[i], lsn, copied=copied)
            key, old = _key(schema, after[i]), before[i]
            if op == "d":
                yield Event(topic, key, _value("d", after[i], None, source, now))
                yield Event(topic, key, None)
                continue
            old_key = key if old is None else _key(schema, old)
            if key is None or old_key is None or old_key == key:
                yield Event(topic, key, _value(op, old, after[i], source, now))
                continue
            moved = {NEW_KEY: key}
            yield Event(topic, old_key, _value("d", old, None, source, now), moved)
            yield Event(topic, old_key, None, moved)
            yield Event(topic, key, _value("c", None, after[i], source, now), {OLD_KEY: old_key})

    def truncate(self, entry: Entry) -> Event:
        """Return the event of a truncate entry."""
        assert entry.table is not None
        told = json.loads(entry.payload)
        (earlier,) = self._earlier([entry.last.commit])
        source = self._source(entry.table, entry.committed_at, told["txid"], earlier, told["lsn"])
        return Event(self._topic(entry.table), None, _value("t", None, None, source, time.time_ns()))

    def message(self, entry: Entry) -> Event:
        """Return the event of a message entry."""
        told = json.loads(entry.payload)
        inside = bool(told["txid"])
        earlier = self._earlier([entry.last.commit])[0] if inside else told["lsn"]
        source = self._source(TableId("", ""), entry.committed_at, told["txid"], earlier, told["lsn"])
        content = base64.b64encode(bytes_of(told["content"])).decode()
        value = {
            "op": "m",
            **_times(time.time_ns()),
            "source": source,
            "transaction": None,
            "message": {"prefix": told["prefix"], "content": content},
        }
        return Event(f"{self._prefix}.message", {"prefix": told["prefix"]}, value)

    def _topic(self, table: TableId) -> str:
        name = f"{self._prefix}.{table.schema}.{table.name}"
        return _NOT_IN_TOPICS.sub(lambda found: "_" * (1 + (found[0] > "\uffff")), name)

    def _earlier(self, commits: ArrayLike) -> list[int | None]:
        """Return the commit before each."""
        at = np.searchsorted(self._commits, commits)
        if (np.searchsorted(self._commits, commits, "right") == at).any():
            raise ValueError("There are changes of a transaction whose commit `see` was not told.")
        before = np.concatenate((_NO_LSN, self._commits))[at]
        return [commit or None for commit in before.tolist()]

    def _source(
        self,
        table: TableId,
        committed_at: int,
        txid: int,
        earlier: int | None,
        lsn: int,
        *,
        copied: bool = False,
    ) -> Row:
        return {
            "version": VERSION,
            "connector": "postgresql",
            "name": self._prefix,
            "ts_ms": committed_at // 1000,
            "snapshot": "true" if copied else "false",
            "db": self._database,
            "sequence": f'[null,"{lsn}"]' if earlier is None else f'["{earlier}","{lsn}"]',
            "ts_us": committed_at,
            "ts_ns": committed_at * 1000,
            "schema": table.schema,
            "table": table.name,
            "txId": txid or None,
            "lsn": lsn,
            "xmin": None,
            "origin": None,
            "origin_lsn": None,
        }


def _images(
    schema: TableSchema, batch: pa.RecordBatch, domains: dict[str, str]
) -> tuple[list[Row], list[Row | None]]:
    """Return the row that each change carries, and the old one where it carries that too."""
    present = set(batch.schema.names[len(HEAD) :])
    chosen = [(c.name, converter(c, domains)) for c in schema.columns if c.name in present]
    converters = {name: found for name, found in chosen if found is not None}
    columns = [found.cells(batch[name]) for name, found in converters.items()]
    after = _rows(list(converters), columns, batch.num_rows)
    if "_unchanged" in present:
        for row, names in zip(after, batch["_unchanged"].to_pylist(), strict=True):
            for name in names or ():
                if name in converters:
                    row[name] = converters[name].unavailable
    before: list[Row | None] = [None] * batch.num_rows
    if "_before" in present:
        _fill_before(before, batch["_before"], converters)
    return after, before


def _fill_before(before: list[Row | None], column: pa.Array, converters: dict[str, Converter]) -> None:
    """Convert the old rows, column by column; a cell that is not known is null."""
    told = [(i, dict(cells)) for i, cells in enumerate(column.to_pylist()) if cells is not None]
    columns = [
        found.cells(pa.array([cells.get(name) for _, cells in told], pa.string()))
        for name, found in converters.items()
    ]
    for (i, _), row in zip(told, _rows(list(converters), columns, len(told)), strict=True):
        before[i] = row


def _rows(names: list[str], columns: list[list[Any]], count: int) -> list[Row]:
    if not columns:
        return [{} for _ in range(count)]
    return [dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _key(schema: TableSchema, row: Row) -> Row | None:
    return {name: row[name] for name in schema.key if name in row} or None


def _times(now: int) -> Row:
    return {"ts_ms": now // 1_000_000, "ts_us": now // 1000, "ts_ns": now}


def _value(op: str, before: Row | None, after: Row | None, source: Row, now: int) -> Row:
    return {
        "before": before,
        "after": after,
        "source": source,
        "transaction": None,
        "op": op,
        **_times(now),
    }
