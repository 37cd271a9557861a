"""The part of the suite about models whose rows refer to those of others."""

# ruff: noqa: D102 - the name of a test says what it tests

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa
import pytest

from headrace.prepared import BEFORE_ALL, Contested, Prepared, Reference, Refused
from headrace.protocols import Destination, Part
from headrace.rebuilding import folded
from headrace.testing.destinations import Cells, model_of, row, shape, slice_of, staged, table
from headrace.transform.model import RowModel
from headrace.waiting import Again, settled

_SHAPE = shape(("v", "text"), ("day", "date"), ("p", "bigint"))
_TEXT = "SELECT id::BIGINT AS id, v, day::DATE AS day, p::BIGINT AS p FROM raw.shop.t"
_PAIR = Reference("shop.child", "pair", ("v", "day"), "shop.parent", ("v", "day"), ("VARCHAR", "DATE"))
_UP = Reference("shop.child", "up", ("p",), "shop.child", ("id",), ("BIGINT",), (0,), cycle=True)
PARENT = replace(model_of("parent", _TEXT, _SHAPE), name="shop.parent", references=(_PAIR,))
CHILD = replace(model_of("child", _TEXT, _SHAPE), name="shop.child", references=(_PAIR, _UP))


def _cells(key: int, value: str | None, up: int | None = None, **more: str) -> Cells:
    return row(key, value, day="2026-01-02", p=None if up is None else str(up), **more)


class _Tables:
    """Parent and child in a destination, with all changes that were applied to them."""

    def __init__(self, destination: Destination) -> None:
        self.destination = destination
        self.given: dict[str, list[Cells]] = {PARENT.name: [], CHILD.name: []}
        self.apply([row(0, None, _op="d")])
        destination.waits.refold("shop", [], [_PAIR, _UP])

    def apply(self, parents: Sequence[Cells] = (), children: Sequence[Cells] = ()) -> None:
        """Apply a slice as a lane does; a model with fewer changes has deletes of a row that is not there."""
        after = len(self.given[PARENT.name])
        size = max(len(parents), len(children))
        nothing = [row(0, None, _op="d")]
        for model, rows in ((PARENT, parents), (CHILD, children)):
            self.given[model.name] += [*rows, *nothing * (size - len(rows))]

        def attempt(models: Sequence[RowModel], again: Again) -> object:
            work = slice_of(after, *((model, self.given[model.name][after:]) for model in models), size=size)
            more = (
                Part(model, prepared, True, refolded=True) for model, prepared in self.fold(models, again)
            )
            return self.destination.apply(replace(work, parts=(*work.parts, *more)))

        settled((PARENT, CHILD), attempt)

    def fold(self, models: Sequence[RowModel], again: Again) -> list[tuple[RowModel, Prepared]]:
        return [
            (model, folded(model, staged(model, self.given[model.name], 0), again[model.name]))
            for model in models
            if model.name in again
        ]

    def redrive(self) -> int:
        """Redrive what may pass; returns how many records did."""
        due = self.destination.waits.due("shop", [_PAIR, _UP], [], 10_000)
        assert not due.put_off

        def attempt(models: Sequence[RowModel], again: Again) -> dict[str, int]:
            return self.destination.waits.refold("shop", self.fold(models, again))

        return settled((PARENT, CHILD), attempt, due.ready)["resolved"] if due.ready else 0

    def children(self) -> list[int]:
        found = table(self.destination, f"SELECT id FROM {self.destination.table_of(CHILD.name)} ORDER BY 1")
        return [key for (key,) in found]

    def waiting(self) -> list[str]:
        found = table(
            self.destination, "SELECT key FROM headrace.quarantine WHERE status = 'waiting' ORDER BY 1"
        )
        return [key for (key,) in found]


