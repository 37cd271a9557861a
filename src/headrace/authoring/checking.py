"""Holding models to what is recorded: they bind to the recorded tables, and put out what they did before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from headrace.authoring.files import Shapes, bind_text, logged_shapes, read_models
from headrace.authoring.recorded import (
    FOLDER,
    Promise,
    breaking,
    promise_of,
    read_promises,
    read_shapes,
    write_promises,
    write_shapes,
)
from headrace.config import Project
from headrace.errors import HeadraceError, UserError
from headrace.transform.sql import ModelText


@dataclass(frozen=True, slots=True)
class Result:
    """One model: why it does not read or bind, and what of its recorded output breaks."""

    model: str
    problems: tuple[str, ...] = ()
    breaks: tuple[str, ...] = ()

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
    seen = set()
    for name, text in read_models(project):
        seen.add(name)
        try:
            now = _promise(text, shapes)
        except HeadraceError as error:
            yield Result(name, (error.paragraph(),))
            continue
        breaks = breaking(name, promises[name], now) if name in promises else ()
        yield Result(name, breaks=tuple(breaks))
    for name in promises.keys() - seen:
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
    promises = {name: _promise(text, known) for name, text in read_models(project)}
    before = read_promises(project) or {}
    breaks = [line for name in sorted(before) for line in breaking(name, before[name], promises.get(name))]
    for source, tables in shapes.items():
        breaks += _lost_tables(project, source, tables)
    files = [write_shapes(project, source, tables) for source, tables in shapes.items() if tables]
    return Recorded((*files, write_promises(project, promises)), tuple(breaks))


def _promise(text: ModelText | HeadraceError, shapes: Mapping[str, Shapes]) -> Promise:
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
    return promise_of(text, bind_text(text, text.source, text.table, shapes[text.source]))


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
