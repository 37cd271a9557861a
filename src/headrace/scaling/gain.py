"""Whether more workers bring more throughput: where they do not, something else is the limit.

The rule is that of Flink's autoscaler and of Dhalion: an action that did not help is not repeated.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

_SETTLED = 45.0
"""Seconds after workers have joined until throughput is that of all of them."""
_WINDOW = 30.0
"""Seconds over which throughput is seen: work comes in parts and slices, and one look may have none."""
_RETRY_AFTER = 1800.0
"""Seconds after which one more raise may be tried, although nothing tells that the limit has gone."""
_SHARE = 0.1
"""Of the throughput that the new workers should have added, at least so much must be seen."""


class GainWatch:
    """Counts raises, one after another, that brought no more throughput while there was work enough.

    Throughput is in work-seconds a second, so that a worker should add 1, whatever there was before it.
    """

    def __init__(self) -> None:
        self._at: float | None = None
        self._ready = 0
        self._raise: _Raise | None = None  # the one that is to be judged
        self._seen = deque[_Look]()  # of the last seconds, since it was behind with no fewer workers
        self._failures = 0
        self._failed_at = 0.0
        self._failed_with = 0.0

    @property
    def is_watching(self) -> bool:
        """Whether a raise is still to be judged, or has failed: then every tick matters, and what a row
        counts must stay the same."""
        return self._raise is not None or self._failures > 0

    def note(self, at: float, ready: int, throughput: float, *, is_behind: bool, own: float = 0.0) -> int:
        """Take in one look, and return how many raises have been in vain; Snapshot.raises_without_gain.

        `at` are seconds of any clock that only rises; `throughput` is that since the look before,
        `is_behind` whether there was more work than was done. Where there was not, nothing can be told of
        the raise, and no limit is in the way. `own` is what the main process does by itself.
        """
        if not is_behind:
            self._raise, self._failures = None, 0
            self._seen.clear()
        elif ready < self._ready:
            self._raise = None
            self._seen.clear()
        elif ready > self._ready and self._raise is None and self._seen:
            # What comes in large slices may have come just now: it was never more than there were hands for.
            before = min(self._throughput, self._ready + own)
            self._raise = _Raise(at, before, ready - self._ready)
        if is_behind and self._at is not None and at > self._at:
            self._seen.append(_Look(at, at - self._at, throughput))
            while self._seen[0].at <= at - _WINDOW:
                self._seen.popleft()
            self._judge(at)
        self._at, self._ready = at, ready
        return self._failures

    @property
    def _throughput(self) -> float:
        seconds = sum(look.seconds for look in self._seen)
        return sum(look.seconds * look.throughput for look in self._seen) / seconds

    def _judge(self, at: float) -> None:
        if self._raise is not None and at - self._raise.at >= _SETTLED:
            if self._throughput - self._raise.throughput < _SHARE * self._raise.workers:
                self._failures, self._failed_at = self._failures + 1, at
                self._failed_with = max(self._throughput, self._raise.throughput)
            else:
                self._failures = 0
            self._raise = None
        elif self._failures and self._throughput > (1 + _SHARE) * self._failed_with:
            self._failures = 0  # the same workers do more: what held them up has gone
        elif self._failures and self._raise is None and at - self._failed_at >= _RETRY_AFTER:
            self._failures, self._failed_at = self._failures - 1, at


class _Look(NamedTuple):
    at: float
    seconds: float
    throughput: float


class _Raise(NamedTuple):
    at: float  # when its workers were ready; those that joined later only make its judgement milder
    throughput: float  # before
    workers: int  # that joined
