"""Streamed transactions, encoded by hand: what is kept, what is replayed, what is refused."""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pgoutput import (
    EPOCH,
    EVERY_KIND,
    ITEM,
    ITEMS,
    ORDER,
    ORDERS,
    a_type,
    begin,
    commit,
    delete,
    described,
    insert,
    logical,
    mutated,
    origin,
    rows_of,
    truncate,
)

from headrace.change import Column, Entry, TableId, TableSchema
from headrace.config import source_config
from headrace.errors import MalformedMessage, SourceUnavailable, UserError
from headrace.payload import decode_rows
from headrace.secret import Secret
from headrace.sources.postgres import shapes, spool
from headrace.sources.postgres.columns import Policy
from headrace.sources.postgres.groups import GroupBuilder
from headrace.sources.postgres.pgoutput import (
    Decoder,
    Event,
    Malformed,
    Message,
    Relation,
    RelationColumn,
    RelationSeen,
    Rows,
    Transaction,
    Truncate,
)
from headrace.sources.postgres.roster import Roster
from headrace.sources.postgres.shapes import Shapes
from headrace.sources.postgres.spool import Spool, SpoolSpace, StreamedTransactions
from headrace.sources.postgres.stream import stream_options

WIDER = Relation(ITEM, ITEMS.schema, ITEMS.name, "f", (*ITEMS.columns, RelationColumn("qty", 23, -1, False)))


def start(xid: int = 7, *, first: bool = True) -> bytes:
    return b"S" + struct.pack(">I?", xid, first)


STOP = b"E"


def within(xid: int, message: bytes) -> bytes:
    """A message as it stands in a block."""
    return message[:1] + struct.pack(">I", xid) + message[1:]


def stream_commit(xid: int = 7, commit_lsn: int = 300, end_lsn: int = 308, at: int = 5) -> bytes:
    return b"c" + struct.pack(">IbQQq", xid, 0, commit_lsn, end_lsn, at)


def stream_abort(xid: int, subxid: int) -> bytes:
    return b"A" + struct.pack(">II", xid, subxid)


class Stream:
    """A decoder with its spool, fed message by message; what comes out is gathered."""

    def __init__(self, folder: Path, limit: int = 1 << 30, piece: int = 1 << 30) -> None:
        self.space = SpoolSpace("shop", folder, limit)
        self.streamed = StreamedTransactions(self.space)
        self.decoder = Decoder(spool=self.streamed)
        self.piece = piece
        self.pieces = 0
        self.transactions: list[Transaction] = []
        self.events: list[Event] = []

    def push(self, *messages: bytes) -> None:
        for message in messages:
            if not self.decoder.push(message):
                continue
            self.take()
            committed = self.streamed.take_committed()
            assert committed is not None
            if self.piece == 1 << 30:
                committed.replay_whole(self.decoder)
                self.take()
                continue
            for events in committed.replay(self.decoder, self.piece):
                self.events += events
                self.pieces += 1
            self.transactions.append(Transaction(committed.serial, committed.commit, committed.xid, 0, 0))

    def take(self) -> None:
        transactions, events = self.decoder.take()
        self.transactions += transactions
        self.events += events

    def block(self, xid: int, *messages: bytes, first: bool = False) -> None:
        self.push(start(xid, first=first), *messages, STOP)

    @property
    def cells(self) -> list[tuple[int, object]]:
        """The serial and the cells of each row, in order."""
        self.take()
        return [(row[1], row[3]) for row in rows_of(self.events)]


@pytest.fixture
def stream(tmp_path: Path) -> Stream:
    return Stream(tmp_path)


def item(xid: int, sku: str) -> bytes:
    return within(xid, insert(ITEM, sku))


def test_a_streamed_transaction_appears_at_its_commit(stream: Stream) -> None:
    stream.block(7, within(7, described(ITEMS)), item(7, "a"), first=True)
    stream.push(begin(100, 6), described(ITEMS), insert(ITEM, "small"), commit(100, 108))
    stream.block(7, item(7, "b"))
    assert stream.cells == [(0, ("small",))]
    stream.push(stream_commit(7, 300, 308, 9))
    assert stream.cells == [(0, ("small",)), (1, ("a",)), (1, ("b",))]
    assert stream.transactions[1:] == [Transaction(1, 308, 7, EPOCH + 9, 2)]
    stream.push(begin(400, 9), insert(ITEM, "later"), commit(400, 408))
    assert stream.cells[-1] == (2, ("later",))


