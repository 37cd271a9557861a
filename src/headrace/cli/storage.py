"""How many bytes each layer takes, and how long the disk lasts."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping
from typing import Any

from headrace.change import Offset
from headrace.config import Project
from headrace.log.sqlite import SQLiteLog
from headrace.sources.postgres.health import size_text
from headrace.staging.delta import DeltaStaging
from headrace.staging.rows import INTERNAL
from headrace.staging.table import RawTable

_DAY = 86_400.0
_LEAST = 600.0  # seconds of history that a forecast needs


def storage(log: SQLiteLog, staging: DeltaStaging) -> dict[str, Any]:
    """Return what log and raw tables of a source take, in bytes, and how much a day adds.

    `log`, `raw`: bytes now; `tables`: bytes by table; `log_per_day`, `raw_per_day`: from what the last
    day, or as much of it as there is, has appended; None before there are ten minutes. A log that
    retention trims grows no more.
    """
    now, end = time.time(), log.end().offset
    after = log.appended_before(int((now - _DAY) * 1e6))
    first = log.entry(after + 1)
    span = max(now - first.appended_at / 1e6, 0.0) if first else 0.0
    tables = {str(table): raw for table, raw in staging.tables().items() if table not in INTERNAL}
    sizes = {name: sum(file.bytes for file in raw.files) for name, raw in sorted(tables.items())}
    report: dict[str, Any] = {"log": log.size(), "raw": sum(sizes.values()), "tables": sizes}
    report |= {"log_per_day": None, "raw_per_day": None}
    if span >= _LEAST:
        days = span / _DAY
        trimmed = log.begin().offset > 0
        report["log_per_day"] = 0 if trimmed else round(log.bytes_between(after, end) / days)
        report["raw_per_day"] = round(sum(_since(raw, after) for raw in tables.values()) / days)
    return report


def forecast(project: Project, sources: Iterable[Mapping[str, Any] | None]) -> dict[str, Any]:
    """Return `free`, the bytes that staging's disk has left, `per_day`, what log and raw tables of all
    sources add, and `days`, how long that lasts; None where nothing tells."""
    folder = project.staging.path if project.staging.path.exists() else project.root
    free = shutil.disk_usage(folder).free
    known = [source for source in sources if source and source["raw_per_day"] is not None]
    per_day = sum(source["log_per_day"] + source["raw_per_day"] for source in known) if known else None
    return {"free": free, "per_day": per_day, "days": round(free / per_day, 1) if per_day else None}


def storage_words(source: Mapping[str, Any]) -> str:
    """Say in a few words what a source takes."""
    words = f"log {size_text(source['log'])}, raw {size_text(source['raw'])}"
    if source["raw_per_day"] is None:
        return words
    more = source["log_per_day"] + source["raw_per_day"]
    return f"{words}; {size_text(more)} more a day"


def disk_words(disk: Mapping[str, Any], destination: int | None) -> str:
    """Say in a few words how long the disk lasts."""
    words = f"destination {size_text(destination)}; " if destination is not None else ""
    words += f"{size_text(disk['free'])} free"
    return words if disk["days"] is None else f"{words}, enough for {disk['days']:.0f} days"


def _since(raw: RawTable, after: Offset) -> float:
    """Estimate the bytes of a table that stand behind an offset."""
    grown = 0.0
    for file in raw.overlapping(after, raw.version):
        part = 1.0 if file.first > after else (file.last - after) / (file.last - file.first + 1)
        grown += file.bytes * part
    return grown
