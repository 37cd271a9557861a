"""From decoded transactions to groups of log entries."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.change import Entry, Position, TableId, TableSchema
from headrace.keyfilter import key_filter
from headrace.payload import HEAD, UNDECODABLE, encode_rows, read_batch, write_batch
from headrace.sources.postgres.columns import Policy
from headrace.sources.postgres.events import (
    Dated,
    Event,
    Malformed,
    Message,
    Relation,
    RelationSeen,
    Rows,
    Transaction,
    Truncate,
)
from headrace.sources.postgres.roster import Roster
from headrace.sources.postgres.shapes import Shapes
from headrace.sources.postgres.spool import Spool, SpoolSpace
from headrace.sources.postgres.undecodable import Undecodable, text_of

_Numbers = npt.NDArray[np.int64]
_PLACED = ("_commit", "_committed_at", "_txid")
_HEAD = 4  # the decoder's own columns before the source's: _op, _serial, _ordinal, _lsn


class _OpenTransaction:
    """Events of a transaction that was decoded before its commit came, in pieces, each ended by a take."""

    def __init__(self, space: SpoolSpace) -> None:
        self._spool = Spool(space)
        # A relation stands for rows that are spooled, None for what could not be decoded and is spooled.
        self._pieces: list[list[Event | Relation | None]] = []

    def add(self, events: Sequence[Event]) -> None:
        """Keep one piece. Raises SourceUnavailable where there is no room."""
        for event in events:
            if isinstance(event, Rows | Malformed):
                self._spool.append(write_batch(event.batch))
        self._pieces.append(list(map(_stand_in, events)))

    def pieces(self) -> Iterator[Sequence[Event]]:
        """Yield piece by piece, and give the room back at the end.

        Batches of one relation alone are in order, so that each is a piece.
        """
        payloads = iter(self._spool)
        for piece in self._pieces:
            step = 1 if all(event == piece[0] for event in piece) else len(piece)
            for at in range(0, len(piece), step):
                yield [_spooled(event, payloads) for event in piece[at : at + step]]
        self._spool.close()

    def __bool__(self) -> bool:
        return bool(self._pieces)


class GroupBuilder:
    """Turns what the decoder took into entries with positions, and knows every table's shape."""

    def __init__(
        self, shapes: Shapes, roster: Roster, policy: Policy, space: SpoolSpace, epoch: int = 0
    ) -> None:
        self._shapes = shapes
        self._versions: dict[TableId, list[tuple[Position, int]]] = {}
        self._roster = roster
        self._policy = policy
        self._space = space
        self._epoch = epoch
        self._open = _OpenTransaction(space)
        self._last_commit_time = 0
        self._undecodable = Undecodable()

    def adopt(self, shape: TableSchema) -> None:
        """Take over the shape that a copy has logged for its table, which is captured from now on."""
        self._roster.add(shape.table)
        self._shapes.adopt(shape)

    def build(
        self, transactions: Sequence[Transaction], events: Sequence[Event], after: int
    ) -> Sequence[Entry] | Iterator[Entry]:
        """Return the entries of complete transactions with a commit beyond `after`, and of messages
        outside of transactions, ordered by their last position.

        What belongs to a transaction still open is spooled until it commits. Its entries are then
        made as they are taken, and the iterator is to be taken to its end before the next call.
        Raises SourceGap, and SourceUnavailable where the spool is full.
        """
        done = transactions[-1].serial if transactions else -1
        complete, rest = _split(list(map(self._captured, events)), done)
        times = _Times(transactions, after, self._last_commit_time, self._epoch)
        waiting: Iterator[Sequence[Event]] | None = None
        if done >= 0 and self._open:
            waiting, self._open = self._open.pieces(), _OpenTransaction(self._space)
        if rest:
            self._open.add(rest)
        if transactions:
            self._last_commit_time = transactions[-1].committed_at
        if waiting is not None:
            return self._entries(chain(waiting, [complete]), times)
        return list(self._entries([complete], times))

    def replay(self, transaction: Dated, pieces: Iterable[Sequence[Event]], after: int) -> Iterator[Entry]:
        """Yield the entries of one transaction that comes in pieces, if its commit is beyond `after`."""
        self._last_commit_time = transaction.committed_at
        times = _Times([transaction], after, transaction.committed_at, self._epoch)
        return self._entries(map(self._all_captured, pieces), times)

    def _all_captured(self, events: Sequence[Event]) -> Sequence[Event]:
        return list(map(self._captured, events))

    def _captured(self, event: Event) -> Event:
        """Apply the policy to rows: what it leaves out is not even spooled."""
        if not isinstance(event, Rows):
            return event
        names, columns = event.batch.schema.names, event.batch.columns
        cells = pa.RecordBatch.from_arrays(columns[_HEAD:], names=names[_HEAD:])
        kept = self._policy.apply(_table(event.relation), cells)
        if kept is cells:
            return event
        batch = pa.RecordBatch.from_arrays(
            [*columns[:_HEAD], *kept.columns], names=[*names[:_HEAD], *kept.schema.names]
        )
        return Rows(event.relation, batch)

    def _entries(self, pieces: Iterable[Sequence[Event]], times: _Times) -> Iterator[Entry]:
        """Yield entries ordered by their last position: pieces follow one another, so each is sorted."""
        for events in pieces:
            entries = self._piece(events, times)
            del events  # before the next piece is made: never two in memory
            yield from entries

    def _piece(self, events: Sequence[Event], times: _Times) -> list[Entry]:
        entries: list[Entry] = []
        self._versions.clear()
        for event in events:
            self._add(event, times, entries)
        return sorted(entries, key=lambda entry: entry.last)

    def _add(self, event: Event, times: _Times, entries: list[Entry]) -> None:
        if isinstance(event, Rows):
            self._resolve(event, times, entries)
        elif isinstance(event, RelationSeen) and times.fresh(event.serial):
            entries += self._seen(event, times)
        elif isinstance(event, Truncate) and times.fresh(event.serial):
            serial = event.serial
            at = times.position(serial, event.ordinal)
            txid = times.xid(serial)
            payload = json.dumps({"lsn": event.lsn, "txid": txid}).encode()
            for relation in filter(self._roster.admits, event.relations):
                table = _table(relation)
                version = self._version(relation, serial, at, times, entries)
                moment = times.at(serial)
                entries.append(Entry("truncate", table, at, at, moment, 1, version, payload, (txid, txid)))
        elif isinstance(event, Malformed):
            entries += self._malformed(event.batch, times)
        elif isinstance(event, Message):
            at, committed_at = times.of_message(event)
            if at.commit > times.after:
                entries += self._announced(event, at, committed_at)
                txid = times.xid(event.serial)
                content = {"prefix": event.prefix, "content": text_of(event.content)}
                payload = json.dumps(content | {"lsn": event.lsn, "txid": txid}, ensure_ascii=False).encode()
                entries.append(Entry("message", None, at, at, committed_at, 0, 0, payload, (txid, txid)))

    def _resolve(self, rows: Rows, times: _Times, entries: list[Entry]) -> None:
        """Give rows their commit, time and transaction id, and drop those that the log holds."""
        batch = times.keep_fresh(rows.batch)
        if not batch.num_rows or not self._roster.admits(rows.relation):
            return
        table = _table(rows.relation)
        serials = batch.column(1).to_numpy()
        commits, moments, xids = times.of(serials)
        op, _, ordinals, lsns, *cells = batch.columns
        columns = [op, commits, ordinals, moments, xids, lsns, *cells]
        names = [*HEAD, *batch.schema.names[_HEAD:]]
        first = Position(self._epoch, commits[0].as_py(), ordinals[0].as_py())
        last = Position(self._epoch, commits[-1].as_py(), ordinals[-1].as_py())
        whole = self._undecodable.escape(table, pa.RecordBatch.from_arrays(columns, names=names))
        payload = encode_rows(whole)
        version = self._version(rows.relation, int(serials[0]), first, times, entries)
        txids = int(pc.min(xids).as_py()), int(pc.max(xids).as_py())
        held = key_filter(whole, self._shapes[table].key)
        at, count, latest = moments[-1].as_py(), batch.num_rows, pc.max(moments).as_py()
        latest = latest if latest > at else 0
        entries.append(Entry("rows", table, first, last, at, count, version, payload, txids, latest, held))

    def _malformed(self, batch: pa.RecordBatch, times: _Times) -> Iterator[Entry]:
        """Yield the entries of messages that could not be decoded, one for each table, and one for those of
        which nobody can tell the table. What is of a table that is not captured is dropped."""
        commits, moments, xids = times.of_malformed(batch)
        of = list(zip(*(batch[name].to_pylist() for name in ("relation", "schema", "name")), strict=True))
        numbers: dict[TableId | None, list[int]] = {}
        for relation in dict.fromkeys(of):
            with suppress(LookupError):
                oid, schema, name = relation
                table = self._roster.table_of(oid, TableId(schema, name) if name else None)
                mine = [row for row, each in enumerate(of) if each == relation and commits[row] > times.after]
                numbers.setdefault(table, []).extend(mine)
        for table, rows in numbers.items():
            chosen = np.sort(np.array(rows, dtype=np.int64))
            if not len(chosen):
                continue
            messages = batch.take(pa.array(chosen))
            if self._policy.conceals(table):
                messages = _without_bytes(messages)
            places = dict(zip(_PLACED, (commits[chosen], moments[chosen], xids[chosen]), strict=True))
            columns = [
                pa.array(places[name]) if name in places else messages[name] for name in UNDECODABLE.names
            ]
            ordinals, ids, at = messages["_ordinal"], xids[chosen], moments[chosen]
            first, last = (
                Position(self._epoch, int(commits[chosen[row]]), ordinals[row].as_py()) for row in (0, -1)
            )
            version = self._shapes[table].version if table is not None and table in self._shapes else 0
            payload = encode_rows(pa.RecordBatch.from_arrays(columns, schema=UNDECODABLE))
            latest = int(at.max()) if at.max() > at[-1] else 0
            txids = (int(ids.min()), int(ids.max()))
            count, moment = len(chosen), int(at[-1])
            yield Entry("undecodable", table, first, last, moment, count, version, payload, txids, latest)

    def _seen(self, event: RelationSeen, times: _Times) -> list[Entry]:
        """Compare a relation with the shape that the log knows; log it only if it differs.

        One that the log does not know waits for its first row: the server describes a partition too,
        whose rows then come under the name of its root.
        """
        known = _table(event.relation) in self._shapes and self._roster.admits(event.relation)
        return self._log_shape(event, times) if known else []

    def _announced(self, message: Message, at: Position, committed_at: int) -> list[Entry]:
        """Log the shape that a message of ours announces, if it is a new one."""
        shape = self._shapes.announced(message.prefix, text_of(message.content))
        if shape is None or not message.transactional:
            return []
        self._versions.setdefault(shape.table, []).append((at, shape.version - 1))
        payload = shape.to_json().encode()
        return [Entry("schema", shape.table, at, at, committed_at, 0, shape.version, payload)]

    def _version(
        self, relation: Relation, serial: int, at: Position, times: _Times, entries: list[Entry]
    ) -> int:
        """Return the version of the shape that a row has; a table's first row logs its shape before it.

        Rows come at the end of what was read at once, behind an announcement that they may stand before.
        """
        table = _table(relation)
        if table not in self._shapes:
            entries += self._log_shape(RelationSeen(relation, serial, at.ordinal - 1), times)
        before = (version for announced, version in self._versions.get(table, ()) if at < announced)
        return next(before, self._shapes[table].version)

    def _log_shape(self, event: RelationSeen, times: _Times) -> list[Entry]:
        shape = self._shapes.learn(event.relation)
        if shape is None:
            return []
        at = times.position(event.serial, event.ordinal)
        payload = shape.to_json().encode()
        return [Entry("schema", shape.table, at, at, times.at(event.serial), 0, shape.version, payload)]