class ReferenceSuite:
    """Every row refers to rows that are there."""

    def test_a_row_waits_for_what_it_refers_to(self, destination: Destination) -> None:
        tables = _Tables(destination)
        tables.apply([_cells(1, "a")], [_cells(1, "a"), _cells(2, "b"), _cells(3, None), _cells(4, "a", 2)])
        assert (tables.children(), tables.waiting()) == ([1, 3], ["2", "4"])
        assert tables.redrive() == 0
        many = [_cells(n, f"v{n}") for n in range(10, 2_600)]  # more than a statement takes inline
        tables.apply([_cells(2, "b")], many)
        assert len(tables.waiting()) == 2_592
        assert tables.redrive() == 2
        assert (tables.children(), len(tables.waiting())) == ([1, 2, 3, 4], 2_590)
        tables.apply([_cells(n, f"v{n}") for n in range(10, 2_600)])
        assert (tables.redrive(), tables.waiting()) == (2_590, [])
        stand = destination.models("shop")[CHILD.name]
        assert stand.open_records == 0
        # The parent goes; so does the row, and what refers to it in turn, and in the ledger, too.
        tables.apply([_cells(2, "b", _op="d")])
        assert (tables.children()[:3], tables.waiting()) == ([1, 3, 10], ["2", "4"])
        (sums,) = table(
            destination,
            "SELECT sum(waiting)::INT, sum(quarantined)::INT, sum(read - applied - superseded - filtered "
            "- quarantined - waiting - blocked)::INT FROM headrace.ledger",
        )
        assert sums == (2, 0, 0)

    def test_rows_that_need_each_other_pass_together(self, destination: Destination) -> None:
        tables = _Tables(destination)
        tables.apply([], [_cells(1, None, 2), _cells(3, None, 4), _cells(5, None, 5)])
        assert (tables.children(), tables.waiting()) == ([5], ["1", "3"])
        tables.apply([], [_cells(2, None, 3), _cells(6, None, 1)])
        assert (tables.redrive(), tables.children()) == (0, [5])
        tables.apply([], [_cells(4, None, 1)])
        assert (tables.redrive(), tables.children()) == (5, [1, 2, 3, 4, 5, 6])

    def test_what_is_contested_changes_nothing(self, destination: Destination) -> None:
        tables = _Tables(destination)
        tables.apply([_cells(1, "a")], [_cells(1, "a")])
        with pytest.raises(Contested) as caught:
            destination.apply(slice_of(2, (PARENT, [_cells(1, "", _op="d")]), (CHILD, [_cells(2, "b")])))
        assert caught.value.refused == {CHILD.name: [Refused(0, 3, 3, "pair", BEFORE_ALL)]}
        assert {name: keys.to_pylist() for name, keys in caught.value.dangling.items()} == {CHILD.name: ["1"]}
        assert (tables.children(), tables.waiting()) == ([1], [])

    def test_a_reference_is_put_off_while_its_models_stand_apart(self, destination: Destination) -> None:
        tables = _Tables(destination)
        tables.apply([_cells(1, "a")], [_cells(1, "a")])
        destination.suspend(PARENT.name, "shop", PARENT.version, "for a while")
        destination.apply(slice_of(2, (CHILD, [_cells(2, "b")])))
        assert tables.children() == [1, 2]
        off = "SELECT name FROM headrace.foreign_keys WHERE unchecked_since = 3"
        assert table(destination, off) == [("pair",)]
        assert not destination.waits.due("shop", [_PAIR], [], 100).put_off
        # Back in sync, all rows are judged, which is a transaction of its own.
        destination.apply(slice_of(2, (PARENT, [_cells(2, "c")])))
        assert table(destination, off) == [("pair",)]
        assert destination.waits.due("shop", [_PAIR], [], 100).put_off == [_PAIR]
        with pytest.raises(Contested) as caught:
            destination.waits.refold("shop", [], [_PAIR])
        assert caught.value.dangling[CHILD.name] == pa.array(["2"])

    def test_what_has_waited_for_too_long_is_one_new_issue(self, destination: Destination) -> None:
        tables = _Tables(destination)
        tables.apply([], [_cells(1, "a"), _cells(2, "b"), _cells(3, None, 1)])
        after = {CHILD.name: 900.0}
        assert destination.waits.expire("shop", [_PAIR, _UP], after) == []
        assert tables.waiting() == ["1", "2", "3"]
        (issue,) = destination.waits.expire("shop", [_PAIR, _UP], {CHILD.name: 0.0})
        destination.waits.expire("shop", [_PAIR, _UP], {CHILD.name: 0.0})
        assert table(destination, "SELECT key, status, issue FROM headrace.quarantine ORDER BY key") == [
            ("1", "quarantined", issue),
            ("2", "quarantined", issue),
            ("3", "waiting", issue),
        ]
        tables.apply([_cells(1, "a")])
        assert (tables.redrive(), tables.children()) == (2, [1, 3])
