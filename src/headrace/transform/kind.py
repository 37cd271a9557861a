"""What a row model keeps of a source row: its newest state, or each of them; and what a delete leaves."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from headrace.errors import ModelError

Materialize = Literal["latest", "append", "history"]
Delete = Literal["hard", "soft"]

_TIME = "TIMESTAMP WITH TIME ZONE"
DELETED = {"_deleted_at": _TIME}
VALIDITY = {"valid_from": _TIME, "valid_to": _TIME, "is_current": "BOOLEAN"}
PLACE = {"_epoch": "BIGINT", "_commit": "BIGINT", "_ordinal": "BIGINT"}


@dataclass(frozen=True, slots=True)
class Kind:
    """How a model's table follows its raw table.

    `latest` has a row per source row, `history` one per version of it, `append` one per change. `soft`: what
    is deleted at the source leaves a row that says so.
    """

    materialize: Materialize = "latest"
    delete: Delete = "hard"

    @property
    def columns(self) -> Mapping[str, str]:
        """The columns (name, DuckDB type) that a table has behind its model's outputs."""
        if self.materialize == "latest":
            return DELETED if self.delete == "soft" else {}
        return VALIDITY if self.materialize == "history" else PLACE

    @property
    def remembers(self) -> bool:
        """Whether a table holds more than the newest copy and the changes since can tell."""
        return self != LATEST

    @property
    def order(self) -> tuple[str, ...]:
        """Columns that order the rows of one source key, none where it has but one."""
        if self.materialize == "latest":
            return ()
        return ("is_current", "valid_from", "valid_to") if self.materialize == "history" else tuple(PLACE)


LATEST = Kind()


def kind_of(file: str, settings: Mapping[str, Any], outputs: Collection[str]) -> Kind:
    """Return the kind that a header's `materialize` and `delete` say.

    Raises ModelError, naming the file, for what is none, or does not go with the names of the outputs.
    """
    materialize, delete = settings.get("materialize", "latest"), settings.get("delete", "hard")
    if materialize not in ("latest", "append", "history"):
        hint = "A view or a table is what a mart may be." if materialize in ("view", "table") else ""
        raise ModelError(f'{file}: materialize must be "latest", "append" or "history".', hint)
    if delete not in ("hard", "soft"):
        raise ModelError(f'{file}: delete must be "hard" or "soft".')
    if materialize == "history" and "delete" in settings:
        raise ModelError(
            f"{file}: a history says of each version how long it was, and a delete ends the last one.",
            "Leave `delete` out.",
        )
    kind = Kind(materialize, delete)
    for name in outputs:
        if name.lower() in kind.columns:
            raise ModelError(
                f"{file}: a table with materialize = {materialize!r} has a column {name} of its own.",
                "Name the output otherwise.",
            )
    return kind


def refuse_without_key(file: str, kind: Kind) -> None:
    """Refuse a kind that a table without a key cannot have; raises ModelError."""
    if kind.remembers:
        what = kind.materialize if kind.materialize != "latest" else "soft deletes"
        raise ModelError(
            f"{file}: its table has no key, so nothing tells which of its rows a change is of: "
            f"it can have no {what}.",
            "Give the table a primary key at the source, or leave `materialize` and `delete` out.",
        )
