"""A lane with workers: what is applied is what it would be without them, whatever becomes of them."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import test_joining as joins
from test_rebuild import SHAPE, Shop

from entries import rows as entry
from headrace.change import Counts
from headrace.cutting import Piece
from headrace.errors import ModelBroken
from headrace.handover import Handover, open_pool
from headrace.lane import Lane
from headrace.parts import PartSpec, Staged
from headrace.prepared import Prepared
from headrace.preparing import filled
from headrace.scaling.local import LocalPool
from headrace.scaling.pool import NoPlace, PartFailed, PoolState, Service, TooLarge
from headrace.staging.delta import DeltaStaging
from headrace.transform.fold import NOTHING
from headrace.transform.model import RowModel, bind, mirror
from headrace.transform.python.process import environment
from headrace.transform.sql import read_model
from pipelines import until

SQL = """/* headrace
key = ["id"]
[contract]
n = "INTEGER"
*/
SELECT id::BIGINT AS id, replace(v, '7', 'x')::INTEGER AS n FROM raw.shop.t WHERE v <> '3'"""
HISTORY = SQL.replace('key = ["id"]', 'materialize = "history"')
UNIQUE = SQL.replace('["id"]', '["slot"]').replace("AS id,", "AS id, id::INTEGER % 590 AS slot,")
PYTHON = """from dataclasses import dataclass
import headrace

@dataclass
class Out:
    id: int
    n: int

@headrace.model(reads="raw.shop.t", key=["id"])
def m(row: headrace.Row) -> Out | None:
    return None if row["v"] == "3" else Out(int(row["id"]), int(row["v"].replace("7", "x")))
