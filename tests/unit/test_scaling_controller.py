"""Measuring, deciding live, and telling: the controller over a log and a pool of their own."""

from __future__ import annotations

import json
import math
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from headrace.alarms import alarm_of
from headrace.change import Kind, Offset, TableId
from headrace.errors import UserError
from headrace.scaling.budget import Budget
from headrace.scaling.controller import Clock, Controller
from headrace.scaling.endpoint import Endpoint
from headrace.scaling.journal import Entry, Journal, as_object
from headrace.scaling.measure import Handing, Meter, Stand, building
from headrace.scaling.metrics import exposition
from headrace.scaling.policy import Code, Decision, Limits, Load, Reason, SloBand, Snapshot
from headrace.scaling.pool import PoolState, Service
from headrace.scaling.rates import Greatest, MovingAverage, Share, Speed, p95
from headrace.scaling.watch import ScalingWatch
from headrace.scaling.worth import Costs, Worth

NOTHING = Decision(0, Reason(Code.IDLE))
ORDERS, SCORES = TableId("public", "orders"), TableId("public", "scores")
BEGIN = datetime(2026, 11, 29, 23, 0, tzinfo=UTC)


class CountedLog:
    """A log and its staging, of which only counts are kept: one entry an offset."""

    def __init__(self, clock: StoppedClock) -> None:
        self.entries: list[tuple[TableId, int, float]] = []
        self.trimmed = self.asked = 0
        self._clock = clock

    def arrive(self, table: TableId, rows: int) -> None:
        self.entries.append((table, rows, self._clock.wall))

    def volume(
        self, table: TableId, after: Offset, through: Offset, kinds: Sequence[Kind] = ()
    ) -> tuple[int, int]:
        assert kinds
        self.asked += 1
        held = self.entries[max(after, self.trimmed) : through]
        rows = sum(count for of, count, _ in held if of == table)
        return rows, 100 * rows

    def first_commit(self, after: Offset, table: TableId) -> int | None:
        return next((round(at * 1e6) for of, _, at in self.entries[after:] if of == table), None)

    def through(self) -> Offset:
        return len(self.entries)

    def count(self, table: TableId, after: Offset, through: Offset) -> int:
        return sum(count for of, count, _ in self.entries[after:through] if of == table)


@dataclass
class StoppedClock:
    """Time that only goes on when it is told to."""

    passed: float = 0.0
    begin: datetime = BEGIN

    @property
    def wall(self) -> float:
        return (self.begin + timedelta(seconds=self.passed)).timestamp()

    def clock(self) -> Clock:
        return Clock(lambda: self.begin + timedelta(seconds=self.passed), lambda: self.passed)


class InstantPool:
    """A pool whose workers are ready at once when they are asked for."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.busy = True
        self.most = 64
        self.done = Service()

    def resize(self, workers: int) -> None:
        self.sizes.append(workers)

    @property
    def ready(self) -> int:
        return min(self.most, self.sizes[-1]) if self.sizes else 0

    def state(self) -> PoolState:
        desired = self.sizes[-1] if self.sizes else 0
        return PoolState(desired, self.ready, 0, 0.0, self.ready if self.busy else 0, 0, (2.0, 3.0))

    def service(self) -> Mapping[str, Service]:
        return {"orders": self.done}


class Costly(NamedTuple):
    """Hands parts to workers, and takes longer for it than for the work."""

    own_rate: float | None = None
    handover_rate: float | None = 1_500.0

    def prepared_parts(self) -> int:
        return 5

    def figures(self, model: str) -> Costly:
        assert model == "orders"
        return self


Planted = Callable[..., "Plant"]


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planted:
    """Make a plant by whose clock it is."""

    def made(*given: Any, **named: Any) -> Plant:
        plant = Plant(tmp_path, *given, **named)
        monkeypatch.setattr("headrace.scaling.measure.time.time", lambda: plant.time.wall)
        return plant

    return made


def applied(meter: Meter, work: str, rows: int) -> None:
    """Have rows applied, in pieces that say nothing of apply's rate."""
    for begin in range(0, rows, 10_000):
        with meter.applying([min(10_000, rows - begin)], lambda count: (work, count)) as taken:
            assert list(taken)


