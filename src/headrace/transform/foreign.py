"""Foreign keys of models, as their headers have them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from headrace.document import Invalid
from headrace.errors import ModelError
from headrace.values import duration

ORPHAN_AFTER = 900.0
"""Seconds for which a row waits for what it refers to, unless its model says otherwise."""

_EXAMPLE = '[[foreign_key]], then columns = ["customer_id"] and references = "customers"'


@dataclass(frozen=True, slots=True)
class ForeignKey:
    """Output columns whose values, unless one is null, a row of the model `references` has in its columns
    `to`; in those of its key where that is empty."""

    name: str
    columns: tuple[str, ...]
    references: str
    to: tuple[str, ...] = ()


def foreign_keys_of(
    file: str, settings: Mapping[str, Any], outputs: Collection[str]
) -> tuple[ForeignKey, ...]:
    """Return what a header's `[[foreign_key]]` tables say.

    Raises ModelError, naming the file, for one that is not whole, or names no output.
    """
    found: dict[str, ForeignKey] = {}
    given = settings.get("foreign_key", [])
    if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
        raise ModelError(f"{file}: foreign_key must be a list of tables: {_EXAMPLE}.")
    for each in given:
        columns, to = (_names(file, each, name) for name in ("columns", "to"))
        references, name = each.get("references"), each.get("name", "_".join(columns) + "_fkey")
        if unknown := sorted(each.keys() - {"columns", "references", "to", "name"}):
            raise ModelError(
                f"{file}: a foreign_key has an unknown key {unknown[0]!r}.",
                "Known are columns, references, to and name.",
            )
        if not columns or not isinstance(references, str) or not references or not isinstance(name, str):
            raise ModelError(f"{file}: a foreign_key needs columns and the model they refer to: {_EXAMPLE}.")
        for column in columns:
            if column not in outputs:
                raise ModelError(
                    f"{file}: foreign_key {name} names {column!r}, which the SELECT does not put out."
                )
        if name in found:
            raise ModelError(f"{file}: two foreign keys are called {name}.", "Give one another `name`.")
        if to and len(to) != len(columns):
            raise ModelError(
                f"{file}: foreign_key {name} has {len(columns)} columns, and refers to {len(to)}."
            )
        found[name] = ForeignKey(name, columns, references, to)
    return tuple(found.values())


def orphan_after_of(file: str, settings: Mapping[str, Any]) -> float:
    """Return the seconds that a header's `orphan_after` says. Raises ModelError, naming the file."""
    if "orphan_after" not in settings:
        return ORPHAN_AFTER
    try:
        return float(duration("0s", "365d")(settings["orphan_after"]))
    except Invalid as error:
        raise ModelError(f"{file}: orphan_after: {error}.") from error


def _names(file: str, given: Mapping[str, Any], name: str) -> tuple[str, ...]:
    names = given.get(name, [])
    if not isinstance(names, list) or not all(isinstance(column, str) for column in names):
        raise ModelError(f"{file}: {name} of a foreign_key must be a list of columns: {_EXAMPLE}.")
    return tuple(names)
