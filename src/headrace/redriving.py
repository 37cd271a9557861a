"""Redriving: the whole raw history of some source keys folded again, under the model and the decisions that
there are now.

Everything up to where the model stands counts: an old value can never overwrite a newer one, and redriving
twice changes nothing. What a person decided of a change comes into a table in the same way, once its entry is
staged, whatever dies meanwhile: the destination says through which entry it has.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import duckdb
import pyarrow as pa

from headrace.alarms import tell
from headrace.change import START, Offset
from headrace.decisions import PLACE, Decision, Decisions, Outcome
from headrace.errors import HeadraceError, ModelBroken, UserError
from headrace.joining import Joiner
from headrace.keys import literal
from headrace.log.sqlite import SQLiteLog
from headrace.masking import MASK
from headrace.protocols import Destination
from headrace.rebuilding import folded
from headrace.staging.delta import DeltaStaging
from headrace.standing import ModelState
from headrace.transform.model import RowModel, preparing
from headrace.waiting import Waiting

logger = logging.getLogger("headrace.redriving")

_BATCH = 20_000  # keys of decisions that are redriven in one transaction
_TRIED = 10_000
"""Keys with open records that a new version of a model is tried on."""

_OPEN = "status IN ('quarantined', 'waiting', 'blocked')"


class Running(NamedTuple):
    """The models of a source, and where they stand in the destination."""

    models: Sequence[RowModel]
    stands: Mapping[str, ModelState]

    def with_(self, model: RowModel) -> Running:
        """Return the same with a model in the place of that of its name."""
        return Running([model if each.name == model.name else each for each in self.models], self.stands)

    def version_of(self, model: str) -> str:
        """Return the version of a model by its name."""
        return next(each.version for each in self.models if each.name == model)


class Redriver:
    """Redrives the models of one source. All but `try_versions` is called by whoever applies."""

    def __init__(
        self,
        source: str,
        log: SQLiteLog,
        staging: DeltaStaging,
        destination: Destination,
        joiner: Joiner,
        waiting: Waiting,
    ) -> None:
        self._source = source
        self._log = log
        self._staging = staging
        self._destination = destination
        self._joiner = joiner
        self._waiting = waiting
        self._taken: dict[str, Offset] | None = None
        self._versions: dict[str, str] = {}  # that were tried
        self._trials = ThreadPoolExecutor(1, f"{source}.trial")

    def close(self) -> None:
        """Let a trial come to its end."""
        self._trials.shutdown(cancel_futures=True)

    def redrive(
        self, running: Running, model: RowModel, keys: Sequence[str], *, dry_run: bool, each: bool = False
    ) -> dict[str, Any]:
        """Redrive keys of a model.

        Returns how many records are `resolved` and `still_quarantined`, and if `each` what becomes of every
        one: `records`, see `_outcomes`.
        """
        again = {model.name: pa.array(keys, pa.string())}
        before = self._open_records(model, keys) if each else None
        refolding = self._waiting.refold(*running.with_(model), again, dry_run=dry_run)
        if before is None:
            return refolding.counts
        records = _outcomes(model, before, refolding.outcomes[model.name].records)
        hidden = {"key": MASK} if model.key_is_masked else {}
        return {**refolding.counts, "records": [record | hidden for record in records]}

    def _open_records(self, model: RowModel, keys: Sequence[str]) -> pa.Table:
        chosen = ", ".join(map(literal, keys)) or "NULL"
        (found,) = self._destination.read(
            [
                "SELECT CAST(id AS VARCHAR) AS id, key, epoch, commit, ordinal FROM headrace.quarantine "
                f"WHERE model = {literal(model.name)} AND {_OPEN} AND key IN ({chosen})"
            ]
        )
        return found

    # -- decisions

    def forget(self) -> None:
        """Ask the destination again which decisions are in its tables."""
        self._taken = None

    def decide(self, model: RowModel, decision: Decision) -> Offset:
        """Put a decision into the log; durable when it returns. Returns the offset of its entry. Raises
        UserError for one that cannot be."""
        _refuse(model, decision)
        at = self._log.position() or START
        return self._log.append([decision.entry(model.table, at, time.time_ns() // 1000)]).offset

    def try_decision(self, running: Running, model: RowModel, decision: Decision) -> dict[str, Any]:
        """Say what a decision would come to, as `redrive` does for each record; changes nothing."""
        _refuse(model, decision)
        known = [(0, decision)] if model.decisions is None else [*model.decisions.all, (0, decision)]
        decided = replace(model, decisions=Decisions(known))
        keys = [change.key for change in decision.changes if change.key is not None]
        return self.redrive(running, decided, keys, dry_run=True, each=True)

    def took(self, model: str, offset: Offset) -> bool:
        """Whether what was decided through an offset is in a model's table, as the destination says."""
        return self._destination.decided(self._source).get(model, 0) >= offset

    def take_in(self, running: Running, suspend: Callable[[str, str, HeadraceError], None]) -> bool:
        """Bring what was decided into the tables of models, where it is not yet; False if there was nothing.
        One that cannot take it is suspended.

        A decision's turn is where the model has come to its entry: then it has come to the change, too.
        """
        found = False
        for model in running.models:
            taken = self._taken_through(model)
            stand = running.stands.get(model.name)
            through = model.decisions.last(stand.offset) if model.decisions and stand else 0
            if model.decisions is None or through <= taken:
                continue
            found, keys = True, model.decisions.keys(taken, through)
            try:
                for begin in range(0, len(keys), _BATCH):
                    is_last = begin + _BATCH >= len(keys)
                    self._take_in(running, model, keys[begin : begin + _BATCH], through if is_last else 0)
            except ModelBroken as error:
                suspend(running.version_of(error.model), error.model, error)
                continue
            self._taken = None
            logger.info("model %s: what was decided of %d keys is in its table", model.name, len(keys))
        return found

    def _taken_through(self, model: RowModel) -> Offset:
        if self._taken is None:
            self._taken = self._destination.decided(self._source)
        return self._taken.get(model.name, 0)

    def _take_in(
        self, running: Running, model: RowModel, keys: Sequence[str | None], through: Offset
    ) -> None:
        assert model.decisions is not None
        wanted = pa.array([key for key in keys if key is not None], pa.string())
        discarded, patched = (model.decisions.about(verb, keys) for verb in ("discard", "patch"))
        with preparing(model.name):
            history = self._joiner.history(model, running.stands[model.name].offset, wanted)
            # A destination that is new has no records of what was discarded.
            whole = folded(replace(model, decisions=None), history, wanted).records
        unseen = whole.join(discarded.select(PLACE), list(PLACE), join_type="left semi")
        decided = {model.name: Outcome(through, discarded, patched, unseen)}
        self._waiting.refold(*running.with_(model), {model.name: wanted}, decided=decided)

    # -- new versions

    def try_versions(self, models: Iterable[tuple[RowModel, Offset]]) -> None:
        """Find out, beside everything else, how many open records new versions of models that stand at some
        offsets would take, and say so; once for each version."""
        for model, stand in models:
            if self._versions.get(model.name) != model.version:
                self._versions[model.name] = model.version
                self._trials.submit(self._try_version, model, stand)

    def _try_version(self, model: RowModel, stand: Offset) -> None:
        try:
            tried, passing = self._tried(model, stand)
        except Exception as error:  # a courtesy: what is wrong with the model is told where it is applied
            logger.info("model %s: its records were not tried: %s", model.name, type(error).__name__)
            return
        if tried:
            tell(
                "RECORDS %d of %d open records of model %s would pass under its new version%s",
                passing,
                tried,
                model.name,
                f": headrace quarantine redrive --model {model.name} --all" if passing else ".",
                source=model.source,
            )

    def _tried(self, model: RowModel, stand: Offset) -> tuple[int, int]:
        """Return how many open records were tried, and how many of them would pass, other rows apart."""
        (keys,) = self._destination.read(
            [
                f"SELECT DISTINCT key FROM headrace.quarantine WHERE model = {literal(model.name)} "
                f"AND {_OPEN} AND key IS NOT NULL LIMIT {_TRIED}"
            ]
        )
        if not keys.num_rows:
            return 0, 0
        wanted = keys["key"].combine_chunks()
        before = self._open_records(model, wanted.to_pylist())
        bad = folded(model, self._joiner.history(model, stand, wanted), wanted).records
        outcomes = [each["outcome"] for each in _outcomes(model, before, bad)]
        return before.num_rows, before.num_rows - outcomes.count("fails")