class Plant:
    """A pipeline that does at most so many rows a second: the controller decides how many workers do them."""

    def __init__(
        self, folder: Path, limits: Limits | None = None, hours: float | None = None, cores: int = 8
    ) -> None:
        self.time = StoppedClock()
        self.log = CountedLog(self.time)
        self.pool = InstantPool()
        self.meter = Meter(self.log, self.log, cores)
        self.journal = Journal(folder / "scaling.jsonl")
        self.limits = limits or Limits(0, 8)
        self.own, self.mu, self.cap = 2_000.0, 10_000.0, 1e9
        self.done, self.served = 0, 0.0
        self.hours, self.folder = hours, folder
        self.controller = self.start()

    def start(self, handing: Handing | None = None) -> Controller:
        budget = Budget(self.folder / "budget.json", self.hours)
        clock = self.time.clock()
        return Controller(
            SloBand(), self.limits, self.pool, [self.meter], self.journal, budget, handing, clock
        )

    def second(self, rows: int) -> None:
        """Let rows arrive, be prepared and applied, and the controller look."""
        self.time.passed += 1
        self.log.arrive(ORDERS, rows)
        self.served += min(self.cap, self.pool.ready * self.mu or self.own)
        while self.done < self.log.through() and self.log.entries[self.done][1] <= self.served:
            self.served -= self.log.entries[self.done][1]
            applied(self.meter, "orders", self.log.entries[self.done][1])
            self.done += 1
        if self.done == self.log.through():
            self.served = 0.0
        self.meter.stand([Stand("orders", ORDERS, self.done, 60.0)])
        self.controller.step()

    def entries(self) -> list[Entry]:
        return list(self.journal.read())


def test_averages_begin_with_what_is_known_and_not_with_nothing() -> None:
    average = MovingAverage(300.0)
    assert average.value is None
    average.add(50.0, 0.5)
    assert average.value == pytest.approx(100.0)
    for _ in range(600):
        average.add(0.0, 1.0)
    assert average.value == pytest.approx(
        100.0 * (0.5 / 300) * math.exp(-2) / (1 - math.exp(-600.5 / 300)), rel=0.01
    )
    greatest = Greatest(10.0)
    assert [greatest.add(at, value) for at, value in ((0, 5), (5, 3), (9, 4), (10, 1), (20, 0))] == [
        *(5, 5, 5, 4, 0)
    ]
    assert p95([float(value) for value in range(1, 101)]) == 95.0
    assert p95([]) is None


def test_a_small_piece_tells_of_speed_until_a_large_one_has() -> None:
    speed = Speed()
    assert speed.value is None
    for _ in range(20):
        speed.note(10, 0.01)
    assert speed.value == pytest.approx(1_000)
    speed.recall(70_000.0)
    assert speed.value == 70_000.0
    speed.note(100_000, 1.0)
    speed.note(10, 0.01)
    assert speed.value == pytest.approx(100_000)


def test_the_main_process_and_workers_are_compared_on_pieces_of_a_size() -> None:
    log = CountedLog(StoppedClock())
    meter = Meter(log, log, cores=2)

    def speeds() -> tuple[float | None, float | None, float | None]:
        meter.stand([Stand("orders", ORDERS, 0, 60.0)])
        for second in (0.0, 20.0):
            meter.look(second)
        (load,) = meter.loads() or ()
        return load.own_rate, load.mu, load.service_rate

    meter.worked("orders", 600, 0.06)
    assert speeds() == (None, 10_000, 10_000)
    meter.prepared("orders", 600, 0.06, 0.0)
    assert speeds() == (10_000, 10_000, 10_000)
    meter.prepared("orders", 120_000, 1.0, 0.0)  # a worker would do it no slower, as far as is known
    assert speeds() == (120_000, None, 120_000)
    meter.worked("orders", 80_000, 1.0)
    assert speeds() == (120_000, 80_000, 80_000)
    meter.prepared("prices", 600, 0.06, 0.0)
    meter.worked("prices", 3_000, 3.0)  # few, and long: what a piece costs beside its rows is little of it
    meter.stand([Stand("prices", SCORES, 0, 60.0)])
    meter.look(21.0)
    (load,) = meter.loads() or ()
    assert (load.own_rate, load.mu) == (1_000, 1_000)


