"""Holding models to what is recorded: they bind to the recorded tables, and put out what they did before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from headrace.authoring.files import Shapes, bind_text, logged_shapes, read_files
from headrace.authoring.marts import bind_marts
from headrace.authoring.recorded import (
    FOLDER,
    Promise,
    breaking,
    promise_of,
    promise_of_mart,
    read_promises,
    read_shapes,
    write_promises,
    write_shapes,
)
from headrace.config import Project
from headrace.defaults import ModelDefaults
from headrace.errors import HeadraceError, ModelError, UserError
from headrace.mart import Mart
from headrace.transform.model import mirror
from headrace.transform.sql import ModelText


@dataclass(frozen=True, slots=True)
class Result:
    """One model: why it does not read or bind, and what of its recorded output breaks; `unbound` is why a
    mart could not be bound here, which is no fault."""

    model: str
    problems: tuple[str, ...] = ()
    breaks: tuple[str, ...] = ()
    unbound: str = ""

    @property
    def ok(self) -> bool:
        """Whether there is nothing wrong with it."""
        return not (self.problems or self.breaks)


@dataclass(frozen=True, slots=True)
class Recorded:
    """What was recorded: the files, and in words what breaks against what was recorded before."""

    files: tuple[Path, ...]
    breaks: tuple[str, ...]


def check_models(project: Project) -> Iterator[Result]:
    """Read and bind every model in use, and compare its output with the recorded one.

    Needs neither database nor state. Raises UserError for a recording that cannot be read.
    """
    shapes = {source.name: read_shapes(project, source.name) for source in project.sources}
    promises = read_promises(project) or {}
    made, _ = _make(project, shapes)
    for name, now in made.items():
        if isinstance(now, Promise):
            breaks = breaking(name, promises[name], now) if name in promises else ()
            yield Result(name, breaks=tuple(breaks))
        elif isinstance(now, HeadraceError):
            yield Result(name, (now.paragraph(),))
        else:
            yield Result(name, unbound=now)
    for name in promises.keys() - made.keys():
        yield Result(name, breaks=tuple(breaking(name, promises[name], None)))


def record(project: Project) -> Recorded:
    """Write down the captured tables' newest shapes, and the output of every model that binds to them.

    Raises UserError where no source has run yet, and for a model that does not bind; then nothing is written.
    """
    shapes = {source.name: logged_shapes(project, source.name) for source in project.sources}
    if not any(shapes.values()):
        raise UserError(
            "No source has run yet, so the shapes of its tables are not known.",
            "Record where the pipeline runs: `headrace run --once`, then `headrace ci --record`.",
        )
    known = {name: tables or read_shapes(project, name) for name, tables in shapes.items()}
    before = read_promises(project) or {}
    promises = dict[str, Promise]()
    made, _ = _make(project, known)
    for name, now in made.items():
        if isinstance(now, HeadraceError):
            raise now
        if isinstance(now, Promise):
            promises[name] = now
    lasting = (name for name in sorted(before) if not isinstance(made.get(name), str))
    breaks = [line for name in lasting for line in breaking(name, before[name], promises.get(name))]
    for source, tables in shapes.items():
        breaks += _lost_tables(project, source, tables)
    files = [write_shapes(project, source, tables) for source, tables in shapes.items() if tables]
    return Recorded((*files, write_promises(project, promises)), tuple(breaks))


def output_columns(project: Project, shapes: Mapping[str, Shapes]) -> dict[str, dict[str, str]]:
    """Return the columns of every table that models, mirrors and marts make, as far as they can be told from
    the shapes of raw tables."""
    made, mirrors = _make(project, shapes)
    return mirrors | {name: now.types() for name, now in made.items() if isinstance(now, Promise)}


def _make(
    project: Project, shapes: Mapping[str, Shapes]
) -> tuple[dict[str, Promise | HeadraceError | str], dict[str, dict[str, str]]]:
    """Return of every model in use what it puts out, what is wrong with it, or in words why that cannot be
    told here; and the columns of mirrors."""
    made = dict[str, Promise | HeadraceError | str]()
    marts = list[Mart]()
    read = set()
    for name, text in read_files(project):
        if isinstance(text, Mart):
            marts.append(text)
            continue
        try:
            made[name] = _promise(text, shapes, project.defaults)
        except HeadraceError as error:
            made[name] = error
        if isinstance(text, ModelText):
            read.add((text.source, text.table))
    mirrors = dict[str, dict[str, str]]()
    for source, found in shapes.items():
        unread = (schema for schema in found.values() if (source, schema.table.label) not in read)
        mirrors |= {model.name: model.types() for model in (mirror(source, schema) for schema in unread)}
    tables = mirrors | {name: now.types() for name, now in made.items() if isinstance(now, Promise)}
    for bound in bind_marts(marts, tables, project.destination.type):
        if bound.fault:
            made[bound.mart] = ModelError(f"Mart {bound.mart} does not bind: {bound.unbound}.")
        else:
            made[bound.mart] = bound.unbound or promise_of_mart(bound.columns)
    return made, mirrors


def _promise(
    text: ModelText | HeadraceError, shapes: Mapping[str, Shapes], defaults: ModelDefaults
) -> Promise:
    if isinstance(text, HeadraceError):
        raise text
    if text.source not in shapes:
        raise UserError(
            f"Model {text.name} reads raw.{text.source}.{text.table}, and there is no [source.{text.source}]."
        )
    if not shapes[text.source]:
        raise UserError(
            f"Model {text.name} is not bound: {FOLDER}/{text.source}.toml is not there.",
            "Record it where the pipeline runs: `headrace ci --record`.",
        )
    return promise_of(text, bind_text(text, text.source, text.table, shapes[text.source], defaults))


def _lost_tables(project: Project, source: str, tables: Shapes) -> Iterator[str]:
    """Yield what of the recorded tables is no longer there, or of another type: their mirrors follow."""
    for table, was in read_shapes(project, source).items() if tables else ():
        now = tables.get(table)
        if now is None:
            yield f"table {source}.{table.label} is no longer captured"
            continue
        types = {column.name: column.type for column in now.columns}
        for column in was.columns:
            if column.name not in types:
                yield f"table {source}.{table.label}: column {column.name} is gone"
            elif types[column.name] != column.type:
                yield (
                    f"table {source}.{table.label}: column {column.name} is {types[column.name]}, "
                    f"and was {column.type}"
                )
