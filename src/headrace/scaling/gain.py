"""Whether more workers bring more throughput: where they do not, something else is the limit.

The rule is that of Flink's autoscaler and of Dhalion: an action that did not help is not repeated.
"""

from __future__ import annotations

from typing import NamedTuple

_SETTLED = 45.0
"""Seconds after workers have joined until throughput is that of all of them."""
_RETRY_AFTER = 1800.0
"""Seconds after which one more raise may be tried, although nothing tells that the limit has gone."""
_SHARE = 0.1
"""Of the throughput that the new workers should have added, at least so much must be seen."""


class GainWatch:
    """Counts raises, one after another, that brought no more throughput while there was work enough."""

    def __init__(self) -> None:
        self._ready = 0
        self._raise: _Raise | None = None  # the one that is to be judged
        self._throughput = 0.0
        self._failures = 0
        self._failed_at = 0.0
        self._failed_with = 0.0

    @property
    def is_watching(self) -> bool:
        """Whether a raise is still to be judged, or has failed: then every tick matters."""
        return self._raise is not None or self._failures > 0

    def note(self, at: float, ready: int, throughput: float, *, is_behind: bool) -> int:
        """Take in one look, and return how many raises have been in vain; Snapshot.raises_without_gain.

        `at` are seconds of any clock that only rises; `throughput` are rows a second since the look before,
        `is_behind` whether there was more work than was done. Where there was not, nothing can be told of
        the raise, and no limit is in the way.
        """
        if not is_behind:
            self._raise, self._failures = None, 0
        elif ready < self._ready:
            self._raise = None
        elif self._raise is not None and at - self._raise.at >= _SETTLED:
            if throughput - self._raise.throughput < _SHARE * self._raise.expected:
                self._failures, self._failed_at = self._failures + 1, at
                self._failed_with = max(throughput, self._raise.throughput)
            else:
                self._failures = 0
            self._raise = None
        elif self._failures and throughput > (1 + _SHARE) * self._failed_with:
            self._failures = 0  # the same workers do more: what held them up has gone
        elif self._failures and self._raise is None and at - self._failed_at >= _RETRY_AFTER:
            self._failures, self._failed_at = self._failures - 1, at
        if is_behind and self._raise is None and ready > self._ready > 0:
            more = self._throughput * (ready - self._ready) / self._ready
            self._raise = _Raise(at, self._throughput, more)
        self._ready, self._throughput = ready, throughput
        return self._failures


class _Raise(NamedTuple):
    at: float  # when its workers were ready; those that joined later only make its judgement milder
    throughput: float  # before
    expected: float  # how much more there should be
