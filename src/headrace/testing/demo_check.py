"""What the demo's project is, and the plain SQL on both sides that proves what arrived.

A row becomes one md5 of its cells' text; the expressions are chosen so that Postgres and DuckDB give
the same text for the same value. Nothing of the pipeline takes part in the comparison.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from headrace.testing.shop import OPENING_BALANCE

if TYPE_CHECKING:
    import psycopg
    import pyarrow as pa

Read = Callable[[Sequence[str]], "list[pa.Table]"]
"""Runs queries on the destination."""

SETTINGS = """\
# The project of `headrace demo`.

[source.shop]
url = "{url}"
tables = ["public.*"]
heartbeat = "1s"

[destination]
type = "duckdb"
path = "warehouse.duckdb"
"""

MODEL = """\
/* headrace
key = ["order_id"]
[contract]
order_id = "BIGINT NOT NULL"
customer_id = "BIGINT NOT NULL"
amount = "DECIMAL(12,2) NOT NULL CHECK (amount >= 0)"
*/
-- Orders that were not returned. Customers type the discount themselves, as text: a row whose discount
-- is no number goes to the quarantine, and all others go on.
SELECT
  id::BIGINT AS order_id,
  customer_id::BIGINT AS customer_id,
  status AS status,
  amount::DECIMAL(12,2) AS amount,
  CAST(discount AS DECIMAL(5,2)) AS discount,
  due::DATE AS due,
  details::JSON AS details,
  ordered_at::TIMESTAMPTZ AS ordered_at
FROM raw.shop.orders
WHERE status <> 'returned'
"""

MENDED = MODEL.replace("CAST(discount", "TRY_CAST(discount").replace(
    "a row whose discount\n-- is no number goes to the quarantine, and all others go on.",
    "what is no number\n-- becomes null.",
)

MODEL_FILE = "sales.sql"
MODELS = 5
"""How many tables the destination gets: four mirrors and the model."""

HIGHEST = "SELECT max(order_id) FROM sales"
"""The question that a reader asks to see how fresh the destination is."""

_BANK = "SELECT sum(balance)::text AS total, count(*) AS accounts FROM "
_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class Comparison:
    """One destination table and what it must equal: a query on each side that gives `k`, the row's
    key, and `h`, the md5 of its cells."""

    table: str
    source: str
    destination: str


@dataclass(frozen=True, slots=True)
class Result:
    """What a comparison found. `lost` keys are missing in the destination, `duplicated` ones stand
    there too often or without a source row, `differing` ones have other cells."""

    comparison: Comparison
    source_rows: int
    destination_rows: int
    source_digest: str
    destination_digest: str
    lost: tuple[str, ...]
    duplicated: tuple[str, ...]
    differing: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether both sides agree in every row and cell."""
        same = self.source_digest == self.destination_digest and self.source_rows == self.destination_rows
        return same and not (self.lost or self.duplicated or self.differing)

    def faults(self) -> str:
        """Say what differs, with a few keys of each kind; '' if nothing does."""
        kinds = {"lost": self.lost, "duplicated": self.duplicated, "differing": self.differing}
        return "; ".join(
            f"{len(keys)} {kind}, such as {', '.join(keys[:_EXAMPLES])}"
            for kind, keys in kinds.items()
            if keys
        )


def comparisons() -> tuple[Comparison, ...]:
    """Return a comparison for each of the shop's mirrors, and for the mended model."""
    return (
        _mirror(
            "customers",
            "id::text",
            ["id", "email", "name", "city", "vip", "born", "preferences", "@created_at"],
        ),
        _mirror(
            "products",
            "sku",
            ["sku", "name", "description", "price", "[]tags", "attributes", "active", "@updated_at"],
        ),
        _mirror("order_items", "order_id || ':' || line", ["order_id", "line", "sku", "quantity", "price"]),
        _mirror("accounts", "id::text", ["id", "balance"]),
        _model(),
    )


def digest(rows: str) -> str:
    """Return the query that reduces all rows of a comparison's side to a count and one md5."""
    return f"SELECT count(*) AS rows, md5(string_agg(h, '' ORDER BY h)) AS digest FROM ({rows}) AS t"


