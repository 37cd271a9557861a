"""Part of the suite of a destination: tables without a key, and copies that models take in."""

# ruff: noqa: D102 - the name of a test says what it tests

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace

import pyarrow as pa
import pytest

from headrace.change import Mark, Position
from headrace.errors import DestinationError, UserError
from headrace.join import Difference, Join
from headrace.protocols import Destination
from headrace.testing.destinations import LOG, NUMBERS, Cells, row, shape, slice_of, staged, table
from headrace.testing.logs import armed
from headrace.transform.model import RowModel, mirror

BAG = mirror("shop", shape(("v", "integer"), key=()))


class BagSuite:
    """Tables without a key hold equal rows as often as the source."""

    @pytest.mark.parametrize("seed", range(4))
    def test_a_bag_holds_what_the_source_holds(self, destination: Destination, seed: int) -> None:
        chance = random.Random(seed)
        there: list[tuple[str, str]] = []
        after = 0
        for _ in range(12):
            changes: list[Cells] = []
            for _ in range(chance.randint(1, 6)):
                if there and chance.random() < 0.4:
                    key, value = there.pop(chance.randrange(len(there)))
                    changes.append(row(int(key), value, _op="d"))
                else:
                    there.append((chance.choice("123"), chance.choice(["1", "2", "x"])))
                    changes.append(row(int(there[-1][0]), there[-1][1]))
            destination.apply(slice_of(after, (BAG, changes), size=len(changes)))
            after += len(changes)
            good = Counter((int(key), int(value)) for key, value in there if value != "x")
            target = destination.table_of(BAG.name)
            assert Counter(table(destination, f"SELECT id, v FROM {target}")) == good
            opened = "SELECT count(*) FROM headrace.quarantine WHERE status = 'quarantined'"
            assert table(destination, opened) == [(sum(value == "x" for _, value in there),)]

    def test_many_rows_of_a_bag_go_at_once(self, destination: Destination) -> None:
        rows = [row(key % 3_000, "1") for key in range(6_000)]
        destination.apply(slice_of(0, (BAG, rows), size=6_000))
        gone = [row(key, "1", _op="d") for key in range(3_000)]
        destination.apply(slice_of(6_000, (BAG, gone), size=3_000))
        target = destination.table_of(BAG.name)
        assert table(destination, f"SELECT count(*), count(DISTINCT id) FROM {target}") == [(3_000, 3_000)]


FIRST = Join(NUMBERS.name, "shop", NUMBERS.version, 0, 10, 0, "copy", 0, 10)
SECOND = replace(FIRST, begin=12, end=20, stands=10, offset=12, target=20)


def take_in(destination: Destination, join: Join, model: RowModel, cells: list[Cells]) -> Join:
    """Take in a whole copy up to where it can be attached."""
    joins = destination.joins
    joins.start(join, model)
    half = replace(join, offset=join.begin + 4)
    copied = replace(join, phase="stream", offset=join.end)
    for at, following, rows in ((join, half, cells[:1]), (half, copied, cells[1:])):
        joins.step(at, following, model, [model.prepare(staged(model, rows, at.offset))])
        assert joins.of("shop") == {model.name: following}
    return copied


def attach(destination: Destination, join: Join, model: RowModel) -> Difference:
    """End a join at its target; returns what differed."""
    at = Mark(LOG, join.target, f"h{join.target}")
    found, _ = destination.joins.attach(join, model, at, Position(0, join.target, 1), 0, in_sync=True)
    return found


