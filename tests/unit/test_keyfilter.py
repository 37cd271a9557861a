"""Key filters: none says no to a key that is there, few say yes to one that is not."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.keyfilter import key_filter, may_hold
from headrace.payload import BEFORE

CELLS = st.one_of(st.none(), st.text(max_size=12))


@given(rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=300), data=st.data())
def test_every_key_that_is_there_may_be(
    rows: list[tuple[str | None, str | None]], data: st.DataObject
) -> None:
    columns = [pa.array(cells, pa.string()) for cells in zip(*rows, strict=True)]
    batch = pa.RecordBatch.from_arrays(columns, names=["a", "b"])
    begin = data.draw(st.integers(0, len(rows) - 1))
    part = key_filter(batch.slice(begin), ["b", "a"])
    assert all(may_hold(part, (b, a)) for a, b in rows[begin:])


def test_keys_before_a_change_are_in_it_too() -> None:
    before = pa.array([[("id", "old"), ("v", "x")], None, [("v", "y")]], BEFORE)
    batch = pa.RecordBatch.from_arrays([pa.array(["new", "2", "3"]), before], names=["id", "_before"])
    held = key_filter(batch, ["id"])
    assert all(may_hold(held, (key,)) for key in ("old", "new", "2", "3"))
    assert not may_hold(held, ("x",))


def test_few_keys_that_are_not_there_may_be() -> None:
    batch = pa.RecordBatch.from_arrays([pa.array(map(str, range(10_000)))], names=["id"])
    held = key_filter(batch, ["id"])
    assert len(held) < 1.6 * 10_000
    assert sum(may_hold(held, (f"no {i}",)) for i in range(20_000)) < 300


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a", "b"), ("ab", "")),
        (("a", None), ("a", "")),
        ((None, "a"), ("a", None)),
        (("1", "2"), ("2", "1")),
    ],
)
def test_cells_of_a_key_do_not_run_together(one: tuple[str, str], other: tuple[str, str]) -> None:
    columns = [pa.array([cell], pa.string()) for cell in one]
    held = key_filter(pa.RecordBatch.from_arrays(columns, names=["a", "b"]), ["a", "b"])
    assert may_hold(held, one)
    assert not may_hold(held, other)


def test_without_a_key_or_rows_a_filter_tells_nothing() -> None:
    batch = pa.RecordBatch.from_arrays([pa.array(["1"])], names=["id"])
    assert key_filter(batch, []) == key_filter(batch.slice(0, 0), ["id"]) == b""
    assert may_hold(b"", ("1",))
