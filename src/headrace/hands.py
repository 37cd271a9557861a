"""The parts of one source's models: cut, and handed to workers where there are any.

Without a `Handover`, or while it has no workers, nothing is handed over: who asks prepares as ever.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from headrace.change import Copy, Offset
from headrace.cutting import MOST_BYTES, Piece, cut, stretched
from headrace.history import PIECE_ROWS, Selection
from headrace.parts import PartKind, PartSpec, Shares, Staged, rows_of
from headrace.prepared import Prepared
from headrace.preparing import Whole, prepare_part
from headrace.scaling.measure import building

if TYPE_CHECKING:
    from headrace.handover import Handover, Here
    from headrace.protocols import LogIndex
    from headrace.scaling.measure import Meter
    from headrace.staging.delta import DeltaStaging
    from headrace.transform.model import RowModel


class Reading(NamedTuple):
    """What is read of a model's history in one phase of a rebuild."""

    kind: PartKind
    model: RowModel
    copy: Copy
    selection: Selection


class Hands:
    """What workers may do of one source's work."""

    def __init__(self, source: str, log: LogIndex, staging: DeltaStaging, meter: Meter | None = None) -> None:
        """`meter` is told how long those parts take that are prepared here after all."""
        self._log = log
        self._staging = staging
        self._staged = Staged(source, log.id, str(staging.root))
        self._handover: Handover | None = None
        self._meter = meter

    def use(self, handover: Handover) -> None:
        """Hand parts over from now on, while there are workers."""
        self._handover = handover

    def slice(self, model: RowModel, after: Offset, through: Offset) -> Iterator[Prepared] | None:
        """Return the outcomes of a slice of the stream in order; None where nothing is handed over."""
        handover = self._handover
        if handover is None or not handover.takes("slice", model, after, through):
            return None
        parts = self._parts("slice", model, (after, through))
        return None if handover.is_trickle(model, parts) else handover.take(model, parts, self._here())

    def joining(
        self, kind: PartKind, model: RowModel, copy: Copy, after: Offset, through: Offset
    ) -> Iterator[Prepared] | None:
        """Return the outcomes of a slice of a join in order; None where nothing is handed over. Workers begin
        with it at once."""
        handover = self._handover
        if handover is None or not handover.takes(kind, model, after, through):
            return None
        of = self._staging.count(model.table, after, through)
        parts = self._parts(kind, model, (after, through), copy, of)
        if not parts or handover.is_trickle(model, parts):  # of nothing there is an outcome, too
            return None
        handover.begin(parts)
        return handover.take(model, parts, self._here())

    def share(self, model: RowModel, copy: Copy, shares: Shares, number: int) -> Iterator[Prepared] | None:
        """Return the outcome of one share of the keys of a whole history; None where nothing is handed over.
        Workers begin with it, and with those that follow."""
        handover = self._handover
        if handover is None or shares.count == 1 or not handover.takes("keys", model, 0, copy.end):
            return None
        rows = self._staging.count(model.table, 0, copy.end) // shares.count

        def part(number: int) -> Sequence[PartSpec]:
            span, piece = (number, number + 1), (Piece(number, number + 1, rows), None)
            return handover.parts("keys", self._staged, model, span, lambda: [piece], copy, shares)

        following = chain.from_iterable(map(part, range(number, shares.count)))
        handover.expect(self._staging.source, "keys", following)
        handover.begin(part(number))
        return handover.take(model, part(number), self._here())

    def chosen(
        self, reading: Reading, after: Offset, through: Offset
    ) -> tuple[Offset, Iterator[Prepared]] | None:
        """Return the outcomes of the next piece of a selection in order, and the offset through which they
        have all come; None where nothing is handed over. Workers begin with it at once."""
        handover, kind, model = self._handover, reading.kind, reading.model
        if handover is None or not handover.takes(kind, model, after, through):
            return None
        parts, reached = self._chosen_parts(reading, after, through)
        if not parts or handover.is_trickle(model, parts):
            return None

        def following(after: Offset) -> Iterator[PartSpec]:
            while after < through:
                parts, after = self._chosen_parts(reading, after, through)
                yield from parts

        # This piece too: the one before it may still be taken, and leave no room for all of it now.
        handover.expect(self._staging.source, kind, following(after))
        handover.begin(parts)
        return reached, handover.take(model, parts, self._here())

    def again(self, reading: Reading, after: Offset, through: Offset) -> Iterator[Prepared]:
        """Return the outcomes of a piece that `chosen` has handed over, with changes refused since."""
        assert self._handover is not None
        parts, _ = self._chosen_parts(reading, after, through)
        return self._handover.take(reading.model, parts, self._here())

    def _chosen_parts(
        self, reading: Reading, after: Offset, through: Offset
    ) -> tuple[Sequence[PartSpec], Offset]:
        assert self._handover is not None
        kind, model, copy, selection = reading
        rows = self._handover.rows_for(model, PIECE_ROWS)
        first = next(iter(self._staging.row_groups(model.table, after, through)), None)
        if first is not None:
            rows = min(rows, MOST_BYTES * first.rows // max(first.bytes, 1))
        rows = max(rows, 1)
        cut, reached = selection.cut(after, through, rows)

        def pieces() -> Iterable[tuple[Piece, bytes]]:
            return ((part, bits) for piece, bits in cut for part in stretched(piece, rows))

        span = (after, reached)
        parts = self._handover.parts(kind, self._staged, model, span, pieces, copy, selection=selection.id)
        return parts, reached

    def expect(
        self, models: Sequence[RowModel], span: tuple[Offset, Offset], max_bytes: int, max_rows: int
    ) -> None:
        """Have workers that would have nothing to do begin with what else there is in a slice that is taken
        now, and with those that will follow, as they are cut for so many bytes and rows at most."""
        if self._handover is not None:
            following = self._following(models, span, max_bytes, max_rows)
            names = {model.name for model in models}
            self._handover.expect(self._staged.source, "slice", following, names)

    def _following(
        self, models: Sequence[RowModel], span: tuple[Offset, Offset], max_bytes: int, max_rows: int
    ) -> Iterator[PartSpec]:
        handover = self._handover
        assert handover is not None
        (after, through), staged = span, self._staging.through()
        while True:
            for model in models:
                if handover.takes("slice", model, after, through):
                    yield from self._parts("slice", model, (after, through))
            after, through = through, self._log.slice_end(through, staged, max_bytes, max_rows)
            # The last one would be cut otherwise when it is its turn, with more staged by then.
            if through >= staged:
                return

    def _parts(
        self,
        kind: PartKind,
        model: RowModel,
        span: tuple[Offset, Offset],
        copy: Copy | None = None,
        of: int | None = None,
    ) -> Sequence[PartSpec]:
        assert self._handover is not None
        rows = self._handover.rows_for(model, of)

        def pieces() -> Iterable[tuple[Piece, None]]:
            groups = self._staging.row_groups(model.table, *span)
            pieces = cut(groups, *span, rows)
            return ((part, None) for piece in pieces for part in stretched(piece, rows))

        return self._handover.parts(kind, self._staged, model, span, pieces, copy)

    def _here(self) -> Here:
        """Return what prepares parts here that no worker does, one after another."""
        whole = Whole()

        def here(part: PartSpec, model: RowModel) -> Prepared:
            began, used = time.monotonic(), time.process_time()
            prepared = prepare_part(self._staging, part, model, whole)
            if self._meter is not None:
                work = model.name if part.kind == "slice" else building(model.name)
                spent = (time.monotonic() - began, time.process_time() - used)
                self._meter.prepared(work, rows_of(part, prepared), *spent)
            return prepared

        return here
