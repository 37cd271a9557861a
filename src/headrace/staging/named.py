"""Raw tables by the names that people give them."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.change import TableId
from headrace.errors import UserError
from headrace.staging.delta import DeltaStaging
from headrace.staging.rows import INTERNAL


def find_tables(stagings: Mapping[str, DeltaStaging], source: str, name: str) -> list[tuple[str, TableId]]:
    """Return the raw tables of a name (`orders`, `public.orders`; '' means all) with their sources.

    `stagings` are known by their source; `source` names one of them, or is ''.

    Raises UserError if there is none.
    """
    if source and source not in stagings:
        raise UserError(f"Nothing of a source {source} is staged.", f"There are: {', '.join(stagings)}.")
    known = [
        (of, table)
        for of, staging in stagings.items()
        if source in ("", of)
        for table in sorted(staging.tables())
        if table not in INTERNAL
    ]
    found = [(of, table) for of, table in known if name in ("", str(table), table.label)]
    if not found:
        there = ", ".join(table.label for _, table in known[:20])
        raise UserError(
            f"There is no raw table {name}." if name else "Nothing is staged yet.",
            f"There are: {there}." if known else "Start the pipeline: headrace run",
        )
    return found
