"""Every other service: what Apprise reaches by an address of its own, such as slack:// or pagerduty://."""

from __future__ import annotations

import logging

from headrace.alerts.message import Message, Undelivered
from headrace.channels import Channel


def send(channel: Channel, message: Message) -> None:
    """Notify by Apprise. Raises Undelivered where it is not installed, knows no such address, or fails."""
    try:
        import apprise
    except ImportError:
        raise Undelivered("apprise is not installed: pip install 'headrace[alerts]'") from None
    logging.getLogger("apprise").setLevel(logging.CRITICAL)  # it logs addresses, with what is secret in them
    service = apprise.Apprise()
    if not service.add(channel.url.reveal()):
        raise Undelivered("Apprise knows no service of this address, or something is missing in it")
    kinds = {"resolved": apprise.NotifyType.SUCCESS, "firing": apprise.NotifyType.WARNING}
    if message.body["severity"] in ("error", "critical"):
        kinds["firing"] = apprise.NotifyType.FAILURE
    if not service.notify(message.text(), message.title, notify_type=kinds[message.body["status"]]):
        raise Undelivered("the service did not take it")
