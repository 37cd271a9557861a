"""What a change of a table's shape did to rows that the stream says nothing of. No I/O here."""

from __future__ import annotations

import re
from collections.abc import Collection

from headrace.change import TableSchema

_INTEGERS = ("smallint", "integer", "bigint", "numeric")
_SIZED = re.compile(r"(character varying|numeric|bit varying)\((\d+)(?:,(-?\d+))?\)")
_UNBOUNDED = {"character varying": ("character varying", "text"), "bit varying": ("bit varying",)}


def rewritten(known: TableSchema, shape: TableSchema, filled: Collection[str] = ()) -> str | None:
    """Return why rows of the shape `known` may hold other values under `shape`, or None if they do not.

    `filled` names columns that the catalog gives a value of their own: a default, an identity. The answer
    errs on the safe side: a default set after its column was added is taken for one that filled it, and a
    column that went while another came for a rename. A type that only became wider keeps every text, unless
    USING said otherwise, which nothing tells.
    """
    before = {column.name: column.type for column in known.columns}
    after = {column.name: column.type for column in shape.columns}
    added = [name for name in after if name not in before]
    gone = [name for name in before if name not in after]
    reasons = [
        f"column {name} changed from {before[name]} to {after[name]}"
        for name in before.keys() & after.keys()
        if not _keeps_text(before[name], after[name])
    ]
    reasons += [f"column {name} was added with a value for old rows" for name in added if name in filled]
    if gone and set(added) - set(filled):
        reasons.append(f"columns {', '.join(gone)} may be called {', '.join(added)} now")
    return "; ".join(sorted(reasons)) or None


def _keeps_text(before: str, after: str) -> bool:
    """Whether every value of one type has the same text in the other."""
    if before == after:
        return True
    if before in _INTEGERS and after in _INTEGERS:
        return _INTEGERS.index(before) < _INTEGERS.index(after)
    if before == "character varying" and after == "text":
        return True
    old, new = _SIZED.fullmatch(before), _SIZED.fullmatch(after)
    if old is None:
        return False
    if new is None:
        return after in _UNBOUNDED.get(old[1], ())
    return old[1] == new[1] and old[3] == new[3] and int(old[2]) <= int(new[2])
