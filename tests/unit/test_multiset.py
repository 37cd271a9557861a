"""Tables without a key: the destination holds the source's rows as often as the source does.

The rules are said once more below in plain Python (`interpret`), change by change.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headrace.change import Column, Mark, Position, TableId, TableSchema
from headrace.destinations.duckdb import DuckDBDestination
from headrace.errors import ModelBroken, ModelError
from headrace.payload import BEFORE, UNCHANGED
from headrace.protocols import Part, Slice
from headrace.transform.model import RowModel, bind, mirror
from headrace.transform.sql import read_model

LOG = "l" * 32
SCHEMA = TableSchema(TableId("public", "t"), (Column("a", "text"), Column("v", "text")), ())
MODEL = "SELECT a, v::INTEGER AS v FROM raw.shop.t WHERE a <> 'skip' OR a IS NULL"

Row = tuple[str | None, str | None]


@dataclass(frozen=True)
class Event:
    """`new` for an insert or update, `old` for a delete or update."""

    op: str
    new: Row = (None, None)
    old: Row = (None, None)


def interpret(events: Sequence[Event]) -> tuple[Counter[Row], set[int]]:
    """The rows of the source, and the numbers of the open bad changes, after all of `events`."""
    stacks: dict[Row, list[int]] = {}
    for n, event in enumerate(events):
        if event.op == "t":
            stacks.clear()
        if event.op in "du":
            stacks[event.old].pop()
        if event.op in "cru":
            stacks.setdefault(event.new, []).append(n)
    rows = Counter({row: len(stack) for row, stack in stacks.items() if stack})
    return rows, {n for row, stack in stacks.items() if fate(row) == "bad" for n in stack}


def fate(row: Row) -> str:
    return "filtered" if row[0] == "skip" else "bad" if row[1] == "x" else "good"


def changes(events: Sequence[Event], first: int = 1) -> pa.Table:
    """Events as staging gives them; each stands at a commit and an offset of its own."""
    n = len(events)
    numbers = pa.array(range(first, first + n), pa.int64())
    rows = [event.old if event.op == "d" else event.new for event in events]
    before = [[("a", e.old[0]), ("v", e.old[1])] if e.op == "u" else None for e in events]
    zeros = pa.array([0] * n, pa.int64())
    return pa.table(
        {
            "a": pa.array([row[0] for row in rows], pa.string()),
            "v": pa.array([row[1] for row in rows], pa.string()),
            "_op": pa.array([e.op for e in events], pa.string()),
            "_epoch": zeros,
            "_commit": numbers,
            "_ordinal": pa.array([1] * n, pa.int64()),
            "_offset": numbers,
            "_committed_at": zeros,
            "_txid": zeros,
            "_unchanged": pa.nulls(n, UNCHANGED),
            "_before": pa.array(before, BEFORE),
        }
    )


@pytest.fixture(scope="module")
def destination(tmp_path_factory: pytest.TempPathFactory) -> DuckDBDestination:
    return DuckDBDestination(tmp_path_factory.mktemp("multiset") / "warehouse.duckdb")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RowModel:
    return bound(tmp_path_factory.mktemp("model"), MODEL)


def bound(folder: Path, text: str) -> RowModel:
    (folder / "t.sql").write_text(text)
    return bind(read_model(folder / "t.sql"), SCHEMA)


rows_ = st.tuples(
    st.sampled_from(["a", "null", None, 'q",null]', "skip"]), st.sampled_from(["1", "2", "x", None])
)


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Event], list[int]]:
    """A history that a source can have: only rows that are there are deleted or updated."""
    there: list[Row] = []
    events: list[Event] = []
    for op in draw(st.lists(st.sampled_from("crrcuudduut"), min_size=1, max_size=24)):
        new = draw(rows_)
        if op == "t":
            there.clear()
        elif op in "du" and not there:
            continue
        old = there.pop(draw(st.integers(0, len(there) - 1))) if op in "du" else (None, None)
        if op in "cru":
            there.append(new)
        events.append(Event(op, new, old))
    events = events or [Event("c", ("a", "1"))]
    cuts = draw(st.sets(st.integers(1, len(events)), max_size=5))
    return events, sorted(cuts | {len(events)})


_serial = itertools.count()


def apply_slices(
    destination: DuckDBDestination, model: RowModel, events: Sequence[Event], cuts: Sequence[int]
) -> RowModel:
    """Apply events in slices that end at `cuts`, and check the books after each."""
    n = next(_serial)
    model = replace(model, name=f"t{n}", source=f"s{n}")
    after = 0
    for through in cuts:
        prepared = model.prepare(changes(events[after:through], after + 1))
        assert prepared.counts.closes(), prepared.counts
        assert min(getattr(prepared.counts, name) for name in prepared.counts.__slots__) >= 0
        assert prepared.counts.read == through - after
        marks = Mark(LOG, after, str(after)), Mark(LOG, through, str(through))
        at = Position(0, through, 1)
        destination.apply(Slice(model.source, *marks, at, 0, (Part(model, prepared, True),)))
        after = through
    return model


def found(destination: DuckDBDestination, model: RowModel) -> tuple[Counter[Row], set[int]]:
    table, records, sums = destination.read(
        [
            f"SELECT a, v::VARCHAR AS v FROM {model.name} WHERE _source = '{model.source}'",
            f"SELECT commit FROM headrace.quarantine WHERE model = '{model.name}' AND status = 'quarantined'",
            "SELECT sum(read)::BIGINT AS read, sum(applied + superseded + filtered + quarantined)::BIGINT AS "
            f"parts, sum(quarantined)::BIGINT AS n FROM headrace.ledger WHERE model = '{model.name}'",
        ]
    )
    (books,) = sums.to_pylist()
    assert books["read"] == books["parts"]
    assert books["n"] == records.num_rows
    rows = Counter(zip(table["a"].to_pylist(), table["v"].to_pylist(), strict=True))
    return rows, {commit - 1 for commit in records["commit"].to_pylist()}


SAME, BAD = ("a", "1"), ("a", "x")


@settings(max_examples=max(settings().max_examples // 2, 6))
@given(drawn=histories())
@example(drawn=([Event("c", SAME), Event("c", SAME), Event("d", old=SAME)], [1, 2, 3]))
@example(drawn=([Event("c", SAME), Event("u", SAME, SAME), Event("u", BAD, SAME)], [1, 3]))
@example(drawn=([Event("c", BAD), Event("c", BAD), Event("d", old=BAD), Event("c", BAD)], [1, 2, 4]))
@example(drawn=([Event("c", SAME), Event("t"), Event("c", SAME), Event("c", SAME)], [1, 3, 4]))
def test_any_cut_into_slices_gives_the_rows_of_the_source(
    drawn: tuple[list[Event], list[int]], model: RowModel, destination: DuckDBDestination
) -> None:
    events, cuts = drawn
    rows, open_ = interpret(events)
    good = Counter({row: count for row, count in rows.items() if fate(row) == "good"})
    assert found(destination, apply_slices(destination, model, events, cuts)) == (good, open_)


@settings(max_examples=15)
@given(drawn=histories())
def test_the_whole_history_folds_to_the_same_rows(
    drawn: tuple[list[Event], list[int]], model: RowModel
) -> None:
    events, _ = drawn
    rows, open_ = interpret(events)
    made = model.prepare(changes(events))
    good = {row: count for row, count in rows.items() if fate(row) == "good"}
    assert Counter((r["a"], r["v"] and str(r["v"])) for r in made.rows.to_pylist()) == good
    assert {commit - 1 for commit in made.records["commit"].to_pylist()} == open_
    assert made.fewer is not None
    assert made.fewer.num_rows == 0


def test_a_redrive_sets_as_many_rows_as_the_history_came_to(
    model: RowModel, destination: DuckDBDestination, tmp_path: Path
) -> None:
    events = [Event("c", BAD), Event("c", SAME), Event("c", BAD), Event("c", BAD), Event("d", old=BAD)]
    before = apply_slices(destination, model, events, [2, 5])
    assert found(destination, before) == (Counter({SAME: 1}), {0, 2})
    mended = bound(tmp_path, "SELECT a, TRY_CAST(v AS INTEGER) AS v FROM raw.shop.t")
    mended = replace(mended, name=before.name, source=before.source)
    whole = mended.prepare(changes(events))
    keys = pa.array(['["a","x"]'])
    rows = whole.rows.filter(pa.compute.is_in(whole.rows["_source_key"], value_set=keys))
    for resolved in (2, 0):
        outcome = destination.redrive(mended, replace(whole, removed=keys, rows=rows))
        assert outcome == {"resolved": resolved, "still_quarantined": 0}
        assert found(destination, before) == (Counter({SAME: 1, ("a", None): 2}), set())


def test_a_delete_takes_an_open_record_before_a_good_row(
    model: RowModel, destination: DuckDBDestination
) -> None:
    """Where a model was changed between two inserts of the same row, one of them may be open."""
    made = apply_slices(destination, model, [Event("c", BAD)], [1])
    lenient = replace(made, outputs=(made.outputs[0], ("v", "TRY_CAST(v AS INTEGER)", "INTEGER")))
    for n, event in ((2, Event("c", BAD)), (3, Event("d", old=BAD)), (4, Event("d", old=BAD))):
        marks = Mark(LOG, n - 1, str(n - 1)), Mark(LOG, n, str(n))
        prepared = lenient.prepare(changes([event], n))
        destination.apply(Slice(made.source, *marks, Position(0, n, 1), 0, (Part(lenient, prepared, True),)))
        rows, open_ = found(destination, made)
        assert (rows.total(), len(open_)) == {2: (1, 1), 3: (1, 0), 4: (0, 0)}[n]


def test_a_column_that_is_null_everywhere_changes_no_key() -> None:
    wider = replace(SCHEMA, columns=(*SCHEMA.columns, Column("more", "text")))
    events = changes([Event("c", ("a", None)), Event("c", (None, None)), Event("c", ("a", "1"))])
    more = events.append_column("more", pa.nulls(3, pa.string()))
    keys = [
        mirror("shop", shape).prepare(table).rows["_source_key"].to_pylist()
        for shape, table in ((SCHEMA, events), (wider, more))
    ]
    assert keys[0] == keys[1] == ['["a"]', "[null]", '["a","1"]']


def test_models_that_tell_equal_rows_apart_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelBroken, match="_committed_at"):
        bound(tmp_path, "SELECT a, _committed_at AS at FROM raw.shop.t")
    with pytest.raises(ModelError, match="its table has none"):
        bound(tmp_path, '/* headrace\nkey = ["a"]\n*/\nSELECT a FROM raw.shop.t')
