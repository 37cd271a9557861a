"""A lock that is passed on."""

from __future__ import annotations

import threading
import time

import pytest

from headrace.turns import Gate, Turns


def test_one_who_takes_it_again_at_once_is_behind_those_who_wait() -> None:
    turns, order, has_it = Turns(), [], threading.Event()

    def work() -> None:
        with turns:
            has_it.set()
            while not turns._next.locked():
                time.sleep(0.001)
        for _ in range(100):
            with turns:
                order.append("worker")

    thread = threading.Thread(target=work)
    thread.start()
    has_it.wait()
    with turns:
        order.append("waiter")
    thread.join()
    assert order[0] == "waiter"
    assert len(order) == 101


def test_one_at_a_time_has_it() -> None:
    turns, inside, seen = Turns(), [0], []

    def work() -> None:
        for _ in range(200):
            with turns:
                inside[0] += 1
                seen.append(inside[0])
                time.sleep(0)
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1] * 800


def test_an_interrupt_of_who_waits_to_be_alone_leaves_the_gate_open(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()

    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gate._changed, "wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt), gate.alone(1.0, 1.0):
            pass
    assert not gate._wanted
    with gate.passed(), gate.passed():
        pass