def test_interleaved_transactions_come_in_the_order_of_their_commits(stream: Stream) -> None:
    for xid in (7, 8, 9):
        stream.block(xid, within(xid, described(ITEMS)), item(xid, f"{xid} first"), first=True)
    for xid in (8, 7, 9):
        stream.block(xid, item(xid, f"{xid} second"))
    stream.push(stream_commit(9), stream_abort(8, 8), stream_commit(7, 400, 408))
    rows = [cells for _, cells in stream.cells]
    assert rows == [("9 first",), ("9 second",), ("7 first",), ("7 second",)]
    assert [t.xid for t in stream.transactions] == [9, 7]
    assert stream.space.used == 0


def test_every_kind_of_message_is_replayed(stream: Stream) -> None:
    stream.block(
        7,
        origin(),
        within(7, described(ITEMS)),
        within(7, described(ORDERS)),
        within(7, a_type()),
        item(7, "a"),
        within(7, logical(b"beat")),
        within(7, truncate(ITEM)),
        within(7, delete(ORDER, b"K", ["1", None, None])),
        first=True,
    )
    stream.push(stream_commit())
    stream.take()
    assert [event for event in stream.events if not isinstance(event, Rows)] == [
        RelationSeen(ITEMS, 0, 0),
        RelationSeen(ORDERS, 0, 0),
        Message(0, 2, "headrace", b"beat", True, 55),
        Truncate((ITEMS,), 0, 3, cascade=False, restart_identity=False, lsn=0),
    ]
    assert [(row[0], row[2]) for row in rows_of(stream.events)] == [("c", 1), ("d", 4)]
    assert stream.transactions == [Transaction(0, 308, 7, EPOCH + 5, 4, "elsewhere")]


def test_what_a_subtransaction_did_goes_by_its_own_xid(stream: Stream) -> None:
    """Its rows need not be the tail: those of its parent and of its siblings lie between."""
    stream.block(7, within(11, described(ITEMS)), item(11, "aborted"), item(7, "kept"), first=True)
    stream.block(7, item(12, "sibling"), item(11, "aborted"), within(11, truncate(ITEM)), item(7, "kept 2"))
    stream.push(stream_abort(7, 11))
    stream.block(7, within(13, logical()), item(13, "aborted"), item(7, "kept 3"))
    stream.push(stream_abort(7, 13), stream_commit())
    assert [cells for _, cells in stream.cells] == [("kept",), ("sibling",), ("kept 2",), ("kept 3",)]
    assert [row[2] for row in rows_of(stream.events)] == [1, 2, 3, 4]
    assert not any(isinstance(event, Truncate | Message) for event in stream.events)


def test_an_aborted_shape_is_told_only_if_a_row_has_it(stream: Stream) -> None:
    stream.push(begin(), described(ITEMS), insert(ITEM, "0"), commit())
    stream.block(7, within(11, described(WIDER)), within(11, insert(ITEM, "a", "1")), first=True)
    stream.push(stream_abort(7, 11))
    stream.block(7, within(7, described(ITEMS)), item(7, "b"))
    stream.push(stream_commit())
    assert [cells for _, cells in stream.cells] == [("0",), ("b",)]
    seen = [event.relation for event in stream.events if isinstance(event, RelationSeen)]
    assert WIDER not in seen
    stream.block(8, within(12, described(WIDER)), first=True)
    stream.push(stream_abort(8, 12), stream_commit(8, 400, 408))
    stream.push(begin(500), insert(ITEM, "c", "2"), commit(500, 508))
    assert stream.cells[-1] == (3, ("c", "2"))
    assert stream.events[-2] == RelationSeen(WIDER, 3, 0)


def test_a_newer_description_survives_the_replay_of_an_older_one(stream: Stream) -> None:
    stream.block(7, within(7, described(ITEMS)), item(7, "a"), first=True)
    stream.push(begin(100), described(WIDER), insert(ITEM, "b", "1"), commit(100, 108))
    stream.push(stream_commit(7))
    stream.push(begin(400), insert(ITEM, "c", "2"), commit(400, 408))
    assert [cells for _, cells in stream.cells] == [("b", "1"), ("a",), ("c", "2")]


