"""The fold: one outcome per source key, however the changes are cut into slices.

What the rules mean is said once more below, change by change, in plain Python (`interpret`); fold and
destination together must come to the same.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headrace.change import Column, Mark, Position, TableId, TableSchema
from headrace.destinations.duckdb import DuckDBDestination
from headrace.payload import BEFORE, UNCHANGED
from headrace.prepared import Prepared
from headrace.protocols import Part, Slice
from headrace.transform.model import RowModel, bind, mirror
from headrace.transform.sql import read_model

TABLE = TableId("public", "t")
LOG = "l" * 32
COLUMNS = (Column("a", "bigint"), Column("b", "text"), Column("v", "text"))
ONE = TableSchema(TABLE, COLUMNS, ("a",))
TWO = TableSchema(TABLE, COLUMNS, ("a", "b"))
MODEL = """/* headrace
[contract]
v = "INTEGER NOT NULL CHECK (v < 100)"
*/
SELECT a::BIGINT AS a, b, nullif(v, 'null')::INTEGER AS v
FROM raw.shop.t
WHERE CASE WHEN v = 'where' THEN v::INTEGER > 0 ELSE v <> 'skip' END
"""
GOOD = ("1", "2", "3")
FILTERED = ("skip", None)  # a condition that is null is not true
BAD = ("x", "500", "null", "where")  # cast, CHECK, NOT NULL, error in WHERE
PARTIAL = "partial"  # a cell that the source did not send and raw does not know


@dataclass(frozen=True)
class Event:
    op: str
    key: tuple[str, str] = ("", "")
    before: tuple[str, str] | None = None
    value: str | None = None


def interpret(events: Sequence[Event], width: int) -> tuple[dict[str, int], set[int]]:
    """The rows by source key and the numbers of the open bad changes, after all of `events`."""
    rows: dict[str, int] = {}
    open_: dict[int, str] = {}

    def gone(key: str) -> None:
        rows.pop(key, None)
        for n in [n for n, of in open_.items() if of == key]:
            del open_[n]

    for n, event in enumerate(events):
        if event.op == "t":
            rows.clear()
            open_.clear()
            continue
        key = text_key(event.key, width)
        if event.op == "d":
            gone(key)
            continue
        if event.before is not None and text_key(event.before, width) != key:
            gone(text_key(event.before, width))
        if event.value in BAD or event.value == PARTIAL:
            open_[n] = key
            continue
        gone(key)
        if event.value in GOOD:
            rows[key] = int(event.value)
    return rows, set(open_)


def text_key(key: tuple[str, str], width: int) -> str:
    return key[0] if width == 1 else json.dumps(list(key), separators=(",", ":"), ensure_ascii=False)


def changes(events: Sequence[Event], first: int = 1) -> pa.Table:
    """Events as staging gives them; each stands at a commit and an offset of its own."""
    n = len(events)
    numbers = pa.array(range(first, first + n), pa.int64())
    before = [None if e.before is None else [("a", e.before[0]), ("b", e.before[1])] for e in events]
    live = [e.op not in "td" for e in events]
    return pa.table(
        {
            "a": pa.array([None if e.op == "t" else e.key[0] for e in events], pa.string()),
            "b": pa.array([None if e.op == "t" else e.key[1] for e in events], pa.string()),
            "v": pa.array(
                [e.value if ok and e.value != PARTIAL else None for e, ok in zip(events, live, strict=True)],
                pa.string(),
            ),
            "_op": pa.array([e.op for e in events], pa.string()),
            "_epoch": pa.array([0] * n, pa.int64()),
            "_commit": numbers,
            "_ordinal": pa.array([1] * n, pa.int64()),
            "_offset": numbers,
            "_committed_at": pa.array([1_700_000_000_000_000] * n, pa.int64()),
            "_txid": pa.array([9] * n, pa.int64()),
            "_unchanged": pa.array([["v"] if e.value == PARTIAL else None for e in events], UNCHANGED),
            "_before": pa.array(before, BEFORE),
        }
    )


def bound(folder: Path, schema: TableSchema, text: str = MODEL) -> RowModel:
    path = folder / "t.sql"
    path.write_text(text)
    return bind(read_model(path), schema)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fold")


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[int, RowModel]:
    return {1: bound(folder, ONE), 2: bound(folder, TWO)}


@pytest.fixture(scope="module")
def destination(folder: Path) -> DuckDBDestination:
    return DuckDBDestination(folder / "warehouse.duckdb")


_serial = itertools.count()
keys = st.tuples(st.sampled_from(["1", "2", "3"]), st.sampled_from(["", 'q"', "é,"]))
values = st.sampled_from([*GOOD, *GOOD, *FILTERED, *BAD, PARTIAL])
events_ = st.lists(
    st.one_of(
        st.builds(Event, st.sampled_from(["c", "u", "r"]), keys, value=values),
        st.builds(Event, st.just("u"), keys, before=keys, value=values),
        st.builds(Event, st.just("d"), keys),
        st.builds(Event, st.just("u"), keys, before=keys, value=values),
        st.builds(Event, st.sampled_from("cuuuuudt"), keys, value=values),
    ),
    max_size=24,
)
K1, K2 = ("1", ""), ("2", "")


@dataclass
class Outcome:
    rows: dict[str, int]
    open: set[int]


def apply_slices(
    destination: DuckDBDestination, model: RowModel, events: Sequence[Event], cuts: Sequence[int]
) -> Outcome:
    """Apply events in slices that end at `cuts`, check the books after each, and read all back."""
    n = next(_serial)
    model = replace(model, name=f"t{n}", source=f"s{n}")
    after = 0
    for through in cuts:
        prepared = model.prepare(changes(events[after:through], after + 1))
        assert prepared.counts.closes(), prepared.counts
        assert min(getattr(prepared.counts, name) for name in prepared.counts.__slots__) >= 0, prepared.counts
        assert prepared.counts.read == through - after
        work = Slice(
            model.source,
            Mark(LOG, after, str(after)),
            Mark(LOG, through, str(through)),
            Position(0, through, 1),
            1_700_000_000_000_000,
            (Part(model, prepared, True),),
        )
        destination.apply(work)
        after = through
    books_balance(destination, model, after)
    return read_back(destination, model)


def books_balance(destination: DuckDBDestination, model: RowModel, through: int) -> None:
    sums, open_, stands = destination.read(
        [
            "SELECT coalesce(sum(read), 0)::BIGINT AS read, coalesce(sum(applied + superseded + filtered + "
            "quarantined + waiting + blocked), 0)::BIGINT AS others, coalesce(sum(quarantined), 0)::BIGINT "
            f"AS quarantined FROM headrace.ledger WHERE model = '{model.name}'",
            "SELECT count(*) AS n FROM headrace.quarantine WHERE status = 'quarantined' "
            f"AND model = '{model.name}'",
            f"SELECT open_records, \"offset\" FROM headrace.models WHERE model = '{model.name}'",
        ]
    )
    still_open = open_["n"][0].as_py()
    assert sums.to_pylist() == [{"read": through, "others": through, "quarantined": still_open}]
    assert stands.to_pylist() == [{"open_records": still_open, "offset": through}]


def read_back(destination: DuckDBDestination, model: RowModel) -> Outcome:
    table, records = destination.read(
        [
            f"SELECT _source_key, v FROM {model.name} WHERE _source = '{model.source}'",
            f"SELECT commit FROM headrace.quarantine WHERE model = '{model.name}' AND status = 'quarantined'",
        ]
    )
    rows = dict(zip(table["_source_key"].to_pylist(), table["v"].to_pylist(), strict=True))
    assert len(rows) == table.num_rows, "one row per source key"
    commits = records["commit"].to_pylist()
    assert len(set(commits)) == len(commits), "one record per change"
    return Outcome(rows, {commit - 1 for commit in commits})


@st.composite
def cut_events(draw: st.DrawFn) -> tuple[list[Event], list[int]]:
    events = draw(events_.filter(bool))
    cuts = draw(st.sets(st.integers(1, len(events)), max_size=4))
    return events, sorted(cuts | {len(events)})


@pytest.mark.parametrize("width", [1, 2])
@settings(max_examples=max(settings().max_examples // 5, 6))
@given(drawn=cut_events())
@example(drawn=([Event("c", K1, value="1"), Event("u", K1, value="x")], [1, 2]))
@example(drawn=([Event("c", K1, value="1"), Event("u", K2, K1, "x"), Event("u", K2, value="2")], [2, 3]))
@example(drawn=([Event("c", K1, value="x"), Event("u", K2, K1, "1"), Event("c", K1, value="x")], [1, 3]))
@example(drawn=([Event("c", K1, value="x"), Event("u", K2, K1, PARTIAL), Event("d", K2)], [2, 3]))
@example(drawn=([Event("c", K1, value="x"), Event("t"), Event("t"), Event("c", K1, value="1")], [1, 4]))
def test_any_cut_into_slices_gives_what_the_rules_say_change_by_change(
    width: int,
    drawn: tuple[list[Event], list[int]],
    models: dict[int, RowModel],
    destination: DuckDBDestination,
) -> None:
    events, cuts = drawn
    rows, open_ = interpret(events, width)
    assert apply_slices(destination, models[width], events, cuts) == Outcome(rows, open_)


@pytest.mark.parametrize("width", [1, 2])
@given(events=events_)
def test_one_slice_gives_what_the_rules_say(
    width: int, events: list[Event], models: dict[int, RowModel]
) -> None:
    rows, open_ = interpret(events, width)
    made = models[width].prepare(changes(events))
    assert {row["_source_key"]: row["v"] for row in made.rows.to_pylist()} == rows
    assert [commit - 1 for commit in made.records["commit"].to_pylist()] == sorted(open_)
    assert made.counts.closes()
    assert made.counts.quarantined == len(open_)
    assert made.reset == any(event.op == "t" for event in events)
    assert set(rows) <= set(made.removed.to_pylist())


@settings(max_examples=10)
@given(events=events_)
def test_folding_is_a_function_of_its_input_alone(events: list[Event], models: dict[int, RowModel]) -> None:
    def outcome() -> object:
        made = models[1].prepare(changes(events))
        rows = made.rows.sort_by("_source_key").to_pylist()
        return made.reset, sorted(made.removed.to_pylist()), rows, made.records.to_pylist(), made.counts

    assert outcome() == outcome()


@settings(max_examples=15)
@given(events=events_)
def test_chunks_and_slices_of_memory_make_no_difference(
    events: list[Event], models: dict[int, RowModel]
) -> None:
    """Staging hands over chunked tables, with chunks that are empty or begin inside a buffer."""
    whole = changes(events)
    apart = pa.concat_tables([whole.slice(i, 1) for i in range(whole.num_rows)] + [whole.slice(0, 0)])

    def outcome(table: pa.Table) -> object:
        made = models[2].prepare(table)
        return made.rows.sort_by("_source_key").to_pylist(), made.records.to_pylist(), made.counts

    assert outcome(whole) == outcome(apart)


# -- the record ----------------------------------------------------------------------------------------


def prepare_one(model: RowModel, *events: Event) -> Prepared:
    return model.prepare(changes(events))


def reasons(prepared: Prepared) -> list[tuple[str, str, str]]:
    records = prepared.records.to_pylist()
    return [(r["stage"], r["reason"], r["columns"]) for r in records]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("x", ("transform", "transform.cast", "v")),
        ("500", ("constraint", "constraint.check", "v")),
        ("null", ("constraint", "constraint.not_null", "v")),
        ("where", ("transform", "transform.filter", "")),
        (PARTIAL, ("decode", "decode.unchanged", "")),
    ],
)
def test_a_record_says_stage_reason_and_column(
    models: dict[int, RowModel], value: str, expected: tuple[str, str, str]
) -> None:
    assert reasons(prepare_one(models[1], Event("c", K1, value=value))) == [expected]


def test_a_record_points_to_its_change(models: dict[int, RowModel]) -> None:
    made = models[1].prepare(changes([Event("c", K1, value="1"), Event("u", K2, K1, "x")], first=41))
    (record,) = made.records.to_pylist()
    assert {name: record[name] for name in ("key", "op", "epoch", "commit", "ordinal", "offset", "txid")} == {
        "key": "2",
        "op": "u",
        "epoch": 0,
        "commit": 42,
        "ordinal": 1,
        "offset": 42,
        "txid": 9,
    }
    assert record["committed_at"] == 1_700_000_000_000_000
    assert record["is_partial"] is False
    assert json.loads(record["preview"]) == {"a": "2", "b": "", "v": "x"}


def test_a_preview_is_bounded(models: dict[int, RowModel]) -> None:
    made = prepare_one(models[1], Event("c", ("1", "long" * 100_000), value="x"))
    assert len(made.records["preview"][0].as_py()) <= 4096


# -- corners -------------------------------------------------------------------------------------------


def test_a_bad_change_leaves_the_earlier_value_of_its_key(models: dict[int, RowModel]) -> None:
    made = prepare_one(models[1], Event("c", K1, value="1"), Event("u", K1, value="x"))
    assert made.rows.to_pylist() == [{"_source_key": "1", "a": 1, "b": "", "v": 1}]
    assert made.removed.to_pylist() == ["1"]


def test_a_change_that_settles_its_key_is_counted_once_whatever_was_before(
    models: dict[int, RowModel],
) -> None:
    events = [Event("c", K1, value=PARTIAL), Event("u", K1, value="2"), Event("c", K2, value="x")]
    made = prepare_one(models[1], *events)
    counts = made.counts
    assert (counts.read, counts.applied, counts.superseded, counts.quarantined) == (3, 1, 1, 1)
    assert made.rows["_source_key"].to_pylist() == ["1"]


def test_a_key_of_which_nothing_settled_is_left_alone(models: dict[int, RowModel]) -> None:
    made = prepare_one(models[1], Event("u", K1, value="x"))
    assert made.removed.to_pylist() == []
    assert made.rows.num_rows == 0


def test_a_slice_without_changes_is_empty(models: dict[int, RowModel]) -> None:
    made = prepare_one(models[2])
    assert (made.reset, len(made.removed), made.rows.num_rows, made.counts.read) == (False, 0, 0, 0)


def test_rows_may_swap_their_keys(models: dict[int, RowModel], destination: DuckDBDestination) -> None:
    spare = ("3", "")
    events = [
        Event("c", K1, value="1"),
        Event("c", K2, value="2"),
        Event("u", spare, K1, "1"),
        Event("u", K1, K2, "2"),
        Event("u", K2, spare, "1"),
    ]
    for cuts in ([5], [2, 5], [2, 3, 5], [1, 2, 3, 4, 5]):
        assert apply_slices(destination, models[1], events, cuts).rows == {"1": 2, "2": 1}


def test_keys_that_only_look_alike_stay_apart(models: dict[int, RowModel]) -> None:
    pairs = [("1", '2","3'), ("1", "2"), ('1","2', "3"), ("1", ""), ("1", "\\"), ("1", '"')]
    digits = [(str(i), b) for i, (_, b) in enumerate(pairs)] + [("1", b) for _, b in pairs]
    made = models[2].prepare(changes([Event("c", key, value="1") for key in digits]))
    assert made.rows.num_rows == len(set(digits))


def test_a_delete_by_key_alone_needs_no_other_cells(models: dict[int, RowModel]) -> None:
    made = prepare_one(models[1], Event("d", K1))
    assert made.removed.to_pylist() == ["1"]
    assert made.counts.applied == 1


def test_large_slices_take_the_same_road(models: dict[int, RowModel]) -> None:
    size = 150_000  # more than one vector and more than one row group
    events = [Event("c", (str(i % 4_000), ""), value="x" if i % 3 == 0 else "7") for i in range(size)]
    made = models[1].prepare(changes(events))
    rows, open_ = interpret_fast(events)
    assert made.rows.num_rows == rows
    assert made.records.num_rows == open_
    assert made.counts.closes()


def interpret_fast(events: Sequence[Event]) -> tuple[int, int]:
    good: set[str] = set()
    open_: dict[str, int] = {}
    for event in events:
        if event.value == "x":
            open_[event.key[0]] = open_.get(event.key[0], 0) + 1
        else:
            good.add(event.key[0])
            open_.pop(event.key[0], None)
    return len(good), sum(open_.values())


def test_a_mirror_keeps_every_row_and_column(folder: Path) -> None:
    model = mirror("shop", ONE)
    assert model.types() == {"a": "BIGINT", "b": "VARCHAR", "v": "VARCHAR"}
    made = prepare_one(model, Event("c", K1, value="x"), Event("c", K2, value=None))
    assert made.rows.sort_by("a").to_pylist() == [
        {"_source_key": "1", "a": 1, "b": "", "v": "x"},
        {"_source_key": "2", "a": 2, "b": "", "v": None},
    ]


@pytest.mark.parametrize("name", ["events", "judged", "r", "f", "n", "k", "settled", "failed_rows", "points"])
def test_no_column_name_collides_with_our_own(folder: Path, name: str) -> None:
    schema = TableSchema(TABLE, (Column("a", "bigint"), Column(name, "text")), ("a",))
    outputs = f"a::BIGINT AS a, {name}::INTEGER AS {name}, {name} AS again"
    text = f"SELECT {outputs} FROM raw.shop.t WHERE {name} <> '9'"
    model = bound(folder, schema, text)
    made = model.prepare(
        changes([Event("c", (str(i), ""), value=v) for i, v in enumerate("19x")]).rename_columns({"v": name})
    )
    assert made.rows.to_pylist() == [{"_source_key": "0", "a": 0, name: 1, "again": "1"}]
    assert reasons(made) == [("transform", "transform.cast", name)]


def every(events: Sequence[Event]) -> Iterator[list[int]]:
    for size in range(len(events)):
        for inner in itertools.combinations(range(1, len(events)), size):
            yield [*inner, len(events)]


def test_every_cut_of_one_hard_history(models: dict[int, RowModel], destination: DuckDBDestination) -> None:
    events = [
        Event("c", K1, value="1"),
        Event("u", K1, value="x"),
        Event("u", K2, K1, "500"),
        Event("c", K1, value=PARTIAL),
    ]
    rows, open_ = interpret(events, 1)
    for cuts in every(events):
        assert apply_slices(destination, models[1], events, cuts) == Outcome(rows, open_)
