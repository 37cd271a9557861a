"""Noting a log's head elsewhere on a schedule: in a file and by a webhook, each by itself.

Where it fails it is tried again there alone, with the head of that time, after waits that grow; it is told
once, and once when it works again. What is told quotes no address: there may be a token in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from headrace.alarms import resolve, trigger
from headrace.change import Offset
from headrace.config import LogConfig, Secret
from headrace.log.proof import Anchor, Chained, anchor, append_anchor
from headrace.posting import PostFailed, post

_FIRST_PAUSE = 10.0
_LONGEST_PAUSE = 600.0


class _UndeliveredError(Exception):
    """An anchor did not arrive; says why, without the address."""


@dataclass(slots=True)
class _Place:
    """Where anchors go: the setting that names it, and the last offset that it holds.

    `due` is when it is next delivered to, `pause` the last wait after a failure, 0 while it works.
    """

    setting: str
    deliver: Callable[[Anchor], None]
    holds: Offset = 0
    due: float = 0.0
    pause: float = 0.0


class Anchoring:
    """Delivers the heads of one log."""

    def __init__(self, log: Chained, config: LogConfig) -> None:
        self._log = log
        self._every = config.anchor_every
        self._key = config.anchor_key.reveal() if config.anchor_key else ""
        self._places: list[_Place] = []
        if self._every and config.anchor_file is not None:
            self._places.append(_Place("anchor_file", partial(_append, config.anchor_file)))
        if self._every and config.anchor_url is not None:
            self._places.append(_Place("anchor_url", partial(_post, config.anchor_url)))

    def step(self, now: float) -> None:
        """Deliver the head where it is due; `now` is in seconds of a clock that only goes on.

        Raises what the log raises; what cannot be delivered is told, and tried again.
        """
        due = [place for place in self._places if now >= place.due]
        if not due or not self._log.end().offset:
            return
        made = anchor(self._log, self._key)
        for place in due:
            try:
                if made.offset != place.holds:
                    place.deliver(made)
            except _UndeliveredError as error:
                self._put_off(place, now, str(error))
            else:
                self._delivered(place, now, made.offset)

    def _put_off(self, place: _Place, now: float, why: str) -> None:
        if not place.pause:
            trigger(
                "anchor", f"{self._log.source}.{place.setting}",
                "ANCHOR of %s could not be delivered to %s: %s. It is tried again until it works.",
                self._log.source, place.setting, why, source=self._log.source,
            )  # fmt: skip
        place.pause = min(place.pause * 2 or _FIRST_PAUSE, _LONGEST_PAUSE)
        place.due = now + place.pause

    def _delivered(self, place: _Place, now: float, offset: Offset) -> None:
        if place.pause:
            resolve(
                "anchor", f"{self._log.source}.{place.setting}",
                "RESOLVED ANCHOR of %s: offset %d is delivered to %s",
                self._log.source, offset, place.setting, source=self._log.source,
            )  # fmt: skip
        place.holds, place.due, place.pause = offset, now + self._every, 0.0


def _append(path: Path, made: Anchor) -> None:
    try:
        append_anchor(path, made)
    except OSError as error:
        raise _UndeliveredError(f"{path} cannot be written, {error.strerror}") from None


def _post(url: Secret, made: Anchor) -> None:
    try:
        post(url, made.to_json().encode(), {"Content-Type": "application/json"})
    except PostFailed as error:
        raise _UndeliveredError(str(error)) from None
