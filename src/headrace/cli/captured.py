"""`headrace tables …` and `headrace resync`: which tables are captured, and how far their copies are."""

from __future__ import annotations

import json as json_text
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from headrace.change import TableId
from headrace.cli.tables import print_table
from headrace.config import Project, SourceConfig, load_project, select_tables
from headrace.errors import UserError
from headrace.log.sqlite import SQLiteLog
from headrace.server import ask
from headrace.sources.postgres.tables import NOTE, UNFINISHED, TableState, read_states

if TYPE_CHECKING:
    from headrace.sources.postgres.source import PostgresSource, Request

_FOLDER = Parameter(help="The project's folder.")
_NAMES = Parameter(help="Tables, as schema.table; the schema public may be left out.")
_SOURCE = Parameter(help="The source, where the project has several.")
_BAR = 20
_RECENT = 20  # chunks that tell the pace


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a table's copy is. `left_s` estimates the seconds that are left, None where nothing
    tells."""

    table: TableId
    state: TableState
    chunks: int
    done: int
    rows: int
    left_s: float | None

    @property
    def share(self) -> float:
        """How much of the copy is done, from 0 to 1."""
        if self.state.stage in ("live", "catching_up"):
            return 1.0
        return self.done / self.chunks if self.chunks else 0.0


def list_tables(
    *,
    project: Annotated[Path, _FOLDER] = Path(),
    watch: Annotated[bool, Parameter(help="Show bars until every copy is done.", negative="")] = False,
    json: Annotated[bool, Parameter(help="Print one JSON object per table.", negative="")] = False,
) -> None:
    """List the captured tables: their stage, how much is copied, and how long that will take.

    Stages: requested, copying, catching_up (copied, while the stream has still to pass the copy's
    snapshot), live, failed (with the reason), removed. With --json: source, table, stage, paused,
    reason, chunks, done, share (from 0 to 1), rows, left_s (null where nothing tells).
    """
    settings = load_project(project)
    if watch and sys.stdout.isatty():
        _watch(settings)
    rows = [row for source in settings.sources for row in tables_of(settings, source)]
    if json:
        for row in rows:
            print(json_text.dumps(row, ensure_ascii=False))
    elif rows:
        print_table(("source", *_COLUMNS), [(row["source"], *_cells(row)) for row in rows])
    else:
        print("Nothing is captured yet: headrace run")


def add(
    *names: Annotated[str, _NAMES],
    project: Annotated[Path, _FOLDER] = Path(),
    source: Annotated[str, _SOURCE] = "",
) -> None:
    """Capture more tables: their changes from now on, and a copy of what they hold, beside the others.

    The choice is kept in the state folder; for a new one, write it to headrace.toml too.
    """
    settings, config, tables = _chosen(project, source, names)
    _change(settings, config, tables, "add")
    if missing := [str(table) for table in tables if not select_tables(config.tables, [table])]:
        listed = ", ".join(f'"{name}"' for name in (*config.tables, *missing))
        print(f"So that a new state folder knows it too: [source.{config.name}] tables = [{listed}]")


def remove(
    *names: Annotated[str, _NAMES],
    project: Annotated[Path, _FOLDER] = Path(),
    source: Annotated[str, _SOURCE] = "",
) -> None:
    """Capture tables no longer. What is staged stays, and so do their models' tables, as `retired`."""
    _change(*_chosen(project, source, names), "remove")


def resync(
    *names: Annotated[str, _NAMES],
    project: Annotated[Path, _FOLDER] = Path(),
    source: Annotated[str, _SOURCE] = "",
) -> None:
    """Copy tables again, beside their stream, and write to the destination only what differs."""
    _change(*_chosen(project, source, names), "resync")


def pause(
    *names: Annotated[str, _NAMES],
    project: Annotated[Path, _FOLDER] = Path(),
    source: Annotated[str, _SOURCE] = "",
) -> None:
    """Let the models of tables stand still. Their changes go on being captured and staged."""
    _change(*_chosen(project, source, names), "pause")


def resume(
    *names: Annotated[str, _NAMES],
    project: Annotated[Path, _FOLDER] = Path(),
    source: Annotated[str, _SOURCE] = "",
) -> None:
    """Let the models of paused tables go on from where they stand."""
    _change(*_chosen(project, source, names), "resume")


def resync_source(
    source: Annotated[str, Parameter(help="The source; may be left out where there is one.")] = "",
    *,
    project: Annotated[Path, _FOLDER] = Path(),
) -> None:
    """Begin anew with a source: a new slot, every table copied again, and what differs repaired,
    deletes included.

    For a source that has stopped because changes are gone (a gap). Log, staging and destination stay.
    """
    settings = load_project(project)
    config = _source(settings, source)
    settings.refuse_reading_only(config.name, "headrace resync")
    try:
        ask(settings, {"op": "resync", "source": config.name})
        print(f"{config.name} begins anew; see headrace tables list")
    except (FileNotFoundError, ConnectionRefusedError):
        _offline(settings, config, lambda origin, log: origin.request_resync(log))
        print(f"{config.name} begins anew with the next headrace run")


