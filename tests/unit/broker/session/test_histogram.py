"""The hybrid histogram against its definition: mass, order of its percentiles, windows, ageing."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.session.histogram import RANGE, RULES, IdleHistogram, Rules, Window

AWAY = st.floats(0, 600, allow_nan=False)
TIMES = st.lists(AWAY, max_size=60)


def histogram(times: list[float], rules: Rules = RULES) -> IdleHistogram:
    made = IdleHistogram(rules)
    for away in times:
        made.add(away)
    return made


@given(TIMES)
def test_nothing_is_lost_and_nothing_comes_from_nowhere(times: list[float]) -> None:
    made = histogram(times)
    assert made.weight == len(times)
    assert made.outside == sum(away >= RANGE for away in times)
    assert sum(made.bins()) == made.inside
    for place, weight in enumerate(made.bins()):
        assert weight == sum(int(away) == place for away in times)


@given(st.lists(AWAY, min_size=1, max_size=60))
def test_variation_is_that_of_the_bins(times: list[float]) -> None:
    made = histogram(times)
    bins = made.bins()
    mean = statistics.fmean(bins)
    expected = statistics.pstdev(bins) / mean if mean else 0.0
    assert made.variation() == pytest.approx(expected, abs=1e-6)


def test_variation_tells_a_pattern_from_none() -> None:
    assert histogram([30.0] * 20).variation() == pytest.approx(math.sqrt(RANGE - 1))
    assert histogram([float(minute) for minute in range(RANGE)]).variation() == 0
    assert IdleHistogram().variation() == 0


@given(TIMES, st.floats(0, 1), st.floats(0, 1))
def test_percentiles_are_in_order_and_hold_their_share(times: list[float], one: float, two: float) -> None:
    made = histogram(times)
    low, high = sorted((one, two))
    assert 0 <= made.percentile(low) <= made.percentile(high) < RANGE
    if made.inside:
        assert sum(made.bins()[: made.percentile(high) + 1]) >= high * made.inside - 1e-6


@given(TIMES, st.integers(0, 400))
def test_ageing_keeps_the_shape_and_never_adds(times: list[float], days: int) -> None:
    young, old = histogram(times), histogram(times)
    old.age(days)
    factor = RULES.daily**days
    assert old.weight == pytest.approx(young.weight * factor, abs=1e-9)
    assert sum(old.bins()) == pytest.approx(old.inside, abs=1e-9)
    assert min(old.bins()) >= 0
    if old.weight > 1e-6 and old.inside:
        assert old.variation() == pytest.approx(young.variation(), rel=1e-6, abs=1e-6)
        assert old.percentile(0.5) == young.percentile(0.5)


def test_the_clock_going_back_changes_no_weights() -> None:
    made = histogram([5.0] * 4)
    made.age(-3)
    made.add(-20.0)
    assert (made.weight, made.bins()[0], made.bins()[5]) == (5, 1, 4)


@given(TIMES)
def test_a_window_is_in_order_and_holds_the_middle(times: list[float]) -> None:
    made = histogram(times)
    window = made.window()
    if window is None:
        return
    assert 0 <= window.start < window.end or window.end == 0
    assert len(times) >= RULES.least
    if window.source == "histogram":
        assert window.start <= made.percentile(0.5) <= window.end
        assert window.end <= 1.1 * RANGE


def near(window: Window | None) -> tuple[float, float, str]:
    """Start, end and source, to a thousandth."""
    assert window is not None
    return round(window.start, 3), round(window.end, 3), window.source


def test_the_window_of_the_paper() -> None:
    """5th and 99th percentile, rounded down and up, with 10 % on both sides."""
    times = [20.5] * 10 + [30.5] * 89 + [50.5]
    assert near(histogram(times).window()) == (18.0, 34.1, "histogram")
    assert near(histogram([*times, 50.5]).window()) == (18.0, 56.1, "histogram")
    assert near(histogram([0.2] * 5 + [9.0] * 5).window()) == (0.0, 11.0, "histogram")


def test_no_window_without_samples_or_without_a_pattern() -> None:
    assert histogram([10.0] * (RULES.least - 1)).window() is None
    assert histogram([10.0] * RULES.least).window() is not None
    assert histogram([float(minute) for minute in range(RANGE)] * 3).window() is None


def test_who_is_mostly_away_for_longer_is_judged_by_the_last_times() -> None:
    assert near(histogram([10.0] * 6 + [500.0] * 5).window())[2] == "histogram"
    assert near(histogram([10.0] * 4 + [500.0] * 5).window())[2] == "recent"
    assert near(histogram([10.0] * 5 + [600.0] * 10).window()) == (510.0, 690.0, "recent")
    assert near(histogram([300.0, 300.0, 400.0]).window()) == (280.5, 379.5, "recent")


def test_what_happened_long_ago_gives_way() -> None:
    made = histogram([10.0] * 50)
    made.age(20)
    for _ in range(10):
        made.add(100.0)
    assert made.percentile(0.5) == 100
    made.age(60)
    assert made.window() is None


@given(TIMES, AWAY, st.floats(0, 300), st.floats(0, 300))
def test_a_probability_is_one_and_grows_with_the_time_given(
    times: list[float], away: float, one: float, two: float
) -> None:
    made = histogram(times)
    short, long = sorted((one, two))
    assert 0 <= made.arrival(away, short) <= made.arrival(away, long) <= 1


def test_the_probability_counts_who_stayed_away_so_long() -> None:
    made = histogram([10.5] * 2 + [20.5] * 6 + [300.0] * 2)
    assert made.arrival(0, 11) == pytest.approx(0.2)
    assert made.arrival(15, 6) == pytest.approx(6 / 8)
    assert made.arrival(30, 200) == 0
    assert made.arrival(500, 5) == 0
    assert IdleHistogram().arrival(0, 5) == 0
    assert made.arrival(5, 0) == 0
