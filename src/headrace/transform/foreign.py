"""Foreign keys of models as their headers have them, and what these say of constraints as a whole."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from headrace.defaults import Constraints, ModelDefaults
from headrace.document import Invalid
from headrace.errors import ModelError
from headrace.values import duration, only

KEYS = ("foreign_key", "orphan_after", "constraints")
"""The header's keys that are read here."""

_EXAMPLE = '[[foreign_key]], then columns = ["customer_id"] and references = "customers"'


@dataclass(frozen=True, slots=True)
class ForeignKey:
    """Output columns whose values, unless one is null, a row of the model `references` has in its columns
    `to`; in those of its key where that is empty."""

    name: str
    columns: tuple[str, ...]
    references: str
    to: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Said:
    """What a model says of its constraints as a whole, see `ModelDefaults`; None is what these say."""

    constraints: Constraints | None = None
    orphan_after: float | None = None

    def over(self, defaults: ModelDefaults) -> ModelDefaults:
        """Return what holds of the model."""
        return ModelDefaults(
            self.constraints or defaults.constraints,
            defaults.orphan_after if self.orphan_after is None else self.orphan_after,
        )


NOTHING_SAID = Said()


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
                raise ModelError(f"{file}: foreign_key {name} names {column!r}, which is no output column.")
        if name in found:
            raise ModelError(f"{file}: two foreign keys are called {name}.", "Give one another `name`.")
        if to and len(to) != len(columns):
            raise ModelError(
                f"{file}: foreign_key {name} has {len(columns)} columns, and refers to {len(to)}."
            )
        found[name] = ForeignKey(name, columns, references, to)
    return tuple(found.values())


def said_of(file: str, settings: Mapping[str, Any]) -> Said:
    """Return what a header says of `orphan_after` and `constraints`. Raises ModelError, naming the file."""
    found = dict[str, Any]()
    for key, parser in (("orphan_after", duration("0s", "365d")), ("constraints", only("own", "source"))):
        if key in settings:
            try:
                found[key] = parser(settings[key])
            except Invalid as error:
                raise ModelError(f"{file}: {key}: {error}.") from error
    return Said(**found)


def _names(file: str, given: Mapping[str, Any], name: str) -> tuple[str, ...]:
    names = given.get(name, [])
    if not isinstance(names, list) or not all(isinstance(column, str) for column in names):
        raise ModelError(f"{file}: {name} of a foreign_key must be a list of columns: {_EXAMPLE}.")
    return tuple(names)
