"""The pgoutput decoder against messages encoded by hand, and against a model of it in plain Python."""

from __future__ import annotations

import gc
import os
import struct
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.change import TableId
from headrace.errors import MalformedMessage
from headrace.sources.postgres.pgoutput import (
    Decoder,
    Malformed,
    Message,
    Relation,
    RelationColumn,
    RelationSeen,
    Rows,
    Transaction,
    Truncate,
)
from headrace.sources.postgres.undecodable import Undecodable

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
ORDER, ITEM = ORDERS.id, ITEMS.id

EVERY_KIND = {
    "origin": origin(),
    "type": a_type(),
    "relation": described(ORDERS),
    "insert": insert(ORDER, "1", None, "große"),
    "update": update(ORDER, ["1", UNCHANGED, ""]),
    "update with key": update(ORDER, ["2", UNCHANGED, "x"], b"K", ["1", None, None]),
    "update with old": update(ORDER, ["2", UNCHANGED, "x"], b"O", ["1", "long", None]),
    "delete by key": delete(ORDER, b"K", ["1", None, None]),
    "delete with old": delete(ORDER, b"O", ["1", None, "x"]),
    "truncate": truncate(ORDER, ITEM, options=3),
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
        assert names[:4] == ["_op", "_serial", "_ordinal", "_lsn"]
        assert names[4 : 4 + width] == [c.name for c in event.relation.columns]
        extra = dict(zip(names[4 + width :], columns[4 + width :], strict=True))
        assert set(extra) <= {"_unchanged", "_before"}
        assert all(any(v is not None for v in column) for column in extra.values())
        none = [None] * event.batch.num_rows
        cells = list(zip(*columns[4 : 4 + width], strict=True)) or [()] * event.batch.num_rows
        rows += zip(
            *columns[:3], cells, extra.get("_unchanged", none), extra.get("_before", none), strict=True
        )
    return rows


def rows_after(*messages: bytes) -> list[tuple[Any, ...]]:
    return rows_of(opened(*messages).take()[1])


# -- rows ----------------------------------------------------------------------------------------------


def test_insert_has_values_nulls_and_empty_strings() -> None:
    assert rows_after(insert(ORDER, "1", None, ""), insert(ORDER, "2", "große", "x" * 5000)) == [
        ("c", 0, 1, ("1", None, ""), None, None),
        ("c", 0, 2, ("2", "große", "x" * 5000), None, None),
    ]


def test_a_batch_has_no_more_columns_than_it_needs() -> None:
    (rows,) = opened(insert(ITEM, "a")).take()[1]
    assert isinstance(rows, Rows)
    assert rows.relation == ITEMS
    assert str(rows.batch.schema) == "_op: string\n_serial: int64\n_ordinal: int64\n_lsn: int64\nsku: string"


def test_unchanged_is_not_null() -> None:
    assert rows_after(
        insert(ORDER, "1", "a", "b"), update(ORDER, ["1", UNCHANGED, UNCHANGED]), insert(ORDER, *"2ab")
    ) == [
        ("c", 0, 1, ("1", "a", "b"), None, None),
        ("u", 0, 2, ("1", None, None), ["_op", "größe"], None),
        ("c", 0, 3, ("2", "a", "b"), None, None),
    ]


def test_the_whole_old_tuple_is_the_before_map_and_fills_what_is_unchanged() -> None:
    changed = update(ORDER, ["2", UNCHANGED, UNCHANGED], b"O", ["1", "long", None])
    assert rows_after(insert(ORDER, *"123"), changed, insert(ORDER, *"456")) == [
        ("c", 0, 1, ("1", "2", "3"), None, None),
        ("u", 0, 2, ("2", "long", None), None, [("id", "1"), ("_op", "long"), ("größe", None)]),
        ("c", 0, 3, ("4", "5", "6"), None, None),
    ]


def test_an_old_key_is_the_before_map_and_fills_only_the_key() -> None:
    assert rows_after(update(ORDER, [UNCHANGED, UNCHANGED, "x"], b"K", ["1", None, None])) == [
        ("u", 0, 1, ("1", None, "x"), ["_op"], [("id", "1")]),
    ]


def test_what_even_the_old_tuple_does_not_tell_stays_unchanged() -> None:
    assert rows_after(update(ORDER, ["1", UNCHANGED, "x"], b"O", ["1", UNCHANGED, None])) == [
        ("u", 0, 1, ("1", None, "x"), ["_op"], [("id", "1"), ("größe", None)]),
    ]


def test_deletes_carry_their_key_or_their_old_row() -> None:
    assert rows_after(delete(ORDER, b"K", ["1", None, None]), delete(ORDER, b"O", ["2", "a", None])) == [
        ("d", 0, 1, ("1", None, None), None, None),
        ("d", 0, 2, ("2", "a", None), None, None),
    ]


def test_a_relation_may_have_no_columns() -> None:
    empty = Relation(5, "public", "empty", "n", ())
    assert rows_after(described(empty), insert(5), insert(5)) == [
        ("c", 0, 1, (), None, None),
        ("c", 0, 2, (), None, None),
    ]


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_any_buffer_is_read(wrap: Any) -> None:
    decoder = opened()
    message = wrap(insert(ITEM, "a"))
    decoder.push(message)
    if isinstance(message, bytearray):
        message[:] = b"overwritten"
    assert rows_of(decoder.take()[1]) == [("c", 0, 1, ("a",), None, None)]


def data(lsn: int, message: bytes) -> bytes:
    """An XLogData of the stream."""
    return b"w" + struct.pack(">QQq", lsn, lsn + 8, 5) + message


def test_a_row_has_the_lsn_of_its_message() -> None:
    decoder = opened()
    for message in (data(2**40, insert(ITEM, "a")), data(0, described(ORDERS)), data(9, insert(ITEM, "b"))):
        assert not decoder.push_data(message)
    decoder.push(insert(ITEM, "c"), 7)
    decoder.push_data(data(8, truncate(ITEM)))
    rows, emptied = decoder.take()[1]
    assert isinstance(rows, Rows)
    assert rows.batch["_lsn"].to_pylist() == [2**40, 9, 7]
    assert isinstance(emptied, Truncate)
    assert emptied.lsn == 8


@pytest.mark.parametrize("wrong", [b"", data(1, b""), data(1, b"")[:-1], b"k" + data(1, commit())[1:]])
def test_what_is_no_data_of_the_stream_is_refused(wrong: bytes) -> None:
    decoder = opened(insert(ITEM, "a"))
    for _ in range(2):
        with pytest.raises(MalformedMessage):
            decoder.push_data(wrong)
    assert rows_of(decoder.take()[1]) == [("c", 0, 1, ("a",), None, None)]


# -- transactions, messages, truncates -----------------------------------------------------------------


def test_a_transaction_has_the_end_of_its_commit_record() -> None:
    decoder = Decoder()
    for message in (begin(100, 7), commit(100, 108, 5), begin(200, 2**32 - 1), commit(200, 2**40, -1)):
        decoder.push(message)
    assert decoder.take() == (
        [Transaction(0, 108, 7, EPOCH + 5, 0), Transaction(1, 2**40, 2**32 - 1, EPOCH - 1, 0)],
        [],
    )


def test_every_event_has_an_ordinal() -> None:
    decoder = opened(insert(ORDER, *"123"), logical(), insert(ITEM, "a"), truncate(ITEM, ORDER), commit())
    transactions, events = decoder.take()
    assert transactions == [Transaction(0, 108, 7, EPOCH + 5, 4)]
    assert [(row[0], row[2]) for row in rows_of(events)] == [("c", 3), ("c", 1)]
    assert [e.ordinal for e in events if isinstance(e, Message | Truncate)] == [2, 4]


def test_rows_of_an_open_transaction_come_under_its_serial() -> None:
    decoder = opened(insert(ITEM, "a"))
    assert decoder.in_transaction
    transactions, events = decoder.take()
    assert transactions == []
    assert rows_of(events) == [("c", 0, 1, ("a",), None, None)]
    for message in (insert(ITEM, "b"), commit(), begin(), insert(ITEM, "c")):
        decoder.push(message)
    transactions, events = decoder.take()
    assert [(t.serial, t.rows) for t in transactions] == [(0, 2)]
    assert rows_of(events) == [("c", 0, 2, ("b",), None, None), ("c", 1, 1, ("c",), None, None)]


def test_messages_inside_and_outside_of_transactions() -> None:
    decoder = opened(logical(transactional=True), logical(transactional=False), commit())
    assert not decoder.in_transaction
    decoder.push(logical(b"", transactional=False, lsn=77))
    assert decoder.take()[1] == [
        Message(0, 1, "headrace", b"\x00beat", True, 55),
        Message(0, 2, "headrace", b"\x00beat", False, 55),
        Message(-1, 0, "headrace", b"", False, 77),
    ]


@pytest.mark.parametrize("options", [0, 1, 2, 3])
def test_a_truncate_closes_the_batches_it_names(options: int) -> None:
    decoder = opened(insert(ITEM, "a"), insert(ORDER, *"123"), truncate(ORDER, options=options))
    decoder.push(insert(ORDER, *"456"))
    events = decoder.take()[1]
    kinds = [(type(e).__name__, e.relation.name) if isinstance(e, Rows) else e for e in events]
    assert kinds == [
        ("Rows", "orders"),
        Truncate((ORDERS,), 0, 3, cascade=options in {1, 3}, restart_identity=options in {2, 3}, lsn=0),
        ("Rows", "items"),
        ("Rows", "orders"),
    ]


def test_an_origin_is_of_its_transaction_alone_and_types_are_dropped() -> None:
    decoder = opened(origin(), a_type(), commit(), begin(200), commit(200, 208))
    assert decoder.take() == (
        [Transaction(0, 108, 7, EPOCH + 5, 0, "elsewhere"), Transaction(1, 208, 7, EPOCH + 5, 0)],
        [],
    )


# -- relations -----------------------------------------------------------------------------------------


def test_a_relation_is_seen_once_and_again_when_it_changed() -> None:
    wider = replace(ITEMS, columns=(*ITEMS.columns, RelationColumn("qty", 23, -1, False)))
    decoder = Decoder()
    for message in (described(ITEMS), begin(), insert(ITEM, "a"), described(ITEMS), insert(ITEM, "b")):
        decoder.push(message)
    for message in (described(wider), insert(ITEM, "c", "1")):
        decoder.push(message)
    events = decoder.take()[1]
    assert events[0] == RelationSeen(ITEMS, -1, 0)
    assert events[2] == RelationSeen(wider, 0, 2)
    assert rows_of(events) == [
        ("c", 0, 1, ("a",), None, None),
        ("c", 0, 2, ("b",), None, None),
        ("c", 0, 3, ("c", "1"), None, None),
    ]


@pytest.mark.parametrize(
    "changed",
    [
        replace(ITEMS, name="articles"),
        replace(ITEMS, schema="public"),
        replace(ITEMS, replica_identity="i"),
        replace(ITEMS, columns=(replace(ITEMS.columns[0], type_oid=1043),)),
        replace(ITEMS, columns=(replace(ITEMS.columns[0], type_modifier=9),)),
        replace(ITEMS, columns=(replace(ITEMS.columns[0], is_key=False),)),
    ],
)
def test_every_part_of_a_relation_counts(changed: Relation) -> None:
    assert opened(described(changed)).take()[1] == [RelationSeen(changed, 0, 0)]


def test_a_name_that_moves_to_another_id_closes_the_batch_of_the_former() -> None:
    other = replace(ITEMS, id=5)
    decoder = opened(insert(ITEM, "a"), described(other), insert(5, "b"), insert(ITEM, "late"))
    events = decoder.take()[1]
    assert [e.relation.id for e in events if isinstance(e, Rows | RelationSeen)] == [ITEM, 5, 5, ITEM]
    decoder.push(described(ITEMS))
    assert decoder.take()[1] == [RelationSeen(ITEMS, 0, 3)]


def test_relations_are_told_apart_when_their_ids_share_a_slot() -> None:
    twin = replace(ITEMS, id=ITEM + 1024, name="twin")
    decoder = opened(described(twin), *(insert(id_, "a") for id_ in (ITEM, twin.id) * 3))
    events = decoder.take()[1]
    assert [(e.relation, e.batch.num_rows) for e in events if isinstance(e, Rows)] == [(ITEMS, 3), (twin, 3)]


def test_an_empty_schema_is_the_catalog() -> None:
    catalog = Relation(6, "pg_catalog", "t", "d", ())
    assert opened(described(replace(catalog, schema=""))).take()[1] == [RelationSeen(catalog, 0, 0)]


# -- limits --------------------------------------------------------------------------------------------


def test_a_batch_is_cut_at_its_rows() -> None:
    decoder = opened(*(insert(ITEM, k) for k in range(7)), max_batch_rows=3)
    assert decoder.pending_rows == 7
    events = decoder.take()[1]
    assert [e.batch.num_rows for e in events if isinstance(e, Rows)] == [3, 3, 1]
    assert [row[3] for row in rows_of(events)] == [(str(k),) for k in range(7)]


def test_a_batch_is_cut_at_its_bytes() -> None:
    decoder = opened(*(insert(ITEM, "x" * 100) for _ in range(5)), max_batch_bytes=256)
    assert [e.batch.num_rows for e in decoder.take()[1] if isinstance(e, Rows)] == [2, 2, 1]


def test_all_that_is_held_counts_as_pending() -> None:
    decoder = opened()
    held = [(decoder.pending_rows, decoder.pending_bytes)]
    assert held == [(0, 0)]
    changed = update(ITEM, ["y" * 50], b"O", ["x" * 100])
    for message in (
        insert(ITEM, "x" * 100),
        changed,
        update(ITEM, [UNCHANGED]),
        logical(b"z" * 100),
        commit(),
    ):
        decoder.push(message)
        held.append((decoder.pending_rows, decoder.pending_bytes))
    grown = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(held)]
    assert [rows for rows, _ in grown] == [1, 1, 1, 0, 0]
    assert all(
        low <= weight < low + 200 for low, (_, weight) in zip([100, 150, 1, 100, 1], grown, strict=True)
    )
    decoder.take()
    assert (decoder.pending_rows, decoder.pending_bytes) == (0, 0)