class JoinSuite:
    """Copies are taken in in many transactions, and seen as whole only after the last."""

    def test_a_new_table_is_filled_in_place(self, destination: Destination) -> None:
        copied = take_in(destination, FIRST, NUMBERS, [row(1, "1"), row(2, "2"), row(3, "x")])
        assert destination.models("shop")["shop.t"].state == "joining"
        assert destination.progress("shop") is None
        attach(destination, copied, NUMBERS)
        state = destination.models("shop")["shop.t"]
        assert (state.state, state.offset, state.open_records) == ("in_sync", 10, 1)
        assert destination.progress("shop") == Mark(LOG, 10, "h10")
        assert table(destination) == [(1, 1), (2, 2)]
        destination.apply(slice_of(10, (NUMBERS, [row(2, "3")])))
        assert table(destination) == [(1, 1), (2, 3)]

    @pytest.mark.parametrize("model", [NUMBERS, BAG], ids=["key", "bag"])
    def test_a_live_table_goes_on_until_what_differs_is_exchanged(
        self, destination: Destination, model: RowModel
    ) -> None:
        first = replace(FIRST, version=model.version)
        rows = [row(1, "1"), row(2, "2"), row(2, "2"), row(3, "x"), row(4, None)]
        attach(destination, take_in(destination, first, model, list(rows)), model)
        second = replace(SECOND, version=model.version)
        copied = take_in(destination, second, model, [row(1, "1"), row(2, "7"), row(4, "x"), row(5, "5")])
        live = [(1, 1), (2, 2), *([(2, 2)] if model is BAG else []), (4, None)]
        destination.apply(slice_of(10, (model, [row(6, "6")]), size=10))
        assert table(destination) == [*live, (6, 6)]
        opened = "SELECT key, commit FROM headrace.quarantine WHERE status = 'quarantined'"
        ((key, _),) = before = table(destination, opened)
        with armed("destination.join.attach=raise"), pytest.raises(OSError, match="attach"):
            attach(destination, copied, model)
        assert (table(destination), table(destination, opened)) == ([*live, (6, 6)], before)
        found = attach(destination, copied, model)
        assert table(destination) == [(1, 1), (2, 7), (5, 5)]
        # 4 and 6 go and 5 comes; 2 has another row, and with it another key where there is no key.
        assert found == (Difference(2, 3, 0) if model is BAG else Difference(1, 2, 1))
        ((other, _),) = table(destination, opened)
        assert key != other
        books = "SELECT sum(quarantined)::BIGINT FROM headrace.ledger WHERE kind <> 'void'"
        assert table(destination, books) == [(1,)]

    def test_a_rebuild_exchanges_what_differs_and_tells_it(self, destination: Destination) -> None:
        attach(
            destination,
            take_in(destination, FIRST, NUMBERS, [row(1, "1"), row(2, "2"), row(3, "3")]),
            NUMBERS,
        )
        live, counted = (
            table(destination),
            "SELECT sum(read)::BIGINT FROM headrace.ledger WHERE kind <> 'void'",
        )
        read = table(destination, counted)
        for why in ("dry run", "rebuild"):
            again = replace(FIRST, stands=10, why=why)
            copied = take_in(
                destination, again, NUMBERS, [row(1, "1"), row(2, "7"), row(4, "4"), row(5, "x")]
            )
            assert table(destination) == live
            assert attach(destination, copied, NUMBERS) == Difference(1, 1, 1)
            rebuilt = why == "rebuild"
            assert table(destination) == ([(1, 1), (2, 7), (4, 4)] if rebuilt else live)
            opened = "SELECT count(*) FROM headrace.quarantine WHERE status = 'quarantined'"
            assert table(destination, opened) == [(int(rebuilt),)]
            assert table(destination, counted) == read, "the same rows are read once"
        told = "SELECT dry_run, rows, open_records, added, removed, changed, examples FROM headrace.rebuilds"
        (first, *facts, examples), (second, *_) = table(destination, told)
        assert (first, second, facts) == (True, False, [3, 1, 1, 1, 1])
        shown = {item["key"]: (item["how"], item["before"], item["after"]) for item in json.loads(examples)}
        assert shown == {
            "2": ("changed", [{"id": "2", "v": "2"}], [{"id": "2", "v": "7"}]),
            "3": ("removed", [{"id": "3", "v": "3"}], []),
            "4": ("added", [], [{"id": "4", "v": "4"}]),
        }
        assert destination.models("shop")["shop.t"].open_records == 1

    def test_the_keys_with_bad_changes_are_told_while_they_are_few(self, destination: Destination) -> None:
        joins = destination.joins
        attach(destination, take_in(destination, FIRST, NUMBERS, [row(1, "1")]), NUMBERS)
        again = replace(FIRST, stands=10, why="rebuild", phase="newest")
        joins.start(again, NUMBERS)
        assert joins.bad_keys(again, 0) == pa.array([], pa.string())
        rows = [row(1, "x"), row(2, "2"), row(3, "y"), row(3, "z")]
        joins.step(again, replace(again, offset=4), NUMBERS, [NUMBERS.prepare(staged(NUMBERS, rows, 0))])
        keys = joins.bad_keys(again, 2)
        assert keys is not None
        assert sorted(keys.to_pylist()) == ["1", "3"]
        assert joins.bad_keys(again, 1) is None

    def test_a_snapshot_stands_by_itself(self, destination: Destination) -> None:
        rows = [row(1, "1"), row(2, "2"), row(3, "3")]
        attach(destination, take_in(destination, FIRST, NUMBERS, rows), NUMBERS)
        live = table(destination)
        slices = [
            NUMBERS.prepare(staged(NUMBERS, cells, after))
            for after, cells in (
                (0, [row(1, "1"), row(2, "7"), row(5, "x")]),
                (3, [row(2, "8"), row(4, "x")]),
            )
        ]
        for into in (None, "then.t"):
            found = destination.joins.write_snapshot(NUMBERS, into, 10, iter(slices))
            assert (found.rows, found.open_records, found.difference) == (2, 2, Difference(1, 0, 1))
            assert [(example["how"], example["key"]) for example in found.examples] == [
                ("added", "3"),
                ("changed", "2"),
            ]
        assert table(destination, f"SELECT id, v FROM {destination.table_of('then.t')}") == [(1, 1), (2, 8)]
        assert table(destination) == live
        assert table(destination, "SELECT count(*) FROM headrace.joining") == [(0,)]
        assert set(destination.models("shop")) == {NUMBERS.name}
        for used in ("then.t", NUMBERS.name):
            with pytest.raises(UserError, match=f"There is a table {used}"):
                destination.joins.write_snapshot(NUMBERS, used, 10, iter(slices))
        with armed("destination.join.snapshot=raise"), pytest.raises(OSError, match="snapshot"):
            destination.joins.write_snapshot(NUMBERS, "then.other", 10, iter(slices))
        assert destination.joins.write_snapshot(NUMBERS, "then.other", 10, iter(slices)).rows == 2

    def test_a_join_that_is_given_up_leaves_nothing_behind(self, destination: Destination) -> None:
        attach(destination, take_in(destination, FIRST, NUMBERS, [row(1, "1"), row(2, "2")]), NUMBERS)
        take_in(destination, SECOND, NUMBERS, [row(7, "7"), row(8, "x")])
        again = replace(SECOND, begin=30, end=40, offset=30, target=40)
        found = attach(destination, take_in(destination, again, NUMBERS, [row(1, "1"), row(2, "2")]), NUMBERS)
        assert (found, table(destination)) == (Difference(), [(1, 1), (2, 2)])
        assert table(destination, "SELECT count(*) FROM headrace.joining") == [(0,)]

    def test_a_second_owner_is_refused_in_the_middle_of_a_join(self, destination: Destination) -> None:
        copied = take_in(destination, FIRST, NUMBERS, [row(1, "1"), row(2, "2")])
        prepared = NUMBERS.prepare(staged(NUMBERS, [row(9, "9")], 0))
        with pytest.raises(DestinationError, match="does not stand at"):
            destination.joins.step(FIRST, replace(FIRST, offset=4), NUMBERS, [prepared])
        with armed("destination.join.commit=raise"), pytest.raises(OSError, match="join"):
            destination.joins.step(copied, replace(copied, offset=11), NUMBERS, [prepared])
        assert destination.joins.of("shop") == {NUMBERS.name: copied}
        assert table(destination) == [(1, 1), (2, 2)]

    def test_names_that_are_long_have_room_beside_too(self, destination: Destination) -> None:
        long = replace(NUMBERS, name=f"{'s' * 40}.{'t' * 60}")
        first = replace(FIRST, model=long.name)
        attach(destination, take_in(destination, first, long, [row(1, "1"), row(2, "2")]), long)
        second = replace(SECOND, model=long.name)
        assert attach(destination, take_in(destination, second, long, [row(1, "1")]), long) == Difference(
            0, 1, 0
        )
        keys = pa.array(["1"])
        prepared = replace(long.prepare(staged(long, [row(1, "1")], 0)), removed=keys)
        assert destination.redrive(long, prepared)["resolved"] == 0
