"""Whom to expect, how long to keep what is theirs, and whom to choose when there is not room for all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.session.activity import DAY, HOUR, Pattern, pattern_of
from broker.session.forecast import (
    LEAST_KEEP,
    SLACK,
    Expected,
    Outlook,
    choose,
    expected,
    keep_for,
)
from broker.store.activity import Tally
from tests.unit.broker.session.test_activity import MONDAY, days, use

OUTLOOK = Outlook(lead=120, longest=3600)


def every(minutes: float, times: int, begin: float = MONDAY * HOUR) -> list[Tally]:
    return [use(begin + number * minutes * 60) for number in range(times)]


def test_who_comes_at_the_same_hour_is_expected_a_lead_before_it() -> None:
    pattern = pattern_of("ann", days(*range(10)))
    comes = float((MONDAY + 240 + 9) * HOUR + 5 * 60)
    assert expected(pattern, comes - 121, OUTLOOK) is None
    found = expected(pattern, comes - 120, OUTLOOK)
    assert found is not None
    assert (found.start, found.end, found.source) == (comes, comes + 60 + SLACK, "hour_of_week")
    assert 0 < found.probability < pattern.probability(MONDAY + 249)
    late = expected(pattern, comes + 60 + SLACK - 1, OUTLOOK)
    assert late is not None
    assert late.probability == pytest.approx(pattern.probability(MONDAY + 249)), "all that is left lies in the lead"
    assert expected(pattern, comes + 60 + SLACK, OUTLOOK) is None


def test_the_lead_reaches_into_the_next_hour() -> None:
    pattern = pattern_of("ann", days(*range(10), minute=0))
    comes = (MONDAY + 240 + 9) * HOUR
    found = expected(pattern, comes - 60, OUTLOOK)
    assert found is not None
    assert found.start == comes


def test_who_is_there_already_is_not_expected() -> None:
    pattern = pattern_of("ann", [*days(*range(10)), use((MONDAY + 249) * HOUR)])
    assert expected(pattern, (MONDAY + 249) * HOUR + 250, OUTLOOK) is None


def test_what_is_unlikely_is_not_acted_on() -> None:
    assert expected(pattern_of("ann", days(0)), (MONDAY + 24 + 9) * HOUR + 290, OUTLOOK) is None
    pattern = pattern_of("ann", days(*range(10)))
    at = (MONDAY + 249) * HOUR + 290
    assert expected(pattern, at, OUTLOOK) is not None
    assert expected(pattern, at, Outlook(120, 3600, faith=0.5)) is None


def test_who_comes_back_after_the_same_time_is_expected_then() -> None:
    pattern = pattern_of("ann", every(45, 8))
    last = MONDAY * HOUR + 7 * 45 * 60
    # Off the hours at which they used to be there, so that those say nothing.
    start = last + 0.9 * 45 * 60
    assert expected(pattern, start - 121, OUTLOOK) is None
    found = expected(pattern, start - 120, OUTLOOK)
    assert found is not None
    assert found.source == "histogram"
    assert (found.start, found.end) == pytest.approx((start, last + 1.1 * 46 * 60))
    late = expected(pattern, last + 44 * 60, OUTLOOK)
    assert late is not None
    assert late.probability == 1
    assert expected(pattern, last + 1.1 * 46 * 60 + 1, OUTLOOK) is None


def test_who_comes_back_soon_is_kept_and_not_expected() -> None:
    pattern = pattern_of("ann", every(5, 20))
    assert expected(pattern, MONDAY * HOUR + 19 * 300 + 290, OUTLOOK) is None
    assert keep_for(pattern, prepared=True) == keep_for(pattern, prepared=False) == pytest.approx(1.1 * 6 * 60)


def test_who_comes_back_late_is_let_go_when_a_sandbox_will_be_there_again() -> None:
    pattern = pattern_of("ann", every(45, 8))
    assert keep_for(pattern, prepared=True) == LEAST_KEEP
    assert keep_for(pattern, prepared=False) == pytest.approx(1.1 * 46 * 60)


def test_who_stays_away_for_hours_has_no_pattern_to_keep_by() -> None:
    pattern = pattern_of("ann", every(300, 6))
    assert keep_for(pattern, prepared=False) is None
    assert keep_for(pattern, prepared=True) == LEAST_KEEP
    last = MONDAY * HOUR + 5 * 300 * 60
    found = expected(pattern, last + 300 * 60, OUTLOOK)
    assert found is not None
    assert (found.source, found.start) == ("recent", last + 0.85 * 300 * 60)
    assert found.end == found.start + OUTLOOK.longest, "never longer than that"


def test_without_a_pattern_nothing_is_said() -> None:
    assert expected(Pattern("ann"), 1e9, OUTLOOK) is None
    assert keep_for(Pattern("ann"), prepared=True) is None


TIMES = st.lists(st.integers(DAY, 20 * DAY), max_size=40).map(sorted)


@given(TIMES, st.integers(0, 21 * DAY), st.floats(0, 3000), st.floats(60, 7200), st.floats(0, 1))
def test_a_forecast_is_in_order_and_bounded(
    times: list[int], now: int, lead: float, longest: float, faith: float
) -> None:
    pattern = pattern_of("ann", [use(at) for at in times])
    found = expected(pattern, now, Outlook(lead, longest, faith))
    if found is not None:
        assert found.start - lead <= now < found.end <= found.start + longest
        assert 0 <= found.probability <= faith
    kept = keep_for(pattern, prepared=False)
    assert kept is None or kept >= 0
    prepared = keep_for(pattern, prepared=True)
    assert prepared is None or prepared >= 0


CANDIDATES = st.lists(
    st.builds(
        Expected,
        st.integers(0, 50).map(str),
        st.floats(0, 100),
        st.floats(100, 200),
        st.floats(0, 1),
        st.just("histogram"),
    ),
    max_size=20,
    unique_by=lambda one: one.user,
)


@given(CANDIDATES, st.integers(-5, 300), st.integers(0, 10))
def test_a_choice_fits_and_forgets_nobody(candidates: list[Expected], room: int, most: int) -> None:
    def size(user: str) -> int:
        return 10 + int(user)

    choice = choose(candidates, size, room=room, most=most)
    assert sorted(one.user for one in (*choice.chosen, *choice.left_out)) == sorted(one.user for one in candidates)
    assert len(choice.chosen) <= most
    assert sum(size(one.user) for one in choice.chosen) <= max(0, room)
    more = choose(candidates, size, room=room + 1000, most=20)
    assert {one.user for one in choice.chosen} <= {one.user for one in more.chosen}
    if choice.left_out and len(choice.chosen) < most:
        left = room - sum(size(one.user) for one in choice.chosen)
        assert all(size(one.user) > left for one in choice.left_out), "whoever fits is chosen"


def test_the_likeliest_for_their_size_go_first() -> None:
    candidates = [
        Expected("big", 0, 9, 0.9, "histogram"),
        Expected("small", 0, 9, 0.5, "histogram"),
        Expected("unlikely", 0, 9, 0.1, "histogram"),
    ]
    sizes = {"big": 300, "small": 100, "unlikely": 100}
    choice = choose(candidates, sizes.__getitem__, room=250, most=9)
    assert [one.user for one in choice.chosen] == ["small", "unlikely"]
    assert [one.user for one in choose(candidates, sizes.__getitem__, room=400, most=9).chosen] == ["small", "big"]


def test_a_sandbox_that_is_there_gives_way_only_to_somebody_much_likelier() -> None:
    for probability, chosen in ((0.5, "here"), (0.7, "new")):
        candidates = [Expected("here", 0, 9, 0.3, "histogram"), Expected("new", 0, 9, probability, "histogram")]
        choice = choose(candidates, lambda user: 100, room=150, most=9, ready={"here"})
        assert [one.user for one in choice.chosen] == [chosen]
