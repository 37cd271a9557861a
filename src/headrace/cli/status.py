"""`headrace status`: how far each hop is, what waits, what is quarantined, how the slot fares."""

from __future__ import annotations

import json as json_text
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from headrace.change import TableId
from headrace.cli.captured import print_unfinished, tables_of
from headrace.cli.storage import disk_words, forecast, storage, storage_words
from headrace.cli.tables import print_table
from headrace.config import Project, SourceConfig, load_project
from headrace.errors import HeadraceError
from headrace.log.sqlite import SQLiteLog
from headrace.server import ask, read
from headrace.sources.postgres.health import age_text, size_text, slot_health
from headrace.sources.postgres.lsn import format_lsn
from headrace.sources.postgres.slot import durable_commit
from headrace.staging.delta import DeltaStaging
from headrace.transform.header import model_paths

_QUERIES = (
    'SELECT source, "offset", commit, committed_at FROM headrace.progress',
    'SELECT source, model, state, reason, "offset", commit, open_records FROM headrace.models ORDER BY model',
    "SELECT source, model, issue, min(reason) AS reason, min(columns) AS columns, "
    "min(message) AS message, count(*) AS records, sum(blocked)::BIGINT AS blocked, "
    "extract(epoch FROM min(first_seen))::DOUBLE PRECISION AS since "
    "FROM headrace.quarantine WHERE status IN ('quarantined', 'waiting', 'blocked') "
    "GROUP BY source, model, issue ORDER BY records DESC, issue",
    "SELECT mart, kind, state, reason, incomplete, missing, positions, rows, "
    "extract(epoch FROM refreshed_at) AS refreshed_at FROM headrace.marts ORDER BY mart",
    "SELECT model, sum(warned)::BIGINT AS warned, sum(nulled)::BIGINT AS nulled FROM headrace.ledger "
    "WHERE kind <> 'void' GROUP BY model",
)

Rows = Sequence[Mapping[str, Any]]


def status(
    *,
    project: Annotated[Path, Parameter(help="The project's folder.")] = Path(),
    json: Annotated[bool, Parameter(help="Print one JSON object.", negative="")] = False,
) -> None:
    """Show how far each hop and copy is, what waits, what is quarantined, how the source's slot fares.

    Works beside a running pipeline and without one. Positions are LSNs (X/Y), sizes bytes, ages
    seconds. The object of --json:

    - `project`; `running`, `pid`; `stopped` and `waiting`: reasons by thread (source.verb); `alarms`: what
      the watch of the running pipeline finds, a list of paragraphs by source.
    - `destination`: `path` (of a server, its address), `error` (null, or why it could not be asked),
      `bytes` of a file; `published`, the copy for readers if there is to be one: `path`, `error` (null, or
      why it cannot be read), `age_s` since it was made (null: not yet), `is_current` (the pipeline has
      changed nothing since), and by source, in `sources`, what is `visible` in it.
    - `disk`: `free` bytes, `per_day` (what logs and raw tables add, from what the last day brought), `days`
      until it is full; the destination's growth is not in it.
    - `alerts`: how many are `firing`; of each channel that fails, in `failing`, `channel`, `attempts`,
      `age_s`, `failure`.
    - `sources`: for each `name`, `has_run`, `error` (null, or why its log cannot be read), and
      - `tables`: the captured ones, each as `headrace tables list --json` prints it
      - `position` (last durable in the log), `log`: `id`, `begin` (what is before it is
        deleted), `end`, `bytes`; `staged_through`
      - `storage`: bytes of `log` and `raw`, `tables` (raw bytes by table), `log_per_day`, `raw_per_day`
      - `capture`: `lag_bytes` not yet confirmed to the source; `load`: `rows`, `bytes`, `oldest_s`
      - `visible`: `offset`, `position`, `as_of` (seconds since 1970: all that the source committed
        until then is visible, unless a model says otherwise), `age_s`; null before the first apply
      - `models`: `name`, `state`, `reason`, `offset`, `position`, `open_records`, `warned` and `nulled`
        (applied changes that violate a check which warns or nulls), `backlog`: `rows`, `bytes`, `oldest_s`
      - `quarantine`: open records by cause: `issue`, `model`, `reason`, `columns`, `message`,
        `records`, `blocked` (changes that wait behind them), `age_s`
      - `slot`: what the source says (see SlotHealth), or `unreachable` with the reason, or `read_by`, the
        project whose staging is read; its `holder` is the
        server's oldest open transaction, which keeps `restart_lsn` from moving on.
    - `marts`: `name`, `kind` (view, table), `state` (ok, suspended, retired), `reason`, `incomplete` and what
      is `missing` in its inputs; of a table the `positions` by source that it is of, `rows`, `age_s`.
    """
    settings = load_project(project)
    report = gather(settings)
    if json:
        print(json_text.dumps(report, ensure_ascii=False))
    else:
        _print(report)


