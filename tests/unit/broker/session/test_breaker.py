from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from broker.session.breaker import Breaker, Patience

PATIENCE = Patience(backoff_s=1.0, failures=3, open_s=60.0)


def fail(breaker: Breaker, now: float, *, chance: float = 1.0, lasting: bool = False) -> None:
    breaker.failed(now, "no room", PATIENCE, chance=chance, lasting=lasting)


def test_pauses_double_until_it_opens() -> None:
    breaker = Breaker()
    assert (breaker.state(0.0), breaker.limit(0.0)) == ("closed", None)
    fail(breaker, 0.0)
    assert (breaker.state(0.5), breaker.limit(0.999), breaker.limit(1.0)) == ("closed", 0, 1)
    fail(breaker, 1.0)
    assert (breaker.limit(2.999), breaker.limit(3.0)) == (0, 1)
    fail(breaker, 3.0)
    assert (breaker.state(3.0), breaker.limit(62.999)) == ("open", 0)
    assert (breaker.state(63.0), breaker.limit(63.0)) == ("half_open", 1)


def test_one_success_closes_it_and_one_failure_opens_it_again() -> None:
    breaker = Breaker()
    for _ in range(3):
        fail(breaker, 0.0)
    fail(breaker, 60.0)
    assert (breaker.state(119.9), breaker.state(120.0)) == ("open", "half_open")
    breaker.reset()
    assert (breaker.state(120.0), breaker.limit(120.0), breaker.failures, breaker.error) == ("closed", None, 0, "")


def test_what_will_not_get_better_opens_it_at_once() -> None:
    breaker = Breaker()
    fail(breaker, 5.0, lasting=True)
    assert (breaker.state(5.0), breaker.until) == ("open", 65.0)


def test_those_that_were_under_way_when_it_opened_do_not_keep_it_open() -> None:
    breaker = Breaker()
    for now in (0.0, 0.0, 0.0, 30.0, 59.0):
        fail(breaker, now)
    assert breaker.limit(60.0) == 1


@given(st.floats(0, 1))
def test_a_pause_is_between_half_of_it_and_all_of_it(chance: float) -> None:
    breaker = Breaker()
    fail(breaker, 10.0, chance=chance)
    assert 10.5 <= breaker.until <= 11.0


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 1), st.booleans()), max_size=50))
def test_however_often_it_fails_a_try_is_never_further_than_the_open_time_and_is_one_at_a_time(
    steps: list[tuple[float, float, bool]],
) -> None:
    breaker, now = Breaker(), 0.0
    for step, chance, lasting in steps:
        now += step
        fail(breaker, now, chance=chance, lasting=lasting)
        assert now < breaker.until <= now + PATIENCE.open_s
        assert breaker.limit(now) == 0
        assert breaker.limit(breaker.until) == 1
        assert breaker.state(breaker.until) in ("closed", "half_open")
