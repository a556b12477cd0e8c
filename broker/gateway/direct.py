"""A whole small call to a provider that no sandbox's connection carries: admitted and balanced like any other."""

from __future__ import annotations

import asyncio
import time

from broker.errors import CortexError
from broker.gateway import faults
from broker.gateway.admission import Ticket
from broker.gateway.caller import Caller
from broker.gateway.estimate import tokens_in
from broker.gateway.fetch import Fetched, fetch
from broker.gateway.plan import Plan
from broker.gateway.routes import Route
from broker.gateway.upstream import Pool

MAX_BYTES = 32 * 2**20


async def ask(
    plan: Plan, route: Route, caller: Caller, pool: Pool, method: bytes, target: bytes, lines: bytes,
    body: bytes, *, timeout_s: float,
) -> Fetched:  # fmt: skip
    """``lines``: headers that go along, without Host, credential and Content-Length. Raises ``CortexError``."""
    ticket = await _admitted(plan, caller, route.payer(caller.user), len(body))
    try:
        now = time.monotonic()
        index = plan.balance.pick(now)
        if index is None:
            raise faults.no_server(plan.name, plan.balance.retry_at(now), now)
        turn = plan.balance.begun(index, now)
        spot = plan.spots[index]
        headers = spot.host_line + plan.credential(route, ticket.key) + lines
        try:
            answer = await fetch(
                pool, spot.origin, method, spot.base_path + target, headers, body,
                timeout_s=timeout_s, max_bytes=MAX_BYTES,
            )  # fmt: skip
        except CortexError:
            plan.balance.ended(index, time.monotonic(), "failed", None, turn)
            raise
        except asyncio.CancelledError:
            plan.balance.ended(index, time.monotonic(), "neutral", None, turn)
            raise
        over = time.monotonic()
        plan.balance.ended(index, over, "failed" if answer.status >= 500 else "ok", over - now, turn)
        if answer.status == 429:
            ticket.limited(time.monotonic(), faults.retry_after(answer.headers))
        elif answer.status in faults.OVERLOAD and len(plan.spots) == 1:
            ticket.limited(time.monotonic(), faults.retry_after(answer.headers), overload=True)
        return answer
    finally:
        ticket.release(time.monotonic(), None)


async def _admitted(plan: Plan, caller: Caller, own: str, size: int) -> Ticket:
    turn: asyncio.Future[Ticket] = asyncio.get_running_loop().create_future()

    def refused(error: CortexError) -> None:
        if not turn.done():
            turn.set_exception(error)

    def granted(ticket: Ticket) -> None:
        if turn.done():
            ticket.release(time.monotonic(), 0)
        else:
            turn.set_result(ticket)

    found = plan.admission.enter(caller, own, tokens_in(size), granted, refused)
    if isinstance(found, Ticket):
        return found
    try:
        # The admission ends every wait after limits.wait_s.
        return await turn
    except asyncio.CancelledError:
        found.cancel()
        if turn.done() and not turn.cancelled() and turn.exception() is None:
            # Its turn had come in the same moment.
            turn.result().release(time.monotonic(), 0)
        raise
