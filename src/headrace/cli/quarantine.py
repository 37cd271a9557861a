"""`headrace quarantine`: the changes that could not be applied: listed, shown, tried again."""

from __future__ import annotations

import json as json_text
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal, NamedTuple
from uuid import UUID

from cyclopts import Parameter

from headrace.cells import json_of
from headrace.change import TableId
from headrace.cli.records import OPEN, SHOWN_KEY, Chosen, pipeline_for, refuse_unknown
from headrace.cli.tables import print_json_lines, print_table
from headrace.config import Project, load_project
from headrace.errors import HeadraceError, UserError
from headrace.keys import literal
from headrace.masking import MASK
from headrace.prepared import MESSAGE, PAYLOAD
from headrace.server import read
from headrace.sources.postgres.lsn import format_lsn

MAX_KEYS = 100_000
"""Keys in one request: with keys of usual length it stays below the server's bound for a request."""

_MAX_KEY_BYTES = 8 << 20

UNDECODABLE = (MESSAGE, PAYLOAD)
"""Reasons of records that only another copy of their table can close."""

Status = Literal["open", "quarantined", "waiting", "blocked", "resolved", "superseded", "discarded", "all"]
_Project = Annotated[Path, Parameter(help="The project's folder.")]
_Json = Annotated[bool, Parameter(help="Print JSON.", negative="")]


class Batch(NamedTuple):
    """Source keys of one model with open records."""

    source: str
    model: str
    keys: list[str]


def list_records(
    *,
    project: _Project = Path(),
    status: Status = "open",
    model: str | None = None,
    issue: str | None = None,
    limit: int = 50,
    json: _Json = False,
) -> None:
    """List records, those of one cause together, the newest first; by default the open ones.

    With --json one object per record: id, issue, source, model, status, stage, reason, columns,
    message, key, op, offset, committed_at, attempts, blocked.

    Parameters
    ----------
    status
        `open` is quarantined, waiting or blocked.
    model
        Only records of this model.
    issue
        Only records of this cause, as a list or an alert names it.
    limit
        How many records at most.
    """
    settings = load_project(project)
    wanted = Chosen(status, model, issue).condition
    records, totals = read(
        settings,
        [
            "SELECT id::VARCHAR AS id, issue, source, model, status, stage, reason, columns, message, "
            f"{SHOWN_KEY} AS key, "
            f'op, "offset", committed_at, attempts, blocked FROM headrace.quarantine WHERE {wanted} '
            'ORDER BY max("offset") OVER (PARTITION BY issue) DESC, issue, "offset" DESC, ordinal DESC '
            f"LIMIT {max(limit, 0)}",
            "SELECT issue, min(model) AS model, min(reason) AS reason, "
            "min(message) AS message, count(*) AS n "
            f"FROM headrace.quarantine WHERE {wanted} GROUP BY issue",
        ],
    )
    rows = records.to_pylist()
    if json:
        print_json_lines(records.column_names, (list(row.values()) for row in rows))
        return
    counts = {row["issue"]: row for row in totals.to_pylist()}
    for name, group in groupby(rows, key=lambda row: row["issue"]):
        cause = counts[name]
        print(f"{name}  {cause['model']}  {cause['reason']}: {cause['message']} ({cause['n']} records)")
        shown = ("id", "status", "columns", "key", "op", "offset", "committed_at", "attempts", "blocked")
        print_table(shown, [[row[column] for column in shown] for row in group])
        print()
    total = sum(cause["n"] for cause in counts.values())
    _print_end(total, len(rows), len(counts), status)


def show(
    id: str,  # noqa: A002 - what users type
    *,
    raw: Annotated[bool, Parameter(negative="")] = False,
    project: _Project = Path(),
    json: _Json = False,
) -> None:
    """Show one record: its cause, its cells as the source wrote them, its place, and what to do.

    With --json one object: every column of headrace.quarantine, and `position` and `redrive`.

    Parameters
    ----------
    id
        The record's id, or the beginning of it.
    raw
        Write nothing but the bytes of a change that does not decode, as they came, to standard output. No
        column of them is masked.
    """
    record = find_record(load_project(project), id)
    if raw:
        sys.stdout.buffer.write(_bytes_of(load_project(project), record))
        return
    record["position"] = f"{format_lsn(record['commit'])} row {record['ordinal']} epoch {record['epoch']}"
    folder = "" if project == Path() else f" --project {quote(str(project))}"
    one = f"--model {quote(record['model'])} --key={quote(record['key'] or '')}"
    if record["key_is_masked"]:
        record["waiting_on"] = record["waiting_on"] and MASK
        record["key"], one = MASK, f"--model {quote(record['model'])} --key=KEY"
    record["redrive"] = [
        f"headrace quarantine redrive {which}{folder}" for which in (f"--issue {record['issue']}", one)
    ]
    if record["reason"] in UNDECODABLE:
        record["redrive"] = [f"headrace tables resync {quote(record['table_name'])}{folder}"]
    if json:
        print(json_of(record))
        return
    width = max(map(len, record))
    for name, value in record.items():
        if name not in ("preview", "redrive") and value is not None:
            print(f"{name:<{width}}  {value}")
    print("preview")
    for name, value in _cells(record["preview"]):
        print(f"  {name} = {value}")
    if record["status"] in OPEN:
        what = "When the model or the data is mended, try again all of this cause, or this key alone:"
        print("Its table has to be copied again:" if record["reason"] in UNDECODABLE else what)
        for command in record["redrive"]:
            print(f"  {command}")


