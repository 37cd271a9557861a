"""The folders of Delta tables on a local disk: their names, and what a power cut leaves of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from urllib.parse import quote, unquote


def mend_tail(path: Path, checkpoint: int = -1) -> None:
    """Delete trailing commits that a power cut tore (unreadable, or naming a file of another size) and
    sync the last whole one, which a crash may have left unsynced. Those up to the version of a proven
    `checkpoint` are whole: the files that they name may have been replaced since.

    Nothing acknowledged is lost: a load is done only when commit and files are synced.
    """
    for commit in sorted((path / "_delta_log").glob("*.json"), reverse=True):
        if int(commit.stem) <= checkpoint:
            return
        try:
            actions = [json.loads(line) for line in commit.read_text().splitlines()]
            adds = [action["add"] for action in actions if "add" in action]
            if actions and all((path / add["path"]).stat().st_size == add["size"] for add in adds):
                for file in (*(path / add["path"] for add in adds), path, commit, commit.parent):
                    fsync(file)
                return
        except (ValueError, OSError):
            pass
        commit.unlink()


def commit_name(version: int) -> str:
    """Return the file of a Delta commit."""
    return f"{version:020d}.json"


def encode(name: str) -> str:
    """Make any table name a safe folder name: never hidden, `.`, empty or read as an escape.

    Percent encoding with `~` for `%`, which object stores would decode.
    """
    if name == "_delta_log":  # Delta's own
        return "~5Fdelta_log"
    return quote(name, safe="").replace("~", "%7E").replace(".", "%2E").replace("%", "~") or "~"


def decode(folder: str) -> str:
    """Return the name that `encode` made a folder of."""
    return "" if folder == "~" else unquote(folder.replace("~", "%"))


def fsync(path: Path) -> None:
    """Make a file, or what a folder lists, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