def gather(project: Project) -> dict[str, Any]:
    """Ask log, staging, destination, source and the running pipeline; what cannot be asked is named."""
    live = _live(project)
    tables: list[Rows] = [[], [], [], [], []]
    error: str | None = None
    # Before the first run there is nothing to ask.
    has_run = any(project.log_path(source.name).exists() for source in project.sources)
    if project.destination.is_there or (project.destination.is_there is None and has_run):
        try:
            tables = [table.to_pylist() for table in read(project, _QUERIES)]
        except HeadraceError as fault:
            error = str(fault)
    sources = [_source(project, source, live, tables) for source in project.sources]
    path = project.destination.path
    return {
        "project": str(project.root),
        "running": live is not None,
        "pid": live["pid"] if live else None,
        "stopped": live["stopped"] if live else {},
        "waiting": live["waiting"] if live else {},
        "alarms": live["alarms"] if live else {},
        "alerts": _alerts(project),
        "destination": {
            "path": project.destination.name,
            "error": error,
            "bytes": path.stat().st_size if project.destination.is_there else None,
            "published": _published(project.destination.publish, live),
        },
        "disk": forecast(project, [source["storage"] for source in sources]),
        "sources": sources,
        "marts": [_mart(row) for row in tables[3]],
    }


def _alerts(project: Project) -> dict[str, Any]:
    from headrace.alerts.store import FILE, AlertStore

    store = AlertStore(project.state / FILE)
    try:
        firing, failing = len(store.firing()), store.failing()
    finally:
        store.close()
    return {
        "firing": firing,
        "failing": [
            {
                **{name: getattr(delivery, name) for name in ("channel", "attempts", "failure")},
                "age_s": _seconds(time.time() - delivery.made_at),
            }
            for delivery in failing
        ],
    }


def _published(path: Path | None, live: dict[str, Any] | None) -> dict[str, Any] | None:
    if path is None:
        return None
    from headrace.destinations.publishing import read_published

    report: dict[str, Any] = {"path": str(path), "error": None, "age_s": None, "sources": {}}
    report["is_current"] = bool(live and live["is_current"])
    try:
        copy = read_published(path)
    except HeadraceError as error:
        return {**report, "error": str(error)}
    if copy is not None:
        names = ("offset", "commit", "committed_at")
        sources = {
            source: _visible(dict(zip(names, row, strict=True))) for source, row in copy.sources.items()
        }
        report |= {"age_s": _seconds(time.time() - copy.made_at), "sources": sources}
    return report


def _mart(row: Mapping[str, Any]) -> dict[str, Any]:
    is_table = row["kind"] == "table"
    return {
        **{name: row[name] for name in ("kind", "state", "reason", "incomplete", "missing")},
        "name": row["mart"],
        "positions": json_text.loads(row["positions"]),
        "rows": row["rows"] if is_table else None,
        "age_s": max(0.0, time.time() - float(row["refreshed_at"])) if is_table else None,
    }


def _live(project: Project) -> dict[str, Any] | None:
    try:
        return ask(project, {"op": "status"})
    except OSError:
        return None


def _source(
    project: Project, source: SourceConfig, live: dict[str, Any] | None, tables: Sequence[Rows]
) -> dict[str, Any]:
    tolerated = {row["model"]: row for row in tables[4]}
    progress, models, causes = ([row for row in rows if row["source"] == source.name] for rows in tables[:3])
    path = project.log_path(source.name)
    report: dict[str, Any] = {"name": source.name, "has_run": path.exists(), "error": None}
    report |= {"position": None, "log": None, "staged_through": None, "load": None, "storage": None}
    report |= {"models": [], "tables": []}
    if path.exists():
        try:
            report |= _hops(project, source, path, live, models)
            report["tables"] = tables_of(project, source)
            for model in report["models"]:
                counts = tolerated.get(model["name"], {})
                model |= {name: counts.get(name, 0) for name in ("warned", "nulled")}
        except HeadraceError as error:
            report["error"] = str(error)
    slot = _slot(source)
    report["capture"] = {"lag_bytes": slot.get("lag_bytes")}
    report["visible"] = _visible(progress[0]) if progress else None
    report["quarantine"] = [
        {
            **{name: row[name] for name in ("issue", "model", "reason", "columns", "message")},
            **{name: row[name] for name in ("records", "blocked")},
            "age_s": _seconds(time.time() - row["since"]),
        }
        for row in causes
    ]
    report["slot"] = slot
    return report


