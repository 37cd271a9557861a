"""One source's way through the system: capture, load, prepare and apply, redrive.

Each verb is a step that can stand still without the one before it noticing:

- capture: source → log.       Append, fsync, then confirm to the source.
- load:    log → staging.      Write and fsync; the raw tables remember the offset.
- apply:   staging → models → destination. One transaction of data, quarantine, ledger, progress.
- redrive: quarantine → the same path again, by folding the key's whole raw history.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

from headrace.ahead import ahead
from headrace.alarms import trigger_issue, trigger_suspended, trigger_undecodable
from headrace.binding import Binder
from headrace.capturing import Works, capture
from headrace.change import Mark, Offset, Position
from headrace.config import Project, SourceConfig
from headrace.decisions import Decision
from headrace.errors import BreakerTripped, HeadraceError, LogTrimmed, ModelBroken, StagingBehind, UserError
from headrace.joining import Joiner
from headrace.log.retention import Needs
from headrace.log.sqlite import SQLiteLog
from headrace.measuring import counted, stands_of
from headrace.protocols import Destination, Part, Slice
from headrace.quarantine.breaker import Breakers
from headrace.quarantine.limit import SizeLimit
from headrace.redriving import Redriver, Running
from headrace.scaling.measure import Meter
from headrace.sources.postgres.source import PostgresSource
from headrace.sources.postgres.tables import copied_since, held_by_copies, read_states
from headrace.staging.delta import DeltaStaging
from headrace.standing import ModelState
from headrace.transform.fold import NOTHING
from headrace.transform.folder import ModelFolder
from headrace.transform.model import RowModel, preparing
from headrace.turns import Turns
from headrace.waiting import Again, Waiting, settled

logger = logging.getLogger("headrace.lane")

_LOAD_BYTES = 32 << 20
_SLICE_BYTES, _SLICE_ROWS = 64 << 20, 300_000
"""What one transaction of the destination takes; it is in memory piece by piece only."""
_RUNNING = ("in_sync", "joining")


class Lane:
    """One source with its log, its staging and its models."""

    def __init__(
        self,
        project: Project,
        config: SourceConfig,
        destination: Destination,
        folder: ModelFolder,
        *,
        read_only: bool = False,
    ) -> None:
        """Open log and staging.

        Raises ForeignDestination when staging or destination belong to another log: before anything
        is read from the source.
        """
        self.config = config
        self.destination = destination
        spool = project.state / "spool" / config.name
        self.source = PostgresSource(config, project.log.max_group_bytes, project.log.group_linger, spool)
        reading = read_only or config.upstream is not None
        self.log = SQLiteLog(project.log_path(config.name), read_only=reading)
        root = project.staging_path(config.name)
        self.staging = DeltaStaging(root, config.name, self.log.id, read_only=reading)
        self.staging.follow(self.log)
        self.meter = Meter(self.log, self.staging)
        self._freshness = project.scale.freshness
        self._breakers = Breakers(SizeLimit(project.quarantine, destination.read))
        self.joiner = Joiner(
            config.name, self.log, self.staging, destination.joins, project.state / "spill", self._breakers,
            self.meter,
        )  # fmt: skip
        self.waiting = Waiting(config.name, self.joiner, destination, self._breakers.recount)
        self.redriver = Redriver(config.name, self.log, self.staging, destination, self.joiner, self.waiting)
        self.folder = folder
        self._current = folder.current()
        self._texts = [text for text in self._current if text.source == config.name]
        self._stands: dict[str, ModelState] | None = None
        self._reached: Offset = 0
        self._tables = read_states(self.log)
        self._read_only = read_only
        refuse = partial(self._suspend, "")  # of no version: any runs once its table fits
        self._binder = Binder(
            project, config, self.log, self.staging, destination, refuse, read_only=read_only
        )
        self._preparer = ThreadPoolExecutor(1, f"{config.name}.prepare")
        self.applying = Turns()

    def capture(self, stop: threading.Event, until: int | None = None, works: Works | None = None) -> None:
        """See `headrace.capturing.capture`."""
        capture(self.source, self.log, stop, until, works)

    def load(self) -> bool:
        """Stage what comes next, or see what another project has; False when nothing was to be done."""
        if self.config.upstream:
            return self.staging.follow(self.log)
        try:
            entries = self.log.read(self.staging.written(), _LOAD_BYTES)
        except LogTrimmed as error:
            if not copied_since(self.log, begin := self.log.begin().offset):
                raise StagingBehind(
                    f"Staging lacks what follows offset {self.staging.written()}, and retention has deleted "
                    f"it from the log of {self.config.name}.",
                    f"Restore the state folder from a backup, or run `headrace resync {self.config.name}`.",
                ) from error
            self.staging.skip(begin)
            return True
        if not entries:
            return False
        for item in entries:
            if item.entry.kind == "undecodable" and item.entry.table is None:
                trigger_undecodable(self.config.name, item.offset)
        self.staging.write(entries)
        return True

    def apply(self) -> bool:
        """Apply the next slice, to the models that stand furthest behind; False when all is applied."""
        with self.applying:
            self.reload_models()
            self._reload_tables()
            staged = self.staging.through()
            # Before it is asked where they stand: one that does not bind is suspended.
            list(self._models(staged))
            if self._binder.has_other_versions():
                self._stands = None
            joined = self._join(staged)
            decided = self.redriver.take_in(self._running(staged), self._suspend)
            applied = self._apply_next(staged)
            return self._look_after_waiting(staged) or applied or joined or decided

    def _join(self, staged: Offset) -> bool:
        """Take the next model that has a copy to join one step further; False when there is none."""
        self._ask_where_models_stand()
        running = [self._offset(model) for model in self._runnable(staged)]
        for model in self._active(staged):
            copy = self.joiner.pending(model, staged)
            if copy is None:
                continue
            try:
                step = self.joiner.step(model, copy, self._stands or {}, running, self._reached, self._alert)
            except ModelBroken as error:
                self._suspend(model.version, model.name, error)
                return True
            except BaseException:
                self._stands = None
                raise
            if step == "begin" and not self.joiner.runs(model, staged):
                self._stand(model, "joining", 0)
            if step == "attach":
                self.redriver.forget()
                self._moved([model], self.joiner.joined_at(model), ())
                self.waiting.look()
            if step != "wait":
                return True
        return False

    def _apply_next(self, staged: Offset) -> bool:
        """Apply the next slice; False when all is applied."""
        self._ask_where_models_stand()
        models = list(self._runnable(staged))
        stands = {model.name: self._offset(model) for model in models}
        active, building = list(self._active(staged)), self.joiner.building()
        self.meter.stand(stands_of(active, stands, building, self._texts, self._freshness))
        after = min(stands.values(), default=staged)
        if after >= staged:
            return False
        # A model that lags goes no further in one slice than to where others, or the source's
        # progress, stand already: from there all go on together.
        further = [offset for offset in (*stands.values(), self._reached) if offset > after]
        through = self.log.slice_end(after, min([*further, staged]), _SLICE_BYTES, _SLICE_ROWS)
        chosen = [model for model in models if stands[model.name] == after]
        self._apply(chosen, after, through, caught_up=through >= max(further, default=through))
        return True

    def _look_after_waiting(self, staged: Offset) -> bool:
        running = self._running(staged)
        try:
            return self.waiting.step(running.models, running.stands, self._alert)
        except ModelBroken as error:
            self._suspend(running.version_of(error.model), error.model, error)
            return True

    def _running(self, staged: Offset) -> Running:
        """Return the models that take slices, those of paused tables too, with where they stand."""
        self._ask_where_models_stand()
        return Running(list(self._runnable(staged, or_paused=True)), self._stands or {})

    def reload_models(self, *, now: bool = False) -> bool:
        """Take over the model files that changed; True if any did.

        Looks at once if `now`, else at most once a second. A file that does not parse leaves its old
        version in force. Called by whoever holds `applying`.
        """
        current = self.folder.current(now=now)
        if current is self._current:
            return False
        before = set(self._texts)
        self._current = current
        self._texts = [text for text in current if text.source == self.config.name]
        changed = {text.name for text in before ^ set(self._texts)}
        for name in changed:
            self._binder.forget(name)
        if changed:
            self._stands = None
            logger.info("changed models: %s", ", ".join(sorted(changed)))
        return bool(changed)

    def _reload_tables(self) -> None:
        """Take over which tables are captured and paused, and whose changes a person has accepted."""
        states = read_states(self.log)
        if self._binder.reload() or states != self._tables:
            self._tables = states
            self._stands = None

    def idle(self) -> bool:
        """Whether everything in the log is staged, and applied to every model that runs."""
        staged = self.staging.through()
        if staged < self.log.end().offset or self._stands is None:
            return False
        if self.waiting.is_due or any(self.joiner.pending(model, staged) for model in self._active(staged)):
            return False
        return all(self._offset(model) >= staged for model in self._runnable(staged))

    def models(self) -> list[RowModel]:
        """Return every model that binds, as of what is staged."""
        return list(self._models(self.staging.through()))

    def suspended(self) -> dict[str, str]:
        """Return the models that are suspended, but not by hand, with their reasons."""
        states = self.destination.models(self.config.name)
        broken = (s for s in states.values() if s.state == "suspended" and s.suspended_by != "hand")
        return {state.name: state.reason for state in broken}

    def hold(self, model_name: str, reason: str) -> None:
        """Suspend a model until it is released, over restarts and whatever becomes of its file."""
        with self.applying:
            self.destination.hold(model_name, self.config.name, f"by hand{reason and ': '}{reason}")
            self._stands = None

    def release(self, model_name: str) -> None:
        """Let a suspended model be tried again. Raises UserError if it is not suspended."""
        with self.applying:
            released, self._stands = self.destination.release(model_name, self.config.name), None
        if not released:
            raise UserError(f"Model {model_name} is not suspended.", "`headrace status` says how it is.")

    def needs(self) -> Needs | None:
        """Return what must stay of the log; None where the destination has not been asked.

        Holds as long as the caller has `applying`. Raises what the destination raises.
        """
        staged = self.staging.through()
        running = [self._offset(model) for model in self._runnable(staged)] if self._stands else []
        if self._stands is None:
            return None
        stops = {self._reached, *self.joiner.targets(), *(each.offset for each in self._stands.values())}
        return Needs(min([staged, held_by_copies(self.log), *running]), frozenset(stops))

    def redrive(
        self, model_name: str, keys: Sequence[str], *, dry_run: bool = False, each: bool = False
    ) -> dict[str, Any]:
        """Fold the whole raw history of some source keys under the model as it is now, and apply it.

        Everything up to where the model stands counts: an old value can never overwrite a newer one,
        and redriving twice changes nothing. Returns how many records are resolved and how many stay
        (`resolved`, `still_quarantined`), if `each` also what becomes of each (`records`), or `rebuilding`:
        how many keys belong to a model that has other columns now and is built again with all its rows.
        """
        with self.applying:
            self.reload_models(now=True)
            if self._stands is None and not dry_run:
                known = model_name in self.destination.models(self.config.name)
                self._stands = self._where_models_stand()
                if known and model_name not in self._stands:
                    return {"resolved": 0, "still_quarantined": 0, "rebuilding": len(keys)}
            running, model = self._standing(model_name)
            return self.redriver.redrive(running, model, keys, dry_run=dry_run, each=each)

    def decide(self, decision: Decision, *, dry_run: bool = False) -> dict[str, Any]:
        """Put a decision about changes of a model into the log; returns the `offset` of its entry. Once that
        is staged, the next `apply` brings it into the table. With `dry_run` only say what would become of
        each record. Raises UserError for one that cannot be, and for a model that does not run."""
        with self.applying:
            self.reload_models(now=True)
            running, model = self._standing(decision.model)
            if dry_run:
                return self.redriver.try_decision(running, model, decision)
            return {"offset": self.redriver.decide(model, decision)}

    def _standing(self, model_name: str) -> tuple[Running, RowModel]:
        """Return all models, and one of them that runs. Raises UserError for any other."""
        running = Running(self.models(), self.destination.models(self.config.name))
        model = next((each for each in running.models if each.name == model_name), None)
        if model is None or model_name not in running.stands or self.joiner.stands_on(model) is None:
            raise UserError(
                f"Model {model_name} does not run now, or still takes in its table's copy.",
                "Wait for it, or mend it; `headrace status` says why.",
            )
        return running, model

    def rebuild(self, model_name: str, *, dry_run: bool = False) -> bool:
        """Begin to build a model once more, beside its live table; returns False for a table that others have
        changed: it is dropped, and the pipeline builds it anew. Raises UserError where it does not run, or
        has other columns now: then the pipeline builds it again anyway."""
        with self.applying:
            self.reload_models(now=True)
            self._reload_tables()
            model, stand = self._asked(model_name)
            if model is not None and not dry_run and self.destination.forget_if_reshaped(model, mend=True):
                self._stands = None
                return False
            if model is None or stand is None or not stand.runs(model.version):
                words = f"Model {model_name} does not run now, or there is none."
                raise UserError(words, "`headrace status` says more.")
            if self.destination.forget_if_reshaped(model, dry_run=True):
                words = f"Model {model_name} has other columns now: the pipeline builds it again by itself."
                raise UserError(words, "Run it; `headrace preview` shows what it will be.")
            self.joiner.know(None)
            self.joiner.rebuild(model, stand.offset, dry_run=dry_run)
            return True

    def take_rebuild_further(self, model_name: str) -> bool:
        """Take one step of a rebuild and nothing else; False when it has come to its end."""
        with self.applying:
            model, stand = self._asked(model_name)
            copy = self.joiner.pending(model, self.staging.through()) if model else None
            if model is None or stand is None or copy is None:
                return False
            progress = self.destination.progress(self.config.name)
            reached = progress.offset if progress else 0
            self.joiner.step(model, copy, {model_name: stand}, [], reached, self._alert)
            return True

    def _asked(self, model_name: str) -> tuple[RowModel | None, ModelState | None]:
        """Return a model with where it stands, as the destination says."""
        models = (model for model in self._models(self.staging.through()) if model.name == model_name)
        return next(models, None), self.destination.models(self.config.name).get(model_name)

    def close(self) -> None:
        """Close source and log."""
        self._preparer.shutdown()
        self.redriver.close()
        self.joiner.close()
        self.source.close()
        self.log.close()

    def _ask_where_models_stand(self) -> None:
        if self._stands is None:
            self._stands = self._where_models_stand()

    def _where_models_stand(self) -> dict[str, ModelState]:
        """Ask the destination; a model whose mended file has other columns starts from the beginning."""
        self.joiner.know(None)
        self.redriver.forget()
        stands = self.destination.models(self.config.name)
        self._breakers.know(name for name, state in stands.items() if state.suspended_by == "breaker")
        progress = self.destination.progress(self.config.name)
        self._reached = progress.offset if progress else 0
        mended = list[tuple[RowModel, Offset]]()
        for model in self._models(self.staging.through()):
            state = stands.get(model.name)
            is_held = state is not None and state.suspended_by == "hand"
            if state is None or is_held or model.is_mirror or state.version == model.version:
                continue
            try:
                if self.destination.forget_if_reshaped(model):
                    logger.info("model %s has other columns now: it is built again from staging", model.name)
                    del stands[model.name]
                elif state.open_records and not self._read_only:
                    mended.append((model, state.offset))
            except ModelBroken as error:
                self._suspend(model.version, model.name, error)
                stands[model.name] = replace(state, state="suspended", version=model.version)
        if self._tables and not self._read_only:
            self._binder.put_aside(self._texts, self._tables, stands)
        self.joiner.know(None)  # some of them are gone
        self.redriver.try_versions(mended)
        return stands

    def _apply(self, models: Sequence[RowModel], after: Offset, through: Offset, *, caught_up: bool) -> None:
        position, committed_at = self.log.place(through)
        in_sync = {model.name for model in models if caught_up and self._is_of(model, position)}
        place = (self._mark(after), self._mark(through), position, committed_at)
        self.joiner.workers.expect(models, (after, through), _SLICE_BYTES, _SLICE_ROWS)

        def attempt(models: Sequence[RowModel], again: Again) -> Sequence[str]:
            self._breakers.begin()
            parts = ahead(self._preparer, self._parts(models, (after, through), in_sync, again))
            with closing(parts), self.meter.applying(parts, counted) as taken:
                return self.destination.apply(Slice(self.config.name, *place, taken))

        try:
            issues = settled(models, attempt)
        except ModelBroken as error:
            self._suspend({each.name: each.version for each in models}[error.model], error.model, error)
            return
        except BaseException:
            self._stands = None
            raise
        self._breakers.keep()
        self._moved(models, through, in_sync)
        self._alert(issues)

    def _parts(
        self, models: Sequence[RowModel], span: tuple[Offset, Offset], in_sync: Collection[str], again: Again
    ) -> Iterator[Part]:
        """Prepare piece by piece while the destination takes them; a model without changes costs nothing.

        Raises ModelBroken for whatever is wrong with a model, so that nothing of it, and of the others
        nothing yet, is applied.
        """
        for model in models:
            quiet = True
            with preparing(model.name):
                for prepared in self.joiner.prepared(model, *span):
                    quiet = False
                    self._breakers.admit(model, prepared)
                    self.waiting.note(model, prepared)
                    yield Part(model, prepared, model.name in in_sync)
                    del prepared
            if quiet:
                yield Part(model, NOTHING, model.name in in_sync)
        for model, prepared in self.waiting.folded(models, dict.fromkeys(again, span[1]), again):
            yield Part(model, prepared, model.name in in_sync, refolded=True)

    def _is_of(self, model: RowModel, position: Position) -> bool:
        """Whether a model's table is made of a copy whose changes the log holds without a gap."""
        return (copy := self.joiner.stands_on(model)) is not None and copy.floor.epoch == position.epoch

    def _moved(self, models: Sequence[RowModel], through: Offset, in_sync: Collection[str]) -> None:
        self._reached = max(self._reached, through)
        if self._stands is None:
            return
        for model in models:
            self._stand(model, "in_sync" if model.name in in_sync else "joining", through)
        self.staging.forget(min(each.offset for each in self._stands.values() if each.state in _RUNNING))

    def _stand(self, model: RowModel, state: str, offset: Offset) -> None:
        """Take over where the destination has just put a model."""
        if self._stands is not None:
            stand = ModelState(model.name, self.config.name, model.version, state, "", offset, 0)
            self._stands[model.name] = stand

    def _offset(self, model: RowModel) -> Offset:
        state = (self._stands or {}).get(model.name)
        return state.offset if state else 0

    def _runnable(self, through: Offset, *, or_paused: bool = False) -> Iterator[RowModel]:
        """Yield the active models that take slices, which those that join do not."""
        active = self._active(through, or_paused=or_paused)
        return (model for model in active if self.joiner.runs(model, through))

    def _active(self, through: Offset, *, or_paused: bool = False) -> Iterator[RowModel]:
        """Yield the models that are neither suspended nor paused; one whose file was mended is active."""
        paused = {table for table, state in self._tables.items() if state.paused and not or_paused}
        for model in self._models(through):
            state = (self._stands or {}).get(model.name)
            if (state is None or state.runs(model.version)) and model.table not in paused:
                yield model

    def _models(self, through: Offset) -> Iterator[RowModel]:
        """Yield the models that bind to their tables' shapes; one that does not is suspended, once."""
        removed = {table for table, state in self._tables.items() if state.stage == "removed"}
        return self._binder.models(self._texts, removed, through)

    def _suspend(self, version: str, name: str, error: HeadraceError) -> None:
        if self._read_only:
            return
        self._stands = None
        if self._breakers.has_room(error):
            return
        tripped = isinstance(error, BreakerTripped)
        if self.destination.suspend(name, self.config.name, version, str(error), tripped=tripped):
            trigger_suspended(name, self.config.name, error.paragraph())

    def _mark(self, offset: Offset) -> Mark:
        mark = self.log.mark(offset)
        assert mark is not None, f"offset {offset} is not in the log"
        return mark

    def _alert(self, issues: Sequence[str]) -> None:
        for issue in issues:
            trigger_issue(issue, self.config.name, *self.destination.issue(issue))
