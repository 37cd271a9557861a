"""`headrace check`: everything that would stop a pipeline, found before it runs."""

from __future__ import annotations

import json as json_text
import os
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, NamedTuple

from cyclopts import Parameter

from headrace.authoring.files import link_source, logged_shapes, model_file, read_files
from headrace.authoring.routing import routes
from headrace.change import TableId, TableSchema
from headrace.config import (
    MODELS_FOLDER,
    DestinationConfig,
    Project,
    SourceConfig,
    load_project,
    select_tables,
)
from headrace.destinations import open_destination
from headrace.errors import HeadraceError
from headrace.mart import Mart
from headrace.raw.query import Session
from headrace.secret import place_of
from headrace.sources.postgres.catalog import list_tables, read_shapes
from headrace.sources.postgres.connection import connect
from headrace.sources.postgres.preflight import Finding, inspect
from headrace.transform.model import bind
from headrace.transform.names import name_faults, source_faults
from headrace.transform.sql import ModelText

_MARKS = {"ok": "✔", "warn": "⚠", "fail": "✘"}
_WORDS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}
_COLOURS = {"ok": "32", "warn": "33", "fail": "31"}

Shapes = Mapping[TableId, TableSchema]


class Line(NamedTuple):
    """A finding and the part of the project that it is about."""

    area: str
    finding: Finding


def check(
    project: Annotated[Path, Parameter(help="The project's folder.")] = Path(),
    *,
    json: Annotated[bool, Parameter(help="Print one JSON object instead of lines.", negative="")] = False,
) -> int:
    """Look for all that would stop a pipeline, and say how to mend it; exit code 2 if there is any.

    Reads only: neither the source nor the destination is changed.
    """
    lines = list(examine(load_project(project)))
    _print_json(lines) if json else _print_lines(lines)
    return 2 if any(line.finding.level == "fail" for line in lines) else 0


def examine(project: Project) -> Iterator[Line]:
    """Look at sources, destination, folders and models of a project, in this order."""
    shapes: dict[str, Shapes | None] = {}
    fresh = not project.state.exists()
    for source in project.sources:
        area = f"source {source.name}"
        if source.upstream:
            yield Line(area, _readable(project, source))
            shapes[source.name] = logged_shapes(project, source.name) or None
            continue
        yield from (Line(area, finding) for finding in inspect(source, fresh=fresh))
        shapes[source.name] = _shapes(source)
    own = [source for source in project.sources if not source.upstream]
    yield from (Line("sources", finding) for finding in _shared_slots(own))
    yield from (Line("destination", finding) for finding in _destination(project))
    yield from (Line("state", finding) for finding in _folders(project))
    yield from (Line("models", finding) for finding in _models(project, shapes))
    yield from (Line("alerts", finding) for finding in routes(project))


# ---------------------------------------------------------------------------------------- sources


def _readable(project: Project, source: SourceConfig) -> Finding:
    """Whether the log and the staging of another project can be read."""
    try:
        with Session(project) as session:
            _, staging = session.source(source.name)
            return Finding("ok", f"{source.place} can be read, through offset {staging.through()}")
    except (HeadraceError, OSError) as error:
        remedy = error.remedy if isinstance(error, HeadraceError) else "Mend its rights."
        return Finding("fail", f"{source.place} cannot be read: {str(error).rstrip('.')}", remedy)


def _shapes(source: SourceConfig) -> Shapes | None:
    """Return the shapes of the selected tables, None where the source does not tell; `inspect` says why."""
    import psycopg

    try:
        with connect(source.url.reveal()) as db:
            return read_shapes(db, select_tables(source.tables, list_tables(db)))
    except (HeadraceError, psycopg.Error):
        return None


