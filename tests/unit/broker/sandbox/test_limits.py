"""The token bucket, whatever the clock does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from broker.sandbox.limits import TokenBucket

RATES = st.floats(0.01, 1000)
BURSTS = st.integers(1, 1000)
STEPS = st.lists(st.floats(0, 100), max_size=60)


@given(RATES, BURSTS, STEPS)
def test_never_more_than_the_burst_and_what_time_gave(rate: float, burst: int, steps: list[float]) -> None:
    bucket, now, given_out = TokenBucket(burst, rate), 5.0, 0
    for step in steps:
        now += step
        while bucket.take(now):
            given_out += 1
            assert given_out <= burst + rate * (now - 5.0) + 0.001


@given(RATES, BURSTS, STEPS)
def test_after_exactly_the_wait_there_is_a_token(rate: float, burst: int, steps: list[float]) -> None:
    bucket, now = TokenBucket(burst, rate), 5.0
    for step in steps:
        now += step
        while bucket.take(now):
            pass
        now += bucket.wait(now)
        assert bucket.whole(now) >= 1
        assert bucket.wait(now) == 0.0
        assert bucket.take(now)


@given(RATES, BURSTS, STEPS)
def test_so_many_as_are_told_can_be_taken(rate: float, burst: int, steps: list[float]) -> None:
    bucket, now = TokenBucket(burst, rate), 5.0
    for step in steps:
        now += step
        told = bucket.whole(now)
        assert told <= burst
        assert [bucket.take(now) for _ in range(told + 1)] == [True] * told + [False]


@given(RATES, BURSTS, RATES, BURSTS)
def test_other_limits_take_nothing_away_that_fits_and_give_nothing(
    rate: float, burst: int, other_rate: float, other_burst: int
) -> None:
    bucket = TokenBucket(burst, rate)
    bucket.take(5.0)
    bucket.configure(other_burst, other_rate, 5.0)
    assert bucket.whole(5.0) == min(burst - 1, other_burst)


def test_a_clock_that_goes_back_gives_nothing() -> None:
    bucket = TokenBucket(1, 1)
    assert bucket.take(100.0)
    assert not bucket.take(50.0)
    assert not bucket.take(50.5)
    assert bucket.take(51.0)
