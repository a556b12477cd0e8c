"""A call that becomes a WebSocket to a provider: admitted like any other, then frames pass, and usage is heard.
Of an answer that says nothing of it, or is left before its end, it is estimated.

A limit on calls at once holds for the handshake alone: a conversation's socket stays open while nobody asks anything.
Frames are never held up, so what is asked in them counts against the other limits and budgets when its answer is
there. A socket that is over one is ended: the sandbox has to shake hands anew, and is told then.
"""

from __future__ import annotations

from typing import Literal

from broker.errors import CortexError
from broker.gateway import faults
from broker.gateway.accounting import record
from broker.gateway.admission import Ticket, Waiting
from broker.gateway.caller import Endpoint
from broker.gateway.context import Context
from broker.gateway.heads import RequestHead
from broker.gateway.meter import Usage
from broker.gateway.records import Outcome
from broker.gateway.routes import passed
from broker.gateway.tunnel import MAX_EARLY, Mouth
from broker.gateway.turn_meter import TurnMeter
from broker.gateway.upgrade import Upgrade, upgrade_head
from broker.gateway.ways import Way

LEAST = 1
"""Tokens reserved for what is not known yet: enough to be refused when a limit on tokens is used up."""


def _nothing(_: object) -> None:
    """Nobody waits for it."""


class WebSocketCall:
    """Used like a ``Tunnel``: ``start`` once, ends by ``abort`` or when both sides have ended."""

    def __init__(self, mouth: Mouth, head: RequestHead, way: Way, context: Context) -> None:
        assert way.route is not None
        assert way.caller is not None
        self._mouth = mouth
        self._head = head
        self._route = way.route
        self._caller = way.caller
        self._target = way.target
        self._context = context
        self._plan = context.plans.of(way.route)
        self._own = way.route.payer(way.caller.user)
        self._waiting: Waiting | None = None
        self._charging: Waiting | None = None
        self._ticket: Ticket | None = None
        self._upgrade: Upgrade | None = None
        self._index = -1
        self._turn = 0
        self._early: list[bytes] = []
        self._early_size = 0
        self._held = False
        self._over = False
        self._meter = TurnMeter()
        self._began = self._asked_at = self._context.clock()

    # -- the sandbox's side

    def start(self) -> None:
        """Raises nothing: a refusal is told to the mouth."""
        try:
            found = self._plan.admission.enter(self._caller, self._own, LEAST, self._granted, self._refused)
        except CortexError as error:
            self._refused(error)
            return
        if isinstance(found, Ticket):
            self._granted(found)
        else:
            self._waiting = found

    def from_sandbox(self, data: bytes) -> None:
        if self._upgrade is not None:
            self._asked_at = self._context.clock()
            self._meter.asked(len(data))
            self._upgrade.from_sandbox(data)
            return
        self._early.append(data)
        self._early_size += len(data)
        if self._early_size > MAX_EARLY:
            self._mouth.hold(True)

    def sandbox_eof(self) -> bool:
        """The sandbox will send no more; True while the other direction is still open."""
        if self._upgrade is None:
            self.abort()
            return False
        return self._upgrade.sandbox_eof()

    def hold(self, held: bool) -> None:
        """The sandbox is slow, or no longer."""
        self._held = held
        if self._upgrade is not None:
            self._upgrade.hold(held)

    def abort(self) -> None:
        self._over = True
        for waiting in (self._waiting, self._charging):
            if waiting is not None:
                waiting.cancel()
        if self._upgrade is not None:
            self._upgrade.abort()
        self._let_go("neutral")

    # -- admission

    def _refused(self, error: CortexError) -> None:
        self._waiting = None
        if not self._over:
            self._over = True
            self._let_go("neutral")
            self._mouth.fail(error)

    def _granted(self, ticket: Ticket) -> None:
        self._waiting = None
        self._ticket = ticket
        plan, context = self._plan, self._context
        now = self._context.clock()
        index = plan.balance.pick(now)
        if index is None:
            self._refused(faults.no_server(self._route.name, plan.balance.retry_at(now), now))
            return
        spot = plan.spots[index]
        key = plan.credential(self._route, ticket.key)
        lines = passed(self._route, self._head)
        try:
            head = upgrade_head(
                self._head, spot.base_path + self._target, lines, spot.host_line + key, own_keys=self._route.own_keys
            )
        except CortexError as error:
            self._refused(error)
            return
        self._turn = plan.balance.begun(index, now)
        self._index = index
        self._upgrade = Upgrade(
            self._mouth, spot.origin, head, context.dialer, context.stats, context.tasks, self._heard,
            on_open=self._opened, on_end=self._ended, name=self._route.name,
        )  # fmt: skip
        self._upgrade.start()
        self._upgrade.hold(self._held)
        early, self._early = self._early, []
        for data in early:
            self._meter.asked(len(data))
            self._upgrade.from_sandbox(data)

    # -- what came of it

    def _opened(self) -> None:
        self._release(None)

    def _heard(self, text: bytes) -> None:
        """A message of the provider: one that ends an answer says what it used."""
        usage = self._meter.heard(text)
        if usage is not None:
            self._account(usage, "ok")
            self._charge(usage.tokens)

    def _account(self, usage: Usage, outcome: Outcome) -> None:
        now = self._context.clock()
        self._context.usage.add(
            record(
                self._caller, self._plan.name, Endpoint.GENERATE, usage, status=101, outcome=outcome,
                duration_s=now - self._asked_at, upstream=max(self._index, 0),
            )
        )  # fmt: skip

    def _left(self) -> None:
        """The socket is over. An answer that was on its way has cost what was made of it."""
        usage = self._meter.left()
        if usage is None:
            return
        self._account(usage, "gone" if self._over else "cut")
        try:
            found = self._plan.admission.enter(self._caller, self._own, LEAST, _nothing, _nothing)
        except CortexError:
            return
        if isinstance(found, Ticket):
            found.release(self._context.clock(), usage.tokens)
        else:
            found.cancel()

    def _charge(self, tokens: int | None) -> None:
        """An answer is there: it counts as a call of so many tokens."""

        def count(ticket: Ticket) -> None:
            self._charging = None
            ticket.release(self._context.clock(), tokens)

        if self._charging is not None:
            self._cut()
            return
        try:
            found = self._plan.admission.enter(self._caller, self._own, LEAST, count, lambda _: self._cut())
        except CortexError:
            self._cut()
            return
        if isinstance(found, Ticket):
            count(found)
        else:
            self._charging = found

    def _cut(self) -> None:
        """Over a limit."""
        self.abort()
        self._mouth.close()

    def _ended(self, status: int | None) -> None:
        """The socket is over; ``status``: what the provider said to the handshake, 0: nothing, None: not waited for."""
        if status == 429 and self._ticket is not None:
            self._ticket.limited(self._context.clock(), None)
        self._let_go("ok" if status == 101 else "failed" if status in (0, 500, 502, 503) else "neutral")

    def _let_go(self, outcome: Literal["ok", "failed", "neutral"]) -> None:
        self._release(None)
        self._left()
        index, self._index = self._index, -1
        if index >= 0:
            now = self._context.clock()
            self._plan.balance.ended(index, now, outcome, None, self._turn)

    def _release(self, tokens: int | None) -> None:
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            ticket.release(self._context.clock(), tokens)