@pytest.mark.parametrize("limits", [{"max_batch_rows": 0}, {"max_batch_bytes": -1}])
def test_limits_are_positive(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        Decoder(**limits)


def test_arrow_owns_what_it_was_given() -> None:
    decoder = opened(*(insert(ORDER, k, None, "x" * k) for k in range(100)))
    (rows,) = decoder.take()[1]
    assert isinstance(rows, Rows)
    for k in range(1000):
        decoder.push(insert(ORDER, "z" * 50, "z", k))
    del decoder
    gc.collect()
    assert rows.batch.column(6).to_pylist() == ["x" * k for k in range(100)]


# -- malformed messages --------------------------------------------------------------------------------

SECRET = "4111-1111"

REFUSED = {
    "nothing": (b"", "of no length"),
    "unknown kind": (b"S" + bytes(8), "'S'"),
    "begin within a transaction": (begin(), "within a transaction"),
    "another commit": (commit(101), "another place"),
    "relation without its id": (described(ITEMS)[:4], "too early"),
}

PUT_ASIDE = {
    "unknown relation": (insert(9, SECRET), "relation 9 was never described"),
    "too many columns": (insert(ITEM, SECRET, SECRET), "2 columns, where the relation has 1"),
    "too few columns": (insert(ORDER, SECRET), "1 columns, where the relation has 3"),
    "negative count of columns": (insert(ITEM)[:6] + b"\xff\xff", "-1 columns"),
    "length beyond the end": (insert(ITEM)[:6] + b"\0\1t\x7f\xff\xff\xff" + SECRET.encode(), "too early"),
    "negative length": (insert(ITEM)[:6] + b"\0\1t\xff\xff\xff\xff", "negative"),
    "binary cell": (insert(ITEM)[:6] + b"\0\1b\0\0\0\1x", "neither text nor null"),
    "trailing bytes": (insert(ITEM, SECRET) + b"\0", "bytes follow"),
    "insert of an old tuple": (delete(ITEM, b"K", ["a"]).replace(b"D", b"I", 1), "new tuple"),
    "delete of a new tuple": (insert(ITEM, "a").replace(b"I", b"D", 1), "old tuple"),
    "delete of nothing": (insert(ITEM)[:5].replace(b"I", b"D", 1) + b"\0", "old tuple"),
    "update with two old tuples": (update(ITEM, ["a"], b"K", ["a"]).replace(b"N", b"O"), "new tuple"),
    "negative truncate": (b"T\xff\xff\xff\xff\0", "negative"),
    "huge truncate": (b"T\x7f\xff\xff\xff\0" + insert(ITEM)[1:5], "too early"),
    "unknown truncate": (truncate(9), "relation 9 was never described"),
    "huge message": (logical()[:-9] + b"\x7f\xff\xff\xff", "too early"),
    "negative message": (logical()[:-9] + b"\xff\xff\xff\xff", "negative"),
    "unterminated string": (b"Y\0\0\0\1public", "no end"),
    "name not UTF-8": (described(ITEMS).replace(b"sku", b"s\xffu"), "not UTF-8"),
    "replica identity": (described(replace(ITEMS, replica_identity="x")), "replica identity"),
    "negative columns": (described(replace(ITEMS, columns=()))[:-2] + b"\xff\xff", "negative"),
    "huge columns": (described(replace(ITEMS, columns=()))[:-2] + b"\x7f\xff", "too early"),
}


@pytest.mark.parametrize(("message", "what"), REFUSED.values(), ids=REFUSED)
def test_malformed_messages_are_refused_without_their_content(message: bytes, what: str) -> None:
    with pytest.raises(MalformedMessage, match=r"^pgoutput message .* at byte \d+: ") as caught:
        opened().push(message)
    assert what in str(caught.value)
    assert SECRET not in caught.value.paragraph()
    assert caught.value.remedy
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    "message",
    [insert(ITEM, "a"), update(ITEM, ["a"]), delete(ITEM, b"K", ["a"]), truncate(ITEM), logical(), commit()],
    ids="IUDTMC",
)
def test_what_belongs_into_a_transaction_is_refused_outside(message: bytes) -> None:
    decoder = opened(commit())
    with pytest.raises(MalformedMessage, match=r"outside of a transaction|without a begin"):
        decoder.push(message)


