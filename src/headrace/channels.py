"""`[alerts]`: when people are told, and the channels by which they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal
from urllib.parse import urlsplit

from headrace import values
from headrace.alarms import SEVERITIES, Severity
from headrace.document import Document, Invalid, Parser, kind_of
from headrace.references import SecretParsers
from headrace.secret import Secret

MAX_CHANNELS = 50
_EXAMPLE = 'such as [alerts.ops] with url = "${env:ALERT_URL}"'
_WEB, _MAIL = ("http", "https"), ("smtp", "smtps")


@dataclass(frozen=True, slots=True)
class Channel:
    """`[alerts.NAME]`: where alerts go, and which.

    `secret` signs what a webhook gets; `sender` and `to` are addresses of mail. `severity` is the least that
    it takes; `models` are patterns and `owners` names, empty: all.
    """

    name: str
    url: Secret
    secret: Secret | None = None
    sender: str = ""
    to: tuple[str, ...] = ()
    severity: Severity = "warning"
    models: tuple[str, ...] = ()
    owners: tuple[str, ...] = ()

    @property
    def type(self) -> Literal["webhook", "smtp", "apprise"]:
        """What its address is of."""
        scheme = self.url.reveal().partition("://")[0].lower()
        return "webhook" if scheme in _WEB else "smtp" if scheme in _MAIL else "apprise"

    def takes(self, severity: Severity, model: str, owner: str) -> bool:
        """Whether an alert is for this channel; `model` and `owner` are '' where it has none."""
        return (
            SEVERITIES.index(severity) >= SEVERITIES.index(self.severity)
            and (not self.models or any(fnmatchcase(model, pattern) for pattern in self.models))
            and (not self.owners or owner in self.owners)
        )


@dataclass(frozen=True, slots=True)
class AlertSettings:
    """How fresh a model is to be (seconds from commit to visible, None: no target), how grave its alerts are
    (None: as their kind says), who answers for it, and the channels they go to (none: those that take them).
    """

    freshness: float | None = None
    severity: Severity | None = None
    owner: str = ""
    route: tuple[str, ...] = ()


DEFAULT = AlertSettings()


@dataclass(frozen=True, slots=True)
class AlertsConfig:
    """`[alerts]`, as in Alertmanager, in seconds: a group of alerts is told `group_wait` after its first one,
    what is new in it every `group_interval` at most, and what has not changed every `repeat_interval`.

    A model makes no progress when it stands still for `no_progress` seconds though there is something to
    apply; a disk is low when less than `disk_low` bytes are free.
    """

    group_wait: float = 30.0
    group_interval: float = 300.0
    repeat_interval: float = 14_400.0
    no_progress: float = 900.0
    disk_low: int = 2 << 30
    channels: tuple[Channel, ...] = ()


DEFAULT_ALERTS = AlertsConfig()


def read_alerts(document: Document, secret: SecretParsers) -> AlertsConfig:
    """Parse the section `alerts`; mistakes are noted in the document."""
    settings: dict[str, Parser] = {
        "group_wait": values.duration("0s", "1h"),
        "group_interval": values.duration("1s", "24h"),
        "repeat_interval": values.duration("1m", "30d"),
        "no_progress": values.duration("10s", "30d"),
        "disk_low": values.size("0B", "1048576GiB"),
    }
    section = document.values.get("alerts", {})
    named = section.items() if isinstance(section, dict) else ()
    tables = {name: table for name, table in named if isinstance(table, dict)}
    channels = tables.keys() - settings.keys()
    given = document.section("alerts", settings | dict.fromkeys(channels, lambda table: table))
    if len(channels) > MAX_CHANNELS:
        document.fail(
            ("alerts",), f"has {len(channels)} channels; at most {MAX_CHANNELS} are kept", section=True
        )
    found = (_channel(document, name, tables[name], secret) for name in tables if name in channels)
    return AlertsConfig(
        **{name: value for name, value in given.items() if name in settings},
        channels=tuple(channel for channel in found if channel is not None),
    )


def _channel(
    document: Document, name: str, table: Mapping[str, Any], secret: SecretParsers
) -> Channel | None:
    path = ("alerts", name)
    if not re.fullmatch("[a-z][a-z0-9_-]{0,39}", name):
        rule = "a channel's name is 1 to 40 of a-z, 0-9, _ and -, and begins with a letter"
        document.fail(path, rule, section=True)
    parsers: dict[str, Parser] = {
        "url": secret.address,
        "secret": secret.salt,
        "from": _mail_address,
        "to": _mail_addresses,
        "severity": values.only(*SEVERITIES),
        "models": _names,
        "owners": _names,
    }
    given = document.table(path, table, parsers)
    if "url" not in table:
        document.fail((*path, "url"), f"missing; {_EXAMPLE}")
    if "url" not in given:
        return None
    sender = given.pop("from", "")
    channel = Channel(name, sender=sender, **given)
    if channel.url.reveal():
        _check(document, path, channel)
    return channel


def _check(document: Document, path: tuple[str, ...], channel: Channel) -> None:
    """Note what does not belong to the type of a channel, and what is missing."""
    if channel.type == "smtp":
        if not channel.sender or not channel.to:
            document.fail(path, 'mail needs from and to, such as to = ["data@example.org"]', section=True)
    elif channel.sender or channel.to:
        document.fail(path, "from and to are for smtp:// and smtps:// only", section=True)
    if channel.secret is not None and channel.type != "webhook":
        document.fail((*path, "secret"), "signs a webhook, http:// or https:// only")
    try:
        parts = urlsplit(channel.url.reveal())
        has_host = bool(parts.hostname) and parts.port != 0
    except ValueError:
        has_host = False
    if channel.type != "apprise" and not has_host:
        document.fail((*path, "url"), "has no host, or no port of 1 to 65535, where they belong")


def _mail_address(value: object) -> str:
    text = values.string(value, ' such as "headrace@example.org"')
    if not re.fullmatch(r"[^@\s<>,]+@[^@\s<>,]+", text):
        raise Invalid("must be an address of mail, such as headrace@example.org")
    return text


def _mail_addresses(value: object) -> tuple[str, ...]:
    return tuple(_mail_address(each) for each in (value if isinstance(value, list) else [value]))


def _names(value: object) -> tuple[str, ...]:
    given = value if isinstance(value, list) else [value]
    if not given or not all(isinstance(each, str) and each for each in given):
        raise Invalid(f'must be an array of names, such as ["sales", "shop.*"], not {kind_of(value)}')
    return tuple(given)
