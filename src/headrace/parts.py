"""Parts: pieces of prepare that may be done anywhere, twice, or be thrown away.

A part is all that determines its outcome, and is named by a digest of that: who is asked twice is asked for
the same. What comes of parts is applied in the order in which they were cut.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Mapping, Set
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

from headrace.change import Copy, Offset
from headrace.prepared import Prepared
from headrace.protocols import Model

PartKind = Literal["slice", "copy", "beyond copy", "newest", "older copy", "older", "keys"]
"""What is prepared of a table's changes and copied rows in `(after, through]`:

- `slice`: the streamed changes.      - `copy`: the rows of a copy.
- `beyond copy`: the streamed changes that a copy does not contain.
- `newest`: those that are `chosen`, each the newest of its key.
- `older copy`: the `chosen` ones, all copied rows.
- `older`: the `chosen` ones, all streamed changes, which the copy does not contain.

Of `keys` it is all of history through the copy's end, of the share of the keys with the number `after`.
"""

BESIDE: Mapping[str, bool] = {"determines": False}
"""Metadata of a dataclass's field that determines nothing of what is prepared."""


@runtime_checkable
class Identified(Protocol):
    """What is no plain value, but is made of such."""

    @property
    def identity(self) -> object:
        """All that determines what it does."""
        ...


@dataclass(frozen=True, slots=True)
class Staged:
    """Raw tables: those of a source as one log tells them, in the folder `root`."""

    source: str
    log_id: str
    root: str


@dataclass(frozen=True, slots=True)
class Shares:
    """How the history of a table that was copied more than once is parted by its keys."""

    count: int
    began: tuple[int, ...]
    """When each of the copies began, the oldest first, in microseconds."""


@dataclass(frozen=True)
class PartSpec:
    """One part. A value; everything in it can be sent to another process."""

    kind: PartKind
    staged: Staged
    model: Model
    """With what is refused and decided of its changes."""
    model_id: str
    """`fingerprint` of the model."""
    after: Offset
    through: Offset
    newest: Offset
    """From where raw is read back for cells that the source did not send."""
    epoch: str
    """The run of the pipeline that asks: nobody else's parts are done, or taken."""
    rows: int
    """How many rows it is about, more or less."""
    copy: Copy | None = None
    """The copy that the model's table stands on, where that counts."""
    chosen: bytes | None = None
    """A bit for each row in `(after, through]`, the first in the lowest: whether it is of the part."""
    stretch: tuple[int, int] | None = None
    """Which one, from 0 on, of how many equal stretches of the rows in question; None for all of them."""
    shares: Shares | None = None

    @cached_property
    def id(self) -> str:
        """A digest of what determines the outcome: not of where the tables lie, nor of who asks."""
        return fingerprint(
            (
                self.kind,
                self.staged.source,
                self.staged.log_id,
                self.model_id,
                self.after,
                self.through,
                self.newest,
                self.copy,
                self.chosen,
                self.stretch,
                self.shares,
            )
        )


def rows_of(part: PartSpec, prepared: Prepared) -> int:
    """Return how many rows were prepared for an outcome. That of a share counts none for the ledger."""
    return part.rows if part.kind == "keys" else prepared.counts.read


def fingerprint(value: object) -> str:
    """Return a digest of a value: plain ones, dataclasses, and what is `Identified`, in any nesting.

    It is the same in every process. Raises TypeError for anything else, lest two that differ have one.
    """
    digest = hashlib.blake2b(digest_size=16)
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: object) -> None:
    if isinstance(value, bytes):
        _begin(digest, "bytes", len(value))
        digest.update(value)
    elif value is None or (isinstance(value, str | int | float) and not isinstance(value, enum.Enum)):
        text = repr(value).encode(errors="surrogatepass")
        _begin(digest, type(value).__name__, len(text))
        digest.update(text)
    elif is_dataclass(value) and not isinstance(value, type):
        told = [field.name for field in fields(value) if field.metadata.get("determines", True)]
        _begin(digest, type(value).__qualname__, len(told))
        for name in told:
            _feed(digest, name)
            _feed(digest, getattr(value, name))
    elif isinstance(value, Mapping):
        _unordered(digest, "mapping", list(value.items()))
    elif isinstance(value, Set):
        _unordered(digest, "set", list(value))
    elif isinstance(value, tuple | list):
        _begin(digest, "sequence", len(value))
        for each in value:
            _feed(digest, each)
    elif isinstance(value, Identified):
        _begin(digest, type(value).__qualname__, 1)
        _feed(digest, value.identity)
    else:
        raise TypeError(f"{type(value).__qualname__} has no fingerprint")


def _begin(digest: Any, what: str, size: int) -> None:
    digest.update(f"{what}:{size}:".encode())


def _unordered(digest: Any, what: str, values: list[Any]) -> None:
    _begin(digest, what, len(values))
    for each in sorted(map(fingerprint, values)):
        digest.update(each.encode())
