"""What an alert says beside its line: figures, samples, what has changed, and what to type."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.alerts.message import time_text
from headrace.alerts.store import Alert
from headrace.change import TableId
from headrace.config import Project
from headrace.keys import literal
from headrace.lane import Lane
from headrace.masking import MASK
from headrace.prepared import MESSAGE, PAYLOAD
from headrace.sources.postgres.lsn import format_lsn
from headrace.staging.timeline import timeline
from headrace.transform.sql import ModelText

SAMPLES = 3
_RECENT_MINUTES = 5
_NOT_DDL = ("shape", "copy", "copied", "reordered")


_FIGURES = f"""SELECT i.issue, i.source, i.model, i.state, i.stage, i.reason, i.columns, i.message,
i.records, q.*
FROM headrace.issues i JOIN (SELECT issue AS of_issue,
  count(*) FILTER (WHERE status = 'quarantined') AS quarantined,
  count(*) FILTER (WHERE status = 'waiting') AS waiting,
  sum(CASE WHEN status IN ('quarantined', 'waiting') THEN blocked ELSE 0 END)::BIGINT AS blocked,
  count(*) FILTER (WHERE first_seen > now() - INTERVAL '{_RECENT_MINUTES} minutes') AS recent,
  extract(epoch FROM min(first_seen))::DOUBLE PRECISION AS first_seen,
  extract(epoch FROM max(last_attempt))::DOUBLE PRECISION AS last_seen,
  extract(epoch FROM min(committed_at))::DOUBLE PRECISION AS first_commit,
  extract(epoch FROM max(committed_at))::DOUBLE PRECISION AS last_commit,
  min(commit) AS first_position, max(commit) AS last_position,
  min(txid) AS first_txid, max(txid) AS last_txid,
  min("offset") AS first_offset, max("offset") AS last_offset
  FROM headrace.quarantine WHERE issue IN (ISSUES) GROUP BY issue
) q ON q.of_issue = i.issue"""

Details = dict[str, Any]


def issue_details(
    issues: Sequence[str], lanes: Mapping[str, Lane], texts: Mapping[str, ModelText], project: Project
) -> dict[str, Details]:
    """Return the details of issues by id, as far as the destination knows them.

    Raises what the destination raises.
    """
    lane = next(iter(lanes.values()))
    listed = ", ".join(map(literal, issues))
    samples = (
        f"SELECT CASE WHEN key_is_masked THEN '{MASK}' ELSE key END AS key, \"offset\", preview "
        "FROM headrace.quarantine "
        f"WHERE issue = {literal(issue)} AND status IN ('quarantined', 'waiting', 'blocked') "
        f'ORDER BY "offset" DESC, ordinal DESC LIMIT {SAMPLES}'
        for issue in issues
    )
    figures, *found = lane.destination.read([_FIGURES.replace("ISSUES", listed), *samples])
    sampled = dict(zip(issues, (table.to_pylist() for table in found), strict=True))
    details = {}
    for row in figures.to_pylist():
        of = sampled[row["issue"]]
        text = texts.get(row["model"])
        details[row["issue"]] = {
            **_figures(row),
            **_what_changed(row, lanes.get(row["source"]), text, project.versions),
            "samples": [
                {"key": each["key"], "offset": each["offset"], "cells": _cells(each["preview"])}
                for each in of
            ],
        }
    return details


def commands(alert: Alert, text: ModelText | None, reason: str = "") -> dict[str, str]:
    """Return what to type, or to edit: to see, to mend, to have it tried again; `reason` is an issue's."""
    mend = (
        f"edit models/{text.file}, or mend the data at the source" if text else "mend the data at the source"
    )
    if alert.kind == "issue" and reason in (MESSAGE, PAYLOAD):
        return {
            "show": f"headrace quarantine list --issue {alert.subject}",
            "fix": f"headrace tables resync {text.table if text else 'TABLE'}",
            "silence": f"headrace alerts silence {alert.subject} --for 4h --reason TEXT",
        }
    if alert.kind == "issue":
        return {
            "show": f"headrace quarantine list --issue {alert.subject}",
            "fix": mend,
            "redrive": f"headrace quarantine redrive --issue {alert.subject}",
            "silence": f"headrace alerts silence {alert.subject} --for 4h --reason TEXT",
        }
    if alert.kind == "suspended":
        return {"show": "headrace status", "fix": mend, "redrive": f"headrace resume {alert.subject}"}
    return {"show": "headrace status"}


def _figures(row: Mapping[str, Any]) -> Details:
    return {
        **{name: row[name] for name in ("state", "stage", "reason", "columns", "message")},
        **{name: row[name] for name in ("records", "quarantined", "waiting", "blocked")},
        "per_minute": round(row["recent"] / _RECENT_MINUTES, 1),
        "first_seen": time_text(row["first_seen"]),
        "last_seen": time_text(row["last_seen"]),
        "committed": [time_text(row["first_commit"]), time_text(row["last_commit"])],
        "positions": [format_lsn(row["first_position"]), format_lsn(row["last_position"])],
        "txids": [row["first_txid"], row["last_txid"]],
        "offsets": [row["first_offset"], row["last_offset"]],
    }


def _what_changed(
    row: Mapping[str, Any], lane: Lane | None, text: ModelText | None, versions: Path
) -> Details:
    """Return what the model's version and the table's newest DDL are, and since when."""
    changed: Details = {"model_version": None, "model_changed_at": None, "last_ddl": None}
    if text is not None:
        changed["model_version"] = text.version
        kept = versions / text.name / f"{text.version}{Path(text.file).suffix}"
        if kept.exists():
            changed["model_changed_at"] = time_text(kept.stat().st_mtime)
    name = text.table if text else row["model"].removeprefix(f"{row['source']}.")
    table = table_of(lane, name) if lane else None
    if lane is None or table is None:
        return changed
    events = timeline(lane.staging, table, lane.staging.through())
    ddl = [event for event in events if event.kind not in _NOT_DDL]
    if ddl:
        last = ddl[-1]
        at = time_text(last.committed_at / 1e6)
        changed["last_ddl"] = {"what": last.what, "kind": last.kind, "at": at}
    return changed


def table_of(lane: Lane, name: str) -> TableId | None:
    """Return the raw table of a lane by its name, with or without its schema."""
    return next((table for table in lane.log.schemas() if name in (str(table), table.label)), None)


def _cells(preview: str | None) -> dict[str, Any]:
    """Take a record's preview apart, whose cells are masked where they are to be; one that was cut off is
    shown as it is."""
    try:
        cells = json.loads(preview or "{}")
    except ValueError:
        return {"…": preview}
    return cells if isinstance(cells, dict) else {"…": preview}
