"""A lock that nobody is kept out of by one who takes it again and again."""

from __future__ import annotations

import threading


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
