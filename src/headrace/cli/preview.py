"""`headrace preview`: what a model would make of the staged data, before it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from headrace.authoring.differences import Difference, Rows
from headrace.authoring.files import find_model
from headrace.authoring.preview import Preview
from headrace.authoring.preview import preview as preview_model
from headrace.cells import json_of, rows_of
from headrace.cli.tables import print_table
from headrace.config import load_project
from headrace.errors import UserError


def preview(
    model: str,
    *,
    limit: int = 10,
    sample: int | None = None,
    project: Annotated[Path, Parameter(help="The project's folder.")] = Path(),
    json: Annotated[bool, Parameter(help="Print one JSON object.", negative="")] = False,
) -> None:
    """Show what a model makes of the staged data, and how that differs from what is live; changes nothing.

    Works beside a running pipeline and without one. Takes temporary space for the model's table and the live
    one, in TMPDIR. With --json: model, version, source, table, offset, position, share, changes, rows,
    filtered, records, causes (reason, columns, message, records, keys), first (an object per row),
    live_offset, live_records, difference (null, or added, removed, changed with rows and keys, cells,
    new_columns, gone_columns, retyped).

    Parameters
    ----------
    model
        Its name, or a path to a file that the pipeline has not taken up, such as models/sales.sql.off.
    limit
        How many of its rows to show.
    sample
        Look only at so many source keys that about this many of the staged changes are theirs.
    """
    settings = load_project(project, secrets=False)
    if sample is not None and sample < 1:
        raise UserError("--sample must be at least 1.", "Leave it out to look at all.")
    found = find_model(settings, model)
    result = preview_model(settings, found, limit=limit, sample=sample)
    if json:
        # Not `asdict` of the whole: the first rows are a table.
        raw = {name: getattr(result, name) for name in result.__slots__}
        raw["causes"] = [asdict(cause) for cause in result.causes]
        raw["difference"] = asdict(result.difference) if result.difference else None
        raw["first"] = [
            dict(zip(result.first.column_names, row, strict=True)) for row in rows_of(result.first)
        ]
        print(json_of(raw))
    else:
        _print(result)


def _print(result: Preview) -> None:
    print_table(result.first.column_names, rows_of(result.first))
    print()
    looked = "" if result.share == 1 else f", looking at {result.share:.2%} of the source keys"
    print(
        f"{result.model} of raw.{result.source}.{result.table} as of offset {result.offset} "
        f"({result.position}), {_counted(result.changes, 'staged change')}{looked}:"
    )
    left_out = f", {result.filtered} left out by WHERE" if result.filtered else ""
    live = (
        f" ({result.live_records} open now)" if result.live_offset is not None and result.share == 1 else ""
    )
    print(
        f"  {_counted(result.rows, 'row')}{left_out}, {_counted(result.records, 'record')} quarantined{live}"
    )
    for cause in result.causes:
        where = f" {cause.columns}" if cause.columns else ""
        print(f"    {cause.records} {cause.reason}{where}: {cause.message}")
        print(f"      keys {_keys(cause.keys, cause.records)}")
    print()
    _print_difference(result)


def _print_difference(result: Preview) -> None:
    difference = result.difference
    if difference is None:
        print(
            f"Not compared: the destination has no table {result.model} yet, or is no DuckDB file; there "
            f"`headrace rebuild {result.model} --dry-run` compares."
        )
        return
    stands = "" if result.live_offset == result.offset else f", which stands at offset {result.live_offset}"
    if difference.nothing:
        print(f"The same as the live table{stands}.")
        return
    print(f"Against the live table{stands}:")
    for name, rows in (("added", difference.added), ("removed", difference.removed)):
        if rows.rows:
            print(f"  {_counted(rows.rows, 'row')} {name}, keys {_keys(rows.keys, rows.rows)}")
    if changed := difference.changed.rows:
        print(f"  {_counted(changed, 'row')} changed, keys {_changed(difference.changed, difference.cells)}")
    for line in _columns(difference):
        print(f"  {line}")
    if difference.new_columns or difference.gone_columns or difference.retyped:
        print("  With other columns or types the table is dropped and built again, with all its rows.")


def _columns(difference: Difference) -> list[str]:
    lines = [f"new column {name} {type_}" for name, type_ in difference.new_columns]
    lines += [f"no column {name} any more" for name, _ in difference.gone_columns]
    return lines + [f"column {name} is {new}, and was {old}" for name, old, new in difference.retyped]


def _changed(rows: Rows, cells: Mapping[str, int]) -> str:
    by_column = ", ".join(f"{name} {count}" for name, count in cells.items())
    return _keys(rows.keys, rows.rows) + (f"; cells by column: {by_column}" if by_column else "")


def _keys(keys: tuple[str, ...], count: int) -> str:
    return ", ".join(keys) + (", …" if count > len(keys) else "")


def _counted(count: int, noun: str) -> str:
    return f"1 {noun}" if count == 1 else f"{count} {noun}s"
