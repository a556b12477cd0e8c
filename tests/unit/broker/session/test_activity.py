"""One user's pattern: hours of the week, arrivals, times away, leads; whatever the clock does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.session.activity import (
    DAY,
    HOUR,
    WEEK_HOURS,
    Arrival,
    Hour,
    Leads,
    Pattern,
    by_hour_of_week,
    hour_of_week,
    pattern_of,
    peaks,
    quiet,
)
from broker.store.activity import Tally

MONDAY = 1_700_438_400 // HOUR
"""Monday, 20 November 2023, 00:00 UTC."""


def use(at: float, kind: str = "request", last: float | None = None) -> Tally:
    minute, second = divmod(int(at), 60)
    return Tally(minute, second, kind, "ann", 1, second if last is None else int(last))


def days(*numbers: int, hour: int = 9, minute: int = 5) -> list[Tally]:
    """A use a day at the same time, by day after that Monday."""
    return [use((MONDAY + 24 * day + hour) * HOUR + minute * 60) for day in sorted(numbers)]


def test_the_week_begins_on_monday() -> None:
    assert hour_of_week(MONDAY) == 0
    assert hour_of_week(MONDAY - 1) == WEEK_HOURS - 1
    assert hour_of_week(MONDAY + 24 * 2 + 13) == 2 * 24 + 13


@given(st.integers(0, 10**6))
def test_a_week_later_it_is_the_same_hour(hour: int) -> None:
    assert 0 <= hour_of_week(hour) == hour_of_week(hour + WEEK_HOURS) < WEEK_HOURS


def test_arrivals_and_times_away() -> None:
    pattern = Pattern("ann")
    assert pattern.feed(use(6000)) is None, "who was never there was not away"
    assert pattern.feed(use(6030, "end", last=50)) is None, "less than a minute is the same use"
    assert pattern.feed(use(6650)) == Arrival("ann", 6650.0, 6650.0 - 6050, False)
    assert (pattern.idle.weight, pattern.idle.bins()[10]) == (1, 1)
    assert (pattern.first_use, pattern.last_use) == (6000, 6650)


def test_a_later_day_weighs_more() -> None:
    pattern = pattern_of("ann", [use(60), use(660), use(DAY + 600), use(DAY + 1800)])
    assert pattern.idle.bins()[10] == pytest.approx(0.85)
    assert pattern.idle.bins()[20] == 1


def test_what_comes_late_counts_for_its_hour_only() -> None:
    pattern = pattern_of("ann", [use(HOUR * 2), use(HOUR * 2 - 600)])
    assert set(pattern.hours) == {1, 2}
    assert (pattern.idle.weight, pattern.last_use) == (0, HOUR * 2)


def test_a_clock_that_was_a_day_ahead_is_left_behind() -> None:
    pattern = pattern_of("ann", [use(DAY * 10), use(DAY * 11), use(DAY * 10 + 60)])
    assert pattern.last_use == DAY * 10 + 60
    assert pattern.idle.weight == 1
    arrival = pattern.feed(use(DAY * 10 + 660))
    assert arrival is not None
    assert arrival.away == 600


def test_who_comes_every_day_is_expected_every_day() -> None:
    pattern = pattern_of("ann", days(*range(10)))
    tomorrow = MONDAY + 240 + 9
    assert pattern.probability(tomorrow) > 0.85
    assert pattern.probability(tomorrow + 1) == 0
    assert pattern.offsets(tomorrow) == (5, 5)
    assert pattern.offsets(tomorrow + 1) is None


def test_who_comes_on_workdays_is_not_expected_on_sunday() -> None:
    pattern = pattern_of("ann", days(0, 1, 2, 3, 4, 7, 8, 9, 10, 11))
    monday, saturday = MONDAY + 14 * 24 + 9, MONDAY + 12 * 24 + 9
    assert pattern.probability(monday) > 0.8
    assert pattern.probability(saturday) < 0.5
    week = pattern.week(MONDAY + 14 * 24)
    assert [place for place, value in enumerate(week) if value > 0.75] == [day * 24 + 9 for day in range(5)]
    assert {place for place, value in enumerate(week) if value} == {day * 24 + 9 for day in range(7)}


def test_one_day_is_no_habit() -> None:
    pattern = pattern_of("ann", days(0))
    assert 0 < pattern.probability(MONDAY + 24 + 9) < 0.5


def test_hours_that_go_on_say_nothing_about_coming() -> None:
    morning = [use((MONDAY + 9) * HOUR + minute * 60) for minute in range(40, 120)]
    next_day = [use((MONDAY + 24 + 10) * HOUR + 900)]
    pattern = pattern_of("ann", morning + next_day)
    assert pattern.offsets(MONDAY + 48 + 10) == (15, 15)
    assert pattern_of("ann", morning).offsets(MONDAY + 48 + 10) == (0, 0), "better than nothing"
    assert pattern.hours[MONDAY + 10] == Hour(60, 0, 59)


SETS = st.sets(st.integers(0, 27), max_size=14)


@given(SETS, st.integers(0, 27), st.integers(28, 40))
def test_having_been_there_never_makes_it_less_likely(numbers: set[int], more: int, day: int) -> None:
    # The first day says since when the user is known; it has to be the same.
    before, after = pattern_of("ann", days(0, *numbers)), pattern_of("ann", days(0, *numbers, more))
    hour = MONDAY + day * 24 + 9
    assert 0 < before.probability(hour) <= after.probability(hour) < 1


@given(st.lists(st.integers(0, 30 * DAY), max_size=40), st.integers(0, 31 * 24))
def test_a_probability_is_one_whatever_was_fed(times: list[int], hour: int) -> None:
    pattern = pattern_of("ann", [use(at) for at in times])
    assert 0 <= pattern.probability(hour) < 1
    assert sum(found.minutes for found in pattern.hours.values()) == pattern.minutes
    assert pattern.idle.weight <= max(0, len(times) - 1)


@given(st.lists(st.integers(0, 3 * DAY), max_size=30))
def test_feeding_the_last_tally_again_changes_nothing(times: list[int]) -> None:
    tallies = [use(at) for at in sorted(times)]
    once, twice = pattern_of("ann", tallies), pattern_of("ann", tallies + tallies[-1:])
    assert (once.hours, once.idle.bins(), once.last_use) == (twice.hours, twice.idle.bins(), twice.last_use)


def test_old_hours_are_dropped() -> None:
    pattern = pattern_of("ann", days(0, 1, 2))
    pattern.forget((MONDAY + 24) * HOUR)
    assert set(pattern.hours) == {MONDAY + 33, MONDAY + 57}


def test_leads_are_from_intent_to_use() -> None:
    pattern = pattern_of("ann", [use(60)])
    for said, came in ((1000, 1030), (5000, 5090), (9000, 9012), (20_000, 20_000 + HOUR + 1)):
        pattern.feed(use(said, "intent"))
        arrival = pattern.feed(use(came))
        assert arrival is not None
        assert arrival.announced == (came - said <= HOUR)
    assert pattern.leads.view() == {"intents": 4, "followed": 3, "median_s": 30, "p90_s": 90}
    assert pattern.minutes == 5, "an intent is no use"


def test_an_intent_that_is_repeated_counts_from_the_first() -> None:
    leads = Leads()
    assert leads.view() == {"intents": 0, "followed": 0, "median_s": None, "p90_s": None}
    leads.intent(100)
    leads.intent(150)
    assert leads.use(160)
    assert not leads.use(170)
    assert leads.view() == {"intents": 1, "followed": 1, "median_s": 60, "p90_s": 60}


def test_means_by_hour_of_week_count_empty_hours() -> None:
    week = by_hour_of_week({MONDAY: 4.0, MONDAY + WEEK_HOURS: 2.0, MONDAY + 1: 6.0})
    assert (week[0], week[1], week[2]) == (3.0, 6.0, 0.0)
    assert by_hour_of_week({}) == [0.0] * WEEK_HOURS


def test_peaks_and_quiet_hours() -> None:
    week = [0.0] * WEEK_HOURS
    week[9], week[10], week[33], week[167] = 5.0, 9.0, 7.0, 8.0
    assert peaks(week) == [10, 167, 33]
    assert peaks(week, 1) == [10]
    assert peaks([1.0] * WEEK_HOURS) == []
    assert quiet(week, MONDAY)
    assert not quiet(week, MONDAY + 10)
