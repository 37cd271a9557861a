"""Where copied rows may stand between the streamed changes."""

from __future__ import annotations

from headrace.change import CopyMark, Position, TableId
from headrace.staging.copies import CopyHistory

ORDERS = TableId("public", "orders")


def test_a_span_may_end_between_a_chunk_of_a_copy_and_its_marker() -> None:
    history = CopyHistory()
    for offset, kind in (
        (10, "begin"),
        (13, "chunk"),
        (17, "chunk"),
        (18, "end"),
        (30, "begin"),
        (33, "chunk"),
    ):
        history.add(offset, ORDERS, Position(0, offset, 0), CopyMark(kind))  # type: ignore[arg-type]

    def between(after: int, through: int) -> bool:
        return history.between(ORDERS, after, through)

    assert between(10, 12), "its marker comes behind it"
    assert between(13, 16)
    assert between(11, 13)
    assert between(0, 40)
    assert not between(0, 9), "the copy has not begun"
    assert not between(18, 29)
    assert not between(33, 40)
    assert not history.between(TableId("public", "others"), 0, 40)
