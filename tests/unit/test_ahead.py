"""Preparing ahead: while a part is taken the next one is prepared, and no more than that."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pyarrow as pa
import pytest

from headrace.ahead import ahead
from headrace.change import Column, TableId, TableSchema
from headrace.protocols import Part
from headrace.transform.fold import NOTHING
from headrace.transform.model import mirror

MODEL = mirror("shop", TableSchema(TableId("public", "t"), (Column("id", "text"),), ("id",)))


def part(rows: int = 0) -> Part:
    return Part(MODEL, replace(NOTHING, rows=pa.table({"_source_key": ["k"] * rows})), in_sync=True)


@pytest.fixture
def preparer() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as made:
        yield made


def test_the_next_part_is_prepared_while_one_is_taken(preparer: ThreadPoolExecutor) -> None:
    begun = [threading.Event() for _ in range(3)]

    def prepare() -> Iterator[Part]:
        for event in begun:
            event.set()
            yield part()

    taken = ahead(preparer, prepare())
    next(taken)
    assert begun[1].wait(10)
    assert not begun[2].wait(0.2), "one ahead, and no more"
    assert len(list(taken)) == 2


def test_beside_a_large_part_there_is_none(
    preparer: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.ahead._LARGE_PART", part(1).prepared.rows.nbytes)
    second = threading.Event()

    def prepare() -> Iterator[Part]:
        yield part(2)
        second.set()
        yield part(1)

    taken = ahead(preparer, prepare())
    next(taken)
    assert not second.wait(0.2)
    assert len(list(taken)) == 1


def test_an_error_comes_after_the_parts_before_it(preparer: ThreadPoolExecutor) -> None:
    def prepare() -> Iterator[Part]:
        yield part()
        raise ValueError("the second")

    taken = ahead(preparer, prepare())
    next(taken)
    with pytest.raises(ValueError, match="the second"):
        next(taken)


def test_nothing_is_prepared_any_more_once_it_is_closed(preparer: ThreadPoolExecutor) -> None:
    """Whoever stops taking goes on with the staging that preparing reads."""
    begun, ended = threading.Event(), threading.Event()

    def prepare() -> Iterator[Part]:
        yield part()
        begun.set()
        ended.wait(0.3)
        ended.set()
        raise ValueError("nobody asks for it")

    taken = ahead(preparer, prepare())
    next(taken)
    assert begun.wait(10)
    taken.close()
    assert ended.is_set()