def _shared_slots(sources: Sequence[SourceConfig]) -> Iterator[Finding]:
    taken: dict[tuple[str, str, str], str] = {}
    for source in sources:
        where = place_of(source.url.reveal())
        for kind, name in (("slot", source.slot), ("publication", source.publication)):
            # A slot belongs to the whole server, a publication to one database.
            scope = f"{where.host}:{where.port}" + (f"/{where.database}" if kind == "publication" else "")
            other = taken.setdefault((kind, name, scope), source.name)
            if other != source.name:
                yield Finding(
                    "fail",
                    f"sources {other} and {source.name} share the {kind} {name}",
                    f'Give each its own: [source.{source.name}] {kind} = "{name}_2"',
                )


# --------------------------------------------------------------------------- destination, folders


def _destination(project: Project) -> Iterator[Finding]:
    config = project.destination
    if config.is_there is False:
        fault = _folder_fault(config.path.parent)
        yield Finding("fail", *fault) if fault else Finding("ok", f"{config.path} can be made")
        yield from _published(config)
        return
    if config.url:
        there = place_of(config.url.reveal())
        for source in project.sources:
            if not source.upstream and place_of(source.url.reveal())[1:] == there[1:]:
                what = f"the destination is the database of source {source.name}: what is applied is captured"
                yield Finding("fail", what, "Name another database in [destination] url.")
    destination = open_destination(config)
    try:
        for finding in destination.inspect():
            yield Finding(finding.level, " ".join(finding.what.split()).rstrip("."), finding.remedy)
    finally:
        destination.close()
    yield from _published(config)


def _published(config: DestinationConfig) -> Iterator[Finding]:
    if config.publish is None:
        return
    folder = config.publish.parent
    fault = _folder_fault(folder)
    if fault is None and not folder.is_dir():
        fault = f"there is no folder {folder} for the published copy", f"mkdir -p {shlex.quote(str(folder))}"
    if fault is None and config.publish.is_dir():
        fault = f"{config.publish} is a folder", "Name a file in [destination] publish."
    yield Finding("fail", *fault) if fault else Finding("ok", f"{config.publish} can be published")


def _folders(project: Project) -> Iterator[Finding]:
    stages = any(not source.upstream for source in project.sources)
    places = dict.fromkeys((project.state, *([project.staging.path] if stages else [])))
    for folder in places:
        fault = _folder_fault(folder)
        yield Finding("fail", *fault) if fault else Finding("ok", f"{folder} can be written")


