"""Whatever happens in whatever order, a session keeps its promises."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from broker.errors import CortexError
from broker.sandbox.fake import Script
from broker.sandbox.slots import home_key
from broker.session.session import Session
from tests.integration.session.rig import Client, Rig, engine_down, rig, until

T = TypeVar("T")
SCRIPTS: tuple[dict[str, Any], ...] = (
    {},
    {"start_error": engine_down()},
    {"create_error": engine_down()},
    {"die_after_hello": 3},
    {"agent_fails": "agent.failed"},
    {"bind_error": "config.invalid"},
)
SHORT: dict[str, Any] = {
    "session": {"bringup_timeout_s": 3, "bind_timeout_s": 0.5},
    "sandbox": {"hello_timeout_s": 0.5, "stop_timeout_s": 0.05},
}


class SessionMachine(RuleBasedStateMachine):
    """Events come without waiting for what they cause; ``settles`` waits for all of it."""

    world: Rig

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.stack = AsyncExitStack()
        self.pending: list[asyncio.Future[Any]] = []
        self.clients: list[Client] = []

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 30))

    def later(self, work: Coroutine[Any, Any, Any]) -> None:
        self.pending.append(self.loop.create_task(work))

    @initialize()
    def begin(self) -> None:
        self.world = self.run(self.stack.enter_async_context(rig(**SHORT)))

    @property
    def session(self) -> Session | None:
        return self.world.registry.held("ann", "main")

    @rule(which=st.sampled_from(SCRIPTS))
    def sandboxes_will_be(self, which: dict[str, Any]) -> None:
        self.world.engine.script = Script(**which)

    @rule(down=st.booleans())
    def the_engine_is(self, down: bool) -> None:
        self.world.engine.error = engine_down() if down else None

    @rule()
    def create(self) -> None:
        self.later(self.world.registry.create("ann", "main", None))

    @rule()
    def attach(self) -> None:
        if self.session is not None:
            client = Client()
            self.clients.append(client)
            self.session.attach(client)
            self.later(self.open(self.session, client))

    async def open(self, session: Session, client: Client) -> None:
        (await session.open_stream(client.attach)).close()

    @rule()
    def detach(self) -> None:
        if self.session is not None and self.clients:
            self.session.detach(self.clients.pop())

    @rule()
    def stop(self) -> None:
        if self.session is not None:
            self.later(self.session.stop())

    @rule(number=st.integers(0, 3))
    def configure(self, number: int) -> None:
        self.later(self.world.put("env", {"A": str(number)}))

    @rule()
    def delete(self) -> None:
        self.later(self.world.registry.delete("ann", "main"))

    @rule()
    def sandbox_dies(self) -> None:
        for ref in list(self.world.engine.sandboxes):
            self.later(self.world.engine.end(ref))

    @rule()
    def link_is_lost(self) -> None:
        session = self.session
        if session is not None and session._custody.box is not None:
            session.on_lost(session._custody.box, "lost")

    @rule()
    def the_registry_looks(self) -> None:
        self.world.clock.now += 400
        self.later(self.world.registry._look())

    @rule(steps=st.integers(1, 30))
    def time_passes(self, steps: int) -> None:
        async def pass_() -> None:
            for _ in range(steps):
                await asyncio.sleep(0.001)

        self.run(pass_())

    @rule(seconds=st.sampled_from((60, 120, 900)))
    def nobody_uses_it(self, seconds: int) -> None:
        """Without waiting for what is done about it."""

        async def look() -> None:
            self.world.clock.now += seconds
            self.world.steady.now += seconds
            if self.session is not None:
                self.session._idling.look()

        self.run(look())

    @rule()
    def a_client_speaks(self) -> None:
        for client in self.clients[:1]:
            client.speak(self.world.steady())

    @rule(announced=st.booleans())
    def somebody_is_expected(self, announced: bool) -> None:
        self.later(self.world.registry.prewarm("ann", "main", create=True, announced=announced))

    @rule(turns=st.integers(0, 1))
    def agents_have_turns(self, turns: int) -> None:
        for box in self.world.engine.sandboxes.values():
            box.open_turns = turns
            box.turns += turns

    @rule()
    def restart(self) -> None:
        if self.world.engine.error is None:
            self.settle()
            self.run(self.world.restart())

    @rule()
    def settle(self) -> None:
        """Everybody who asked has an answer: a result, or an error that says what to do."""

        async def everything() -> None:
            results = await asyncio.gather(*self.pending, return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException):
                    assert isinstance(result, CortexError), result
                    assert result.hint
            await until(lambda: self.session is None or self.settled(self.session))

        self.run(everything())
        self.pending.clear()

    def settled(self, session: Session) -> bool:
        return session._mailbox.idle and session.state in ("ready", "paused", "stopped", "failed")

    @invariant()
    def one_home_in_one_place(self) -> None:
        if not hasattr(self, "world"):
            return
        self._nobody_is_held_for_nothing()
        key = home_key("ann", "main")
        holders = [slot for slot, owner in self.world.slots.owners().items() if owner == key]
        assert len(holders) + self.world.slots.has_home(key) <= 1
        assert not list((self.world.base / "quarantine").iterdir())

    def _nobody_is_held_for_nothing(self) -> None:
        """What runs and has nothing under way hears its clients."""
        session = self.session
        if session is not None and session._mailbox.idle and session.state == "ready":
            assert not any(client.holding for client in session._clients._clients.values())  # type: ignore[attr-defined]

    def teardown(self) -> None:
        if hasattr(self, "world"):
            world = self.world
            world.engine.error, world.engine.script = None, Script()
            self.settle()
            # Nothing is wedged: from wherever it came, it can be used, and ends without a trace.
            self.run(self._usable())
            self.run(self.stack.aclose())
        self.loop.close()

    async def _usable(self) -> None:
        session = await self.world.session()
        try:
            await session.wait_ready()
        except CortexError:
            # What was on its way when the engine came back may still fail; the next one does not.
            await session.wait_ready()
        assert len(self.world.engine.sandboxes) == 1
        await session.stop()
        await self.world.assert_at_rest("ann")


SessionMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
TestSession = SessionMachine.TestCase
