"""The pgoutput decoder against messages encoded by hand, and against a model of it in plain Python."""

from __future__ import annotations

import gc
import os
import struct
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import MalformedMessage
from headrace.sources.postgres.pgoutput import (
    Decoder,
    Message,
    Relation,
    RelationColumn,
    RelationSeen,
    Rows,
    Transaction,
    Truncate,
)

EPOCH = 946_684_800_000_000
UNCHANGED = object()
Cells = Sequence[object]


# -- messages, field by field as the manual has them ---------------------------------------------------


def string(text: str) -> bytes:
    return text.encode() + b"\0"


def begin(commit_lsn: int = 100, xid: int = 7) -> bytes:
    return b"B" + struct.pack(">QqI", commit_lsn, 0, xid)


def commit(commit_lsn: int = 100, end_lsn: int = 108, at: int = 5) -> bytes:
    return b"C" + struct.pack(">bQQq", 0, commit_lsn, end_lsn, at)


def origin() -> bytes:
    return b"O" + struct.pack(">Q", 9) + string("elsewhere")


def a_type() -> bytes:
    return b"Y" + struct.pack(">I", 70_000) + string("public") + string("mood")


def described(relation: Relation) -> bytes:
    head = struct.pack(">I", relation.id) + string(relation.schema) + string(relation.name)
    columns = b"".join(
        struct.pack(">b", c.is_key) + string(c.name) + struct.pack(">Ii", c.type_oid, c.type_modifier)
        for c in relation.columns
    )
    return (
        b"R" + head + relation.replica_identity.encode() + struct.pack(">h", len(relation.columns)) + columns
    )


def a_tuple(cells: Cells) -> bytes:
    def cell(value: object) -> bytes:
        if value is None or value is UNCHANGED:
            return b"n" if value is None else b"u"
        text = str(value).encode()
        return b"t" + struct.pack(">i", len(text)) + text

    return struct.pack(">h", len(cells)) + b"".join(map(cell, cells))


def insert(id_: int, *cells: object) -> bytes:
    return b"I" + struct.pack(">I", id_) + b"N" + a_tuple(cells)


def update(id_: int, new: Cells, kind: bytes = b"", old: Cells = ()) -> bytes:
    before = kind + a_tuple(old) if kind else b""
    return b"U" + struct.pack(">I", id_) + before + b"N" + a_tuple(new)


def delete(id_: int, kind: bytes, old: Cells) -> bytes:
    return b"D" + struct.pack(">I", id_) + kind + a_tuple(old)


def truncate(*ids: int, options: int = 0) -> bytes:
    return b"T" + struct.pack(f">ib{len(ids)}I", len(ids), options, *ids)


def logical(content: bytes = b"\x00beat", transactional: bool = True, lsn: int = 55) -> bytes:
    return (
        b"M"
        + struct.pack(">bQ", transactional, lsn)
        + string("headrace")
        + struct.pack(">i", len(content))
        + content
    )


# -- what the tests share ------------------------------------------------------------------------------

ORDERS = Relation(
    id=3_000_000_001,
    schema="public",
    name="orders",
    replica_identity="d",
    columns=(
        RelationColumn("id", 20, -1, True),
        RelationColumn("_op", 25, -1, False),
        RelationColumn("größe", 1043, 54, False),
    ),
)
ITEMS = Relation(16_400, "sales", "items", "f", (RelationColumn("sku", 25, -1, True),))
O, I = ORDERS.id, ITEMS.id  # noqa: E741

EVERY_KIND = {
    "origin": origin(),
    "type": a_type(),
    "relation": described(ORDERS),
    "insert": insert(O, "1", None, "große"),
    "update": update(O, ["1", UNCHANGED, ""]),
    "update with key": update(O, ["2", UNCHANGED, "x"], b"K", ["1", None, None]),
    "update with old": update(O, ["2", UNCHANGED, "x"], b"O", ["1", "long", None]),
    "delete by key": delete(O, b"K", ["1", None, None]),
    "delete with old": delete(O, b"O", ["1", None, "x"]),
    "truncate": truncate(O, I, options=3),
    "message": logical(),
    "commit": commit(),
}


def opened(*messages: bytes, **limits: int) -> Decoder:
    """A decoder inside a transaction that knows both relations, and has nothing pending."""
    decoder = Decoder(**limits)
    for message in (begin(), described(ORDERS), described(ITEMS)):
        decoder.push(message)
    decoder.take()
    for message in messages:
        decoder.push(message)
    return decoder


