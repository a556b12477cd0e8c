"""Pings, silence and stalls, with the clock in the test's hand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from broker.front.liveness import Liveness, Verdict


def liveness() -> Liveness:
    return Liveness(ping_interval_s=20, ping_timeout_s=10, stall_timeout_s=30, now=0.0)


def run(state: Liveness, until: float, *, start: float = 0.0, heard: int = 5, **rest: int | None) -> list[Verdict]:
    verdicts, now = [], start
    while now < until:
        now += state.tick_s
        verdicts.append(state.tick(now, heard=heard, client=rest.get("client"), agent=rest.get("agent")))
    return verdicts


def test_a_silent_client_is_pinged_then_given_up() -> None:
    state = liveness()
    verdicts = run(state, 40)
    assert verdicts.count(Verdict.PING) == 1
    ping = (verdicts.index(Verdict.PING) + 1) * state.tick_s
    assert 20 <= ping <= 20 + 2 * state.tick_s
    gone = (verdicts.index(Verdict.CLIENT_SILENT) + 1) * state.tick_s
    assert 10 <= gone - ping <= 10 + state.tick_s


def test_any_byte_from_the_client_is_life() -> None:
    state, now = liveness(), 0.0
    for heard in range(1, 200):
        now += state.tick_s
        assert state.tick(now, heard=heard, client=None, agent=None) is Verdict.NOTHING


def test_a_pong_starts_the_interval_anew() -> None:
    state = liveness()
    assert run(state, 22.5, heard=5)[-1] is Verdict.PING
    assert set(run(state, 42, start=22.5, heard=6)) == {Verdict.NOTHING}


def test_a_client_that_is_not_read_is_not_blamed() -> None:
    assert set(run(liveness(), 500, heard=-1)) == {Verdict.NOTHING}


def test_a_peer_that_takes_no_byte_is_stalled() -> None:
    for side, verdict in (("client", Verdict.CLIENT_STALLED), ("agent", Verdict.AGENT_STALLED)):
        state = liveness()
        verdicts = run(state, 40, heard=-1, **{side: 1000})
        at = (verdicts.index(verdict) + 1) * state.tick_s
        assert 30 <= at <= 30 + 2 * state.tick_s


def test_a_peer_that_takes_a_byte_now_and_then_is_slow_not_stalled() -> None:
    state, now, left = liveness(), 0.0, 10_000
    for _ in range(100):
        now += 25
        left -= 1
        assert state.tick(now, heard=-1, client=left, agent=None) is Verdict.NOTHING


@given(
    steps=st.lists(st.tuples(st.floats(0.01, 50), st.integers(-1, 3), st.sampled_from([None, 1, 2]), st.booleans())),
)
def test_silence_is_never_said_without_a_ping_before(steps: list[tuple[float, int, int | None, bool]]) -> None:
    state, now, pinged_at = liveness(), 0.0, -1.0
    for gap, heard, client, _ in steps:
        now += gap
        verdict = state.tick(now, heard=heard, client=client, agent=None)
        if verdict is Verdict.PING:
            pinged_at = now
        if verdict is Verdict.CLIENT_SILENT:
            assert pinged_at >= 0
            assert now - pinged_at >= 10
            return
