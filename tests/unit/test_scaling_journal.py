"""The journal of decisions, what is made of it, and the plan."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from test_scaling_policy import snapshots

from headrace.errors import UserError
from headrace.scaling.arrivals import TICK
from headrace.scaling.journal import Entry, Journal, JournalledPolicy, arrivals_of
from headrace.scaling.plan import Answer, Figure, Figures, Plan, Question, figures_of, plan
from headrace.scaling.policy import Backlog, Limits, Load, Schedule, SloBand, Snapshot, Static

BEGIN = datetime(2026, 6, 29, 14, 5, tzinfo=UTC)


def entry(tick: int, rate: float = 2000.0) -> Entry:
    load = Load("orders", 60.0, 1e5, 30.0, rate, rate, rate, 1000.0, own_rate=800.0, backlog_bytes=1e7)
    dear = Load("scored", 600.0, 0.0, 0.0, rate / 10, rate / 10, rate / 10, 100.0, own_rate=80.0)
    snapshot = Snapshot((load, dear), 2, 1, 3, 8.0, Limits(0, 8, 20.5, 0.1), apply_rate=9000.0, parts=12)
    return Entry(BEGIN + timedelta(seconds=tick * TICK), SloBand(), snapshot, SloBand().decide(snapshot))


def test_what_is_written_is_read_and_decides_the_same_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "state" / "scaling.jsonl")
    assert list(journal.read()) == []
    written = [entry(tick) for tick in range(3)]
    for one in written:
        journal.append(one)
    read = list(journal.read())
    assert read == written
    assert [SloBand().decide(one.snapshot) for one in read] == [one.decision for one in read]
    assert list(journal.read(since=BEGIN + timedelta(seconds=TICK))) == written[1:]
    line = json.loads((tmp_path / "state" / "scaling.jsonl").read_text().splitlines()[0])
    assert line["decision"]["sentence"] == written[0].decision.reason.sentence
    assert line["decision"]["code"] == "behind"


@pytest.mark.parametrize(
    "policy",
    [SloBand(high=0.4, own_share=0.5), Backlog(threshold=33.0), Static(5), Schedule(tuple(range(168)))],
    ids=lambda policy: policy.name,
)
@given(snapshot=snapshots)
def test_each_decision_can_be_made_again_from_its_line(policy: JournalledPolicy, snapshot: Snapshot) -> None:
    made = Entry(BEGIN, policy, snapshot, policy.decide(snapshot))
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "scaling.jsonl")
        journal.append(made)
        (read,) = journal.read()
        assert read == journal.last() == made
    assert read.policy.decide(read.snapshot) == made.decision


def test_the_journal_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "scaling.jsonl"
    journal = Journal(path, max_bytes=20_000)
    for tick in range(200):
        journal.append(entry(tick))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 42_000
    assert len(list(tmp_path.iterdir())) <= 2
    times = [one.at for one in journal.read()]
    assert len(times) > 15
    assert times == sorted(times)
    assert times[-1] == entry(199).at


def test_what_is_read_while_the_file_becomes_the_one_before_is_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "scaling.jsonl", max_bytes=10_000)
    ticks = range(12)  # the last of them after the first rotation
    for tick in ticks:
        journal.append(entry(tick))
    assert len(list(tmp_path.iterdir())) == 2
    reading = journal.read()
    times = [next(reading).at]
    for tick in range(12, 60):
        journal.append(entry(tick))
    times += [one.at for one in reading]
    first = round((times[0] - BEGIN).total_seconds() / TICK)
    assert times[: 12 - first] == [entry(tick).at for tick in range(first, 12)]


def test_a_torn_line_is_left_out_and_a_foreign_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "scaling.jsonl"
    journal = Journal(path)
    journal.append(entry(0))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:100])
    assert list(journal.read()) == [entry(0)]
    journal.append(entry(1))  # after a crash, or a disk that was full
    assert list(journal.read()) == [entry(0), entry(1)]
    path.write_bytes(whole[:100])
    journal.append(entry(2))
    assert list(journal.read()) == [entry(2)]
    later = json.loads(whole)
    later["snapshot"]["of_a_later_version"] = 1
    path.write_text(json.dumps(later) + "\n")
    assert list(journal.read()) == [entry(0)]
    path.write_bytes(whole + b'{"at": 1}\n')
    with pytest.raises(UserError, match=r"scaling\.jsonl line 2 is no decision of Headrace"):
        list(journal.read())


def test_arrivals_are_read_from_decisions_in_worker_seconds() -> None:
    entries = [entry(tick, rate=2000.0) for tick in (0, 1, 2, 3)] + [entry(100, rate=4000.0)]
    arrivals = arrivals_of(entries)
    assert arrivals.start == BEGIN
    assert arrivals.rows[0] / TICK == pytest.approx(4.0)  # two workers for each model
    assert arrivals.rows[50] == 0  # the pipeline stood still
    assert len(arrivals.rows) == 100
    with pytest.raises(UserError, match="has 1 decisions"):
        arrivals_of([entry(0)])
    with pytest.raises(UserError, match="Nothing arrived"):
        arrivals_of([entry(0, rate=0.0), entry(5, rate=0.0)])


ASKED = Question(
    rows_per_second=20_000, row_bytes=100, freshness=60.0, retention=10 * 86_400.0, outage=3600.0
)
KNOWN = Figures(
    worker=Figure(50_000, "given"),
    own=Figure(30_000, "measured"),
    capture=Figure(200_000, "given"),
    load=Figure(300_000, "given"),
    apply=Figure(150_000, "measured"),
    start=Figure(10, "given"),
    wal=Figure(3.0, "given"),
)


def answers(made: Plan) -> dict[str, Answer]:
    return {answer.what: answer for answer in made.answers}


def test_a_plan_is_arithmetic() -> None:
    made = answers(plan(replace(ASKED, peak=6.0, burst=3e6, price=0.5), KNOWN))
    assert made["workers at the mean"].value == 1  # 20,000 of 50,000
    assert made["workers at the peak"].value == 3  # 120,000
    assert made["worker-hours"].value == 24
    assert made["price of workers"].value == 12
    assert made["WAL at the source, 1 h away"].value == 20_000 * 6 * 100 * 3600 * 3
    assert made["disk: log"].value == 20_000 * 100 * 10 * 86_400 * KNOWN.log.value
    assert made["disk: log"].basis == "assumed"
    assert made["WAL at the source, 1 h away"].basis == "given"
    # 72 M rows behind; apply does 150,000 a second, of which 20,000 are new; the workers are ordered within
    # 1 s and take 10 to start, in which the main process does 110,000 rows more than come.
    expected = 11 + (72e6 - 110_000) / 130_000
    assert made["recovery after 1 h away"].value == pytest.approx(expected)
    # All that comes at once is staged first, in 15 s, and by then workers have started.
    at_once = made["recovery after 3,000,000 rows at once"]
    assert at_once.value == pytest.approx(15 + 3e6 / 130_000)
    assert at_once.note == "at 150,000 rows/s with 3 workers, after 15 s until all is staged"
    unknown = answers(plan(replace(ASKED, peak=6.0, burst=3e6), replace(KNOWN, capture=None, load=None)))
    assert unknown["recovery after 3,000,000 rows at once"].value == pytest.approx(11 + 2.89e6 / 130_000)


def test_a_trickle_needs_no_worker() -> None:
    made = plan(replace(ASKED, rows_per_second=5000.0, burst=200_000), KNOWN)
    small = answers(made)["recovery after 200,000 rows at once"]
    assert small.value == 1 + 8  # staged, and then less than what is left of a worker's start
    assert small.note.endswith("by the main process itself, after 1 s until all is staged")
    assert answers(made)["workers at the peak"].value == 0
    assert answers(made)["worker-hours"].value == 0
    assert made.warnings == ()


def test_a_plan_says_what_will_not_work() -> None:
    made = plan(replace(ASKED, rows_per_second=180_000, max_workers=3, freshness=15.0), KNOWN)
    words = " ".join(made.warnings)
    assert "SLO_INFEASIBLE(cap=3): the peak needs 4 workers" in words
    assert "Apply does 150,000 rows/s, the peak is 180,000" in words
    assert "Keep min_workers = 4" in words
    never = answers(made)["recovery after 1 h away"]
    assert never.value is None
    assert never.note.startswith("never")
    assert "rate of capture is not known" in " ".join(plan(ASKED, replace(KNOWN, capture=None)).warnings)
    with pytest.raises(UserError, match="not known"):
        plan(ASKED, Figures())


def unmeasured(entry: Entry) -> tuple[Load, ...]:
    return tuple(replace(load, mu=None) for load in entry.snapshot.loads)


def test_figures_come_from_the_journal_and_what_goes_beyond_them_is_said() -> None:
    entries = [entry(tick) for tick in range(5)]
    figures = figures_of(entries)
    assert figures.worker == Figure(pytest.approx(2200 / 4), "measured")
    assert figures.own == Figure(pytest.approx(2200 / 5), "measured")
    assert figures.apply == Figure(9000.0, "measured")
    assert figures.start == Figure(8.0, "measured")
    assert figures.capture is None
    staged = [
        replace(entries[0], snapshot=replace(entries[0].snapshot, staged_rate=rate)) for rate in (2e5, 1e5)
    ]
    assert figures_of([*entries, *staged]).load == figures_of(staged).capture == Figure(2e5, "measured")
    made = answers(plan(replace(ASKED, rows_per_second=3000.0), figures))
    assert made["workers at the peak"].basis == (
        "measured; extrapolated (6 workers, 2 measured; 3,000 rows/s, 2,200 measured)"
    )
    within = answers(plan(replace(ASKED, rows_per_second=1000.0, burst=2e5), figures))
    assert within["worker-hours"].basis == "measured"
    assert within["recovery after 200,000 rows at once"].basis.endswith(
        "; 200,000 rows that wait, 100,000 measured)"
    )
    nobody = [replace(one, snapshot=replace(one.snapshot, ready=0, loads=unmeasured(one))) for one in entries]
    assumed = figures_of(nobody)
    assert assumed.worker == Figure(pytest.approx(2200 / 5), "assumed")  # as the main process
    assert (assumed.own, assumed.start) == (figures.own, Figures().start)
