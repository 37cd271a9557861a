"""Locks that nobody waits for longer than needed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A lock for two and more threads that pass it on: who waits has it before who had it last.

    `threading.Lock` promises no order, and a thread that gives it back only to take it again always wins.
    """

    def __init__(self) -> None:
        self._next = threading.Lock()  # held by the one who waits
        self._turn = threading.Lock()

    def __enter__(self) -> None:
        with self._next:
            self._turn.acquire()

    def __exit__(self, *_: object) -> None:
        self._turn.release()


class Gate:
    """A door that many pass together, and now and then one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._wanted = False  # one waits to be alone: it goes in before all others once nobody is inside
        self._shut = False

    @contextmanager
    def passed(self) -> Iterator[None]:
        """Be inside, beside others; waits while one is alone."""
        with self._changed:
            self._changed.wait_for(lambda: not self._shut and not (self._wanted and self._inside == 0))
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self, patience: float, push: float) -> Iterator[bool]:
        """Be inside alone, and give True; one at a time may ask for it.

        Waits `patience` seconds for a moment in which nobody is inside, then shuts the door to others for
        `push` seconds so that there is one; gives False where those inside take longer.
        """
        is_alone = False
        with self._changed:
            self._wanted = True
            try:
                is_alone = self._changed.wait_for(self._is_empty, patience)
                if not is_alone:
                    self._shut = True
                    is_alone = self._changed.wait_for(self._is_empty, push)
            finally:  # an interrupt leaves the door open
                self._wanted, self._shut = False, is_alone
                self._changed.notify_all()
        try:
            yield is_alone
        finally:
            with self._changed:
                self._shut = False
                self._changed.notify_all()

    def _is_empty(self) -> bool:
        return self._inside == 0


@contextmanager
def held(lock: threading.RLock, patience: float | None = None) -> Iterator[bool]:
    """Hold a lock, and give True; where it cannot be had within `patience` seconds, go on without it."""
    is_held = lock.acquire(timeout=-1 if patience is None else patience)
    try:
        yield is_held
    finally:
        if is_held:
            lock.release()