def _hops(
    project: Project, source: SourceConfig, path: Path, live: dict[str, Any] | None, models: Rows
) -> dict[str, Any]:
    log = SQLiteLog(path, read_only=True)
    try:
        durable, end = durable_commit(log), log.end()
        staging = DeltaStaging(project.staging_path(source.name), source.name, log.id, read_only=True)
        staged = live["staged"].get(source.name) if live else None
        if staged is None:
            staging.follow(log)
            staged = staging.through()
        tables = _tables_of_models(project, source, log)
        return {
            "position": format_lsn(durable) if durable else None,
            "log": {"id": log.id, "begin": log.begin().offset, "end": end.offset, "bytes": log.size()},
            "staged_through": staged,
            "load": _backlog(log, staged),
            "storage": storage(log, staging),
            "models": [_model(row, log, tables) for row in models],
        }
    finally:
        log.close()


def _tables_of_models(project: Project, source: SourceConfig, log: SQLiteLog) -> dict[str, TableId]:
    """Return the raw table of every model; a file that does not read is left to `headrace check`."""
    labels = {table.label: table for table in log.schemas()}
    tables = {f"{source.name}.{label}": table for label, table in labels.items()}
    paths = model_paths(project.models)
    if paths:
        from headrace.transform.python.text import outline
        from headrace.transform.sql import read_model

        for path in paths:
            try:
                text = outline(path) if path.suffix == ".py" else read_model(path)
            except HeadraceError:
                continue
            if text.source == source.name and text.table in labels:
                tables[text.name] = labels[text.table]
    return tables


def _model(row: Mapping[str, Any], log: SQLiteLog, tables: Mapping[str, TableId]) -> dict[str, Any]:
    return {
        "name": row["model"],
        "state": row["state"],
        "reason": row["reason"],
        "offset": row["offset"],
        "position": format_lsn(row["commit"]),
        "open_records": row["open_records"],
        "backlog": _backlog(log, row["offset"], tables.get(row["model"])),
    }


def _backlog(log: SQLiteLog, after: int, table: TableId | None = None) -> dict[str, Any]:
    rows, size, oldest = log.backlog(after, table)
    age = None if oldest is None else _seconds(time.time() - oldest / 1e6)
    return {"rows": rows, "bytes": size, "oldest_s": age}


def _visible(row: Mapping[str, Any]) -> dict[str, Any]:
    as_of = row["committed_at"] / 1e6
    position = format_lsn(row["commit"])
    age = _seconds(time.time() - as_of)
    return {"offset": row["offset"], "position": position, "as_of": as_of, "age_s": age}


def _slot(source: SourceConfig) -> dict[str, Any]:
    if source.upstream:
        return {"name": None, "read_by": str(source.upstream.root)}
    try:
        return {"name": source.slot, **asdict(slot_health(source.url.reveal(), source.slot))}
    except HeadraceError as error:
        return {"name": source.slot, "unreachable": str(error)}


def _seconds(age: float) -> float:
    # Clocks of two machines may differ by a little.
    return round(max(age, 0.0), 3)


# ------------------------------------------------------------------------------------ for people


def _print(report: Mapping[str, Any]) -> None:
    if report["running"]:
        print(f"running, pid {report['pid']}")
    else:
        print("not running: headrace run")
    for word in ("stopped", "waiting"):
        for name, reason in report[word].items():
            print(f"{word.upper()} {name}: {reason}")
    for name, alarms in report["alarms"].items():
        for alarm in alarms:
            print(f"ALARM {name}: {alarm}")
    for each in report["alerts"]["failing"]:
        waits = f"{each['attempts']} attempts, {age_text(each['age_s'])}"
        print(f"ALERTS are not delivered by {each['channel']} ({waits}): {each['failure']}")
    if report["destination"]["error"]:
        print(f"destination not asked: {report['destination']['error']}")
    print(f"disk: {disk_words(report['disk'], report['destination']['bytes'])}")
    if report["destination"]["published"]:
        print(f"published: {_published_words(report['destination']['published'])}")
    for source in report["sources"]:
        print()
        _print_source(source)
    if report["marts"]:
        print()
        _print_marts(report["marts"])


