"""Cells that are not UTF-8: each is kept, told from every other, and found again."""

from __future__ import annotations

import logging

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.change import TableId
from headrace.payload import BEFORE
from headrace.sources.postgres.undecodable import MARK, Undecodable, original, text_of

TABLE = TableId("public", "t")
CELLS = st.binary(max_size=12).filter(lambda cell: b"\0" not in cell)  # what a text of Postgres may hold


def strings(cells: list[bytes | None]) -> pa.Array:
    """A string column of these bytes, unchecked, as the decoder makes it."""
    binary = pa.array(cells, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(cells), binary.buffers())


@given(st.lists(st.none() | CELLS | st.text(max_size=5).map(str.encode), max_size=8), st.integers(0, 3))
def test_every_cell_is_found_again(cells: list[bytes | None], start: int) -> None:
    cells = [None if cell is None else cell.replace(b"\0", b"") for cell in cells]
    batch = pa.RecordBatch.from_arrays([strings(cells), pa.array(range(len(cells)))], ["v", "n"]).slice(start)
    kept = Undecodable().escape(TABLE, batch)
    kept.validate(full=True)
    assert kept.schema == batch.schema
    texts = kept.column(0).to_pylist()
    assert [None if text is None else original(text) for text in texts] == cells[start:]
    assert len(set(texts)) == len(set(cells[start:]))


@given(CELLS)
def test_what_is_utf8_is_left_alone(cell: bytes) -> None:
    try:
        expected = cell.decode()
    except UnicodeDecodeError:
        expected = f"\0\\x{cell.hex()}"
    assert text_of(cell) == expected
    assert original(expected) == cell


@pytest.mark.parametrize("start", [0, 1])
def test_old_values_are_kept_too_and_each_column_is_named_once(
    caplog: pytest.LogCaptureFixture, start: int
) -> None:
    rows = [None, [("a", b"\xff"), ("b", None)], [], [("a", b"ok"), ("b", "é".encode())]]
    binary = pa.array(rows, pa.map_(pa.string(), pa.binary()))
    items = binary.items
    entries = pa.Array.from_buffers(
        pa.struct([BEFORE.key_field, BEFORE.item_field]), len(items), [None],
        children=[binary.keys, pa.Array.from_buffers(pa.string(), len(items), items.buffers())],
    )  # fmt: skip
    before = pa.Array.from_buffers(BEFORE, len(rows), binary.buffers()[:2], children=[entries])
    batch = pa.RecordBatch.from_arrays([before], ["_before"]).slice(start)
    undecodable = Undecodable()
    with caplog.at_level(logging.WARNING):
        kept, _ = undecodable.escape(TABLE, batch), undecodable.escape(TABLE, batch)
    assert kept.schema == batch.schema
    expected = [None, [("a", MARK + "ff"), ("b", None)], [], [("a", "ok"), ("b", "é")]]
    assert kept.column(0).to_pylist() == expected[start:]
    assert caplog.text.count("NOT UTF-8: column _before of public.t") == 1


def test_what_needs_nothing_is_not_copied() -> None:
    for text in ("ascii", "größe"):
        batch = pa.RecordBatch.from_arrays([pa.array([text, None])], ["v"])
        assert Undecodable().escape(TABLE, batch) is batch