def redrive(
    *,
    project: _Project = Path(),
    issue: str | None = None,
    key: str | None = None,
    txid: int | None = None,
    where: str | None = None,
    model: str | None = None,
    all: Annotated[bool, Parameter(negative="")] = False,  # noqa: A002 - what users type
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    json: _Json = False,
) -> int:
    """Fold the keys of open records again under the models as their files are now.

    The running pipeline does it; where none runs, this process takes the state folder for as long. Of
    several options a record meets all. With --json one object: `keys`, `resolved`, `still_quarantined`
    (records), `rebuilding` (keys of models that have other columns now, and are built again with all their
    rows), `failed` (keys of batches that failed; the others are done), `dry_run`. A dry run gives one object
    per record instead: `id`, `model`, `key`, `outcome` (passes, fails, superseded, or new for a change that
    was taken before), `superseded_by`, `reason`, `columns`, `message`.

    Parameters
    ----------
    issue
        All keys with an open record of this cause.
    key
        One source key, of the model that --model names.
    txid
        All keys with an open record of this transaction of the source.
    where
        All keys with an open record that this condition over headrace.quarantine chooses.
    model
        Only keys of this model.
    all
        All keys with an open record.
    dry_run
        Change nothing, only say what would become of each record.
    """
    chosen = Chosen("open", model, issue, key, txid, where)
    chosen.refuse_unclear("redrive", everything=all)
    settings = load_project(project)
    result = {"keys": 0, "resolved": 0, "still_quarantined": 0, "rebuilding": 0, "failed": 0}
    records: list[dict[str, Any]] = []
    keyless = _keyless(settings, chosen.condition)
    for counts in _redrive(settings, chosen, dry_run=dry_run):
        records += counts.pop("records", ())
        for name, count in counts.items():
            result[name] += count
    if not result["keys"] and not keyless:
        refuse_unknown(settings, chosen)
    result["still_quarantined"] += len(keyless)
    records += keyless
    if dry_run:
        _print_outcomes(records, json=json)
    if not (dry_run and json):
        print(json_text.dumps({**result, "dry_run": dry_run}) if json else _outcome(result, dry_run=dry_run))
    if keyless and not json:
        print(f"{len(keyless)} of them do not decode: `headrace tables resync TABLE` copies the table again.")
    return 1 if result["failed"] else 0


def _redrive(project: Project, chosen: Chosen, *, dry_run: bool) -> Iterator[dict[str, Any]]:
    """Redrive the keys of the chosen records, a batch at a time; yields what became of each. A batch that
    fails leaves the others."""
    batches = _batches(project, chosen.condition)
    if not batches:
        return
    with pipeline_for(project) as ask:
        for batch in batches:
            request = {"op": "redrive", **batch._asdict(), "dry_run": dry_run, "each": dry_run}
            try:
                yield {"keys": len(batch.keys), **ask(request)}
            except HeadraceError as error:
                print(f"{len(batch.keys)} keys of {batch.model}: {error.paragraph()}", file=sys.stderr)
                yield {"keys": len(batch.keys), "failed": len(batch.keys)}


def _print_outcomes(records: Sequence[dict[str, Any]], *, json: bool) -> None:
    shown = ("id", "model", "key", "outcome", "superseded_by", "reason", "columns", "message")
    if json:
        print_json_lines(shown, ([record[name] for name in shown] for record in records))
    elif records:
        print_table(shown, [[record[name] for name in shown] for record in records])


def _batches(project: Project, wanted: str) -> list[Batch]:
    (found,) = read(
        project,
        [
            f"SELECT DISTINCT source, model, key FROM headrace.quarantine WHERE {wanted} "
            "AND key IS NOT NULL ORDER BY source, model, key"
        ],
    )
    rows = zip(*(found[name].to_pylist() for name in ("source", "model", "key")), strict=True)
    batches = []
    for (source, model), group in groupby(rows, key=lambda row: row[:2]):
        batches += [Batch(source, model, keys) for keys in _bounded([row[2] for row in group])]
    return batches