def _without_bytes(messages: pa.RecordBatch) -> pa.RecordBatch:
    """Return messages that could not be decoded without what nobody has looked through."""
    why = pc.binary_join_element_wise(
        messages["why"], "its bytes are not kept, since exclude, hash or where concerns its table", "; "
    )
    nothing = pa.repeat(pa.scalar(b"", pa.binary()), messages.num_rows)
    names = messages.schema.names
    columns = [{"why": why, "message": nothing}.get(name, messages[name]) for name in names]
    return pa.RecordBatch.from_arrays(columns, names=names)


def _stand_in(event: Event) -> Event | Relation | None:
    """Return what stands for an event whose batch is spooled, or the event."""
    if isinstance(event, Malformed):
        return None
    return event.relation if isinstance(event, Rows) else event


def _spooled(event: Event | Relation | None, batches: Iterator[bytes]) -> Event:
    """Return the event that another stands for, with the next batch."""
    if event is None:
        return Malformed(read_batch(next(batches)))
    return Rows(event, read_batch(next(batches))) if isinstance(event, Relation) else event


def _split(events: Sequence[Event], done: int) -> tuple[list[Event], list[Event]]:
    """Part events of complete transactions, through serial `done`, from those of the one still open."""
    complete: list[Event] = []
    rest: list[Event] = []
    for event in events:
        if not isinstance(event, Rows | Malformed):
            (complete if event.serial <= done else rest).append(event)
            continue
        rows = int(np.searchsorted(event.batch.column(1).to_numpy(), done, side="right"))
        if rows:
            complete.append(replace(event, batch=event.batch.slice(0, rows)))
        if rows < event.batch.num_rows:
            rest.append(replace(event, batch=event.batch.slice(rows)))
    return complete, rest


