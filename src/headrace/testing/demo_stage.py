"""The demo's stage: processes that cannot outlive it, and a reader that measures from outside.

Children are started from the main thread only: the kernel kills them when the thread that started
them ends, so they die with the demo, whatever ends it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, NoReturn, Self

from headrace.config import Project
from headrace.errors import HeadraceError
from headrace.testing.demo_check import HIGHEST
from headrace.testing.postgres import LAUNCH, clean_environment

AROUND_A_KILL = 5.0
"""Seconds before and after a kill in which freshness is not judged."""

POLL = 0.05
"""Seconds between two looks."""

_COMMAND_LIMIT = 300.0

NO_ANSWER = (OSError, ValueError, struct.error)
"""What a reader meets whose pipeline dies while it answers."""


class Child:
    """A process of ours, in a session of its own, killed by the kernel when we are gone (on Linux)."""

    def __init__(self, command: Sequence[str], output: Path | IO[str]) -> None:
        self._command = list(command)
        self._output = output
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it; what it prints is added to the output."""
        launch = [sys.executable, "-I", "-S", "-c", LAUNCH, "0", "0", str(os.getpid())]
        with ExitStack() as stack:
            output = self._output
            out = stack.enter_context(output.open("a")) if isinstance(output, Path) else output
            self._process = subprocess.Popen(
                [*launch, *self._command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=clean_environment(),
                start_new_session=True,
            )

    def must_run(self) -> None:
        """Raise HeadraceError if it ended by itself."""
        if not self.running:
            raise HeadraceError("The pipeline ended by itself.", "Its log says why.")

    def wait(self, limit: float) -> int:
        """Wait for its end and return its exit code; raises HeadraceError after `limit` seconds."""
        assert self._process is not None
        try:
            return self._process.wait(limit)
        except subprocess.TimeoutExpired:
            what = " ".join(self._command[2:5])
            raise HeadraceError(f"{what} did not end within {limit:.0f} s.") from None

    def kill(self) -> int:
        """SIGKILL it; returns the process id that it had."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        return self._process.pid

    def stop(self, limit: float) -> None:
        """Ask it to end (SIGTERM) and wait."""
        assert self._process is not None
        self._process.terminate()
        self.wait(limit)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.running:
            self.kill()


class Watcher:
    """Looks at the destination as any reader would, every 50 ms, and remembers when it saw more."""

    def __init__(self, project: Project) -> None:
        self._project = project
        self._seen: list[tuple[float, float, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)

    @property
    def highest(self) -> int:
        """The highest order ever seen, 0 before the first."""
        return self._seen[-1][2] if self._seen else 0

    def first_rise(self, after: float) -> float | None:
        """Return when something new was first seen that was asked for after a moment."""
        return next((seen for asked, seen, _ in self._seen if asked > after), None)

    def freshness(self, commits: Sequence[tuple[int, float]], kills: Sequence[float]) -> list[float]:
        """Return the seconds from commit to visible of every sampled order, outside of kills and of the
        initial copy, that is of what was committed once the first rows were visible."""
        if not self._seen:
            return []
        copied = self._seen[0][1]
        found = []
        for order, at in commits:
            near = any(abs(at - kill) < AROUND_A_KILL for kill in kills)
            seen = next((seen for _, seen, highest in self._seen if highest >= order), None)
            if at > copied and not near and seen is not None:
                found.append(max(seen - at, 0.0))
        return found

    def close(self) -> None:
        """Look no more."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _watch(self) -> None:
        from headrace import server

        while not self._stop.wait(POLL):
            asked = time.time()
            # Only the pipeline is asked: a reader of the file itself would hold up one that starts.
            if not server.is_running(self._project):
                continue
            with suppress(*NO_ANSWER, HeadraceError):
                highest = server.read(self._project, [HIGHEST])[0].column(0)[0].as_py() or 0
                if highest > self.highest:
                    self._seen.append((asked, time.time(), highest))


def headrace_command(*arguments: str) -> list[str]:
    """Return the command line of `headrace` in this Python."""
    return [sys.executable, "-m", "headrace", *arguments]


def typed_name() -> str:
    """Return how a person at this terminal calls `headrace`: by its path where PATH does not lead to it."""
    beside = Path(sys.executable).with_name("headrace")
    if shutil.which("headrace") == str(beside):
        return "headrace"
    return shlex.quote(str(beside)) if beside.exists() else f"{shlex.quote(sys.executable)} -m headrace"


def run_command(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command that ends by itself, and dies with us."""
    with tempfile.TemporaryFile("w+") as out, Child(command, out) as child:
        child.start()
        code = child.wait(_COMMAND_LIMIT)
        out.seek(0)
        return subprocess.CompletedProcess(list(command), code, out.read())


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last line that a command printed."""
    lines = done.stdout.strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}, without a word"


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Let a signal end the demo orderly, as Ctrl-C does."""

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    # SIGINT too: a shell that starts it in the background has it ignored.
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def first_row(project: Project, query: str) -> tuple[Any, ...] | None:
    """Return a query's first row; None while it cannot be answered."""
    from headrace import server

    try:
        rows = server.read(project, [query])[0].to_pylist()
    except (*NO_ANSWER, HeadraceError):
        return None
    return tuple(rows[0].values()) if rows else None


def percentile(values: Sequence[float], share: float) -> float | None:
    """Return the value that a share of the others stays below; None if there are none."""
    if not values:
        return None
    return round(sorted(values)[min(int(share * len(values)), len(values) - 1)], 3)
