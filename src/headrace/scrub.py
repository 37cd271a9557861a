"""Taking cell values out of what an engine says."""

from __future__ import annotations

import re

_MESSAGE = 4096
_QUERY = re.compile(r"\n\nLINE \d+: (?!.*\n\nLINE \d+: ).*", re.DOTALL)
_QUOTED = re.compile(r"(?<!\w)(?:'.*'(?!\w)|\".*\"|['\"].*)", re.DOTALL)
_PARSED = re.compile(r"(Could not parse string ).*( according to format specifier ).*", re.DOTALL)
_REST = re.compile(r": (?!'…'|….*$).+")
_VALUE = re.compile(r"(\bvalue )(?!is |'…'|…)\S+")
_NUMBER = re.compile(r"(DECIMAL\(\d+,\d+\)|\b[A-Za-z_]\w*|\[\d+\])|[-+]?\d[\w.+-]*")


def scrub(message: str) -> str:
    """Remove cell values from an engine's message, so that what stays is the same for one cause.

    What goes: the query it cites, whatever is quoted, what follows `value` or a colon, later lines, numbers.
    (strptime's message says its string once more, on a line of its own.)
    """
    kind, separator, words = _QUERY.sub("", message).partition(" Error: ")
    if not separator:
        kind, words = "", kind
    line = _QUOTED.sub("'…'", _PARSED.sub(r"\1'…'\2'…'", words)).strip().split("\n", maxsplit=1)[0]
    line = _VALUE.sub(r"\1…", _REST.sub(": …", line))
    return (kind + separator + _NUMBER.sub(lambda found: found[1] or "…", line))[:_MESSAGE]