def test_an_end_of_a_transaction_unknown_is_none_of_ours(stream: Stream) -> None:
    stream.push(stream_abort(99, 99), stream_abort(99, 100))
    stream.block(7, within(7, described(ITEMS)), item(7, "a"), first=True)
    stream.push(stream_abort(7, 12), stream_abort(8, 7) + b"\0" * 16, stream_commit())
    assert stream.cells == [(0, ("a",))]


@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_a_large_transaction_comes_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    monkeypatch.setattr(spool, "MEMORY", memory)
    stream = Stream(tmp_path / "spool", piece=200_000)
    stream.block(7, within(7, described(ITEMS)), first=True)
    for first in range(0, 30_000, 10_000):
        stream.block(7, *(item(7, f"{k:0100}") for k in range(first, first + 10_000)))
    assert stream.space.used > 0
    assert (tmp_path / "spool").exists() is (memory == 0)
    stream.push(stream_commit())
    assert stream.pieces > 10
    assert [int(str(cells[0])) for *_, cells, _, _ in rows_of(stream.events)] == [*range(30_000)]
    assert [row[2] for row in rows_of(stream.events)] == [*range(1, 30_001)]
    assert (stream.space.used, stream.space.in_memory) == (0, 0)
    assert [(t.commit, t.xid) for t in stream.transactions] == [(308, 7)]


def test_where_many_are_open_their_blocks_leave_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "MEMORY", 0)
    stream = Stream(tmp_path)
    for xid in range(1, 41):
        stream.block(xid, within(xid, described(ITEMS)), item(xid, f"a{xid}"), first=True)
        stream.block(xid, item(xid, f"b{xid}"))
    assert len([tail for tail in stream.streamed.tails() if tail]) <= 17
    assert stream.space.used > 0
    for xid in range(1, 41):
        stream.push(stream_commit(xid))
    assert [cells for _, cells in stream.cells] == [(f"{k}{x}",) for x in range(1, 41) for k in "ab"]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([STOP], "a block ends that has not begun"),
        ([start(), start(8)], "no place in a stream block"),
        ([start(), begin()], "no place in a stream block"),
        ([start(), stream_commit()], "no place in a stream block"),
        ([start(), STOP + b"\0"], "bytes follow its end"),
        ([start(first=False)], "a first block of a transaction known, or a later one of"),
        ([start(), STOP, start()], "a first block of a transaction known, or a later one of"),
        ([start()[:-1]], "ends too early"),
        ([stream_commit()], "a commit of a transaction unknown"),
        ([stream_commit()[:-1]], "ends too early"),
        ([stream_abort(7, 7) + b"\0"], "ends too early"),
        ([begin(), start()], "a stream message within a transaction"),
        *([[kind.encode()], "prepared transactions were not asked for"] for kind in "bPKrp"),
    ],
)
def test_what_the_protocol_does_not_allow_is_malformed(
    stream: Stream, messages: list[bytes], words: str
) -> None:
    stream.push(*messages[:-1])
    with pytest.raises(MalformedMessage, match=words):
        stream.push(messages[-1])
    with pytest.raises(MalformedMessage, match=words):
        stream.push(begin())


@pytest.mark.parametrize("message", [start(), STOP, stream_commit(), stream_abort(7, 7)])
def test_without_a_spool_nothing_is_streamed(message: bytes) -> None:
    with pytest.raises(MalformedMessage, match="not asked for"):
        Decoder().push(message)


def test_a_malformed_message_in_a_block_is_put_aside_at_the_commit(stream: Stream) -> None:
    wrong = (item(7, "a") + b"\0", item(7, "b")[:3], item(9, "rolled back") + b"\0")
    stream.block(7, within(7, described(ITEMS)), *wrong, item(7, "c"), first=True)
    stream.push(stream_abort(7, 9), stream_commit())
    stream.take()
    (aside,) = (event.batch for event in stream.events if isinstance(event, Malformed))
    without_xid = [message[:1] + message[5:] for message in wrong[:1]] + [wrong[1]]
    assert aside["message"].to_pylist() == without_xid
    assert aside["_ordinal"].to_pylist() == [1, 2]
    assert [row[2:4] for row in rows_of(stream.events)] == [(3, ("c",))]


