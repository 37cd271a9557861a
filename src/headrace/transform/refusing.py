"""Changes that are bad since their rows would have the key of another, or refer to none, among those that are
prepared now."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import duckdb
import pyarrow as pa

from headrace.keys import literal, quoted
from headrace.prepared import Refused

_PLACE = ("epoch", "commit", "ordinal")
_REFUSED = pa.schema(
    [
        *((name, pa.int64()) for name in _PLACE),
        ("name", pa.string()),
        ("since", pa.struct([(name, pa.int64()) for name in _PLACE])),
    ]
)
NONE_REFUSED = pa.schema(
    [("n", pa.int64()), *(_REFUSED.field(name) for name in ("name", "since"))]
).empty_table()
"""Refused changes by their number `n`; `name` and `since` see `Refused`."""


def refused_of(db: duckdb.DuckDBPyConnection, refused: Collection[Refused], events: pa.Table) -> pa.Table:
    """Return those of some events that are refused, with the columns of `NONE_REFUSED`."""
    rows = (
        each._asdict() | {"since": each.since and dict(zip(_PLACE, each.since, strict=True))}
        for each in refused
    )
    db.register("placed", events.select(["_hr_n", "_epoch", "_commit", "_ordinal"]))
    db.register("refused", pa.Table.from_pylist(list(rows), schema=_REFUSED))
    return db.sql(
        "SELECT p._hr_n AS n, r.name, r.since FROM placed p JOIN refused r "
        "ON (r.epoch, r.commit, r.ordinal) = (p._epoch, p._commit, p._ordinal)"
    ).to_arrow_table()


def with_alike(
    db: duckdb.DuckDBPyConnection,
    refused: pa.Table,
    judged: pa.Table,
    keys: Iterable[tuple[str | None, Sequence[str]]],
) -> pa.Table:
    """Add to what is refused the earlier changes of its row that say the same of the columns of its key: the
    row would fall back to each of them in turn, and with each all would be prepared once more.

    `judged` are the outputs of the events that `refused_of` was given.
    """
    db.register("judged", judged)
    for name, columns in keys:
        same = " AND ".join(f"e.{quoted(column)} = j.{quoted(column)}" for column in columns)
        wanted = "NULL" if name is None else literal(name)
        db.register("lacks", refused)
        alike = db.sql(
            f"""SELECT DISTINCT ON (e._hr_n) e._hr_n AS n, l.name, l.since
            FROM lacks l JOIN judged j ON j._hr_n = l.n
            JOIN judged e ON e._hr_k = j._hr_k AND e._hr_n < j._hr_n AND {same}
            JOIN placed p ON p._hr_n = e._hr_n
            WHERE l.name IS NOT DISTINCT FROM {wanted} AND l.since IS NOT NULL
            AND (p._epoch, p._commit, p._ordinal) > (l.since.epoch, l.since.commit, l.since.ordinal)
            AND e._hr_n NOT IN (SELECT n FROM lacks)"""
        ).to_arrow_table()
        refused = pa.concat_tables([refused, alike.cast(refused.schema)])
    return refused
