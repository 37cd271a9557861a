"""The part of the suite about models whose key the source's key does not keep apart."""

# ruff: noqa: D102 - the name of a test says what it tests

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa
import pytest

from headrace.join import Join
from headrace.prepared import BEFORE_ALL, Contested, Refused
from headrace.protocols import Destination
from headrace.testing.destinations import Cells, model_of, row, shape, slice_of, staged, table
from headrace.transform.contested import uncontested
from headrace.transform.model import RowModel

KEYED = replace(
    model_of(
        "keyed",
        '/* headrace\nkey = ["v", "day"]\n*/ SELECT id::BIGINT AS id, v, day::DATE AS day FROM raw.shop.t',
        shape(("v", "text"), ("day", "date")),
    ),
    name="shop.keyed",
)
OPEN = "SELECT key, reason FROM headrace.quarantine WHERE status = 'quarantined' ORDER BY key"


def _cells(key: int, value: str, **more: str) -> Cells:
    return row(key, value, day="2026-01-02", **more)


def _apply(destination: Destination, after: int, rows: Sequence[Cells]) -> int:
    """Apply a slice as a lane does; returns where it ends."""

    def attempt(model: RowModel) -> object:
        return destination.apply(slice_of(after, (model, rows), size=len(rows)))

    uncontested(KEYED, attempt)
    return after + len(rows)


class UniqueSuite:
    """No two rows with one key."""

    def test_no_two_rows_have_one_key_when_a_transaction_ends(self, destination: Destination) -> None:
        target = destination.table_of(KEYED.name)
        held = f"SELECT id, v FROM {target} ORDER BY id"
        many = [_cells(n, f"v{n}") for n in range(10, 2_600)]  # more than a statement takes inline
        at = _apply(destination, 0, [_cells(1, "a"), _cells(2, "a"), _cells(3, "c"), *many])
        found = table(destination, f"{held} LIMIT 2"), table(destination, OPEN)
        assert found == ([(1, "a"), (3, "c")], [("2", "constraint.unique")])
        # 1 and 3 swap; what would take the key of a row that was not touched stays as it was.
        at = _apply(destination, at, [_cells(1, "c"), _cells(3, "a"), _cells(10, "v12"), _cells(11, "v10")])
        assert table(destination, f"{held} LIMIT 4") == [(1, "c"), (3, "a"), (10, "v10"), (11, "v11")]
        assert [key for key, _ in table(destination, OPEN)] == ["10", "11", "2"]
        stand = destination.models("shop")[KEYED.name]
        assert (stand.open_records, stand.offset) == (3, at)
        _apply(destination, at, [_cells(3, "", _op="d"), _cells(12, "", _op="d"), _cells(2, "e")])
        assert table(destination, f"{held} LIMIT 4") == [(1, "c"), (2, "e"), (10, "v10"), (11, "v11")]

    def test_what_is_contested_changes_nothing_and_is_redriven(self, destination: Destination) -> None:
        at = _apply(destination, 0, [_cells(1, "a"), _cells(2, "a")])
        history = staged(KEYED, [_cells(1, "a"), _cells(2, "a")], 0)
        again = replace(KEYED.prepare(history.slice(1)), removed=pa.array(["2"]))
        with pytest.raises(Contested) as caught:
            destination.redrive(KEYED, again)
        assert caught.value.refused == {KEYED.name: [Refused(0, 2, 2, None, BEFORE_ALL)]}
        assert [key for key, _ in table(destination, OPEN)] == ["2"]
        _apply(destination, at, [_cells(1, "", _op="d")])
        assert destination.redrive(KEYED, again) == {"resolved": 1, "still_quarantined": 0}
        assert table(destination, f"SELECT id, v FROM {destination.table_of(KEYED.name)}") == [(2, "a")]
        assert table(destination, OPEN) == []

    def test_a_copy_has_each_key_once(self, destination: Destination) -> None:
        begun = Join(KEYED.name, "shop", KEYED.version, 0, 4, 0, "copy", 0, 4)
        destination.joins.start(begun, KEYED)
        following = replace(begun, offset=2)
        for join, then, rows in (
            (begun, following, [_cells(1, "a"), _cells(2, "b")]),
            (following, replace(begun, offset=4), [_cells(3, "b"), _cells(4, "d")]),
        ):

            def attempt(
                model: RowModel, join: Join = join, then: Join = then, rows: Sequence[Cells] = rows
            ) -> object:
                prepared = model.prepare(staged(model, rows, join.offset))
                return destination.joins.step(join, then, model, [prepared])

            uncontested(KEYED, attempt)
        target = destination.table_of(KEYED.name)
        assert table(destination, f"SELECT id, v FROM {target} ORDER BY id") == [(1, "a"), (2, "b"), (4, "d")]
        assert table(destination, OPEN) == [("3", "constraint.unique")]
