"""Rows that refer to others: what a destination does for those that wait for what they refer to."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import pyarrow as pa

    from headrace.decisions import Outcome
    from headrace.prepared import Prepared, Reference
    from headrace.protocols import Model


NOTHING_DECIDED: Mapping[str, Outcome] = MappingProxyType({})
NO_CONSTRAINTS: Mapping[str, Collection[str]] = MappingProxyType({})


class Key(NamedTuple):
    """A key that no two rows of a model have: its name, see `UniqueKey`, its columns, and their types in
    DuckDB's words."""

    model: str
    name: str
    columns: tuple[str, ...]
    types: tuple[str, ...]


class Due(NamedTuple):
    """References that were `put_off`, or never judged, and can be judged now; by model the source keys of
    records that might pass now, since what they refer to is there, or its own record is among them, or their
    key is free; how many records wait; and the foreign keys (model, name) that are known and no more."""

    put_off: Sequence[Reference]
    ready: Mapping[str, pa.Array]
    waiting: int
    lapsed: Sequence[tuple[str, str]] = ()


class Waits(Protocol):
    """The open records of a destination that wait for a row, or for a key to be free."""

    def refold(
        self,
        source: str,
        outcomes: Sequence[tuple[Model, Prepared]],
        references: Collection[Reference] = (),
        *,
        dry_run: bool = False,
        decided: Mapping[str, Outcome] = NOTHING_DECIDED,
    ) -> dict[str, int]:
        """Do for several models in one transaction what `Destination.redrive` does for one; at its end some
        `references` are judged though their rows may not have changed, over all rows where that was put off.
        `decided` says by model what of the outcome comes of decisions.
        """
        ...

    def due(
        self,
        source: str,
        references: Collection[Reference],
        keys: Collection[Key],
        limit: int,
        constraints: Mapping[str, Collection[str]] = NO_CONSTRAINTS,
    ) -> Due:
        """Return what can be done for references whose models are in sync, and for keys; see `Due`. At
        most some `limit` of source keys, if these do not need each other. `constraints` names by model all
        foreign and unique keys that it has: a record for another one waits for nothing any more."""
        ...

    def forget(self, source: str, foreign_keys: Sequence[tuple[str, str]]) -> None:
        """Forget foreign keys (model, name): one that comes again is judged over all rows."""
        ...

    def expire(
        self, source: str, references: Collection[Reference], after: Mapping[str, float]
    ) -> Sequence[str]:
        """Quarantine what has waited for longer than `after` says (seconds by model), or for a row whose
        record was discarded; return the ids of issues that are new. What waits for a row that is in
        quarantine itself becomes part of that one's issue, and goes on waiting."""
        ...
