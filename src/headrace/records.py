"""What a destination does for the changes that could not be applied: its records, and their issues."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from headrace.change import Offset

if TYPE_CHECKING:
    from headrace.decisions import Outcome
    from headrace.prepared import Prepared
    from headrace.protocols import Model


class Records(Protocol):
    """The records of a destination's models. Each method that changes something is one transaction."""

    def redrive(
        self, model: Model, prepared: Prepared, *, dry_run: bool = False, decided: Outcome | None = None
    ) -> dict[str, int]:
        """Apply what the current model makes of the whole histories of some keys (`prepared.removed`),
        in one transaction; with `dry_run` only find out what that would do.

        Open records of these keys that are no longer bad become resolved; those still bad count one more
        attempt; changes that the current model refuses and an earlier one took become records, and records
        tell what was `decided`. Returns how many are `resolved`, `still_quarantined` and, if some were
        decided on, `discarded`. Raises Contested for changes to prepare once more.
        """
        ...

    def decided(self, source: str) -> dict[str, Offset]:
        """Return through which offset the decisions about each model's changes are in its table."""
        ...

    def archive_issue(self, issue: str, actor: str) -> None:
        """Put an issue aside until it escalates. Raises UserError for one that is not there, or resolved."""
        ...

    def issue(self, issue: str) -> tuple[str, str, str, str, int]:
        """Return model, reason, columns, message and number of records of an issue."""
        ...