@pytest.mark.parametrize("message", [begin(), commit()], ids=["begin", "commit"])
def test_what_frames_a_transaction_is_refused_when_it_is_cut_short_or_has_more(message: bytes) -> None:
    for wrong in [*(message[:n] for n in range(len(message))), message + b"\0"]:
        decoder = Decoder() if message[:1] == b"B" else opened()
        with pytest.raises(MalformedMessage):
            decoder.push(wrong)
        assert decoder.take() == ([], [])


def aside_of(events: Iterable[object]) -> list[dict[str, Any]]:
    """Each message that was put aside."""
    return [row for event in events if isinstance(event, Malformed) for row in event.batch.to_pylist()]


@pytest.mark.parametrize(("message", "what"), PUT_ASIDE.values(), ids=PUT_ASIDE)
def test_a_malformed_message_of_a_transaction_is_put_aside_as_it_came(message: bytes, what: str) -> None:
    decoder = opened(insert(ORDER, "1", "a", "b"))
    decoder.push(message, 77)
    assert decoder.pending_bytes > len(message)
    decoder.push(insert(ORDER, "2", "a", "b"))
    decoder.push(commit())
    (transaction,), events = decoder.take()
    (aside,) = aside_of(events)
    assert what in aside["why"]
    assert SECRET not in aside["why"]
    kind = message[:1].decode()
    known = {each.id: (each.schema, each.name) for each in (ITEMS, ORDERS) if kind in "RIUD"}
    schema, name = known.get(int.from_bytes(message[1:5], "big"), (None, None))
    assert aside == {
        "_op": {"I": "c", "U": "u", "D": "d", "T": "t"}.get(kind),
        "_serial": 0,
        "_ordinal": 2,
        "_lsn": 77,
        "kind": kind,
        "relation": aside["relation"],
        "schema": schema,
        "name": name,
        "why": aside["why"],
        "message": message,
    }
    assert [row[2:4] for row in rows_of(events)] == [(1, ("1", "a", "b")), (3, ("2", "a", "b"))]
    assert transaction.rows == 3


