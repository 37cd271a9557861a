"""Joining: whatever the order in which copied rows and streamed changes reach the log, a model that joins
holds what the source holds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from headrace.change import ADDED, Column, CopyMark, Entry, Position, TableId, TableSchema
from headrace.destinations.duckdb import DuckDBDestination
from headrace.errors import DestinationError, ModelBroken
from headrace.joining import Joiner
from headrace.log.sqlite import SQLiteLog
from headrace.payload import BEFORE, UNCHANGED, encode_rows
from headrace.sources.postgres.chunks import Range
from headrace.sources.postgres.moved import moved_keys
from headrace.staging.delta import DeltaStaging
from headrace.standing import ModelState
from headrace.transform.model import RowModel, mirror

TABLE = TableId("public", "t")
SHAPE = TableSchema(TABLE, (Column("id", "text"), Column("v", "text"), Column("big", "text")), ("id",))
MODEL = mirror("shop", SHAPE)
KEYS = [f"k{i}" for i in range(8)]
BOUNDS = (("k3",), ("k6",))

Row = tuple[str | None, str | None]
State = dict[str, Row]


def change(
    op: str, commit: int, key: str, row: Row, before: str | None = None, *, toast: bool = False
) -> dict:
    return {
        "_op": op, "_commit": commit, "_ordinal": 1, "_committed_at": commit, "_txid": commit, "_lsn": commit,
        "id": key, "v": row[0], "big": None if toast else row[1],
        "_unchanged": ["big"] if toast else None, "_before": [("id", before)] if before else None,
    }  # fmt: skip


def entry(rows: list[dict], kind: str = "rows") -> Entry:
    fields = [
        ("_op", pa.string()),
        *((n, pa.int64()) for n in ("_commit", "_ordinal", "_committed_at", "_txid", "_lsn")),
    ]
    fields += [(name, pa.string()) for name in ("id", "v", "big")]
    batch = pa.RecordBatch.from_pylist(
        rows, schema=pa.schema([*fields, ("_unchanged", UNCHANGED), ("_before", BEFORE)])
    )
    first, last = (Position(0, row["_commit"], row["_ordinal"]) for row in (rows[0], rows[-1]))
    return Entry(kind, TABLE, first, last, 1, len(rows), 1, encode_rows(batch))  # type: ignore[arg-type]


def marker(commit: int, mark: CopyMark) -> Entry:
    at = Position(0, commit, 0)
    return Entry("marker", TABLE, at, at, 1, 0, 1, mark.to_json().encode())


class Source:
    """A table with its history: the state as of each commit, and the change that each commit made."""

    def __init__(self, chance: random.Random, length: int) -> None:
        self.states: list[State] = [{}]
        self.changes: list[dict] = []
        for commit in range(1, length + 1):
            self.changes.append(self._next(chance, commit))

    def _next(self, chance: random.Random, commit: int) -> dict:
        state = dict(self.states[-1])
        key = chance.choice(KEYS)
        if key not in state:
            state[key] = (f"v{commit}", f"big{commit}")
            made = change("c", commit, key, state[key])
        elif (what := chance.random()) < 0.25:
            made = change("d", commit, key, (None, None))
            del state[key]
        elif what < 0.5 and (free := [k for k in KEYS if k not in state]):
            new = chance.choice(free)
            state[new] = (f"v{commit}", state.pop(key)[1])
            made = change("u", commit, new, state[new], before=key, toast=chance.random() < 0.7)
        else:
            state[key] = (f"v{commit}", state[key][1])
            made = change("u", commit, key, state[key], toast=chance.random() < 0.7)
        self.states.append(state)
        return made

    def chunk(self, number: int, commit: int) -> list[dict]:
        edges = ["", *(bound[0] for bound in BOUNDS), "z"]
        inside = [k for k in sorted(self.states[commit]) if edges[number] <= k < edges[number + 1]]
        rows = [change("r", commit, k, self.states[commit][k]) for k in inside]
        return [{**row, "_ordinal": Range(number, None, None).ordinal + i + 1} for i, row in enumerate(rows)]


def stream_to(log: SQLiteLog, source: Source, streamed: int, commit: int) -> int:
    for made in source.changes[streamed:commit]:
        log.append([entry([made])])
    return max(streamed, commit)


def write_copy(
    log: SQLiteLog,
    source: Source,
    chance: random.Random,
    streamed: int,
    *,
    whole: bool = True,
    mend: bool = True,
) -> int:
    """Log one copy between the changes behind commit `streamed`; returns how far the stream is then."""
    begin = log.end().offset
    log.append([marker(0, CopyMark("begin", SHAPE, BOUNDS, begin))])
    length = len(source.changes)
    snapshots = sorted(chance.randint(streamed, length) for _ in range(3))
    if chance.random() < 0.3:
        snapshots = [snapshots[0]] * 3
    numbers = [0, 1, 2]
    chance.shuffle(numbers)
    for number, commit in zip(numbers, snapshots, strict=True):
        while streamed < length and chance.random() < 0.6:
            log.append([entry([source.changes[streamed]])])
            streamed += 1
        rows = source.chunk(number, commit)
        chunk = marker(commit, CopyMark("chunk", chunk=number))
        log.append([*([entry(rows, "copy")] if rows else []), chunk])
        if not whole:
            return streamed
    floor, ceiling = snapshots[0], snapshots[-1]
    streamed = stream_to(log, source, streamed, ceiling)
    sought, number, moved = floor, 3, None
    while (
        mend
        and sought < ceiling
        and (moved := moved_keys(log, TABLE, SHAPE.key, begin, (sought, ceiling), moved))
    ):
        sought, ceiling = ceiling, chance.randint(streamed, length)
        rows = [
            change("r", ceiling, k, source.states[ceiling][k])
            for (k,) in sorted(moved)
            if k in source.states[ceiling]
        ]
        rows = [{**row, "_ordinal": Range(number, None, None).ordinal + i + 1} for i, row in enumerate(rows)]
        log.append(
            [*([entry(rows, "copy")] if rows else []), marker(ceiling, CopyMark("chunk", chunk=number))]
        )
        streamed, number = stream_to(log, source, streamed, ceiling), number + 1
    log.append([marker(ceiling, CopyMark("end", floor=floor, ceiling=ceiling))])
    return streamed


class Bench:
    """Log, staging and destination of their own, and a joiner between them."""

    def __init__(self, folder: Path) -> None:
        self.log = SQLiteLog(folder / "log.db")
        self.staging = DeltaStaging(folder / "staging", "shop", self.log.id)
        self.destination = DuckDBDestination(folder / "w.duckdb")
        self.destination.progress("shop")
        self.alerts: list[str] = []
        self.joiner = self.reopened()

    def reopened(self) -> Joiner:
        return Joiner("shop", self.log, self.staging, self.destination.joins)

    def load(self) -> None:
        while entries := self.log.read(self.staging.through(), 1 << 20):
            self.staging.write(entries)

    def join(self, model: RowModel = MODEL, chance: random.Random | None = None) -> None:
        staged = self.staging.through()
        while copy := self.joiner.pending(model, staged):
            stands = self.stands(staged)
            self.joiner.step(model, copy, stands, [], staged, self.alerts.extend)
            if chance and chance.random() < 0.3:
                self.joiner = self.reopened()

    def rebuild(self, model: RowModel, chance: random.Random) -> None:
        """Build a model that stands at the end once more."""
        self.joiner.rebuild(model, self.staging.through(), dry_run=False)
        self.join(model, chance)

    def copy(self, commit: int, *rows: tuple[str, Row], shape: TableSchema = SHAPE, reason: str = "") -> None:
        """Log and stage a copy that is read in one chunk under a snapshot at `commit`."""
        self.log.append([marker(0, CopyMark("begin", shape, (), self.log.end().offset, reason))])
        cells = [change("r", commit, key, row) for key, row in rows]
        numbered = [{**row, "_ordinal": n} for n, row in enumerate(cells, 1)]
        self.log.append([entry(numbered, "copy"), marker(commit, CopyMark("chunk"))])
        self.log.append([marker(commit, CopyMark("end", floor=commit, ceiling=commit))])
        self.load()

    def stands(self, offset: int) -> dict[str, ModelState]:
        """What runs meanwhile has come to an offset."""
        return {n: replace(state, offset=offset) for n, state in self.destination.models("shop").items()}

    def rows(self) -> State:
        (table,) = self.destination.read(['SELECT id, v, big FROM "shop"."t"'])
        return {row["id"]: (row["v"], row["big"]) for row in table.to_pylist()}

    def ask(self, query: str) -> list[tuple]:
        (table,) = self.destination.read([query])
        return [tuple(row.values()) for row in table.to_pylist()]


@pytest.fixture(autouse=True, scope="module")
def small_pieces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headrace.history.PIECE_ROWS", 3)
        yield


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.log.close()


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 1 << 32), length=st.integers(0, 40))
def test_a_join_holds_what_the_source_holds(
    tmp_path_factory: pytest.TempPathFactory, seed: int, length: int
) -> None:
    chance = random.Random(seed)
    source = Source(chance, length)
    bench = Bench(tmp_path_factory.mktemp("join"))
    streamed = chance.randint(0, length)  # what was committed before the slot is in no log
    for _ in range(chance.randint(0, 2)):  # copies that were begun in vain
        streamed = write_copy(bench.log, source, chance, streamed, whole=False)
    streamed = write_copy(bench.log, source, chance, streamed)
    bench.load()
    bench.join(chance=chance)
    assert bench.rows() == source.states[streamed]
    history = bench.staging.history(TABLE, bench.joiner.stands_on(MODEL), bench.log.end().offset)
    assert (history["_commit"].to_pylist()) == sorted(history["_commit"].to_pylist())
    # Copied again while it is live: what is equal stays untouched.
    streamed = write_copy(bench.log, source, chance, streamed)
    bench.load()
    bench.join(chance=chance)
    assert bench.rows() == source.states[streamed]
    assert bench.ask("SELECT count(*) FROM headrace.quarantine WHERE status = 'quarantined'") == [(0,)]
    assert bench.ask("SELECT count(*) FROM headrace.ledger WHERE read <> applied + superseded") == [(0,)]
    # And once more from the newest change of every key, in pieces.
    bench.rebuild(MODEL, chance)
    assert bench.ask("SELECT added + removed + changed FROM headrace.rebuilds") == [(0,)]
    assert bench.rows() == source.states[streamed]
    bench.log.close()


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 1 << 32), length=st.integers(10, 40))
@example(seed=735, length=35)  # a copy at the very position of a commit
@example(seed=24, length=20)  # a delete with cells that nobody knows, of a key with nothing else
def test_what_a_join_refuses_is_what_the_fold_of_history_refuses(
    tmp_path_factory: pytest.TempPathFactory, seed: int, length: int
) -> None:
    """A bad change that a later snapshot of the copy contains is no record beside the copy's own."""
    picky = replace(
        MODEL, outputs=(("id", "id", "VARCHAR"), ("n", "replace(v, '3', 'x')[2:]::INT", "INTEGER"))
    )
    chance = random.Random(seed)
    source = Source(chance, length)
    bench = Bench(tmp_path_factory.mktemp("join"))
    streamed = write_copy(bench.log, source, chance, chance.randint(0, length // 2))
    for _ in range(2):  # in place, then beside
        bench.load()
        bench.join(picky, chance)
        folded = picky.prepare(bench.joiner.history(picky, bench.staging.through()))
        opened = (
            "SELECT epoch, commit, ordinal, key, op FROM headrace.quarantine WHERE status = 'quarantined'"
        )
        records = folded.records.select(["epoch", "commit", "ordinal", "key", "op"]).to_pylist()
        assert sorted(bench.ask(opened)) == sorted(tuple(record.values()) for record in records)
        rows = folded.rows.select(["id", "n"]).to_pylist()
        assert sorted(bench.ask('SELECT id, n FROM "shop"."t"')) == sorted(
            tuple(row.values()) for row in rows
        )
        bench.rebuild(picky, chance)
        assert bench.ask("SELECT max(added + removed + changed) FROM headrace.rebuilds") == [(0,)]
        assert sorted(bench.ask(opened)) == sorted(tuple(record.values()) for record in records)
        streamed = write_copy(bench.log, source, chance, streamed)
    bench.log.close()


def test_a_row_that_moves_between_two_snapshots_is_in_neither_and_read_once_more(bench: Bench) -> None:
    """The fact that the rule is for: without the further reading the large value is nowhere."""
    row = ("v1", "large")
    for mended in (False, True):
        begin = bench.log.end().offset
        bench.log.append([marker(0, CopyMark("begin", SHAPE, BOUNDS, begin))])
        bench.log.append([marker(10, CopyMark("chunk", chunk=0))])  # k1 has not come yet
        bench.log.append([entry([change("u", 12, "k1", row, before="k7", toast=True)])])
        for number in (1, 2):  # k7 is gone
            bench.log.append([marker(20, CopyMark("chunk", chunk=number))])
        moved = moved_keys(bench.log, TABLE, SHAPE.key, begin, (10, 20))
        assert moved == {("k1",)}
        assert moved_keys(bench.log, TABLE, SHAPE.key, begin, (12, 20)) == set()
        assert moved_keys(bench.log, TABLE, SHAPE.key, begin, (10, 20), {("k2",)}) == set()
        ceiling = 30 if mended else 20
        if mended:
            again = entry([change("r", 30, "k1", row)], "copy")
            bench.log.append([again, marker(30, CopyMark("chunk", chunk=3))])
        bench.log.append([marker(ceiling, CopyMark("end", floor=10, ceiling=ceiling))])
        bench.load()
        bench.join()
        assert bench.rows() == ({"k1": row} if mended else {})


def test_a_row_that_is_gone_at_the_source_goes_and_only_differences_are_written(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    for commit, keys in ((5, KEYS), (9, KEYS[1:]), (12, KEYS[1:])):
        rows = dict.fromkeys(keys, ("a", "b")) | {KEYS[-1]: (f"as of {min(commit, 9)}", "b")}
        with caplog.at_level("INFO"):
            caplog.clear()
            bench.copy(commit, *rows.items())
            bench.join()
        assert bench.rows() == rows
        differs = "0 added, 1 removed, 1 changed" if commit == 9 else "0 added, 0 removed, 0 changed"
        assert commit == 5 or differs in caplog.text


def test_what_lags_behind_a_copy_runs_up_to_it_first(bench: Bench) -> None:
    bench.copy(5, ("k1", ("a", "b")))
    bench.join()
    bench.log.append([entry([change("u", 7, "k1", ("c", "b"))])])
    bench.copy(9, ("k1", ("c", "b")))
    staged = bench.staging.through()
    copy = bench.joiner.pending(MODEL, staged)
    assert copy is not None
    steps = [
        bench.joiner.step(MODEL, copy, bench.stands(at), [], staged, bench.alerts.extend)
        for at in (staged, staged - 1, staged, staged)
    ]
    assert steps == ["begin", "wait", "slice", "slice"]
    assert not bench.joiner.runs(MODEL, staged), "what differs is to be exchanged"


def test_a_table_that_was_not_captured_for_a_while_is_built_anew(bench: Bench) -> None:
    """What stands of it must not go on: nobody knows what happened in between."""
    bench.copy(5, ("k1", ("a", "b")), ("k2", ("a", "b")))
    bench.join()
    bench.log.append([marker(0, CopyMark("begin", SHAPE, (), bench.log.end().offset, ADDED))])
    bench.log.append([entry([change("u", 20, "k2", ("c", "b"))])])
    bench.load()
    assert bench.staging.copy(TABLE, bench.staging.through()) is None, "what there is of it is a fragment"
    assert not bench.joiner.runs(MODEL, bench.staging.through())
    bench.copy(21, ("k2", ("c", "b")), reason=ADDED)
    bench.join()
    assert bench.joiner.runs(MODEL, bench.staging.through())
    assert bench.rows() == {"k2": ("c", "b")}
    assert bench.ask("SELECT sum(read)::INT FROM headrace.ledger WHERE kind <> 'void'") == [(1,)]


def test_a_model_that_gets_other_columns_in_the_middle_begins_with_them(bench: Bench) -> None:
    bench.copy(5, ("k1", ("a", "b")))
    bench.join()
    bench.copy(9, ("k1", ("c", "b")))
    staged = bench.staging.through()
    copy = bench.joiner.pending(MODEL, staged)
    assert copy is not None
    for _ in range(2):
        bench.joiner.step(MODEL, copy, bench.stands(staged), [], staged, bench.alerts.extend)
    fewer = replace(MODEL, outputs=MODEL.outputs[:2], version="mirror:fewer")
    assert bench.destination.forget_if_reshaped(fewer)
    bench.joiner = bench.reopened()
    bench.join(fewer)
    assert bench.ask('SELECT * EXCLUDE (_source, _source_key) FROM "shop"."t"') == [("k1", "c")]
    bench.copy(12, ("k1", ("d", "b")))
    bench.join(fewer)
    assert bench.ask('SELECT * EXCLUDE (_source, _source_key) FROM "shop"."t"') == [("k1", "d")]
    assert bench.ask("FROM duckdb_tables() SELECT table_name WHERE schema_name = 'headrace_joining'") == []


def test_a_join_beside_leaves_the_records_of_the_live_table_alone_until_it_ends(bench: Bench) -> None:
    """Of a table without a key, where records are counted: none may be taken off twice, or stay."""
    columns = (Column("id", "text"), Column("v", "integer"), Column("big", "integer"))
    bag = replace(SHAPE, key=(), columns=columns)
    model = mirror("shop", bag)
    rows = [("k1", ("bad", "1"))] * 3 + [("k2", ("1", "1"))] * 2
    bench.copy(5, *rows, shape=bag)
    bench.join(model)
    opened = "SELECT commit, count(*) FROM headrace.quarantine WHERE status = 'quarantined' GROUP BY ALL"
    assert bench.ask(opened) == [(5, 3)]
    (issue,) = bench.alerts
    bench.copy(9, *rows, shape=bag)
    gone = [change("d", 11, "k1", ("bad", "1")), change("d", 11, "k2", ("1", "1"))]
    bench.log.append([entry([*gone, change("c", 11, "k3", ("1", "worse"))])])
    bench.load()
    staged = bench.staging.through()
    copy = bench.joiner.pending(model, staged)
    assert copy is not None
    step: str = ""
    while step != "attach":
        assert bench.ask(opened) == [(5, 3)]
        step = bench.joiner.step(model, copy, bench.stands(staged), [], staged, bench.alerts.extend)
    assert sorted(bench.ask(opened)) == [(9, 2), (11, 1)]
    assert bench.ask('SELECT id, v FROM "shop"."t"') == [("k2", 1)]
    assert bench.ask("SELECT sum(quarantined)::INT FROM headrace.ledger WHERE kind <> 'void'") == [(3,)]
    assert bench.alerts[0] == issue
    assert len(set(bench.alerts)) == len(bench.alerts) == 2, "of two causes one is new"


def test_what_cannot_be_prepared_breaks_the_model_and_no_more(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("unforeseen")

    bench.copy(5, ("k1", ("a", "b")))
    monkeypatch.setattr(RowModel, "prepare", fail)
    with pytest.raises(ModelBroken, match="unforeseen"):
        bench.join()


def test_a_second_owner_is_refused_in_the_middle_of_a_join(bench: Bench) -> None:
    bench.copy(5, ("k1", ("a", "b")))
    copy = bench.staging.copy(TABLE, 4)
    assert copy is not None
    other = bench.reopened()
    bench.joiner.step(MODEL, copy, {}, [], 0, bench.alerts.extend)
    other.step(MODEL, copy, {}, [], 0, bench.alerts.extend)
    with pytest.raises(DestinationError, match="does not stand at"):
        bench.joiner.step(MODEL, copy, {}, [], 0, bench.alerts.extend)
