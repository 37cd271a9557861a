"""What the file of a Python model says: the function that makes its rows, marked with `headrace.model`.

    @headrace.model(reads="raw.shop.orders", key=["order_id"])
    def orders(row: headrace.Row) -> Order | None: ...

A model's file is run in a process of its own, and imports nothing of Headrace but this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])
_MARK = "__headrace_model__"


class UnknownColumn(KeyError):
    """A model asked its row for a column that the raw table does not have."""

    def __str__(self) -> str:
        return str(self.args[0])


class Row(dict[str, Any]):
    """A change of the raw table, as a model of single rows takes it in.

    Cells are the source's own text or None, by column. Beside them stand `_op`, `_epoch`, `_commit`,
    `_ordinal`, `_offset`, `_txid` and `_committed_at` (a datetime in UTC), where the table has a key.
    Raises UnknownColumn for a name that is none of these, which suspends the model. In a test, make one of a
    dict: `Row({"id": "1", "amount": None})`.
    """

    __slots__ = ("_beside",)

    _beside: Callable[[str], Any]
    """Looks up what is rarely asked for, so that it is not made for every row; raises KeyError."""

    def __missing__(self, name: str) -> Any:
        if (beside := getattr(self, "_beside", None)) is not None and name.startswith("_"):
            try:
                return beside(name)
            except KeyError:
                pass
        near = get_close_matches(name, self, 1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(self)}"
        raise UnknownColumn(f"the raw table has no column {name} ({hint})")


@dataclass(frozen=True, slots=True)
class Contract:
    """A rule of an output column, see `contract`."""

    rule: str


def contract(rule: str) -> Contract:
    """Say what an output column is, as the contract of a SQL model does, inside of `Annotated`.

    `amount: Annotated[Decimal, headrace.contract("DECIMAL(12,2) CHECK (amount >= 0)")]`: DuckDB's type, which
    may be left out where Python's says enough, then NOT NULL and any number of CHECKs.
    """
    return Contract(rule)


@dataclass(frozen=True, slots=True)
class Definition:
    """What `model` was given."""

    reads: str
    key: tuple[str, ...]
    contract: Mapping[str, str] | type
    memory: str
    timeout: str
    settings: Mapping[str, object]
    """What the header of a SQL model would have besides, of what was given."""


def model(
    *,
    reads: str,
    key: Sequence[str] = (),
    contract: Mapping[str, str] | type | None = None,
    memory: str = "512MiB",
    timeout: str = "10s",
    materialize: str | None = None,
    delete: str | None = None,
    max_error_rate: float | None = None,
    on_violation: str | None = None,
    pii: Sequence[str] | None = None,
    foreign_key: Sequence[Mapping[str, object]] | None = None,
    orphan_after: str | None = None,
    constraints: str | None = None,
    freshness: str | None = None,
    severity: str | None = None,
    owner: str | None = None,
    route: Sequence[str] | None = None,
) -> Callable[[_Function], _Function]:
    """Mark the function that makes a model's rows; it is returned as it is, and can be called in a test.

    Parameters
    ----------
    reads
        The raw table, written out: `"raw.shop.orders"`.
    key
        Output columns that hold the key of that table, one for each of its columns and in their order.
    contract
        Rules by output column, added to those that the output's class gives. For a function of batches the
        class itself, or rules that give every column its type.
    memory
        What the model may take beyond its imports.
    timeout
        How long one row may take, or one batch; the file's import may take six times as long.
    materialize
        `"latest"`, `"append"` or `"history"`, as in the header of a SQL model.
    delete
        `"hard"` or `"soft"`, as there.
    max_error_rate
        Which share of the newest changes may fail before the model is suspended; 1 for any.
    on_violation
        What becomes of a row that violates a rule which has no ON VIOLATION of its own: `"quarantine"`,
        `"warn"`, `"null"` or `"suspend"`.
    pii
        Output columns whose values are shown nowhere beside the table.
    foreign_key, orphan_after
        What the rows refer to, `[{"columns": ["customer_id"], "references": "customers"}]`, and how long a
        row may wait for that before it is an error.
    constraints
        `"source"` to hold the rows to the source's own constraints, too: an output stands for the column
        of its name, and those of the key for the table's.
    freshness, severity, owner, route
        Of its alerts, as there.
    """
    given: dict[str, object] = {
        "materialize": materialize, "delete": delete, "max_error_rate": max_error_rate,
        "on_violation": on_violation, "pii": pii, "foreign_key": foreign_key, "orphan_after": orphan_after,
        "constraints": constraints, "freshness": freshness, "severity": severity, "owner": owner,
        "route": route,
    }  # fmt: skip
    settings = {name: value for name, value in given.items() if value is not None}
    rules = {} if contract is None else contract

    def mark(function: _Function) -> _Function:
        setattr(function, _MARK, Definition(reads, tuple(key), rules, memory, timeout, settings))
        return function

    return mark


def definition_of(function: object) -> Definition | None:
    """Return what a function was marked with, None if it was not."""
    found = getattr(function, _MARK, None)
    return found if isinstance(found, Definition) else None