@pytest.mark.parametrize("name", [name for name in EVERY_KIND if name != "commit"])
def test_every_message_is_put_aside_when_it_is_cut_short_or_has_more(name: str) -> None:
    message = EVERY_KIND[name]
    is_relation = message[:1] == b"R"
    for wrong in [*(message[:n] for n in range(5 if is_relation else 1, len(message))), message + b"\0"]:
        decoder = opened(wrong, commit() if is_relation else insert(ORDER, "1", "a", "b"))
        _, events = decoder.take()
        assert [row["message"] for row in aside_of(events)] == [wrong]
        assert len(rows_of(events)) == (not is_relation)


NO_TEXT = described(ITEMS).replace(b"sku", b"s\xffu")
NAMED = (ITEMS.schema, ITEMS.name)


def test_a_relation_that_cannot_be_read_puts_its_rows_aside_until_it_can() -> None:
    renamed = described(replace(ITEMS, name="other")).replace(b"sku", b"s\xffu")
    lost = [NO_TEXT, insert(ITEM, "lost"), truncate(ITEM, ORDER)]
    more = [insert(ORDER, "1", "a", "b"), renamed, described(ITEMS), insert(ITEM, "after")]
    _, events = opened(insert(ITEM, "before"), *lost, *more).take()
    aside = aside_of(events)
    assert [(row["kind"], row["_ordinal"]) for row in aside] == [("R", 2), ("I", 3), ("T", 4), ("R", 7)]
    assert {(row["schema"], row["name"], row["why"]) for row in aside} == {(*NAMED, "a string is not UTF-8")}
    rows = sorted(row[2:4] for row in rows_of(events))
    assert rows == [(1, ("before",)), (6, ("1", "a", "b")), (8, ("after",))]
    (emptied,) = [event for event in events if isinstance(event, Truncate)]
    assert [relation.name for relation in emptied.relations] == [ORDERS.name]


