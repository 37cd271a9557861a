"""Workers as processes of this machine.

A worker is a fork of an interpreter that has imported all it needs, made when there are to be more workers
and gone when there are to be fewer; at rest there is neither. What
it makes is in files of the pool's folder, which holds those of this run alone. One that dies costs what it
had in hand: another does that again, under a lease with the next attempt's number, and whatever comes of the
lease before is refused. A part that workers die of goes back to who asked.

A worker is stuck when it gets no further with a part, whatever it says or uses of the processor. Its memory
is what it has resident: a limit of the address space would not stop what Arrow and DuckDB map.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import signal
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from headrace.lifeline import signal_of
from headrace.parts import PartSpec
from headrace.prepared import Prepared
from headrace.prepared_file import Lease, NotTheOutcome, read_prepared
from headrace.scaling.pool import NoPlace, PartFailed, PoolState, Service, TooLarge
from headrace.scaling.worker import Request
from headrace.scaling.worker_process import ForkServer, WorkerProcess

logger = logging.getLogger("headrace.workers")

MEMORY = 2 << 30
PATIENCE = 120.0
MAX_DEATHS = 2
_MAX_KILLS = 3
"""So many times more often a worker may have been killed with a part than have died of it: no part sends a
SIGKILL, but the kernel does where one takes all memory."""
_LOOK = 0.2  # seconds between two looks at memory and progress
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds until the next start, after workers that come to nothing
_KEPT = 20


@dataclass(slots=True)
class _Task:
    """A part that was asked for."""

    part: PartSpec
    sent: bytes
    """The part as it goes to a worker."""
    future: Future[Prepared]
    attempt: int = 0
    deaths: int = 0
    """Workers that had it when they died, or were ended by the pool."""
    kills: int = 0
    """Those of them that somebody else has killed."""
    lost_at: float = 0.0
    is_large: bool = False
    """Whether a worker took too much memory for it."""


class LocalPool:
    """See `headrace.scaling.pool.Pool`. At rest there is no process and, until the first, no thread."""

    def __init__(
        self,
        folder: Path,
        module: str,
        environment: Mapping[str, str],
        *,
        memory: int = MEMORY,
        patience: float = PATIENCE,
        max_deaths: int = MAX_DEATHS,
    ) -> None:
        """Workers are forked from `module`, which calls `headrace.scaling.worker.serve`, with no more than
        `environment`. The folder is this pool's alone; what is in it from another run goes.

        A worker may have `memory` bytes resident and no result or progress for `patience` seconds. A part
        that `max_deaths` workers have died of fails, or three times as many where each was killed. Raises
        OSError where the folder cannot be had.
        """
        self.epoch = uuid.uuid4().hex
        shutil.rmtree(folder, ignore_errors=True)
        self._folder = folder / self.epoch
        self._folder.mkdir(mode=0o700, parents=True)
        self._module = module
        self._environment = dict(environment)
        self._memory = memory
        self._patience = patience
        self._max_deaths = max_deaths
        self._lock = threading.RLock()
        self._queue = deque[_Task]()
        self._forks: ForkServer | None = None
        self._workers: list[WorkerProcess] = []
        self._held: dict[WorkerProcess, _Task] = {}
        self._desired = 0
        self._pause = _FIRST_PAUSE
        self._not_before = 0.0
        self._start_times = deque[float](maxlen=_KEPT)
        self._service: dict[str, Service] = {}
        self._closed = False
        self._thread: threading.Thread | None = None
        heard, rung = os.pipe()
        os.set_blocking(rung, False)
        self._bell, self._ringing = Connection(heard, writable=False), rung

    def submit(self, part: PartSpec) -> Future[Prepared]:
        """See `Pool.submit`."""
        future: Future[Prepared] = Future()
        sent = pickle.dumps(part)
        with self._lock:
            if self._closed or part.epoch != self.epoch:
                future.set_exception(PartFailed("the pool is closed, or of another run"))
                return future
            self._queue.append(_Task(part, sent, future))
        self._ring()
        return future

    def resize(self, workers: int) -> None:
        """See `Pool.resize`."""
        with self._lock:
            if self._closed:
                return
            self._desired = workers
            if workers and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="workers", daemon=True)
                self._thread.start()
        self._ring()

    def state(self) -> PoolState:
        """See `Pool.state`."""
        now = time.monotonic()
        with self._lock:
            starting = [each for each in self._workers if not each.ready_at]
            return PoolState(
                desired=self._desired,
                ready=sum(1 for each in self._workers if each.ready_at and not each.leaving),
                starting=len(starting),
                starting_seconds=sum(now - each.started_at for each in starting),
                busy=len(self._held),
                queued=sum(1 for task in self._queue if not task.future.cancelled()),
                start_times=tuple(self._start_times),
            )

    def service(self) -> Mapping[str, Service]:
        """See `Pool.service`."""
        with self._lock:
            return dict(self._service)

    def pids(self) -> list[int]:
        """Return the processes that there are."""
        with self._lock:
            return [each.pid for each in self._workers if each.pid]

    def close(self) -> None:
        """See `Pool.close`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            thread = self._thread
        self._ring()
        if thread is not None:
            thread.join()
        self._abandon("the pool is closed")
        self._bell.close()
        os.close(self._ringing)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _ring(self) -> None:
        with suppress(OSError):  # full: it rings already
            os.write(self._ringing, b".")

    def _abandon(self, why: str) -> None:
        """End all workers; what they have in hand, and what waits for them, goes back."""
        with self._lock:
            self._desired = 0
            workers, self._workers = self._workers, []
            tasks = [*self._held.values(), *self._queue]
            self._held.clear()
            self._queue.clear()
        for worker in workers:
            worker.end()
        with self._lock:
            self._end_forks()
        for task in tasks:
            _fail(task, why)

    def _run(self) -> None:
        try:
            self._work()
        except Exception:  # whoever waits for a part must not wait for ever
            logger.exception("workers are given up, and started again when there are to be some")
            with self._lock:
                self._thread = None
            self._abandon("the pool has failed")

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._closed:
                    return
                self._let_go()
                self._start_more()
                if not self._workers and not self._desired:
                    self._end_forks()
                self._hand_out()
                heard: dict[Any, WorkerProcess] = {each.connection: each for each in self._workers}
                patience = _LOOK if self._workers or self._desired else None
            ready = wait([self._bell, *heard], patience)
            if self._bell in ready:
                os.read(self._bell.fileno(), 4096)
            with self._lock:
                if self._closed:
                    return
                for connection in ready:
                    if connection is not self._bell:
                        self._listen(heard[connection])
                self._watch()

    def _let_go(self) -> None:
        """Tell as many workers as are too many to leave: those that have least to lose."""
        staying = [each for each in self._workers if not each.leaving]
        staying.sort(key=lambda each: (each in self._held, bool(each.ready_at)))
        for worker in staying[: max(len(staying) - self._desired, 0)]:
            if worker in self._held:
                worker.leaving = True  # it is told when it has finished
            elif worker.ready_at:
                worker.leave()
            else:
                self._bury(worker)

    def _start_more(self) -> None:
        staying = sum(1 for each in self._workers if not each.leaving)
        while staying < self._desired and time.monotonic() >= self._not_before:
            try:
                if self._forks is not None and not self._forks.is_alive():
                    self._end_forks()
                self._forks = self._forks or ForkServer(self._module, self._environment)
                self._workers.append(self._forks.fork())
            except OSError as error:
                logger.warning("a worker cannot be started: %s", error)
                self._back_off()
                return
            staying += 1

    def _end_forks(self) -> None:
        if self._forks is not None:
            self._forks.end()
            self._forks = None

    def _back_off(self) -> None:
        if time.monotonic() < self._not_before:
            return  # several came to nothing by one cause
        self._not_before = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _hand_out(self) -> None:
        for worker in list(self._workers):
            if not worker.ready_at or worker.leaving or worker in self._held:
                continue
            task = self._next()
            if task is None:
                return
            task.attempt += 1
            lease = Lease(task.part.id, self.epoch, task.attempt)
            self._held[worker] = task
            worker.begin(lease, time.monotonic())
            try:
                worker.connection.send(Request(task.sent, lease, self._path(lease)))
            except OSError:
                self._miss(worker)

    def _next(self) -> _Task | None:
        while self._queue:
            task = self._queue.popleft()
            if task.future.running() or task.future.set_running_or_notify_cancel():
                return task
        return None

    def _path(self, lease: Lease) -> Path:
        return self._folder / f"{lease.part}-{lease.attempt}.part"

    def _listen(self, worker: WorkerProcess) -> None:
        if worker not in self._workers:
            return
        try:
            if not worker.pid:
                worker.meet()
            while worker in self._workers and worker.connection.poll():
                self._hear(worker, json.loads(worker.connection.recv_bytes()))
        except (OSError, EOFError, ValueError):
            self._miss(worker)

    def _hear(self, worker: WorkerProcess, message: Mapping[str, Any]) -> None:
        now = time.monotonic()
        said = message["say"]
        if said == "log":
            logging.getLogger(message["name"]).log(message["level"], "%s", message["text"])
            return
        worker.progressed_at = now
        if said == "ready":
            worker.ready_at = now
        elif said == "leaving":
            self._bury(worker)
        elif said in ("done", "failed", "unwritten"):
            self._take(worker, message, now)

    def _take(self, worker: WorkerProcess, message: Mapping[str, Any], now: float) -> None:
        """Take what has become of a part, from the worker that has the lease of it."""
        lease = Lease(*message["lease"])
        task = self._held.get(worker)
        if task is None or lease != worker.lease:
            logger.warning("an outcome of attempt %d of a part is refused: it is another's", lease.attempt)
            return
        if message["say"] == "failed":
            _fail(task, message["what"])
        elif message["say"] == "unwritten":
            _fail(task, message["what"], NoPlace)
        else:
            path, began = self._path(lease), time.perf_counter()
            try:
                prepared = read_prepared(path, lease)
            except (NotTheOutcome, OSError) as error:
                self._lose(worker, f"what it made is of no use ({type(error).__name__})")
                return
            finally:
                path.unlink(missing_ok=True)
            taking = time.perf_counter() - began
            self._note(worker, task.part, message["rows"], message["seconds"], taking)
            self._pause = _FIRST_PAUSE
            if not worker.has_results:
                worker.has_results = True
                self._start_times.append(worker.ready_at - worker.started_at + now - worker.began_at)
            task.future.set_result(prepared)
        del self._held[worker]
        worker.lease = None
        if worker.leaving:
            worker.leave()

    def _note(self, worker: WorkerProcess, part: PartSpec, rows: int, seconds: float, taking: float) -> None:
        known = self._service.get(part.model.name, Service())
        if part.model_id in worker.knows:
            noted = replace(known, rows=known.rows + rows, seconds=known.seconds + seconds)
        else:
            noted = replace(known, first=known.first + rows)
        worker.knows.add(part.model_id)
        self._service[part.model.name] = replace(
            noted, taking=known.taking + taking, kept=known.kept + seconds
        )

    def _watch(self) -> None:
        """End workers that take too much memory, or get no further."""
        now = time.monotonic()
        for worker in list(self._workers):
            has_work = worker in self._held or worker.leaving or not worker.ready_at
            if worker.resident() > self._memory:
                if (task := self._held.get(worker)) is not None:
                    task.is_large = True
                if not worker.has_results:
                    self._back_off()  # it may be too much from the start
                self._lose(worker, f"it takes more than {self._memory >> 20} MiB of memory")
            elif has_work and now - worker.progressed_at > self._patience:
                if not worker.pid and worker.is_of(self._forks):
                    self._end_forks()
                self._lose(worker, f"it has got no further for {self._patience:g} s")
        for task in list(self._queue):
            if task.future.cancelled():
                self._queue.remove(task)
            elif task.deaths and (not self._desired or now - task.lost_at > self._patience):
                # Who asked has been told that it is begun, and takes it back no more.
                self._queue.remove(task)
                _fail(task, "no other worker is there to take it")

    def _miss(self, worker: WorkerProcess) -> None:
        """Lose a worker that has ended, and nobody has told it to."""
        code = worker.exit_code()
        if code is None:
            how = "it has died"
        elif code < 0:
            how = f"it was ended by {signal_of(code)}"
        else:
            how = f"it has ended with exit code {code}"
        self._lose(worker, how, killed=code in (None, -signal.SIGKILL))

    def _lose(self, worker: WorkerProcess, why: str, *, killed: bool = False) -> None:
        """End a worker that is of no use any more; its part goes to another, unless it has ended too many."""
        task, now = self._held.pop(worker, None), time.monotonic()
        if not worker.ready_at:
            self._back_off()
        self._bury(worker)
        if task is None:
            if not worker.leaving:
                which = f"worker {worker.pid}" if worker.pid else "a worker that was starting"
                logger.warning("%s is ended, or replaced: %s", which, why)
            return
        known = self._service.get(task.part.model.name, Service())
        self._service[task.part.model.name] = replace(known, lost=known.lost + now - worker.began_at)
        task.deaths += 1
        task.kills += killed
        task.lost_at = now
        logger.warning(
            "worker %d is replaced: %s (a part of model %s, attempt %d)",
            worker.pid, why, task.part.model.name, task.attempt,
        )  # fmt: skip
        most = self._max_deaths
        if task.deaths - task.kills >= most or task.deaths >= most * _MAX_KILLS:
            task.kills = 0  # be it the cause of them
            _fail(task, why, TooLarge if task.is_large else PartFailed)
        else:
            self._queue.appendleft(task)

    def _bury(self, worker: WorkerProcess) -> None:
        if worker in self._workers:
            self._workers.remove(worker)
        worker.end()
        if worker.lease is not None:
            path = self._path(worker.lease)
            path.unlink(missing_ok=True)
            path.with_suffix(".making").unlink(missing_ok=True)


def _fail(task: _Task, why: str, kind: type[PartFailed] = PartFailed) -> None:
    if task.future.running() or task.future.set_running_or_notify_cancel():
        task.future.set_exception(kind(why, task.deaths - task.kills))