def test_a_relation_that_cannot_be_read_is_not_known_again_by_a_replay(stream: Stream) -> None:
    stream.push(begin(), described(ITEMS), commit())
    stream.block(7, within(7, described(ITEMS)), item(7, "of before"), first=True)
    bad = described(ITEMS).replace(b"sku", b"s\xffu")
    stream.push(begin(), bad, commit(), stream_commit(), begin(), insert(ITEM, "lost"), commit())
    stream.take()
    aside = [event.batch.to_pylist() for event in stream.events if isinstance(event, Malformed)]
    assert [(row["kind"], row["why"]) for batch in aside for row in batch] == [
        (kind, "a string is not UTF-8") for kind in "RI"
    ]
    assert [row[3] for row in rows_of(stream.events)] == [("of before",)]


def test_nothing_is_pushed_before_the_replay(stream: Stream) -> None:
    stream.block(7, first=True)
    assert stream.decoder.push(stream_commit())
    with pytest.raises(ValueError, match="replayed first"):
        stream.decoder.push(begin())


KINDS = [EVERY_KIND[name] for name in EVERY_KIND if name != "commit"]


@settings(max_examples=300)
@given(
    st.lists(
        st.one_of(
            mutated(),
            st.tuples(st.sampled_from([7, 8, 11]), st.sampled_from(KINDS)).map(lambda t: within(*t)),
            st.sampled_from([start(), start(8), start(first=False), STOP, stream_commit(), stream_commit(8)]),
            st.sampled_from([stream_abort(7, 7), stream_abort(7, 11), stream_abort(8, 8), commit()]),
            st.binary(max_size=12),
        ),
        max_size=12,
    )
)
def test_any_bytes_raise_nothing_but_malformed_message(
    tmp_path_factory: pytest.TempPathFactory, messages: list[bytes]
) -> None:
    stream = Stream(tmp_path_factory.getbasetemp())
    stream.push(described(ITEMS), described(ORDERS))
    try:
        stream.push(*messages)
    except MalformedMessage:
        stream.take()
    for event in stream.events:
        if isinstance(event, Rows):
            event.batch.validate()


# -- transactions that come whole and are larger than a group -------------------------------------------


PLAIN = Relation(30, "public", "plain", "d", (RelationColumn("id", 25, -1, True),))


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    takes=st.sets(st.integers(0, 40)),
    after=st.integers(0, 3),
)
def test_groups_are_the_same_wherever_they_are_cut(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    sizes: list[int],
    takes: set[int],
    after: int,
) -> None:
    """Rows of two tables and messages, taken at any place, come once, in order, with their commits."""
    monkeypatch.setattr(shapes, "name_types", lambda _, types: [("text", "")] * len(types))
    config = source_config("shop", Secret("postgresql://h/d"))
    known = {shape.table: shape for shape in map(shape_of, (ITEMS, PLAIN))}
    decoder = Decoder()
    builder = GroupBuilder(
        Shapes(known, Mock(), config, Mock()),
        Roster("shop", known),
        Policy(config),
        SpoolSpace("shop", tmp_path_factory.getbasetemp(), 1 << 30),
    )
    entries: list[Entry] = []
    expected = []
    messages = []
    for number, size in enumerate(sizes, 1):
        lsn = number * 100
        messages += [logical(b"", transactional=False, lsn=lsn - 50), begin(lsn)]
        if number == 1:
            messages += [described(ITEMS), described(PLAIN)]
        expected.append((lsn - 49, 0))
        for ordinal in range(1, size + 1):
            change = [insert(ITEM, "a"), insert(PLAIN.id, "b"), logical()][ordinal % 3]
            messages.append(change)
            expected.append((lsn + 8, ordinal))
        messages.append(commit(lsn, lsn + 8))
    for at, message in enumerate(messages):
        decoder.push(message)
        if at in takes or at == len(messages) - 1:
            group = list(builder.build(*decoder.take(), after * 100))
            assert group == sorted(group, key=lambda entry: entry.last)
            entries += group
    places = []
    for entry in entries:
        if entry.kind == "rows":
            batch = decode_rows(entry.payload)
            places += zip(batch["_commit"].to_pylist(), batch["_ordinal"].to_pylist(), strict=True)
            assert (entry.first[1:], entry.last[1:]) == (places[-entry.rows], places[-1])
        else:
            places.append(entry.last[1:])
    assert sorted(places) == [place for place in expected if place[0] > after * 100]


