"""What the test against Debezium's engine does not reach: cells one by one, and where the state goes."""

from __future__ import annotations

import base64
import json
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.change import Column, Entry, Position, TableId, TableSchema
from headrace.debezium import Envelope
from headrace.debezium.values import converter
from headrace.payload import HEAD

TABLE = TableSchema(TableId("public", "t"), (Column("id", "integer"), Column("v", "text")), ("id",))


def convert(type_: str, *cells: str | None, base: str = "") -> list[Any]:
    found = converter(Column("v", type_, base), {})
    assert found is not None
    return found.cells(pa.array(cells, pa.string()))


@given(st.integers(0, 30), st.decimals(allow_nan=False, allow_infinity=False, places=3))
def test_a_decimal_is_its_unscaled_bytes(more: int, number: Decimal) -> None:
    (text,) = convert(f"numeric(60,{3 + more})", format(number, "f"))
    unscaled = int.from_bytes(base64.b64decode(text), "big", signed=True)
    assert Fraction(unscaled, 10 ** (3 + more)) == Fraction(number)


def test_numbers_may_be_longer_than_python_reads() -> None:
    (value,) = convert("numeric", "1" * 20_000)
    assert len(base64.b64decode(value["value"])) > 8000


def test_bytes_that_are_no_utf8_are_replaced_as_java_does() -> None:
    assert convert("text", "\0\\x61ff62", None, "ü") == ["a\ufffdb", None, "ü"]


@given(st.lists(st.none() | st.text(st.characters(exclude_characters="\0", codec="utf-8"))))
def test_every_array_of_text_is_read(values: list[str | None]) -> None:
    parts = ["NULL" if v is None else '"' + v.replace("\\", "\\\\").replace('"', '\\"') + '"' for v in values]
    assert convert("text[]", "{" + ",".join(parts) + "}", base="array") == [values]


@pytest.mark.parametrize(
    ("type_", "base"),
    [("public.pair", "composite"), ("int4multirange", "range"), ("xid", ""), ("public.x", "")],
)
def test_what_has_no_converter_is_left_out(type_: str, base: str) -> None:
    assert converter(Column("v", type_, base), {}) is None


def batch(commits: list[int]) -> pa.RecordBatch:
    n = len(commits)
    numbers = {name: pa.array([1] * n, pa.int64()) for name in HEAD[1:]}
    cells = {name: pa.array(["1"] * n, pa.string()) for name in ("id", "v")}
    return pa.RecordBatch.from_pydict(
        {"_op": pa.array(["c"] * n), **numbers, "_commit": pa.array(commits, pa.int64()), **cells}
    )


def sequences(envelope: Envelope, commits: list[int]) -> list[int | None]:
    found = []
    for event in envelope.rows(TABLE, batch(commits)):
        assert event.value is not None
        found.append(json.loads(event.value["source"]["sequence"])[0])
    return [None if first is None else int(first) for first in found]


def test_a_sequence_begins_with_the_commit_before_whatever_comes_first() -> None:
    envelope = Envelope("p", "d")
    envelope.see(0, [20, 10, 30])
    assert sequences(envelope, [20, 20, 30]) == [10, 10, 20]
    assert sequences(envelope, [10, 30]) == [None, 20]
    envelope.see(0, [50, 40])
    assert sequences(envelope, [40, 50]) == [30, 40]
    with pytest.raises(ValueError, match="`see`"):
        sequences(envelope, [45])
    envelope = Envelope("p", "d", last_commit=(0, 5))
    envelope.see(0, [10])
    assert sequences(envelope, [10]) == [5]


def test_a_group_may_have_any_number_of_transactions() -> None:
    envelope = Envelope("p", "d", last_commit=(0, 5))
    envelope.see(0, np.arange(10, 2_000_010, 10)[::-1])
    assert sequences(envelope, [10, 20, 30, 2_000_000]) == [5, 10, 20, 1_999_990]
    envelope.see(0, [2_000_010])
    assert sequences(envelope, [2_000_010]) == [2_000_000]


def test_a_new_epoch_has_no_commit_before_its_first() -> None:
    envelope = Envelope("p", "d", last_commit=(0, 5))
    envelope.see(0, [10, 900])
    envelope.see(1, [20, 30])
    assert sequences(envelope, [20, 30]) == [None, 20]
    envelope = Envelope("p", "d", last_commit=(0, 5))
    envelope.see(1, [20])
    assert sequences(envelope, [20]) == [None]


def test_a_message_outside_of_a_transaction_counts_as_a_commit() -> None:
    envelope = Envelope("p", "d")
    envelope.see(0, [15, 20])
    told = {"prefix": "a", "content": "b", "lsn": 15, "txid": 0}
    at = Position(0, 16, 0)
    made = envelope.message(Entry("message", None, at, at, 1, 0, 0, json.dumps(told).encode()))
    assert made.value is not None
    assert (made.topic, made.key) == ("p.message", {"prefix": "a"})
    assert made.value["source"]["sequence"] == '["15","15"]'
    assert sequences(envelope, [20]) == [15]
