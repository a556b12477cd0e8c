"""Turns on a WebSocket: told at their end, estimated where nothing is told or nobody waits for it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from broker.gateway.meter import Usage
from broker.gateway.turn_meter import TurnMeter

CREATED = {"type": "response.created", "response": {"model": "gpt-x", "tools": [{"model": "other"}]}}
DELTA = {"type": "response.output_text.delta", "delta": "twelve bytes"}
DONE = {"type": "response.completed", "response": {"model": "gpt-x", "usage": {"input_tokens": 9, "output_tokens": 4}}}


def heard(meter: TurnMeter, *events: dict[str, Any]) -> list[Usage | None]:
    return [meter.heard(json.dumps(event).encode()) for event in events]


def test_what_is_said_is_believed() -> None:
    meter = TurnMeter()
    meter.asked(4000)
    assert heard(meter, CREATED, DELTA, DONE) == [None, None, Usage(model="gpt-x", input=9, output=4)]
    assert meter.left() is None


def test_a_turn_that_is_left_has_used_what_had_passed_of_it() -> None:
    meter = TurnMeter()
    meter.asked(4000)
    heard(meter, CREATED, DELTA, DONE)
    meter.asked(100)
    meter.asked(300)
    heard(meter, CREATED, DELTA, DELTA)
    assert meter.left() == Usage(model="gpt-x", input=100, output=6, estimated=True)
    assert meter.left() is None, "it counts once"


def test_an_end_that_does_not_say_what_was_used_is_estimated_where_something_was_made() -> None:
    meter = TurnMeter()
    meter.asked(40)
    end = {"type": "response.completed", "response": {"model": "gpt-x", "usage": None}}
    assert heard(meter, CREATED, DELTA, end)[-1] == Usage(model="gpt-x", input=10, output=3, estimated=True)
    meter.asked(40)
    failed = {"type": "response.failed", "response": {"usage": None}}
    assert heard(meter, CREATED, failed)[-1] == Usage()


@pytest.mark.parametrize("events", [[], [{"type": "session.created"}], [{"type": "codex.rate_limits"}]])
def test_a_socket_on_which_nothing_was_answered_has_used_nothing(events: list[dict[str, Any]]) -> None:
    meter = TurnMeter()
    meter.asked(400)
    heard(meter, *events)
    assert meter.left() is None
