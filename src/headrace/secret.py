"""Secrets, and connection strings as libpq reads them; nothing here quotes what may be a password."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import unquote


class Secret:
    """A text that no repr, str, format or error message shows. Not a dataclass: `asdict` would open it."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._text == other._text

    def __hash__(self) -> int:
        return hash((Secret, self._text))

    def reveal(self) -> str:
        """Give the text itself: for the driver that connects, never for a log or a message."""
        return self._text

    def redacted(self) -> str:
        """Say where a connection string leads: `postgresql://user@host:port/db`, or `***` if unclear.

        Only user, host, port and database are taken over, so a password can stand anywhere else.
        """
        try:
            place = place_of(self._text)
        except ValueError:
            return "***"
        user, host, port, database = (
            "***" if part and not re.fullmatch(plain, part) else part
            for part, plain in zip(place, _PLAIN, strict=True)
        )
        socket = host.startswith("/")
        text = "postgresql://" + (f"{user}@" if user else "") + ("" if socket else host)
        text += f":{port}" if port else ""
        text += f"/{database}" if database else ""
        return text + (f"?host={host}" if socket else "")


def has_password(text: str) -> bool:
    """Whether a connection string carries a password of any kind, or what cannot be told from one."""
    userinfo = re.search(r"://[^@/?]*:[^@]*@", text)
    return bool(userinfo or re.search(r"(password|secret|_key)\s*=", text, re.IGNORECASE))


def without_passwords(text: str) -> str:
    """Return a message with every connection string's password, and anything after `password=`, as ***."""
    text = re.sub(r"(\w+://[^:/@\s]*:)\S+(?=@)", r"\1***", text)
    return re.sub(r"(?i)(password\s*=\s*)('(?:[^'\\]|\\.)*'|[^\s&'\"]+)", r"\1***", text)


class Place(NamedTuple):
    """Where a connection string leads; '' for what it leaves to libpq."""

    user: str
    host: str
    port: str
    database: str


# What is shown of each part: anything else might be a password in the wrong place.
_PLAIN_HOST = r"(?:[\w./-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]+)?"
_PLAIN = (r"[\w.-]+", rf"{_PLAIN_HOST}(?:,{_PLAIN_HOST})*", r"[0-9,]+", r"[\w.-]+")

_URL = re.compile(
    r"postgres(?:ql)?://(?:(?P<user>[^:@/]*)(?::[^@/]*)?@)?(?P<hosts>[^@/?]*)"
    r"(?:/(?P<database>[^@?]*))?(?:\?(?P<query>[^@]*))?"
)
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[^:\[\]]*)(?::(?P<port>[0-9]{0,5}))?")
_PAIR = re.compile(
    r"\s*(?P<key>[a-z_]+)\s*=\s*(?P<value>'(?:[^'\\]|\\.)*'|(?:(?!')(?:[^\s\\]|\\.)+)?)(?=\s|$)", re.DOTALL
)


def place_of(text: str) -> Place:
    """Read a connection string as libpq does; `ValueError`, which quotes nothing of it, if it cannot be one.

    libpq's own messages quote what they do not understand, so it is judged before libpq sees it.
    """
    if re.match(r"postgres(ql)?://", text):
        return _of_url(text)
    if "=" in text and not re.match(r"\s*[^\s=]*:", text):
        return _of_pairs(text)
    raise ValueError(
        "must begin with postgres:// or postgresql://, or be key=value pairs as libpq takes them"
    )


def _of_url(text: str) -> Place:
    if not text.isprintable() or " " in text:
        raise ValueError("has a blank or control character; write a blank as %20")
    if re.search("%(?![0-9A-Fa-f]{2})|%00", text):
        raise ValueError("has a % without two hex digits after it; write % itself as %25")
    match = _URL.fullmatch(text)
    advice = "in user and password write @ as %40, / as %2F and : as %3A"
    if not match:
        raise ValueError(f"is not postgresql://user:password@host:port/database; {advice}")
    hosts = match["hosts"].split(",")
    for host in hosts:
        part = _HOST.fullmatch(host)
        if not part or int(part["port"] or 1) not in range(1, 65536):
            raise ValueError(f"has no host:port with a port of 1 to 65535 where they belong; {advice}")
    pairs = [pair.split("=") for pair in (match["query"] or "").split("&") if pair]
    if any(len(pair) != 2 or not pair[0] for pair in pairs):
        raise ValueError("must have key=value pairs joined by & after the ?")
    options = {unquote(key): unquote(value) for key, value in pairs}
    return Place(
        options.get("user") or unquote(match["user"] or ""),
        options.get("host") or unquote(match["hosts"]),
        options.get("port", ""),
        options.get("dbname") or unquote(match["database"] or ""),
    )


def _of_pairs(text: str) -> Place:
    options, at = {}, 0
    while text[at:].strip():
        pair = _PAIR.match(text, at)
        if not pair or "\0" in text:
            raise ValueError("is not key=value pairs as libpq takes them; put '…' around a value with blanks")
        value = pair["value"]
        value = value[1:-1] if value.startswith("'") else value
        options[pair["key"]], at = re.sub(r"\\(.)", r"\1", value, flags=re.DOTALL), pair.end()
    get = options.get
    return Place(get("user", ""), get("host", get("hostaddr", "")), get("port", ""), get("dbname", ""))
