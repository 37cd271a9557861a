"""A worker's own side: a process that does one part after another, until it is told to leave.

It takes pickled requests from its connection and answers in JSON, one object a message:

    {"say": "ready"}   {"say": "progress"}   {"say": "leaving"}
    {"say": "done", "lease": [part, epoch, attempt], "rows": n, "seconds": s}
    {"say": "failed", "lease": [...], "what": "ValueError"}
    {"say": "unwritten", "lease": [...], "what": "No space left on device"}
    {"say": "log", "name": "headrace.models", "level": n, "text": "..."}

SIGTERM, or a request to leave, lets it finish what it has in hand. It ends at once with its pool's process.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from headrace.parts import PartSpec, rows_of
from headrace.prepared import Prepared
from headrace.prepared_file import Lease, write_prepared

logger = logging.getLogger("headrace.workers")

_LOOK = 0.2  # seconds between two looks at whether SIGTERM has come
_TELL_EVERY = 1.0  # seconds between two messages that work goes on
_NICE = 5  # apply and capture go first: what they are late with nobody else can do
_OOM_SCORE = "500"  # of two processes the kernel ends the one whose work is done again


@dataclass(frozen=True, slots=True)
class Request:
    """A part to be done, pickled, under a lease, into a file."""

    part: bytes
    lease: Lease
    path: Path


LEAVE = None
"""The request to do nothing more."""


class Answers:
    """What a worker says. Safe to share between threads."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._told = 0.0

    def say(self, say: str, **more: object) -> None:
        """Send a message."""
        with self._lock:
            self._connection.send_bytes(json.dumps({"say": say, **more}).encode())

    def progress(self) -> None:
        """Tell that a piece of work is done, not more often than anybody wants to know."""
        if (now := time.monotonic()) - self._told >= _TELL_EVERY:
            self._told = now
            self.say("progress")


class _Passing(logging.Handler):
    """Passes what is logged to the pool's process, which has somewhere to put it."""

    def __init__(self, answers: Answers) -> None:
        super().__init__(logging.INFO)
        self._answers = answers

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            self._answers.say("log", name=record.name, level=record.levelno, text=record.getMessage())


def serve(connection: int, life: int, opened: Callable[[Answers], Callable[[PartSpec], Prepared]]) -> None:
    """Do parts until there is no more to do; `opened` makes what does them, and may take its time.

    `connection` and `life` are the descriptors of the socket to the pool, and of a pipe that ends with it.
    """
    leaving = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: leaving.set())
    threading.Thread(target=_end_with, args=(life,), daemon=True).start()
    with suppress(OSError):
        os.nice(_NICE)
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)
    pool = Connection(connection)
    answers = Answers(pool)
    own = logging.getLogger("headrace")
    own.addHandler(_Passing(answers))
    own.setLevel(logging.INFO)
    prepare = opened(answers)
    with suppress(OSError, EOFError):  # the pool has let go of this worker
        answers.say("ready")
        while not leaving.is_set():
            if pool.poll(_LOOK):
                request: Request | None = pool.recv()
                if request is LEAVE:
                    break
                _do(request, prepare, answers)
        answers.say("leaving")


def _do(request: Request, prepare: Callable[[PartSpec], Prepared], answers: Answers) -> None:
    began = time.monotonic()
    try:
        part: PartSpec = pickle.loads(request.part)
        prepared = prepare(part)
    except Exception as error:
        # No more than the kind: its words may hold a cell, and who asked will meet it itself.
        answers.say("failed", lease=request.lease, what=type(error).__name__)
        return
    try:
        write_prepared(request.path, prepared, request.lease)
    except OSError as error:
        what = error.strerror or type(error).__name__
        answers.say("unwritten", lease=request.lease, what=what)
        return
    except Exception as error:
        answers.say("failed", lease=request.lease, what=type(error).__name__)
        return
    answers.say("done", lease=request.lease, rows=rows_of(part, prepared), seconds=time.monotonic() - began)


def _end_with(life: int) -> None:
    """End this process when the other end of a pipe is gone."""
    with suppress(OSError):
        os.read(life, 1)
    os._exit(0)
