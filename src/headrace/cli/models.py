"""`headrace models`: which models there are and how they stand, one in full, and where columns come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from headrace.authoring.catalogue import Listed, OutputColumn, Shown, columns_of, list_models, show_model
from headrace.authoring.dbt import export_dbt
from headrace.authoring.files import Found, all_models, find_model, logged_shapes
from headrace.cells import json_of
from headrace.cli.tables import print_table
from headrace.config import load_project
from headrace.errors import UserError
from headrace.transform.header import file_version
from headrace.transform.lineage import lineage as lineage_of

_Project = Annotated[Path, Parameter(help="The project's folder.")]
_Json = Annotated[bool, Parameter(help="Print JSON.", negative="")]
_SHORT = 8


def ls(*, project: _Project = Path(), json: _Json = False) -> None:
    """List the models: what each reads, how it stands, and how far it is behind the log.

    States are those of headrace.models, besides `new` (the destination does not know it yet) and `broken`
    (the file does not read). `lag` counts entries of the log. With --json one object per model: name, source,
    table, kind, materialisation, state, reason, version, applied_version, offset, lag, open_records.
    """
    models = list_models(load_project(project, secrets=False))
    if json:
        for model in models:
            print(json_of(asdict(model)))
        return
    if not models:
        print("No model in use, and nothing has run yet: every table will be mirrored.")
        return
    print_table(
        ("model", "reads", "kind", "state", "version", "lag", "open"),
        [(m.name, _reads(m), m.kind, m.state, _short(m.version), m.lag, m.open_records) for m in models],
    )
    for model in models:
        if model.reason:
            print(f"{model.name} {model.state}: {model.reason}")
        elif file_version(model.applied_version) not in ("", file_version(model.version)):
            print(f"{model.name}: its table was last moved by version {_short(model.applied_version)}")


def show(model: str, *, project: _Project = Path(), json: _Json = False) -> None:
    """Show a model: its file, columns with types, key and checks, which constraints of the source it does not
    take over, and which versions made its table.

    With --json one object: what `ls` prints of it, and file, key, where, columns (name, type, not_null,
    reads, expression), checks, left_out, unbound, versions (version, changes, after, through, since, until).

    Parameters
    ----------
    model
        Its name, or a path to a file that is not in use.
    """
    settings = load_project(project, secrets=False)
    shown = show_model(settings, find_model(settings, model))
    if json:
        raw = asdict(shown)
        print(json_of({**raw.pop("listed"), **raw}))
    else:
        _print_shown(shown)


def lineage(model: str = "", *, project: _Project = Path(), json: _Json = False) -> None:
    """Show which columns of the raw table each output column is made of, with its expression.

    Needs no database and no state, but for mirrors, which have no file. With --json one object per model:
    name, source, table, columns (name, type, not_null, reads, expression), where (null, or expression and
    reads).

    Parameters
    ----------
    model
        Only this one: its name, or a path to a file that is not in use.
    """
    settings = load_project(project, secrets=False)
    shapes = {source.name: logged_shapes(settings, source.name) for source in settings.sources}
    chosen = [find_model(settings, model)] if model else list(all_models(settings, shapes))
    for found in chosen:
        columns, _ = columns_of(settings, found, shapes.get(found.source, {}))
        if not found.text and not columns:
            raise UserError(f"There is no mirror {found.name}.", "`headrace models ls` names what there is.")
        where = _where(found)
        if json:
            head = {"name": found.name, "source": found.source, "table": found.table}
            print(json_of({**head, "columns": [asdict(column) for column in columns], "where": where}))
        else:
            _print_lineage(found, columns, where)


def export(*, project: _Project = Path()) -> None:
    """Print a sources.yml for dbt: the destination's tables with descriptions, columns, types and freshness.

    Write it into a dbt project: headrace models export-dbt > models/sources.yml. For dbt 1.10 and later.
    """
    print(export_dbt(load_project(project, secrets=False)), end="")


def _where(found: Found) -> dict[str, Any] | None:
    if found.text is None or not found.text.where:
        return None
    last = lineage_of(found.text)[-1]
    return {"expression": last.expression, "reads": last.columns}


def _reads(model: Listed) -> str:
    return f"raw.{model.source}.{model.table}" if model.table else ""


def _short(version: str) -> str:
    file, plus, constraints = version.rpartition(":")[2].partition("+")
    return f"{file[:_SHORT]}{plus}{constraints[: _SHORT // 2]}"


def _print_shown(shown: Shown) -> None:
    listed = shown.listed
    print(f"{listed.name}: {listed.state}, {listed.lag} entries behind, {listed.open_records} open records")
    if listed.reason:
        print(f"  {listed.reason}")
    facts = {
        "file": shown.file or "none: the mirror of its table",
        "version": listed.version,
        "reads": _reads(listed),
        "where": _line(shown.where),
        "key": ", ".join(shown.key),
    }
    for name, value in facts.items():
        if value:
            print(f"  {name:<8} {value}")
    if shown.unbound:
        print(f"  {shown.unbound}")
    print()
    _print_columns(shown.columns)
    if shown.checks:
        print("\nchecks")
        for check in shown.checks:
            print(f"  {check}")
    if shown.left_out:
        print("\nnot taken over from the source")
        for each in shown.left_out:
            print(f"  {each}")
    if shown.versions:
        print("\nversions that made its table")
        print_table(
            ("version", "changes", "after", "through", "since", "until"),
            [(_short(v.version), v.changes, v.after, v.through, v.since, v.until) for v in shown.versions],
        )


def _print_columns(columns: Sequence[OutputColumn]) -> None:
    print_table(
        ("column", "type", "null", "reads", "expression"),
        [
            (c.name, c.type, "no" if c.not_null else "", ", ".join(c.reads), _line(c.expression))
            for c in columns
        ],
    )


def _print_lineage(found: Found, columns: Sequence[OutputColumn], where: dict[str, Any] | None) -> None:
    print(f"{found.name} <- raw.{found.source}.{found.table}")
    rows = [(c.name, ", ".join(c.reads), _line(c.expression)) for c in columns]
    if where:
        rows.append(("WHERE", ", ".join(where["reads"]), _line(where["expression"])))
    print_table(("column", "<-", "expression"), rows)
    print()


def _line(expression: str) -> str:
    return " ".join(expression.split())
