"""`headrace quarantine patch`, `discard` and `undo`: what people decide about single changes.

A decision is an entry of the source's log, and holds for whatever is prepared from then on; the change itself
stays as the source wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from headrace.cells import json_of
from headrace.cli.quarantine import find_record
from headrace.cli.records import OPEN, Chosen, actor_of, pipeline_for, refuse_unknown
from headrace.cli.tables import print_table
from headrace.config import Project, load_project
from headrace.errors import UserError
from headrace.keys import literal
from headrace.prepared import MESSAGE, PAYLOAD
from headrace.server import read

if TYPE_CHECKING:
    from headrace.decisions import Decision

_MAX_CHANGES = 10_000
"""Changes in one decision, one entry of the log and one request."""

_MAX_KEY_CHARACTERS = 500_000

MAX_CELL_BYTES = 1 << 20
"""How large a cell of a patch may be."""

_Project = Annotated[Path, Parameter(help="The project's folder.")]
_Json = Annotated[bool, Parameter(help="Print JSON.", negative="")]
_DryRun = Annotated[bool, Parameter(negative="", help="Change nothing, only say what would become of it.")]
_Actor = Annotated[str | None, Parameter(help="Who decides; by default the user of this process.")]


def patch(
    id: str,  # noqa: A002 - what users type
    /,
    *cells: str,
    null: list[str] | None = None,
    reason: str = "",
    actor: _Actor = None,
    project: _Project = Path(),
    dry_run: _DryRun = False,
    json: _Json = False,
) -> None:
    """Have the model of a record read other cells of its change: patch ID column=value ...

    Columns and values are the source's: text as the source writes it. The latest patch of a change is the
    whole of it. The change stays as it is, in log and staging: what is prepared for this model from now on,
    be it a rebuild of everything, reads the patch in its place. With --json one object: `id`, `status`,
    `reason`, `message`.

    Parameters
    ----------
    id
        The record's id, or the beginning of it.
    cells
        column=value for each cell.
    null
        A column that is to be NULL.
    reason
        Why, for those who come later.
    """
    settings = load_project(project)
    record = find_record(settings, id)
    _refuse_closed(record, (*OPEN, "resolved"))
    _refuse_undecodable(record)
    made = _cells(cells) | dict.fromkeys(null or ())
    if not made:
        raise UserError("A patch needs a cell.", "Write column=value, or --null column.")
    _decide_one(settings, record, "patch", reason, actor, cells=made, dry_run=dry_run, json=json)


def undo(
    id: str,  # noqa: A002 - what users type
    /,
    *,
    reason: str = "",
    actor: _Actor = None,
    project: _Project = Path(),
    dry_run: _DryRun = False,
    json: _Json = False,
) -> None:
    """Take back what was decided about the change of a record: its model reads it as the source wrote it.

    Parameters
    ----------
    id
        The record's id, or the beginning of it.
    reason
        Why, for those who come later.
    """
    settings = load_project(project)
    record = find_record(settings, id)
    _refuse_undecodable(record)
    _decide_one(settings, record, "undo", reason, actor, dry_run=dry_run, json=json)


def discard(
    id: str | None = None,  # noqa: A002 - what users type
    /,
    *,
    reason: str,
    issue: str | None = None,
    where: str | None = None,
    model: str | None = None,
    actor: _Actor = None,
    project: _Project = Path(),
    json: _Json = False,
) -> None:
    """Leave the changes of open records out for good: their keys stand at what they were.

    Nothing is deleted: a discarded record keeps its reason and who decided, and `undo` takes it back. With
    --json one object: `discarded`, how many records.

    Parameters
    ----------
    id
        The record's id, or the beginning of it.
    reason
        Why, for those who come later.
    issue
        All open records of this cause.
    where
        All open records that this condition over headrace.quarantine chooses.
    model
        Only records of this model.
    """
    settings = load_project(project)
    if id is not None:
        if issue or where or model:
            raise UserError("What to discard is not clear.", "Give an id, or --issue or --where.")
        record = find_record(settings, id)
        _refuse_closed(record, OPEN)
        chosen = Chosen(where=f"id = {literal(record['id'])}")
    else:
        chosen = Chosen("open", model, issue, where=where)
        chosen.refuse_unclear("discard", everything=False)
    count = 0
    with pipeline_for(settings) as ask:
        for source, decision in _decisions(settings, chosen, actor_of(actor), reason):
            ask({"op": "decide", "source": source, "decision": decision.to_json(), "dry_run": False})
            count += len(decision.changes)
    if not count:
        refuse_unknown(settings, chosen)
    print(json_of({"discarded": count}) if json else f"{count} record{'s' * (count != 1)} discarded.")


def _decisions(project: Project, chosen: Chosen, actor: str, reason: str) -> Iterator[tuple[str, Decision]]:
    """Yield the source and the decision of each batch of records."""
    from headrace.decisions import Decided, Decision

    (found,) = read(
        project,
        [
            'SELECT source, model, epoch, commit, ordinal, "offset", key FROM headrace.quarantine '
            f"WHERE {chosen.condition} ORDER BY source, model"
        ],
    )
    rows = zip(*(found[name].to_pylist() for name in found.column_names), strict=True)
    for (source, model), group in groupby(rows, key=lambda row: row[:2]):
        changes = [Decided(*row[2:]) for row in group]
        # Of long keys fewer: a request is bounded, and a character may take two dozen bytes in it.
        longest = max(len(change.key or "") for change in changes)
        size = max(1, min(_MAX_CHANGES, _MAX_KEY_CHARACTERS // (longest + 1)))
        for begin in range(0, len(changes), size):
            some = tuple(changes[begin : begin + size])
            yield source, Decision("discard", model, some, actor, reason)


def _decide_one(
    project: Project,
    record: dict[str, Any],
    verb: Any,
    reason: str,
    actor: str | None,
    *,
    cells: dict[str, str | None] | None = None,
    dry_run: bool,
    json: bool,
) -> None:
    from headrace.decisions import Decided, Decision

    change = Decided(*(record[name] for name in ("epoch", "commit", "ordinal", "offset", "key")))
    decision = Decision(verb, record["model"], (change,), actor_of(actor), reason, cells)
    request = {
        "op": "decide", "source": record["source"], "decision": decision.to_json(), "dry_run": dry_run,
    }  # fmt: skip
    with pipeline_for(project) as ask:
        answer = ask(request)
    if dry_run:
        _print_outcomes(answer["records"], json=json)
        return
    now = find_record(project, record["id"])
    told = {name: now[name] for name in ("id", "status", "reason", "message")}
    if json:
        print(json_of(told))
    elif now["status"] in OPEN:
        print(f"Record {now['id']} is {now['status']}: {now['reason']}: {now['message']}")
    else:
        print(f"Record {now['id']} is {now['status']}.")


def _print_outcomes(records: Sequence[dict[str, Any]], *, json: bool) -> None:
    for record in records if json else ():
        print(json_of(record))
    if not json and records:
        print_table(list(records[0]), [list(record.values()) for record in records])


def _cells(given: Sequence[str]) -> dict[str, str | None]:
    """Take `column=value` apart. What is wrong is not quoted: it may be a value."""
    cells: dict[str, str | None] = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals or not name:
            raise UserError("A cell of the patch is not column=value.", "Quote what has spaces in it.")
        if len(value.encode()) > MAX_CELL_BYTES:
            raise UserError(
                f"The value of {name} has more than {MAX_CELL_BYTES} bytes.", "Mend it at the source."
            )
        cells[name] = value
    return cells


def _refuse_undecodable(record: dict[str, Any]) -> None:
    if record["reason"] in (MESSAGE, PAYLOAD):
        raise UserError(
            f"Record {record['id']} is of a change that does not decode: nobody knows its cells.",
            "Copy its table again: headrace tables resync TABLE",
        )


def _refuse_closed(record: dict[str, Any], states: Sequence[str]) -> None:
    if record["status"] not in states:
        raise UserError(
            f"Record {record['id']} is {record['status']}: there is nothing to decide.",
            "`headrace quarantine list` shows the open ones; `undo` takes a decision back.",
        )
