"""`headrace staging …`: what the raw tables hold, what they were, and their compaction."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from headrace.cells import json_of
from headrace.change import Offset, TableId
from headrace.cli.log_where import time_text
from headrace.cli.tables import print_table
from headrace.config import Project, SourceConfig, load_project
from headrace.errors import UserError
from headrace.evolution import read_evolutions
from headrace.log.sqlite import SQLiteLog
from headrace.server import ask
from headrace.sources.postgres.health import size_text
from headrace.sources.postgres.lsn import format_lsn
from headrace.sources.postgres.tables import read_states
from headrace.staging.delta import DeltaStaging
from headrace.staging.maintenance import Maintenance, compact_tables
from headrace.staging.named import find_tables
from headrace.staging.rows import INTERNAL
from headrace.staging.table import RawTable
from headrace.staging.timeline import Event, timeline

_FOLDER = Parameter(help="The project's folder.")
_SOURCE = Parameter(help="The source, where several have a table of that name.")
_JSON = Parameter(help="Print one JSON object a line.", negative="")


def ls(
    *,
    project: Annotated[Path, _FOLDER] = Path(),
    json: Annotated[bool, _JSON] = False,
) -> None:
    """List the raw tables: changes and copied rows, live files and their bytes, offsets, newest commit.

    With --json: source, table, path (a Delta table), rows, files, bytes, first and last (offsets, null where
    it is empty), staged_through (offset), committed_at (ISO 8601 in UTC, null where nothing tells).
    """
    settings = load_project(project)
    rows = [
        _described(config.name, table, raw, end)
        for config, staging, end in _stagings(settings)
        for table, raw in sorted(staging.tables().items())
        if table not in INTERNAL
    ]
    if json:
        for row in rows:
            print(json_of(row))
    elif rows:
        columns = ("source", "table", "rows", "files", "bytes", "first", "last", "committed_at")
        shown = [{**row, "bytes": size_text(row["bytes"])} for row in rows]
        print_table(columns, [[row[name] for name in columns] for row in shown])
    else:
        print("Nothing is staged yet: headrace run")


def schema(
    table: str,
    *,
    project: Annotated[Path, _FOLDER] = Path(),
    source: Annotated[str, _SOURCE] = "",
    json: Annotated[bool, _JSON] = False,
) -> None:
    """Show the columns of a raw table with the types that the source gives them at present.

    In staging every one is text. With --json: column, type, not_null, key (its place in the key from 1, or
    null), captured (false: the source has dropped it, and what was staged stays).

    Parameters
    ----------
    table
        schema.table; the schema public may be left out.
    """
    staging, found, end = _one(load_project(project), source, table)
    shape = staging.schemas(end).get(found)
    columns = shape.columns if shape else ()
    key = {name: place for place, name in enumerate(shape.key if shape else (), 1)}
    rows: list[dict[str, Any]] = [
        {"column": c.name, "type": c.type, "not_null": c.not_null, "key": key.get(c.name), "captured": True}
        for c in columns
    ]
    known = {column.name for column in columns}
    rows += [
        {"column": name, "type": None, "not_null": False, "key": None, "captured": False}
        for name in staging.columns(found)
        if name not in known
    ]
    _print(rows, json=json)


def history(
    table: str,
    *,
    project: Annotated[Path, _FOLDER] = Path(),
    source: Annotated[str, _SOURCE] = "",
    json: Annotated[bool, _JSON] = False,
) -> None:
    """Show what the source altered about a table, what was done about it, and the table's copies.

    Kinds: shape (the first one); column_added, column_dropped, column_renamed, type_widened, type_changed,
    key_changed (done: what schema_changes said then); reordered; copy (one begins, and why); copied (it is
    whole); removed (and why). With --json: offset, kind, lsn, position (epoch/commit/ordinal), committed_at,
    what, done; null where there is none.

    Parameters
    ----------
    table
        schema.table; the schema public may be left out.
    """
    settings = load_project(project)
    staging, found, end = _one(settings, source, table)
    with closing(SQLiteLog(settings.log_path(staging.source), read_only=True)) as log:
        evolution, state = read_evolutions(log).get(found), read_states(log).get(found)
    done = {(each.version, each.what): each.action for each in evolution.judged} if evolution else {}
    rows = [_event(event, done.get((event.version, event.what))) for event in timeline(staging, found, end)]
    if state is not None and state.stage == "removed":
        nowhere = dict.fromkeys(("offset", "kind", "lsn", "position", "committed_at", "what", "done"))
        rows.append({**nowhere, "kind": "removed", "what": state.reason or "headrace tables remove"})
    if not json:
        rows = [{name: cell for name, cell in row.items() if name != "position"} for row in rows]
    _print(rows, json=json)


def compact(
    table: str = "",
    *,
    project: Annotated[Path, _FOLDER] = Path(),
    source: Annotated[str, _SOURCE] = "",
    json: Annotated[bool, _JSON] = False,
) -> None:
    """Merge the files of a raw table, or of all, now and without sparing the machine.

    The running pipeline does it, or this command where none runs. What was replaced stays for [staging]
    grace, then the pipeline deletes it. With --json: source, table, files_before, files, bytes_before, bytes.

    Parameters
    ----------
    table
        schema.table; the schema public may be left out. All tables if it is left out.
    """
    settings = load_project(project)
    for config in settings.sources:
        if source in ("", config.name):
            settings.refuse_reading_only(config.name, "headrace staging compact")
    try:
        rows = ask(settings, {"op": "compact", "source": source, "table": table})["tables"]
    except (FileNotFoundError, ConnectionRefusedError):
        rows = _compact_here(settings, source, table)
    if not json:
        rows = [{**row, **{name: size_text(row[name]) for name in ("bytes_before", "bytes")}} for row in rows]
    _print(rows, json=json)


def _compact_here(project: Project, source: str, table: str) -> list[dict[str, Any]]:
    """Compact as the owner of the state folder."""
    from headrace.state import take_state

    with closing(take_state(project.state)):
        grace = project.staging.grace
        works = {
            config.name: Maintenance(staging, threading.Event(), grace=grace)
            for config, staging, _ in _stagings(project, read_only=False)
        }
        return compact_tables(works, source, table)


def _stagings(
    project: Project, *, read_only: bool = True
) -> Iterator[tuple[SourceConfig, DeltaStaging, Offset]]:
    """Yield the staging of every source that has run, with the offset through which it is staged."""
    for config in project.sources:
        path = project.log_path(config.name)
        if path.exists():
            with closing(SQLiteLog(path, read_only=True)) as log:
                staging = DeltaStaging(
                    project.staging_path(config.name), config.name, log.id, read_only=read_only
                )
                staging.follow(log)
            yield config, staging, staging.through()


def _one(project: Project, source: str, table: str) -> tuple[DeltaStaging, TableId, Offset]:
    """Return the one table that is meant, with its staging and how far that is staged."""
    found = {config.name: (staging, end) for config, staging, end in _stagings(project)}
    names = find_tables({name: staging for name, (staging, _) in found.items()}, source, table)
    if len(names) > 1:
        several = ", ".join(name for name, _ in names)
        raise UserError(f"Several sources have a table {table}: {several}.", "Name one with --source.")
    ((name, chosen),) = names
    return (found[name][0], chosen, found[name][1])


def _described(source: str, table: TableId, raw: RawTable, end: Offset) -> dict[str, Any]:
    files = raw.files
    newest = next(raw.chunks(0, end, ["_committed_at"], backwards=True), None)
    committed = newest["_committed_at"][-1].as_py() if newest else 0
    return {
        "source": source,
        "table": str(table),
        "path": str(raw.path),
        "rows": sum(file.rows for file in files),
        "files": len(files),
        "bytes": sum(file.bytes for file in files),
        "first": files[0].first if files else None,
        "last": files[-1].last if files else None,
        "staged_through": end,
        "committed_at": time_text(committed) if committed else None,
    }


def _event(event: Event, done: str | None) -> dict[str, Any]:
    return {
        "offset": event.offset,
        "kind": event.kind,
        "lsn": format_lsn(event.position.commit) if event.position.commit else None,
        "position": "/".join(map(str, event.position)),
        "committed_at": time_text(event.committed_at) if event.committed_at else None,
        "what": event.what,
        "done": done,
    }


def _print(rows: Sequence[Mapping[str, Any]], *, json: bool) -> None:
    if json:
        for row in rows:
            print(json_of(row))
    elif rows:
        print_table(list(rows[0]), [list(row.values()) for row in rows])
