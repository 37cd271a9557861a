"""`headrace rebuild`: a model's table made once more from staging, in the running pipeline or without one."""

from __future__ import annotations

import json as json_text
import sys
import time
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from headrace.authoring.files import model_file
from headrace.cells import json_of
from headrace.cli.tables import text_of
from headrace.config import Project, load_project
from headrace.errors import UserError
from headrace.keys import literal
from headrace.server import ask, is_running, read_rows
from headrace.transform.header import file_version
from headrace.transform.mart import version_in

_POLL = 0.3
_TELL_EVERY = 5.0


def rebuild(
    model: str,
    *,
    dry_run: Annotated[bool, Parameter(help="Only show the difference.", negative="")] = False,
    as_of: Annotated[
        str | None,
        Parameter(
            help="Not as it is now: as it stood at an offset (123), an LSN (0/16B3748) or a time (UTC)."
        ),
    ] = None,
    into: Annotated[
        str | None, Parameter(help="With --as-of: the table to make of it, which then stays as it is.")
    ] = None,
    project: Annotated[Path, Parameter(help="The project's folder.")] = Path(),
    json: Annotated[bool, Parameter(help="Print the outcome as JSON.", negative="")] = False,
) -> None:
    """Make a model's table once more, of all of its history and under the model as it is now.

    The new table grows beside the live one, which goes on meanwhile. When it has come to where the live
    one stands, one transaction writes what differs, with quarantine and progress. The source is not
    asked. Interrupted, it goes on with the same command, or with the pipeline's next start. A table that
    others have altered or dropped is dropped instead, and built anew in its place by the pipeline.

    With --as-of nothing live changes: the past is shown, or put into a table of its own.

    Parameters
    ----------
    model
        The model's name, or that of a mirrored table: shop.orders.
    """
    settings = load_project(project)
    if into is not None and as_of is None:
        raise UserError("--into is for a table of the past.", "Say which: --as-of PLACE.")
    source = _source_of(settings, model)
    if as_of is not None:
        _show_past(settings, {"source": source, "model": model, "place": as_of}, into, dry_run, json)
        return
    begun = time.monotonic()
    before = _rebuilds(settings, model)
    if is_running(settings):
        request = {"op": "rebuild", "source": source, "model": model, "dry_run": dry_run}
        is_beside = ask(settings, request)["beside"]
        if is_beside:
            _wait(settings, model, before)
    else:
        is_beside = _run(settings, source, model, dry_run=dry_run)
    if not is_beside:
        words = f"{model}: its table was changed by others, and is dropped. The pipeline builds it anew"
        print(f"{words}; `headrace status` tells how far it is.", file=sys.stderr)
        return
    outcome = _outcome(settings, model)
    outcome["seconds"] = round(time.monotonic() - begun, 1)
    if json:
        print(json_of(outcome))
    else:
        _print(outcome)


def _show_past(
    settings: Project, request: dict[str, Any], into: str | None, dry_run: bool, json: bool
) -> None:
    if (into is None) is not dry_run:
        raise UserError(
            "The live table does not go back to what it was.",
            "Give --into TABLE, which then holds what it was, or --dry-run to see the difference.",
        )
    begun = time.monotonic()
    request["into"] = into
    if is_running(settings):
        outcome = ask(settings, {"op": "snapshot", **request})
        del outcome["ok"]
    else:
        from headrace.pipeline import Pipeline

        pipeline = Pipeline(settings)
        try:
            outcome = pipeline.snapshot(**request)
        finally:
            pipeline.close()
    outcome["seconds"] = round(time.monotonic() - begun, 1)
    if json:
        print(json_of(outcome))
        return
    print(
        f"{outcome['model']} had {outcome['rows']:,} rows and {outcome['open_records']:,} open records in "
        f"quarantine, as of {outcome['as_of']} ({outcome['seconds']} s)"
    )
    if into is not None:
        print(f"{into} holds them")
    if outcome["added"] is None:
        print("The live table has other columns: no difference is shown.")
        return
    print("Since then, in the live table:")
    _print_difference(outcome)


def rollback(
    model: str,
    *,
    to: Annotated[
        str | None, Parameter(help="The version to go back to, see `headrace models show`.")
    ] = None,
    project: Annotated[Path, Parameter(help="The project's folder.")] = Path(),
    json: Annotated[bool, Parameter(help="Print the outcome as JSON.", negative="")] = False,
) -> None:
    """Put back a model's file as it was before, and rebuild its table with it.

    By default the version goes back that made the table before the file's present one. What the file is
    now is kept as a version, too, if a pipeline has ever run with it.

    Parameters
    ----------
    model
        The name of a model that has a file.
    """
    settings = load_project(project)
    path = model_file(settings, model)
    version = to or _former(settings, model, path)
    kept = settings.versions / model / f"{version}{path.suffix}"
    if not kept.is_file():
        known = sorted(file.stem for file in kept.parent.glob(f"*{path.suffix}"))
        raise UserError(
            f"There is no version {version} of {model}.", f"Kept are: {', '.join(known) or 'none'}."
        )
    if version_in(path, kept.read_text(encoding="utf-8")) != version:
        words = f"Version {version} of {model} had other helper modules than stand in models/ now."
        raise UserError(
            words, "Put those back too, from where you keep them: `_*.py` is not kept by version."
        )
    making = path.with_name(f"{path.name}.new")
    making.write_bytes(kept.read_bytes())
    making.rename(path)
    print(f"models/{path.name} is version {version} again", file=sys.stderr)
    rebuild(model, project=project, json=json)


