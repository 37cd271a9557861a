"""A pool of worker processes: whatever becomes of them, a part has one outcome or goes back to who asked."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.change import Column, TableId, TableSchema
from headrace.parts import PartSpec, Staged, fingerprint
from headrace.prepared import Prepared
from headrace.prepared_file import Lease, write_prepared
from headrace.scaling.local import LocalPool
from headrace.scaling.pool import NoPlace, PartFailed, TooLarge
from headrace.transform.model import mirror
from headrace.transform.python.process import environment
from odd_worker import outcome
from pipelines import until

SHAPE = TableSchema(TableId("public", "t"), (Column("id", "bigint"),), ("id",))
MODEL = mirror("shop", SHAPE)
TESTS = Path(__file__).parents[1]

REFUSED = """
import errno, os, sys
import headrace.worker

def refused(*_):
    raise OSError(errno.ENOSYS, "refused")

os.pidfd_open = refused
fork, begun = os.fork, [os.getpid()]
os.fork = lambda: fork() if os.getpid() == begun[0] else refused()  # none of a worker's own
headrace.worker.main(int(sys.argv[1]))
"""

Open = Callable[..., LocalPool]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    pools: list[LocalPool] = []

    def open_pool(workers: int, **limits: float) -> LocalPool:
        variables = environment()
        variables["PYTHONPATH"] = os.pathsep.join([str(TESTS), variables.get("PYTHONPATH", "")])
        pools.append(LocalPool(tmp_path / "workers", "odd_worker", variables, **limits))  # type: ignore[arg-type]
        pools[-1].resize(workers)
        return pools[-1]

    yield open_pool
    for pool in pools:
        pool.close()
        assert not pool.pids()
    assert not [*tmp_path.rglob("*.part"), *tmp_path.rglob("*.making")]


def part(pool: LocalPool, what: str, after: int = 0, through: int = 9) -> PartSpec:
    model = replace(MODEL, name=what)
    staged = Staged("shop", "log", "/nowhere")
    return PartSpec(
        "slice", staged, model, fingerprint(model), after, through, through, pool.epoch, through - after
    )


def is_alive(pid: int) -> bool:
    with suppress(OSError):
        os.kill(pid, 0)
        return True
    return False


def numbers(future: Future[Prepared]) -> list[int]:
    found: list[int] = future.result(30).rows["n"].to_pylist()
    return found


def test_workers_killed_at_random_lose_and_double_nothing(opened: Open) -> None:
    pool, chance = opened(2, max_deaths=1_000), random.Random(7)
    until(lambda: pool.state().ready == 2)
    futures = [pool.submit(part(pool, "sleep 0.1", i * 10, i * 10 + 10)) for i in range(30)]
    killed = 0
    while wait(futures, 0.6).not_done:
        with suppress(ProcessLookupError, IndexError):
            os.kill(chance.choice(pool.pids()), signal.SIGKILL)
            killed += 1
    assert killed
    assert [n for future in futures for n in numbers(future)] == list(range(1, 301))
    assert pool.service()["sleep 0.1"].all_rows == 300
    state = pool.state()
    assert (state.queued, state.busy, state.desired) == (0, 0, 2)


def test_a_part_that_workers_die_of_goes_back_and_others_do_not(opened: Open, tmp_path: Path) -> None:
    pool = opened(1, max_deaths=2)
    deadly, once = (
        pool.submit(part(pool, f"die {signal.SIGABRT:d}")),
        pool.submit(part(pool, f"once {tmp_path / 'tried'}")),
    )
    failing, good = pool.submit(part(pool, "fail")), pool.submit(part(pool, "good"))
    with pytest.raises(PartFailed) as died:
        deadly.result(30)
    assert died.value.deaths == 2
    assert "SIGABRT" in str(died.value)
    with pytest.raises(PartFailed, match="signal 40"):  # which has no name
        pool.submit(part(pool, "die 40")).result(30)
    with pytest.raises(PartFailed) as killed:  # as the kernel does, and others do to whatever has it
        pool.submit(part(pool, f"die {signal.SIGKILL:d}")).result(30)
    assert killed.value.deaths == 6
    assert "SIGKILL" in str(killed.value)
    assert numbers(once) == list(range(1, 10))
    with pytest.raises(PartFailed, match="ValueError") as failed:
        failing.result(30)
    assert failed.value.deaths == 0
    assert "cell" not in str(failed.value)
    assert numbers(good) == list(range(1, 10))


def test_what_workers_lose_counts_for_how_fast_they_are(opened: Open) -> None:
    pool = opened(1)
    assert numbers(pool.submit(part(pool, "later 30"))) == list(range(1, 10))
    pool.submit(part(pool, "later 30", 10, 12))
    until(lambda: pool.state().busy == 1)
    time.sleep(0.5)
    os.kill(pool.pids()[0], signal.SIGKILL)
    until(lambda: pool.service()["later 30"].lost)
    service = pool.service()["later 30"]
    assert 0.5 <= service.lost < 20
    assert (service.first, service.rows, service.seconds) == (9, 0, 0)
    assert service.kept > 0


def test_who_gets_no_further_or_takes_too_much_is_replaced_and_who_is_slow_is_not(opened: Open) -> None:
    pool = opened(3, patience=1.2, memory=300 << 20, max_deaths=1)
    until(lambda: pool.state().ready == 3)
    paused, swelling, slow = (pool.submit(part(pool, what)) for what in ("sleep 60", "swell 400", "slow 8"))
    with pytest.raises(PartFailed, match="no further"):
        paused.result(30)
    with pytest.raises(TooLarge, match="memory"):
        swelling.result(30)
    assert numbers(slow) == list(range(1, 10))
    until(lambda: pool.state().ready == 3)


def test_a_worker_that_wakes_after_its_part_was_given_away_is_refused(opened: Open) -> None:
    pool = opened(1, patience=0.8)
    until(lambda: pool.state().ready == 1)
    (sleeper,) = pool.pids()
    os.kill(sleeper, signal.SIGSTOP)
    future = pool.submit(part(pool, "good"))
    assert numbers(future) == list(range(1, 10))
    assert sleeper not in pool.pids()
    assert not is_alive(sleeper)
    # One that could not be ended, as on another machine, hands in what it has under its old lease.
    asked = part(pool, "slow 5")
    future = pool.submit(asked)
    until(lambda: pool.state().busy == 1)
    (worker,) = pool._workers
    for lease in (Lease(asked.id, pool.epoch, 7), Lease(asked.id, "another run", 1)):
        write_prepared(pool._path(lease), outcome(replace(asked, through=3)), lease)
        message = {"say": "done", "lease": list(lease), "rows": 3, "seconds": 1}
        with pool._lock:
            pool._take(worker, message, time.monotonic())
        assert not future.done()
        pool._path(lease).unlink()
    assert numbers(future) == list(range(1, 10))
    with pytest.raises(PartFailed, match="another run"):
        pool.submit(replace(asked, epoch="another run")).result(1)


def test_drained_workers_finish_what_they_have_and_at_rest_there_are_none(
    opened: Open, tmp_path: Path
) -> None:
    (left := tmp_path / "workers" / "another run").mkdir(parents=True)
    pool = opened(0)
    assert not left.exists()
    assert (pool.pids(), pool.state().starting) == ([], 0)
    waiting = pool.submit(part(pool, "sleep 0.5"))
    pool.resize(2)
    until(lambda: pool.state().busy == 1)
    pids, others = pool.pids(), [pool.submit(part(pool, "good", i, i + 1)) for i in range(3)]
    until(lambda: all(each.done() for each in others))
    assert pool._forks is not None
    pids.append(pool._forks.pid)
    pool.resize(0)
    assert numbers(waiting) == list(range(1, 10))
    until(lambda: not pool.pids() and pool._forks is None)
    assert not any(map(is_alive, pids))
    state = pool.state()
    assert (state.ready, state.starting, state.starting_seconds) == (0, 0, 0)
    assert all(0 < seconds < 60 for seconds in state.start_times)
    assert state.start_times
    # SIGTERM from outside: the part in hand is finished, and the worker replaced.
    pool.resize(1)
    last = pool.submit(part(pool, "sleep 0.5"))
    until(lambda: pool.state().busy == 1)
    (pid,) = pool.pids()
    os.kill(pid, signal.SIGTERM)
    assert numbers(last) == list(range(1, 10))
    until(lambda: pool.state().ready == 1 and pool.pids() != [pid])
    assert not is_alive(pid)


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGSTOP])
def test_what_workers_are_forked_from_may_die_or_hang(opened: Open, by: signal.Signals) -> None:
    pool = opened(1, patience=1.2)
    until(lambda: pool.state().ready == 1)
    (pid,), forks = pool.pids(), pool._forks
    assert forks is not None
    os.kill(forks.pid, by)
    assert numbers(pool.submit(part(pool, "good"))) == list(range(1, 10))
    assert pool.pids() == [pid]  # it goes on
    pool.resize(6)
    if by == signal.SIGKILL:
        until(lambda: pool._forks not in (None, forks))
        assert pool._forks is not None
        os.kill(pool._forks.pid, by)  # five have been asked of it
    until(lambda: pool.state().ready == 6, 20)
    assert pool._pause < 4  # one doubling for all of them
    assert pid in pool.pids()
    assert pool._forks is not forks
    assert not is_alive(forks.pid)


def test_nothing_is_left_where_the_pipeline_is_the_first_process_and_descriptors_are_refused(
    tmp_path: Path,
) -> None:
    """The pipeline as the reaper of all that has no parent, and workers without pidfds and spares."""
    program = f"""
