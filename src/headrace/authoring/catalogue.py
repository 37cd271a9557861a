"""What a project's models are and how they stand: of their files, of the destination, and of the log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from headrace.authoring.files import Found, Shapes, bind_found, link_source, logged_shapes, read_models
from headrace.change import Offset
from headrace.config import Project
from headrace.errors import HeadraceError, UserError
from headrace.keys import literal
from headrace.log.sqlite import SQLiteLog
from headrace.server import read
from headrace.transform.lineage import Reads, lineage
from headrace.transform.model import RowModel
from headrace.transform.sql import ModelText

_STATES = (
    'SELECT source, model, state, reason, version, "offset", open_records FROM headrace.models ORDER BY model'
)
_VERSIONS = (
    "SELECT model_version AS version, CAST(sum(read) AS BIGINT) AS changes, "
    'CAST(min("after") AS BIGINT) AS after, CAST(max("through") AS BIGINT) AS through, '
    "min(recorded_at) AS since, max(recorded_at) AS until FROM headrace.ledger "
    "WHERE model = {model} AND kind IN ('apply', 'copy') GROUP BY model_version ORDER BY min(recorded_at)"
)


Kind = Literal["row model", "mirror", ""]


@dataclass(frozen=True, slots=True)
class Listed:
    """A model as a list shows it.

    `state` is that of headrace.models, `new` where the destination does not know it, or `broken` where the
    file does not read, with `reason`. `version` is the file's, `applied_version` the one that moved its table
    last. `lag` counts the log's entries between `offset`, where it stands, and the log's end.
    """

    name: str
    source: str
    table: str
    kind: Kind
    materialisation: Literal["table"]
    state: str
    reason: str
    version: str
    applied_version: str
    offset: Offset
    lag: int
    open_records: int


@dataclass(frozen=True, slots=True)
class OutputColumn:
    """A column of a model's table; `type` is DuckDB's, '' where the model is not bound."""

    name: str
    type: str
    not_null: bool
    reads: tuple[str, ...]
    expression: str


@dataclass(frozen=True, slots=True)
class Version:
    """What the ledger says of one version of a model: how many changes it read, in `(after, through]`."""

    version: str
    changes: int
    after: Offset
    through: Offset
    since: datetime
    until: datetime


@dataclass(frozen=True, slots=True)
class Shown:
    """One model in full. `checks` are all that its rows are held to, `left_out` the source's constraints that
    they are not, with the reasons; `unbound` says why its columns have no types, '' where they have."""

    listed: Listed
    file: str
    key: tuple[str, ...]
    where: str
    columns: tuple[OutputColumn, ...]
    checks: tuple[str, ...]
    left_out: tuple[str, ...]
    unbound: str
    versions: tuple[Version, ...] = field(default=())


def list_models(project: Project) -> list[Listed]:
    """Return every model in use, and every one that the destination still knows, by name.

    Raises DestinationBusy where the destination exists and cannot be asked.
    """
    states = _states(project)
    ends = {source.name: _log_end(project, source.name) for source in project.sources}
    listed = [_file_model(name, text, states.pop(name, None), ends) for name, text in read_models(project)]
    listed += [_without_file(row, ends) for row in states.values()]
    return sorted(listed, key=lambda model: model.name)


def show_model(project: Project, found: Found) -> Shown:
    """Return all that is known of a model, its columns with the types that its table's shape gives them."""
    states = _states(project)
    ends = {found.source: _log_end(project, found.source)}
    row = states.get(found.name)
    if found.text:
        listed = _file_model(found.name, found.text, row, ends)
    elif row:
        listed = _without_file(row, ends)
    else:
        raise UserError(f"There is no mirror {found.name}.", "`headrace models ls` names what there is.")
    shapes = logged_shapes(project, found.source)
    columns, unbound = columns_of(project, found, shapes)
    checks, left_out = _limits(project, found, shapes)
    versions: tuple[Version, ...] = ()
    if row is not None:
        (table,) = read(project, [_VERSIONS.format(model=literal(found.name))])
        versions = tuple(Version(**row) for row in table.to_pylist())
    return Shown(
        listed=listed,
        file=_relative(found, project),
        key=found.text.key if found.text else (),
        where=found.text.where if found.text else "",
        columns=columns,
        checks=checks,
        left_out=left_out,
        unbound=unbound,
        versions=versions,
    )


