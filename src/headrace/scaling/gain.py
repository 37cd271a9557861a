"""Whether more workers bring more throughput: where they do not, something else is the limit.

The rule is that of Flink's autoscaler and of Dhalion: an action that did not help is not repeated.
"""

from __future__ import annotations

_SETTLED = 45.0
"""Seconds after workers have joined until throughput is that of all of them."""
_RETRY_AFTER = 600.0
"""Seconds after which one more raise may be tried: the limit may have gone."""
_SHARE = 0.1
"""Of the throughput that the new workers should have added, at least so much must be seen."""


class GainWatch:
    """Counts raises, one after another, that brought no more throughput while there was work enough."""

    def __init__(self) -> None:
        self._ready = 0
        self._before: tuple[int, float] | None = None  # workers and throughput before the raise in question
        self._joined_at = 0.0
        self._throughput = 0.0
        self._failures = 0
        self._failed_at = 0.0

    @property
    def is_watching(self) -> bool:
        """Whether a raise is still to be judged, or has failed: then every tick matters."""
        return self._before is not None or self._failures > 0

    def note(self, at: float, ready: int, throughput: float, *, is_behind: bool) -> int:
        """Take in one look, and return how many raises have been in vain; Snapshot.raises_without_gain.

        `at` are seconds of any clock that only rises; `throughput` are rows a second since the look before,
        `is_behind` whether there was more work than was done. Where there was not, nothing can be told of
        the raise, and no limit is in the way.
        """
        if not is_behind:
            self._before, self._failures = None, 0
        elif ready > self._ready > 0:
            if self._before is None:
                self._before = (self._ready, self._throughput)
            self._joined_at = at
        elif ready < self._ready:
            self._before = None
        elif self._before is not None and at - self._joined_at >= _SETTLED:
            workers, base = self._before
            expected = base * (ready - workers) / workers
            if throughput - base < _SHARE * expected:
                self._failures, self._failed_at = self._failures + 1, at
            else:
                self._failures = 0
            self._before = None
        elif self._failures and self._before is None and at - self._failed_at >= _RETRY_AFTER:
            self._failures, self._failed_at = self._failures - 1, at
        self._ready, self._throughput = ready, throughput
        return self._failures
