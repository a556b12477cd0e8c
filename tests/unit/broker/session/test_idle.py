from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.config import IdleConfig
from broker.session.idle import Action, Facts, Look, keep, look

RULES = IdleConfig()
DAY = 86_400.0

times = st.floats(0, 10 * DAY)
spans = st.floats(0.01, DAY)
settings = st.builds(
    IdleConfig,
    pause_after_s=spans,
    keep_s=spans,
    busy_requests=st.integers(0, 5),
    busy_window_s=spans,
    fallback_keep_s=spans,
    longest_keep_s=spans,
    attached_pause_after_s=spans,
)
facts = st.builds(
    Facts,
    paused=st.booleans(),
    at_work=st.booleans(),
    clients=st.integers(0, 3),
    used_at=st.one_of(times, st.just(-inf)),
    keep_s=spans,
    kept_until=st.one_of(times, st.just(-inf)),
    roused_at=st.one_of(times, st.just(-inf)),
)


def left(**fields: object) -> Facts:
    """Its last client left at 1000 s; kept for two minutes."""
    return replace(Facts(paused=False, at_work=False, clients=0, used_at=1000.0, keep_s=120.0), **fields)  # type: ignore[arg-type]


def test_it_is_paused_and_then_stopped() -> None:
    assert look(left(), RULES, 1000) == Look(Action.STAY, 1060)
    assert look(left(), RULES, 1060) == Look(Action.PAUSE, 1120)
    assert look(left(paused=True), RULES, 1060) == Look(Action.STAY, 1120)
    assert look(left(paused=True), RULES, 1120) == Look(Action.STOP)


def test_one_that_is_kept_shorter_than_until_a_pause_is_stopped_at_once() -> None:
    assert look(left(keep_s=10.0), RULES, 1000) == Look(Action.STAY, 1010)
    assert look(left(keep_s=10.0), RULES, 1010) == Look(Action.STOP)


def test_silent_clients_are_paused_late_and_never_stopped() -> None:
    assert look(left(clients=1), RULES, 1060) == Look(Action.STAY, 1900)
    assert look(left(clients=1), RULES, 1900) == Look(Action.PAUSE)
    assert look(left(clients=1, paused=True), RULES, 1000 + DAY) == Look(Action.STAY)


def test_whoever_is_expected_is_waited_for() -> None:
    expected = left(used_at=-inf, roused_at=1000.0, kept_until=1240.0)
    assert look(expected, RULES, 1000) == Look(Action.STAY, 1060)
    assert look(expected, RULES, 1060) == Look(Action.PAUSE, 1240)
    assert look(replace(expected, paused=True), RULES, 1240) == Look(Action.STOP)


@given(st.lists(st.integers(0, 600), max_size=9))
def test_a_busy_user_is_one_with_more_requests_than_three_in_five_minutes(ago: list[int]) -> None:
    requests = [1000.0 - age for age in ago]
    expected = 300.0 if sum(age < 300 for age in ago) > 3 else 120.0
    assert keep(requests, 1000, None, RULES) == expected


def test_requests_of_long_ago_and_of_after_do_not_count() -> None:
    assert keep([600, 650, 699, 1000], 1000, None, RULES) == 120
    assert keep([700.0, 999, 999, 1000], 1000, None, RULES) == 120
    assert keep([701, 999, 999, 1000], 1000, None, RULES) == 300
    assert keep([999, 999, 1000, 1001], 1000, None, RULES) == 120


@pytest.mark.parametrize(("pattern", "kept"), [(None, 120.0), (0.0, 0.0), (-5.0, 0.0), (600.0, 600.0), (DAY, 3600.0)])
def test_the_pattern_of_a_user_who_was_not_busy_decides_within_bounds(pattern: float | None, kept: float) -> None:
    assert keep([1000.0], 1000, pattern, RULES) == kept
    assert keep([999.0] * 4, 1000, pattern, RULES) == 300


@given(facts, settings, times)
def test_what_is_at_work_stays(what: Facts, rules: IdleConfig, now: float) -> None:
    assert look(replace(what, at_work=True), rules, now).action is Action.STAY


@given(facts, settings, times)
def test_what_has_clients_is_not_stopped_and_what_is_paused_is_not_paused(
    what: Facts, rules: IdleConfig, now: float
) -> None:
    found = look(what, rules, now).action
    assert not (what.clients and found is Action.STOP)
    assert not (what.paused and found is Action.PAUSE)


@given(facts, settings, times)
def test_the_next_look_lies_ahead(what: Facts, rules: IdleConfig, now: float) -> None:
    at = look(what, rules, now).at
    assert at is None or at > now


@given(facts, settings, times, st.lists(st.floats(0, DAY), max_size=20))
def test_looking_only_when_told_to_misses_nothing(
    what: Facts, rules: IdleConfig, start: float, looks: list[float]
) -> None:
    """Whoever looks between two times that were told finds nothing to do."""
    found = look(what, rules, start)
    if found.action is not Action.STAY:
        return
    for after in looks:
        if found.at is None or start + after < found.at:
            assert look(what, rules, start + after).action is Action.STAY
    if found.at is not None:
        assert look(what, rules, found.at).action is not Action.STAY


@given(facts, settings, times, spans)
def test_time_alone_takes_nothing_back(what: Facts, rules: IdleConfig, now: float, later: float) -> None:
    order = [Action.STAY, Action.PAUSE, Action.STOP]
    early, late = look(what, rules, now), look(what, rules, now + later)
    assert order.index(late.action) >= order.index(early.action)


@given(facts, settings, times, spans)
def test_use_never_ends_it_sooner(what: Facts, rules: IdleConfig, now: float, later: float) -> None:
    order = [Action.STAY, Action.PAUSE, Action.STOP]
    used = replace(what, used_at=max(what.used_at, now))
    assert order.index(look(used, rules, now + later).action) <= order.index(look(what, rules, now + later).action)


@given(st.lists(times, max_size=10), times, st.one_of(st.none(), st.floats(-DAY, 10 * DAY, allow_nan=False)), settings)
def test_it_is_kept_within_bounds(
    requests: list[float], used_at: float, pattern: float | None, rules: IdleConfig
) -> None:
    kept = keep(requests, used_at, pattern, rules)
    assert 0 <= kept <= max(rules.keep_s, rules.fallback_keep_s, rules.longest_keep_s)
    assert pattern is None or kept in (rules.keep_s, min(max(pattern, 0.0), rules.longest_keep_s))
