"""The files of models, and the header of one of SQL: a comment of TOML before the query."""

from __future__ import annotations

import difflib
import hashlib
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headrace.errors import ModelError

_HEADER = re.compile(r"\A\s*/\*\s*headrace\b(.*?)\*/", re.DOTALL)


def model_paths(folder: Path) -> list[Path]:
    """Return the files of a folder that are models: all of SQL, and those of Python that are no helpers."""
    python = (path for path in folder.glob("*.py") if not path.name.startswith("_"))
    return sorted([*folder.glob("*.sql"), *python])


def version_of(text: str) -> str:
    """Return the version of a file: a hash of its text."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def file_version(version: str) -> str:
    """Return the version of the file in that of a model, which beside it tells of constraints taken over."""
    return version.partition("+")[0]


def settings_of(file: str, text: str, keys: Sequence[str]) -> dict[str, Any]:
    """Return the settings in a file's header, none if it has no header.

    Raises ModelError, naming the file, for what is no TOML, or has other keys than `keys`.
    """
    header = _HEADER.match(text)
    if not header:
        return {}
    try:
        settings = tomllib.loads(header[1])
    except tomllib.TOMLDecodeError as error:
        raise ModelError(f"{file}: the header is not TOML: {error}.") from error
    for key in settings:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, 1)
            hint = f'; did you mean "{near[0]}"?' if near else f"; known are {', '.join(keys)}."
            raise ModelError(f"{file}: the header has an unknown key {key!r}{hint}")
    return settings
