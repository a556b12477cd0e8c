"""Windows, gauges, rests and keys: never too much, and no later than need be."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.gateway.limits import (
    EXACT,
    GRAIN_S,
    LATER,
    MAX_ASKED_REST_S,
    MAX_OVERLOAD_S,
    Cell,
    Credential,
    Gauge,
    Keys,
    Rest,
    Window,
)
from broker.gateway.policy import Limit

NONE = Limit()
waits = st.lists(st.floats(0, 30, allow_nan=False), min_size=1, max_size=150)


@given(waits, st.integers(1, 300))
def test_no_minute_has_more_than_the_capacity(steps: list[float], capacity: int) -> None:
    window, now, uses = Window(capacity), 0.0, list[float]()
    for step in steps:
        now += step / 100
        for _ in range(4):
            at = window.free_at(now, 1)
            if at > now:
                now = at
            assert window.free_at(now, 1) <= now, "what was promised holds"
            window.add(now, 1)
            uses.append(now)
            assert sum(1 for use in uses if use + 60 > now) <= capacity
    assert len(window) <= EXACT + 2


@given(waits)
def test_small_windows_open_at_the_first_moment(steps: list[float]) -> None:
    window, now, uses = Window(3), 0.0, list[float]()
    for step in steps:
        now += step
        recent = [use for use in uses if use + 60 > now]
        expected = now if len(recent) < 3 else recent[-3] + 60
        assert window.free_at(now, 1) == expected
        if expected <= now:
            window.add(now, 1)
            uses.append(now)


def test_large_windows_remember_little_and_are_late_by_a_grain_at_most() -> None:
    window = Window(100_000)
    for i in range(100_000):
        window.add(i / 2000, 1)
    assert len(window) <= EXACT
    assert 60 <= window.free_at(50.0, 1) <= 60 + GRAIN_S


def test_uses_that_were_put_together_count_until_the_last_is_old() -> None:
    window = Window(200)
    for i in range(200):
        window.add(i * 0.002, 1)
    assert window.free_at(1.0, 100) >= 60 + 99 * 0.002
    assert window.free_at(1.0, 200) == 60 + 199 * 0.002


class TestTokens:
    def test_what_was_not_used_is_free_again_at_once(self) -> None:
        window = Window(1000)
        cell = window.add(0.0, 800)
        assert window.free_at(1.0, 300) == 60.0
        window.settle(1.0, cell, 800, 100)
        assert (window.used, window.free_at(1.0, 900)) == (100, 1.0)

    def test_what_was_used_beyond_it_counts_from_the_end_of_the_call(self) -> None:
        window = Window(1000)
        cell = window.add(0.0, 400)
        window.settle(30.0, cell, 400, 900)
        assert window.free_at(60.0, 501) == 90.0
        assert window.free_at(60.0, 500) == 60.0

    def test_a_call_longer_than_a_minute_gives_nothing_back_twice(self) -> None:
        window = Window(1000)
        cell = window.add(0.0, 800)
        window.add(50.0, 100)
        window.settle(100.0, cell, 800, 0)
        assert window.used == 100

    def test_one_larger_than_the_limit_goes_alone(self) -> None:
        window = Window(1000)
        window.add(0.0, 1)
        assert window.free_at(5.0, 5000) == 60.0
        assert window.free_at(60.0, 5000) == 60.0

    @given(st.lists(st.tuples(st.floats(0, 20), st.integers(0, 900), st.integers(0, 900)), max_size=60))
    def test_what_is_used_is_what_was_reported(self, calls: list[tuple[float, int, int]]) -> None:
        window, now, open_cells = Window(1000), 0.0, list[tuple[Cell, int, int]]()
        for step, reserved, used in calls:
            now += step
            open_cells.append((window.add(now, reserved), reserved, used))
        recent = now
        for cell, reserved, used in open_cells:
            window.settle(recent, cell, reserved, used)
        last = [(reserved, used) for cell, reserved, used in open_cells if cell.last != -math.inf]
        gone = [(reserved, used) for cell, reserved, used in open_cells if cell.last == -math.inf]
        assert window.used == sum(used for _, used in last) + sum(max(0, used - held) for held, used in gone)
        assert window.idle(recent + 61)
        assert window.used == 0


class TestGauge:
    def test_each_limit_holds_for_itself(self) -> None:
        gauge = Gauge(Limit(concurrency=2, interval_s=0.5, rpm=3, tpm=100))
        cell = gauge.begin(0.0, 60)
        assert (gauge.ready_at(0.1, 0), gauge.in_the_way(0.1, 0)) == (0.5, "interval_s")
        assert (gauge.ready_at(0.1, 50), gauge.in_the_way(0.1, 50)) == (60.0, "tpm")
        gauge.begin(0.5, 0)
        assert (gauge.ready_at(1.0, 0), gauge.in_the_way(1.0, 0)) == (LATER, "concurrency")
        gauge.end(1.0, cell, 60, 10)
        assert gauge.ready_at(1.0, 90) <= 1.0
        gauge.begin(1.0, 0)
        gauge.end(1.0, None, 0, None)
        assert (gauge.ready_at(2.0, 0), gauge.in_the_way(2.0, 0)) == (60.0, "rpm")

    def test_a_call_that_says_nothing_keeps_what_it_reserved(self) -> None:
        gauge = Gauge(Limit(tpm=100))
        gauge.end(1.0, gauge.begin(0.0, 100), 100, None)
        assert gauge.used_tokens == 100

    @pytest.mark.parametrize(("ahead", "at"), [(0, 0.0), (2, 0.0), (3, 60.0), (6, 120.0)])
    def test_those_ahead_count(self, ahead: int, at: float) -> None:
        assert Gauge(Limit(rpm=3)).not_before(0.0, 0, ahead) == at

    def test_those_ahead_are_apart_too(self) -> None:
        gauge = Gauge(Limit(interval_s=2))
        gauge.begin(0.0, 0)
        assert gauge.not_before(1.0, 0, 3) == 8.0

    def test_a_clock_that_steps_back_holds_nothing_for_longer_than_the_limit_does(self) -> None:
        gauge = Gauge(Limit(interval_s=2, rpm=1))
        gauge.end(9e6, gauge.begin(9e6, 0), 0, None)
        assert gauge.ready_at(5.0, 0) <= 65.0
        assert not gauge.idle(5.0)
        assert gauge.idle(65.0)

    def test_it_is_idle_when_nothing_is_left(self) -> None:
        gauge = Gauge(Limit(concurrency=1, interval_s=100, rpm=5, tpm=5))
        cell = gauge.begin(0.0, 5)
        assert not gauge.idle(200.0)
        gauge.end(200.0, cell, 5, 6)
        assert not gauge.idle(259.0)
        assert gauge.idle(260.0)


class TestRest:
    def test_as_long_as_was_asked(self) -> None:
        rest = Rest()
        rest.begin(10.0, 9.0, 30.0)
        rest.begin(11.0, 9.0, 5.0)
        assert rest.ends_at(12.0) == 40.0

    def test_doubles_where_nothing_was_asked(self) -> None:
        rest, now, lengths = Rest(), 0.0, []
        for _ in range(8):
            rest.begin(now, now, None)
            lengths.append(rest.ends_at(now) - now)
            now = rest.ends_at(now)
        assert lengths == [1, 2, 4, 8, 16, 32, 60, 60]

    def test_of_a_whole_provider_it_stays_short_unless_asked(self) -> None:
        rest = Rest(MAX_OVERLOAD_S)
        for now in (0.0, 10.0, 20.0, 30.0, 40.0):
            rest.begin(now, now, None)
        assert rest.ends_at(40.0) == 44.0
        rest.begin(50.0, 50.0, 300.0)
        assert rest.ends_at(50.0) == 350.0

    def test_calls_that_were_under_way_together_are_one_reason(self) -> None:
        rest = Rest()
        for _ in range(6):
            rest.begin(10.0, 9.0, None)
        assert rest.ends_at(10.0) == 11.0

    def test_begins_small_again_after_a_call_that_went_well(self) -> None:
        rest = Rest()
        rest.begin(0.0, 0.0, None)
        rest.begin(1.0, 1.0, None)
        rest.went_well(2.5)
        rest.begin(3.0, 3.0, None)
        assert rest.ends_at(3.0) == 7.0, "a call of before the rest says nothing of after"
        rest.went_well(8.0)
        rest.begin(8.0, 8.0, None)
        assert rest.ends_at(8.0) == 9.0

    @pytest.mark.parametrize("asked", [0.0, -5.0, math.nan])
    def test_nonsense_counts_as_nothing_asked(self, asked: float) -> None:
        rest = Rest()
        rest.begin(0.0, 0.0, asked)
        assert rest.ends_at(0.0) == 1.0

    def test_an_age_is_a_day_at_most(self) -> None:
        rest = Rest()
        rest.begin(0.0, 0.0, math.inf)
        assert rest.ends_at(0.0) == MAX_ASKED_REST_S

    def test_a_clock_that_steps_back_makes_it_no_longer(self) -> None:
        rest = Rest()
        rest.begin(9e6, 9e6, 30.0)
        assert rest.ends_at(5.0) == 35.0


class TestKeys:
    def test_the_one_with_the_fewest_calls_then_the_one_used_longest_ago(self) -> None:
        keys = Keys(3, NONE)
        order = []
        for _ in range(6):
            order.append(keys.pick(0.0, 0, ()))
            keys.used(order[-1])
        assert order == [0, 1, 2, 0, 1, 2]
        keys.all[0].running = keys.all[1].running = 1
        keys.used(2)
        assert keys.pick(0.0, 0, ()) == 2

    def test_one_that_rests_is_left_out(self) -> None:
        keys = Keys(2, NONE)
        keys.all[0].rest.begin(0.0, 0.0, 10.0)
        assert keys.pick(1.0, 0, ()) == 1
        assert keys.pick(1.0, 0, {1}) == -1
        assert keys.ready_at(1.0, 0, {1}) == 10.0
        assert keys.pick(10.0, 0, {1}) == 0

    def test_when_all_were_tried_any_will_do(self) -> None:
        assert Keys(2, NONE).pick(0.0, 0, {0, 1}) == 0

    def test_one_at_its_limit_is_left_out(self) -> None:
        keys = Keys(2, Limit(rpm=1))
        key = keys.used(0)
        assert key.gauge is not None
        key.gauge.begin(0.0, 0)
        assert keys.pick(1.0, 0, ()) == 1
        assert keys.first(1.0, 0, {1}) is keys.all[0]

    def test_idle_when_its_rest_is_long_over(self) -> None:
        key = Credential(Limit(rpm=1))
        assert key.idle(0.0)
        key.rest.begin(0.0, 0.0, 10.0)
        assert not key.idle(30.0)
        assert key.idle(70.0)
