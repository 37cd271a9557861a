"""Conservation: of each model every change that was read is accounted for, and what is open is there.

The ledger, a table of the destination, says of each slice where its changes went. Here it is held against
itself, against the open records, and against what log and staging hold.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from headrace.alarms import resolve, trigger
from headrace.change import Offset, TableId
from headrace.destinations.tables import OPEN
from headrace.keys import literal
from headrace.lane import Lane
from headrace.protocols import LogIndex, Staging

if TYPE_CHECKING:
    import pyarrow as pa

EVERY = 60.0
"""Seconds between two looks of a running pipeline."""

_PARTS = "applied + superseded + filtered + quarantined + waiting + blocked"


class Account(NamedTuple):
    """Whether a model's ledger closes, what there is to say of it, and how many rows it has."""

    closes: bool
    detail: str
    rows: int = 0


def ledger_of(source: str) -> str:
    """Return the query of a source's ledger, without what is void."""
    return (
        f'SELECT model, kind, "after", "through", read, quarantined, waiting, blocked, {_PARTS} AS parts '
        f"FROM headrace.ledger WHERE source = {literal(source)} AND kind <> 'void'"
    )


def summary_of(source: str) -> str:
    """Return the query of what of a source's ledger can be told without log and staging, a row per model
    that does not close: `model`, `broken` (rows), `said` and `found` (open records)."""
    mine = f"source = {literal(source)}"
    return (
        f"SELECT l.model, l.broken, l.said, coalesce(q.found, 0) AS found FROM ("
        f"SELECT model, count(*) FILTER (WHERE coalesce(read, 0) <> {_PARTS}) AS broken, "
        "sum(quarantined + waiting)::BIGINT AS said FROM headrace.ledger "
        f"WHERE {mine} AND kind <> 'void' GROUP BY model) l "
        f"LEFT JOIN (SELECT model, count(*) AS found FROM headrace.quarantine WHERE {mine} AND {OPEN} "
        "GROUP BY model) q ON q.model = l.model WHERE l.broken > 0 OR l.said <> coalesce(q.found, 0)"
    )


