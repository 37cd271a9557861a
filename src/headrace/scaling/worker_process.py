"""One worker as its pool sees it: a process, the socket to it, and what it has in hand."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from headrace.prepared_file import Lease
from headrace.scaling.worker import LEAVE

_STUCK = 5  # seconds after which a message that goes or comes in half counts as a worker that is dead
_EXITING = 0.2  # seconds between the end of its socket and its own
_PAGE = os.sysconf("SC_PAGE_SIZE")


class WorkerProcess:
    """Times are of `time.monotonic`, 0 for what has not come yet."""

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        """Start a process that runs `module`. Raises OSError."""
        ours, theirs = socket.socketpair()
        for way in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, way, struct.pack("ll", _STUCK, 0))
        life, self._life = os.pipe()
        self.connection = Connection(ours.detach())
        passed = (theirs.fileno(), life)
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-P", "-m", module, *map(str, passed)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=passed,
                start_new_session=True, env=dict(environment),
            )  # fmt: skip
        except BaseException:
            self.connection.close()
            os.close(self._life)
            raise
        finally:
            theirs.close()
            os.close(life)
        self.pid = self._popen.pid
        self.started_at = self.progressed_at = time.monotonic()
        self.ready_at = 0.0
        self.began_at = 0.0
        self.lease: Lease | None = None
        self.leaving = False
        self.has_results = False
        self.knows = set[str]()
        """The ids of the models that it has had parts of."""

    def begin(self, lease: Lease, now: float) -> None:
        """Note what it gets."""
        self.lease = lease
        self.began_at = self.progressed_at = now

    def leave(self) -> None:
        """Let it go, once it has nothing in hand; it says when it does."""
        self.leaving = True
        with suppress(OSError):  # then it has gone
            self.connection.send(LEAVE)

    def resident(self) -> int:
        """Return how many bytes of memory it has, 0 where nothing tells."""
        try:
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * _PAGE
        except (OSError, IndexError):
            return 0

    def has_exited(self) -> bool:
        """Whether it has ended by itself, and not by a signal."""
        try:
            return self._popen.wait(_EXITING) >= 0
        except subprocess.TimeoutExpired:
            return False

    def end(self) -> None:
        """End it at once, if it has not ended, and forget it."""
        if self._popen.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()
        self.connection.close()
        os.close(self._life)
