"""The copy of tables beside the stream: in chunks, in parallel, each chunk whole or not at all.

A worker reads one chunk in one short transaction under a shared snapshot and hands it over as one
group: its rows, then its marker. Whoever appends the log takes the groups between those of the stream.
A chunk that is in the log is never read again, whatever dies. A table that was rewritten or truncated
behind the snapshot, which then shows it empty, begins again; so does one without a key when the
snapshot changes. A table that cannot be copied fails alone.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial

import psycopg
import pyarrow as pa

from headrace.alarms import trigger
from headrace.change import CopyMark, Entry, Position, TableId, TableSchema
from headrace.config import SourceConfig
from headrace.errors import RETRY_SQLSTATES, HeadraceError, SourceUnavailable, UserError
from headrace.failpoints import failpoint
from headrace.keyfilter import key_filter
from headrace.payload import encode_rows
from headrace.protocols import LogIndex
from headrace.sources.postgres.catalog import Connection, read_shapes
from headrace.sources.postgres.chunks import Bounds, Range, condition, cut, ranges
from headrace.sources.postgres.chunkspool import ChunkSpool, Encoded
from headrace.sources.postgres.columns import Policy
from headrace.sources.postgres.connection import connect, without_password
from headrace.sources.postgres.copy import as_changes, files_of, is_partitioned, select_rows, was_rewritten
from headrace.sources.postgres.moved import Key, moved_keys
from headrace.sources.postgres.pace import Pace
from headrace.sources.postgres.publication import capturable_shapes
from headrace.sources.postgres.reader import Reader
from headrace.sources.postgres.snapshots import Snapshot, Snapshots
from headrace.sources.postgres.tables import UNFINISHED, TableStates
from headrace.sources.postgres.undecodable import Undecodable

logger = logging.getLogger("headrace.copy")

_LARGE_BATCH = 32 << 20  # bytes from which a batch is encoded before the next one is read
_LOCK_WAIT = "5s"
_CHANGED_MEANWHILE = ("42703", "42P01", "42804")
_LOCKED = "55P03"
_TIMEOUT = "57014"  # a chunk that takes longer than max_snapshot_age


@dataclass(eq=False)
class _Table:
    """A table under copy; one that begins again is a new object, so that what is left of the former one
    is known and dropped."""

    id: TableId
    reason: str
    after: int
    first: int  # the number of the first snapshot that it may be read under
    schema: TableSchema | None = None
    raw: TableSchema | None = None  # with all columns, and none hashed
    files: str = ""
    since: float = 0.0  # when its first chunk was read, if it has no key
    left: set[int] = field(default_factory=set)
    commits: set[int] = field(default_factory=set)
    sought: int = 0  # the commit through which moved keys were looked for
    moved: set[Key] | None = None  # those that were found last
    further: int = 0  # the number of the next chunk that no plan has foreseen

    @property
    def is_whole(self) -> bool:
        return bool(self.commits) and not self.left


@dataclass(frozen=True)
class Group:
    """A group to append; `appended` is to be called once it is durable. The begin of a copy brings the
    `shape` that its table has from then on."""

    entries: Iterator[Entry]
    appended: Callable[[], None]
    shape: TableSchema | None = None


@dataclass(frozen=True, slots=True)
class _Seek:
    """Look for keys that rows moved to by commits in `(after, through]`."""

    after: int
    through: int


_SOUGHT = -1  # stands among the chunks that are left while moved keys are looked for

_Job = tuple[_Table, "Range | _Seek | None"]


class Copier:
    """Copies tables of one source. Its methods belong to the thread that appends the log; the reading
    is done by its own threads."""

    def __init__(self, config: SourceConfig, log: LogIndex, epoch: int) -> None:
        self.snapshots = Snapshots(config.url.reveal(), config.max_snapshot_age)
        self._config = config
        self._url = config.url.reveal()
        self._policy = Policy(config)
        self._undecodable = Undecodable()
        self._log = log
        self._epoch = epoch
        self._states = TableStates(log)
        self._tables: dict[TableId, _Table] = {}
        self._jobs: deque[_Job] = deque()
        self._ready: queue.Queue[tuple[_Table, Group] | BaseException] = queue.Queue(maxsize=2)
        self._wake = threading.Condition()
        self._stop = threading.Event()
        self._pace = Pace(config.copy_rate, self._stop)
        self._threads: list[threading.Thread] = []
        self._readers: list[Reader] = []  # one for each thread

    @property
    def busy(self) -> bool:
        """Whether any table is under copy."""
        return bool(self._tables)

    @property
    def waits_for_stream(self) -> bool:
        """Whether a table has all its rows, and the stream has still to pass their snapshots."""
        return any(table.is_whole for table in list(self._tables.values()))

    def start(self, table: TableId, reason: str, *, after: int, under_current: bool = False) -> None:
        """Copy a table from its beginning.

        The log holds no change at or before offset `after` that the copy lacks. `under_current` allows
        the snapshot that is held now; else it is read under one that is taken when its begin is durable.
        """
        self._states.move([table], "requested", reason)
        self._begin_with(_Table(table, reason, after, self.snapshots.number + (not under_current)))

    def resume(self) -> None:
        """Take up the copies that the log shows unfinished; their finished chunks stay."""
        marks: dict[TableId, list[tuple[Position, CopyMark]]] = {}
        for _, table, at, _, mark in self._log.copy_marks():
            if mark.kind == "begin":
                marks[table] = []
            marks[table].append((at, mark))
        for table, state in self._states.all().items():
            if state.stage not in UNFINISHED or table in self._tables:
                continue
            known = marks.get(table, [])
            of_this_epoch = bool(known) and known[0][0].epoch == self._epoch
            if of_this_epoch and known[-1][1].kind == "end" and state.stage != "requested":
                self._states.move([table], "live")  # its end became durable, and then nothing was said of it
                continue
            under_way = of_this_epoch and known[-1][1].kind != "end"
            if state.stage == "requested" or not under_way or not self._take_up(table, known):
                self.start(table, state.reason, after=self._log.end().offset)

    def drop(self, table: TableId) -> None:
        """Stop copying a table."""
        with self._wake:
            self._tables.pop(table, None)

    def ready(self, reached: int) -> Iterator[Group]:
        """Yield the groups that are ready now; `reached` is how far (LSN) the log holds the stream.

        Raises SourceUnavailable when a worker has lost its connection.
        """
        self.snapshots.expire()
        # No more than those: workers that read faster than the log takes would never let the stream have
        # its turn.
        for _ in range(self._ready.qsize()):
            item = self._ready.get_nowait()
            if isinstance(item, BaseException):
                raise item
            table, group = item
            if self._is_current(table):  # else it would count as a part of the copy that has begun since
                yield group
        for table in list(self._tables.values()):
            if not table.is_whole or reached < max(table.commits):
                continue
            floor, ceiling = min(table.commits), max(table.commits)
            if any(floor < commit <= ceiling for commit in self._log.truncates(table.id, table.after)):
                self._begin_again(table, "it was truncated between two of its snapshots")
                continue
            if floor < ceiling and table.sought < ceiling and table.schema and table.schema.key:
                table.left.add(_SOUGHT)
                self._add(table, _Seek(max(floor, table.sought), ceiling))
                table.sought = ceiling
                continue
            end = self._marker(table, ceiling, CopyMark("end", floor=floor, ceiling=ceiling))
            yield Group(iter([end]), partial(self._finished, table))

    def close(self) -> None:
        """End the workers; what they had in hand is read again."""
        self._stop.set()
        with self._wake:
            self._wake.notify_all()
        for thread, reader in zip(self._threads, self._readers, strict=True):
            while thread.is_alive():
                reader.interrupt()
                with suppress(queue.Empty):
                    self._ready.get(timeout=0.02)
        self.snapshots.release()

    # What the appending thread does when a group is durable.

    def _begun(self, table: _Table, bounds: Bounds, done: set[int] | None = None) -> None:
        if not self._is_current(table):
            return
        parts = [part for part in ranges(bounds) if part.number not in (done or ())]
        table.left = {part.number for part in parts}
        table.further = max([len(bounds), *(done or ())]) + 1
        why = f", {table.reason}" if table.reason else ""
        logger.info("copy of %s: %d of %d chunks%s", table.id, len(parts), len(bounds) + 1, why)
        self._states.move([table.id], "copying" if parts else "catching_up", table.reason)
        for part in parts:
            self._add(table, part)

    def _counted(self, table: _Table, part: Range, commit: int) -> None:
        if self._is_current(table):
            table.left.discard(part.number)
            table.commits.add(commit)
            if not table.left:
                self._states.move([table.id], "catching_up", table.reason)

    def _finished(self, table: _Table) -> None:
        self.drop(table.id)
        self._states.move([table.id], "live")
        logger.info("copy of %s is complete", table.id)
        if not self._tables:
            self.snapshots.release()
            logger.info("copy is complete")

    def _take_up(self, table: TableId, marks: Sequence[tuple[Position, CopyMark]]) -> bool:
        """Go on with a copy; not possible without a key, since blocks hold under one snapshot only."""
        begin = marks[0][1]
        assert begin.schema is not None
        done = {mark.chunk: at.commit for at, mark in marks[1:]}
        if not begin.schema.key and len(done) <= len(begin.bounds):
            return False
        again = _Table(table, begin.reason, begin.after, self.snapshots.number + 1, begin.schema)
        again.commits, again.files = set(done.values()), begin.files
        self._tables[table] = again
        self._begun(again, begin.bounds, set(done))
        return True

    # What the workers do.

    def _begin_with(self, table: _Table) -> None:
        with self._wake:
            self._tables[table.id] = table
        self._add(table, None)

    def _begin_again(self, table: _Table, why: str) -> None:
        logger.warning("copy of %s begins again: %s", table.id, why)
        after = self._log.end().offset
        self._begin_with(_Table(table.id, table.reason, after, self.snapshots.number + 1))

    def _add(self, table: _Table, part: Range | _Seek | None) -> None:
        with self._wake:
            self._jobs.append((table, part))
            self._wake.notify()
            if len(self._threads) < self._config.copy_workers:
                name = f"{self._config.name}.copy.{len(self._threads)}"
                self._readers.append(Reader(self._url))
                self._threads.append(
                    threading.Thread(target=self._work, args=self._readers[-1:], name=name, daemon=True)
                )
                self._threads[-1].start()

    def _is_current(self, table: _Table) -> bool:
        return self._tables.get(table.id) is table

    def _work(self, reader: Reader) -> None:
        """Take jobs until the end; one connection serves the reading of all of them."""
        encoder = ThreadPoolExecutor(1, threading.current_thread().name + ".encode")
        try:
            while (job := self._next()) is not None:
                table, part = job
                if not self._is_current(table):
                    continue
                try:
                    if part is None:
                        self._plan(table)
                    elif isinstance(part, _Seek):
                        self._seek(table, part)
                    else:
                        self._copy_chunk(reader, encoder, table, part)
                except (HeadraceError, psycopg.Error, _ChangedMeanwhile) as error:
                    if reader.is_lost:
                        raise _broke_off(table, error) from error
                    self._judge(table, part, error)
        except BaseException as error:
            self._hand_over(error)
        finally:
            reader.close()
            encoder.shutdown(wait=False)

    def _next(self) -> _Job | None:
        with self._wake:
            self._wake.wait_for(lambda: self._jobs or self._stop.is_set())
            return None if self._stop.is_set() else self._jobs.popleft()

    def _hand_over(self, item: tuple[_Table, Group] | BaseException) -> None:
        while not self._stop.is_set():
            with suppress(queue.Full):
                self._ready.put(item, timeout=0.2)
                return

    def _plan(self, table: _Table) -> None:
        """Read the table's shape, cut it, and hand over the begin of its copy."""
        with connect(self._url) as db:
            table.raw, table.files = self._raw_shape(db, table.id), files_of(db, table.id)
            (shape,) = capturable_shapes(db, self._config, [table.id])
            # The bounds stand in the log as they are: no value of a hashed key may be among them.
            hashed = any(self._policy.hashes(table.id, name) for name in table.raw.key)
            bounds = () if hashed else cut(db, table.raw, self._config.chunk_bytes)
        known = self._log.schemas().get(table.id)
        version = 1 if known is None else known.version + (not known.agrees(shape))
        table.schema = replace(shape, version=version)
        mark = CopyMark("begin", table.schema, bounds, table.after, table.reason, table.files)
        begin = self._marker(table, 0, mark)
        self._hand_over((table, Group(iter([begin]), partial(self._begun, table, bounds), table.schema)))

    def _seek(self, table: _Table, window: _Seek) -> None:
        """Have the keys read again that rows moved to; those of the last time that moved on, too."""
        assert table.schema is not None
        span = (window.after, window.through)
        moved = moved_keys(self._log, table.id, table.schema.key, table.after, span, table.moved)
        with self._wake:
            table.moved = moved
            if moved:
                keys = tuple(tuple(map(str, key)) for key in sorted(moved, key=str))
                part = Range(table.further, None, None, keys)
                table.further += 1
                table.first = self.snapshots.number + 1
                table.left.add(part.number)
                self._add(table, part)
            table.left.discard(_SOUGHT)

    def _encoded(
        self, encoder: Executor, batches: Iterable[pa.RecordBatch], shape: TableSchema, at: Position, now: int
    ) -> Iterator[tuple[int, Encoded]]:
        """Yield each batch's size and what it is encoded; the rows follow position `at`. While one is
        encoded the next one is read."""

        def encode(batch: pa.RecordBatch, after: int) -> tuple[int, Encoded]:
            cells = self._policy.apply(shape.table, self._undecodable.escape(shape.table, batch))
            payload = encode_rows(as_changes(cells, at.commit, after, now))
            return batch.nbytes, Encoded(batch.num_rows, payload, key_filter(cells, shape.key))

        ordinal = at.ordinal
        former: Future[tuple[int, Encoded]] | None = None
        for batch in batches:
            if former is not None:
                yield former.result()
            former = encoder.submit(encode, batch, ordinal)
            ordinal += batch.num_rows
            if batch.nbytes >= _LARGE_BATCH:
                yield former.result()
                former = None
            del batch  # else it would stay while the next one is read
        if former is not None:
            yield former.result()

    @staticmethod
    def _raw_shape(db: Connection, table: TableId) -> TableSchema:
        shape = read_shapes(db, [table]).get(table)
        if shape is None:
            raise UserError(f"Table {table} is gone.")
        return shape

    def _copy_chunk(self, reader: Reader, encoder: Executor, table: _Table, part: Range) -> None:
        assert table.schema is not None
        if table.raw is None:
            with connect(self._url) as db:
                table.raw = self._raw_shape(db, table.id)
                if table.files != files_of(db, table.id):
                    raise _ChangedMeanwhile("it was rewritten while nothing ran")
                (shape,) = capturable_shapes(db, self._config, [table.id])
            if not shape.same_shape(table.schema):
                raise _ChangedMeanwhile("it has another shape than in the chunks that are done")
        snapshot = self.snapshots.current(table.first)
        if not table.schema.key:
            self._keep_to(snapshot, table)
        rows = ChunkSpool()
        first, read = Position(self._epoch, snapshot.commit, part.ordinal), 0
        now = time.time_ns() // 1000
        timeout = f"{self._config.max_snapshot_age:.0f}s"
        with reader.under(snapshot.name, lock_timeout=_LOCK_WAIT, statement_timeout=timeout) as db:
            chosen = [condition(table.raw, part), *filter(None, [self._policy.where(table.id)])]
            query = select_rows(table.schema, is_partitioned(db, table.id), ") AND (".join(chosen))
            with closing(reader.rows(query, [column.name for column in table.schema.columns])) as batches:
                for size, encoded in self._encoded(encoder, batches, table.schema, first, now):
                    rows.add(encoded)
                    failpoint("source.copy.batch")
                    read += size
                    if self._stop.is_set():
                        return
            if was_rewritten(db, table.id):
                raise _ChangedMeanwhile("it was rewritten or truncated")
        self._pace.spend(read)  # not before: a transaction that sleeps would hold up the application's DDL
        entries = self._entries(rows, table, part, snapshot, now)
        self._hand_over((table, Group(entries, partial(self._counted, table, part, snapshot.commit))))

    def _keep_to(self, snapshot: Snapshot, table: _Table) -> None:
        """Let a table without a key be read under one snapshot only: a row may move between blocks."""
        with self._wake:
            if not table.commits:
                table.first, table.since = snapshot.number, time.monotonic()
                table.commits.add(snapshot.commit)
        if table.first == snapshot.number:
            return
        if time.monotonic() - table.since > self._config.max_snapshot_age:
            raise UserError(
                "without a key it is copied under one snapshot, and that takes longer than max_snapshot_age.",
                "Give it a key, or raise that.",
            )
        raise _ChangedMeanwhile("its snapshot was replaced")

    def _entries(
        self, rows: ChunkSpool, table: _Table, part: Range, snapshot: Snapshot, now: int
    ) -> Iterator[Entry]:
        assert table.schema is not None
        ordinal, version = part.ordinal, table.schema.version
        for count, payload, held in rows.drain():
            first, last = (Position(self._epoch, snapshot.commit, ordinal + n) for n in (1, count))
            yield Entry("copy", table.id, first, last, now, count, version, payload, filter=held)
            ordinal += count
        mark = CopyMark("chunk", chunk=part.number, rows=ordinal - part.ordinal)
        yield self._marker(table, snapshot.commit, mark)

    def _marker(self, table: _Table, commit: int, mark: CopyMark) -> Entry:
        at = Position(self._epoch, commit, 0)
        version = table.schema.version if table.schema else 0
        return Entry("marker", table.id, at, at, time.time_ns() // 1000, 0, version, mark.to_json().encode())

    def _judge(self, table: _Table, part: Range | _Seek | None, error: Exception) -> None:
        """Begin the table again, read the chunk again, give the table up, or have the source retried."""
        state = getattr(error, "sqlstate", None) or ""
        if not self._is_current(table):
            return
        words = _words(error)
        if isinstance(error, _ChangedMeanwhile) or state in _CHANGED_MEANWHILE:
            self._begin_again(table, words)
        elif state == _LOCKED:
            self._stop.wait(1.0)
            self._add(table, part)
        elif isinstance(error, SourceUnavailable) or (state[:2] in RETRY_SQLSTATES and state != _TIMEOUT):
            raise _broke_off(table, error) from error
        else:
            self.drop(table.id)
            self._states.move([table.id], "failed", words)
            trigger(
                "copy", f"{self._config.name}.{table.id}",
                "FAILED copy of %s: %s Mend it, then run `headrace tables resync %s`.",
                table.id, words, table.id, source=self._config.name,
            )  # fmt: skip


def _broke_off(table: _Table, error: Exception) -> SourceUnavailable:
    return SourceUnavailable(f"The copy of {table.id} broke off: {_words(error)}")


def _words(error: Exception) -> str:
    """Return what the server said, without what the driver puts before it."""
    text = error.paragraph() if isinstance(error, HeadraceError) else str(error)
    line = without_password(text).strip().splitlines()[0]
    return line.rpartition("ERROR:")[2].strip().rstrip(".") + "."


class _ChangedMeanwhile(Exception):
    """What was read of a table does not fit together."""
