"""A process for the first model of a worker, forked before the worker has threads.

A fork takes some milliseconds; a fresh interpreter with Arrow takes a quarter of a second of a core, which
counts where workers come and go.
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress

from headrace.transform.python.worker import main


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
        self._process = os.pidfd_open(self.pid)
        weakref.finalize(self, os.close, self._process)
        self._lock = threading.Lock()
        self._code: int | None = None

    def run(self, passed: Sequence[int], prints: int) -> bool:
        """Have it answer requests, see `worker.main`, and print to `prints`; False where it is no more."""
        with self._socket, suppress(OSError):
            socket.send_fds(self._socket, [b"r"], [*passed, prints])
            return True
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
        ended = select.poll()
        ended.register(self._process, select.POLLIN)
        if not ended.poll(None if timeout is None else timeout * 1000):
            raise subprocess.TimeoutExpired("a model", timeout or 0)
        code = self.poll()
        assert code is not None
        return code

    def kill(self) -> None:
        """End it at once, if it has not ended."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._process, signal.SIGKILL)


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
