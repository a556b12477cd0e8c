from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sandbox_agent.process import BACKOFF_S, STABLE_S, RestartPolicy


@given(st.integers(0, 20), st.lists(st.floats(0, STABLE_S - 0.01), max_size=40))
def test_an_agent_that_keeps_dying_is_given_up_after_max_restarts(limit: int, lives: list[float]) -> None:
    policy = RestartPolicy(limit)
    pauses = [policy.died(life) for life in lives]
    assert all(pause is not None for pause in pauses[:limit])
    assert all(pause is None for pause in pauses[limit:])
    taken = [pause for pause in pauses if pause is not None]
    assert taken == sorted(taken)
    assert all(BACKOFF_S[0] <= pause <= BACKOFF_S[1] for pause in taken)


def test_the_pause_doubles() -> None:
    policy = RestartPolicy(10)
    assert [policy.died(1) for _ in range(8)] == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]


def test_a_long_life_or_a_finished_turn_starts_the_count_anew() -> None:
    policy = RestartPolicy(1)
    assert policy.died(1) == 0.2
    policy.proved()
    assert policy.died(1) == 0.2
    assert policy.died(STABLE_S) == 0.2
    assert policy.died(1) is None