class _Times:
    """Commit, time and id of transactions by serial."""

    def __init__(self, transactions: Sequence[Dated], after: int, last_commit_time: int, epoch: int) -> None:
        """`last_commit_time` is that of the transaction before these, 0 if none is known."""
        self.after = after
        self._epoch = epoch
        self._base = transactions[0].serial if transactions else 0
        self._commits = np.array([t.commit for t in transactions], dtype=np.int64)
        self._moments = np.array([t.committed_at for t in transactions], dtype=np.int64)
        self._xids = np.array([t.xid for t in transactions], dtype=np.int64)
        self._before = last_commit_time or time.time_ns() // 1000
        self._all_fresh = bool((self._commits > after).all())

    def of(self, serials: np.ndarray) -> tuple[pa.Array, pa.Array, pa.Array]:
        """Return commits, commit times (microseconds) and ids, one per serial."""
        at = serials - self._base
        return pa.array(self._commits[at]), pa.array(self._moments[at]), pa.array(self._xids[at])

    def at(self, serial: int) -> int:
        return int(self._moments[max(serial - self._base, 0)])

    def xid(self, serial: int) -> int:
        """Return the id of a transaction, 0 for what stands outside of one."""
        return int(self._xids[serial - self._base]) if serial >= 0 else 0

    def position(self, serial: int, ordinal: int) -> Position:
        return Position(self._epoch, int(self._commits[max(serial - self._base, 0)]), ordinal)

    def of_message(self, message: Message) -> tuple[Position, int]:
        """Return a message's place and time.

        One outside of a transaction stands a byte behind the start of its WAL record: past every
        commit before it, whose record ends there or earlier, and before the end of every later one.
        Its time is that of the last commit before it, since it carries none.
        """
        if message.serial >= 0:
            return self.position(message.serial, message.ordinal), self.at(message.serial)
        at = Position(self._epoch, message.lsn + 1, 0)
        earlier = int(np.searchsorted(self._commits, message.lsn, side="right"))
        return at, int(self._moments[earlier - 1]) if earlier else self._before

    def of_malformed(self, batch: pa.RecordBatch) -> tuple[_Numbers, _Numbers, _Numbers]:
        """Return commits, commit times and ids of messages that could not be decoded; of those outside of a
        transaction as `of_message` does."""
        serials, lsns = batch["_serial"].to_numpy(), batch["_lsn"].to_numpy()
        outside = serials < 0
        at = np.where(outside, len(self._commits), serials - self._base)
        of_transactions = (np.append(each, 0)[at] for each in (self._commits, self._moments, self._xids))
        commits, moments, xids = of_transactions
        earlier = np.searchsorted(self._commits, lsns, side="right")
        before = np.append(self._before, self._moments)[earlier]
        return np.where(outside, lsns + 1, commits), np.where(outside, before, moments), xids

    def fresh(self, serial: int) -> bool:
        """Whether the log does not hold this transaction yet."""
        return int(self._commits[serial - self._base]) > self.after

    def keep_fresh(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        if self._all_fresh:
            return batch
        mask = self._commits[batch.column(1).to_numpy() - self._base] > self.after
        return batch.filter(pa.array(mask))


def _table(relation: Relation) -> TableId:
    return TableId(relation.schema, relation.name)
