"""A process that has imported what workers need, and does nothing but fork them and tell how they ended.

An import takes most of a second of a core, and a fork some milliseconds. Over its socket, which keeps
messages apart, come two descriptors for each worker that is wanted; a pid and an exit code go back for each
that has ended.
"""

from __future__ import annotations

import ctypes
import gc
import os
import select
import signal
import socket
import struct
import time
from contextlib import suppress

KIND = socket.SOCK_SEQPACKET
"""Of its socket."""
ENDED = struct.Struct("=qq")
"""A pid and an exit code, less than 0 for a signal."""

_PR_SET_CHILD_SUBREAPER = 36
_LEAVING, _LOOK = 0.4, 0.01  # seconds


def forked(control: int) -> tuple[int, int] | None:
    """Return the descriptors that came for it in each fork, and in the process itself None when nobody can
    ask any more. There must be no thread of Python's by now."""
    workers = set[int]()
    with socket.socket(fileno=control) as pool, _Endings() as endings:
        gc.freeze()  # what is never looked at again stays shared
        asked = select.poll()
        for descriptor in (pool.fileno(), endings.fileno()):
            asked.register(descriptor, select.POLLIN)
        while True:
            ready = [descriptor for descriptor, _ in asked.poll()]
            if endings.fileno() in ready:
                for pid, code in endings.collect():
                    if pid in workers:
                        workers.remove(pid)
                        with suppress(OSError):  # nobody is there to be told, or does not listen
                            pool.send(ENDED.pack(pid, code), socket.MSG_DONTWAIT)
            if pool.fileno() not in ready:
                continue
            if not (descriptors := _descriptors(pool)):
                break
            # A fork that is refused is a worker that is dead, as far as the pool can see.
            with suppress(OSError):
                if pid := os.fork():
                    workers.add(pid)
                else:
                    connection, life = descriptors
                    return connection, life
            for descriptor in descriptors:
                os.close(descriptor)
    # What workers have left behind is gone soon; what a model has for good is not waited for.
    deadline = time.monotonic() + _LEAVING
    with suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(_LOOK)
    return None


def _descriptors(pool: socket.socket) -> list[int]:
    """Return those that have come, none when there will be no more."""
    try:
        return socket.recv_fds(pool, 1, 2)[1]
    except ConnectionError:  # it was closed with endings that nobody had heard of
        return []


class _Endings:
    """Which processes have ended: workers, and what they have left behind, which would be zombies where the
    pipeline is the first process of a container."""

    def __init__(self) -> None:
        with suppress(AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._heard, self._rung = os.pipe()
        for descriptor in (self._heard, self._rung):
            os.set_blocking(descriptor, False)

    def __enter__(self) -> _Endings:
        signal.set_wakeup_fd(self._rung, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(self._heard)
        os.close(self._rung)

    def fileno(self) -> int:
        """Return a descriptor that can be read from when some have."""
        return self._heard

    def collect(self) -> list[tuple[int, int]]:
        """Return the pids and exit codes of those that have."""
        os.read(self._heard, 4096)
        found = list[tuple[int, int]]()
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                found.append((ended[0], os.waitstatus_to_exitcode(ended[1])))
        return found