class LedgerWatch:
    """Looks at the ledgers of a running pipeline, and alerts once of each that does not close."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = lanes
        self._told: set[str] = set()

    def step(self) -> None:
        """Look once. Raises what the destination raises."""
        open_ = dict[str, tuple[str, str]]()
        for lane in self._lanes:
            source = lane.config.name
            (found,) = lane.destination.read([summary_of(source)])
            for row in found.to_pylist():
                what = (
                    f"{row['broken']} rows do not close"
                    if row["broken"]
                    else f"it says {row['said']} open records, there are {row['found']}"
                )
                open_[row["model"]] = (source, what)
        for model in open_.keys() - self._told:
            source, what = open_[model]
            words = (
                "LEDGER of model %s does not close: %s. Run `headrace ledger check` and `headrace verify`."
            )
            trigger("ledger", model, words, model, what, source=source, model=model)
        for model in self._told - open_.keys():
            resolve("ledger", model, "The ledger of model %s closes again.", model, model=model)
        self._told = set(open_)


def queries_of(source: str) -> list[str]:
    """Return the queries whose results `accounts` is to have, of one read transaction."""
    mine = f"source = {literal(source)}"
    return [
        f"SELECT model, \"offset\" FROM headrace.models WHERE {mine} AND state <> 'retired' ORDER BY model",
        f"SELECT model, status, blocked FROM headrace.quarantine WHERE {mine} AND {OPEN}",
        ledger_of(source),
    ]


def accounts(lane: Lane, results: Sequence[pa.Table]) -> Iterator[tuple[str, Account]]:
    """Yield each model of a source, but retired ones, with its account.

    The lane is opened behind the read transaction of the results: log and staging are as far, or further.
    """
    stands, records, ledger = (table.to_pylist() for table in results)
    tables = {model.name: model.table for model in lane.models()}
    for stand in stands:
        name = stand["model"]
        own = [row for row in ledger if row["model"] == name]
        mine = [row for row in records if row["model"] == name]
        if name not in tables or not stand["offset"]:
            yield name, _sums(own, mine) or Account(True, "its rows close", len(own))
            continue
        account = check_ledger(lane.log, tables[name], stand["offset"], own, mine)
        if account.closes:
            account = _check_staging(lane.log, lane.staging, tables[name], stand["offset"]) or account
        yield name, account


def check_ledger(
    log: LogIndex, table: TableId, offset: Offset, rows: Sequence[dict[str, Any]], records: Sequence[Any]
) -> Account:
    """Hold a model's ledger, through an offset, against what the log holds of its table, and against its open
    records (`status`, and `blocked` changes behind it)."""
    if fault := _sums(rows, records):
        return fault
    held = [
        (item.offset, item.entry.kind, item.entry.rows)
        for item in log.headers(0, log.end().offset)
        if item.entry.table == table
    ]
    # After what is held: of that, what lies behind the beginning was not trimmed while it was read.
    begin = log.begin().offset
    streamed = [(at, count) for at, kind, count in held if kind in ("rows", "truncate", "undecodable")]
    copied = [(at, count) for at, kind, count in held if kind == "copy"]
    for kind, entries in (("copy", copied), ("apply", streamed)):
        spans = [(row["after"], row["through"], row["read"]) for row in rows if row["kind"] == kind]
        spans = [span for span in spans if span[0] >= begin]  # what retention has deleted cannot be counted
        if wrong := _wrong_span(entries, spans):
            return Account(False, f"({wrong[0]}, {wrong[1]}] has not read what the log holds there")
    applied = [
        (row["after"], row["read"]) for row in rows if row["kind"] == "apply" and row["after"] >= begin
    ]
    since = min((after for after, _ in applied), default=offset if begin else 0)
    due = sum(count for at, count in streamed if since < at <= offset)
    if due != sum(read for _, read in applied):
        return Account(False, f"does not account for all of {due} changes", len(rows))
    return Account(True, f"closes over {sum(row['read'] for row in rows)} changes", len(rows))


def _sums(rows: Sequence[dict[str, Any]], records: Sequence[Any]) -> Account | None:
    """Return what is wrong with a ledger by itself, and beside the open records; None if nothing is."""
    broken = sum((row["read"] or 0) != row["parts"] for row in rows)
    if broken:
        return Account(False, f"{broken} rows do not close", len(rows))
    waiting = sum(record["status"] == "waiting" for record in records)
    for name, there in (("quarantined", len(records) - waiting), ("waiting", waiting)):
        if (said := sum(row[name] for row in rows)) != there:
            return Account(False, f"says {said} {name} records, there are {there}", len(rows))
    blocked, behind = (sum(row["blocked"] or 0 for row in each) for each in (rows, records))
    if blocked != behind:
        words = f"says that {blocked} changes wait behind them, the records say {behind}"
        return Account(False, words, len(rows))
    return None


def _check_staging(log: LogIndex, staging: Staging, table: TableId, offset: Offset) -> Account | None:
    """Return what is wrong if staging does not hold what the log does of a table, through an offset."""
    kinds = ("rows", "truncate", "copy", "undecodable")
    held = [
        (item.offset, item.entry.rows)
        for item in log.headers(0, offset)
        if item.entry.table == table and item.entry.kind in kinds
    ]
    begin = log.begin().offset
    logged = sum(rows for at, rows in held if at > begin)
    staged = staging.count(table, begin, offset)
    if logged == staged:
        return None
    return Account(False, f"staging holds {staged} changes and copied rows of {table}, the log {logged}")


def _wrong_span(
    entries: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int, int]]
) -> tuple[int, int, int] | None:
    """Return the first span (after, through, read) that overlaps another, or read something else than the
    entries (offset, rows) in it."""
    offsets = [offset for offset, _ in entries]
    sums = [0, *accumulate(rows for _, rows in entries)]
    reached = 0
    for after, through, figure in sorted(spans):
        held = sums[bisect_right(offsets, through)] - sums[bisect_right(offsets, after)]
        if after < reached or figure != held:
            return after, through, figure
        reached = through
    return None
