"""A table's history, of which only what decides is read whole.

Of all changes of a key the newest decides, unless it is bad. The columns of the key tell which it is: they
are read first, all of them, and then only the rows that were found. Where the newest change of a key is bad,
all changes of such keys are found the same way.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.change import Copy, Offset, TableId
from headrace.cutting import Piece
from headrace.keys import literal
from headrace.staging.contained import not_contained
from headrace.staging.copies import beyond, copied, streamed
from headrace.staging.delta import DeltaStaging
from headrace.transform.fold import events_of, points_of

PIECE_ROWS = 250_000
"""How many rows of a selection are in memory at once, or fewer of many bytes."""

_PIECE_BYTES = 48 << 20
_MEMORY = 256 << 20  # bytes that finding may take before it spills
_FOUND = 100_000  # numbers in memory at once, beside the bits
_COPIED = 1 << 61  # what a copied row ranks below a streamed change with the same number
_EFFECTS = pa.schema({"k": pa.string(), "v": pa.int64()})
_HEAD = ("_op", "_epoch", "_commit", "_offset", "_before")


class Span(NamedTuple):
    """The changes in `(after, through]`: so many `rows`, numbered from `first`."""

    after: Offset
    through: Offset
    first: int
    rows: int


Cut = tuple[list[tuple[Piece, bytes]], Offset]
"""Pieces with their bits, and the offset through which they come."""


class Selection:
    """Some of a table's changes, by a bit for each change there is."""

    def __init__(
        self, staging: DeltaStaging, table: TableId, spans: Sequence[Span], bits: npt.NDArray[np.uint8]
    ) -> None:
        self._staging = staging
        self._table = table
        self._spans = spans
        self._bits = pa.py_buffer(bits)
        self.id = uuid.uuid4().hex
        """Another for each finding: the same changes may be chosen otherwise."""
        self._cuts: dict[Offset, Cut] = {}

    def pieces(self, after: Offset, through: Offset) -> Iterator[tuple[pa.Table, Offset]]:
        """Yield the chosen changes in `(after, through]` whole, in the log's order and in pieces of a bounded
        size, each with an offset through which they have all come; the last piece, which may be empty, with
        `through`.

        `after` is such an offset, or the one that `History` was asked to go on from. A transaction may be
        cut, an entry is not.
        """
        held: list[pa.Table] = []
        for span in self._spans:
            mask = pa.Array.from_buffers(pa.bool_(), span.rows, [None, self._bits], offset=span.first)
            if span.through <= after or not mask.true_count:
                continue
            seen = 0
            for part in self._staging.chunks(self._table, span.after, span.through):
                held.append(part.filter(mask.slice(seen, part.num_rows)))
                seen += part.num_rows
            assert seen == span.rows, f"{self._table} has {seen} changes in {span}"
            full = sum(part.nbytes for part in held) >= _PIECE_BYTES
            if full or sum(part.num_rows for part in held) >= PIECE_ROWS:
                piece, held = _joined(held), []
                yield piece, span.through
                del piece
        held = held or [self._staging.empty(self._table)]
        yield _joined(held), through

    def left(self, after: Offset) -> int:
        """Return how many chosen changes there are behind an offset that is the end of a piece."""
        first = next((span.first for span in self._spans if span.through > after), None)
        if first is None:
            return 0
        end = self._spans[-1].first + self._spans[-1].rows
        mask = pa.Array.from_buffers(pa.bool_(), end - first, [None, self._bits], offset=first)
        return int(mask.true_count)

    def cut(self, after: Offset, through: Offset, rows: int) -> Cut:
        """Cut the next chosen changes behind `after`, as many as `pieces` yields at once, into pieces of so
        many rows, about, each with a bit for every change in it; and return the offset that they come to.

        What was cut once is cut like that whenever it is asked for.
        """
        if after not in self._cuts:
            self._cuts[after] = self._cut(after, through, rows)
        return self._cuts[after]

    def _cut(self, after: Offset, through: Offset, rows: int) -> Cut:
        pieces, held, taken, bits = list[tuple[Piece, bytes]](), list[Span](), 0, list[int]()
        for span in self._spans:
            mask = pa.Array.from_buffers(pa.bool_(), span.rows, [None, self._bits], offset=span.first)
            if span.through <= after or not (chosen := mask.true_count):
                continue
            if bits and sum(bits) + chosen > rows:
                pieces.append(self._piece(held, sum(bits)))
                held, bits = [], []
            if taken >= PIECE_ROWS:
                break
            held.append(span)
            bits.append(chosen)
            taken += chosen
        else:
            pieces += [self._piece(held, sum(bits))] if held else []
            return pieces, through
        if held:
            pieces.append(self._piece(held, sum(bits)))
        return pieces, pieces[-1][0].through

    def _piece(self, spans: Sequence[Span], chosen: int) -> tuple[Piece, bytes]:
        first, end = spans[0].first, spans[-1].first + spans[-1].rows
        near = np.frombuffer(self._bits, dtype=np.uint8)[first >> 3 : (end + 7) >> 3]
        bits = np.unpackbits(near, bitorder="little")[first & 7 :][: end - first]
        chosen_bits = np.packbits(bits, bitorder="little").tobytes()
        return Piece(spans[0].after, spans[-1].through, chosen), chosen_bits