def compare(source: psycopg.Connection[Any], read: Read) -> list[Result]:
    """Run every comparison and its digest on both sides."""
    results = []
    for comparison in comparisons():
        theirs = [(str(k), str(h)) for k, h in source.execute(comparison.source.encode())]
        count, seal = _one(source, digest(comparison.source))
        arrived, sealed = read([comparison.destination, digest(comparison.destination)])
        ours = list(zip(arrived["k"].to_pylist(), arrived["h"].to_pylist(), strict=True))
        found = sealed.to_pylist()[0]
        results.append(
            Result(
                comparison,
                int(count),
                found["rows"],
                str(seal),
                str(found["digest"]),
                *_differences(theirs, ours),
            )
        )
    return results


def bank_queries() -> tuple[str, str]:
    """Return the queries for the sum over all accounts, at the source and in the destination."""
    return f"{_BANK}accounts", f"{_BANK}shop.accounts"


def bank(source: psycopg.Connection[Any], read: Read) -> tuple[str, str, str]:
    """Return the sum over all accounts at the source, in the destination, and as it must be: every
    transfer takes from one account what it gives to another."""
    there, here = bank_queries()
    total, accounts = _one(source, there)
    arrived = read([here])[0].to_pylist()[0]["total"]
    return str(total), str(arrived), str(OPENING_BALANCE * Decimal(int(accounts)))


def _differences(
    theirs: Sequence[tuple[str, str]], ours: Sequence[tuple[str, str]]
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    source, destination = dict(theirs), dict(ours)
    times = Counter(key for key, _ in ours)
    lost = sorted(source.keys() - destination.keys())
    doubled = sorted(key for key, n in times.items() if n > 1 or key not in source)
    differing = sorted(key for key, seal in ours if source.get(key, seal) != seal)
    return tuple(lost), tuple(doubled), tuple(differing)


def _one(source: psycopg.Connection[Any], query: str) -> Sequence[Any]:
    row = source.execute(query.encode()).fetchone()
    assert row is not None, query
    return tuple(row)


def _mirror(table: str, key: str, columns: Sequence[str]) -> Comparison:
    """Compare a mirror; `@` marks a timestamp, `[]` an array of text."""
    there = ", ".join(_cell(column, postgres=True) for column in columns)
    here = ", ".join(_cell(column, postgres=False) for column in columns)
    return Comparison(
        f"shop.{table}",
        f"SELECT {key} AS k, md5(concat_ws('|', {there})) AS h FROM {table}",
        f"SELECT {key} AS k, md5(concat_ws('|', {here})) AS h FROM shop.{table}",
    )


def _model() -> Comparison:
    """Compare the mended model: the same filter and the same reading of discounts, in Postgres."""
    discount = "coalesce(CASE WHEN discount ~ '^[0-9]+[.][0-9]+$' THEN discount::numeric(5,2)::text END, '∅')"
    before, after = ["customer_id", "status", "amount"], ["due", "details", "@ordered_at"]
    there = [_cell(c, postgres=True) for c in ("id", *before)]
    there += [discount, *(_cell(c, postgres=True) for c in after)]
    here = [_cell(c, postgres=False) for c in ("order_id", *before, "discount", *after)]
    return Comparison(
        "sales",
        f"SELECT id::text AS k, md5(concat_ws('|', {', '.join(there)})) AS h FROM orders "
        "WHERE status <> 'returned'",
        f"SELECT order_id::text AS k, md5(concat_ws('|', {', '.join(here)})) AS h FROM sales",
    )


def _cell(column: str, *, postgres: bool) -> str:
    """Write a column as text that is the same on both sides; ∅ stands for null."""
    name = column.lstrip("@[]")
    if column.startswith("@"):
        text = f"(extract(epoch FROM {name}) * 1000000)::bigint" if postgres else f"epoch_us({name})"
    elif column.startswith("[]") and postgres:
        text = f"array_to_string({name}, '~', '∅')"
    elif column.startswith("[]"):
        text = f"array_to_string(list_transform({name}, lambda t: coalesce(t, '∅')), '~')"
    else:
        text = name
    return f"coalesce({text}::text, '∅')"
