"""Mail over SMTP: with TLS from the start (smtps://), or as soon as the server offers it (smtp://)."""

from __future__ import annotations

import smtplib
import ssl
from contextlib import suppress
from email.message import EmailMessage
from email.utils import formatdate
from urllib.parse import unquote, urlsplit

from headrace.alerts.message import Message, Undelivered
from headrace.channels import Channel

_TIMEOUT = 10.0
_PORTS = {"smtp": 587, "smtps": 465}
_LOCAL = ("localhost", "127.0.0.1", "::1")


def send(channel: Channel, message: Message) -> None:
    """Mail a message. Raises Undelivered where the server takes it for no receiver, and for a password that
    would go over the network without TLS.

    One that it takes for some is delivered: those would get it again at every further attempt.
    """
    try:
        server = _connected(channel)
        try:
            server.send_message(_mail(channel, message), channel.sender, channel.to)
        finally:
            with suppress(smtplib.SMTPException, OSError):  # it has taken the mail, or said why not
                server.quit()
    except smtplib.SMTPResponseException as error:
        raise Undelivered(f"it answered {error.smtp_code}") from None
    except smtplib.SMTPRecipientsRefused as error:
        codes = sorted({code for code, _ in error.recipients.values()})
        raise Undelivered(f"it refused every receiver: {', '.join(map(str, codes))}") from None
    except smtplib.SMTPNotSupportedError:
        raise Undelivered("it takes no password: leave user and password out of the url") from None
    except (smtplib.SMTPException, OSError) as error:
        raise Undelivered(f"{type(error).__name__} before it took the mail") from None


def _connected(channel: Channel) -> smtplib.SMTP:
    url = urlsplit(channel.url.reveal())
    host, port = url.hostname or "", url.port or _PORTS[url.scheme.lower()]
    if url.scheme.lower() == "smtps":
        server: smtplib.SMTP = smtplib.SMTP_SSL(
            host, port, timeout=_TIMEOUT, context=ssl.create_default_context()
        )
    else:
        server = smtplib.SMTP(host, port, timeout=_TIMEOUT)
    try:
        server.ehlo()
        is_safe = url.scheme.lower() == "smtps" or host in _LOCAL
        if url.scheme.lower() == "smtp" and server.has_extn("starttls"):
            server.starttls(context=ssl.create_default_context())
            server.ehlo()
            is_safe = True
        if url.username:
            _refuse_unsafe(is_safe)
            server.login(unquote(url.username), unquote(url.password or ""))
    except BaseException:
        server.close()
        raise
    return server


def _refuse_unsafe(is_safe: bool) -> None:
    if not is_safe:
        raise Undelivered("it offers no TLS, and the password would be read on its way: use smtps://")


def _mail(channel: Channel, message: Message) -> EmailMessage:
    mail = EmailMessage()
    mail["Subject"] = " ".join(message.title.split())
    mail["From"] = channel.sender
    mail["To"] = ", ".join(channel.to)
    mail["Date"] = formatdate(message.made_at)
    mail["Message-ID"] = f"<{message.id}@headrace>"
    # Mails about one group make one thread.
    mail["References"] = f"<{_word(message.origin)}.{_word(message.group)}@headrace>"
    mail["Auto-Submitted"] = "auto-generated"
    mail.set_content(message.text())
    return mail


def _word(text: str) -> str:
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in text)[:100]
