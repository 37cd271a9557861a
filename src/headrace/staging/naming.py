"""Names of columns in the raw tables: the source's own, but where two differ in case only.

Delta takes `v` and `V` for one column, Postgres for two. The first to come keeps its name; the other is
`V~56`: its name and, behind a tilde, its UTF-8 in hex. A source column that is called like that by itself
is written so too, which makes the way back unique.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_WRITTEN = re.compile(r"(.*)~([0-9a-f]+)", re.DOTALL)


def physical_names(known: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Return what columns are called in a raw table that has the columns `known` already."""
    found = {logical_name(name): name for name in known}
    taken = {name.casefold() for name in found.values()}
    for name in names:
        if name not in found:
            plain = name.casefold() not in taken and not _WRITTEN.fullmatch(name)
            found[name] = name if plain else f"{name}~{name.encode().hex()}"
            taken.add(found[name].casefold())
    return found


def logical_name(physical: str) -> str:
    """Return what the source calls a column of a raw table."""
    written = _WRITTEN.fullmatch(physical)
    own = written is not None and written[1].encode().hex() == written[2]
    return written[1] if written is not None and own else physical
