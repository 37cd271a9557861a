"""The bound of the quarantine: at it no record is dropped, the models that would add more are suspended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from headrace.errors import QuarantineFull

if TYPE_CHECKING:
    from headrace.config import QuarantineConfig
    from headrace.prepared import Prepared

_FIXED = 512
"""Bytes of a record beside its texts, about."""

_SIZE = (
    f"SELECT count(*) AS records, coalesce(sum({_FIXED} + length(preview)), 0)::BIGINT AS bytes "
    "FROM headrace.quarantine WHERE status IN ('quarantined', 'waiting', 'blocked')"
)
"""The query whose row are the fields of `Size`."""


@dataclass(slots=True)
class Size:
    """How much is open: records, and bytes of them."""

    records: int = 0
    bytes: int = 0


class SizeLimit:
    """Knows how much is open, at most, without asking the destination of every slice.

    What later changes heal is not taken off; so where the limit seems to be reached it is counted once more.
    """

    def __init__(self, config: QuarantineConfig, read: Callable[[Sequence[str]], list[pa.Table]]) -> None:
        """`read` is the destination's."""
        self._config = config
        self._read = read
        self._known = Size()
        self._pending = Size()

    def count(self) -> None:
        """Take over how much is open now, outside of a transaction that adds to it."""
        (found,) = self._read([_SIZE])
        self._known = Size(**found.to_pylist()[0])

    def begin(self) -> None:
        """Forget what was admitted and not kept."""
        self._pending = Size()

    def admit(self, model: str, prepared: Prepared) -> None:
        """Add the records of a part. Raises QuarantineFull where they are too many."""
        records = prepared.records
        if not records.num_rows:
            return
        self._pending.records += records.num_rows
        self._pending.bytes += _FIXED * records.num_rows + (
            pc.sum(pc.utf8_length(records["preview"])).as_py() or 0
        )
        known = self._known
        if known.records + self._pending.records > self._config.max_records:
            what = f"{self._config.max_records:,} open records (max_records)"
        elif known.bytes + self._pending.bytes > self._config.max_bytes:
            what = f"{self._config.max_bytes:,} bytes of open records (max_bytes)"
        else:
            return
        raise QuarantineFull(
            model,
            f"The quarantine would hold more than {what}; the changes of {model} wait in staging.",
            f"Mend and redrive, or raise the limit in [quarantine], then run `headrace resume {model}`.",
        )

    def keep(self) -> None:
        """Take over what was admitted."""
        self._known.records += self._pending.records
        self._known.bytes += self._pending.bytes
        self._pending = Size()

    def has_room(self, error: BaseException) -> bool:
        """Whether an error says that the limit was reached, and it is not, now that it is counted again."""
        if not isinstance(error, QuarantineFull):
            return False
        before = self._known
        self.count()
        return before.records > self._known.records or before.bytes > self._known.bytes