import ctypes, os, sys, time
from pathlib import Path
sys.path[:0] = {[str(TESTS), str(tmp_path)]!r}
from headrace.scaling.local import LocalPool
from headrace.transform.python.process import environment
from pipelines import until
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
variables = environment() | {{"PYTHONPATH": os.pathsep.join(sys.path[:2])}}
pool = LocalPool(Path({str(tmp_path)!r}) / "w", sys.argv[1], variables, patience=5)
for _ in range(2):
    pool.resize(3)
    until(lambda: pool.state().ready == 3, 20)
    pids = pool.pids()
    pool.resize(0)
    until(lambda: pool._forks is None, 20)
    assert not any(os.path.exists(f"/proc/{{pid}}") for pid in pids)
pool.close()
try:
    print("left", os.waitpid(-1, os.WNOHANG))
except ChildProcessError:
    print("none left")
"""
    (tmp_path / "refused_worker.py").write_text(REFUSED)
    for module in ("headrace.worker", "odd_worker", "refused_worker"):
        done = subprocess.run(
            [sys.executable, "-c", program, module],
            capture_output=True, text=True, check=False, timeout=100,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, "none left\n"), done.stderr


def test_a_begun_part_comes_back_when_nobody_is_left_to_do_it(opened: Open) -> None:
    pool = opened(1)
    begun = pool.submit(part(pool, "sleep 60"))
    until(lambda: pool.state().busy == 1)
    pool.resize(0)
    os.kill(pool.pids()[0], signal.SIGKILL)
    with pytest.raises(PartFailed) as lost:
        begun.result(30)
    assert lost.value.deaths == 0  # it was killed
    not_begun = pool.submit(part(pool, "good"))
    assert not_begun.cancel()
    pool.resize(1)
    assert numbers(pool.submit(part(pool, "good"))) == list(range(1, 10))
    held, queued = pool.submit(part(pool, "sleep 60")), pool.submit(part(pool, "good"))
    until(lambda: pool.state().busy == 1)
    pool.close()
    for each in (held, queued):
        with pytest.raises(PartFailed):
            each.result(1)


def test_whoever_waits_is_told_where_there_is_no_place_or_the_pool_itself_fails(
    opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pool = opened(1)
    until(lambda: pool.state().ready == 1)
    pids = pool.pids()
    shutil.rmtree(pool._folder)
    with pytest.raises(NoPlace, match="No such file or directory"):
        pool.submit(part(pool, "good")).result(30)
    assert pool.pids() == pids
    pool._folder.mkdir()
    begun, waiting = pool.submit(part(pool, "sleep 60")), pool.submit(part(pool, "good"))
    until(lambda: pool.state().busy == 1)
    with monkeypatch.context() as patch:
        patch.setattr(pool, "_watch", lambda: 1 // 0)
        for each in (begun, waiting):
            with pytest.raises(PartFailed, match="the pool has failed"):
                each.result(30)
    until(lambda: not any(map(is_alive, pids)))
    assert "workers are given up" in caplog.text
    pool.resize(1)
    assert numbers(pool.submit(part(pool, "good"))) == list(range(1, 10))


def test_a_worker_that_has_too_much_from_the_start_is_not_started_over_and_over(
    opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    pool = opened(1, memory=1 << 20)
    time.sleep(4)
    assert 1 < caplog.text.count("more than 1 MiB of memory") < 5
    assert pool.submit(part(pool, "good")).cancel()
