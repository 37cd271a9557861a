"""Scaling decisions: pure functions, held to what must be true of every one of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.scaling.gain import GainWatch
from headrace.scaling.policy import (
    Backlog,
    Code,
    Decision,
    Limits,
    Load,
    Policy,
    Schedule,
    SloBand,
    Snapshot,
    Static,
)

POLICIES: tuple[Policy, ...] = (SloBand(), Backlog(), Static(5), Schedule(tuple(range(168))))
MU = 1000.0
"""Rows per second of a worker."""


def load(**figures: float | str | None) -> Load:
    base = Load("orders", 120.0, 0.0, 0.0, 0.0, 0.0, 0.0, MU)
    return replace(base, **figures)  # type: ignore[arg-type]


def quiet(workers: int = 3, **figures: object) -> Snapshot:
    """Workers that keep up with what just so many do."""
    rate = workers * MU * 0.98
    base = Snapshot(
        loads=(load(ewma_30s=rate, ewma_300s=rate, max_300s=rate),),
        ready=workers,
        starting=0,
        desired=workers,
        start_p95=60.0,
        limits=Limits(0, 16),
    )
    return replace(base, **figures)  # type: ignore[arg-type]


def burst(backlog: float = 3e6, **figures: object) -> Snapshot:
    """A backlog that three workers cannot do in time."""
    snapshot = quiet(3)
    return replace(snapshot, loads=(replace(snapshot.loads[0], backlog_rows=backlog),), **figures)  # type: ignore[arg-type]


rates = st.floats(0, 50_000)
loads = st.builds(
    load,
    slo=st.sampled_from([5.0, 60.0, 120.0, 3600.0]),
    backlog_rows=st.floats(0, 1e8),
    oldest_age=st.floats(0, 1e4),
    ewma_30s=rates,
    ewma_300s=rates,
    max_300s=rates,
    mu=st.none() | st.floats(1, 1e5),
    own_rate=st.none() | st.floats(1, 1e5),
    handover_rate=st.none() | st.floats(1, 1e5),
)
counts = st.integers(0, 20)
snapshots = st.builds(
    Snapshot,
    loads=st.lists(loads, max_size=3).map(tuple),
    ready=counts,
    starting=counts,
    desired=counts,
    start_p95=st.floats(0, 600),
    limits=st.builds(
        Limits, st.integers(0, 4), st.integers(4, 20), st.none() | st.floats(-1, 5), st.floats(0, 10)
    ),
    starting_seconds=st.floats(0, 1000),
    parts=st.none() | st.integers(0, 40),
    figures_age=st.none() | st.floats(0, 200),
    apply_rate=st.none() | st.floats(1, 1e5),
    prepared_parts=counts,
    raises_without_gain=st.integers(0, 3),
    hour=st.none() | st.integers(0, 167),
)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@given(snapshot=snapshots)
def test_every_decision_is_within_the_limits_the_same_again_and_in_words(
    policy: Policy, snapshot: Snapshot
) -> None:
    decision = policy.decide(snapshot)
    limits = snapshot.limits
    assert 0 <= decision.workers <= limits.max_workers
    if limits.worker_hours_left is not None:
        assert decision.workers * 300 <= max(0.0, limits.worker_hours_left) * 3600
    assert policy.decide(snapshot) == decision
    assert decision.reason.sentence


@given(snapshot=snapshots, more=st.floats(0, 1e8), which=st.integers(0, 2))
@pytest.mark.parametrize("policy", POLICIES[:2], ids=lambda policy: policy.name)
def test_more_backlog_never_means_fewer_workers(
    policy: Policy, snapshot: Snapshot, more: float, which: int
) -> None:
    grown = list(snapshot.loads)
    if grown:
        at = which % len(grown)
        grown[at] = replace(grown[at], backlog_rows=grown[at].backlog_rows + more)
    larger = replace(snapshot, loads=tuple(grown))
    assert policy.decide(larger).workers >= policy.decide(snapshot).workers


@given(snapshot=snapshots, age=st.none() | st.floats(61, 1e6))
@pytest.mark.parametrize("policy", POLICIES[:2], ids=lambda policy: policy.name)
def test_figures_that_are_stale_or_missing_change_nothing(
    policy: Policy, snapshot: Snapshot, age: float | None
) -> None:
    within = replace(snapshot, figures_age=age, limits=Limits(0, 20), loads=(load(slo=60.0),))
    assert policy.decide(within).workers == snapshot.desired
    unmeasured = replace(within, figures_age=0.0, loads=(load(mu=None, backlog_rows=1e9),))
    decision = policy.decide(unmeasured)
    assert (decision.workers, decision.reason.code) == (snapshot.desired, Code.FIGURES_MISSING)
    assert "orders" in decision.reason.sentence


@given(snapshot=snapshots)
def test_within_its_bounds_the_band_decides_the_same(snapshot: Snapshot) -> None:
    """The simulation leaves out what the bounds rule out."""
    policy = SloBand()
    if (bounds := policy.bounds(snapshot)) is None or snapshot.figures_age is None:
        return
    (one,) = snapshot.loads
    pressed = bounds.rate_weight * max(one.ewma_30s, one.ewma_300s)
    pressed += bounds.rise_weight * max(0.0, one.ewma_30s - one.ewma_300s)
    inside = (
        one.backlog_rows + pressed <= bounds.limit - 1e-6 * abs(bounds.limit)
        and one.oldest_age <= bounds.age
        and one.max_300s > bounds.peak
        and one.ewma_30s >= bounds.fast
    )
    limits = snapshot.limits
    if inside and snapshot.figures_age <= 60 and limits.min_workers <= snapshot.desired <= limits.max_workers:
        assert policy.decide(snapshot).workers == snapshot.desired


def test_a_burst_is_met_with_what_brings_it_back_in_half_a_target() -> None:
    decision = SloBand().decide(burst(300_000))
    # In 60 s 2.94 * 60 s of work come and three workers do 180: 296.4 s wait then. All but 88.2 s of them (a
    # quarter of a target of arrivals) in half a target are 3.47 workers, beside the 2.94.
    assert decision.workers == 7
    assert decision.reason.code is Code.BEHIND
    assert decision.reason.sentence == (
        "Freshness will be 101 s of 120 s when workers ordered now are ready: arrivals need 2.94 workers, "
        "and 300 s of work wait."
    )
    ordered = burst(300_000, starting=4, desired=7)
    assert SloBand().decide(ordered).reason.code is Code.CATCHING_UP


def test_workers_on_their_way_count() -> None:
    """What four do that are half started need not be ordered a second time."""
    halfway = burst(450_000, starting=4, desired=7)
    assert SloBand().decide(halfway).workers > 7
    assert SloBand().decide(replace(halfway, starting_seconds=4 * 45.0)).workers == 7


def test_a_target_out_of_reach_says_what_meeting_it_costs() -> None:
    decision = SloBand().decide(burst(limits=Limits(0, 4, price=0.5)))
    assert (decision.workers, decision.reason.code) == (4, Code.SLO_INFEASIBLE)
    wanted = decision.reason.figures["wanted"]
    assert isinstance(wanted, int)
    assert decision.reason.sentence == (
        f"SLO_INFEASIBLE(cap=4): the target of 120 s needs {wanted} workers, max_workers is 4. Meeting it "
        f"costs {wanted - 4} worker-hours more an hour, {(wanted - 4) / 2:.2f} in money."
    )


def code_of(decision: Decision) -> tuple[int, Code]:
    return decision.workers, decision.reason.code


def test_where_workers_do_not_help_none_is_added() -> None:
    band = SloBand()
    assert code_of(band.decide(burst(raises_without_gain=2))) == (3, Code.NO_GAIN)
    assert code_of(band.decide(burst(prepared_parts=6))) == (3, Code.APPLY_IS_THE_LIMIT)
    assert code_of(band.decide(burst(apply_rate=2.5 * MU))) == (3, Code.APPLY_IS_THE_LIMIT)
    assert code_of(band.decide(burst(apply_rate=1.5 * MU, prepared_parts=6))) == (2, Code.APPLY_IS_THE_LIMIT)
    assert code_of(band.decide(burst(apply_rate=5 * MU))) == (5, Code.APPLY_IS_THE_LIMIT)
    assert code_of(band.decide(quiet(5, apply_rate=2 * MU))) == (2, Code.APPLY_IS_THE_LIMIT)
    assert band.decide(burst(apply_rate=40 * MU)).workers == 16
    capped = band.decide(burst(apply_rate=8 * MU, limits=Limits(0, 7)))  # apply would bear one more
    assert code_of(capped) == (7, Code.SLO_INFEASIBLE)
    assert capped.reason.figures["wanted"] == 8
    assert code_of(band.decide(burst(parts=5))) == (5, Code.FEW_PARTS)
    assert code_of(band.decide(burst(limits=Limits(0, 16, worker_hours_left=0.4)))) == (4, Code.BUDGET_SPENT)


def test_what_waits_for_apply_alone_needs_no_worker() -> None:
    """The destination is away: changes grow old, and none of them waits to be prepared."""
    old = load(oldest_age=5000.0, ewma_30s=1.0, ewma_300s=1.0, own_rate=MU)
    assert code_of(SloBand().decide(quiet(0, loads=(old,)))) == (0, Code.OWN_PROCESS)
    soon_done = quiet(0, loads=(replace(old, backlog_rows=59 * MU),))  # by the main process, in a start time
    assert code_of(SloBand().decide(soon_done)) == (0, Code.OWN_PROCESS)
    assert SloBand().decide(quiet(0, loads=(replace(old, backlog_rows=61 * MU),))).workers == 1
    even = {"ewma_30s": 900.0, "ewma_300s": 900.0, "max_300s": 900.0, "own_rate": MU, "backlog_rows": 6_500.0}
    for age, workers in ((59.0, 0), (61.0, 1)):  # half a second of work will be left
        aged = quiet(0, loads=(load(oldest_age=age, **even),))
        assert SloBand().decide(aged).workers == workers
    away = burst(apply_waits=True)
    assert code_of(SloBand().decide(away)) == code_of(Backlog().decide(away)) == (3, Code.APPLY_WAITS)


def test_all_of_a_table_after_hours_of_quiet_is_told_in_times_that_can_be() -> None:
    """What is made anew arrives at no rate: the little that is left of an average says nothing of it."""
    whole = load(backlog_rows=3e6, own_rate=MU / 2)
    for faint in (0.0, 5e-324, 1e-300, 1e-9):
        trickle = load(model="prices", ewma_300s=faint, max_300s=faint, own_rate=MU / 2)
        decision = SloBand().decide(quiet(0, loads=(trickle, whole), start_p95=10.0))
        assert decision.workers == 16
        assert decision.reason.figures["age"] in (120.0, pytest.approx((3000 - 5) / 0.5))


def test_what_is_cheaper_than_its_handing_over_stays_in_the_process() -> None:
    cheap = load(backlog_rows=1e9, oldest_age=1e4, ewma_30s=5e4, own_rate=60_000.0, handover_rate=50_000.0)
    idle = replace(quiet(0), loads=(cheap,))
    assert code_of(SloBand().decide(idle)) == (0, Code.NOT_WORTH_IT)
    dear = replace(cheap, own_rate=900.0)
    assert SloBand().decide(replace(idle, loads=(cheap, dear))).workers > 0


def test_the_main_process_does_the_trickle_and_takes_over_again() -> None:
    band = SloBand()
    trickle = load(ewma_30s=500.0, ewma_300s=500.0, max_300s=500.0, own_rate=MU, backlog_rows=900.0)
    assert code_of(band.decide(replace(quiet(0), loads=(trickle,)))) == (0, Code.OWN_PROCESS)
    assert code_of(band.decide(replace(quiet(2), loads=(trickle,)))) == (0, Code.OWN_PROCESS)
    stopped = replace(quiet(2), loads=(load(ewma_300s=300.0, max_300s=900.0),))
    assert code_of(band.decide(stopped)) == (0, Code.IDLE)
    assert code_of(band.decide(replace(stopped, loads=()))) == (0, Code.IDLE)


@pytest.mark.parametrize(
    ("backlog", "highest", "workers"),
    [(185, 185, 3), (240, 240, 4), (1000, 1000, 7), (20, 170, 3), (20, 110, 2), (0, 0, 0)],
    ids=["tolerated", "more", "four at a time", "not yet fewer", "fewer", "none"],
)
def test_the_rule_of_the_backlog_is_that_of_keda(backlog: float, highest: float, workers: int) -> None:
    """60 s of work for each of three workers; the highest backlog of the last 300 s keeps them."""
    one = load(backlog_rows=backlog * MU, max_backlog_300s=highest * MU)
    assert Backlog().decide(quiet(3, loads=(one,))).workers == workers


def test_each_model_has_its_own_target() -> None:
    """A lenient model's backlog waits; the same backlog of a strict one does not."""
    lenient = load(model="history", slo=3600.0, backlog_rows=600_000.0, ewma_30s=10.0, ewma_300s=10.0)
    strict = load(model="orders", slo=60.0, ewma_30s=900.0, ewma_300s=900.0, max_300s=900.0)
    two = replace(quiet(2), loads=(lenient, strict), start_p95=20.0)
    assert code_of(SloBand().decide(two)) == (1, Code.QUIETER)
    behind = SloBand().decide(replace(two, loads=(lenient, replace(strict, backlog_rows=200_000.0))))
    assert behind.workers > 2
    assert behind.reason.figures["model"] == "orders"


