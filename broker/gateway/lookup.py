"""An answer that need not be asked for: kept from before, on its way for somebody else, or got with others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from broker.gateway import cache
from broker.gateway.batch import Member, Send
from broker.gateway.cache import Recorded
from broker.gateway.caller import Endpoint
from broker.gateway.coalesce import Audience, Flight, Joined
from broker.gateway.context import Context
from broker.gateway.heads import RequestHead, ResponseHead
from broker.gateway.plan import Plan
from broker.gateway.policy import CacheRule
from broker.gateway.records import Cached
from broker.gateway.responses import Recorder
from broker.gateway.routes import Route, passing

_EQUAL = CacheRule(enabled=True, with_tools=True, with_randomness=True)
"""Calls that are under way at once are equal by what they ask alone."""


class Lookup:
    """``find`` once, then the call's own answer, if it has to be asked for: kept and shared as it passes.

    ``cached`` says how the answer came; "" that it is, or was, asked for.
    """

    def __init__(
        self, context: Context, plan: Plan, route: Route, scope: str, endpoint: Endpoint, *, may_spend: bool = True
    ) -> None:
        """``may_spend``: the call may be part of another one, which costs."""
        self.cached: Cached = ""
        self._may_spend = may_spend
        self._context = context
        self._plan = plan
        self._route = route
        self._scope = scope
        self._endpoint = endpoint
        self._recorder: Recorder | None = None
        self._flight: Flight | None = None
        self._joined: Joined | Member | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def followers(self) -> int:
        """How many others wait for the answer of this call."""
        return self._flight.followers if self._flight is not None else 0

    def find(
        self, head: RequestHead, target: bytes, body: bytes, audience: Audience, ask: Callable[[], None], send: Send
    ) -> None:
        """Gives ``audience`` the answer now or later, or calls ``ask``. An answer that is lost on its way is
        told as ``shared_lost``; the call is then made by itself. ``send``: makes the call with other bodies."""
        plan, responses = self._plan, self._context.responses
        headers = passing(self._route, head, plain=self._endpoint.metered)
        said = cache.said(headers) if plan.batcher is not None and self._endpoint is Endpoint.EMBED else None
        if plan.batcher is not None and said is not None and self._may_spend:
            self._joined = plan.batcher.add(body, audience, (self._scope, target, *said), send)
            if self._joined is not None:
                self.cached = "batched"
                return
        rule, asked = plan.policy.cache, (self._endpoint, head.method)
        told = (plan.name, self._scope, *asked, target, headers, body)
        key = responses.key(rule, *told) if responses.wants(rule, *asked) else None
        if key is None:
            self._share(responses.key(_EQUAL, *told) if plan.flights is not None else None, None, audience, ask)
            return
        found = responses.hit(key)
        if found is not None:
            self._replay(found, audience)
        elif responses.asynchronous:
            self._task = self._context.tasks.start(self._look_up(key, audience, ask), "cache")
        else:
            self._share(key, key, audience, ask)

    async def _look_up(self, key: bytes, audience: Audience, ask: Callable[[], None]) -> None:
        found = await self._context.responses.get(key)
        self._task = None
        if found is not None:
            self._replay(found, audience)
        else:
            self._share(key, key, audience, ask)

    def _share(self, flight: bytes | None, record: bytes | None, audience: Audience, ask: Callable[[], None]) -> None:
        """Joins an equal call that is under way, or lets this one be made."""
        flights = self._plan.flights
        if flights is not None and flight is not None:
            self._flight = flights.lead(flight)
            if self._flight is None:
                self.cached = "coalesced"
                self._joined = flights.join(flight, audience)
                return
        if record is not None:
            self._recorder = self._context.responses.recorder(self._plan.policy.cache, self._endpoint, record)
        ask()

    def _replay(self, found: Recorded, audience: Audience) -> None:
        self.cached = "hit"
        audience.shared_head(found)
        if found.pieces:
            audience.shared_body(found.pieces)
        audience.shared_end()

    def hold(self, held: bool) -> None:
        """The sandbox that gets what another asked for is slow, or no longer."""
        if isinstance(self._joined, Joined):
            self._joined.hold(held)

    def lost(self) -> None:
        """Nothing is shared with the call any more; it asks for itself."""
        self.cached = ""
        self._joined = None

    def elsewhere(self, *, shared: bool) -> None:
        """Another provider answers: not kept as this one's, and only ``shared`` where the same credential pays."""
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.spoil()
        if not shared and self._flight is not None:
            flight, self._flight = self._flight, None
            flight.lost("another credential pays")

    def alone(self, deserted: Callable[[], None]) -> None:
        """The sandbox that asked is gone: ``deserted`` is called when nobody else waits any more either."""
        if self._flight is not None:
            self._flight.deserted = deserted

    # -- the answer of the call itself

    def head(self, head: ResponseHead) -> None:
        if self._recorder is not None:
            self._recorder.head(head)
        if self._flight is not None:
            self._flight.head(head)

    def body(self, pieces: list[bytes]) -> None:
        if self._recorder is not None:
            self._recorder.body(pieces)
        if self._flight is not None:
            self._flight.body(pieces)

    def end(self) -> None:
        """All of it has passed."""
        recorder, self._recorder = self._recorder, None
        flight, self._flight = self._flight, None
        if recorder is not None:
            recorder.end()
        if flight is not None:
            flight.end()

    def drop(self) -> None:
        """The call is over; what was not whole is kept for nobody."""
        if self._task is not None:
            self._task.cancel()
        if self._joined is not None:
            self._joined.cancel()
        recorder, self._recorder = self._recorder, None
        flight, self._flight = self._flight, None
        if recorder is not None:
            recorder.spoil()
        if flight is not None:
            flight.lost("the call that was shared failed")