def test_a_moment_says_nothing_of_what_workers_lose() -> None:
    share = Share()
    assert share.value == 1
    share.note(0.01, 0.0)
    assert share.value == 1
    share.note(0.0, 0.01)
    assert share.value == 1
    share.note(3.0, 1.0)
    assert share.value == pytest.approx(0.75, abs=0.01)
    share.note(0.0, 1_000.0)
    assert share.value == pytest.approx(0.1)


def test_workers_that_die_are_slow_for_as_long_as_they_do() -> None:
    log = CountedLog(StoppedClock())
    meter = Meter(log, log, cores=2)

    def load() -> Load:
        meter.stand([Stand("orders", ORDERS, 0, 60.0)])
        for second in (0.0, 20.0):
            meter.look(second)
        (load,) = meter.loads() or ()
        return load

    meter.prepared("orders", 120_000, 1.0, 1.0)
    meter.stand([Stand("orders", ORDERS, 0, 60.0)])
    meter.look(0.0)
    meter.worked("orders", 600_000, 6.0)
    meter.lost("orders", 6.0, 6.0)
    assert load().mu == meter.rate("orders") == pytest.approx(50_000, rel=0.02)
    assert load().own_rate == 120_000
    meter.lost("orders", 0.0, 120.0)  # one was stuck, which may be chance
    assert load().mu == pytest.approx(10_000)
    assert load().is_worth_a_worker is False
    for _ in range(1_000):
        meter.worked("orders", 20_000, 0.2)
        meter.lost("orders", 0.2, 0.0)
    assert load().mu == pytest.approx(100_000, rel=0.1)
    assert load().own_rate == 120_000


