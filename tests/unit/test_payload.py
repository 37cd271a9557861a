"""The payload of rows: what was written comes back, and LSNs cost little."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.payload import BEFORE, HEAD, UNCHANGED, decode_rows, encode_rows

LSNS = st.lists(st.integers(0, 2**63 - 1), max_size=20)


def batch_of(lsns: list[int]) -> pa.RecordBatch:
    n = len(lsns)
    numbers = {name: pa.array(range(n), pa.int64()) for name in HEAD[1:]}
    return pa.RecordBatch.from_pydict(
        {
            "_op": pa.array(["u"] * n, pa.string()),
            **numbers,
            "_lsn": pa.array(lsns, pa.int64()),
            "v": pa.array([None if k % 3 else "v" for k in range(n)], pa.string()),
            "_unchanged": pa.array([["v"]] * n, UNCHANGED),
            "_before": pa.array([[("v", None)]] * n, BEFORE),
        }
    )


@given(LSNS)
def test_what_was_written_comes_back(lsns: list[int]) -> None:
    batch = batch_of(lsns)
    assert decode_rows(encode_rows(batch)).equals(batch)


def test_a_slice_is_written_alone() -> None:
    batch = batch_of([5, 900, 7, 2**60])
    assert decode_rows(encode_rows(batch.slice(1, 2))).equals(batch.slice(1, 2))


def test_an_lsn_costs_a_byte_or_so() -> None:
    far = 10**12
    one, other = ([far + step * k for k in range(5000)] for step in (0, 136))
    growth = len(encode_rows(batch_of(other))) - len(encode_rows(batch_of(one)))
    assert growth < 2 * 5000


def test_what_is_no_payload_is_refused() -> None:
    with pytest.raises(pa.ArrowInvalid):
        decode_rows(b"no stream")
