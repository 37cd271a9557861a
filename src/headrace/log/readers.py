"""Projects that read another one's staging: at which places of its log they stand, a small file for each.

A reader holds nothing: neither entries of the log nor files of staging, in which no change is ever deleted.
What it needs of the log are marks, those of the places at which its models stand; retention keeps a stop
there, which is a row, whatever becomes of the entries. So a reader that stands still, or is gone without a
word, costs its writer nothing. Its file counts for `KEEP` seconds after it was last written.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from headrace.change import Offset

KEEP = 30 * 86_400.0
_MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Reader:
    """A project that reads: its folder, the log, the offsets at which it stands, and when it said so
    (microseconds since 1970)."""

    project: str
    log_id: str
    stops: tuple[Offset, ...]
    seen_at: int


class Readers:
    """The readers of one log, in a folder beside it, which they write and retention reads."""

    def __init__(self, log: Path) -> None:
        """`log` is the log's file; the folder is `SOURCE.readers` beside it, and need not exist."""
        self.folder = log.with_suffix(".readers")

    def all(self) -> list[Reader]:
        """Return the readers that count, by project; a file that does not read is of none."""
        found = []
        oldest = time.time() - KEEP
        for path in sorted(self.folder.glob("*.json")):
            with suppress(OSError, ValueError, KeyError, TypeError):
                status = path.stat()
                if status.st_mtime >= oldest and status.st_size <= _MAX_BYTES:
                    raw = json.loads(path.read_bytes())
                    stops = tuple(int(stop) for stop in raw["stops"])
                    found.append(
                        Reader(str(raw["project"]), str(raw["log_id"]), stops, int(status.st_mtime * 1e6))
                    )
        return sorted(found, key=lambda reader: reader.project)

    def pinned(self, log_id: str) -> Iterator[Offset]:
        """Yield the offsets at which readers of a log stand."""
        for reader in self.all():
            if reader.log_id == log_id:
                yield from reader.stops

    def pin(self, project: Path, log_id: str, stops: Iterable[Offset]) -> None:
        """Say where a project stands now. Raises OSError where the folder cannot be written."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        name = hashlib.blake2b(os.fsencode(project), digest_size=8).hexdigest()
        making = self.folder / f"{name}.{os.getpid()}.new"
        making.write_text(
            json.dumps({"project": str(project), "log_id": log_id, "stops": sorted(set(stops))})
        )
        making.rename(self.folder / f"{name}.json")