@pytest.mark.parametrize("steps", [(2, 4, 8), (0, 1, 3)], ids=["more of them", "the first ones"])
@pytest.mark.parametrize("limited", [False, True])
def test_raises_are_judged_by_their_throughput(limited: bool, steps: tuple[int, ...]) -> None:
    watch, at, failed, own = GainWatch(), 0.0, list[int](), 0.8
    least = max(own, steps[0])
    for workers in steps:
        for _ in range(5):
            rate = least if limited else max(own, workers)
            failed.append(watch.note(at, workers, rate, is_behind=True, own=own))
            at += 15
    assert failed[-1] == (2 if limited else 0)
    if limited:  # the limit may have gone: one more may be tried
        assert watch.note(at + 1800, steps[-1], least, is_behind=True) == 1
        assert watch.note(at + 1801, steps[-1], least, is_behind=True) == 1
        assert watch.note(at + 1830, steps[-1], least + 1, is_behind=True) == 0
    assert watch.note(at + 1831, steps[-1], least, is_behind=False) == 0


@given(size=st.floats(2, 60), phase=st.floats(0, 60), own=st.floats(0.2, 1.2))
def test_a_raise_that_helps_is_seen_to_although_apply_takes_large_slices(
    size: float, phase: float, own: float
) -> None:
    """Looks of 5 s see all of a slice at once, or nothing of it; slices take up to 20 s."""
    watch, at, done, told = GainWatch(), 0.0, phase, 0.0
    for workers in [0] * 12 + [3] * 24:
        at += 5
        done += 5 * max(own, workers)
        slices = done // size * size
        assert watch.note(at, workers, (slices - told) / 5, is_behind=True, own=own) == 0
        told = slices