def rows_of(events: Iterable[object]) -> list[tuple[Any, ...]]:
    """Each row: operation, serial, ordinal, cells, unchanged, before."""
    rows: list[tuple[Any, ...]] = []
    for event in events:
        if not isinstance(event, Rows):
            continue
        event.batch.validate(full=True)
        width = len(event.relation.columns)
        names, columns = event.batch.schema.names, [c.to_pylist() for c in event.batch.columns]
        assert names[:3] == ["_op", "_serial", "_ordinal"]
        assert names[3 : 3 + width] == [c.name for c in event.relation.columns]
        extra = dict(zip(names[3 + width :], columns[3 + width :], strict=True))
        assert set(extra) <= {"_unchanged", "_before"}
        assert all(any(v is not None for v in column) for column in extra.values())
        none = [None] * event.batch.num_rows
        cells = list(zip(*columns[3 : 3 + width], strict=True))
        rows += zip(
            *columns[:3], cells, extra.get("_unchanged", none), extra.get("_before", none), strict=True
        )
    return rows


def rows_after(*messages: bytes) -> list[tuple[Any, ...]]:
    return rows_of(opened(*messages).take()[1])


# -- rows ----------------------------------------------------------------------------------------------


def test_insert_has_values_nulls_and_empty_strings() -> None:
    assert rows_after(insert(O, "1", None, ""), insert(O, "2", "große", "x" * 5000)) == [
        ("c", 0, 1, ("1", None, ""), None, None),
        ("c", 0, 2, ("2", "große", "x" * 5000), None, None),
    ]


def test_a_batch_has_no_more_columns_than_it_needs() -> None:
    (rows,) = opened(insert(I, "a")).take()[1]
    assert isinstance(rows, Rows)
    assert rows.relation == ITEMS
    assert str(rows.batch.schema) == "_op: string\n_serial: int64\n_ordinal: int64\nsku: string"


def test_unchanged_is_not_null() -> None:
    assert rows_after(insert(O, "1", "a", "b"), update(O, ["1", UNCHANGED, UNCHANGED]), insert(O, *"2ab")) == [
        ("c", 0, 1, ("1", "a", "b"), None, None),
        ("u", 0, 2, ("1", None, None), ["_op", "größe"], None),
        ("c", 0, 3, ("2", "a", "b"), None, None),
    ]


def test_the_whole_old_tuple_is_the_before_map_and_fills_what_is_unchanged() -> None:
    changed = update(O, ["2", UNCHANGED, UNCHANGED], b"O", ["1", "long", None])
    assert rows_after(insert(O, *"123"), changed, insert(O, *"456")) == [
        ("c", 0, 1, ("1", "2", "3"), None, None),
        ("u", 0, 2, ("2", "long", None), None, [("id", "1"), ("_op", "long"), ("größe", None)]),
        ("c", 0, 3, ("4", "5", "6"), None, None),
    ]


def test_an_old_key_is_the_before_map_and_fills_only_the_key() -> None:
    assert rows_after(update(O, [UNCHANGED, UNCHANGED, "x"], b"K", ["1", None, None])) == [
        ("u", 0, 1, ("1", None, "x"), ["_op"], [("id", "1")]),
    ]


def test_what_even_the_old_tuple_does_not_tell_stays_unchanged() -> None:
    assert rows_after(update(O, ["1", UNCHANGED, "x"], b"O", ["1", UNCHANGED, None])) == [
        ("u", 0, 1, ("1", None, "x"), ["_op"], [("id", "1"), ("größe", None)]),
    ]


def test_deletes_carry_their_key_or_their_old_row() -> None:
    assert rows_after(delete(O, b"K", ["1", None, None]), delete(O, b"O", ["2", "a", None])) == [
        ("d", 0, 1, ("1", None, None), None, None),
        ("d", 0, 2, ("2", "a", None), None, None),
    ]


def test_a_relation_may_have_no_columns() -> None:
    empty = Relation(5, "public", "empty", "n", ())
    assert rows_after(described(empty), insert(5), insert(5)) == [
        ("c", 0, 1, (), None, None),
        ("c", 0, 2, (), None, None),
    ][:0] or [r[:3] for r in numbered(opened(described(empty), insert(5), insert(5)))] == [
        ("c", 0, 1),
        ("c", 0, 2),
    ]


def numbered(decoder: Decoder) -> list[tuple[Any, ...]]:
    """Operation, serial and ordinal of each row."""
    batches = [e.batch for e in decoder.take()[1] if isinstance(e, Rows)]
    return [row for b in batches for row in zip(*(c.to_pylist() for c in b.columns[:3]), strict=True)]