def progress(project: Project, source: SourceConfig) -> Iterator[Progress]:
    """Yield how far each table of a source is, from its log alone."""
    path = project.log_path(source.name)
    if not path.exists():
        return
    log = SQLiteLog(path, read_only=True)
    try:
        if log.note(NOTE) is None:
            return
        begun: dict[TableId, int] = {}
        done: dict[TableId, list[int]] = {}
        copied: Counter[TableId] = Counter()
        for _, table, _, at, mark in log.copy_marks():
            if mark.kind == "begin":
                begun[table], done[table], copied[table] = len(mark.bounds) + 1, [], 0
            elif mark.kind == "chunk" and table in done:
                done[table].append(at)
                copied[table] += mark.rows
        for table, state in read_states(log).items():
            chunks = begun.get(table, 0)
            times = done.get(table, [])
            if state.stage == "requested":  # what the log holds is of the copy before
                chunks, times = 0, []
            rows = copied[table] if chunks else 0
            yield Progress(table, state, chunks, len(times), rows, _left(chunks, times))
    finally:
        log.close()


def _left(chunks: int, times: Sequence[int]) -> float | None:
    """Estimate the seconds left from the pace of the newest chunks (their times in microseconds)."""
    if len(times) < 2 or len(times) >= chunks:
        return 0.0 if chunks and len(times) >= chunks else None
    recent = times[-_RECENT:]
    pace = (recent[-1] - recent[0]) / (len(recent) - 1)
    # A chunk that takes longer, or a pipeline that stands still, comes no nearer to its end.
    since = min(max(time.time() * 1e6 - recent[-1], 0.0), pace)
    return ((chunks - len(times)) * pace - since) / 1e6


def tables_of(project: Project, source: SourceConfig) -> list[dict[str, Any]]:
    """Return the tables of a source, each as an object of `headrace tables list --json`."""
    return [
        {
            "source": source.name,
            "table": str(item.table),
            "stage": item.state.stage,
            "paused": item.state.paused,
            "reason": item.state.reason,
            "chunks": item.chunks,
            "done": item.done,
            "share": round(item.share, 4),
            "rows": item.rows,
            "left_s": item.left_s,
        }
        for item in progress(project, source)
    ]


def print_unfinished(tables: Iterable[Mapping[str, Any]]) -> None:
    """Print a table of those that are not live, or paused; nothing where there are none."""
    shown = [row for row in tables if row["stage"] not in ("live", "removed") or row["paused"]]
    if shown:
        print()
        print_table(_COLUMNS, [_cells(row) for row in shown])


_COLUMNS = ("table", "stage", "copied", "rows", "left", "reason")


def _cells(row: Mapping[str, Any]) -> tuple[object, ...]:
    """Return the cells of `_COLUMNS`."""
    stage = f"{row['stage']}, paused" if row["paused"] else row["stage"]
    full = round(row["share"] * _BAR)
    bar = "█" * full + "░" * (_BAR - full) + f" {row['share']:4.0%}"
    left = "" if row["left_s"] is None or row["stage"] != "copying" else _duration(row["left_s"])
    return row["table"], stage, bar, row["rows"], left, row["reason"]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _watch(project: Project) -> None:
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %  {task.fields[words]}"),
    )
    with Bars(*columns) as bars:
        tasks: dict[tuple[str, str], Any] = {}
        unfinished = True
        while unfinished:
            unfinished = False
            for source in project.sources:
                for row in tables_of(project, source):
                    key = (source.name, row["table"])
                    if key not in tasks:
                        tasks[key] = bars.add_task(f"{source.name} {row['table']}", total=1.0, words="")
                    _, stage, _, rows, left, _ = _cells(row)
                    words = f"{stage}, {rows:,} rows" + (f", {left} left" if left else "")
                    bars.update(tasks[key], completed=row["share"], words=words)
                    unfinished |= row["stage"] in UNFINISHED
            time.sleep(0.5)


def _chosen(folder: Path, source: str, names: Sequence[str]) -> tuple[Project, SourceConfig, list[TableId]]:
    if not names:
        raise UserError("No table is named.", "Name tables as schema.table, such as public.orders.")
    settings = load_project(folder)
    tables = [TableId(*name.split(".", 1)) if "." in name else TableId("public", name) for name in names]
    return settings, _source(settings, source), tables


def _source(project: Project, name: str) -> SourceConfig:
    found = [source for source in project.sources if source.name == name or not name]
    if len(found) != 1:
        known = ", ".join(source.name for source in project.sources)
        what = f"There is no source {name}." if name else "The project has several sources."
        raise UserError(what, f"Name one of: {known}.")
    return found[0]


def _change(project: Project, source: SourceConfig, tables: Sequence[TableId], what: Request) -> None:
    """Ask the running pipeline, or write it to the log for the next one."""
    project.refuse_reading_only(source.name, f"headrace tables {what}")
    listed = ", ".join(map(str, tables))
    try:
        ask(project, {"op": "tables", "source": source.name, "tables": tables, "what": what})
        print(f"{what} {listed}: under way; see headrace tables list")
    except (FileNotFoundError, ConnectionRefusedError):
        _offline(project, source, lambda origin, log: origin.change_tables(log, tables, what))
        print(f"{what} {listed}: with the next headrace run")


def _offline(
    project: Project, source: SourceConfig, act: Callable[[PostgresSource, SQLiteLog], None]
) -> None:
    """Act on the log of a source as the owner of the state folder."""
    from headrace.sources.postgres.source import PostgresSource
    from headrace.state import take_state

    with closing(take_state(project.state)):
        path = project.log_path(source.name)
        if not path.exists():
            raise UserError(f"Source {source.name} has not run yet.", "headrace run")
        with closing(SQLiteLog(path)) as log:
            act(PostgresSource(source, project.log.max_group_bytes, project.log.group_linger), log)