def columns_of(project: Project, found: Found, shapes: Shapes) -> tuple[tuple[OutputColumn, ...], str]:
    """Return a model's columns with what each reads, and why they have no types where they have none."""
    model, unbound = _bind(project, found, shapes)
    if found.text:
        parts = [part for part in lineage(found.text) if part.name]
    else:
        parts = [Reads(name, name, (name,)) for name in (model.types() if model else ())]
    checks = model.checks if model else found.text.checks if found.text else ()
    required = {check.column for check in checks if not check.expression}
    types = model.types() if model else {}
    made = [
        OutputColumn(
            part.name, types.get(part.name, ""), part.name in required, part.columns, part.expression
        )
        for part in parts
    ]
    return tuple(made), unbound


def _relative(found: Found, project: Project) -> str:
    """Return a model's file, from the project's folder where it is inside."""
    if found.path is None:
        return ""
    path = found.path.resolve()
    return str(path.relative_to(project.root) if path.is_relative_to(project.root) else found.path)


def _limits(project: Project, found: Found, shapes: Shapes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return in words what the rows of a model are held to, and what of the source's constraints they are
    not."""
    texts = {name: text for name, text in read_models(project) if isinstance(text, ModelText)}
    texts |= {found.name: found.text} if found.text else {}
    linked = link_source(texts, found.source, shapes, project.defaults)
    model = next((each for each in linked.models if each.name == found.name), None)
    if model is None:
        checks = found.text.checks if found.text else ()
        return tuple(f"{check.column}: {check.text}" for check in checks), ()
    words = [f"{check.column}: {check.text}" for check in model.checks]
    words += [f"{', '.join(key.columns)}: UNIQUE" for key in model.unique if key.name]
    for each in model.own_references:
        words.append(f"{', '.join(each.columns)}: REFERENCES {each.parent} ({', '.join(each.to)})")
    return tuple(words), model.left_out


def _bind(project: Project, found: Found, shapes: Shapes) -> tuple[RowModel | None, str]:
    if not shapes:
        return None, f"Source {found.source} has not run yet, so the types are not known."
    try:
        return bind_found(found, shapes, project.defaults), ""
    except HeadraceError as error:
        return None, error.paragraph()


def _states(project: Project) -> dict[str, dict[str, Any]]:
    if project.destination.is_there is False:
        return {}
    (table,) = read(project, [_STATES])
    return {row["model"]: row for row in table.to_pylist()}


def _log_end(project: Project, source: str) -> Offset:
    path = project.log_path(source)
    if not path.exists():
        return 0
    log = SQLiteLog(path, read_only=True)
    try:
        return log.end().offset
    finally:
        log.close()


def _file_model(
    name: str, text: ModelText | HeadraceError, row: Mapping[str, Any] | None, ends: Mapping[str, Offset]
) -> Listed:
    row = row or {"source": "", "state": "new", "reason": "", "version": "", "offset": 0, "open_records": 0}
    if isinstance(text, HeadraceError):
        row = {**row, "state": "broken", "reason": text.paragraph()}
        return _listed(name, row, ends, table="", kind="", version="")
    row = {**row, "source": text.source}
    return _listed(name, row, ends, table=text.table, kind="row model", version=text.version)


def _without_file(row: Mapping[str, Any], ends: Mapping[str, Offset]) -> Listed:
    """Return a model that has no file: a mirror, or one that was retired."""
    name = str(row["model"])
    prefix = f"{row['source']}."
    mirrors = name.startswith(prefix)
    table = name.removeprefix(prefix) if mirrors else ""
    return _listed(name, row, ends, table=table, kind="mirror" if mirrors else "", version=row["version"])


def _listed(
    name: str, row: Mapping[str, Any], ends: Mapping[str, Offset], *, table: str, kind: Kind, version: str
) -> Listed:
    lag = 0 if row["state"] == "retired" else max(ends.get(row["source"], 0) - row["offset"], 0)
    return Listed(
        name=name,
        source=row["source"],
        table=table,
        kind=kind,
        materialisation="table",
        state=row["state"],
        reason=row["reason"],
        version=version,
        applied_version=row["version"],
        offset=row["offset"],
        lag=lag,
        open_records=row["open_records"],
    )
