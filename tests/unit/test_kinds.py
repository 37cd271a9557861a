"""Models that keep more than the newest state of a row: whatever changes come, and however they are cut into
slices and pieces, the table is what the rules say change by change.

The rules are said once more here, in plain Python, over whole histories.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headrace.cells import rows_of
from headrace.change import Column, Mark, Position, TableId, TableSchema
from headrace.destinations.duckdb import DuckDBDestination
from headrace.errors import ModelError
from headrace.keys import quoted
from headrace.payload import BEFORE, UNCHANGED
from headrace.prepared import Prepared
from headrace.protocols import Part, Slice
from headrace.transform.model import RowModel, bind
from headrace.transform.sql import read_model

TABLE = TableId("public", "t")
SHAPE = TableSchema(TABLE, (Column("id", "text"), Column("v", "text")), ("id",))
LOG = "l" * 32
BODY = """/* headrace
{}
[contract]
v = "INTEGER CHECK (v < 100)"
*/
SELECT id, v::INTEGER AS v{} FROM raw.shop.t WHERE v <> 'skip'
"""
SOFT = 'delete = "soft"'
GOOD, FILTERED, BAD = ("1", "2"), ("skip", None), ("x", "500")


@dataclass(frozen=True)
class Event:
    """A change. `new`: whether it begins a transaction; `later`: seconds since the one before it."""

    op: str
    key: str = ""
    value: str | None = None
    before: str | None = None
    new: bool = True
    later: int = 1


@dataclass(frozen=True)
class Placed:
    """An event with its transaction and the time of its commit."""

    event: Event
    commit: int
    ordinal: int
    at: int


def placed(events: Sequence[Event]) -> list[Placed]:
    commit, ordinal, at, made = 0, 0, 100, list[Placed]()
    for event in events:
        ordinal += 1
        if event.new or not made:
            commit, ordinal, at = commit + 1, 1, at + event.later
        made.append(Placed(event, commit, ordinal, at))
    return made


def changes(events: Sequence[Placed]) -> pa.Table:
    """Events as staging gives them; an offset for each."""
    columns: dict[str, Any] = {
        "id": pa.array([p.event.key or None for p in events], pa.string()),
        "v": pa.array([None if p.event.op in "dt" else p.event.value for p in events], pa.string()),
        "_op": pa.array([p.event.op for p in events], pa.string()),
        "_epoch": pa.array([0] * len(events), pa.int64()),
        "_commit": pa.array([p.commit for p in events], pa.int64()),
        "_ordinal": pa.array([p.ordinal for p in events], pa.int64()),
        "_offset": pa.array([p.commit for p in events], pa.int64()),
        "_committed_at": pa.array([p.at * 1_000_000 for p in events], pa.int64()),
        "_txid": pa.array([p.commit for p in events], pa.int64()),
        "_unchanged": pa.nulls(len(events), UNCHANGED),
        "_before": pa.array([[("id", p.event.before)] if p.event.before else None for p in events], BEFORE),
    }
    return pa.table(columns)


Row = tuple[Any, ...]


@dataclass
class Outcome:
    """The rows of a table, as they are in no order; and of open records, key, commit and what they block."""

    rows: Counter[Row]
    open: set[Row]


def soft(events: Sequence[Placed]) -> Outcome:
    rows: dict[str, tuple[int, int | None]] = {}
    open_: dict[tuple[int, int], str] = {}

    def gone(key: str, at: int) -> None:
        if key in rows and rows[key][1] is None:
            rows[key] = (rows[key][0], at)
        healed(key)

    def healed(key: str) -> None:
        for place in [place for place, of in open_.items() if of == key]:
            del open_[place]

    for p in events:
        event = p.event
        if event.op == "t":
            for key in [*rows, *open_.values()]:
                gone(key, p.at)
        elif event.op == "d":
            gone(event.key, p.at)
        else:
            if event.before not in (None, event.key):
                gone(str(event.before), p.at)
            if event.value in BAD:
                open_[p.commit, p.ordinal] = event.key
                continue
            healed(event.key)
            rows.pop(event.key, None)
            if event.value in GOOD:
                rows[event.key] = (int(str(event.value)), None)
    return Outcome(
        Counter((key, value, at) for key, (value, at) in rows.items()),
        {(key, *place, 0) for place, key in open_.items()},
    )


def history(events: Sequence[Placed]) -> Outcome:
    """Versions as [key, v, valid_from, valid_to]."""
    versions: dict[str, list[list[Any]]] = {}
    stuck: dict[str, Row] = {}
    for _, transaction in itertools.groupby(events, key=lambda p: p.commit):
        for key, (p, value) in last_states(list(transaction), versions.keys() | stuck.keys()).items():
            mine = versions.setdefault(key, [])
            counted = p.event.key == key and p.event.op != "t"
            if key in stuck:
                stuck[key] = (*stuck[key][:3], stuck[key][3] + counted)
            elif value in BAD:
                stuck[key] = (key, p.commit, p.ordinal, 0)
            else:
                current = mine[-1] if mine and mine[-1][3] is None else None
                at = max([p.at, *(t for version in mine[-1:] for t in version[2:] if t is not None)])
                state = int(value) if value in GOOD else None
                if current is not None and current[1] != state:
                    current[3] = at
                if state is not None and (current is None or current[1] != state):
                    mine.append([key, state, at, None])
    return Outcome(Counter(tuple(v) for each in versions.values() for v in each), set(stuck.values()))


def last_states(
    transaction: Sequence[Placed], known: Collection[str]
) -> dict[str, tuple[Placed, str | None]]:
    """What a transaction leaves of each key that it touches, None if it is gone; a key is counted last."""
    found: dict[str, tuple[Placed, str | None]] = {}
    for p in transaction:
        if p.event.op == "t":
            found.update(dict.fromkeys([*known, *found], (p, None)))
            continue
        if p.event.op != "d" and p.event.before not in (None, p.event.key):
            found[str(p.event.before)] = (p, None)
        found[p.event.key] = (p, None if p.event.op == "d" else p.event.value)
    return found


def append(events: Sequence[Placed], *, soft: bool) -> Outcome:
    rows, stuck, seen = list[Row](), dict[str, Row](), set[str]()
    for p in events:
        event = p.event
        gone = event.before if event.op != "d" and event.before != event.key else None
        for key in ([gone] if gone else []) + ([event.key] if event.op == "d" else []):
            if soft and key in seen and key not in stuck:
                rows.append((key, None, "d", p.commit, p.ordinal))
        if event.op == "t":
            continue
        if event.key in stuck:
            stuck[event.key] = (*stuck[event.key][:3], stuck[event.key][3] + 1)
        elif event.op != "d" and event.value in BAD:
            stuck[event.key] = (event.key, p.commit, p.ordinal, 0)
        elif event.op != "d" and event.value in GOOD:
            rows.append((event.key, int(str(event.value)), event.op, p.commit, p.ordinal))
            seen.add(event.key)
    return Outcome(Counter(rows), set(stuck.values()))


@dataclass(frozen=True)
class Rules:
    """A kind of model with the rules in Python and the query of what it holds; times in seconds."""

    header: str
    interpret: Callable[[Sequence[Placed]], Outcome]
    query: str


_LOG = "SELECT id, v, op, _commit, _ordinal FROM {}"
KINDS = {
    "soft": Rules(SOFT, soft, "SELECT id, v, epoch(_deleted_at)::INT FROM {}"),
    "history": Rules(
        'materialize = "history"',
        history,
        "SELECT id, v, epoch(valid_from)::INT, "
        "CASE WHEN NOT is_current THEN epoch(valid_to)::INT END FROM {}",
    ),
    "append": Rules('materialize = "append"', partial(append, soft=False), _LOG),
    "soft append": Rules(f'materialize = "append"\n{SOFT}', partial(append, soft=True), _LOG),
}


MENDED = ("v::INTEGER AS v", "replace(v, 'x', '7')::INTEGER AS v"), ("v < 100", "v < 1000")


def bound(folder: Path, header: str, *mended: tuple[str, str], schema: TableSchema = SHAPE) -> RowModel:
    path = folder / "t.sql"
    text = BODY.format(header, ", _op AS op" if "append" in header else "")
    for before, after in mended:
        text = text.replace(before, after)
    path.write_text(text)
    return bind(read_model(path), schema)


@dataclass
class Bench:
    """A destination, with a model of its own for each example."""

    destination: DuckDBDestination
    folder: Path
    serial: Iterator[int] = field(default_factory=itertools.count)

    def model(self, rules: Rules, *mended: tuple[str, str]) -> RowModel:
        n = next(self.serial)
        return replace(bound(self.folder, rules.header, *mended), name=f"t{n}", source=f"s{n}")

    def apply(self, model: RowModel, events: Sequence[Placed], cuts: Sequence[int], pieces: int) -> None:
        """Apply events in slices that end behind the commits `cuts`, each in pieces of some changes."""
        after = 0
        for through in cuts:
            mine = [p for p in events if after < p.commit <= through]
            parts = [mine[i : i + pieces] for i in range(0, len(mine), pieces)] or [[]]
            prepared = [model.prepare(changes(part)) for part in parts]
            for one, part in zip(prepared, parts, strict=True):
                assert one.counts.closes(), one.counts
                assert one.counts.read == len(part)
                assert min(getattr(one.counts, name) for name in one.counts.__slots__) >= 0, one.counts
            marks = (Mark(LOG, after, str(after)), Mark(LOG, through, str(through)))
            at = Position(0, through, 1)
            work = Slice(model.source, *marks, at, 0, [Part(model, one, True) for one in prepared])
            self.destination.apply(work)
            after = through

    def outcome(self, model: RowModel, rules: Rules) -> Outcome:
        rows, records = self.destination.read(
            [
                rules.query.format(quoted(model.name)),
                "SELECT key, commit, ordinal, blocked FROM headrace.quarantine "
                f"WHERE status = 'quarantined' AND model = '{model.name}'",
            ]
        )
        return Outcome(Counter(map(tuple, rows_of(rows))), set(map(tuple, rows_of(records))))

    def check_books(self, model: RowModel, read: int) -> None:
        """Every change is accounted for, and what is open and blocked is what the records say."""
        ledger, records, stands = self.destination.read(
            [
                "SELECT coalesce(sum(read), 0)::BIGINT AS read, coalesce(sum(applied + superseded + filtered "
                "+ quarantined + waiting + blocked), 0)::BIGINT AS parts, coalesce(sum(quarantined), 0)"
                "::BIGINT AS quarantined, coalesce(sum(blocked), 0)::BIGINT AS blocked "
                f"FROM headrace.ledger WHERE model = '{model.name}' AND kind <> 'void'",
                "SELECT count(*) AS quarantined, coalesce(sum(blocked), 0)::BIGINT AS blocked "
                f"FROM headrace.quarantine WHERE status = 'quarantined' AND model = '{model.name}'",
                f"SELECT open_records FROM headrace.models WHERE model = '{model.name}'",
            ]
        )
        (open_,) = records.to_pylist()
        assert ledger.to_pylist() == [{"read": read, "parts": read, **open_}]
        assert stands.to_pylist() == [{"open_records": open_["quarantined"]}]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("kinds")
    return Bench(DuckDBDestination(folder / "warehouse.duckdb"), folder)


keys = st.sampled_from(["a", "b", "c"])
values = st.sampled_from([*GOOD, *GOOD, *GOOD, *FILTERED, *BAD])
begins, later = st.booleans(), st.sampled_from([0, 1, 1, 5, -3])
events_ = st.lists(
    st.one_of(
        st.builds(Event, st.sampled_from("cuuu"), keys, values, new=begins, later=later),
        st.builds(Event, st.just("u"), keys, values, before=keys, new=begins, later=later),
        st.builds(Event, st.just("d"), keys, new=begins, later=later),
        st.builds(Event, st.sampled_from("uuut"), keys, values, new=begins, later=later),
    ).map(lambda event: replace(event, key="", value=None) if event.op == "t" else event),
    min_size=1,
    max_size=20,
)


@st.composite
def cut_events(draw: st.DrawFn) -> tuple[list[Event], list[int], int]:
    events = draw(events_)
    last = placed(events)[-1].commit
    cuts = draw(st.sets(st.integers(1, last), max_size=4))
    return events, sorted(cuts | {last}), draw(st.integers(2, 12))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=max(settings().max_examples // 4, 6))
@given(drawn=cut_events())
@example(drawn=([Event("c", "a", "1"), Event("d", "a"), Event("u", "a", "x"), Event("d", "a")], [1, 4], 9))
@example(drawn=([Event("c", "a", "1"), Event("t"), Event("u", "a", "x"), Event("d", "a")], [1, 4], 9))
@example(drawn=([Event("c", "a", "1"), Event("u", "b", "x", "a"), Event("t"), Event("t")], [4], 9))
def test_any_cut_gives_what_the_rules_say_change_by_change(
    kind: str, drawn: tuple[list[Event], list[int], int], bench: Bench
) -> None:
    (events, cuts, pieces), rules = drawn, KINDS[kind]
    model, history = bench.model(rules), placed(events)
    bench.apply(model, history, cuts, pieces)
    assert bench.outcome(model, rules) == rules.interpret(history)
    bench.check_books(model, len(events))


def redrive(bench: Bench, model: RowModel, history: Sequence[Placed]) -> None:
    """Fold the whole histories of all keys with an open record, as a lane does."""
    opened = f"status = 'quarantined' AND model = '{model.name}'"
    (found,) = bench.destination.read([f"SELECT DISTINCT key FROM headrace.quarantine WHERE {opened}"])
    keys, whole = found["key"].combine_chunks(), model.whole(changes(history))
    rows = whole.rows.filter(pc.is_in(whole.rows["_source_key"], value_set=keys))
    records = whole.records.filter(pc.is_in(whole.records["key"], value_set=keys))
    bench.destination.redrive(model, Prepared(False, keys, rows, records, whole.counts))


# A delete heals what it makes obsolete: there is nothing to redrive, and a deleted row stays as it was good.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "soft"])
@settings(max_examples=max(settings().max_examples // 6, 4))
@given(drawn=cut_events())
@example(
    drawn=(
        [Event("c", "a", "1"), Event("u", "a", "x"), Event("u", "a", "500"), Event("u", "b", "2", "a")],
        [3, 4],
        9,
    )
)
def test_a_redrive_under_a_mended_model_is_as_if_nothing_had_failed(
    kind: str, drawn: tuple[list[Event], list[int], int], bench: Bench
) -> None:
    (events, cuts, pieces), rules = drawn, KINDS[kind]
    model, history = bench.model(rules), placed(events)
    half = [through for through in cuts[:-1] if through]
    if half:
        bench.apply(model, history, half, pieces)
        before = [p for p in history if p.commit <= half[-1]]
        redrive(bench, model, before)  # nothing is mended: nothing changes
        assert bench.outcome(model, rules) == rules.interpret(before)
        bench.check_books(model, len(before))
    other = bench.model(rules)
    bench.apply(other, history, cuts, pieces)
    mended = replace(bench.model(rules, *MENDED), name=other.name, source=other.source)
    redrive(bench, mended, history)
    bench.check_books(other, len(events))
    flawless = bench.model(rules, *MENDED)
    bench.apply(flawless, history, cuts, pieces)
    assert bench.outcome(other, rules) == bench.outcome(flawless, rules)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ('materialize = "table"', "materialize must be"),
        ('delete = "later"', "delete must be"),
        ('materialize = "history"\ndelete = "soft"', "a delete ends the last one"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, header: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        bound(tmp_path, header)


def test_a_column_that_the_table_has_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a column Valid_From of its own"):
        bound(tmp_path, 'materialize = "history"', ("AS v FROM", "AS v, now AS Valid_From FROM"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_without_a_key_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ModelError, match="has no key, so nothing tells which of its rows a change is of"):
        bound(tmp_path, KINDS[kind].header, schema=replace(SHAPE, key=()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_may_name_its_columns_as_it_likes(
    kind: str, tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with the names that relations of the fold have."""
    rules, names = KINDS[kind], ["k", "n", "own", "gone", "what", "moment", "h0"]
    shape = replace(SHAPE, columns=(*SHAPE.columns, *(Column(name, "text") for name in names)))
    more = ("AS v", f"AS v, {', '.join(names)}")
    bound_to = bound(tmp_path, rules.header, more, schema=shape)
    model = replace(bound_to, name=f"named {kind}", source=f"named {kind}")

    def wide(events: Sequence[Placed], narrow: Callable[..., pa.Table] = changes) -> pa.Table:
        made = narrow(events)
        for name in names:
            made = made.append_column(name, made["id"])
        return made

    monkeypatch.setitem(globals(), "changes", wide)
    events = [Event("c", "a", "1"), Event("c", "b", "x"), Event("u", "a", "2"), Event("u", "c", "2", "a")]
    history = placed([*events, Event("t"), Event("c", "a", "1"), Event("d", "a")])
    bench.apply(model, history, [2, 4, 7], 9)
    assert bench.outcome(model, rules) == rules.interpret(history)
    bench.check_books(model, len(history))
