"""How the models of a source stand in a destination."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.change import Offset


@dataclass(frozen=True, slots=True)
class ModelState:
    """How a model stands in the destination."""

    name: str
    source: str
    version: str
    state: str
    reason: str
    offset: Offset
    open_records: int
    suspended_by: str = ""
    """`hand`, or `breaker` until a part has passed since; else ''."""

    def runs(self, version: str) -> bool:
        """Whether the model takes changes if its file is of this version."""
        return self.suspended_by != "hand" and (self.state, self.version) != ("suspended", version)
