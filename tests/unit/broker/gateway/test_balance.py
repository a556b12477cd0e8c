"""Which server a call goes to."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from broker.gateway.balance import HALF_LIFE_S, TRIAL_S, Balance

REST = 60.0


def balance(count: int, fails: int = 2) -> Balance:
    return Balance(count, fails, REST)


def call(made: Balance, index: int, now: float, outcome: str, head_s: float | None = None) -> None:
    ticket = made.begun(index, now)
    made.ended(index, now, outcome, head_s, ticket)  # type: ignore[arg-type]


def broken(count: int, *indices: int) -> Balance:
    made = balance(count)
    for index in indices:
        for _ in range(2):
            call(made, index, 0, "failed")
    return made


def test_fewest_calls_under_way() -> None:
    made = balance(3)
    picked = []
    for _ in range(6):
        index = made.pick(0)
        assert index is not None
        picked.append(index)
        made.begun(index, 0)
    assert sorted(picked) == [0, 0, 1, 1, 2, 2]
    made.ended(1, 0, "ok")
    assert made.pick(0) == 1


def test_the_quicker_one_where_calls_are_equal() -> None:
    made = balance(2)
    call(made, 0, 0, "ok", 0.5)
    call(made, 1, 0, "ok", 0.2)
    assert made.pick(0) == 1
    for _ in range(20):
        call(made, 1, 0, "ok", 0.9)
    assert made.pick(0) == 0
    made.begun(0, 0)
    assert made.pick(0) == 1, "calls under way weigh more"


def test_one_that_was_never_asked_is_tried_and_slowness_fades() -> None:
    made = balance(2)
    call(made, 0, 0, "ok", 0.001)
    assert made.pick(0) == 1
    call(made, 1, 0, "ok", 8.0)
    now = 0.0
    while made.pick(now) == 0:
        call(made, 0, now, "ok", 0.5)
        now += 1
    assert 3 * HALF_LIFE_S < now < 5 * HALF_LIFE_S, "8 s is half a second after four half-lives"


def test_failures_say_nothing_of_speed() -> None:
    made = balance(1)
    call(made, 0, 0, "failed", 0.001)
    assert made.view(0)[0]["head_s"] is None


def test_avoided_and_open_servers_are_left_out() -> None:
    made = broken(3, 0)
    assert made.pick(0) == 1
    assert made.pick(0, avoid={1}) == 2
    assert made.pick(0, avoid={1, 2}) is None


def test_a_server_due_for_its_trial_comes_first_and_once() -> None:
    made = broken(3, 2)
    made.begun(0, REST)
    assert made.pick(REST) == 2
    assert made.pick(REST, avoid=[2]) == 1
    ticket = made.begun(2, REST)
    assert made.pick(REST) == 1
    made.answered(2, REST, ticket)
    assert made.view(REST)[2] == {"state": "closed", "running": 1, "fails": 0, "head_s": None}


def test_when_to_come_back() -> None:
    made = broken(2, 0, 1)
    assert made.pick(1) is None
    assert made.retry_at(1) == REST
    assert made.retry_at(REST) is None
    made.begun(0, REST)
    made.begun(1, REST)
    assert made.retry_at(REST) == REST + TRIAL_S
    assert balance(1).retry_at(0) is None


def test_told_by_a_probe() -> None:
    made = balance(2)
    made.told(0, 0, False)
    made.told(0, 0, False)
    assert [each["state"] for each in made.view(0)] == ["open", "closed"]
    made.told(0, 1, True)
    assert made.view(1)[0]["state"] == "half_open"


class Life(RuleBasedStateMachine):
    """Calls, ends of calls, probes and time in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.count = 3
        self.balance = Balance(self.count, 2, REST)
        self.calls: list[tuple[int, int, bool]] = []
        """Server, ticket, whether it began half open."""

    def states(self) -> list[str]:
        return [each["state"] for each in self.balance.view(self.now)]

    @rule(avoid=st.sets(st.integers(0, 2)))
    def begin(self, avoid: set[int]) -> None:
        index = self.balance.pick(self.now, avoid)
        states = self.states()
        if index is None:
            return
        assert index not in avoid
        assert states[index] != "open"
        trial = states[index] == "half_open"
        assert not (trial and any(call[0] == index and call[2] for call in self.calls))
        if not trial:
            assert not any(
                state == "closed" and at not in avoid and self.running(at) < self.running(index)
                for at, state in enumerate(states)
            )
        self.calls.append((index, self.balance.begun(index, self.now), trial))

    def running(self, index: int) -> int:
        return sum(call[0] == index for call in self.calls)

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), outcome=st.sampled_from(["ok", "failed", "neutral"]), head=st.none() | st.floats(0, 10))
    def end(self, data: st.DataObject, outcome: str, head: float | None) -> None:
        index, ticket, trial = self.calls.pop(data.draw(st.integers(0, len(self.calls) - 1)))
        self.balance.ended(index, self.now, outcome, head, ticket)  # type: ignore[arg-type]
        if trial:
            expected = {"ok": "closed", "failed": "open", "neutral": "half_open"}[outcome]
            assert self.states()[index] == expected

    @rule(index=st.integers(0, 2), alive=st.booleans())
    def probe(self, index: int, alive: bool) -> None:
        before = self.states()[index]
        self.balance.told(index, self.now, alive)
        assert self.states()[index] == "closed" or before != "closed" or not alive

    @rule(seconds=st.floats(0, 10 * REST))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def counts_are_right(self) -> None:
        for index, view in enumerate(self.balance.view(self.now)):
            assert view["running"] == self.running(index) >= 0
            assert view["fails"] >= 0
            assert sum(call[0] == index and call[2] for call in self.calls) <= 1

    @invariant()
    def there_is_always_a_time(self) -> None:
        at = self.balance.retry_at(self.now)
        assert (at is None) == (self.balance.pick(self.now) is not None)
        assert at is None or self.now < at <= self.now + REST


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
