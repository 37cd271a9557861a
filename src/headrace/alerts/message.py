"""A notification as its receivers get it: as data, and as text for people."""

from __future__ import annotations

import datetime as dt
import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MARKS = {"firing": "FIRING", "resolved": "RESOLVED"}
_MAX_TITLE = 200


class Undelivered(Exception):
    """A receiver did not take a notification; says why, without address and secrets.

    `retry_after` is how many seconds it asked to be left alone, 0 if it did not.
    """

    def __init__(self, why: str, retry_after: float = 0.0) -> None:
        super().__init__(why)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Message:
    """What is sent once: `id` is the same at every attempt, `origin` names the project, `made_at` is in
    seconds since 1970, `body` is the data of the event, see docs/alerts.md."""

    id: str
    origin: str
    group: str
    made_at: float
    body: Mapping[str, Any]

    @classmethod
    def new(cls, origin: str, group: str, made_at: float, body: Mapping[str, Any]) -> Message:
        """Return a message that was not sent before."""
        return cls(str(uuid.uuid4()), origin, group, made_at, body)

    @property
    def title(self) -> str:
        """Return one line that says what it is about."""
        alerts = self.body["alerts"]
        first = str(alerts[0]["summary"]) if alerts else ""
        more = f" (and {len(alerts) - 1} more)" if len(alerts) > 1 else ""
        return f"[{MARKS[self.body['status']]}] {self.group}: {first}"[:_MAX_TITLE] + more

    def event(self) -> bytes:
        """Return it as a CloudEvent 1.0 in JSON, structured."""
        event = {
            "specversion": "1.0",
            "id": self.id,
            "source": self.origin,
            "type": f"headrace.alert.{self.body['status']}",
            "subject": self.group,
            "time": time_text(self.made_at),
            "datacontenttype": "application/json",
            "data": self.body,
        }
        return json.dumps(event, ensure_ascii=False).encode()

    def text(self) -> str:
        """Return it as text for people, a paragraph for each alert."""
        return "\n\n".join("\n".join(_lines(alert)) for alert in self.body["alerts"]) + f"\n\n{self.origin}\n"


def time_text(moment: float) -> str:
    """Return a time as RFC 3339 has it, in UTC."""
    return dt.datetime.fromtimestamp(moment, dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _lines(alert: Mapping[str, Any]) -> Iterator[str]:
    until = f" until {alert['ended_at']}" if alert["ended_at"] else ""
    owner = f", owner {alert['owner']}" if alert["owner"] else ""
    yield f"{MARKS[alert['status']]} {alert['kind']} {alert['subject']} ({alert['severity']}{owner})"
    yield alert["summary"]
    yield f"since {alert['began_at']}{until}"
    details = dict(alert["details"])
    samples = details.pop("samples", [])
    for name, value in details.items():
        if value not in (None, "", []):
            yield f"{name.replace('_', ' ')}: {_flat(value)}"
    for sample in samples:
        yield f"sample: key {sample['key']}, offset {sample['offset']}: {_flat(sample['cells'])}"
    for name, command in alert["commands"].items():
        yield f"{name}: {command}"


def _flat(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} = {cell}" for name, cell in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
