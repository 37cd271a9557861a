"""Webhooks: a CloudEvent posted as JSON, signed as Standard Webhooks says (https://www.standardwebhooks.com)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import time

from headrace.alerts.message import Message, Undelivered
from headrace.channels import Channel
from headrace.posting import PostFailed, post

_PREFIX = "whsec_"


def send(channel: Channel, message: Message) -> None:
    """Post a message. Raises Undelivered for any answer but 2xx, and for none."""
    body = message.event()
    headers = {"Content-Type": "application/cloudevents+json; charset=utf-8", "User-Agent": "headrace"}
    headers |= {"webhook-id": message.id, "webhook-timestamp": str(int(time.time()))}
    if channel.secret is not None:
        signed = f"{message.id}.{headers['webhook-timestamp']}.".encode() + body
        headers["webhook-signature"] = signature(channel.secret.reveal(), signed)
    try:
        post(channel.url, body, headers)
    except PostFailed as error:
        raise Undelivered(str(error), error.retry_after) from None


def signature(secret: str, signed: bytes) -> str:
    """Return the header that signs a text of id, timestamp and body: HMAC-SHA256 in base64.

    A secret that begins with `whsec_` is the key in base64, as that standard has it; any other is the key.
    """
    digest = hmac.digest(_key(secret), signed, hashlib.sha256)
    return f"v1,{base64.b64encode(digest).decode()}"


def _key(secret: str) -> bytes:
    if secret.startswith(_PREFIX):
        try:
            return base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
        except binascii.Error:
            return secret.encode()
    return secret.encode()
