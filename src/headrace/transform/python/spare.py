"""A process for the first model of a worker, forked before the worker has threads.

A fork takes some milliseconds; a fresh interpreter with Arrow takes a quarter of a second of a core, which
counts where workers come and go.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from headrace.transform.python.worker import main

_LOOK = 0.01  # seconds between two looks at whether it has ended


class Spare:
    """Waits to be a model's process, for as long as who made it is there. What it has of `subprocess.Popen`
    does what it does there."""

    def __init__(self) -> None:
        """Fork this process, which must have no threads of Python's. Raises OSError."""
        self._socket, theirs = socket.socketpair()
        self.pid = os.fork()
        if not self.pid:
            _be_one(theirs)
            sys.exit()
        theirs.close()
        self._lock = threading.Lock()
        self._code: int | None = None

    def run(self, passed: Sequence[int], prints: int) -> bool:
        """Have it answer requests, see `worker.main`, and print to `prints`; False where it is no more."""
        with self._socket, suppress(OSError):
            socket.send_fds(self._socket, [b"r"], [*passed, prints])
            return True
        self.kill()
        self.wait()
        return False

    def poll(self) -> int | None:
        """Return its exit code, None while it runs."""
        with self._lock:
            if self._code is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self._code = os.waitstatus_to_exitcode(status) if pid else None
            return self._code

    def wait(self, timeout: float | None = None) -> int:
        """Return its exit code when it has ended. Raises subprocess.TimeoutExpired."""
        began = time.monotonic()
        while (code := self.poll()) is None:
            if timeout is not None and time.monotonic() - began > timeout:
                raise subprocess.TimeoutExpired("a model", timeout)
            time.sleep(_LOOK)
        return code

    def kill(self) -> None:
        """End it at once, if it has not ended."""
        with self._lock:
            if self._code is None:  # as long as nobody has waited for it, its number is its own
                os.kill(self.pid, signal.SIGKILL)


def _be_one(control: socket.socket) -> None:
    os.setsid()
    own = control.fileno()
    os.closerange(3, own)  # lest it hold open what its parent's end is to close
    os.closerange(own + 1, os.sysconf("SC_OPEN_MAX"))
    with control:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 4)
    if not descriptors:
        return
    *passed, prints = descriptors
    os.dup2(prints, 1)
    os.dup2(prints, 2)
    os.close(prints)
    faulthandler.enable()
    main(list(map(str, passed)))