def _keyless(project: Project, wanted: str) -> list[dict[str, Any]]:
    """Return the outcomes of records without a key, which no redrive can help."""
    (found,) = read(
        project,
        [
            "SELECT id::VARCHAR AS id, model, key, 'fails' AS outcome, superseded_by, reason, columns, "
            f"message FROM headrace.quarantine WHERE {wanted} AND key IS NULL ORDER BY epoch, commit, ordinal"
        ],
    )
    outcomes: list[dict[str, Any]] = found.to_pylist()
    return outcomes


def _bytes_of(project: Project, record: dict[str, Any]) -> bytes:
    """Return the bytes of a record's change from staging, which has them for as long as there are records.
    Raises UserError for a change that was decoded."""
    from contextlib import closing

    from headrace.log.sqlite import SQLiteLog
    from headrace.staging.delta import DeltaStaging

    source, offset = record["source"], record["offset"]
    if record["reason"] in UNDECODABLE:
        with closing(SQLiteLog(project.log_path(source), read_only=True)) as log:
            staging = DeltaStaging(project.staging_path(source), source, log.id, read_only=True)
        schema, _, name = record["table_name"].partition(".")
        rows = staging.undecodable(TableId(schema, name), offset - 1, offset, whole=True)
        for row in rows.to_pylist():
            if (row["_commit"], row["_ordinal"]) == (record["commit"], record["ordinal"]):
                found: bytes = row["message"]
                return found
    raise UserError(
        f"Record {record['id']} is of a change that decodes.", f"headrace log show {offset} shows it."
    )


def _bounded(keys: Sequence[str]) -> Iterator[list[str]]:
    """Cut a list of keys where a request would have too many, or too long ones."""
    batch: list[str] = []
    size = 0
    for key in keys:
        # As JSON a character takes up to twelve bytes.
        size += len(json_text.dumps(key))
        if batch and (len(batch) == MAX_KEYS or size > _MAX_KEY_BYTES):
            yield batch
            batch, size = [], len(json_text.dumps(key))
        batch.append(key)
    yield batch


def find_record(project: Project, id_: str) -> dict[str, Any]:
    """Return the one record whose id begins so, with all columns. Raises UserError if there is not one."""
    if not re.fullmatch("[0-9a-fA-F-]{4,36}", id_):
        raise UserError("This is no record's id.", "`headrace quarantine list` shows them.")
    (found,) = read(
        project,
        [
            "SELECT * FROM headrace.quarantine "
            f"WHERE starts_with(id::VARCHAR, {literal(id_.lower())}) ORDER BY id LIMIT 2"
        ],
    )
    if found.num_rows == 1:
        record: dict[str, Any] = found.to_pylist()[0]
        return {name: str(value) if isinstance(value, UUID) else value for name, value in record.items()}
    what = "no record" if not found.num_rows else "more than one record"
    raise UserError(f"There is {what} whose id begins with {id_}.", "`headrace quarantine list` shows them.")


def _cells(preview: str | None) -> list[tuple[str, str]]:
    """Take a preview apart; one that was cut off is shown as it is."""
    try:
        cells = json_text.loads(preview or "{}")
    except ValueError:
        return [("…", preview or "")]
    return [(name, json_of(value)) for name, value in cells.items()]


def _outcome(result: dict[str, int], *, dry_run: bool) -> str:
    if not result["keys"] and not result["still_quarantined"]:
        return "No open record: nothing to redrive."
    if dry_run:
        return (
            f"{result['keys']} keys tried, nothing changed: {result['resolved']} would pass, "
            f"{result['still_quarantined']} would stay quarantined."
        )
    text = (
        f"{result['keys']} keys redriven: {result['resolved']} records resolved, "
        f"{result['still_quarantined']} still quarantined."
    )
    if result["rebuilding"]:
        text += (
            f" {result['rebuilding']} keys belong to models that have other columns now: the pipeline builds "
            "these again with all their rows."
        )
    if result["failed"]:
        text += f" {result['failed']} keys were not tried, see above: their records are as they were."
    return text


def _print_end(total: int, shown: int, causes: int, status: str) -> None:
    word = "records" if status == "all" else f"{status} records"
    if not total:
        print(f"No {word}.")
        return
    more = f", {shown} shown (--limit)" if shown < total else ""
    of = f"{causes} cause{'s' * (causes != 1)}"
    print(f"{total} {word} of {of}{more}. One of them: headrace quarantine show ID")