def _folder_fault(folder: Path) -> tuple[str, str] | None:
    """Say why files cannot be made in a folder, or in the one in which it would be made."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            return None
    except NotADirectoryError:
        return f"{existing} is no folder", f"Move it away, or name another than {folder}."
    except OSError as error:
        return (
            f"{existing} cannot be written: {error.strerror}",
            f"Let the user that runs headrace write there, or name another folder than {folder}.",
        )


# ----------------------------------------------------------------------------------------- models


def _models(project: Project, shapes: Mapping[str, Shapes | None]) -> Iterator[Finding]:
    texts: dict[str, ModelText | Mart] = {}
    for name, text in read_files(project):
        if isinstance(text, HeadraceError):
            yield Finding(
                "fail",
                _clause(text),
                text.remedy or f"Mend {MODELS_FOLDER}/{model_file(project, name).name}.",
            )
            continue
        texts[name] = text
        if isinstance(text, ModelText):
            yield _bound(project, text, shapes)
        else:
            yield Finding("ok", f"mart {name} reads {', '.join(text.reads) or 'no table'}")
    yield from _referring(project, texts, shapes)
    yield from _named(project, texts, shapes)
    if not texts:
        yield Finding("ok", "no model in use: every table is mirrored with its own types")


def _bound(project: Project, text: ModelText, shapes: Mapping[str, Shapes | None]) -> Finding:
    file = f"{MODELS_FOLDER}/{text.file}"
    if text.source not in shapes:
        what = f"model {text.name} reads raw.{text.source}.{text.table}, and there is no source {text.source}"
        return Finding("fail", what, f"{_near(text.source, shapes)} Mend {file}.".strip())
    known = shapes[text.source]
    if known is None:
        return Finding(
            "warn", f"model {text.name} is not bound: source {text.source} does not answer", "See above."
        )
    labels = {table.label: schema for table, schema in known.items()}
    if text.table not in labels:
        what = f"model {text.name} reads raw.{text.source}.{text.table}, and no such table is captured"
        remedy = f"{_near(text.table, labels)} Mend {file}, or select the table in tables.".strip()
        return Finding("fail", what, remedy)
    try:
        bind(text, labels[text.table], project.defaults)
    except HeadraceError as error:
        return Finding("fail", _clause(error), error.remedy or f"Mend {file}.")
    return Finding("ok", f"model {text.name} fits raw.{text.source}.{text.table}")


def _referring(
    project: Project, texts: Mapping[str, ModelText | Mart], shapes: Mapping[str, Shapes | None]
) -> Iterator[Finding]:
    """Look whether the foreign keys of the models can be kept, and which constraints of the source cannot;
    models that do not bind were told of."""
    models = {name: text for name, text in texts.items() if isinstance(text, ModelText)}
    for source, known in shapes.items():
        linked = link_source(models, source, known or {}, project.defaults)
        for fault in linked.faults.values():
            yield Finding("fail", _clause(fault), fault.remedy)
        for model in linked.models:
            for each in model.left_out:
                yield Finding("warn", f"model {model.name} does not take over {each}")


def _named(
    project: Project, texts: Mapping[str, ModelText | Mart], shapes: Mapping[str, Shapes | None]
) -> Iterator[Finding]:
    """Find names that the destination cannot have, or takes for one."""
    destination = open_destination(project.destination)
    yield from (Finding("fail", *fault) for fault in source_faults(shapes))
    for _, what, remedy in name_faults(texts, shapes, destination.folded):
        yield Finding("fail", what, remedy)
    read = {(text.source, text.table) for text in texts.values() if isinstance(text, ModelText)}
    mirrors = [
        f"{source}.{table.label}"
        for source, known in shapes.items()
        for table in known or ()
        if (source, table.label) not in read
    ]
    named = ["headrace.models", "models", *texts, *mirrors]
    faults = {fault for name in named if (fault := destination.misnamed(name))}
    yield from (Finding("fail", *fault) for fault in sorted(faults))


def _near(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(known), 1)
    return f'Did you mean "{close[0]}"?' if close else ""


def _clause(error: HeadraceError) -> str:
    return " ".join(str(error).split()).rstrip(".")


# ----------------------------------------------------------------------------------------- output


def _print_json(lines: Sequence[Line]) -> None:
    findings = [
        {"area": area, "level": finding.level, "what": finding.what, "remedy": finding.remedy}
        for area, finding in lines
    ]
    ok = all(finding["level"] != "fail" for finding in findings)
    print(json_text.dumps({"ok": ok, "findings": findings}, ensure_ascii=False))


def _print_lines(lines: Sequence[Line]) -> None:
    fancy = sys.stdout.isatty() and (sys.stdout.encoding or "").lower().startswith("utf")
    colour = fancy and not os.environ.get("NO_COLOR")
    marks = _MARKS if fancy else _WORDS
    area = ""
    for line in lines:
        if line.area != area:
            area = line.area
            print(area)
        level, what, remedy = line.finding.level, line.finding.what, line.finding.remedy
        mark = f"\x1b[{_COLOURS[level]}m{marks[level]}\x1b[0m" if colour else marks[level]
        print(f"  {mark} {what}")
        if remedy:
            print(" " * (3 + len(marks[level])) + remedy)
    levels = [line.finding.level for line in lines]
    print(_verdict(levels.count("fail"), levels.count("warn")))


def _verdict(fails: int, warnings: int) -> str:
    aside = f"{warnings} warning{'s' * (warnings != 1)}" if warnings else ""
    if fails:
        also = f", and {aside}" if aside else ""
        return f"{fails} thing{'s' * (fails != 1)} to mend before a pipeline can run{also}."
    return f"Ready to run{', with ' + aside if aside else ''}."
