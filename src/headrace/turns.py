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


@contextmanager
def held(lock: threading.RLock, patience: float | None = None) -> Iterator[bool]:
    """Hold a lock, and give True; where it cannot be had within `patience` seconds, go on without it."""
    is_held = lock.acquire(timeout=-1 if patience is None else patience)
    try:
        yield is_held
    finally:
        if is_held:
            lock.release()
