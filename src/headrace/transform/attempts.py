"""What is being prepared, noted before the work starts: a process that dies of it leaves the note behind.

A note is a small file, made and removed with each part, not synced: whatever ends a process leaves it in the
page cache, and after a power cut nothing is to be blamed.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from headrace.change import Offset

_SUSPECT = 2
"""Deaths from which on changes are tried in a process of their own."""
_KEPT = 100


@dataclass(frozen=True, slots=True)
class _Part:
    """Changes of a model in `[first, last]`, and how many processes have died while they were prepared."""

    model: str
    version: str
    first: Offset
    last: Offset
    deaths: int = 0

    def meets(self, other: _Part) -> bool:
        """Whether the same version of the model has changes in common."""
        same = (self.model, self.version) == (other.model, other.version)
        return same and self.first <= other.last and other.first <= self.last


class Attempts:
    """The notes of one source, in a folder that one process has at a time. Safe to share between threads."""

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        """Count what earlier processes have left behind as deaths; if `read_only`, only know of them."""
        self._folder = folder
        self._read_only = read_only
        self._number = count()
        self._lock = threading.Lock()
        self._counted = folder / "deaths.json"
        self._deaths = self._read()
        if read_only:
            return
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        left = sorted(folder.glob("*.attempt"))
        for path in left:
            with suppress(ValueError, TypeError, OSError):  # cut off while it was written
                self._count(_Part(**json.loads(path.read_text())))
        if left:
            self._write()
        for path in left:
            path.unlink()

    @contextmanager
    def attempt(self, model: str, version: str, changes: pa.Table) -> Iterator[bool]:
        """Note that changes are being prepared; gives whether two processes have died of some of them."""
        if not changes.num_rows:
            yield False
            return
        bounds = pc.min_max(changes["_offset"]).as_py()
        part = _Part(model, version, bounds["min"], bounds["max"])
        suspect = any(known.deaths >= _SUSPECT and known.meets(part) for known in self._deaths)
        if self._read_only:
            yield suspect
            return
        path = self._folder / f"{next(self._number)}.attempt"
        with suppress(OSError):  # a disk that is full is told of where it does harm
            path.write_text(json.dumps(asdict(part)))
        try:
            yield suspect
        finally:
            with suppress(OSError):
                path.unlink()

    def blame(self, model: str, version: str, offsets: Iterable[Offset]) -> None:
        """Note that processes have died of changes in entries of the log, elsewhere: nobody is to try them
        unwarned, a redrive say."""
        with self._lock:
            for offset in offsets:
                self._count(_Part(model, version, offset, offset, _SUSPECT - 1))
            with suppress(OSError):
                self._write()

    def suspects(self, model: str, version: str, after: Offset, through: Offset) -> bool:
        """Whether two processes have died of some of a model's changes in `(after, through]`."""
        part = _Part(model, version, after + 1, through)
        return any(known.deaths >= _SUSPECT and known.meets(part) for known in self._deaths)

    def _count(self, part: _Part) -> None:
        known = [other for other in self._deaths if other.meets(part)]
        deaths = 1 + max(other.deaths for other in (part, *known))
        others = [other for other in self._deaths if other not in known]
        self._deaths = [*others, replace(part, deaths=deaths)][-_KEPT:]

    def _read(self) -> list[_Part]:
        with suppress(OSError, ValueError, TypeError):
            return [_Part(**part) for part in json.loads(self._counted.read_text())]
        return []

    def _write(self) -> None:
        fresh = self._counted.with_suffix(".new")
        fresh.write_text(json.dumps([asdict(part) for part in self._deaths]))
        fresh.replace(self._counted)
