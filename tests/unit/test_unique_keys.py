"""Keys of models that the source's key does not keep apart: no two rows have one, and nothing is lost."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fold import LOG, ONE, Event, books_balance, bound, changes
from test_rebuild import Shop

from headrace.change import Mark, Position
from headrace.config import load_project
from headrace.destinations.duckdb import DuckDBDestination
from headrace.prepared import UNIQUE, Contested, Refused
from headrace.protocols import Part, Slice
from headrace.rebuilding import folded
from headrace.transform.contested import uncontested
from headrace.transform.model import RowModel
from headrace.verify import verify_destination

TEXT = """/* headrace
key = ["name"]
[contract]
name = "INTEGER CHECK (name < 100)"
*/
SELECT v::INTEGER AS name, a::BIGINT AS id FROM raw.shop.t WHERE v <> 'skip'"""
_serial = itertools.count()
ids = st.tuples(st.sampled_from("123456"), st.just(""))
names = st.sampled_from(["1", "2", "3", "4", "1", "2", "3", "4", "skip", "x", "500"])
histories = st.lists(
    st.one_of(
        st.builds(Event, st.just("u"), ids, value=names),
        st.builds(Event, st.just("u"), ids, value=names),
        st.builds(Event, st.just("u"), ids, value=names),
        st.builds(Event, st.just("u"), ids, before=ids, value=names),
        st.builds(Event, st.just("d"), ids),
        st.builds(Event, st.sampled_from("uuuuuudt"), ids, value=names),
    ),
    min_size=1,
    max_size=20,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("unique")


@pytest.fixture(scope="module")
def model(folder: Path) -> RowModel:
    return bound(folder, ONE, TEXT)


@pytest.fixture(scope="module")
def destination(folder: Path) -> DuckDBDestination:
    return DuckDBDestination(folder / "warehouse.duckdb")


@dataclass
class Table:
    """A model's table with its quarantine, and the changes that were applied to it."""

    destination: DuckDBDestination
    model: RowModel
    events: Sequence[Event]
    attempts: int = 0

    def apply(self, cuts: Sequence[int], pieces: int = 1) -> Table:
        """Apply the events in slices that end at `cuts`, each prepared in so many pieces."""
        after = 0
        for through in sorted({*cuts, len(self.events)}):
            given_ = changes(self.events[after:through], after + 1)
            marks = (Mark(LOG, at, str(at)) for at in (after, through))
            place = (*marks, Position(0, through, 1), 0)

            def attempt(model: RowModel, changes: pa.Table = given_, place: tuple = place) -> object:
                self.attempts += 1
                size = -(-changes.num_rows // pieces)
                parts = (changes.slice(at, size) for at in range(0, changes.num_rows, size))
                made = tuple(Part(model, model.prepare(part), True) for part in parts)
                return self.destination.apply(Slice(model.source, *place, made))

            uncontested(self.model, attempt)
            self.check()
            after = through
        return self

    def check(self) -> None:
        """The invariant: no two rows with one key, and every row and record is as the fold says with what the
        records refuse refused."""
        rows, opened = self.rows(), self.opened()
        assert len(set(rows.values())) == len(rows), "a key twice"
        applied = self.destination.models(self.model.source)[self.model.name].offset
        contested = (commit for commit, reason in opened.items() if reason == UNIQUE)
        refused = frozenset(Refused(0, commit, 1, None) for commit in contested)
        expected = replace(self.model, refused=refused).prepare(changes(self.events[:applied]))
        assert rows == {row["_source_key"]: row["name"] for row in expected.rows.to_pylist()}
        assert set(opened) == set(expected.records["commit"].to_pylist())
        (ledger,) = self.destination.read(
            [f"SELECT sum(quarantined)::INT AS n FROM headrace.ledger WHERE model = '{self.model.name}'"]
        )
        assert ledger["n"].to_pylist() == [len(opened)]

    def rows(self) -> dict[str, int]:
        (found,) = self.destination.read([f"SELECT _source_key, name FROM {self.model.name}"])
        return dict(zip(found["_source_key"].to_pylist(), found["name"].to_pylist(), strict=True))

    def opened(self) -> dict[int, str]:
        (found,) = self.destination.read(
            [
                "SELECT commit, reason FROM headrace.quarantine "
                f"WHERE model = '{self.model.name}' AND status = 'quarantined' ORDER BY commit"
            ]
        )
        return dict(zip(found["commit"].to_pylist(), found["reason"].to_pylist(), strict=True))

    def redrive(self) -> None:
        """Redrive the refused changes one by one until that changes nothing."""
        before = None
        while before != (before := (self.rows(), self.opened())):
            for commit in [commit for commit, reason in self.opened().items() if reason == UNIQUE]:
                keys, history = pa.array([self.events[commit - 1].key[0]]), changes(self.events)

                def attempt(model: RowModel, keys: pa.Array = keys, history: pa.Table = history) -> object:
                    return self.destination.redrive(model, folded(model, history, keys))

                uncontested(self.model, attempt)
                self.check()


def table(destination: DuckDBDestination, model: RowModel, events: Sequence[Event]) -> Table:
    n = next(_serial)
    return Table(destination, replace(model, name=f"t{n}", source=f"s{n}"), events)


def put(key: str, value: str, before: str | None = None) -> Event:
    return Event("u", (key, ""), None if before is None else (before, ""), value)


def gone(key: str) -> Event:
    return Event("d", (key, ""))


@settings(max_examples=max(settings().max_examples // 4, 10), deadline=None)
@given(events=histories, data=st.data())
def test_no_two_rows_have_one_key_and_nothing_is_lost(
    events: list[Event], data: st.DataObject, destination: DuckDBDestination, model: RowModel
) -> None:
    cuts = data.draw(st.sets(st.integers(1, len(events)), max_size=4))
    made = table(destination, model, events).apply(sorted(cuts), data.draw(st.integers(1, 3)))
    books_balance(destination, made.model, len(events))
    made.redrive()
    holders = {value: key for key, value in made.rows().items()}
    for commit, reason in made.opened().items():
        if reason == UNIQUE:
            event = events[commit - 1]
            assert holders.get(int(str(event.value)), event.key[0]) != event.key[0], "its key is free"


@pytest.mark.parametrize("cut", [[], [2]])
def test_rows_swap_their_keys(destination: DuckDBDestination, model: RowModel, cut: list[int]) -> None:
    events = [put("1", "1"), put("2", "2"), put("1", "2"), put("2", "1")]
    made = table(destination, model, events).apply(cut)
    assert (made.rows(), made.opened()) == ({"1": 2, "2": 1}, {})


def test_a_refused_row_stands_where_it_was_until_the_key_is_free(
    destination: DuckDBDestination, model: RowModel
) -> None:
    events = [put("1", "1"), put("2", "2"), put("2", "1"), gone("1")]
    made = table(destination, model, events[:3]).apply([2])
    assert (made.rows(), made.opened()) == ({"1": 1, "2": 2}, {3: UNIQUE})
    (records,) = destination.read(
        [f"SELECT stage, columns, message, key FROM headrace.quarantine WHERE model = '{made.model.name}'"]
    )
    assert records.to_pylist() == [
        {
            "stage": "constraint",
            "columns": "name",
            "message": "name: another row of the table has this key",
            "key": "2",
        }
    ]
    made.redrive()
    assert made.opened() == {3: UNIQUE}
    made = table(destination, model, events).apply([2, 3])
    assert (made.rows(), made.opened()) == ({"2": 2}, {3: UNIQUE})
    made.redrive()
    assert (made.rows(), made.opened()) == ({"2": 1}, {})


def test_what_a_refused_row_falls_back_to_is_contested_in_turn(
    destination: DuckDBDestination, model: RowModel
) -> None:
    # 1 takes the key of 2, 2 that of 3, 3 that of 4, which has not moved: none of them can, which is one
    # attempt more, however many they are.
    events = [*(put(str(n), str(n)) for n in (1, 2, 3, 4)), put("1", "2"), put("2", "3"), put("3", "4")]
    made = table(destination, model, events).apply([4])
    assert made.rows() == {"1": 1, "2": 2, "3": 3, "4": 4}
    assert set(made.opened()) == {5, 6, 7}
    assert made.attempts == 3
    # In one slice a change before the refused one is what stands, as good as any.
    events = [put("1", "1"), put("2", "3"), put("2", "1"), put("3", "3")]
    made = table(destination, model, events).apply([1])
    assert (made.rows(), set(made.opened())) == ({"1": 1, "2": 3}, {3, 4})


def test_a_row_that_says_the_same_again_and_again_takes_no_attempt_for_each(
    destination: DuckDBDestination, model: RowModel
) -> None:
    again = [put("2", "1")] * 40
    made = table(destination, model, [put("1", "1"), put("2", "2"), *again]).apply([2])
    assert (made.rows(), made.attempts) == ({"1": 1, "2": 2}, 3)
    # What is before the change that has the key now has it, then.
    made = table(destination, model, [put("2", "1"), put("1", "1"), *again]).apply([])
    assert (made.rows(), made.attempts) == ({"2": 1}, 3)
    assert set(made.opened()) == set(range(2, 43))
    made.redrive()
    assert (made.rows(), set(made.opened())) == ({"2": 1}, {2})


def test_what_is_refused_in_vain_is_no_endless_loop(model: RowModel) -> None:
    def attempt(model: RowModel) -> object:
        raise Contested({model.name: [Refused(0, 1, 1, None)]})

    with pytest.raises(Contested):
        uncontested(model, attempt)


def test_who_had_the_key_keeps_it_though_another_came_first(
    destination: DuckDBDestination, model: RowModel
) -> None:
    events = [put("1", "1"), put("2", "2"), put("2", "1"), put("1", "1")]
    made = table(destination, model, events).apply([2])
    assert (made.rows(), made.opened()) == ({"1": 1, "2": 2}, {3: UNIQUE})


@pytest.mark.parametrize("first", [gone("1"), Event("t")])
def test_a_row_that_was_gone_does_not_come_back_for_its_key(
    destination: DuckDBDestination, model: RowModel, first: Event
) -> None:
    # What 1 had, 3 has now: 1, refused the key of 5, is not there at all.
    events = [put("1", "1"), first, put("3", "1"), put("5", "2"), put("1", "2")]
    made = table(destination, model, events).apply([1], 2)
    assert (made.rows(), made.opened()) == ({"3": 1, "5": 2}, {5: UNIQUE})
    made = table(destination, model, events).apply([1])
    assert (made.rows(), made.opened()) == ({"3": 1, "5": 2}, {5: UNIQUE})


def test_a_later_change_takes_the_place_of_a_refused_one(
    destination: DuckDBDestination, model: RowModel
) -> None:
    events = [put("1", "1"), put("2", "1"), put("2", "2"), put("3", "1"), gone("3")]
    made = table(destination, model, events).apply([1, 2, 3, 4])
    assert (made.rows(), made.opened()) == ({"1": 1, "2": 2}, {})


class Keyed(Shop):
    """A shop whose model has a key that two rows of the source may have."""

    def put(self, text: str) -> None:
        del text
        super().put(
            '/* headrace\nkey = ["name"]\n*/ SELECT v::INTEGER AS name, id::BIGINT AS id FROM raw.shop.t'
        )

    def assert_verified(self) -> None:
        findings = verify_destination(load_project(self.folder), "shop")
        assert all(finding.ok for finding in findings), findings
        assert any(finding.what == "key of m (name)" for finding in findings)


@pytest.fixture(autouse=True, scope="module")
def small_slices() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headrace.log.index.MAX_SLICE_ROWS", 5)
        patch.setattr("headrace.history.PIECE_ROWS", 5)
        yield


@pytest.mark.parametrize("seed", [1, 2])
def test_a_pipeline_and_a_rebuild_come_to_what_verify_expects(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    shop = Keyed(tmp_path)
    for _ in range(10):
        shop.change(chance, chance.randint(1, 6))
        if chance.random() < 0.5:
            shop.bring()
    shop.bring()
    shop.assert_verified()
    opened = "SELECT DISTINCT key FROM headrace.quarantine WHERE status = 'quarantined'"
    keys = [key for (key,) in shop.ask(opened)]
    assert keys, "contests are what this is about"
    shop.lane.redrive("m", keys)
    shop.assert_verified()
    shop.lane.rebuild("m")
    shop.bring()
    shop.assert_verified()
    assert shop.rebuilds() == 1
    shop.change(chance, 6)
    shop.bring()
    shop.assert_verified()
    shop.lane.close()
