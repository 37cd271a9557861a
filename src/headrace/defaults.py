"""`[models]`: what holds of every model that does not say otherwise itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from headrace import values
from headrace.document import Document

Constraints = Literal["own", "source"]
"""Which constraints a model's rows are held to: its own, or also those that the source has of its table."""


@dataclass(frozen=True, slots=True)
class ModelDefaults:
    """`orphan_after` are seconds for which a row waits for what it refers to, before that is an error."""

    constraints: Constraints = "own"
    orphan_after: float = 900.0


NO_DEFAULTS = ModelDefaults()
"""Those of a project that says nothing."""


def read_defaults(document: Document) -> ModelDefaults:
    """Read the section; what is wrong with it is noted in the document."""
    parsers = {
        "constraints": values.only("own", "source"),
        "orphan_after": values.duration("0s", "365d"),
    }
    return ModelDefaults(**document.section("models", parsers))
