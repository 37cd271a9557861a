"""What is told to whom, and when: decisions without effects.

The timers are Alertmanager's: a group is told `group_wait` after its first alert, so that what comes together
is told together; what is new in it every `group_interval` at most; what goes on unchanged every
`repeat_interval`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from headrace.alarms import SEVERITIES, Severity
from headrace.alerts.store import Alert, Silence, Standing, Told
from headrace.channels import DEFAULT, AlertsConfig, AlertSettings, Channel

Known = Sequence[tuple[Alert, Told | None]]
"""Alerts with what a channel has been told of each."""

_OF_A_MODEL = ("issue", "freshness", "progress")
_OF_A_SOURCE = ("source_down", "gap", "stopped", "waiting")


@dataclass(frozen=True, slots=True)
class Notice:
    """What a channel is told of a group: all of it that fires, and what is over since it was told last."""

    group: str
    firing: tuple[Alert, ...]
    over: tuple[Alert, ...]

    def told(self) -> dict[str, Told]:
        """Return what the channel knows of each alert from then on."""
        return {
            **{alert.id: Told(alert.grade, is_over=not alert.lasts) for alert in self.firing},
            **{alert.id: Told(alert.grade, is_over=True) for alert in self.over},
        }


def severity_of(alert: Alert, settings: AlertSettings = DEFAULT) -> Severity:
    """Return how grave an alert is: as its model says, or its kind, and one more for each higher grade."""
    base = SEVERITIES.index(settings.severity or alert.severity)
    return SEVERITIES[min(base + alert.grade - 1, len(SEVERITIES) - 1)]


def is_for(
    channel: Channel, alert: Alert, models: Mapping[str, AlertSettings], channels: Collection[str]
) -> bool:
    """Whether an alert goes to a channel: a model's `route` decides, else what the channel takes.

    A route that names none of the `channels` there are is as good as none, so that nothing is lost by it.
    """
    settings = models.get(alert.model, DEFAULT)
    if route := set(settings.route) & set(channels):
        return channel.name in route
    return channel.takes(severity_of(alert, settings), alert.model, settings.owner)


def muted(alert: Alert, firing: Iterable[Alert], silences: Iterable[Silence]) -> str:
    """Say why nobody is told of an alert now, '' if people are.

    A suspended model, and a source that is away, explain what else there is about them.
    """
    for silence in silences:
        if silence.subject in (alert.subject, alert.model):
            return f"silenced: {silence.reason}"
    for other in firing:
        if alert.kind in _OF_A_MODEL and other.kind == "suspended" and other.model == alert.model:
            return f"model {alert.model} is suspended"
        is_late = alert.kind in ("freshness", "progress") and bool(alert.source)
        if is_late and other.kind in _OF_A_SOURCE and other.source == alert.source:
            return f"{other.subject} stands still"
    return ""


def notice_due(
    group: str,
    known: Known,
    standing: Standing | None,
    timers: AlertsConfig,
    now: float,
    *,
    waits: bool = True,
) -> Notice | None:
    """Decide whether a channel is to be told of a group now, and of what.

    `known` are the alerts of the group that go to the channel and are not muted; of those that are over, the
    ones that it does not know to be. While the channel has not taken what it was sent about the group it is
    not sent more, so that its order holds and nothing piles up. Unless it `waits`, a pipeline that ends tells
    at once what it would tell later.
    """
    if standing is not None and standing.is_outstanding:
        return None
    current = [(alert, told) for alert, told in known if alert.fires or not alert.lasts]
    fresh = [alert for alert, told in current if told is None or told.grade < alert.grade]
    firing = tuple(alert for alert, _ in current)
    over = tuple(alert for alert, told in known if alert.lasts and not alert.fires and told is not None)
    if not fresh and not over:
        is_time = standing is not None and now >= standing.told_at + timers.repeat_interval
        return Notice(group, firing, ()) if firing and is_time else None
    due = now
    if waits:
        due = min([alert.began_at + timers.group_wait for alert in fresh], default=due)
        due = max(due, standing.told_at + timers.group_interval if standing else due)
    return Notice(group, firing, over) if now >= due else None
