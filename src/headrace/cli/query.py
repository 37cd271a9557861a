"""`headrace query`: the destination asked in SQL, through the running pipeline or without one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from headrace.cli.tables import print_csv, print_json_lines, print_table
from headrace.config import load_project
from headrace.errors import UserError
from headrace.server import read_rows


def query(
    sql: str,
    *,
    project: Annotated[Path, Parameter(help="The project's folder.")] = Path(),
    json: Annotated[bool, Parameter(help="Print a JSON object per row.", negative="")] = False,
    csv: Annotated[
        bool, Parameter(help="Print CSV; NULL is empty, an empty text is quoted.", negative="")
    ] = False,
) -> None:
    """Ask the destination in SQL, beside a running pipeline or without one.

    Only queries are answered. While a pipeline runs, it answers them over a local socket.

    Parameters
    ----------
    sql
        One query, such as "SELECT count(*) FROM shop.orders".
    """
    if json and csv:
        raise UserError("--json and --csv cannot both be.", "Choose one.")
    columns, rows = read_rows(load_project(project), sql)
    write = print_json_lines if json else print_csv if csv else print_table
    write(columns, rows)
