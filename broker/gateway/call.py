"""One request of a sandbox and its answer, from whichever server, key, cache or other call it comes. START HERE.

gathered (where the whole body decides) → admitted (limits, fairness) → sent (least busy server, kept connection) →
answered, byte by byte, each side held while the other is slow → settled (tokens, breaker, usage). Until the first
byte of an answer has gone to the sandbox a call may be made again elsewhere; never after.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Literal

from broker.errors import Code, CortexError
from broker.gateway import faults, refusals
from broker.gateway.accounting import record
from broker.gateway.admission import Ticket, Waiting
from broker.gateway.answers import CONTINUE
from broker.gateway.cache import Recorded
from broker.gateway.caller import Caller, Endpoint
from broker.gateway.context import Context
from broker.gateway.direct import ask
from broker.gateway.downstream import Downstream
from broker.gateway.fetch import Fetched
from broker.gateway.framing import Body
from broker.gateway.heads import RequestHead, ResponseHead
from broker.gateway.lookup import Lookup
from broker.gateway.meter import Meter
from broker.gateway.outgoing import Outgoing
from broker.gateway.records import Cached, Outcome
from broker.gateway.routes import Route, Spot, passed, request_head, without_framing, without_keys
from broker.gateway.sent import MAX_REPLAY, RequestBody, Visit, tokens
from broker.gateway.upstream import Upstream

MAX_EARLY = 256 * 2**10
"""Body bytes kept before there is a connection; then the sandbox is held."""
_ELSEWHERE = frozenset((429, 500, 502, 503, 504, 529))
"""Answers after which another server, key or provider is asked, where there is one."""
_REPEATABLE = frozenset((b"GET", b"HEAD", b"OPTIONS"))


class Call:
    """``start`` once, then ``body`` as it comes; ends by exactly one of the downstream's ``fail``, ``cut``
    and ``finish``, or by ``abort`` when the sandbox's side is gone. ``caller`` None: a host on the way out, which
    is neither limited nor accounted."""

    __slots__ = (
        "_asked", "_began", "_body", "_caller", "_context", "_ended", "_endpoint", "_entered", "_gathering", "_head",
        "_lines", "_lookup", "_meter", "_out", "_plan", "_queue_s", "_route", "_routes", "_stale_retried",
        "_stand_ins", "_target", "_task", "_ticket", "_tried_keys", "_upstream", "_visit", "_waiting",
    )  # fmt: skip

    def __init__(
        self, down: Downstream, head: RequestHead, route: Route, target: bytes, context: Context, *,
        caller: Caller | None = None, endpoint: Endpoint = Endpoint.OTHER,
        routes: Mapping[bytes, Route] | None = None,
    ) -> None:  # fmt: skip
        self._head = head
        self._route = route
        self._routes = routes or {}
        self._target = target
        self._context = context
        self._caller = caller
        self._endpoint = endpoint
        self._plan = context.plans.of(route)
        self._meter = Meter(route.kind, endpoint, target) if caller is not None else None
        self._out = Outgoing(down, self._meter, context.clock)
        self._lines = passed(route, head, plain=endpoint.metered)
        self._began = self._entered = context.clock()
        self._queue_s = 0.0
        self._visit = Visit()
        self._tried_keys: frozenset[int] = frozenset()
        self._asked = {self._plan.name}
        self._stand_ins: tuple[str, ...] = ()
        self._ticket: Ticket | None = None
        self._waiting: Waiting | None = None
        self._task: asyncio.Task[None] | None = None
        self._upstream: Upstream | None = None
        self._body = RequestBody(chunked=head.chunked, done=not head.has_body)
        self._gathering = False
        self._stale_retried = False
        self._ended = False
        self._lookup: Lookup | None = None

    # -- the sandbox's side

    def start(self) -> None:
        """Looks for an answer, or for a server; what is there of the body is taken before."""
        if self._ended:
            return
        if self._caller is not None and self._plan.gathers(self._endpoint, self._head.method, self._context.responses):
            if self._body.done:
                self._gathered()
            else:
                self._gathering = self._body.replayable
                self._out.down.hold(False)
                self._welcome()
        else:
            self._enter()

    def body(self, pieces: list[bytes], done: bool) -> None:
        """Body of the request; ``done``: this was the last of it."""
        if self._ended:
            return
        self._body.take(pieces, done)
        upstream = self._upstream
        if upstream is not None:
            upstream.write(self._body.framed(pieces))
            upstream.request_done = done
            self._body.written()
            self._body.read_by(self._meter)
        elif self._gathering:
            if self._body.size > MAX_REPLAY:
                self._gathering = False
                self._enter()
            elif done:
                self._gathered()
        elif self._body.size > MAX_EARLY:
            self._out.down.hold(True)

    def hold_response(self, held: bool) -> None:
        """The sandbox is slow, or no longer."""
        if self._upstream is not None:
            self._upstream.hold(held)
        elif self._lookup is not None:
            self._lookup.hold(held)

    def abort(self) -> None:
        """The sandbox is gone. Where nobody else waits for the answer, the provider need not go on."""
        if self._ended:
            return
        if self._lookup is not None and self._lookup.followers and self._body.done:
            self._out.desert()
            self._lookup.alone(self.abort)
            self.hold_response(False)
            return
        self._ended = True
        self._context.stats.client_gone += 1
        self._settle("gone")

    def time_out(self) -> None:
        """Nothing has moved for too long."""
        waited = self._upstream is not None and self._body.done and not self._out.down.congested
        self._leave("failed" if waited else "neutral")
        self._break(faults.silent(self._route.name))

    def spoil(self, error: CortexError) -> None:
        """The request's body is malformed."""
        self._leave("neutral")
        self._break(error)

    # -- an answer that is there already, or about to be

    def _gathered(self) -> None:
        """All of the request is there."""
        self._gathering = False
        assert self._caller is not None
        may = not self._plan.admission.refuses(self._caller)
        self._lookup = Lookup(self._context, self._plan, self._route, self._scope(), self._endpoint, may_spend=may)
        self._lookup.find(self._head, self._target, self._body.whole(), self, self._enter, self._ask)

    async def _ask(self, body: bytes) -> Fetched:
        """This call with another body, for many."""
        assert self._caller is not None
        return await ask(
            self._plan, self._route, self._caller, self._context.pool, self._head.method, self._target,
            without_framing(self._lines), body, timeout_s=self._context.settings.idle_timeout_s,
        )  # fmt: skip

    def _scope(self) -> str:
        """Whose credential pays: answers are shared by those who share it."""
        if self._caller is not None and (self._route.own_keys or not (self._route.own or self._plan.keys)):
            return f"user:{self._caller.user}"
        return self._route.own or "operator"

    def shared_head(self, recorded: Recorded) -> None:
        """The head of an answer that is not got for this call alone."""
        self._out.recorded(recorded, metered=self._cached() == "batched")

    def shared_body(self, pieces: list[bytes]) -> None:
        """More of it."""
        self._out.body(pieces)
        self._out.flush()

    def shared_end(self) -> None:
        """All of it was there."""
        self._complete()

    def shared_lost(self, why: str) -> None:
        """The other call failed; this one is made for itself where nothing was sent yet."""
        if self._out.begun:
            self._break(faults.broken(self._route.name, why))
        elif not self._ended:
            if self._lookup is not None:
                self._lookup.lost()
            self._enter()

    def _cached(self) -> Cached:
        return self._lookup.cached if self._lookup is not None else ""

    # -- admission

    def _enter(self) -> None:
        if self._caller is None:
            self._send()
            return
        self._entered = self._context.clock()
        try:
            payer, tried, about = self._route.payer(self._caller.user), self._tried_keys, tokens(self._head)
            found = self._plan.admission.enter(self._caller, payer, about, self._granted, self._barred, tried)
        except CortexError as error:
            self._barred(error)
            return
        if isinstance(found, Ticket):
            self._granted(found)
        else:
            self._waiting = found
            if self._body.size > MAX_EARLY:
                self._out.down.hold(True)

    def _barred(self, error: CortexError) -> None:
        """Where the provider has asked for a pause another may answer; what is limited here is so everywhere."""
        self._waiting = None
        if not (refusals.is_pause(error) and self._fall_back()):
            self._break(error)

    def _granted(self, ticket: Ticket) -> None:
        self._waiting = None
        self._ticket = ticket
        self._queue_s += self._context.clock() - self._entered
        self._send()

    # -- sending

    def _send(self, *, anew: bool = False) -> None:
        """Asks the server that is least busy, by a kept connection at once, or by a new one."""
        now = self._context.clock()
        spot = self._visit.begin(self._plan, now)
        if spot is None:
            if not self._fall_back():
                self._break(faults.no_server(self._route.name, self._plan.balance.retry_at(now), now))
            return
        upstream = None if anew else self._context.pool.take(spot.origin)
        if upstream is not None:
            self._attach(upstream, spot)
        else:
            self._task = self._context.tasks.start(self._dial(spot), "dial")

    async def _dial(self, spot: Spot) -> None:
        try:
            upstream = await self._context.pool.dial(spot.origin)
        except CortexError as error:
            self._task = None
            self._context.stats.upstream_failed += 1
            self._context.note(
                "upstream_failed", provider=self._route.name, error=str(error), cause=str(error.__cause__ or "")
            )
            self._leave("neutral" if error.code is Code.UPSTREAM_BUSY else "failed")
            if not self._ended and (self._caller is None or not self._again()):
                self._break(error if self._caller is None else faults.unreachable(self._route.name, error))
            return
        self._task = None
        if self._ended:
            upstream.abort()
        else:
            self._attach(upstream, spot)

    def _attach(self, upstream: Upstream, spot: Spot) -> None:
        self._upstream = upstream
        upstream.begin(self, self._head.method)
        credential = self._plan.credential(self._route, self._ticket.key if self._ticket is not None else -1)
        self._welcome()
        # Before something is written: the server may take no more of it.
        self._out.down.hold(False)
        upstream.write([
            request_head(spot, self._head.method, self._target, credential, self._lines), *self._body.so_far(),
        ])  # fmt: skip
        upstream.request_done = self._body.done
        if self._out.down.congested:
            upstream.hold(True)
        self._body.read_by(self._meter)

    def _welcome(self) -> None:
        """Asks for the body, where the sandbox waits to be asked; once."""
        if self._head.expect_continue and not self._body.size and not self._body.done:
            self._head.expect_continue = False
            self._out.down.send([CONTINUE])

    # -- again, elsewhere

    def _again(self) -> bool:
        """Makes the call once more, where another server, key or provider may answer it."""
        plan = self._plan
        if self._late():
            return False
        if self._visit.attempts > plan.policy.retries or not self._visit.others(plan, self._context.clock()):
            return self._fall_back()
        self._context.stats.retries += 1
        self._send()
        return True

    def _late(self) -> bool:
        """It can no longer be sent again. Time in the queue is limited by itself."""
        asking_s = self._context.clock() - self._began - self._queue_s
        return not self._body.replayable or asking_s > self._plan.policy.retry_within_s

    def _again_with_another_key(self) -> bool:
        """After a 429: the key rests, another one may not."""
        ticket, plan = self._ticket, self._plan
        if self._late():
            return False
        if ticket is None or ticket.key < 0 or self._visit.attempts > plan.policy.retries:
            return self._fall_back()
        self._tried_keys |= {ticket.key}
        if len(self._tried_keys) >= len(plan.keys):
            return self._fall_back()
        self._release(0)
        self._context.stats.retries += 1
        self._enter()
        return True

    def _fall_back(self) -> bool:
        """Goes to the next provider that stands in for this one; to each once, and never with what the sandbox's
        CLI has for another."""
        if self._late() or self._caller is None:
            return False
        self._stand_ins = (*self._plan.policy.fallback, *self._stand_ins)
        while self._stand_ins:
            name, self._stand_ins = self._stand_ins[0], self._stand_ins[1:]
            plan = self._context.plans.named(name)
            route = self._routes.get(name.encode())
            if plan is None or route is None or name in self._asked or route.own_keys:
                continue
            self._release(0)
            self._asked.add(name)
            if self._route.own_keys:
                self._target = without_keys(self._target)
            scope = self._scope()
            self._plan, self._route = plan, route
            if self._lookup is not None:
                self._lookup.elsewhere(shared=self._scope() == scope)
                if self._ended:
                    return True
            self._lines = passed(route, self._head, plain=self._endpoint.metered)
            self._visit, self._tried_keys = Visit(self._visit.total), frozenset()
            self._context.stats.fallbacks += 1
            self._enter()
            return True
        return False

    # -- the provider's side

    def upstream_interim(self, head: ResponseHead) -> None:
        self._out.down.touch()
        self._out.interim(head)

    def upstream_head(self, head: ResponseHead, body: Body) -> None:
        self._out.down.touch()
        if head.status in _ELSEWHERE and self._refused(head):
            return
        well = head.status not in _ELSEWHERE
        self._visit.answered(self._plan, self._context.clock(), well=well)
        if well and self._ticket is not None:
            self._ticket.answered()
        if self._lookup is not None:
            self._lookup.head(head)
            if self._ended:
                return
        self._out.head(head, body, self._head.method)

    def _refused(self, head: ResponseHead) -> bool:
        """Obeys an answer that says "not now"; True when the call is made elsewhere instead."""
        now, status, ticket = self._context.clock(), head.status, self._ticket
        if ticket is not None and status == 429:
            ticket.limited(now, faults.retry_after(head.headers))
        elif ticket is not None and status in faults.OVERLOAD and len(self._plan.spots) == 1:
            ticket.limited(now, faults.retry_after(head.headers), overload=True)
        upstream = self._upstream
        self._upstream = None
        self._leave("neutral" if status == 429 else "failed")
        if self._again_with_another_key() if status == 429 else self._again():
            if upstream is not None:
                upstream.abort()
            return True
        self._upstream = upstream
        return False

    def upstream_body(self, pieces: list[bytes]) -> None:
        if self._lookup is not None:
            self._lookup.body(pieces)
        self._out.body(pieces)

    def upstream_end(self) -> None:
        if self._ended:
            return
        self._upstream = None
        self._leave("failed" if self._out.status in _ELSEWHERE - {429} else "ok")
        if self._lookup is not None:
            self._lookup.end()
        self._complete()

    def _complete(self) -> None:
        if self._ended:
            return
        self._ended = True
        self._out.end()
        down = self._out.down
        self._settle("ok" if self._out.status < 400 else "error")
        down.finish(not down.closing_soon)

    def upstream_flush(self) -> None:
        self._out.flush()

    def upstream_lost(self, why: str) -> None:
        if self._ended:
            return
        upstream, self._upstream = self._upstream, None
        stale = upstream is not None and not upstream.fresh and not self._out.begun
        if stale and not self._stale_retried and self._may_repeat():
            # The server closed an idle connection just as it was used; that says nothing of it.
            self._stale_retried = True
            self._leave("neutral")
            self._visit.uncounted()
            self._send(anew=True)
            return
        self._context.stats.upstream_cut += 1
        self._context.note("upstream_lost", provider=self._route.name, why=why, responding=self._out.begun)
        self._leave("failed")
        if not self._out.begun and self._may_repeat() and self._again():
            return
        self._break(faults.broken(self._route.name, why))

    def _may_repeat(self) -> bool:
        """A call to a model may be made twice; what a host on the way out was asked for may not."""
        if self._caller is None:
            return self._head.method in _REPEATABLE and not self._head.has_body
        return self._body.replayable

    def upstream_congested(self, congested: bool) -> None:
        self._out.down.touch()
        self._out.down.hold(congested)

    # -- ends

    def _leave(self, outcome: Literal["ok", "failed", "neutral"]) -> None:
        """The call is no longer at a server."""
        self._visit.ended(self._plan, self._context.clock(), outcome)

    def _release(self, used: int | None) -> None:
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            ticket.release(self._context.clock(), used)

    def _break(self, error: CortexError) -> None:
        """An answer when nothing was sent yet; else a cut, so that no half response passes for a whole one."""
        if self._ended:
            return
        self._ended = True
        down = self._out.down
        if not self._out.begun:
            self._out.status = error.code.http_status
        self._settle("cut" if self._out.begun else "error")
        self._out.flush()
        if self._out.begun:
            down.cut()
        else:
            down.fail(error)

    def _settle(self, outcome: Outcome) -> None:
        """Lets go of everything and accounts for what was used; once."""
        if self._task is not None:
            self._task.cancel()
        if self._waiting is not None:
            self._waiting.cancel()
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.abort()
        self._leave("failed" if outcome == "cut" else "neutral")
        self._body.drop()
        # Those who follow ask for themselves now, and find this one's place free.
        self._account(outcome)
        if self._lookup is not None:
            self._lookup.drop()

    def _account(self, outcome: Outcome) -> None:
        if self._meter is None or self._caller is None:
            return
        self._body.read_by(self._meter)
        usage = self._meter.finish()
        self._release(usage.tokens)
        if self._meter.unread:
            self._context.unread(self._plan.name)
        now = self._context.clock()
        self._context.usage.add(record(
            self._caller, self._plan.name, self._endpoint, usage,
            status=self._out.status, outcome=outcome, cached=self._cached(), duration_s=now - self._began,
            queue_s=self._queue_s, ttft_s=None if self._out.first is None else self._out.first - self._began,
            attempts=self._visit.total, upstream=self._visit.last,
        ))  # fmt: skip