def test_what_is_kept_keeps_its_lsn(tmp_path: Path) -> None:
    stream = Stream(tmp_path)
    messages = [within(7, described(ITEMS)), item(7, "a"), item(11, "b"), within(7, truncate(ITEM))]
    for at, message in enumerate([start(first=True), *messages, STOP]):
        stream.decoder.push(message, 100 + at)
    stream.push(stream_commit())
    rows, emptied = stream.events[1:]
    assert isinstance(rows, Rows)
    assert rows.batch["_lsn"].to_pylist() == [102, 103]
    assert isinstance(emptied, Truncate)
    assert emptied.lsn == 104


def shape_of(relation: Relation) -> TableSchema:
    columns = tuple(Column(c.name, "text") for c in relation.columns)
    return TableSchema(TableId(relation.schema, relation.name), columns, (relation.columns[0].name,))


# -- the room ------------------------------------------------------------------------------------------


def test_a_spool_gives_back_what_it_was_given_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "MEMORY", 250)
    space = SpoolSpace("shop", tmp_path / "a" / "b", 10_000)
    parts = [bytes([k]) * 100 for k in range(10)]
    one, two = Spool(space), Spool(space)
    for part in parts:
        one.append(part)
        two.append(part[::-1])
    assert (space.used, space.in_memory) == (2000, 200)
    assert [*one] == [*two] == [*one] == parts
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert [*(tmp_path / "a" / "b").iterdir()] == []  # files without names
    one.close()
    assert (space.used, space.in_memory) == (1000, 100)
    assert [*one] == []
    assert [*two] == parts
    two.close()
    assert (space.used, space.in_memory) == (0, 0)


def test_a_spool_alerts_once_and_stops_at_its_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    space = SpoolSpace("shop", tmp_path, 1000)
    full = Spool(space)
    for _ in range(79):
        full.append(b"x" * 10)
    assert caplog.records == []
    for _ in range(21):
        full.append(b"x" * 10)
    assert [(r.name, r.levelno) for r in caplog.records] == [("headrace.alert", logging.WARNING)]
    with pytest.raises(SourceUnavailable, match="as much as spool_max allows") as caught:
        full.append(b"x")
    assert "[source.shop]" in caught.value.remedy
    full.close()
    again = Spool(space)
    again.append(b"x" * 100)
    again.append(b"x" * 800)
    assert len(caplog.records) == 2
    again.close()


def test_a_folder_that_takes_nothing_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unwritable: Callable[[Path], Iterator[None]],
) -> None:
    monkeypatch.setattr(spool, "MEMORY", 0)
    part = Spool(SpoolSpace("shop", tmp_path / "spool", 1000))
    with unwritable(tmp_path), pytest.raises(SourceUnavailable, match="cannot take a transaction") as caught:
        part.append(b"x")
    assert str(tmp_path) in str(caught.value)


# -- what is asked of the server -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "version", "origin"),
    [(140_011, 2, False), (150_006, 3, False), (160_004, 4, True), (180_000, 4, True)],
)
def test_the_newest_protocol_of_the_server_is_spoken(server: int, version: int, origin: bool) -> None:
    config = source_config("shop", Secret("postgresql://h/d"), publication='it\'s "ours"')
    options = stream_options(config, server, streaming=True)
    assert f"proto_version '{version}'" in options
    assert "streaming 'on'" in options
    assert 'publication_names \'"it\'\'s ""ours"""\'' in options
    assert ("origin 'any'" in options) is origin
    assert "streaming 'off'" in stream_options(config, server, streaming=False)


def test_origins_need_postgres_16() -> None:
    config = source_config("shop", Secret("postgresql://h/d"), origin="none")
    assert "origin 'none'" in stream_options(config, 160_000, streaming=True)
    with pytest.raises(UserError, match='origin = "none" needs Postgres 16, the server is 15'):
        stream_options(config, 150_006, streaming=True)