def test_a_relation_that_never_could_be_read_has_the_name_that_it_says() -> None:
    decoder = Decoder()
    for message in (begin(), NO_TEXT, insert(ITEM, "lost")):
        decoder.push(message)
    assert [(row["schema"], row["name"]) for row in aside_of(decoder.take()[1])] == [NAMED] * 2


ROWS = [
    insert(ORDER, "1", "a", "b"),
    insert(ITEM, "x"),
    delete(ITEM, b"K", ["x"]),
    update(ORDER, ["1", "b", "c"]),
]


@settings(max_examples=200)
@given(st.data())
def test_whatever_becomes_of_one_row_all_others_are_right(data: st.DataObject) -> None:
    messages = data.draw(st.lists(st.sampled_from(ROWS), min_size=2, max_size=8))
    at = data.draw(st.integers(0, len(messages) - 1))
    wrong = bytearray(messages[at])
    place = data.draw(st.integers(5, len(wrong)))
    wrong[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    decoder = opened(*messages[:at], bytes(wrong), *messages[at + 1 :])
    _, events = decoder.take()
    rows = {row[2]: row[3] for row in unchecked(events)}
    is_aside = at + 1 not in rows
    rows.pop(at + 1, None)
    assert rows == {row[2]: row[3] for row in rows_after(*messages) if row[2] != at + 1}
    assert [row["message"] for row in aside_of(events)] == [bytes(wrong)] * is_aside


def unchecked(events: Iterable[object]) -> list[tuple[Any, ...]]:
    """What `rows_of` gives, of rows with cells of any bytes."""
    return rows_of(
        Rows(event.relation, Undecodable().escape(TableId("", ""), event.batch))
        for event in events
        if isinstance(event, Rows)
    )


def test_after_an_error_nothing_more_is_decoded_and_nothing_before_is_lost() -> None:
    decoder = opened(insert(ITEM, "a"))
    with pytest.raises(MalformedMessage) as first:
        decoder.push(begin())
    for message in (insert(ITEM, "c"), commit()):
        with pytest.raises(MalformedMessage) as again:
            decoder.push(message)
        assert again.value.paragraph() == first.value.paragraph()
    assert rows_of(decoder.take()[1]) == [("c", 0, 1, ("a",), None, None)]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_errors_leak_no_memory() -> None:
    cell = "x" * 20_000

    def fail(times: int) -> None:
        for _ in range(times):
            decoder = opened(insert(ITEM, cell), update(ITEM, [UNCHANGED], b"O", [cell]))
            decoder.push(insert(ITEM, cell)[:-1])
            with pytest.raises(MalformedMessage):
                decoder.push(begin())

    fail(200)
    before = resident_bytes()
    fail(1000)
    assert resident_bytes() - before < 8 << 20


@given(st.lists(st.binary(max_size=60), min_size=1, max_size=4))
def test_random_bytes_raise_nothing_but_malformed_message(messages: list[bytes]) -> None:
    survive(messages)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid message with a few bytes replaced, removed or inserted after its kind."""
    message = bytearray(draw(st.sampled_from([*EVERY_KIND.values(), begin(), insert(ITEM, "a")])))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(min(1, len(message)), len(message)))
        message[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    return bytes(message)


@settings(max_examples=400)
@given(st.lists(mutated(), min_size=1, max_size=8))
def test_mutated_messages_raise_nothing_but_malformed_message(messages: list[bytes]) -> None:
    survive(messages)


def survive(messages: list[bytes]) -> None:
    decoder = opened(max_batch_rows=2)
    for message in messages:
        try:
            decoder.push(message)
        except MalformedMessage:
            break
    for event in decoder.take()[1]:
        if isinstance(event, Rows):
            event.batch.validate()  # not in full: values are not checked to be UTF-8


# -- round trip ----------------------------------------------------------------------------------------


@dataclass
class Model:
    """What the decoder is to make of a transaction's rows, said in the plainest way."""

    rows: dict[int, list[tuple[Any, ...]]] = field(default_factory=lambda: defaultdict(list))
    ordinals: int = 0

    def add(self, relation: Relation, op: str, new: Cells, kind: bytes, old: Cells) -> None:
        self.ordinals += 1
        columns = list(zip(relation.columns, new, old or new, strict=True))
        told = [(c, before) for c, _, before in columns if kind and (kind == b"O" or c.is_key)]
        if op == "d":
            cells, before = list(old), None
        else:
            known = dict(told) if op == "u" else {}
            cells = [known.get(c, now) if now is UNCHANGED else now for c, now, _ in columns]
            before = [(c.name, v) for c, v in told if v is not UNCHANGED] if op == "u" and kind else None
        unchanged = [c.name for (c, _, _), v in zip(columns, cells, strict=True) if v is UNCHANGED]
        shown = tuple(None if v is UNCHANGED else v for v in cells)
        self.rows[relation.id].append((op, 0, self.ordinals, shown, unchanged or None, before))


Change = tuple[Relation, str, list[object], bytes, list[object]]


@st.composite
def changes(draw: st.DrawFn) -> Change:
    """A row event: relation, operation, new cells, kind of the old tuple, old cells."""
    cell = st.one_of(st.none(), st.just(UNCHANGED), st.text(max_size=5), st.just("long " * 30))
    relation = draw(st.sampled_from([ORDERS, ITEMS]))
    width = len(relation.columns)
    cells = st.lists(cell, min_size=width, max_size=width)
    op = draw(st.sampled_from("cud"))
    kind = draw(st.sampled_from({"c": [b""], "u": [b"", b"K", b"O"], "d": [b"K", b"O"]}[op]))
    return relation, op, draw(cells), kind, draw(cells) if kind else []


def encoded(id_: int, op: str, new: Cells, kind: bytes, old: Cells) -> bytes:
    if op == "d":
        return delete(id_, kind, old)
    return update(id_, new, kind, old) if op == "u" else insert(id_, *new)


@settings(max_examples=300)
@given(
    st.lists(st.tuples(changes(), st.booleans()), max_size=40),
    st.integers(1, 12),
    st.sampled_from([1, 200, 1000, 1 << 20]),
)
def test_rows_come_out_as_the_model_says(
    steps: list[tuple[Change, bool]],
    max_batch_rows: int,
    max_batch_bytes: int,
) -> None:
    decoder, model, events = (
        opened(max_batch_rows=max_batch_rows, max_batch_bytes=max_batch_bytes),
        Model(),
        [],
    )
    for (relation, op, new, kind, old), taken in steps:
        model.add(relation, op, new, kind, old)
        decoder.push(encoded(relation.id, op, new, kind, old))
        if taken:
            events += decoder.take()[1]
    decoder.push(commit())
    transactions, rest = decoder.take()
    events += rest
    assert [t.rows for t in transactions] == [len(steps)]
    for relation in (ORDERS, ITEMS):
        decoded = [e for e in events if isinstance(e, Rows) and e.relation == relation]
        assert rows_of(decoded) == model.rows[relation.id]
        assert all(e.batch.num_rows <= max_batch_rows for e in decoded)
