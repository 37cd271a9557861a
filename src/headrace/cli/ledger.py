"""`headrace ledger`: whether every change that was read is accounted for."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from headrace.config import Project, load_project
from headrace.conservation import Account, accounts, queries_of
from headrace.pipeline import open_lanes
from headrace.server import read


def check(
    *,
    project: Annotated[Path, Parameter(help="The project's folder.")] = Path(),
    json: Annotated[bool, Parameter(help="Print one JSON object per model.", negative="")] = False,
) -> int:
    """Hold the ledger of every model against itself, the open records, the log and staging.

    Works beside a running pipeline and without one. Exit code 1 where one does not close. With --json:
    source, model, closes, detail, rows (of the ledger).
    """
    settings = load_project(project, secrets=False)
    total = failed = 0
    for source in settings.sources:
        for model, account in _accounts(settings, source.name):
            total += 1
            failed += not account.closes
            if json:
                print(json_text.dumps({"source": source.name, "model": model, **account._asdict()}))
            else:
                print(f"{'✔' if account.closes else '✘'} {model}: {account.detail}")
    if not json:
        print(f"{total} ledgers, {failed} do not close." if total else "No model has a ledger yet.")
    return 1 if failed else 0


def _accounts(project: Project, source: str) -> list[tuple[str, Account]]:
    results = read(project, queries_of(source))
    lane = next(lane for lane in open_lanes(project, read_only=True) if lane.config.name == source)
    try:
        return list(accounts(lane, results))
    finally:
        lane.close()
