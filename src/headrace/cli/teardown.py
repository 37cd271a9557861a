"""`headrace teardown`: what the project made at its sources is taken away again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from headrace.cli.tables import print_table
from headrace.config import Project, SourceConfig, load_project
from headrace.errors import HeadraceError
from headrace.log.sqlite import SQLiteLog
from headrace.sources.postgres.health import size_text
from headrace.sources.postgres.teardown import Made, drop_made, list_made
from headrace.state import take_state


def teardown(
    *,
    project: Annotated[Path, Parameter(help="The project's folder.")] = Path(),
    yes: Annotated[bool, Parameter(help="Drop what is listed as ours.", negative="")] = False,
) -> int:
    """List what the project made at its sources, its slots and publications; with --yes, drop it.

    State folder, staging and destination stay. What the log did not record as made by this project is
    left alone. Exit code 1 if a source did not answer or something could not be dropped, 2 while a
    pipeline runs on the project.
    """
    settings = load_project(project)
    own = [source for source in settings.sources if not source.upstream]
    sources = [source for source in own if settings.log_path(source.name).exists()]
    if not sources:
        print("This project has captured nothing: nothing of it is at a source.")
        return 0
    with take_state(settings.state):
        faults = _teardown(settings, sources, yes=yes)
    for fault in faults:
        print(fault.paragraph(), file=sys.stderr)
    return 1 if faults else 0


def _teardown(settings: Project, sources: Sequence[SourceConfig], *, yes: bool) -> list[HeadraceError]:
    faults: list[HeadraceError] = []
    rows: list[tuple[str, ...]] = []
    for source in sources:
        log = SQLiteLog(settings.log_path(source.name))
        try:
            for made in list_made(source, log):
                done = made.keep or ("dropped" if yes else "to be dropped")
                if yes and not made.keep:
                    try:
                        drop_made(source, log, made)
                    except HeadraceError as fault:
                        faults.append(fault)
                        done = "not dropped"
                rows.append((source.name, made.kind, made.name, _kept(made), done))
        except HeadraceError as fault:
            faults.append(fault)
        finally:
            log.close()
    if rows:
        print_table(("source", "what", "name", "WAL kept", "state"), rows)
    elif not faults:
        print("Nothing of this project is at its sources.")
    _say_what_is_next(settings, rows)
    return faults


def _kept(made: Made) -> str:
    return "" if made.retained is None else size_text(made.retained)


def _say_what_is_next(settings: Project, rows: Sequence[tuple[str, ...]]) -> None:
    states = {row[-1] for row in rows}
    if "to be dropped" in states:
        print("Nothing was dropped. After that, changes can no longer be captured: headrace teardown --yes")
    if "dropped" in states:
        staging = settings.staging.path
        paths: list[Path | str] = [settings.state, settings.destination.name]
        if not staging.is_relative_to(settings.state):
            paths.append(staging)
        print(f"What was captured stays. To begin anew, delete: {', '.join(map(str, paths))}")
