from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_agent import mcp_budget
from sandbox_agent.mcp_budget import WINDOW_S, Budget


@pytest.fixture(autouse=True, scope="module")
def limits() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mcp_budget, "MESSAGES", 10)
        patch.setattr(mcp_budget, "BYTES", 100)
        yield


@given(st.lists(st.tuples(st.floats(0, 0.2), st.integers(1, 5), st.integers(0, 50)), max_size=80))
def test_who_waits_as_told_never_says_more_than_is_allowed_in_a_window(said: list[tuple[float, int, int]]) -> None:
    budget, now = Budget(), 0.0
    spoken: list[tuple[float, int, int]] = []
    for pause, messages, size in said:
        now += pause
        spoken.append((now, messages, size))
        now += budget.spend(now, messages, size)
    for begun, _, _ in spoken:
        window = [(m, s) for at, m, s in spoken if begun <= at < begun + WINDOW_S]
        # Two windows may meet in one second, each with one burst over its limit.
        assert sum(m for m, _ in window) <= 2 * (10 + 5)
        assert sum(s for _, s in window) <= 2 * (100 + 50)


def test_the_pause_is_what_is_left_of_the_second() -> None:
    budget = Budget()
    assert budget.spend(10.0, 10, 100) == 0
    assert budget.spend(10.25, 1, 0) == 0.75
    assert budget.spend(11.0, 1, 0) == 0
    assert budget.spend(11.5, 0, 101) == 0.5