@dataclass(slots=True)
class _Scan:
    """What one reading of all keys leaves behind: the spans that it read, the number of the last truncate,
    and what made it fail, which the engine that took the effects tells in other words."""

    spans: list[Span] = field(default_factory=list)
    rows: int = 0
    reset: int = -1
    failure: BaseException | None = None


class History:
    """All that made a table with a key what it is as of an offset: a copy's rows, then every change that they
    do not contain."""

    def __init__(
        self,
        staging: DeltaStaging,
        table: TableId,
        key: Sequence[str],
        copy: Copy,
        through: Offset,
        *,
        before: tuple[int, int] | None = None,
        spill: Path | None = None,
        stopped: threading.Event | None = None,
    ) -> None:
        """`before` leaves out transactions whose commit (epoch and LSN) stands there or behind. What does not
        fit in memory goes to the folder `spill`. Once `stopped` is set, finding raises InterruptedError."""
        self._staging = staging
        self._table = table
        self._key = key
        self._copy = copy
        self._through = through
        self._before = before
        self._spill = spill
        self._stopped = stopped or threading.Event()

    @property
    def begin(self) -> Offset:
        """The offset behind which it begins."""
        return min(self._copy.begin, self._copy.after, self._through)

    def newest(self, *, going_on: Offset = 0) -> Selection:
        """Find the newest change of every key, of those keys that it leaves with a row.

        `going_on` is an offset of which one of its pieces may begin.
        """
        found = "SELECT max(v) AS v FROM effects GROUP BY k HAVING max(v) & 1 = 1"
        copied_bits, streamed_bits, scan = self._find(found, going_on)
        return self._selection(scan, copied_bits | streamed_bits)

    def of(self, keys: pa.Array | None, *, going_on: Offset = 0) -> tuple[Selection, Selection]:
        """Find all copied rows, and all changes behind them, of some source keys (None: of all); what a
        truncate made void is not among them, nor the truncate."""
        found = "SELECT v FROM effects"
        if keys is not None:
            found += " SEMI JOIN given ON effects.k = given.key"
        copied_bits, streamed_bits, scan = self._find(found, going_on, keys)
        return self._selection(scan, copied_bits), self._selection(scan, streamed_bits)

    def _selection(self, scan: _Scan, bits: npt.NDArray[np.uint8]) -> Selection:
        return Selection(self._staging, self._table, scan.spans, bits)

    def _find(
        self, query: str, going_on: Offset, keys: pa.Array | None = None
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], _Scan]:
        """Return one bit for every change in the log's order: whether it is a copied row that the query
        returns, or another change that it does."""
        scan = _Scan()
        size = self._staging.count(self._table, self.begin, self._through) // 8 + 1
        copied_bits, streamed_bits = (np.zeros(size, dtype=np.uint8) for _ in range(2))
        try:
            with duckdb.connect() as db:
                self._settle_in(db)
                batches = self._effects(scan, going_on)
                db.register("effects", pa.RecordBatchReader.from_batches(_EFFECTS, batches))
                if keys is not None:
                    db.register("given", pa.table({"key": keys}))
                for batch in db.sql(query).to_arrow_reader(_FOUND):
                    ranks = batch.column(0).to_numpy() >> 1
                    _set(copied_bits, ranks[ranks < 0] + _COPIED)
                    _set(streamed_bits, ranks[ranks >= 0])
        except (duckdb.Error, pa.ArrowException, OSError):
            if scan.failure is not None:
                raise scan.failure from None
            raise
        if scan.reset >= 0:
            copied_bits[:] = 0
            streamed_bits[: scan.reset >> 3] = 0
            streamed_bits[scan.reset >> 3] &= 0xFF & (0xFE << (scan.reset & 7))
        return copied_bits, streamed_bits, scan

    def _settle_in(self, db: duckdb.DuckDBPyConnection) -> None:
        db.execute(f"SET memory_limit = '{_MEMORY}B'")
        db.execute("SET preserve_insertion_order = false")
        # One thread that has all of the memory is quicker than two that spill, and the other core reads.
        db.execute("SET threads = 1")
        db.execute("SET enable_progress_bar = false")
        if self._spill is not None:
            db.execute(f"SET temp_directory = {literal(str(self._spill))}")

    def _effects(self, scan: _Scan, going_on: Offset) -> Iterator[pa.RecordBatch]:
        """Yield every effect: its key `k`, and `v`, twice the rank of its change, plus one where it leaves a
        row. A streamed change ranks by its number, a copied row below all of them."""
        try:
            with duckdb.connect() as db:
                for rows in self._ranked(scan, going_on):
                    points = points_of(db, self._key, events_of(db, self._key, rows))
                    ranks = rows["_hr_rank"].to_numpy()[points["n"].to_numpy()]
                    stays = pc.and_not(points["own"], points["gone"]).to_numpy(zero_copy_only=False)
                    made = pa.table({"k": points["k"], "v": pa.array(ranks * 2 + stays)}, schema=_EFFECTS)
                    yield from made.to_batches()
        except BaseException as error:
            scan.failure = error
            raise

    def _ranked(self, scan: _Scan, going_on: Offset) -> Iterator[pa.Table]:
        """Yield what is of the history, row group by row group, with the columns that say whose it is, and
        `_hr_rank`; truncates go to `scan.reset`."""
        before, columns = self.begin, list(dict.fromkeys([*self._key, *_HEAD]))
        middle = min(max(going_on, before), self._through)
        for after, through in ((before, middle), (middle, self._through)):
            for part in self._staging.chunks(self._table, after, through, columns):
                if self._stopped.is_set():
                    raise InterruptedError("stopped while a table's history was read")
                last = part["_offset"][-1].as_py()
                scan.spans.append(Span(before, last, scan.rows, part.num_rows))
                ranks = np.arange(scan.rows, scan.rows + part.num_rows, dtype=np.int64)
                scan.rows, before = scan.rows + part.num_rows, last
                part = part.append_column("_hr_rank", pa.array(ranks))  # noqa: PLW2901
                yield from self._parted(scan, part)
            before = max(before, through)

    def _parted(self, scan: _Scan, part: pa.Table) -> Iterator[pa.Table]:
        rows = copied(part, self._copy)
        if rows.num_rows:
            at = rows.schema.get_field_index("_hr_rank")
            yield rows.set_column(at, "_hr_rank", pc.subtract(rows["_hr_rank"], _COPIED))
        changes = streamed(part) if rows.num_rows or _has_copied(part) else part
        changes = self.kept(changes)
        truncates = pc.equal(changes["_op"], "t")
        if pc.any(truncates).as_py():
            scan.reset = pc.max(changes.filter(truncates)["_hr_rank"]).as_py()
            changes = changes.filter(pc.greater(changes["_hr_rank"], scan.reset))
        changes = not_contained(self._staging, self._table, self._key, self._copy, changes)
        if changes.num_rows:
            yield changes

    def kept(self, changes: pa.Table) -> pa.Table:
        """Return those of some streamed changes that the copy does not contain for certain, and that stand
        before where the history ends."""
        changes = beyond(changes, self._copy.floor)
        if changes.num_rows and changes["_offset"][0].as_py() <= self._copy.after:
            changes = changes.filter(pc.greater(changes["_offset"], self._copy.after))
        return changes if self._before is None else _before(changes, *self._before)


def _before(changes: pa.Table, epoch: int, commit: int) -> pa.Table:
    """Return the changes of transactions that stand before a commit."""
    epochs = changes["_epoch"]
    earlier = pc.and_(pc.equal(epochs, epoch), pc.less(changes["_commit"], commit))
    return changes.filter(pc.or_(pc.less(epochs, epoch), earlier))


def _has_copied(part: pa.Table) -> Any:
    return pc.any(pc.equal(part["_op"], "r")).as_py()


def _set(bits: npt.NDArray[np.uint8], numbers: npt.NDArray[np.int64]) -> None:
    np.bitwise_or.at(bits, numbers >> 3, np.left_shift(1, numbers & 7).astype(np.uint8))


def _joined(parts: Sequence[pa.Table]) -> pa.Table:
    # A part that was read before a column came lacks it.
    return pa.concat_tables(parts, promote_options="default").combine_chunks()
