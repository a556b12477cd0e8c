from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.session.port import State
from broker.session.state import Event, IllegalMove, advance, allowed, wants_bringup

STATES: tuple[State, ...] = get_args(State)


def walk(*events: Event, start: State = "stopped") -> State:
    state = start
    for event in events:
        state = advance(state, event)
    return state


def test_the_ordinary_life() -> None:
    assert walk(Event.WANTED) == "starting"
    assert walk(Event.WANTED, Event.READY) == "ready"
    assert walk(Event.WANTED, Event.READY, Event.PAUSE, Event.RESUME) == "ready"
    assert walk(Event.WANTED, Event.READY, Event.STOP, Event.STOPPED) == "stopped"


def test_a_failed_session_can_be_wanted_again() -> None:
    assert walk(Event.WANTED, Event.FAILED, Event.WANTED, Event.READY) == "ready"


def test_an_adopted_sandbox_has_to_become_ready_first() -> None:
    assert walk(Event.ADOPTED) == "starting"


@given(st.sampled_from(STATES), st.sampled_from(list(Event)))
def test_what_is_not_allowed_raises_and_changes_nothing(state: State, event: Event) -> None:
    if allowed(state, event):
        assert advance(state, event) in STATES
    else:
        with pytest.raises(IllegalMove, match=event.value):
            advance(state, event)


@given(st.lists(st.sampled_from(list(Event)), max_size=40))
def test_from_wherever_events_lead_a_session_can_be_stopped_and_started(events: list[Event]) -> None:
    state: State = "stopped"
    for event in events:
        if allowed(state, event):
            state = advance(state, event)
    if allowed(state, Event.STOP):
        state = advance(state, Event.STOP)
    if state == "stopping":
        state = advance(state, Event.STOPPED)
    assert wants_bringup(state)
    assert walk(Event.WANTED, Event.READY, start=state) == "ready"


def test_ready_is_never_reached_but_through_starting_or_paused() -> None:
    before = {
        state for state in STATES for event in Event if allowed(state, event) and advance(state, event) == "ready"
    }
    assert before == {"starting", "paused"}
