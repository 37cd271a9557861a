"""Secrets in headrace.toml: `${env:NAME}` and `${file:PATH}`, filled in where they may stand.

Nothing here quotes what it read, nor what stands between the braces: it may be a part of a password.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from headrace import values
from headrace.document import Invalid
from headrace.secret import Secret, place_of

MAX_SECRET_FILE_BYTES = 64 << 10

MIN_SECRET = 16
"""Characters of a salt or a key."""


class SecretParsers:
    """Parsers of the values in which references are filled in; unless `read`, of their form alone."""

    def __init__(self, root: Path, *, read: bool) -> None:
        self._root = root
        self._read = read

    def url(self, value: object) -> Secret:
        """Parse a connection string."""
        return read_reference(value, self._root) if self._read else self._unread(value)

    def salt(self, value: object) -> Secret:
        """Parse a secret that is long enough."""
        return _secret(value, self._root) if self._read else self._unread(value)

    def web_address(self, value: object) -> Secret:
        """Parse an address of the web."""
        if not self._read:
            return self._unread(value)
        return Secret(values.web_address(_filled(values.string(value), self._root)))

    def address(self, value: object) -> Secret:
        """Parse an address of any scheme."""
        if not self._read:
            return self._unread(value)
        text = _filled(values.string(value), self._root)
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*://\S+", text):
            raise Invalid("must be an address that begins with a scheme, such as https:// or smtp://")
        return Secret(text)

    @staticmethod
    def _unread(value: object) -> Secret:
        values.string(value)
        return Secret("")


def _secret(value: object, root: Path) -> Secret:
    text = _filled(values.string(value), root)
    if len(text) < MIN_SECRET:
        raise Invalid(f"must have at least {MIN_SECRET} characters; a shorter secret can be guessed")
    return Secret(text)


def read_reference(value: object, root: Path) -> Secret:
    """Parse a connection string with its references filled in. Raises Invalid."""
    text = _filled(values.string(value), root)
    try:
        place_of(text)
    except ValueError as error:
        raise Invalid(str(error)) from None
    return Secret(text)


def _filled(text: str, root: Path) -> str:
    """Fill in what `${kind:name}` stands for."""
    missing: list[str] = []

    def fill(reference: re.Match[str]) -> str:
        try:
            return _referred(reference["kind"], reference["name"], root)
        except Invalid as error:
            missing.extend(error.args)
            return ""

    unclosed = re.sub(r"\$\{[^{}]*\}", "", text)
    if "${" in unclosed:
        missing.append("a ${ without its }")
    text = re.sub(r"\$\{(?P<kind>[^{}:]*):?(?P<name>[^{}]*)\}", fill, text)
    if missing:
        raise Invalid(*missing)
    return text


def _referred(kind: str, name: str, root: Path) -> str:
    """Give what `${kind:name}` stands for."""
    if kind == "file" and name.strip() and name.isprintable():
        return _secret_file(name, root)
    if kind != "env" or not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        # What stands between the braces is not quoted: it may be a part of a password.
        raise Invalid("unknown ${…}; there are ${env:NAME} and ${file:PATH} (write $ itself as %24)")
    value = os.environ.get(name)
    if not value:
        state = "not set" if value is None else "empty"
        raise Invalid(f"${{env:{name}}}: the environment variable {name} is {state}")
    return value


def _secret_file(name: str, root: Path) -> str:
    path = root / values.home(name)
    fault = ""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_SECRET_FILE_BYTES + 1).decode().rstrip("\r\n")
    except OSError as error:
        fault = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError:
        fault = "is not UTF-8 text"
    else:
        if not text or len(text) > MAX_SECRET_FILE_BYTES:
            fault = f"is larger than {MAX_SECRET_FILE_BYTES} bytes" if text else "is empty"
    if fault:
        raise Invalid(f"${{file:{name}}}: {path} {fault}")
    return text
