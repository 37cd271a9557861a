"""What a change of a table's shape did to rows that the stream says nothing of. No I/O here."""

from __future__ import annotations

from collections.abc import Collection

from headrace.change import TableSchema
from headrace.evolution import keeps_text


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
        if not keeps_text(before[name], after[name])
    ]
    reasons += [f"column {name} was added with a value for old rows" for name in added if name in filled]
    if gone and set(added) - set(filled):
        reasons.append(f"columns {', '.join(gone)} may be called {', '.join(added)} now")
    return "; ".join(sorted(reasons)) or None
