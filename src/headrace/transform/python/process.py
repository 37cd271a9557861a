"""The caller's side of a worker: a process that runs one model's file, and dies alone.

It is a fresh interpreter, or a fork of one that had no threads yet; its environment has no more than an
interpreter needs, so no URL of a database; and its time zone and the order of its sets are the same
wherever it runs.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import pyarrow as pa

from headrace.errors import ModelBroken
from headrace.lifeline import signal_of
from headrace.transform.python.spare import Spare
from headrace.transform.python.wire import (
    AT_REST,
    NO_ROW,
    OUT_OF_MEMORY,
    PROGRESS_BYTES,
    Progress,
    read_tables,
    send,
)

logger = logging.getLogger("headrace.models")

_KEPT = (
    "PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_CTYPE",
    "TMPDIR",
)  # fmt: skip
_SET = {"PYTHONHASHSEED": "0", "TZ": "UTC", "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
_LOOK = 0.05  # seconds between two looks at how far a worker is
_STUCK = 60  # seconds after which a message that cannot be passed on counts as a worker that hangs
_IMPORT = 6.0  # times the limit of a row
_ENDING = 10.0
_LONGEST_LINE = 4096
_MOST_LINES = 100  # a second, that are logged


_progressed: Callable[[], None] | None = None


def on_progress(listener: Callable[[], None] | None) -> None:
    """Have a function called, often, while models of this process have rows in work, each within its limit
    of time. What it raises ends the work."""
    global _progressed  # noqa: PLW0603
    _progressed = listener


_spare: Spare | None = None


def keep_spare() -> None:
    """Have a process ready for the first model, while this one has no threads yet."""
    global _spare  # noqa: PLW0603
    with suppress(OSError):  # then it gets one of its own when there is work
        _spare = Spare()


def environment() -> dict[str, str]:
    """Return the environment variables of a worker."""
    return {name: os.environ[name] for name in _KEPT if name in os.environ} | _SET


@dataclass(frozen=True, slots=True)
class Script:
    """What a worker runs: a model's file, and the texts of its helper modules by name."""

    name: str
    file: str
    code: str
    helpers: tuple[tuple[str, str], ...]


class Death(Exception):
    """A worker died, or was ended for taking too long; `row` was in work, where that is known.

    `reason` is that of a record of the quarantine; `at_rest` says that no work had reached it.
    """

    def __init__(self, reason: str, message: str, row: int) -> None:
        super().__init__(message)
        self.reason = reason
        self.row = row if row >= 0 else None
        self.at_rest = row == AT_REST


class Worker:
    """Runs a bound model, in a process that is started when there is work. Safe to share between threads.

    A process without work ends by itself after a minute.
    """

    def __init__(self, script: Script, types: Mapping[str, str], memory: int, timeout: float) -> None:
        """`types` are DuckDB's, by output column; `memory` is in bytes beyond the imports', `timeout` in
        seconds for one row or one call."""
        self._script = script
        self._types = dict(types)
        self._memory = memory
        self._timeout = timeout
        self._lock = threading.Lock()
        self._process: _Process | None = None

    def __reduce__(self) -> tuple[type[Worker], tuple[object, ...]]:
        # Another process has a worker of its own.
        return Worker, self.identity

    @property
    def identity(self) -> tuple[object, ...]:
        """What it was made of: all that determines what it does."""
        return (self._script, self._types, self._memory, self._timeout)

    def make(
        self, batch: pa.Table, *, fresh: bool = False
    ) -> tuple[list[pa.Table], list[tuple[int, str, str, str]]]:
        """Run over a batch of one row or more; see `function.Made`.

        `fresh` has it done by a process that did nothing before. Raises Death, ModelBroken, and what the
        listener of `on_progress` raises.
        """
        request = {"do": "make"}
        with self._lock:
            if fresh:
                self._end()
            for _ in range(2):
                process = self._process = self._process or self._started()
                try:
                    answer, tables = process.ask(request, [batch], self._timeout)
                except BaseException as error:
                    self._end()
                    if not (isinstance(error, Death) and error.at_rest):
                        raise
                    continue  # it ended for want of work, just as there was some
                if "broken" in answer:
                    raise _broken(self._script, answer["broken"])
                return tables, [tuple(fault) for fault in answer["faults"]]
        raise Death("crash.exit", "its worker ends before it can take work", NO_ROW)

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None

    def _started(self) -> _Process:
        process, _ = _loaded(self._script, self._timeout)
        try:
            process.ask({"do": "bind", "types": self._types, "memory": self._memory}, (), self._timeout)
        except Death as death:
            process.close()
            raise _broken(self._script, str(death)) from death
        return process


def describe(script: Script, timeout: float = 10.0) -> dict[str, Any]:
    """Return what a model's file says of itself, see `function.Description`; its process is gone then.

    Raises ModelBroken where the file cannot be imported, or has no model.
    """
    process, description = _loaded(script, timeout)
    process.close()
    return description


