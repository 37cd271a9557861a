"""What the header of a model or a mart says of its alerts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.alarms import SEVERITIES
from headrace.channels import AlertSettings
from headrace.document import Invalid
from headrace.errors import ModelError
from headrace.values import duration

KEYS = ("freshness", "severity", "owner", "route")


def alert_settings_of(file: str, settings: Mapping[str, Any]) -> AlertSettings:
    """Return what a header's KEYS say. Raises ModelError, naming the file, for what is none."""
    freshness, severity, owner = (settings.get(key) for key in ("freshness", "severity", "owner"))
    try:
        seconds = None if freshness is None else duration("1s", "30d")(freshness)
    except Invalid as error:
        raise ModelError(f"{file}: freshness {error}.") from error
    if severity is not None and severity not in SEVERITIES:
        raise ModelError(f"{file}: severity must be one of {', '.join(SEVERITIES)}.")
    if owner is not None and not (isinstance(owner, str) and owner.strip()):
        raise ModelError(f"{file}: owner must be a name, such as a team's.")
    route = settings.get("route", [])
    names = [route] if isinstance(route, str) else route
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
        raise ModelError(f'{file}: route must name channels of [alerts], such as ["ops"].')
    return AlertSettings(seconds, severity, owner or "", tuple(names))
