"""`headrace quarantine issues`: the causes of records, how they go, and which are put aside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from headrace.cli.records import actor_of, pipeline_for
from headrace.cli.tables import print_json_lines, print_table
from headrace.config import load_project
from headrace.keys import literal
from headrace.server import read_rows

State = Literal["new", "ongoing", "escalating", "regressed", "archived", "resolved", "all", "open"]
_Project = Annotated[Path, Parameter(help="The project's folder.")]

_SHOWN = (
    "issue",
    "state",
    "model",
    "reason",
    "columns",
    "open",
    "records",
    "first_seen",
    "last_seen",
    "message",
)


def issues(
    what: Literal["list"] = "list",
    /,
    *,
    state: State = "open",
    model: str | None = None,
    project: _Project = Path(),
    json: Annotated[bool, Parameter(help="Print a JSON object per issue.", negative="")] = False,
) -> None:
    """List the causes of records, the newest first; by default those with open records.

    With --json every column of headrace.issues.

    Parameters
    ----------
    state
        Only issues in this state; `open` is every one but `resolved`.
    model
        Only issues of this model.
    """
    del what
    parts = {"all": "true", "open": "state <> 'resolved'"}
    wanted = parts.get(state, f"state = {literal(state)}")
    if model is not None:
        wanted += f" AND model = {literal(model)}"
    columns = "*" if json else ", ".join(_SHOWN)
    names, rows = read_rows(
        load_project(project), f"SELECT {columns} FROM headrace.issues WHERE {wanted} ORDER BY last_seen DESC"
    )
    found = list(rows)
    if json:
        print_json_lines(names, found)
    elif found:
        print_table(names, found)
    else:
        print("No issues." if state == "all" else f"No {state} issues.")


def archive(
    issue: str,
    /,
    *,
    actor: Annotated[str | None, Parameter(help="Who decides; by default the user.")] = None,
    project: _Project = Path(),
) -> None:
    """Put an issue aside: it is archived until it escalates, or is resolved and comes again.

    Its records stay open.

    Parameters
    ----------
    issue
        The issue, as a list or an alert names it.
    """
    with pipeline_for(load_project(project)) as ask:
        ask({"op": "archive", "issue": issue, "actor": actor_of(actor)})
    print(f"Issue {issue} is archived.")
