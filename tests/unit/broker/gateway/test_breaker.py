"""A server's breaker: what opens it, what a trial decides, whose word counts."""

from __future__ import annotations

import pytest

from broker.gateway.breaker import Breaker, Outcome

REST = 60.0


def call(breaker: Breaker, now: float, outcome: Outcome) -> None:
    assert breaker.admits(now)
    breaker.ended(now, outcome, breaker.begun(now))


def opened(now: float = 0.0, fails: int = 3) -> Breaker:
    breaker = Breaker(fails, REST)
    for _ in range(fails):
        call(breaker, now, "failed")
    assert breaker.state(now) == "open"
    return breaker


def test_failures_in_a_row_open_it_and_others_do_not() -> None:
    breaker = Breaker(3, REST)
    for outcome in ("failed", "failed", "ok", "failed", "neutral", "failed"):
        call(breaker, 0, outcome)
    assert breaker.state(0) == "closed"
    call(breaker, 0, "failed")
    assert breaker.state(0) == "open"
    assert not breaker.admits(REST - 0.001)
    assert breaker.admits(REST)


def test_one_trial_at_a_time() -> None:
    breaker = opened()
    ticket = breaker.begun(REST)
    assert breaker.state(REST) == "half_open"
    assert not breaker.admits(REST)
    breaker.ended(REST, "ok", breaker.begun(REST))  # one that was sent all the same has no say
    assert breaker.state(REST) == "half_open"
    breaker.ended(REST, "neutral", ticket)
    assert breaker.admits(REST), "the client went away: another call decides"
    breaker.ended(REST, "ok", breaker.begun(REST))
    assert breaker.state(REST) == "closed"
    assert breaker.fails == 0


def test_it_is_tried_again_after_every_rest_and_begins_anew() -> None:
    breaker, now, rests = opened(), 0.0, []
    for _ in range(4):
        rests.append(breaker.until - now)
        now = breaker.until
        call(breaker, now, "failed")
    assert rests == [REST] * 4
    now = breaker.until
    call(breaker, now, "ok")
    for _ in range(3):
        call(breaker, now, "failed")
    assert breaker.until == now + REST


@pytest.mark.parametrize("outcome", ["ok", "failed"])
def test_calls_from_before_it_opened_have_no_say(outcome: Outcome) -> None:
    breaker = Breaker(1, REST)
    old = breaker.begun(0)
    call(breaker, 0, "failed")
    breaker.ended(1, outcome, old)
    assert breaker.until == REST
    trial = breaker.begun(REST)
    breaker.ended(REST, outcome, old)
    assert breaker.state(REST) == "half_open"
    assert not breaker.admits(REST)
    breaker.ended(REST, "ok", trial)
    breaker.ended(REST, outcome, old)
    assert breaker.state(REST) == "closed"


def test_an_answer_that_began_well_and_is_cut_is_one_failure() -> None:
    breaker = opened()
    trial = breaker.begun(REST)
    breaker.ended(REST, "ok", trial)
    breaker.ended(REST + 1, "failed", trial)
    assert breaker.fails == 1
    assert breaker.state(REST + 1) == "closed"


def test_a_probe_counts_as_a_failure_but_not_as_a_success() -> None:
    breaker = Breaker(2, REST)
    breaker.told(0, False)
    breaker.told(0, True)
    breaker.told(0, False)
    assert breaker.state(0) == "open"
    breaker.told(1, True)
    assert breaker.state(1) == "half_open", "it lives: a call decides now"


def test_a_server_that_greets_but_fails_calls_is_not_tried_at_every_greeting() -> None:
    breaker = opened()
    breaker.told(1, True)
    call(breaker, 1, "failed")
    breaker.told(2, True)
    assert breaker.state(2) == "open"
    breaker.told(3, False)
    breaker.told(4, True)
    assert breaker.state(4) == "half_open", "it was down and is back"


def test_what_was_probed_the_last_time_is_forgotten() -> None:
    breaker = opened()
    breaker.told(1, False)
    call(breaker, REST, "ok")
    for _ in range(4):
        call(breaker, max(REST, breaker.until), "failed")
    now = breaker.until - 1
    breaker.told(now, True)
    assert breaker.state(now) == "open"


def test_a_probe_spares_a_call_the_trial() -> None:
    breaker = opened()
    breaker.told(1, False)
    assert breaker.until == REST, "while it rests this is no news"
    breaker.told(REST, False)
    assert breaker.state(REST) == "open"
    assert breaker.until == 2 * REST


def test_a_trial_under_way_is_not_talked_over() -> None:
    breaker = opened()
    trial = breaker.begun(REST)
    breaker.told(REST, False)
    breaker.told(REST, True)
    assert not breaker.admits(REST)
    breaker.ended(REST, "ok", trial)
    assert breaker.state(REST) == "closed"