def test_a_row_of_another_table_keeps_nothing_from_being_decided(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant = planted()
    plant.meter.prepared("orders", 10_000, 5.0, 0.1)
    plant.meter.stand([Stand("orders", ORDERS, 0, 60.0), Stand("settings", SCORES, 0, 60.0)])
    monkeypatch.setattr(plant.meter, "stand", lambda _: None)
    plant.log.arrive(SCORES, 1)
    plant.log.arrive(ORDERS, 3_000_000)
    for _ in range(20):
        plant.time.passed += 1
        plant.controller.step()
    assert plant.pool.ready > 0
    assert plant.entries()[-1].decision.reason.code is not Code.FIGURES_MISSING


def test_what_waits_and_arrives_is_counted_from_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    time = StoppedClock()
    monkeypatch.setattr("headrace.scaling.measure.time.time", lambda: time.wall)
    log = CountedLog(time)
    meter = Meter(log, log, cores=2)
    meter.look(0.0)
    assert (meter.loads(), meter.looked_at) == (None, None)  # nobody has said where anything stands
    log.arrive(ORDERS, 500)
    log.arrive(SCORES, 70)
    for second in range(12):
        time.passed = float(second)
        meter.stand([Stand("orders", ORDERS, second // 4, 60.0), Stand("scores", SCORES, 0, 600.0)])
        meter.look(float(second))
        log.arrive(ORDERS, 100)
        if second < 1:
            assert meter.loads() is None  # what arrives is not known yet, and it is not 0
    loads = meter.loads()
    assert loads is not None
    orders, scores = loads
    assert (orders.backlog_rows, orders.backlog_bytes) == (11 * 100, 110_000)
    assert (scores.backlog_rows, scores.slo) == (70, 600.0)
    assert orders.ewma_30s == pytest.approx(100.0)
    assert orders.max_300s == pytest.approx(100.0)
    assert scores.ewma_300s == 0.0
    assert (orders.mu, orders.own_rate, orders.worth, meter.apply_rate) == (None, None, None, None)
    assert orders.oldest_age == pytest.approx(11.0)
    meter.look(12.0)
    asked = log.asked
    meter.look(13.0)
    assert log.asked == asked  # nothing has moved
    applied(meter, "orders", 500)
    assert meter.take_served() == {"orders": 500}
    assert meter.staged_rate is None  # so few say nothing of capture
    for second, rows in enumerate((60_000, 50_000, 40_000, 0, 50_000, 10)):
        log.arrive(ORDERS, rows)
        meter.look(14.0 + second)
    assert meter.staged_rate == pytest.approx(200_000 / 5)
    assert not meter.take_served()


def test_all_of_a_table_is_work_of_its_own_of_which_the_log_need_not_hold_all() -> None:
    time = StoppedClock()
    log = CountedLog(time)
    for _ in range(10):
        log.arrive(ORDERS, 100)
    log.trimmed = 5
    meter = Meter(log, log, cores=2)
    for second in range(12):
        done = min(10, second)
        meter.stand([Stand("orders", ORDERS, 10, 60.0), Stand("orders", ORDERS, done, 60.0, through=10)])
        meter.look(float(second))
    loads = meter.loads()
    assert loads is not None
    assert [(load.model, load.backlog_rows) for load in loads] == [("orders", 0), (building("orders"), 0)]
    assert loads[1].ewma_300s == loads[1].oldest_age == 0.0


def test_work_is_worth_a_worker_where_it_is_dear_and_cores_are_idle() -> None:
    python = Costs(own_rate=9_000, handover_rate=None, busy_cores=0.3, cores=2)
    assert Worth().judge(python) is True
    assert Worth().judge(replace(python, handover_rate=400_000)) is True
    assert Worth().judge(replace(python, handover_rate=8_000)) is False
    wide_casts = Costs(own_rate=150_000, handover_rate=300_000, busy_cores=1.8, cores=2)
    assert Worth().judge(wide_casts) is False
    assert Worth().judge(replace(wide_casts, cores=16)) is True
    plain_sql = Costs(own_rate=420_000, handover_rate=None, busy_cores=0.8, cores=2, apply_rate=267_000)
    assert Worth().judge(plain_sql) is False  # the main process prepares while it applies, and waits for that
    assert Worth().judge(replace(plain_sql, apply_rate=600_000)) is True
    assert Worth().judge(replace(python, apply_rate=334_000)) is True
    assert Worth().judge(replace(python, cores=1)) is False  # one core cannot do two things
    assert Worth().judge(replace(python, worker_rate=7_000)) is True
    assert Worth().judge(replace(python, worker_rate=5_000)) is False  # two of which do not make 9,000
    wavers = Worth()
    assert wavers.judge(Costs(None, None, None, 2)) is None
    rates = (13_500, 14_100, 13_500, 11_400, 13_500, 14_100)
    judged = [wavers.judge(replace(python, own_rate=10_000, handover_rate=rate)) for rate in rates]
    assert judged == [False, True, True, False, False, True]
    assert wavers.judge(replace(python, own_rate=None)) is True  # what is not known changes nothing


def test_a_burst_brings_workers_and_its_end_sends_them_home(planted: Planted) -> None:
    plant = planted()
    for _ in range(8):
        plant.second(1_000)
    held = plant.entries()
    assert {entry.decision.reason.code for entry in held} == {Code.FIGURES_MISSING}
    plant.meter.prepared("orders", 10_000, 5.0, 0.1)
    plant.pool.done = Service(10_000, 1.0)
    for _ in range(60):
        plant.second(1_000)
    assert plant.pool.ready == 0  # the main process does it by itself
    for _ in range(120):
        plant.second(40_000)
    assert 4 <= plant.pool.ready <= 8
    assert plant.meter.loads()[0].oldest_age < 60  # type: ignore[index]
    for _ in range(700):
        plant.second(0)
    assert plant.pool.ready == 0
    entries = plant.entries()
    assert all(SloBand().decide(entry.snapshot) == entry.decision for entry in entries)
    gaps = [(b.at - a.at).total_seconds() for a, b in pairwise(entries)]
    assert max(gaps) <= 65
    assert len(entries) < len(gaps) + 2 < 60
    plant.controller.close()
    plant.controller.close()
    assert len(plant.entries()) <= len(entries) + 1
    assert len({entry.at for entry in plant.entries()}) == len(plant.entries())  # each of them once
    codes = {entry.decision.reason.code for entry in entries}
    assert codes >= {Code.FIGURES_MISSING, Code.OWN_PROCESS, Code.BEHIND}
    assert [entry.snapshot.start_p95 for entry in entries][-1] == 3.0


@pytest.mark.parametrize("cores", [8, 32])
def test_workers_that_take_from_each_other_bring_no_gain(planted: Planted, cores: int) -> None:
    """All are busy, and each as much slower as there are more of them."""
    plant = planted(cores=cores)
    plant.meter.prepared("orders", 10_000, 5.0, 0.1)
    plant.cap = plant.own
    for _ in range(600):
        if ready := plant.pool.ready:
            known = plant.pool.done
            plant.pool.done = Service(known.rows + 2_000, known.seconds + ready)
        plant.second(3_000)
    last = plant.entries()[-1]
    if cores == 8:  # it is those cores that they take from each other
        assert (last.decision.workers, last.decision.reason.code) == (0, Code.WORKERS_ARE_SLOWER)
        return
    assert last.snapshot.raises_without_gain == 1  # to all that there may be at once
    assert last.snapshot.loads[0].mu == pytest.approx(plant.own / plant.pool.ready, rel=0.1)


def test_work_that_costs_more_to_hand_over_stays_in_the_main_process(
    planted: Planted, tmp_path: Path
) -> None:
    plant = planted()
    plant.meter.prepared("orders", 10_000, 5.0, 0.1)
    assert plant.meter.is_worth_a_worker("orders")  # until it has been measured
    plant.controller = plant.start(Costly())
    for _ in range(60):
        plant.second(40_000)
    last = plant.entries()[-1]
    assert (last.decision.workers, last.decision.reason.code) == (0, Code.NOT_WORTH_IT)
    assert (last.snapshot.prepared_parts, last.snapshot.loads[0].handover_rate) == (5, 1_500.0)
    assert not plant.meter.is_worth_a_worker("orders")
    busy = Plant(tmp_path / "busy")
    busy.meter.prepared("orders", 10_000, 5.0, 5.0 * 7.5)
    for _ in range(60):
        busy.second(40_000)
    reason = busy.entries()[-1].decision.reason
    assert (busy.pool.ready, reason.code) == (0, Code.CORES_ARE_BUSY)
    assert "7.5 cores busy" in reason.sentence


def test_rates_survive_a_restart_and_what_is_missing_is_said(planted: Planted, tmp_path: Path) -> None:
    plant = planted()
    plant.meter.prepared("orders", 10_000, 5.0, 0.1)
    plant.pool.done = Service(10_000, 1.0)
    for _ in range(70):
        plant.second(100)
    again = Plant(tmp_path)
    again.log.entries, again.done = plant.log.entries, 3
    again.own, again.pool.most = 0.0, 0
    assert again.meter.loads() is None
    for _ in range(20):
        again.second(100)
    (load,) = again.meter.loads() or ()
    assert (load.mu, load.own_rate) == (10_000, 2_000)
    assert load.backlog_rows == 100 * (70 - 3 + 20)


def test_a_budget_holds_over_restarts_and_begins_anew_each_day(tmp_path: Path) -> None:
    path = tmp_path / "budget.json"
    budget = Budget(path, 2.0)
    assert budget.left(BEGIN) == 2.0
    budget.spend(4, 900.0, BEGIN + timedelta(minutes=15))
    again = Budget(path, 2.0)  # killed: nothing was closed
    assert again.left(BEGIN + timedelta(minutes=16)) == pytest.approx(1.0)
    again.spend(4, 3600.0, BEGIN + timedelta(minutes=50))
    assert again.left(BEGIN + timedelta(minutes=50)) == 0.0
    assert again.left(BEGIN + timedelta(minutes=61)) == 2.0
    assert Budget(path, None).left(BEGIN) is None
    path.write_text("{")
    assert Budget(path, 2.0).left(BEGIN) == 2.0


def test_a_spent_budget_sends_workers_home(planted: Planted) -> None:
    plant = planted(Limits(0, 8), hours=0.5)
    plant.meter.prepared("orders", 10_000, 5.0, 0.1)
    plant.pool.done = Service(10_000, 1.0)
    for _ in range(900):
        plant.second(60_000)
    last = plant.entries()[-1]
    assert last.decision.reason.code is Code.BUDGET_SPENT
    assert plant.controller.report()["worker_hours_today"] == pytest.approx(0.5, abs=0.1)
    assert "max_worker_hours_per_day" in last.decision.reason.sentence


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[str, bool]]:
    found = [alarm_of(record) for record in caplog.records if record.name == "headrace.alert"]
    return [
        (alarm.subject.removeprefix("scaling."), alarm.is_over) for alarm in found if alarm.kind == "scaling"
    ]


def snapshot(backlog: float, ready: int, cap: int = 2) -> Snapshot:
    load = Load("orders", 60.0, backlog, 90.0, 100.0, 100.0, 100.0, 100.0, own_rate=50.0)
    return Snapshot((load,), ready, 0, ready, 5.0, Limits(0, cap, price=0.1))


def test_people_are_told_of_what_lasts_once_and_of_its_end(caplog: pytest.LogCaptureFixture) -> None:
    watch = ScalingWatch()
    decided = SloBand().decide(snapshot(60_000, 2))
    assert decided.reason.code is Code.SLO_INFEASIBLE
    for second in range(0, 200, 5):
        watch.note(second, snapshot(60_000 + 1_000 * second, 2), decided)
    assert told(caplog) == [("target", False), ("cap", False)]
    text = caplog.records[0].getMessage()
    assert "SLO_INFEASIBLE(cap=2)" in text
    assert "in money" in text
    fine = SloBand().decide(snapshot(10, 2))
    watch.note(200, snapshot(10, 2), fine)
    watch.note(230, snapshot(10, 2), decided)  # back within the minute: it was not over
    assert len(told(caplog)) == 2
    for second in range(235, 400, 5):
        watch.note(second, snapshot(10, 2), fine)
    assert sorted(told(caplog)[2:]) == [("cap", True), ("target", True)]
    in_vain = Decision(2, Reason(Code.NO_GAIN, {"raises": 2, "age": 90.0, "slo": 60.0}))
    for second in range(400, 500, 5):
        watch.note(second, snapshot(10, 2), in_vain)
    assert told(caplog)[4:] == [("gain", False)]
    rebuild = ScalingWatch()  # what is made beside what people look at has no age
    whole = replace(snapshot(60_000, 2).loads[0], model="orders (all of it)", oldest_age=0.0)
    for second in range(0, 200, 5):
        rebuild.note(second, replace(snapshot(60_000, 2), loads=(whole,)), decided)
    assert len(told(caplog)) == 5
    nobody_wants_workers = ScalingWatch()
    for second in range(0, 200, 5):
        nobody_wants_workers.note(second, snapshot(60_000, 0, cap=0), decided)
    assert len(told(caplog)) == 5


def test_what_a_controller_sees_is_told_once_and_so_is_its_end(
    planted: Planted, caplog: pytest.LogCaptureFixture
) -> None:
    """More arrives than all workers do; then no worker starts; then the destination takes no more than the
    main process alone has done."""
    plant = planted(Limits(0, 2))
    plant.meter.prepared("orders", 10_000, 5.0, 0.1)
    plant.pool.done = Service(10_000, 1.0)
    for _ in range(300):
        plant.second(40_000)
    assert sorted(told(caplog)) == [("cap", False), ("target", False)]
    for _ in range(900):
        plant.second(0)
    assert (plant.pool.ready, sorted(told(caplog)[2:])) == (0, [("cap", True), ("target", True)])
    plant.pool.most = 0
    for _ in range(120):
        plant.second(6_000)
    assert told(caplog)[4:] == [("start", False)]
    plant.pool.most = 64
    for _ in range(900):
        plant.second(0)
    assert told(caplog)[5:] == [("start", True)]
    plant.limits, plant.cap = Limits(0, 8), plant.own
    plant.controller = plant.start()
    for _ in range(1200):
        plant.second(4_000)
    assert told(caplog)[6:] == [("gain", False)]
    assert plant.pool.ready < 8
    plant.cap = 1e9
    for _ in range(900):
        plant.second(0)
    assert told(caplog)[7:] == [("gain", True)]


def test_http_tells_how_many_workers_there_should_be_and_all_inputs(planted: Planted) -> None:
    plant = planted()
    endpoint = Endpoint(("127.0.0.1", 0), plant.controller.report)
    base = f"http://127.0.0.1:{endpoint.port}"
    try:
        assert json.load(urllib.request.urlopen(f"{base}/scale"))["desired"] == 0
        plant.pool.done = Service(10_000, 1.0)
        for _ in range(40):
            plant.second(40_000)
        found = json.load(urllib.request.urlopen(f"{base}/scale"))
        assert found["desired"] == plant.pool.ready > 0
        assert found["decision"]["snapshot"]["loads"][0]["model"] == "orders"
        answer = urllib.request.urlopen(f"{base}/metrics")
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        text = answer.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{base}/")
        with pytest.raises(UserError, match="Nothing can listen"):
            Endpoint(("127.0.0.1", endpoint.port), plant.controller.report)
    finally:
        endpoint.close()
    sample = re.compile(r'headrace_scale_[a-z0-9_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? [-+0-9.e]+')
    lines = text.splitlines()
    assert all(line.startswith("# ") or sample.fullmatch(line) for line in lines)
    assert f"headrace_scale_desired_workers {plant.pool.ready}" in lines
    assert 'headrace_scale_worker_rows_per_second{model="orders"} 10000' in lines
    assert "own_rows_per_second" not in text  # nobody has measured it
    families = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(set(families)) == len(families)
    assert all(line.split("{")[0].split()[0] in families for line in lines if line[0] != "#")


def test_all_that_is_decided_by_has_a_gauge() -> None:
    """Each input is another number here, so that each is found by its own."""
    named = Load("orders", *(float(number) for number in range(101, 101 + len(fields(Load)) - 1)))
    limits = Limits(*(200 + number for number in range(len(fields(Limits)))))
    numbers = {
        field.name: 300 + number
        for number, field in enumerate(fields(Snapshot))
        if field.name not in ("loads", "limits", "desired", "hour")
    }
    entry = Entry(BEGIN, SloBand(), Snapshot((named,), limits=limits, desired=0, **numbers), NOTHING)  # type: ignore[arg-type]
    pool = dict.fromkeys(("desired", "ready", "starting", "busy", "queued", "worker_hours_today"), 0)
    text = exposition({**pool, "decision": as_object(entry)})
    told = {float(line.split()[-1]) for line in text.splitlines() if line[0] != "#"}
    inputs = {*range(101, 101 + len(fields(Load)) - 1), *range(200, 200 + len(fields(Limits)))}
    inputs |= set(numbers.values()) - {numbers["ready"], numbers["starting"]}  # the pool's own are told
    assert inputs <= told
