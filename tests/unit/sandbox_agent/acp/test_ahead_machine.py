"""The conversation that is opened ahead, against agents that answer late, fail and die, and a broker that changes
its mind: every session that the agent made is in one place, and everybody who waits is answered once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sandbox_agent.agent_side import AgentSide, OnReply
from sandbox_agent.ahead import Ahead, Kind
from sandbox_agent.jsonrpc import Message
from sandbox_agent.servers import Opened

KINDS = [
    Kind({"cwd": cwd, "mcpServers": []}, Opened(0, version)) for cwd in ("/home/a", "/home/b") for version in (0, 1)
]


@dataclass(eq=False)
class Call:
    kind: Kind
    on_reply: OnReply


@dataclass(eq=False)
class Waiter:
    """A client: what it wanted, and what became of it."""

    kind: Kind
    given: list[Message] = field(default_factory=list)
    not_given: int = 0

    def answers(self) -> int:
        return len(self.given) + self.not_given


class Agent:
    """Stands for ``AgentSide``: what is asked of it is answered when the machine says so."""

    def __init__(self, machine: Machine) -> None:
        self.ready = False
        self.closes = True
        self.calls: list[Call] = []
        self.made: dict[str, Kind] = {}
        """Sessions of the process that runs now."""
        self.closed: list[str] = []
        self._machine = machine

    def can(self, name: str) -> bool:
        return name == "close" and self.closes

    def call(self, method: str, params: Message, on_reply: OnReply) -> int:
        assert method == "session/new"
        assert self.ready
        kind = self._machine.wanted
        assert kind is not None
        assert kind.params == params
        self.calls.append(Call(kind, on_reply))
        return len(self.calls)

    def close_session(self, agent_id: Any) -> None:
        if agent_id and self.ready and self.closes:
            assert agent_id in self.made
            assert agent_id not in self.closed
            self.closed.append(agent_id)


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.wanted: Kind | None = None
        self.agent = Agent(self)
        self.waiters: list[Waiter] = []
        self.said: list[bytes] = []
        self.number = 0
        self.given: list[str] = []
        self.ahead = Ahead(
            agent=cast(AgentSide, self.agent),
            wanted=lambda: self.wanted,
            prepare=lambda path: None,
            on_change=lambda: None,
            on_made=lambda: None,
            say=self.say,
        )

    def say(self, lines: list[bytes]) -> None:
        owner = self.given[-1].encode()
        assert all(line.split()[0] == owner for line in lines)
        self.said += lines

    # -- what happens ----------------------------------------------------------------------------

    @rule(closes=st.booleans())
    def agent_comes(self, closes: bool) -> None:
        if not self.agent.ready:
            self.agent.ready, self.agent.closes = True, closes
            self.ahead.look()

    @rule()
    def agent_dies(self) -> None:
        self.ahead.agent_down()
        self.agent.ready = False
        calls, self.agent.calls = self.agent.calls, []
        self.agent.made, self.agent.closed = {}, []
        for call in calls:
            call.on_reply({"error": {"code": -32000, "message": "it died"}})

    @rule(kind=st.sampled_from([None, *KINDS]))
    def bind(self, kind: Kind | None) -> None:
        self.wanted = kind
        self.ahead.look()

    @rule(kind=st.sampled_from([None, *KINDS]))
    def bind_before_anybody_looks(self, kind: Kind | None) -> None:
        self.wanted = kind

    @rule()
    def look(self) -> None:
        self.ahead.look()

    @rule()
    def claim_that_keeps_nothing(self) -> None:
        if not any(not waiter.answers() for waiter in self.waiters):
            self.ahead.forget()

    @precondition(lambda self: self.agent.calls)
    @rule(data=st.data(), how=st.sampled_from(["session", "session", "error", "nonsense"]))
    def agent_answers(self, data: st.DataObject, how: str) -> None:
        call = self.agent.calls.pop(data.draw(st.integers(0, len(self.agent.calls) - 1)))
        if how == "error":
            call.on_reply({"error": {"code": -32000, "message": "no"}})
        elif how == "nonsense":
            call.on_reply({"result": {"sessionId": 7}})
        else:
            self.number += 1
            name = f"s{self.number}"
            self.agent.made[name] = call.kind
            call.on_reply({"result": {"sessionId": name}})

    @precondition(lambda self: self.ahead.agent_id)
    @rule()
    def agent_says(self) -> None:
        self.ahead.heard(f"{self.ahead.agent_id} hello".encode())

    @rule(cwd=st.sampled_from(["/home/a", "/home/b"]), empty=st.booleans())
    def client_wants_one(self, cwd: str, empty: bool) -> None:
        params: Message = {"cwd": cwd, "mcpServers": []} | ({"_meta": {}} if empty else {})
        if not self.ahead.fits(params):
            self.ahead.passed()
            return
        assert self.wanted is not None
        waiter = Waiter(self.wanted)
        self.waiters.append(waiter)

        def given(reply: Message) -> None:
            waiter.given.append(reply)
            if "result" in reply:
                self.given.append(reply["result"]["sessionId"])

        def not_given() -> None:
            waiter.not_given += 1

        self.ahead.take(given, not_given)

    @rule()
    def client_loads_another(self) -> None:
        self.ahead.release()

    # -- what is always so -----------------------------------------------------------------------

    @invariant()
    def it_is_given_away_once_and_is_what_was_wanted(self) -> None:
        assert len(self.given) <= 1
        for waiter in self.waiters:
            assert waiter.answers() <= 1
            for reply in waiter.given:
                if "result" in reply and reply["result"]["sessionId"] in self.agent.made:
                    assert self.agent.made[reply["result"]["sessionId"]].params == waiter.kind.params
        assert sum(not waiter.answers() for waiter in self.waiters) <= 1

    @invariant()
    def every_session_is_in_one_place(self) -> None:
        for name in self.agent.made:
            places = [name == self.ahead.agent_id, name in self.given, name in self.agent.closed]
            assert sum(places) == 1 or (not self.agent.closes and sum(places) == 0), (name, places)

    @invariant()
    def its_state_is_true(self) -> None:
        assert (self.ahead.state == "open") == bool(self.ahead.agent_id)
        assert self.ahead.making == (self.ahead.state == "opening")
        if self.ahead.state in ("open", "opening"):
            assert self.agent.ready
        if self.ahead.agent_id:
            assert self.ahead.agent_id in self.agent.made

    def teardown(self) -> None:
        """Whoever still waits is answered when the agent answers or dies."""
        self.agent_dies()
        assert all(waiter.answers() == 1 for waiter in self.waiters)


Machine.TestCase.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
TestAhead = Machine.TestCase
