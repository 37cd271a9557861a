"""Rows per second into the durable log over the stream, against `pg_recvlogical` on the same WAL."""

from __future__ import annotations

from typing import Any

import catchup

CASES = ("streaming",)
STREAM_ONLY = 'peek_temp_max = "0B"\n'  # never in bulk


def run(*, quick: bool, case: str | None = None) -> dict[str, Any]:
    assert case in (None, *CASES)
    rows, times = (200_000, 2) if quick else (1_000_000, 5)
    return {
        "unit": "rows/s",
        "cases": {"streaming": catchup.measure("small_tx", rows, times, STREAM_ONLY)},
    }
