"""Marts: what is computed from tables of the destination, and what a destination does for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from headrace.channels import DEFAULT, AlertSettings

Kind = Literal["view", "table"]


@dataclass(frozen=True, slots=True)
class Mart:
    """A mart's file, taken apart.

    `query` is one SELECT in the engine's own SQL, which runs verbatim; `reads` are the tables that it names,
    `orders` or `shop.orders`; a table is made again at most every `refresh_every` seconds.
    """

    name: str
    query: str
    reads: tuple[str, ...]
    kind: Kind
    refresh_every: float
    version: str
    alerts: AlertSettings = DEFAULT


@dataclass(frozen=True, slots=True)
class MartState:
    """How a mart stands: `ok`, `suspended` with its reason, or `retired`.

    Where `incomplete`, `missing` says why: an input, direct or through other marts, is out of sync or has
    open records. `positions` is a JSON object, by source, of what a table was computed from (offset, commit,
    committed_at); it is empty for a view, which is always as its inputs are. `rows` are those of a table,
    `seconds` what it took to make it; `made` whether what is there of it in the destination is its own.
    `inputs` is a JSON object of how often each input had changed by then.
    """

    name: str
    version: str
    kind: Kind
    state: str
    reason: str
    incomplete: bool
    missing: str
    positions: str
    rows: int
    seconds: float
    made: bool
    inputs: str = "{}"


class Marts(Protocol):
    """The marts of a destination."""

    def all(self) -> dict[str, MartState]:
        """Return how each mart stands."""
        ...

    def look(self) -> tuple[dict[str, str], dict[str, int]]:
        """Return what each model lacks, "" for nothing, and how often each model and mart has changed."""
        ...

    def make(self, mart: Mart, former: MartState | None, inputs: Sequence[str]) -> MartState:
        """Make or refresh a mart, in one transaction with what is said of it.

        What the engine has against it makes it `suspended`, and leaves what there was of it. Other errors
        are raised.
        """
        ...

    def save(self, state: MartState) -> None:
        """Write how a mart stands."""
        ...
