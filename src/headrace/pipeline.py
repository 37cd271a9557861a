"""The pipeline: the only place that wires, and what keeps it running.

For each source five threads: three repeat one verb of its lane each, capture, load, and apply, which has a
part prepared while it takes the one before; two keep log and staging small. One more watches the source and
does nothing but ring; one for all keeps the marts, one looks at the ledger, one decides how many workers
there should be, and one makes a copy for readers where there is to be one. A thread that fails is judged by
its error's verdict: RETRY backs off and tries again for ever, alerting once when it lasts; anything else
stops that thread alone, with its reason, while the others go on.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from headrace.alarms import resolve, tell, trigger
from headrace.alerts.service import Alerting
from headrace.autoscaling import Autoscaling
from headrace.belonging import check_destination
from headrace.change import TableId
from headrace.config import Project
from headrace.conservation import EVERY as LOOK_EVERY
from headrace.conservation import LedgerWatch
from headrace.decisions import Decision
from headrace.destinations import open_destination, open_publisher
from headrace.errors import (
    DestinationUnavailable,
    HeadraceError,
    SourceGap,
    SourceUnavailable,
    UserError,
    Verdict,
    verdict_of,
)
from headrace.lane import Lane
from headrace.marts import MartKeeper
from headrace.memory import economise, give_back
from headrace.outages import Outages, source_of, words
from headrace.server import Server
from headrace.snapshot import take_snapshot
from headrace.sources.postgres.slot import POINT
from headrace.sources.postgres.watch import Watch
from headrace.staging.maintenance import Maintenance, compact_tables
from headrace.state import forget_empty_logs, take_state
from headrace.stopping import Stopping
from headrace.transform.folder import ModelFolder
from headrace.upkeep import EVERY, Upkeep
from headrace.upstream import PIN_EVERY, ReadingPlace

_T = TypeVar("_T")

_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 5.0
_POLL = 0.5
_MAINTAIN_ONCE = 10.0  # seconds of staging's maintenance at the end of a run that ends
_DECIDED_WITHIN = 60.0  # seconds that a command waits for what it decided to be in the table
_PACE = 0.15  # seconds between two loads while changes trickle: fewer, larger steps


def open_lanes(project: Project, *, read_only: bool = False) -> list[Lane]:
    """Open the lanes of a project, without starting anything.

    Raises ModelError for a model file that does not parse, UserError for one of no source.
    """
    destination = open_destination(project.destination, spill=project.state / "spill")
    folder = ModelFolder(
        project.models,
        {source.name for source in project.sources},
        destination.folded,
        project.destination.type,
        None if read_only else project.versions,
    )
    return [Lane(project, source, destination, folder, read_only=read_only) for source in project.sources]


class Pipeline:
    """A project that runs: owner of its state folder and of its destination."""

    def __init__(self, project: Project, stop: threading.Event | None = None) -> None:
        """Take the state folder and check that log, staging and destination belong together, waiting
        for a destination that cannot be had until `stop` is set.

        Raises StateInUse when another process runs on it, ForeignDestination and ModelError.
        """
        economise()
        self.project = project
        self.stop = stop or threading.Event()
        self._stopping = Stopping(self.stop)
        self._errors: dict[str, HeadraceError | BaseException] = {}
        self._outages = Outages()
        self._threads: list[threading.Thread] = []
        self._lock = take_state(project.state)
        try:
            self.lanes = open_lanes(project)
            own = [lane for lane in self.lanes if not lane.config.upstream]
            self._upkeep = {lane.config.name: Upkeep(lane, project.log, self.stop) for lane in own}
            self._maintenance = {lane.config.name: self._maintainer(lane) for lane in own}
            self._watches = {lane.config.name: _watch(lane) for lane in own}
            self._places = {
                lane.config.name: ReadingPlace(project, lane) for lane in self.lanes if lane.config.upstream
            }
            self._marts = MartKeeper(self.lanes[0].folder, self.lanes[0].destination)
            self._ledger = LedgerWatch(self.lanes)
            self._publisher = open_publisher(project.destination, self.lanes[0].destination)
            self._alerting = Alerting(project, self.lanes)
            self._scaling = Autoscaling(project, self.lanes, self._stopping.check)
            try:
                self._wait_for_destination()
            except BaseException:
                self._scaling.close()
                self._alerting.close()
                raise
        except BaseException:
            forget_empty_logs(project.state)
            self._lock.close()
            raise

    def run(self) -> None:
        """Run until `stop` is set: what is in hand is finished, if that is soon, and nothing new begun.

        Raises what stopped the first of them when every source has stopped for good and what it had
        brought is applied.
        """
        try:
            self._scaling.listen()
        except UserError:
            self.close()
            raise
        server = self._serve()
        for lane in self.lanes:
            if lane.config.upstream:
                verbs: tuple[str, ...] = ("load", "apply", "pin")
            else:
                verbs = ("capture", "load", "apply", "upkeep", "maintain")
                name = lane.config.name
                self._begin(f"{name}.watch", partial(self._watches[name].run, self.stop))
            for verb in verbs:
                self._start(lane, verb)
        self._begin("marts", self._step_marts)
        self._begin("ledger", self._step_ledger)
        self._begin("scale", self._step_scale)
        if self._publisher is not None:
            self._begin("publish", self._step_publish)
        self._begin("alerts", lambda: self._alerting.step(self.stop))
        for channel in self._alerting.channels:
            self._begin(f"alerts.{channel.name}", partial(self._alerting.deliver, channel, self.stop))
        ended: BaseException | None = None
        try:
            while ended is None and not self.stop.wait(_POLL):
                ended = self._ended()
        finally:
            self._end_threads()
            for fault in self._published_once():
                tell("%s", fault.paragraph(), severity="error")
            self._alerting.finish()
            server.close()
            self.close()
        if ended is not None:
            raise ended

    def run_once(self) -> None:
        """Bring over everything that is committed at the sources now, then return.

        Raises what stopped a source or a model; what the others brought over stays.
        """
        server = self._serve()
        self._begin("scale", self._step_scale)
        try:
            faults = [fault for lane in self.lanes for fault in self._once(lane)]
            faults += self._marts_once()
            faults += self._published_once()
            for fault in faults[1:]:
                tell("%s", fault.paragraph(), severity="error")
            if faults:
                raise faults[0]
        finally:
            self._end_threads()
            self._alerting.finish()
            server.close()
            self.close()

    def status(self) -> dict[str, Any]:
        """Return what only the running process knows: `pid`, threads `stopped` and `waiting` with their
        reasons, the offset through which each source is `staged`, the `alarms` of its watch, and whether the
        copy for readers, if there is one, `is_current`."""
        stopped = {name: str(error) for name, error in self._errors.items()}
        staged = {lane.config.name: lane.staging.through() for lane in self.lanes}
        alarms = {name: watch.alarms() for name, watch in self._watches.items()}
        return {
            "pid": os.getpid(),
            "stopped": stopped,
            "waiting": self._outages.reasons(),
            "staged": staged,
            "alarms": alarms,
            "is_current": self._publisher is not None and self._publisher.is_current(),
        }

    def close(self) -> None:
        """Send workers home; give back log, staging and state folder."""
        self._scaling.close()
        for upkeep in self._upkeep.values():
            upkeep.close()
        for place in self._places.values():
            with suppress(HeadraceError):  # a destination that is away keeps nothing from being given back
                place.step()
        for lane in self.lanes:
            lane.close()
            lane.destination.close()
        self._alerting.close()  # last, since whatever is closed may have something to say
        self._lock.close()

    def _serve(self) -> Server:
        handlers = {
            "status": lambda _: self.status(),
            "scale": lambda _: self._scaling.report(),
            "redrive": self._redrive,
            "decide": self._decide,
            "archive": self._archive,
            "rebuild": self._rebuild,
            "snapshot": lambda request: self.snapshot(**{k: v for k, v in request.items() if k != "op"}),
            "tables": self._change_tables,
            "resync": self._resync,
            "compact": self._compact,
            "suspend": self._suspend,
            "resume": self._resume,
        }
        return Server(self.project.state, self.lanes[0].destination, handlers)

    def _redrive(self, request: dict[str, Any]) -> dict[str, Any]:
        lane = self._lane(request["source"])
        each = request.get("each", False)
        return lane.redrive(request["model"], request["keys"], dry_run=request["dry_run"], each=each)

    def _decide(self, request: dict[str, Any]) -> dict[str, Any]:
        """Put a decision into the log, and wait until it is in the model's table."""
        lane = self._lane(request["source"])
        decision = Decision.from_json(request["decision"])
        self.project.refuse_reading_only(lane.config.name, f"headrace quarantine {decision.verb}")
        made = lane.decide(decision, dry_run=request["dry_run"])
        if not request["dry_run"]:
            deadline = time.monotonic() + _DECIDED_WITHIN
            while not lane.redriver.took(decision.model, made["offset"]) and time.monotonic() < deadline:
                if self.stop.wait(_PACE):
                    break
        return made

    def _archive(self, request: dict[str, Any]) -> dict[str, Any]:
        self.lanes[0].destination.archive_issue(request["issue"], request["actor"])
        return {}

    def _rebuild(self, request: dict[str, Any]) -> dict[str, Any]:
        lane = self._lane(request["source"])
        return {"beside": lane.rebuild(request["model"], dry_run=request["dry_run"])}

    def _suspend(self, request: dict[str, Any]) -> dict[str, Any]:
        self.lane_of(request["model"]).hold(request["model"], request["reason"])
        return {}

    def _resume(self, request: dict[str, Any]) -> dict[str, Any]:
        self.lane_of(request["model"]).release(request["model"])
        return {}

    def lane_of(self, model: str) -> Lane:
        """Return the lane that a row model or a mirror is of. Raises UserError where there is no such one."""
        for lane in self.lanes:
            source = lane.config.name
            with lane.applying:
                named = {each.name for each in lane.models()}  # of files, and mirrors
                named |= {text.name for text in lane.folder.current(now=True) if text.source == source}
                if model in named or model in lane.destination.models(source):
                    return lane
        raise UserError(f"There is no row model {model}.", "`headrace models ls` names what there is.")

    def snapshot(self, source: str, model: str, place: str, into: str | None) -> dict[str, Any]:
        """See `headrace.snapshot.take_snapshot`."""
        spill = self.project.state / "spill"
        return take_snapshot(self._lane(source), model, place, into, spill, self.stop)

    def _change_tables(self, request: dict[str, Any]) -> dict[str, Any]:
        lane = self._lane(request["source"])
        self.project.refuse_reading_only(lane.config.name, "headrace tables")
        lane.source.change_tables(lane.log, [TableId(*table) for table in request["tables"]], request["what"])
        return {}

    def _resync(self, request: dict[str, Any]) -> dict[str, Any]:
        """Have a source begin anew, also one that has stopped for good."""
        lane = self._lane(request["source"])
        self.project.refuse_reading_only(lane.config.name, "headrace resync")
        lane.source.request_resync(lane.log)
        name = f"{lane.config.name}.capture"
        if self._errors.pop(name, None):
            for kind in ("gap", "stopped"):
                resolve(kind, name, "RESOLVED %s begins anew", name, source=lane.config.name)
            self._start(lane, "capture")
        return {}

    def _compact(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"tables": compact_tables(self._maintenance, request["source"], request["table"])}

    def _maintainer(self, lane: Lane) -> Maintenance:
        config = self.project.staging
        return Maintenance(lane.staging, self.stop, share=config.maintenance_cpu, grace=config.grace)

    def _lane(self, source: str) -> Lane:
        lane = next((lane for lane in self.lanes if lane.config.name == source), None)
        if lane is None:
            raise UserError(f"The running pipeline has no source {source}.", "Restart it.")
        return lane

    def _start(self, lane: Lane, verb: str) -> None:
        """Start the thread that repeats one verb of a lane."""

        name, worked = f"{lane.config.name}.{verb}", True

        def load() -> None:
            loaded = lane.load()
            if lane.config.upstream:
                self.stop.wait(_PACE)
            elif not loaded:
                lane.log.wait(lane.staging.written(), _POLL)
            elif lane.staging.written() >= lane.log.end().offset:
                self.stop.wait(_PACE)

        def apply() -> None:
            nonlocal worked
            staged = lane.staging.through()
            if lane.apply():
                worked = True
                return
            if worked:
                give_back()
                worked = False
            lane.staging.wait(staged, _POLL)

        def upkeep() -> None:
            self._upkeep[lane.config.name].step()
            self.stop.wait(EVERY)

        def maintain() -> None:
            if not self._maintenance[lane.config.name].step():
                self.stop.wait(EVERY)

        def pin() -> None:
            self._places[lane.config.name].step()
            self.stop.wait(PIN_EVERY)

        steps = {
            "capture": lambda: lane.capture(self.stop, works=partial(self._captured, name)),
            "load": load,
            "apply": apply,
            "upkeep": upkeep,
            "maintain": maintain,
            "pin": pin,
        }
        self._begin(name, steps[verb])

    def _end_threads(self) -> None:
        self.stop.set()
        for thread in self._threads:
            thread.join()

    def _captured(self, name: str, appended: bool) -> None:
        """Note that a source has answered: that it goes on, if it does not wait for something else."""
        self._outages.works(name, None if appended else SourceUnavailable)

    def _begin(self, name: str, step: Callable[[], object]) -> None:
        """Start a thread that repeats a step."""
        self._threads.append(threading.Thread(target=self._keep, args=(name, step), name=name))
        self._threads[-1].start()

    def _step_scale(self) -> None:
        self._scaling.step(self.stop, self._outages.reasons())

    def _step_marts(self) -> None:
        self._marts.step()
        self.stop.wait(_POLL)

    def _step_ledger(self) -> None:
        if not self.stop.wait(LOOK_EVERY):
            self._ledger.step()

    def _step_publish(self) -> None:
        assert self._publisher is not None
        if not self._publisher.step():
            self.stop.wait(_POLL)

    def _keep(self, name: str, step: Callable[[], object]) -> None:
        """Repeat a step until the pipeline stops or the step fails for good."""
        pause = _FIRST_PAUSE
        while not self.stop.is_set():
            try:
                step()
            except BaseException as error:
                if self._stopping.gives_up(name, error):
                    return
                if verdict_of(error) is not Verdict.RETRY:
                    self._give_up(name, error)
                    return
                again = self._outages.fails(name, error)
                pause = min(pause * 2, _LONGEST_PAUSE) if again else _FIRST_PAUSE
                self.stop.wait(pause)
            else:
                self._outages.works(name)

    def _give_up(self, name: str, error: BaseException) -> None:
        self._errors[name] = error
        unexpected = None if isinstance(error, HeadraceError) else error
        kind = "gap" if isinstance(error, SourceGap) else "stopped"
        told = "STOPPED %s: %s"
        trigger(kind, name, told, name, words(error), source=source_of(name), exc_info=unexpected)

    def _ended(self) -> BaseException | None:
        """Return what stopped the first source, if none captures any more and nothing is left to apply."""
        first: BaseException | None = None
        for lane in self.lanes:
            name = lane.config.name
            capture, *later = (self._errors.get(f"{name}.{verb}") for verb in ("capture", "load", "apply"))
            if capture is None or not (any(later) or lane.idle()):
                return None
            first = first or capture
        return first

    def _once(self, lane: Lane) -> list[HeadraceError]:
        """Run one lane up to the source's present; returns what stopped it."""
        faults: list[HeadraceError] = []
        try:
            if not lane.config.upstream:
                lane.capture(self.stop, until=lane.source.head())
        except HeadraceError as error:
            faults.append(error)
        for verb, step in (("load", lane.load), ("apply", lane.apply)):
            while self._patiently(f"{lane.config.name}.{verb}", step) and not self.stop.is_set():
                pass
        if self.stop.is_set():
            return faults
        try:
            if lane.config.upstream:
                self._places[lane.config.name].step()
            else:
                self._upkeep[lane.config.name].step()
                self._maintenance[lane.config.name].step(_MAINTAIN_ONCE, paced=False)
        except HeadraceError as error:
            faults.append(error)
        for model, reason in lane.suspended().items():
            faults.append(UserError(f"Model {model} is suspended: {reason}", "Mend it and run again."))
        return faults

    def _marts_once(self) -> list[HeadraceError]:
        self._patiently("marts", lambda: self._marts.step(now=True))
        return [
            UserError(f"Mart {mart} is suspended: {reason}", "Mend it and run again.")
            for mart, reason in self._marts.suspended().items()
        ]

    def _published_once(self) -> list[HeadraceError]:
        """Let readers have what is there at the end; returns why they have it not."""
        try:
            if self._publisher is not None:
                self._publisher.step(now=True)
        except HeadraceError as error:
            return [error]
        return []

    def _wait_for_destination(self) -> None:
        """Check each lane's destination, waiting while it cannot be had; retry what is suspended."""
        for lane in self.lanes:
            self._patiently("destination", partial(check_destination, lane))
            self._patiently("destination", partial(lane.destination.reconsider, lane.config.name))

    def _patiently(self, name: str, step: Callable[[], _T]) -> _T | None:
        """Take a step, again while the destination cannot be had; None if stopped before its end."""
        while not self.stop.is_set():
            try:
                result = step()
            except DestinationUnavailable as error:
                self._outages.fails(name, error)
                self.stop.wait(_FIRST_PAUSE)
                continue
            except InterruptedError as error:
                if not self._stopping.gives_up(name, error):
                    raise
                return None
            self._outages.works(name)
            return result
        return None


def _watch(lane: Lane) -> Watch:
    return Watch(lane.config, expected=lambda: bool(lane.log.note(POINT)))
