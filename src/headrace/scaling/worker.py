"""A worker's own side: a process that does one part after another, until it is told to leave.

A worker takes pickled requests from its connection and answers in JSON, one object a message:

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
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from headrace.lifeline import end_with
from headrace.parts import PartSpec, rows_of
from headrace.prepared import Prepared
from headrace.prepared_file import Lease, write_prepared
from headrace.scaling.fork_server import forked

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

NAME = "headrace-worker"
"""What a worker's process is called."""

PID = struct.Struct("=q")
"""What a worker sends first, with a descriptor of its process."""


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


def serve(
    control: int,
    opened: Callable[[Answers], Callable[[PartSpec], Prepared]],
    born: Callable[[], None] = lambda: None,
) -> None:
    """Be a worker in each fork that is asked for over `control`, until nobody can ask any more; see
    `fork_server.forked`.

    A worker gets a socket to the pool, over which it first sends its process, and a pipe that ends with it.
    `born` is called in it before it has threads, and `opened` makes what does parts, and may take its time.
    """
    with suppress(OSError):
        os.nice(_NICE)
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)
    if (descriptors := forked(control)) is not None:
        connection, life = descriptors
        end_with(life)
        os.setsid()
        born()
        _work(connection, opened)


def _work(connection: int, opened: Callable[[Answers], Callable[[PartSpec], Prepared]]) -> None:
    leaving = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: leaving.set())
    with suppress(OSError):
        Path("/proc/self/comm").write_text(NAME)
    with socket.socket(fileno=os.dup(connection)) as sending:
        processes = _itself()
        socket.send_fds(sending, [PID.pack(os.getpid())], processes)
        for process in processes:
            os.close(process)
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


def _itself() -> list[int]:
    """Return a descriptor of this process, if kernel and interpreter have such."""
    try:
        return [os.pidfd_open(os.getpid())]
    except (OSError, AttributeError):
        return []


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
