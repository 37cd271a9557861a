"""The breaker: a model whose changes fail one after another is suspended, since that is no bad data.

Of each model's version the newest changes are counted. Where at least `LEAST` are known and the share of
those that failed is the model's `max_error_rate` or more, it trips: nothing of the slice is kept, the model
is suspended and its changes wait in staging. Tried again, under a mended file or by `headrace resume`, the
next part with a change in it decides alone: it closes the breaker, or trips it once more.

What waits for a parent, or has lost it, is no fault of the model and is not counted, and neither is what does
not decode.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from headrace.config import QuarantineConfig
from headrace.errors import BreakerTripped
from headrace.prepared import FOREIGN_KEY, MESSAGE, PAYLOAD
from headrace.quarantine.limit import SizeLimit

if TYPE_CHECKING:
    from headrace.prepared import Prepared

logger = logging.getLogger("headrace.lane")

LEAST = 1_000
"""Changes without which nothing is judged."""
WINDOW = 10_000
"""So many of the newest changes count, and what else came in the same part."""


_OF_OTHERS = pa.array([FOREIGN_KEY, MESSAGE, PAYLOAD])
"""Reasons for which the model can do nothing."""


class Guarded(Protocol):
    """What is asked of a model."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def version(self) -> str:
        """The version of its file."""
        ...

    @property
    def max_error_rate(self) -> float:
        """Which share of its newest changes may fail; 1 for any."""
        ...


class Tally(NamedTuple):
    """How many changes were judged, how many of them failed, and how many good ones violate a check that
    only warns or nulls."""

    judged: int = 0
    failed: int = 0
    warned: int = 0
    nulled: int = 0


@dataclass(slots=True)
class _Window:
    """The newest parts of a model's version, in their order."""

    version: str
    parts: deque[Tally] = field(default_factory=deque)

    def with_(self, more: Iterable[Tally]) -> Tally:
        parts = [*self.parts, *more]
        return Tally(*map(sum, zip(*parts, strict=True)))

    def add(self, parts: Iterable[Tally]) -> None:
        self.parts.extend(parts)
        judged = self.with_(()).judged
        while judged - self.parts[0].judged >= WINDOW:
            judged -= self.parts.popleft().judged


class Breakers:
    """The breakers of one source's models. Not for two threads at once."""

    def __init__(self, limit: SizeLimit | None = None) -> None:
        """`limit` is that of the quarantine, which the same parts are held against."""
        self._limit = limit or SizeLimit(QuarantineConfig(), lambda _: [])
        self._windows: dict[str, _Window] = {}
        self._tripped: set[str] = set()
        self._pending: dict[str, list[Tally]] = {}

    def know(self, tripped: Iterable[str]) -> None:
        """Take over which models have tripped and not passed a part since, and how full the quarantine is."""
        self._tripped.update(tripped)
        self.recount()

    def recount(self) -> None:
        """Take over how full the quarantine is, where records came or went that nobody admitted."""
        self._limit.count()

    def has_room(self, error: BaseException) -> bool:
        """Whether an error says that the quarantine is full, and it is not any more."""
        return self._limit.has_room(error)

    def begin(self) -> None:
        """Forget what was admitted and not kept: the transaction is begun anew."""
        self._pending.clear()
        self._limit.begin()

    def admit(self, model: Guarded, prepared: Prepared) -> None:
        """Count a part that is to be applied. Raises BreakerTripped where too many of its changes fail, and
        QuarantineFull where its records are too many."""
        self._limit.admit(model.name, prepared)
        tally = tally_of(prepared)
        if not tally.judged:
            return
        window = self._window(model)
        pending = self._pending.setdefault(model.name, [])
        is_probe = model.name in self._tripped and not pending
        pending.append(tally)
        counted = tally if is_probe else window.with_(pending)
        rate = model.max_error_rate
        if rate >= 1 or not counted.failed or (counted.judged < LEAST and not is_probe):
            return
        if counted.failed >= rate * counted.judged:
            self._pending.pop(model.name)
            self._windows.pop(model.name)
            self._tripped.add(model.name)
            raise BreakerTripped(
                model.name,
                f"{counted.failed:,} of its newest {counted.judged:,} changes failed "
                f"(max_error_rate is {rate:g}), {_most_frequent(prepared)}. None of this part was applied; "
                "its changes wait in staging.",
                f"Mend the model, or run `headrace resume {model.name}` to try again.",
            )

    def admitted(self, model: Guarded, parts: Iterable[Prepared]) -> Iterator[Prepared]:
        """Yield parts as they are taken, each admitted before."""
        for prepared in parts:
            self.admit(model, prepared)
            yield prepared
            del prepared

    def keep(self) -> None:
        """Take over what was admitted: its transaction is committed. What it has of checks that only warn is
        logged, once."""
        self._limit.keep()
        for name, parts in self._pending.items():
            self._windows[name].add(parts)
            _, _, warned, nulled = map(sum, zip(*parts, strict=True))
            if warned or nulled:
                logger.warning(
                    "model %s: %d changes applied that violate a check, %d with a cell nulled for it",
                    name, warned + nulled, nulled,
                )  # fmt: skip
            self._tripped.discard(name)
        self._pending.clear()

    def _window(self, model: Guarded) -> _Window:
        window = self._windows.get(model.name)
        if window is None or window.version != model.version:
            window = self._windows[model.name] = _Window(model.version)
        return window


def tally_of(prepared: Prepared) -> Tally:
    """Count the changes of a part that were judged: those that a later one overtakes are not."""
    records = prepared.records
    others = pc.sum(pc.is_in(records["reason"], value_set=_OF_OTHERS)).as_py() or 0 if records.num_rows else 0
    failed = records.num_rows - others
    if prepared.steps is not None:
        # Of each key the first bad change alone has a record, and all were judged.
        failed = pc.sum(pc.equal(prepared.steps.table["_what"], "bad")).as_py() or 0
        return Tally(prepared.counts.read, failed, prepared.counts.warned, prepared.counts.nulled)
    settled = prepared.counts.read - prepared.counts.superseded - prepared.counts.blocked - others
    # A share of whole histories counts no changes of its own.
    judged = max(settled, prepared.rows.num_rows + failed)
    return Tally(judged, failed, prepared.counts.warned, prepared.counts.nulled)


def _most_frequent(prepared: Prepared) -> str:
    """Say of what most records of a part are."""
    causes = pa.table(
        {name: prepared.records[name] for name in ("reason", "columns", "message")}
        | {"n": pa.repeat(1, prepared.records.num_rows)}
    )
    counted = causes.group_by(["reason", "columns", "message"]).aggregate([("n", "sum")])
    worst = counted.sort_by([("n_sum", "descending")]).slice(0, 1).to_pylist()[0]
    return f"most of them {worst['reason']}: {worst['message']}".rstrip(".")
