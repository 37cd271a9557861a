"""`headrace query`: the destination asked in SQL, through the running pipeline or without one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from headrace.cli.tables import print_csv, print_json_lines, print_table
from headrace.config import load_project
from headrace.errors import UserError
from headrace.raw import may_read_raw
from headrace.server import read_rows


def query(
    sql: str,
    *,
    project: Annotated[Path, Parameter(help="The project's folder.")] = Path(),
    json: Annotated[bool, Parameter(help="Print a JSON object per row.", negative="")] = False,
    csv: Annotated[
        bool, Parameter(help="Print CSV; NULL is empty, an empty text is quoted.", negative="")
    ] = False,
    as_of: Annotated[
        str | None,
        Parameter(help="Raw tables as of an offset, an LSN (0/16B3748) or a time of commit (ISO)."),
    ] = None,
) -> None:
    """Ask the destination in SQL, and raw tables, beside a running pipeline or without one.

    Only queries are answered. While a pipeline runs, it answers them over a local socket. Raw tables are
    read from staging: raw.SOURCE.TABLE is a source's table as it is, or was --as-of a place, changes.… all
    that happened to it; raw_text.… and changes_text.… have the source's own texts. A query may name tables
    of the destination beside them: raw then counts up to where the destination stands.

    Parameters
    ----------
    sql
        One query, such as "SELECT count(*) FROM shop.orders".
    """
    if json and csv:
        raise UserError("--json and --csv cannot both be.", "Choose one.")
    if as_of is None and not may_read_raw(sql):
        columns, rows = read_rows(load_project(project), sql)
    else:
        # Not above: a question to the running pipeline needs no engine here.
        import pyarrow as pa

        from headrace.cells import rows_of
        from headrace.raw.project import OpenProject

        reader = OpenProject(load_project(project, secrets=False)).query(sql, as_of=as_of)
        columns, rows = (
            reader.schema.names,
            (row for batch in reader for row in rows_of(pa.Table.from_batches([batch]))),
        )
    write = print_json_lines if json else print_csv if csv else print_table
    write(columns, rows)