def _outcomes(model: RowModel, before: pa.Table, bad: pa.Table) -> list[dict[str, Any]]:
    """Say what becomes of each record: its `id`, `model`, `key` and `outcome`, in the source's order.

    - `passes`; `superseded`: by a change of its key that passes, of the commit `superseded_by`.
    - `fails`: with the `reason`, `columns` and `message` that it has now.
    - `new`: a change that was taken before, and fails under the model as it is now.
    """
    newest = "max(b.commit) FILTER (f.key IS NULL) OVER (PARTITION BY b.key)"
    order = "b.epoch DESC, b.commit DESC, b.ordinal DESC"
    place = f"row_number() OVER (PARTITION BY b.key, f.key IS NULL ORDER BY {order})"
    overtaken = f"{place} > 1" if model.supersedes else "false"
    key = literal(MASK) if model.key_is_masked else "coalesce(b.key, f.key)"
    with duckdb.connect() as db:
        db.register("before", before)
        db.register("bad", bad)
        found = db.sql(
            f"""SELECT coalesce(b.id, md5(concat_ws('|', {literal(model.source)}, {literal(model.name)},
              f.epoch, f.commit, f.ordinal))::UUID::VARCHAR) AS id, {literal(model.name)} AS model,
              {key} AS key,
              CASE WHEN b.id IS NULL THEN 'new' WHEN f.key IS NOT NULL THEN 'fails'
                WHEN {overtaken} THEN 'superseded' ELSE 'passes' END AS outcome,
              CASE WHEN b.id IS NOT NULL AND f.key IS NULL AND {overtaken} THEN {newest} END AS superseded_by,
              f.reason, f.columns, f.message
            FROM before b FULL JOIN bad f USING (epoch, commit, ordinal) ORDER BY epoch, commit, ordinal"""
        )
        outcomes: list[dict[str, Any]] = found.to_arrow_table().to_pylist()
    return outcomes


def _refuse(model: RowModel, decision: Decision) -> None:
    """Refuse what cannot be decided. Raises UserError."""
    cells = decision.cells or {}
    columns = {column.name for column in model.schema.columns}
    if decision.verb == "patch" and not model.schema.key:
        raise UserError(
            f"{model.table} has no key: its rows are known by their cells, which cannot be patched.",
            "Discard the record, or mend it at the source.",
        )
    for name in cells:
        if name in model.schema.key:
            raise UserError(
                f"{name} is of the key of {model.table}: it says which row this is.", "Leave it out."
            )
        if name not in columns:
            raise UserError(f"{model.table} has no column {name}.", f"It has: {', '.join(sorted(columns))}.")