def _loaded(script: Script, timeout: float) -> tuple[_Process, dict[str, Any]]:
    """Return a process that has imported a model's file, at the second try if it dies at the first."""
    request = {"do": "load", "file": script.file, "code": script.code, "helpers": dict(script.helpers)}
    for attempt in range(2):
        process = _Process(script.name)
        try:
            answer, _ = process.ask(request, (), timeout * _IMPORT)
        except Death as death:
            process.close()
            if attempt:
                raise _broken(script, f"importing {script.file}: {death}") from death
            continue
        if "broken" in answer:
            process.close()
            raise _broken(script, answer["broken"])
        break
    return process, answer


def _broken(script: Script, what: str) -> ModelBroken:
    return ModelBroken(script.name, f"Model {script.name} cannot run: {what}.", f"Mend {script.file}.")


class _Process:
    """One process. Ended with its caller, whatever becomes of that."""

    def __init__(self, name: str) -> None:
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _STUCK, 0))
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", _STUCK, 0))
        life, self._life = os.pipe()
        printed, prints = os.pipe()
        shared = os.memfd_create("headrace-progress")
        os.ftruncate(shared, PROGRESS_BYTES)
        self._progress = Progress(shared)
        self._progress.rest()
        self._connection = Connection(ours.detach())
        passed = (theirs.fileno(), life, shared)
        try:
            self._popen = _start(passed, prints)
        except BaseException:
            os.close(printed)
            self._connection.close()
            os.close(self._life)
            raise
        finally:
            theirs.close()
            for descriptor in (life, prints, shared):
                os.close(descriptor)
        relay = threading.Thread(
            target=_relay, args=(name, printed, self._popen), name=f"{name}.prints", daemon=True
        )
        relay.start()
        self._ending = weakref.finalize(self, _end, self._popen, self._connection, self._life, relay)

    def ask(
        self, request: Mapping[str, Any], tables: Sequence[pa.Table], timeout: float
    ) -> tuple[dict[str, Any], list[pa.Table]]:
        """Return the answer to a request. Raises Death; the process is of no use then."""
        try:
            send(self._connection, request, tables)
            self._wait(timeout)
            answer = json.loads(self._connection.recv_bytes())
            return answer, read_tables(self._connection, answer)
        except BlockingIOError:
            row, _ = self._progress.now()
            self.close()
            raise Death("crash.timeout", f"the worker took no message for {_STUCK} s", row) from None
        except InterruptedError:  # of who listens to progress: no call is interrupted, PEP 475
            raise
        except (EOFError, OSError):
            raise self._death() from None

    def close(self) -> None:
        """End the process."""
        self._ending()

    def _wait(self, timeout: float) -> None:
        """Wait for an answer while row after row, or call after call, takes less than `timeout` seconds."""
        last, since = self._progress.now(), time.monotonic()
        while not self._connection.poll(min(_LOOK, timeout)):
            if _progressed is not None:
                _progressed()
            if (now := self._progress.now()) != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > timeout:
                self.close()
                raise Death("crash.timeout", f"it took more than {timeout:g} s", now[0])

    def _death(self) -> Death:
        row, _ = self._progress.now()
        try:
            code = self._popen.wait(_ENDING)
        except subprocess.TimeoutExpired:
            self.close()
            code = self._popen.wait()
        if code == OUT_OF_MEMORY:
            return Death("crash.memory", "it needs more memory than the model may take", row)
        if code < 0:
            return Death("crash.signal", f"its worker was ended by {signal_of(code)}", row)
        return Death("crash.exit", f"it ended its worker with exit code {code}", row)


def _start(passed: Sequence[int], prints: int) -> subprocess.Popen[bytes] | Spare:
    """Return a process that answers requests and prints to `prints`."""
    global _spare
    spare, _spare = _spare, None
    if spare is not None and spare.run(passed, prints):
        return spare
    return subprocess.Popen(
        [sys.executable, "-P", "-X", "faulthandler", "-m", "headrace.transform.python.worker",
         *map(str, passed)],
        stdin=subprocess.DEVNULL, stdout=prints, stderr=prints, pass_fds=passed, start_new_session=True,
        env=environment(),
    )  # fmt: skip


def _end(
    popen: subprocess.Popen[bytes] | Spare, connection: Connection, life: int, relay: threading.Thread
) -> None:
    """End a process with all that it has started."""
    if popen.poll() is None:
        try:
            os.killpg(popen.pid, signal.SIGKILL)
        except ProcessLookupError:
            popen.kill()
    popen.wait()
    connection.close()
    os.close(life)
    relay.join(_ENDING)


def _relay(name: str, printed: int, popen: subprocess.Popen[bytes] | Spare) -> None:
    """Log what a model prints, line by line, until its process ends."""
    second, said = 0, 0
    with open(printed, "rb") as lines:
        while line := lines.readline(_LONGEST_LINE):
            if (now := int(time.monotonic())) != second:
                if said > _MOST_LINES:
                    logger.info("%s: … and %d lines more", name, said - _MOST_LINES)
                second, said = now, 0
            said += 1
            if said <= _MOST_LINES:
                logger.info("%s: %s", name, line.decode(errors="replace").rstrip())
    popen.wait()