def _published_words(copy: Mapping[str, Any]) -> str:
    if copy["error"]:
        return str(copy["error"])
    if copy["age_s"] is None:
        return f"{copy['path']} not yet"
    places = [f"{source} through {at['position']}" for source, at in copy["sources"].items()]
    since = ", and nothing has changed since" if copy["is_current"] else ""
    return "; ".join([f"{copy['path']} {age_text(copy['age_s'])} ago{since}", *places])


def _print_marts(marts: Rows) -> None:
    print_table(
        ("mart", "state", "as of", "what is missing"),
        [
            (
                row["name"],
                row["state"],
                "now" if row["age_s"] is None else f"{age_text(row['age_s'])} ago",
                row["reason"] or row["missing"],
            )
            for row in marts
        ],
    )


def _print_source(source: Mapping[str, Any]) -> None:
    print(f"source {source['name']}")
    if source["error"]:
        print(f"  its log cannot be read: {source['error']}")
    if not source["has_run"]:
        print("  has not run yet: headrace run")
    lines = []
    if source["tables"]:
        lines.append(("tables", _stages(source["tables"])))
    if source["log"]:
        log, load = source["log"], source["load"]
        lines.append(
            (
                "log",
                f"through {source['position'] or 'nothing'}, offset {log['end']}",
            )
        )
        lines.append(("staged", f"through offset {source['staged_through']}, {_behind(load)}"))
    if source["storage"]:
        lines.append(("storage", storage_words(source["storage"])))
    if source["visible"]:
        visible = source["visible"]
        words = f"all that was committed until {age_text(visible['age_s'])} ago"
        lines.append(("visible", f"{words}; {visible['position']}, offset {visible['offset']}"))
    lines.append(("slot", _slot_words(source["slot"])))
    for name, words in lines:
        print(f"  {name:<8} {words}")
    print_unfinished(source["tables"])
    if source["models"]:
        print()
        _print_models(source["models"])
    if source["quarantine"]:
        print()
        _print_causes(source["quarantine"])


def _stages(tables: Rows) -> str:
    """Count the tables by stage, such as `3 live, 1 copying`."""
    stages = Counter(sorted(row["stage"] for row in tables))
    return ", ".join(f"{count} {stage}" for stage, count in stages.most_common())


def _print_models(models: Rows) -> None:
    print_table(
        ("model", "state", "offset", "position", "behind", "open"),
        [
            (
                row["name"],
                row["state"],
                row["offset"],
                row["position"],
                _behind(row["backlog"]),
                row["open_records"],
            )
            for row in models
        ],
    )
    for row in models:
        if row["reason"]:
            print(f"{row['name']} {row['state']}: {row['reason']}")
        if row["warned"] or row["nulled"]:
            both = f"{row['warned']:,} applied with a warning, {row['nulled']:,} with a cell nulled"
            print(f"{row['name']} checks: {both}")


def _print_causes(causes: Rows) -> None:
    columns = ("issue", "model", "records", "blocked", "age", "reason", "columns", "message")
    print("quarantine, open records by cause (headrace quarantine list)")
    print_table(
        columns, [[{**row, "age": age_text(row["age_s"])}[name] for name in columns] for row in causes]
    )


def _slot_words(slot: Mapping[str, Any]) -> str:
    if "read_by" in slot:
        return f"none: the staging of {slot['read_by']} is read"
    if "unreachable" in slot:
        return f"unreachable: {slot['unreachable']}"
    if not slot["exists"]:
        return f"{slot['name']} does not exist"
    reader = f"read by pid {slot['active_pid']}" if slot["active"] else "nobody reads it"
    parts = [f"{slot['name']}: {reader}", str(slot["wal_status"])]
    parts.append(f"confirmed {slot['confirmed_flush_lsn']}, {size_text(slot['lag_bytes'])} behind")
    age = "" if slot["restart_age_s"] is None else f" from {age_text(slot['restart_age_s'])} ago on"
    parts.append(f"the server keeps {size_text(slot['retained_bytes'])} of WAL for it{age}")
    if slot["safe_wal_size"] is not None:
        parts.append(f"{size_text(slot['safe_wal_size'])} more are safe")
    if holder := slot["holder"]:
        age = "" if holder["age_s"] is None else f", {age_text(holder['age_s'])} old"
        parts.append(f"the oldest {holder['kind']} is {holder['id']} of {holder['user']}{age}")
    return "; ".join(parts)


def _behind(backlog: Mapping[str, Any]) -> str:
    if backlog["oldest_s"] is None:
        return "nothing waits"
    return f"{backlog['rows']} rows, {size_text(backlog['bytes'])}, {age_text(backlog['oldest_s'])}"
