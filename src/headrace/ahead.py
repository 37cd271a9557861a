"""Preparing the next part while the one before is applied."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import Executor, Future

from headrace.protocols import Part

_LARGE_PART = 64 << 20


def ahead(preparer: Executor, parts: Iterator[Part]) -> Generator[Part]:
    """Yield parts, each of which is prepared while the one before is taken, unless that is a large one.

    Nothing is prepared any more once this is closed.
    """
    following: Future[Part | None] | None = None
    try:
        while True:
            following = following or preparer.submit(next, parts, None)
            if (part := following.result()) is None:
                return
            small = part.prepared.rows.nbytes <= _LARGE_PART
            following = preparer.submit(next, parts, None) if small else None
            yield part
            del part
    finally:
        if following is not None:
            following.exception()
