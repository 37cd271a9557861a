"""Sending a notification by a channel, and when to try again."""

from __future__ import annotations

import json
import random
from importlib import import_module

from headrace.alerts.message import Message, Undelivered
from headrace.alerts.store import Delivery
from headrace.channels import Channel

_MODULES = {
    "webhook": "headrace.alerts.webhook",
    "smtp": "headrace.alerts.smtp",
    "apprise": "headrace.alerts.services",
}
_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 600.0
_LONGEST_ASKED = 3_600.0


def send(channel: Channel, message: Message) -> None:
    """Send a message. Raises Undelivered, whatever it is that failed."""
    try:
        import_module(_MODULES[channel.type]).send(channel, message)
    except Undelivered:
        raise
    except Exception as error:  # a library of a service may raise anything, and quote a secret
        raise Undelivered(f"{type(error).__name__} in what sends it") from error


def message_of(delivery: Delivery, origin: str) -> Message:
    """Return what a delivery sends."""
    body = json.loads(delivery.body)
    return Message(delivery.id, origin, delivery.group, delivery.made_at, body)


def pause(attempts: int, asked: float = 0.0) -> float:
    """Return for how many seconds to wait after so many failed attempts.

    From 5 s, doubled each time, up to ten minutes, less up to a half by chance, so that many who failed
    together do not come back together; at least as long as the receiver `asked` for, up to an hour.
    """
    longest = min(_FIRST_PAUSE * 2.0 ** min(attempts - 1, 20), _LONGEST_PAUSE)
    return max(longest * random.uniform(0.5, 1.0), min(asked, _LONGEST_ASKED))
