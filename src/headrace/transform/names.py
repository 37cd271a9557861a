"""Names that models must not have, since two would fill one table of the destination."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

from headrace.mart import Mart
from headrace.transform.sql import ModelText

OWN_SCHEMAS = ("headrace", "headrace_joining", "information_schema", "pg_catalog")
"""Schemas of the destination that no source and no model may fill."""

Fold = Callable[[str], tuple[str, str]]
"""Schema and table of a model's name, the same for names that are the same to the destination."""


def name_faults(
    texts: Mapping[str, ModelText | Mart],
    sources: Collection[str],
    fold: Fold,
    known: Collection[str] = (),
) -> Iterator[tuple[str, str, str]]:
    """Yield each model that cannot have its name, with what is wrong and the remedy.

    Of two that would fill one table, the one among `known` has it, else the first.
    """
    filled: dict[tuple[str, str], str] = {}
    mirrors = {fold(f"{source}.t")[0]: source for source in sources}
    for name in sorted(texts, key=lambda name: (name not in known, name)):
        text, place = texts[name], fold(name)
        mirrored = f"{text.source}.{text.table}" if isinstance(text, ModelText) else ""
        other = filled.setdefault(place, name)
        rename = f"Rename models/{text.file if isinstance(text, ModelText) else f'{name}.sql'}."
        if other != name:
            yield name, f"models {other} and {name} would fill one table, {'.'.join(place)}", rename
        elif place[0] in OWN_SCHEMAS:
            what = f"model {name} would fill the schema {place[0]}, which has another use in the destination"
            yield name, what, rename
        elif place[0] in mirrors and name != mirrored:
            source = mirrors[place[0]]
            what = f"model {name} would be a table among the mirrors of source {source}"
            yield name, what, f"{rename} There may be one called {source}.TABLE that reads that table itself."


def source_faults(sources: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the names of sources, whose mirrors fill a schema of that name, and the
    remedy."""
    for source in sorted({*sources} & {*OWN_SCHEMAS}):
        what = f"source {source} would fill the schema {source}, which has another use in the destination"
        yield what, "Give it another name."