def _former(settings: Project, model: str, path: Path) -> str:
    """Return the version that made a table before the one that its file has now."""
    now = version_in(path, path.read_text(encoding="utf-8")) if path.is_file() else ""
    _, rows = read_rows(
        settings,
        f"SELECT model_version FROM headrace.ledger WHERE model = {literal(model)} "
        "GROUP BY model_version ORDER BY max(recorded_at) DESC",
    )
    made = list(dict.fromkeys(file_version(str(version)) for (version,) in rows))
    made = made[made.index(now) + 1 :] if now in made else made
    former = next(
        (v for v in made if v != now and (settings.versions / model / f"{v}{path.suffix}").is_file()), None
    )
    if former is None:
        raise UserError(
            f"No earlier version of {model} is known.",
            "`headrace models show` names those that made its table.",
        )
    return former


def _source_of(settings: Project, model: str) -> str:
    _, rows = read_rows(settings, "SELECT model, source, state FROM headrace.models ORDER BY model")
    known = {str(name): (str(source), str(state)) for name, source, state in rows}
    if model not in known:
        words = f"The destination has no table of a model {model}."
        raise UserError(words, f"Models: {', '.join(known) or 'none yet'}.")
    return known[model][0]


def _rebuilds(settings: Project, model: str) -> int:
    query = f"SELECT count(*) FROM headrace.rebuilds WHERE model = {literal(model)}"
    _, rows = read_rows(settings, query)
    return int(next(iter(rows))[0])


def _wait(settings: Project, model: str, before: int) -> None:
    """Wait for the running pipeline, telling how far it is. Raises UserError where it comes to no end."""
    name, told = literal(model), time.monotonic()
    query = (
        f"SELECT (SELECT count(*) FROM headrace.rebuilds WHERE model = {name}), m.state, m.version, "
        'm.reason, j.phase, j.why, j."offset", j.target FROM headrace.models m '
        f"JOIN headrace.joins j USING (model) WHERE model = {name}"
    )
    first: tuple[Any, ...] | None = None
    while True:
        if not is_running(settings):
            raise UserError("The pipeline has ended.", "The rebuild goes on with its next start.")
        row = next(iter(read_rows(settings, query)[1]), None)
        if row is not None and row[0] > before:
            return
        if row is None or row[4] == "done" or row[5] == "copy":
            words = f"The rebuild of {model} was given up: its table or its columns are others now."
            raise UserError(words, "`headrace status` says how it stands.")
        _, state, version, reason, phase, _, offset, target = row
        first = first or (state, version, reason)
        if state == "suspended" and (state, version, reason) != first:
            raise UserError(f"Model {model} is suspended: {reason}", "Mend it: the rebuild then goes on.")
        if time.monotonic() - told > _TELL_EVERY:
            told = time.monotonic()
            print(f"{phase}: at offset {offset} of {target}", file=sys.stderr)
        time.sleep(_POLL)


def _run(settings: Project, source: str, model: str, *, dry_run: bool) -> bool:
    from headrace.pipeline import Pipeline

    pipeline = Pipeline(settings)
    try:
        lane = next((lane for lane in pipeline.lanes if lane.config.name == source), None)
        if lane is None:
            raise UserError(f"There is no [source.{source}] any more.", "Its models cannot be rebuilt.")
        is_beside = lane.rebuild(model, dry_run=dry_run)
        while is_beside and lane.take_rebuild_further(model):
            pass
        return is_beside
    finally:
        pipeline.close()


def _outcome(settings: Project, model: str) -> dict[str, Any]:
    names, rows = read_rows(
        settings,
        'SELECT model, version, dry_run, "offset", rows, open_records, added, removed, changed, '
        f"examples FROM headrace.rebuilds WHERE model = {literal(model)} "
        "ORDER BY rebuilt_at DESC LIMIT 1",
    )
    outcome = dict(zip(names, next(iter(rows)), strict=True))
    outcome["examples"] = json_text.loads(outcome["examples"])
    return outcome


def _print(outcome: dict[str, Any]) -> None:
    what = "would have" if outcome["dry_run"] else "has"
    print(
        f"{outcome['model']} {what} {outcome['rows']:,} rows and {outcome['open_records']:,} open records in "
        f"quarantine, as of offset {outcome['offset']} ({outcome['seconds']} s)"
    )
    _print_difference(outcome)


def _print_difference(outcome: dict[str, Any]) -> None:
    for how in ("added", "removed", "changed"):
        print(f"{how:>9}  {outcome[how]:,}")
        for example in outcome["examples"]:
            if example["how"] == how:
                print(f"           {_visible(example['key'])}: {_told(example)}")


def _told(example: dict[str, Any]) -> str:
    """Say what is different: of a single row in its place the cells, else the rows."""
    before, after = example["before"] or [], example["after"] or []
    if len(before) == len(after) == 1:
        cells = [
            f"{name} {_visible(value)} → {_visible(after[0][name])}"
            for name, value in before[0].items()
            if value != after[0][name]
        ]
        return ", ".join(cells)
    return "; ".join(
        ", ".join(f"{name} {_visible(value)}" for name, value in row.items()) for row in after or before
    )


def _visible(value: object) -> str:
    text = text_of(value)
    return text if text.isprintable() else text.encode("unicode_escape").decode()
