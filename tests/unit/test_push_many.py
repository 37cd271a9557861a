"""Messages decoded from an Arrow array give what they give one by one."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import MalformedMessage
from headrace.sources.postgres.pgoutput import Decoder, Rows

RELATION = (
    b"R"
    + struct.pack(">I", 7)
    + b"public\0t\0d"
    + struct.pack(">h", 1)
    + b"\1id\0"
    + struct.pack(">Ii", 23, -1)
)


def transaction(number: int, values: list[bytes]) -> list[bytes]:
    begin = b"B" + struct.pack(">QqI", number * 100, 0, number)
    rows = [b"I" + struct.pack(">I", 7) + b"N\0\1t" + struct.pack(">i", len(v)) + v for v in values]
    return [begin, *rows, b"C" + struct.pack(">bQQq", 0, number * 100, number * 100 + 8, 5)]


def places(array: pa.Array) -> np.ndarray:
    """Any LSN for each message."""
    return np.arange(1000, 1000 + len(array))


def taken(decoder: Decoder) -> list[Any]:
    transactions, events = decoder.take()
    return [*transactions, *((e.relation, e.batch.to_pylist()) if isinstance(e, Rows) else e for e in events)]


@given(st.lists(st.lists(st.binary(max_size=9), max_size=5), max_size=6), st.data())
def test_an_array_is_as_good_as_its_messages(values: list[list[bytes]], data: st.DataObject) -> None:
    messages = [RELATION]
    for number, cells in enumerate(values):
        messages += transaction(number + 1, [cell.hex().encode() for cell in cells])
    one, many = Decoder(), Decoder()
    for lsn, message in enumerate(messages, 1000):
        one.push(message, lsn)
    junk = data.draw(st.integers(0, 3))
    array = pa.array([b"junk"] * junk + messages, pa.binary()).slice(junk)
    at, bound = 0, data.draw(st.integers(1, 2000))
    while at < len(array):
        reached = many.push_many(array, places(array), at, many.pending_bytes + bound)
        assert reached > at
        at = reached
    assert many.pending_bytes == one.pending_bytes
    assert taken(many) == taken(one)


def test_it_stops_behind_the_message_that_reaches_the_bound() -> None:
    decoder = Decoder()
    array = pa.array([RELATION, *transaction(1, [b"1", b"2"])], pa.binary())
    lsns = places(array)
    assert decoder.push_many(array, lsns, 0, 1) == 1
    assert decoder.push_many(array, lsns, 1, decoder.pending_bytes + 1) == 3
    assert decoder.pending_rows == 1
    assert decoder.push_many(array, lsns, 3) == 5
    assert decoder.push_many(array, lsns, 5) == 5


@pytest.mark.parametrize(
    ("array", "error"),
    [
        (pa.array([b"B"], pa.large_binary()), TypeError),
        (pa.array(["B"]), TypeError),
        (pa.array([None], pa.binary()), MalformedMessage),
        (pa.array([b""], pa.binary()), MalformedMessage),
        (pa.array([b"", b"B"], pa.binary()).slice(1), MalformedMessage),
    ],
)
def test_what_is_no_message_is_refused(array: pa.Array, error: type[Exception]) -> None:
    with pytest.raises(error):
        Decoder().push_many(array, places(array))


@pytest.mark.parametrize("start", [-1, 2])
def test_a_start_outside_is_refused(start: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        Decoder().push_many(pa.array([RELATION], pa.binary()), np.zeros(1, np.int64), start)


@pytest.mark.parametrize("count", [0, 2])
def test_every_message_has_an_lsn(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} LSNs for 1 messages"):
        Decoder().push_many(pa.array([RELATION], pa.binary()), np.zeros(count, np.int64))
