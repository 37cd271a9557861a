"""Which models a source's tables have, bound to what the tables look like as of what is staged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from headrace.alarms import tell
from headrace.change import Offset, TableId, TableSchema
from headrace.config import Project, SourceConfig
from headrace.errors import HeadraceError, ModelBroken
from headrace.evolution import Evolution, Evolutions
from headrace.protocols import Destination, LogIndex
from headrace.schema_policy import action
from headrace.sources.postgres.lsn import format_lsn
from headrace.sources.postgres.tables import TableState
from headrace.staging.delta import DeltaStaging
from headrace.standing import ModelState
from headrace.transform.attempts import Attempts
from headrace.transform.linking import link
from headrace.transform.model import RowModel, bind, mirror, refuse_twins
from headrace.transform.pii import marked
from headrace.transform.sql import ModelText

logger = logging.getLogger("headrace.lane")


class Binder:
    """Binds the models of one source, again whenever a table's shape or what is made of it changes."""

    def __init__(
        self,
        project: Project,
        config: SourceConfig,
        log: LogIndex,
        staging: DeltaStaging,
        destination: Destination,
        suspend: Callable[[str, HeadraceError], None],
        *,
        read_only: bool,
    ) -> None:
        """`suspend` is called once with a model that does not bind, or that waits for a person."""
        self._attempts = Attempts(project.state / "attempts" / config.name, read_only=read_only)
        self._defaults = project.defaults
        self._config = config
        self._log = log
        self._staging = staging
        self._destination = destination
        self._suspend = suspend
        self._read_only = read_only
        self._evolutions = Evolutions(log, lambda table, kind: action(config.schema_changes, table, kind))
        self._bound: dict[str, tuple[Evolution, RowModel | HeadraceError]] = {}
        self._has_other_versions = False
        self._links: tuple[tuple[object, ...], list[RowModel], Sequence[RowModel]] | None = None

    def reload(self) -> bool:
        """Take over what a person has let go on; True if anything has."""
        return self._evolutions.reload()

    def has_other_versions(self) -> bool:
        """Whether since the last call a model has become another version, as its table's constraints did."""
        found, self._has_other_versions = self._has_other_versions, False
        return found

    def forget(self, model: str) -> None:
        """Bind a model anew whose file has changed."""
        self._bound.pop(model, None)

    def models(
        self, texts: Sequence[ModelText], removed: Collection[TableId], through: Offset
    ) -> Iterator[RowModel]:
        """Yield the models that bind: a mirror of each table that no file reads, but for those `removed`."""
        shapes = [shape for table, shape in self._staging.schemas(through).items() if table not in removed]
        bound, away = list[RowModel](), {text.name for text in texts}
        for table, evolution in self._evolved(shapes).items():
            read = [text for text in texts if text.table == table.label]
            chosen: list[ModelText | None] = [*read] or [None]
            for text in chosen:
                name = text.name if text else f"{self._config.name}.{table.label}"
                known = self._bound.get(name)
                if known is None or known[0] != evolution:
                    was, known = known, (evolution, self._bind(name, evolution, text, through))
                    self._bound[name] = known
                    self._has_other_versions |= was is not None and _version(was[1]) != _version(known[1])
                if isinstance(known[1], RowModel):
                    bound.append(known[1])
                    away.discard(name)
                else:
                    away.add(name)
        for model in self._linked(bound, {text.name: text for text in texts}, away):
            decisions = self._staging.decisions(model.name, through)
            yield replace(model, decisions=decisions) if decisions else model

    def _linked(
        self, bound: list[RowModel], texts: Mapping[str, ModelText], away: Collection[str]
    ) -> Sequence[RowModel]:
        """Return bound models with the references between them; one that cannot have its own is suspended."""
        given = (list(map(id, bound)), list(map(id, texts.values())), set(away))
        if self._links is None or self._links[0] != given:
            linked = link(bound, texts, away)
            self._links = (given, bound, linked.models)
            for name, fault in linked.faults.items():
                self._suspend(name, fault)
        return self._links[2]

    def put_aside(
        self,
        texts: Sequence[ModelText],
        tables: Mapping[TableId, TableState],
        stands: Mapping[str, ModelState],
    ) -> None:
        """Retire what the project no longer has, and suspend models of tables that are not captured."""
        # Those count that are to be staged yet, too: their models wait.
        captured = {table.label for table, state in tables.items() if state.stage != "removed"}
        modelled = {text.table for text in texts}
        named = {f"{self._config.name}.{label}" for label in captured - modelled}
        for text in texts:
            named.add(text.name)
            if text.table not in captured:
                why = next((s.reason for t, s in tables.items() if t.label == text.table and s.reason), "")
                known = f": it is {why}" if why else ""
                reason = f"raw.{text.source}.{text.table} is not captured{known}."
                remedy = f"Mend models/{text.file}, or add the table to [source.{text.source}] tables."
                self._suspend(text.name, ModelBroken(text.name, reason, remedy))
        for name, state in stands.items():
            if name not in named and state.state != "retired":
                logger.info("%s is no longer a model of this project: its table stays as it is", name)
                self._destination.retire(name, self._config.name)

    def _evolved(self, shapes: Sequence[TableSchema]) -> dict[TableId, Evolution]:
        evolved = self._evolutions.of(shapes, keep=not self._read_only)
        judged = [(table, each) for table, (_, fresh) in evolved.items() for each in fresh]
        for table, each in judged if not self._read_only else ():
            if each.action == "freeze":
                tell(
                    "FROZEN %s of source %s: %s. The destination keeps its shape, raw has it all "
                    "(schema_changes, %s).", table, self._config.name, each.what, each.kind,
                    source=self._config.name,
                )  # fmt: skip
        return {table: evolution for table, (evolution, _) in evolved.items()}

    def _bind(
        self, name: str, evolution: Evolution, text: ModelText | None, through: Offset
    ) -> RowModel | HeadraceError:
        schema = evolution.raw if text else evolution.shown
        try:
            if evolution.awaits:
                raise ModelBroken(
                    name,
                    f"The source altered {schema.table}: {evolution.awaits}; schema_changes says suspend.",
                    f"Look at it, then run `headrace tables resume {schema.table}`.",
                )
            refuse_twins(name, schema, () if text else self._staging.schemas(through))
            name_of = self._config.name
            bound = bind(text, schema, self._defaults) if text else mirror(name_of, schema, self._defaults)
            model = marked(bound, text, self._config.pii)
            return replace(model.limited(self._destination.limits(model)), attempts=self._attempts)
        except HeadraceError as error:
            told = self._since_when(name, schema, error, through) if text else error
            self._suspend(name, told)
            return told

    def _since_when(
        self, name: str, schema: TableSchema, error: HeadraceError, through: Offset
    ) -> HeadraceError:
        """Say since when the columns are gone that an engine's complaint names."""
        present = {column.name for column in schema.columns}
        words = str(error)
        said = []
        for column in self._staging.columns(schema.table):
            if column not in present and f'"{column}"' in words:
                gone = self._staging.gone_at(schema.table, column, through)
                position, at = self._log.place(gone)
                said.append(
                    f'the source has had no column "{column}" since {format_lsn(position.commit)} '
                    f"({datetime.fromtimestamp(at / 1e6, UTC).isoformat(' ', 'seconds')})"
                )
        if not said:
            return error
        return ModelBroken(name, f"{words} ({'; '.join(said)})", error.remedy)


def _version(bound: RowModel | HeadraceError) -> str:
    return bound.version if isinstance(bound, RowModel) else ""