"""
WHAT = (
    "SELECT * FROM m ORDER BY ALL",
    # Those that a later change of the same transaction has overtaken depend on where that is cut.
    "SELECT key, epoch, commit, ordinal, reason, blocked FROM headrace.quarantine "
    "WHERE status = 'quarantined' ORDER BY ALL",
    "SELECT sum(read)::INT, sum(quarantined)::INT, sum(blocked)::INT FROM headrace.ledger",
)


class Busy(Shop):
    """A shop with many changes to be applied."""

    def __init__(self, folder: Path, name: str, text: str) -> None:
        super().__init__(folder)
        (folder / "models" / "m.sql").unlink()
        (folder / "models" / name).write_text(text)
        self.reopen()
        self.bring()

    def fill(self, chance: random.Random, transactions: int, size: int = 60) -> None:
        for n in range(transactions):
            self.commit += 1
            entries = [self._entry(chance, i * size) for i in range(12 if n == 4 else 1)]
            self.lane.log.append(entries)
            if n % 3 == 2:
                self.load()  # a file of its own
        self.load()

    def _entry(self, chance: random.Random, begin: int) -> Any:
        made: list[tuple[Any, ...]] = []
        for ordinal in range(begin + 1, begin + 61):
            key, value = str(chance.randint(1, 300)), str(chance.randint(0, 9))
            if key not in self.state:
                made.append(("c", self.commit, ordinal, (key, value)))
            elif (what := chance.random()) < 0.1:
                made.append(("d", self.commit, ordinal, (key, None)))
                del self.state[key]
                continue
            elif what < 0.2 and (new := str(chance.randint(301, 600))) not in self.state:
                made.append(("u", self.commit, ordinal, (new, value), None, {"id": key}))
                del self.state[key]
                key = new
            elif what < 0.4:
                value = self.state[key]
                made.append(("u", self.commit, ordinal, (key, None), ["v"]))
            else:
                made.append(("u", self.commit, ordinal, (key, value)))
            self.state[key] = value
        return entry(self.shape, made)

    def held(self) -> list[list[tuple[Any, ...]]]:
        found = self.lane.destination.read(WHAT)
        return [[tuple(row.values()) for row in table.to_pylist()] for table in found]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("cutting._LEAST_ROWS", 25),  # an entry has 60
        ("cutting._MOST_ROWS", 25),
        ("handover._TRICKLE", 0),
        ("handover._BEGUN_WITHIN", 0.5),
        ("history.PIECE_ROWS", 400),
        ("lane._SLICE_ROWS", 200),
        ("log.index.MAX_SLICE_ROWS", 200),
    ):
        monkeypatch.setattr(f"headrace.{name}", value)


@contextmanager
def workers(lane: Lane, state: Path, count: int) -> Iterator[LocalPool]:
    pool = open_pool(state, 1 << 30)
    lane.joiner.workers.use(Handover(pool))
    pool.resize(count)
    try:
        until(lambda: pool.state().ready == count)
        yield pool
    finally:
        pool.close()


@contextmanager
def asked_for(pool: LocalPool) -> Iterator[set[str]]:
    """Give the kinds of the parts that a pool is asked for meanwhile."""
    kinds, submit = set[str](), pool.submit

    def noted(part: PartSpec) -> Future[Prepared]:
        kinds.update({part.kind, "stretch"} if part.stretch else {part.kind})
        return submit(part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "submit", noted)
        yield kinds


@contextmanager
def killed(pool: LocalPool, chance: random.Random, every: float) -> Iterator[None]:
    """Kill a worker every few moments."""
    stop = threading.Event()

    def kill() -> None:
        while not stop.wait(every):
            with suppress(ProcessLookupError, IndexError):
                os.kill(chance.choice(pool.pids()), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize(
    ("name", "text"),
    [("m.sql", SQL), ("m.sql", HISTORY), ("m.sql", UNIQUE), ("m.py", PYTHON)],
    ids=["sql", "history", "unique", "python"],
)
@pytest.mark.usefixtures("small")
def test_workers_that_are_killed_change_nothing_of_what_is_applied(
    tmp_path: Path, name: str, text: str
) -> None:
    chance = random.Random(5)
    (tmp_path / "with").mkdir()
    shop = Busy(tmp_path / "with", name, text)
    shop.fill(chance, 5 if text == UNIQUE else 15)
    shop.lane.close()
    shop.lane.destination.close()
    shutil.copytree(tmp_path / "with", tmp_path / "without")
    shop.reopen()
    with workers(shop.lane, tmp_path / "state", 2) as pool:
        with killed(pool, chance, 1.0), asked_for(pool) as kinds:
            while shop.lane.apply():
                pass
        assert pool.service()["m"].all_rows
        assert kinds == {"slice", "stretch"}
        applied = shop.held()
        assert applied[0]
        assert applied[1]
        # Built once more, beside the live table, and then without any worker.
        with asked_for(pool) as kinds:
            shop.lane.rebuild("m")
            shop.bring()
        assert shop.rebuilds() == 1
        assert kinds >= ({"beyond copy"} if text == HISTORY else {"newest", "older"})
        rebuilt = shop.held()
        pool.resize(0)
        until(lambda: not pool.pids())
    other = object.__new__(Busy)
    other.folder, other.shape = tmp_path / "without", SHAPE
    other.lane = other._open()
    other.bring()
    assert applied == other.held()
    other.lane.rebuild("m")
    other.bring()
    assert rebuilt[:2] == other.held()[:2]
    for each in (shop, other):
        each.lane.close()


@pytest.mark.usefixtures("small")
def test_workers_that_come_in_the_midst_of_a_large_slice_take_the_rest_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.lane._SLICE_ROWS", 10_000)
    shop = Busy(tmp_path, "m.py", PYTHON)
    shop.fill(random.Random(3), 12)
    pool = open_pool(tmp_path / "state", 1 << 30)
    before: list[int] = []

    def first(staging: DeltaStaging, model: RowModel, changes: pa.Table, newest: int) -> pa.Table:
        before.append(changes.num_rows)
        pool.resize(2)
        until(lambda: pool.state().ready == 2)
        return filled(staging, model, changes, newest)

    monkeypatch.setattr("headrace.joining.filled", first)
    monkeypatch.setattr("headrace.staging.delta._PIECE_ROWS", 200)
    shop.lane.joiner.workers.use(Handover(pool))
    try:
        assert shop.lane.apply()
        done = pool.service()["m"].all_rows
    finally:
        pool.close()
    (read,) = shop.held()[2][0][:1]
    assert len(before) == 1
    assert read / 2 < done <= read - before[0]
    assert shop.lane.meter.take_served()["m"] == read
    shop.lane.close()


@pytest.mark.parametrize(
    ("header", "kinds"),
    [('materialize = "history"', {"keys", "copy"}), ('key = ["id"]', {"newest", "older copy"})],
)
@pytest.mark.usefixtures("small")
def test_a_table_that_is_copied_again_is_made_by_workers_as_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: str, kinds: set[str]
) -> None:
    monkeypatch.setattr("headrace.recopied._SHARE_ROWS", 25)
    (path := tmp_path / "m.sql").write_text(
        f"/* headrace\n{header}\n*/ SELECT id, replace(v, '3', 'x')[2:]::INT AS v, big FROM raw.shop.t"
    )
    model = bind(read_model(path), joins.SHAPE)

    def made(folder: Path, pool: LocalPool | None) -> list[list[tuple[Any, ...]]]:
        folder.mkdir()
        bench, chance = joins.Bench(folder), random.Random(4)
        if pool is not None:
            bench.joiner.workers.use(Handover(pool))
        source = joins.Source(chance, 90)
        streamed = joins.write_copy(bench.log, source, chance, 40)
        for _ in range(2):
            bench.load()
            bench.join(model)
            streamed = joins.write_copy(bench.log, source, chance, streamed)
        if header.startswith("key"):
            bench.joiner.rebuild(model, bench.staging.through(), dry_run=False)
            bench.join(model)
        bench.log.close()
        return [bench.ask(query) for query in WHAT]

    pool = open_pool(tmp_path / "state", 1 << 30)
    pool.resize(2)
    try:
        with asked_for(pool) as kinds_asked:
            with_workers = made(tmp_path / "with", pool)
        assert pool.service()["m"].all_rows
    finally:
        pool.close()
    assert kinds_asked >= kinds
    assert with_workers[0]
    assert with_workers[1]
    assert with_workers == made(tmp_path / "without", None)


def test_what_is_chosen_otherwise_of_the_same_span_is_another_part_and_a_trickle_leaves_nothing() -> None:
    handover = Handover(Idle(desired=1))

    def chosen(selection: str, bits: bytes) -> Sequence[PartSpec]:
        pieces = [(Piece(0, 9, 8), bits)]
        staged = Staged("shop", "l", "")
        return handover.parts("newest", staged, MODEL, (0, 9), lambda: pieces, selection=selection)

    (first,) = chosen("a", b"\x01")
    (second,) = chosen("b", b"\x02")
    assert (first.chosen, second.chosen) == (b"\x01", b"\x02")
    assert first.id != second.id
    assert chosen("a", b"?") == [first], "as it was cut"
    little = cut(handover, 0, 1)
    assert cut(handover, 0, 1) is little
    assert handover.is_trickle(MODEL, little)
    assert cut(handover, 0, 1) is not little


def test_what_a_model_that_has_gone_asked_for_takes_no_room() -> None:
    pool = Idle(desired=1)
    handover = Handover(pool)
    gone = replace(MODEL, name="gone")
    handover.begin(cut(handover, 0, 3, gone))
    for after in range(3):
        pool.finish(after)
    assert handover.prepared_parts() == 3
    handover.expect("shop", "slice", iter(()), {MODEL.name})
    assert handover.prepared_parts() == 0


def test_what_follows_is_asked_for_in_its_order_though_it_is_said_while_what_is_before_is_taken() -> None:
    pool = Idle(desired=1)
    handover = Handover(pool)

    def take(begin: int, count: int, model: RowModel = MODEL) -> Iterator[int]:
        parts = cut(handover, begin, count, model)
        return (made.counts.read for made in handover.take(model, parts, lambda part, _: outcome(part)))

    # As a rebuild does: the next piece is handed over, as far as there is room, while one is taken.
    first, second = cut(handover, 0, 4), cut(handover, 4, 4)
    handover.expect("shop", "slice", iter([*first, *second]))
    taking = take(0, 4)
    assert next(taking) == 0
    handover.expect("shop", "slice", iter([*second, *cut(handover, 8, 4)]))
    handover.begin(second)
    assert list(taking) == [1, 2, 3]
    assert list(take(4, 4)) == [4, 5, 6, 7]
    assert list(take(8, 4)) == [8, 9, 10, 11]
    assert pool.afters() == list(range(12)), "each once, in their order"
    # As a slice of several models: one after the other, each from where it is.
    other = replace(MODEL, name="other")
    handover.expect("shop", "slice", iter([*cut(handover, 12, 4), *cut(handover, 12, 4, other)]))
    assert list(take(14, 2)) == [14, 15]  # what is before has been prepared here
    assert list(take(12, 4, other)) == [12, 13, 14, 15]
    assert pool.afters()[12:] == [14, 15, 12, 13, 14, 15]
    assert handover.prepared_parts() == 0


class Idle:
    """A pool whose parts are done when the test says so."""

    epoch = "e"

    def __init__(self, desired: int, starting: int = 0) -> None:
        self.asked: list[tuple[PartSpec, Future[Prepared]]] = []
        self.desired = desired
        self.starting = starting

    def submit(self, part: PartSpec) -> Future[Prepared]:
        self.asked.append((part, Future()))
        return self.asked[-1][1]

    def resize(self, workers: int) -> None:
        self.desired = workers

    def state(self) -> PoolState:
        return PoolState(self.desired, 0, self.starting, 0, 0, 0, ())

    def service(self) -> Mapping[str, Service]:
        return {}

    def close(self) -> None: ...

    def finish(self, after: int) -> None:
        """Have a worker hand in the last part behind an offset that was asked for."""
        part, future = next(each for each in reversed(self.asked) if each[0].after == after)
        assert future.set_running_or_notify_cancel()
        future.set_result(outcome(part))

    def afters(self) -> list[int]:
        return [part.after for part, _ in self.asked]


MODEL = mirror("shop", SHAPE)


def outcome(part: PartSpec, by: int = 0) -> Prepared:
    return Prepared(False, NOTHING.removed, NOTHING.rows, NOTHING.records, Counts(read=part.after, warned=by))


def cut(handover: Handover, begin: int, count: int, model: RowModel = MODEL) -> Sequence[PartSpec]:
    pieces = [(Piece(i, i + 1, 1), None) for i in range(begin, begin + count)]
    return handover.parts("slice", Staged("shop", "l", ""), model, (begin, begin + count), lambda: pieces)


def test_outcomes_come_in_order_and_no_more_are_asked_for_than_workers_can_have() -> None:
    pool = Idle(desired=2)
    handover = Handover(pool)
    following = iter([*cut(handover, 4, 3), *cut(handover, 7, 3)])
    handover.expect("shop", "slice", following)
    here: list[int] = []

    def prepare(part: PartSpec, model: RowModel) -> Prepared:
        here.append(part.after)
        return outcome(part, by=1)

    parts = cut(handover, 0, 4)
    taken = handover.take(MODEL, parts, prepare)
    pool.desired = 0  # nothing is asked for while there is nobody
    assert next(taken).counts == Counts(read=0, warned=1)
    pool.desired = 2
    assert next(taken).counts.read == 1  # not begun: it is done here
    assert pool.afters() == [1, 2, 3, 4, 5, 6], "one in hand of each of two workers, and two to wait"
    for after in (6, 3, 2):  # in whatever order they are done
        pool.finish(after)
    assert handover.prepared_parts() == 3
    assert [prepared.counts for prepared in taken] == [Counts(read=2), Counts(read=3)]
    assert here == [0, 1]
    assert pool.afters() == [1, 2, 3, 4, 5, 6, 7, 8]
    # What was expected is not asked for again, be the parts cut otherwise by now.
    pool.finish(4)
    pool.finish(5)
    assert [each.counts.read for each in handover.take(MODEL, cut(handover, 4, 3), prepare)] == [4, 5, 6]
    assert pool.afters() == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_workers_that_start_are_waited_for_while_nobody_knows_how_long_a_part_takes() -> None:
    def first(rate: float | None, starting: int) -> int:
        pool = Idle(desired=1, starting=starting)
        handover = Handover(pool, rate=lambda _: rate)
        begun = threading.Timer(0.3, lambda: pool.finish(0))
        begun.start()
        try:
            taken = handover.take(MODEL, cut(handover, 0, 1), lambda part, _: outcome(part, by=1))
            return next(taken).counts.warned
        finally:
            begun.cancel()

    assert [first(None, 1), first(None, 0), first(1_000.0, 1)] == [0, 1, 1]


def test_what_fails_is_met_here_and_what_nobody_takes_is_forgotten() -> None:
    pool = Idle(desired=1)
    handover = Handover(pool)
    seen: list[tuple[int, bool]] = []

    def prepare(part: PartSpec, model: RowModel) -> Prepared:
        seen.append((part.after, model.suspect))
        if part.after == 2:
            raise ModelBroken(model.name, "it cannot run")
        return outcome(part)

    handover.begin(parts := cut(handover, 0, 5))
    for (_, future), deaths in zip(pool.asked, (3, 0, 0), strict=True):
        future.set_running_or_notify_cancel()
        future.set_exception(PartFailed("it has died", deaths))
    taken = handover.take(MODEL, parts, prepare)
    assert [next(taken).counts.read, next(taken).counts.read] == [0, 1]
    with pytest.raises(ModelBroken):
        next(taken)
    assert seen == [(0, True), (1, False), (2, False)], "what workers die of is tried apart"
    assert all(future.cancelled() for part, future in pool.asked if part.after > 2)
    # Another version of the model asks for other parts, and those before it are in nobody's way.
    handover.begin(cut(handover, 5, 3))
    mended = MODEL.limited([("v", "v > ''")])
    list(handover.take(mended, other := cut(handover, 5, 3, mended), prepare))
    assert {part.id for part in other}.isdisjoint(part.id for part in parts)
    assert handover.prepared_parts() == 0
    assert handover._given == {}


def test_a_model_that_is_slow_is_not_stuck_and_one_that_hangs_costs_one_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("headrace.handover._TRICKLE", 0)
    monkeypatch.setattr("headrace.handover._BEGUN_WITHIN", 5.0)
    text = PYTHON.replace('key=["id"]', 'key=["id"], timeout="3s"').replace(
        "    return None if", '    time.sleep({"5": 2, "9": 30}.get(row["v"], 0))\n    return None if'
    )
    shop = Busy(tmp_path, "m.py", "import time\n" + text)
    shop.lane.log.append([entry(shop.shape, [("c", 11, n, (str(n), str(n))) for n in range(1, 11)])])
    pool = LocalPool(tmp_path / "state", "headrace.worker", environment(), patience=1.5)
    shop.lane.joiner.workers.use(Handover(pool))
    pool.resize(1)
    try:
        until(lambda: pool.state().ready == 1)
        shop.bring()
        assert pool.service()["m"].all_rows == 10
    finally:
        pool.close()
        shop.lane.close()
    assert "is replaced" not in caplog.text
    rows, records, _ = shop.held()
    assert [row[0] for row in rows] == [1, 2, 4, 5, 6, 8, 10]
    assert [(key, reason) for key, *_, reason, _ in records] == [
        ("7", "transform.python"), ("9", "crash.timeout"),
    ]  # fmt: skip


def test_what_has_no_place_or_is_too_large_is_handed_over_otherwise() -> None:
    pool = Idle(desired=1)
    handover = Handover(pool)

    def failing(begin: int, failure: PartFailed) -> None:
        parts = cut(handover, begin, 1)
        handover.begin(parts)
        pool.asked[-1][1].set_running_or_notify_cancel()
        pool.asked[-1][1].set_exception(failure)
        assert [each.counts.read for each in handover.take(MODEL, parts, lambda part, _: outcome(part))] == [
            begin
        ]

    rows = handover.rows_for(MODEL)
    failing(0, TooLarge("it takes more than 1024 MiB", 2))
    assert handover.rows_for(MODEL) == rows // 2
    failing(1, NoPlace("No space left on device"))
    assert not handover.takes("slice", MODEL, 2, 3)
    handover.begin(cut(handover, 2, 1))
    assert [part.after for part, _ in pool.asked] == [0, 1], "workers rest"
    handover._rests_until = 0.0
    assert handover.takes("slice", MODEL, 2, 3)


def test_whoever_waits_for_a_worker_may_be_ended() -> None:
    pool, told = Idle(desired=1), list[int]()

    def check() -> None:
        told.append(1)
        if len(told) == 2:
            raise InterruptedError

    handover = Handover(pool, check=check)
    handover.begin(parts := cut(handover, 0, 2))
    pool.asked[0][1].set_running_or_notify_cancel()
    with pytest.raises(InterruptedError):
        next(handover.take(MODEL, parts, lambda part, _: outcome(part)))
    assert pool.asked[1][1].cancelled()
    assert handover._given == {}
