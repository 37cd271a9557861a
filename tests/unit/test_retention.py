"""What may be deleted, and which ends of groups stay behind."""

from __future__ import annotations

from itertools import accumulate, pairwise

from hypothesis import given
from hypothesis import strategies as st

from headrace.log.retention import STOP_BYTES, STOP_ROWS, Kept, decide, thinned


def kept(old: int = 90, used: int = 80, hold_max: int = 1000, **consumers: tuple[int, int]) -> Kept:
    offsets = {name: offset for name, (offset, _) in consumers.items()}
    return Kept(old, used, offsets, {name: size for name, (_, size) in consumers.items()}, hold_max)


def test_nothing_goes_that_is_young_or_in_use() -> None:
    assert decide(kept(old=90, used=80)).through == 80
    assert decide(kept(old=10, used=80)).through == 10


def test_a_consumer_holds_what_it_has_not_read() -> None:
    trim = decide(kept(reports=(50, 400)))
    assert (trim.through, trim.lost, trim.slow) == (50, (), ())


def test_a_slow_consumer_is_told_of_before_it_is_lost() -> None:
    trim = decide(kept(a=(50, 501), b=(60, 500), c=(40, 1000)))
    assert (trim.through, trim.lost, trim.slow) == (40, (), ("a", "c"))


def test_a_consumer_that_holds_too_much_is_lost_and_holds_nothing() -> None:
    trim = decide(kept(reports=(5, 1001), other=(70, 10)))
    assert (trim.through, trim.lost, trim.slow) == (70, ("reports",), ())


GROUPS = st.lists(
    st.tuples(st.integers(0, STOP_ROWS * 2), st.integers(0, STOP_BYTES * 2), st.booleans()),
    min_size=1,
    max_size=30,
)


@given(
    groups=GROUPS,
    former=st.none() | st.tuples(st.integers(0, STOP_ROWS), st.integers(0, STOP_BYTES)),
)
def test_stops_lose_no_row_and_are_no_further_apart_than_a_slice(
    groups: list[tuple[int, int, bool]], former: tuple[int, int] | None
) -> None:
    rows = list(accumulate(rows for rows, _, _ in groups))
    sizes = list(accumulate(size for _, size, _ in groups))
    ends = [(at, b"", 0, 0, 0, 0, 0, *sums) for at, sums in enumerate(zip(rows, sizes, strict=True), 1)]
    pinned = {at for at, (_, _, pin) in enumerate(groups, 1) if pin}
    stops, absorbed = thinned(ends, former, pinned)
    offsets = [int(stop[0]) for stop in stops]  # type: ignore[call-overload]
    assert offsets == sorted(set(offsets))
    assert offsets[-1] == len(groups)
    assert pinned <= set(offsets)
    before = former if former and absorbed else (0, 0)
    assert sum(int(stop[-2]) for stop in stops) == rows[-1] + before[0]  # type: ignore[call-overload]
    assert sum(int(stop[-1]) for stop in stops) == sizes[-1] + before[1]  # type: ignore[call-overload]
    assert former or not absorbed, "one that has to stay is not absorbed"
    for after, stop in pairwise([0, *offsets]):
        span = groups[after:stop]
        within = sum(g[0] for g in span) <= STOP_ROWS and sum(g[1] for g in span) <= STOP_BYTES
        assert within or len(span) == 1, "only a single group may be larger"
