"""What a model's header says of its bad rows, and of values that nobody is to see beside its table."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from headrace.errors import ModelError

KEYS = ("max_error_rate", "on_violation", "pii")
"""The header's keys that are read here."""

DEFAULT_ERROR_RATE = 0.5

Action = Literal["quarantine", "warn", "null", "suspend"]
ACTIONS: tuple[Action, ...] = get_args(Action)


@dataclass(frozen=True, slots=True)
class Handling:
    """`max_error_rate`: which share of its changes may fail before the model is suspended, 1 for any;
    `on_violation`: what becomes of a row that violates a check which does not say so itself;
    `pii`: outputs whose values are shown nowhere beside the table."""

    max_error_rate: float = DEFAULT_ERROR_RATE
    on_violation: Action = "quarantine"
    pii: tuple[str, ...] = ()

    @property
    def on_key_violation(self) -> Action:
        """What becomes of a row without a key, or with that of another: no table can take it."""
        return "suspend" if self.on_violation == "suspend" else "quarantine"


NO_SAY = Handling()
"""That of a model which says nothing."""


def handling_of(file: str, settings: Mapping[str, Any], outputs: Collection[str]) -> Handling:
    """Return what a header says. Raises ModelError, naming the file, for what cannot be meant."""
    return Handling(
        _error_rate(file, settings.get("max_error_rate", DEFAULT_ERROR_RATE)),
        action_of(f"{file}: on_violation", settings.get("on_violation", "quarantine")),
        _pii(file, settings.get("pii", []), outputs),
    )


def _pii(file: str, value: object, outputs: Collection[str]) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise ModelError(f'{file}: pii must be a list of output columns, such as ["email"].')
    for name in value:
        if name not in outputs:
            raise ModelError(f"{file}: pii names {name!r}, which is no output column.")
    return tuple(value)


def action_of(where: str, word: object) -> Action:
    """Return an action by its word. Raises ModelError, which begins with `where`, for any other."""
    for action in ACTIONS:
        if word == action:
            return action
    raise ModelError(f"{where} must be one of {', '.join(ACTIONS)}.")


def _error_rate(file: str, value: object) -> float:
    if value is False:
        return 1.0
    rate = value if type(value) in (int, float) else None
    if rate is None or not 0 < float(rate) <= 1:  # type: ignore[arg-type]
        raise ModelError(
            f"{file}: max_error_rate must be a number above 0 and up to 1, or false.",
            "0.5 suspends the model where half of its newest changes fail; 1 or false never does.",
        )
    return float(rate)  # type: ignore[arg-type]
