"""The model that begins to answer soonest."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from broker.config import AgentConfig, Config, GatewayConfig
from broker.gateway.records import Record
from broker.session.fastest import FAILED_S, STALE_S, Speeds, resolved, with_models
from broker.store.usage import SpeedRow
from tests.unit.broker.gateway.test_usage_log import record

AGENT = AgentConfig(command=("x",), provider="p", model="fastest", models=("a", "b", "c"))
OTHER = AgentConfig(command=("x",), provider="p", model="a")
CONFIG = Config.model_construct(agents={"one": AGENT, "two": OTHER}, gateway=GatewayConfig())


def call(model: str, ttft: float | None, **changes: Any) -> Record:
    return record(**{"model": model, "ttft_s": ttft, "at": 1000.0, **changes})


def choose(speeds: Speeds, now: float = 1000.0) -> str:
    return resolved(CONFIG, speeds, now)["one"]


def test_each_gets_its_turn_then_the_fastest() -> None:
    speeds = Speeds()
    for model, ttft in (("a", 0.5), ("b", 0.2), ("c", 0.9)):
        assert choose(speeds) == model
        assert choose(speeds) == model
        speeds.add(CONFIG, call(model, ttft))
    assert choose(speeds) == "b"
    assert with_models(CONFIG, {"one": "b"}).agents["one"].model == "b"
    assert with_models(CONFIG, {"one": "b"}).agents["two"] is OTHER


def test_a_little_faster_is_no_reason_to_change() -> None:
    speeds = Speeds([SpeedRow("p", name, ttft, 1, 1000.0) for name, ttft in (("a", 0.5), ("b", 0.2), ("c", 0.9))])
    assert choose(speeds) == "b"
    speeds = Speeds(speeds.view())
    assert choose(speeds) == "b"
    # The mean of 0.9 and 0.1, of 0.5 and 0.1.
    speeds.add(CONFIG, call("a", 0.1))
    assert choose(speeds) == "b"
    for _ in range(20):
        speeds.add(CONFIG, call("a", 0.17))
    assert choose(speeds) == "b"
    for _ in range(20):
        speeds.add(CONFIG, call("a", 0.1))
    assert choose(speeds) == "a"


def test_one_that_fails_is_left_alone_for_a_while_and_one_not_used_is_tried_again() -> None:
    speeds = Speeds([SpeedRow("p", name, 0.5, 1, 1000.0) for name in "ab"])
    speeds.add(CONFIG, call("c", None, outcome="error", status=500))
    assert choose(speeds) == "a"
    assert choose(speeds, 1000.0 + FAILED_S + 1) == "c"
    speeds.add(CONFIG, call("c", 0.9, at=1000.0 + STALE_S))
    assert choose(speeds, 1000.0 + STALE_S + 1) == "a"
    every = Speeds([SpeedRow("p", name, None, 0, 1000.0) for name in "abc"])
    assert choose(every) == "a"


@pytest.mark.parametrize(
    "said",
    [
        call("a", 0.1, outcome="gone"),
        call("a", 0.1, cached="hit"),
        call("a", 0.1, endpoint="embed"),
        call("a", 0.1, provider="q"),
        call("a", None),
        call("a", None, outcome="error", status=429),
        call("ab", 0.1),
        call("x", 0.1),
        call("a", None, attempts=0, status=429, outcome="error"),
    ],
)
def test_calls_that_say_nothing_of_a_model(said: Record) -> None:
    assert Speeds().add(CONFIG, said) is None


def test_a_longer_name_is_the_candidates_and_waiting_for_limits_is_not() -> None:
    assert Speeds().add(CONFIG, call("b-2026-01-01", 0.75, queue_s=0.5)) == SpeedRow("p", "b", 0.25, 1, 1000.0)


@given(st.lists(st.floats(0.001, 60), min_size=1, max_size=30))
def test_the_mean_stays_within_what_was_measured(times: list[float]) -> None:
    speeds = Speeds()
    for ttft in times:
        row = speeds.add(CONFIG, call("a", ttft))
    assert row is not None
    assert row.count == len(times)
    assert row.ttft_s is not None
    assert min(times) - 1e-9 <= row.ttft_s <= max(times) + 1e-9


def test_there_has_to_be_a_choice() -> None:
    with pytest.raises(ValidationError, match="models to choose from"):
        AgentConfig(command=("x",), provider="p", model="fastest")
    with pytest.raises(ValidationError, match="models to choose from"):
        AgentConfig(command=("x",), model="fastest", models=("a",))
