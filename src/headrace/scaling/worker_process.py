"""Workers as their pool sees them: processes, the sockets to them, and what they have in hand."""

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
from multiprocessing.connection import Connection, wait
from pathlib import Path

from headrace.prepared_file import Lease
from headrace.scaling.fork_server import ENDED, KIND
from headrace.scaling.worker import LEAVE, PID

_STUCK = 5  # seconds after which a message that goes or comes in half counts as a worker that is dead
_ENDING = 10.0  # seconds that the kernel may take to end a process
_TELLING = 1.0  # seconds that its fork server may take to tell how a process has ended
_KEPT = 32  # endings of workers that are not known
_LEAVING = 1.0  # seconds in which what workers have left behind is gone
_PAGE = os.sysconf("SC_PAGE_SIZE")


class ForkServer:
    """The process that workers are forked from: an interpreter with all that they import."""

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        """Start a process that runs `module`, which calls `headrace.scaling.worker.serve`. Raises OSError."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, KIND)
        self._socket.settimeout(_STUCK)
        self._codes = dict[int, int | None]()
        self._early = dict[int, int]()
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(theirs.fileno())],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=(theirs.fileno(),),
                start_new_session=True, env=dict(environment),
            )  # fmt: skip
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()

    @property
    def pid(self) -> int:
        """Its process."""
        return self._popen.pid

    def is_alive(self) -> bool:
        """Whether it can still fork."""
        return self._popen.poll() is None

    def fork(self) -> WorkerProcess:
        """Return a worker, which will tell when it is there. Raises OSError."""
        ours, theirs = socket.socketpair()
        life, held = os.pipe()
        worker = WorkerProcess(ours, held, self)
        try:
            socket.send_fds(self._socket, [b"f"], [theirs.fileno(), life])
        except BaseException:
            worker.end()
            raise
        finally:
            theirs.close()
            os.close(life)
        return worker

    def expect(self, pid: int) -> None:
        """Note with what exit code a worker will end."""
        while self._hear(0):
            pass
        self._codes[pid] = self._early.pop(pid, None)

    def exit_code(self, pid: int) -> int | None:
        """Return with what a worker that has just ended did so; None where nothing tells."""
        while self._codes.get(pid) is None and self._hear(_TELLING):
            pass
        return self._codes.get(pid)

    def forget(self, pid: int) -> None:
        """Expect no more of a worker."""
        self._codes.pop(pid, None)

    def _hear(self, seconds: float) -> bool:
        """Hear of one that has ended, and return whether there was any."""
        with suppress(OSError, ValueError):  # of a socket that is closed
            if wait([self._socket], seconds) and (told := self._socket.recv(ENDED.size)):
                pid, code = ENDED.unpack(told)
                if pid in self._codes:
                    self._codes[pid] = code
                else:  # it was not met yet, or has left
                    self._early[pid] = code
                    if len(self._early) > _KEPT:
                        del self._early[next(iter(self._early))]
                return True
        return False

    def end(self) -> None:
        """End it, when there are no workers of it any more. Any that there are go on."""
        self._socket.close()
        try:
            self._popen.wait(_LEAVING)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()


class WorkerProcess:
    """What a fork server has forked. Times are of `time.monotonic`, 0 for what has not come yet."""

    def __init__(self, ours: socket.socket, life: int, forks: ForkServer) -> None:
        """The process has the other ends of the socket and of the pipe that `life` holds open."""
        self._forks = forks
        for way in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, way, struct.pack("ll", _STUCK, 0))
        self.connection = Connection(ours.detach())
        self._life = life
        self._process: int | None = None
        self.pid = 0
        """0 until it is there."""
        self.started_at = self.progressed_at = time.monotonic()
        self.ready_at = 0.0
        self.began_at = 0.0
        self.lease: Lease | None = None
        self.leaving = False
        self.has_results = False
        self.knows = set[str]()
        """The ids of the models that it has had parts of."""

    def meet(self) -> None:
        """Take what it says first, when there is something to hear: which process it is. Raises OSError and
        EOFError where it has died."""
        with socket.socket(fileno=os.dup(self.connection.fileno())) as heard:
            said, descriptors, _, _ = socket.recv_fds(heard, PID.size, 1)
        if len(said) < PID.size:
            raise EOFError
        (self.pid,) = PID.unpack(said)
        self._forks.expect(self.pid)
        self._process = next(iter(descriptors), None)

    def is_of(self, forks: ForkServer | None) -> bool:
        """Whether it was forked by this one."""
        return self._forks is forks

    def exit_code(self) -> int | None:
        """Return with what it has ended by itself; None where nothing tells."""
        return self._forks.exit_code(self.pid) if self.pid else None

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

    def end(self) -> None:
        """End it at once, if it has not ended, and forget it. One that is not there yet ends when it is."""
        if self._process is not None:  # one that was stopped ends by nothing else
            with suppress(OSError):
                signal.pidfd_send_signal(self._process, signal.SIGKILL)
            os.close(self._process)
        os.close(self._life)
        deadline = time.monotonic() + _ENDING
        with self.connection, suppress(OSError, EOFError):
            while self.pid and self.connection.poll(max(deadline - time.monotonic(), 0)):
                self.connection.recv_bytes()  # what it still said, and then the end
        self._forks.forget(self.pid)
