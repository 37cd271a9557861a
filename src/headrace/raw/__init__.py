"""Raw tables as typed views: what a source's tables were at a place, and all of their changes.

Nothing is imported here: whether a query names a raw table at all is found out without the engine.
"""

from __future__ import annotations

import re

CATALOGS = ("raw", "raw_text", "changes", "changes_text")
"""What stands before a source and a table: `raw` for the rows as they were, `changes` for all that happened
to them; with `_text` every cell is the source's own text."""

_MAY_BE_RAW = re.compile(rf"\b(?:{'|'.join(CATALOGS)})\b[\"\s]*\.", re.IGNORECASE)


def may_read_raw(sql: str) -> bool:
    """Whether a query may name a raw table: it certainly does not where this is false."""
    return _MAY_BE_RAW.search(sql) is not None
