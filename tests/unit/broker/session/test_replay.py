"""Replays count what they say, and more time kept never means more cold starts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.session.histogram import IdleHistogram, Rules
from broker.session.replay import DAY, Replayed, fixed, hybrid, replay, standard


def test_a_use_is_cold_when_nothing_is_warm() -> None:
    users = {"ann": [0, 10, 25], "bob": [100]}
    assert replay("f", fixed(10), users) == Replayed("f", 2, 4, 3, 1.0, 9 + 10 + 10 + 10)
    assert replay("f", fixed(15), users) == Replayed("f", 2, 4, 2, 1.0, 9 + 14 + 15 + 15)
    assert replay("f", fixed(10), users, until=102).idle == 9 + 10 + 10 + 1
    assert replay("f", fixed(0), users) == Replayed("f", 2, 4, 4, 1.0, 0)
    assert replay("f", fixed(10), {}) == Replayed("f", 0, 0, 0, 0.0, 0)
    assert replay("f", fixed(10), {}).cold_share == 0


def test_a_late_window_is_warm_only_then() -> None:
    late = replay("late", lambda histogram: (8, 12), {"ann": [0, 10, 17, 30]}, until=31)
    assert (late.cold, late.idle) == (3, 2 + 0 + 5 + 0)


def test_the_hybrid_learns_when_somebody_comes_back() -> None:
    minutes = list(range(0, DAY, 45))
    learnt = replay("hybrid", hybrid(10), {"ann": minutes})
    kept = replay("fixed", fixed(60), {"ann": minutes})
    # Cold until there are samples enough, then never; and warm for a few minutes of each 45.
    assert learnt.cold == 1 + Rules().least
    assert kept.cold == 1
    assert learnt.idle < kept.idle / 4


def test_a_day_weighs_less_than_the_next() -> None:
    weights = []

    def policy(histogram: IdleHistogram) -> tuple[int, int]:
        weights.append(histogram.weight)
        return 0, 0

    replay("seen", policy, {"ann": [0, 10, DAY + 10, 3 * DAY]})
    assert weights == [0, 1, 0.85 + 1, pytest.approx(1.85 * 0.85**2 + 1)]


def test_nothing_is_let_go_for_less_than_a_rest() -> None:
    often = IdleHistogram()
    for _ in range(5):
        often.add(9.0)
    seldom = IdleHistogram()
    for _ in range(5):
        seldom.add(45.0)
    assert hybrid()(often) == (8, 11)
    assert hybrid(rest=10)(often) == (0, 11)
    assert hybrid(rest=10)(seldom) == hybrid()(seldom) == (40, 51)


def test_the_hybrid_falls_back_without_a_pattern() -> None:
    assert hybrid(7)(IdleHistogram()) == (0, 7)
    assert list(standard(7)) == [
        *("fixed 10 min", "fixed 20 min", "fixed 60 min", "hybrid, else 7 min"),
        "the same, rests of 10 min at least",
    ]


USERS = st.dictionaries(st.sampled_from("abc"), st.sets(st.integers(0, 3 * DAY), max_size=60).map(sorted), max_size=3)


@given(USERS, st.integers(0, 300), st.integers(0, 300))
def test_keeping_longer_is_never_colder_and_never_cheaper(users: dict[str, list[int]], one: int, two: int) -> None:
    short, long = (replay("f", fixed(keep), users) for keep in sorted((one, two)))
    assert long.cold <= short.cold
    assert long.idle >= short.idle
    assert short.uses == long.uses == sum(map(len, users.values()))


@given(USERS)
def test_every_policy_stays_in_bounds(users: dict[str, list[int]]) -> None:
    for name, policy in standard().items():
        found = replay(name, policy, users)
        firsts = sum(1 for minutes in users.values() if minutes)
        assert firsts <= found.cold <= found.uses
        assert 0 <= found.idle <= firsts * 4 * DAY
        assert 0 <= found.cold_p75 <= 1
