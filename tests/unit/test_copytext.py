"""COPY's text format, against an encoder of our own, and against rows that no server sends."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import MalformedMessage
from headrace.sources.postgres.copytext import MAX_BATCH_BYTES, TextReader

LETTERS = {"\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t", "\v": "v", "\\": "\\"}
Row = Sequence[str | None]


def line(row: Row) -> bytes:
    def field(cell: str | None) -> str:
        if cell is None:
            return "\\N"
        return "".join("\\" + LETTERS[letter] if letter in LETTERS else letter for letter in cell)

    return ("\t".join(map(field, row)) + "\n").encode()


def names(width: int) -> list[str]:
    return [f"c{i}" for i in range(width)]


def read(lines: Sequence[bytes], width: int, **limits: int) -> list[pa.RecordBatch]:
    reader = TextReader(names(width), **limits)
    batches = [reader.take() for row in lines if reader.push(row)]
    batches = [*batches, reader.take()]
    found = [batch for batch in batches if batch is not None]
    for batch in found:
        batch.validate(full=True)
    return found


def cells(batches: Sequence[pa.RecordBatch]) -> list[tuple[str | None, ...]]:
    return [tuple(row.values()) for batch in batches for row in batch.to_pylist()]


NASTY = st.text(st.sampled_from("\b\f\n\r\t\v\\N.ntx0 7é東🚰\x01\x7f"), max_size=40)
CELLS = st.none() | NASTY | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@given(st.data(), st.integers(1, 5), st.integers(1, 400))
def test_rows_come_back_as_they_were(data: st.DataObject, width: int, limit: int) -> None:
    rows = data.draw(st.lists(st.tuples(*[CELLS] * width), max_size=30))
    batches = read([line(row) for row in rows], width, max_bytes=limit)
    assert cells(batches) == rows
    assert all(batch.schema == pa.schema([(n, pa.string()) for n in names(width)]) for batch in batches)


@given(st.lists(st.binary(max_size=40) | st.text("\\\t\nNab", max_size=12).map(str.encode), max_size=5))
def test_any_bytes_are_read_or_refused(lines: list[bytes]) -> None:
    for width in range(4):
        reader = TextReader(names(width))
        try:
            for row in lines:
                reader.push(row)
        except MalformedMessage:
            continue
        assert all(row.count(b"\t") >= width - 1 and row.endswith(b"\n") for row in lines)
        batch = reader.take()
        assert (batch.num_rows if batch else 0) == len(lines)


@pytest.mark.parametrize(
    ("field", "meant"),
    [
        (b"", b""),
        (b"\\N", None),
        (b"\\\\N", b"\\N"),
        (b"\\Nx", b"Nx"),
        (b"x\\N", b"xN"),
        (b"\\\\", b"\\"),
        (b"\\b\\f\\n\\r\\t\\v", b"\b\f\n\r\t\v"),
        (b"\\.", b"."),
        (b"\\q\\7\\x41", b"q7x41"),
        (b"a\\\tb", b"a\tb"),
        (b"12345678\\n12345678\\n", b"12345678\n12345678\n"),
        (b"NULL", b"NULL"),
        (b"\r", b"\r"),
        (b"\xe4\xfc\xff", b"\xe4\xfc\xff"),
        (b"\x00", b"\x00"),
    ],
)
@pytest.mark.parametrize("place", range(3))
def test_every_kind_of_field(field: bytes, meant: bytes | None, place: int) -> None:
    fields = [b"before", b"between", b"behind"]
    fields[place] = field
    reader = TextReader(names(3))
    for _ in range(9):
        reader.push(b"\t".join(fields) + b"\n")
    batch = reader.take()
    expected = [field if i != place else meant for i, field in enumerate(fields)]
    assert [column.cast(pa.binary()).to_pylist() for column in batch.columns] == [[c] * 9 for c in expected]


@pytest.mark.parametrize("length", [*range(40), 63, 64, 65, 1000, 5_000_000])
def test_fields_of_any_length(length: int) -> None:
    rows = [("x" * length, None, "y" * length), ("\\" * length, "z", "\t" * length)]
    assert cells(read([line(row) for row in rows], 3)) == rows


def test_many_columns() -> None:
    rows = [tuple(None if (i + j) % 3 == 0 else f"{i}\t{j}" for j in range(1600)) for i in range(20)]
    assert cells(read([line(row) for row in rows], 1600, max_bytes=40_000)) == rows


@pytest.mark.parametrize("count", [1, 7, 8, 9, 15, 16, 17, 1000])
def test_nulls_stand_where_they_were(count: int) -> None:
    for at in {0, count // 2, count - 1}:
        rows = [(None if i == at else str(i),) for i in range(count)]
        (batch,) = read([line(row) for row in rows], 1)
        assert batch.column(0).null_count == 1
        assert cells([batch]) == rows


def test_without_a_row_there_is_no_batch() -> None:
    reader = TextReader(["a"])
    assert reader.take() is None
    reader.push(b"x\n")
    assert reader.take() is not None
    assert reader.take() is None


def test_a_batch_ends_with_the_row_that_fills_it() -> None:
    lines = [b"12345\t12345\n"] * 10
    row = len(lines[0]) + 2 * 4
    assert [batch.num_rows for batch in read(lines, 2, max_bytes=row)] == [1] * 10
    assert [batch.num_rows for batch in read(lines, 2, max_bytes=row + 1)] == [2] * 5
    assert [batch.num_rows for batch in read(lines, 2, max_bytes=3 * row)] == [3, 3, 3, 1]
    nulls = [b"\\N\n"] * 1000
    assert len(read(nulls, 1, max_bytes=700)) == 10, "what is null takes memory too"


def test_columns_of_earlier_batches_stay() -> None:
    lines = [line((str(i) * 100, None)) for i in range(50)]
    batches = read(lines, 2, max_bytes=500)
    assert cells(batches) == [(str(i) * 100, None) for i in range(50)]


def test_a_table_without_columns_has_rows() -> None:
    (batch,) = read([b"\n", b"\n"], 0)
    assert (batch.num_rows, batch.num_columns) == (2, 0)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (b"", "no newline at its end"),
        (b"a", "no newline at its end"),
        (b"a\tb", "no newline at its end"),
        (b"a\tb\\\n", "no newline at its end"),
        (b"a\tb\\", "no newline at its end"),
        (b"\n", "too few fields"),
        (b"a\n", "too few fields"),
        (b"\\N\n", "too few fields"),
        (b"a\tb\t\n", "too many fields"),
        (b"a\tb\tc\n", "too many fields"),
        (b"a\nb\n", "a newline before its end"),
        (b"a\tb\n\n", "a newline before its end"),
        (b"\n\n", "a newline before its end"),
        (b"\\N\n\\N\n", "a newline before its end"),
    ],
)
def test_a_malformed_row_is_refused_and_nothing_is_read_behind_it(row: bytes, what: str) -> None:
    reader = TextReader(["a", "b"])
    reader.push(b"1\t2\n")
    for again in (lambda: reader.push(row), lambda: reader.push(b"1\t2\n"), reader.take):
        with pytest.raises(MalformedMessage, match=rf"^Row 1 of a batch .* {re.escape(what)}\."):
            again()


def test_a_row_without_columns_has_no_field() -> None:
    for row in (b"a\n", b"", b"\t\n"):
        with pytest.raises(MalformedMessage):
            TextReader([]).push(row)


@pytest.mark.parametrize("limit", [0, -1, MAX_BATCH_BYTES + 1])
def test_limits_that_cannot_hold_are_refused(limit: int) -> None:
    with pytest.raises(ValueError, match="max_bytes"):
        TextReader(["a"], max_bytes=limit)
