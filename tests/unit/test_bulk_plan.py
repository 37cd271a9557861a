"""When a slot is read in bulk, and how far: a decision about numbers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.sources.postgres.bulk import FIRST_CHUNK, UNMEASURED, WORTHWHILE, Standing, plan

MIB = 1 << 20
GIB = 1 << 30
START = 5 * GIB


def standing(behind: int, again: int = 0) -> Standing:
    return Standing(restart=START - again, confirmed=START, end=START + behind)


def chunk(
    at: Standing,
    temp_max: int = GIB,
    ratio: float | None = 1.0,
    *,
    in_vain: int = 0,
    held: bool = False,
) -> int | None:
    upto = plan(at, temp_max, ratio, in_vain=in_vain, held=held)
    return None if upto is None else upto - at.confirmed


def test_near_the_head_the_slot_is_streamed() -> None:
    assert chunk(standing(WORTHWHILE - 1)) is None
    assert chunk(standing(WORTHWHILE)) == WORTHWHILE


def test_one_peek_takes_all_that_fits() -> None:
    assert chunk(standing(700 * MIB)) == 700 * MIB
    assert chunk(standing(5 * GIB)) == GIB


def test_a_result_stays_within_the_space_that_the_source_may_give() -> None:
    assert chunk(standing(5 * GIB), ratio=4.0) == GIB // 4
    assert chunk(standing(5 * GIB, again=200 * MIB)) == GIB - 200 * MIB, "old rows may be in the result too"
    assert chunk(standing(5 * GIB), temp_max=0) is None
    assert chunk(standing(5 * GIB), ratio=100.0) is None, "so large a result for so little WAL"


def test_the_first_peek_is_small_and_tells_the_ratio() -> None:
    assert chunk(standing(5 * GIB), ratio=None) == FIRST_CHUNK
    assert chunk(standing(40 * MIB), ratio=None) == 40 * MIB


def test_a_peek_in_vain_is_followed_by_a_much_longer_one_or_none() -> None:
    """A transaction larger than the chunk has not committed in it."""
    assert chunk(standing(5 * GIB), ratio=None, in_vain=FIRST_CHUNK) == GIB // UNMEASURED
    assert chunk(standing(100 * MIB), ratio=None, in_vain=FIRST_CHUNK) is None
    assert chunk(standing(5 * GIB), in_vain=GIB) is None


def test_where_the_server_holds_the_bound_old_rows_need_no_room() -> None:
    assert chunk(standing(5 * GIB, again=GIB), held=True) == GIB
    assert chunk(standing(100 * MIB), ratio=None, held=True) == 100 * MIB, "no way has to be felt"
    assert chunk(standing(5 * GIB), ratio=None, held=True) == FIRST_CHUNK, "others have work the sooner"
    assert chunk(standing(400 * MIB), ratio=None, in_vain=FIRST_CHUNK, held=True) == 400 * MIB


def test_nothing_is_peeked_at_where_much_more_is_decoded_again_than_read() -> None:
    assert chunk(standing(100 * MIB, again=200 * MIB)) == 100 * MIB
    assert chunk(standing(100 * MIB, again=202 * MIB)) is None
    assert chunk(standing(5 * GIB, again=700 * MIB)) is None, "324 MiB of room are left"


@given(
    st.integers(0, 64 * GIB),
    st.integers(0, 4 * GIB),
    st.integers(0, 4 * GIB),
    st.none() | st.floats(0.5, 50),
    st.integers(0, 2 * GIB),
    st.booleans(),
)
def test_bounds_hold_for_all_numbers(
    behind: int, again: int, temp_max: int, ratio: float | None, in_vain: int, held: bool
) -> None:
    length = chunk(standing(behind, again), temp_max, ratio, in_vain=in_vain, held=held)
    if length is not None:
        assert WORTHWHILE <= length <= behind
        assert 2 * length >= again - 1
        assert length >= 2 * in_vain
        assert (length if held else again + length) * (ratio or UNMEASURED) <= temp_max + 1


@given(st.integers(0, 64 * GIB), st.integers(0, 2 * GIB), st.integers(64 * MIB, 4 * GIB), st.booleans())
def test_a_long_transaction_does_not_make_it_quadratic(
    backlog: int, again: int, temp_max: int, held: bool
) -> None:
    """Where `restart` never moves, all peeks together decode at most three times what they read."""
    restart, confirmed, end = START - again, START, START + backlog
    decoded = 0
    while (upto := plan(Standing(restart, confirmed, end), temp_max, 1.0, held=held)) is not None:
        decoded += upto - restart
        confirmed = upto
    assert decoded <= 3 * (confirmed - START) + 3
