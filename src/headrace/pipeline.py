"""The pipeline: the only place that wires, and what keeps it running.

For each source three threads, each repeating one verb of its lane: capture, load, apply. A thread
that fails is judged by its error's verdict: RETRY backs off and tries again for ever, alerting once
when it lasts; anything else stops that thread alone, with its reason, while the others go on.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from headrace.config import Project
from headrace.destinations.duckdb import DuckDBDestination
from headrace.errors import HeadraceError, StateInUse, UserError, Verdict, verdict_of
from headrace.lane import Lane
from headrace.server import Server
from headrace.transform.sql import ModelText, read_model

logger = logging.getLogger("headrace.pipeline")
alerts = logging.getLogger("headrace.alert")

_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 5.0
_ALERT_AFTER = 10.0
_POLL = 0.5
_PACE = 0.15  # seconds between two loads or applies while changes trickle: fewer, larger steps


def read_models(project: Project) -> list[ModelText]:
    """Read every model file of a project; raises ModelError for the first that does not parse."""
    if not project.models.is_dir():
        return []
    return [read_model(path) for path in sorted(project.models.glob("*.sql"))]


def open_lanes(project: Project, *, read_only: bool = False) -> list[Lane]:
    """Open the lanes of a project, without starting anything."""
    destination = DuckDBDestination(project.destination.path)
    texts = read_models(project)
    known = {source.name for source in project.sources}
    for text in texts:
        if text.source not in known:
            raise UserError(
                f"Model {text.name} reads raw.{text.source}.{text.table}, but there is no [source.{text.source}].",
                f"Sources are: {', '.join(sorted(known))}.",
            )
    return [Lane(project, source, destination, texts, read_only=read_only) for source in project.sources]


class Pipeline:
    """A project that runs: owner of its state folder and of its destination."""

    def __init__(self, project: Project) -> None:
        """Take the state folder and check that log, staging and destination belong together.

        Raises StateInUse when another process runs on it, ForeignDestination and ModelError.
        """
        self.project = project
        self.stop = threading.Event()
        self._errors: dict[str, HeadraceError | BaseException] = {}
        self._waits: dict[str, str] = {}
        self._lock = _take_state(project.state)
        try:
            self.lanes = open_lanes(project)
            self._wait_for_destination()
        except BaseException:
            self._lock.close()
            raise

    def run(self) -> None:
        """Run until `stop` is set: everything in hand is finished, nothing new begun."""
        server = self._serve()
        threads = [thread for lane in self.lanes for thread in self._threads(lane)]
        try:
            self.stop.wait()
        finally:
            self.stop.set()
            for thread in threads:
                thread.join()
            server.close()
            self.close()

    def run_once(self) -> None:
        """Bring over everything that is committed at the sources now, then return.

        Raises what stopped a source or a model; what the others brought over stays.
        """
        server = self._serve()
        try:
            faults = [fault for lane in self.lanes for fault in self._once(lane)]
            if faults:
                raise faults[0]
        finally:
            server.close()
            self.close()

    def status(self) -> dict[str, Any]:
        """Return what only the running process knows: stopped threads, and what is waited for."""
        stopped = {name: str(error) for name, error in self._errors.items()}
        return {"pid": os.getpid(), "stopped": stopped, "waiting": dict(self._waits)}

    def close(self) -> None:
        """Give back log, staging and state folder."""
        for lane in self.lanes:
            lane.close()
        self._lock.close()

    def _serve(self) -> Server:
        handlers = {"status": lambda _: self.status(), "redrive": self._redrive}
        return Server(self.project.state, self.lanes[0].destination, handlers)

    def _redrive(self, request: dict[str, Any]) -> dict[str, Any]:
        lane = next(lane for lane in self.lanes if lane.config.name == request["source"])
        return lane.redrive(request["model"], request["keys"], dry_run=request["dry_run"])

    def _threads(self, lane: Lane) -> list[threading.Thread]:
        name = lane.config.name

        def load() -> None:
            if not lane.load():
                lane.log.wait(lane.staging.through(), _POLL)
            self.stop.wait(_PACE)

        def apply() -> None:
            if not lane.apply():
                self.stop.wait(_PACE)

        verbs = {"capture": lambda: lane.capture(self.stop), "load": load, "apply": apply}
        threads = [
            threading.Thread(target=self._keep, args=(f"{name}.{verb}", step), name=f"{name}.{verb}")
            for verb, step in verbs.items()
        ]
        for thread in threads:
            thread.start()
        return threads

    def _keep(self, name: str, step: Callable[[], None]) -> None:
        """Repeat a step until the pipeline stops or the step fails for good."""
        pause, failing_since = _FIRST_PAUSE, 0.0
        while not self.stop.is_set():
            try:
                step()
            except BaseException as error:  # noqa: BLE001 - judged, never swallowed
                if verdict_of(error) is not Verdict.RETRY:
                    self._give_up(name, error)
                    return
                failing_since = failing_since or time.monotonic()
                self._wait(name, error, time.monotonic() - failing_since)
                self.stop.wait(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)
            else:
                if self._waits.pop(name, None):
                    logger.info("%s goes on", name)
                pause, failing_since = _FIRST_PAUSE, 0.0

    def _wait(self, name: str, error: BaseException, lasting: float) -> None:
        text = error.paragraph() if isinstance(error, HeadraceError) else f"{type(error).__name__}: {error}"
        if name not in self._waits:
            logger.warning("%s waits: %s", name, text)
            self._waits[name] = text
        elif lasting > _ALERT_AFTER and not self._waits[name].startswith("alerted: "):
            alerts.error("%s has been waiting for %.0f s: %s", name, lasting, text)
            self._waits[name] = f"alerted: {text}"

    def _give_up(self, name: str, error: BaseException) -> None:
        self._errors[name] = error
        if isinstance(error, HeadraceError):
            alerts.error("STOPPED %s: %s", name, error.paragraph())
        else:
            alerts.error("STOPPED %s: %s: %s", name, type(error).__name__, error, exc_info=error)

    def _once(self, lane: Lane) -> list[HeadraceError]:
        """Run one lane up to the source's present; returns what stopped it."""
        faults: list[HeadraceError] = []
        try:
            head = lane.source.head()
            lane.capture(self.stop, until=head)
        except HeadraceError as error:
            faults.append(error)
        while lane.load():
            pass
        while lane.apply():
            pass
        for model, reason in lane.suspended().items():
            faults.append(UserError(f"Model {model} is suspended: {reason}", "Mend it and run again."))
        return faults

    def _wait_for_destination(self) -> None:
        """Check each lane's destination, waiting while another process holds it."""
        for lane in self.lanes:
            while not self.stop.is_set():
                try:
                    lane.check_destination()
                    break
                except HeadraceError as error:
                    if error.verdict is not Verdict.RETRY:
                        raise
                    self._wait("destination", error, 0.0)
                    self.stop.wait(_FIRST_PAUSE)
        if self._waits.pop("destination", None):
            logger.info("the destination is free, going on")


def _take_state(state: Path) -> IO[str]:
    try:
        (state / "log").mkdir(mode=0o700, parents=True, exist_ok=True)
        state.chmod(0o700)
        lock = (state / "lock").open("a+")
    except OSError as error:
        raise UserError(f"The state folder {state} cannot be written: {error.strerror}.", "Mend its rights.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise StateInUse(
            f"Another Headrace (pid {holder}) runs on {state}.",
            "Stop it first, or ask it: `headrace status`, `headrace query`.",
        ) from error
    lock.truncate(0)
    with suppress(OSError):
        lock.write(str(os.getpid()))
        lock.flush()
    return lock
