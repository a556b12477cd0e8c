"""Requests under way between peers: who asked whom, under which ids. Knows nothing of transports.

A request that passes from one peer to another is a ``Crossing``: it gets an id of the target's numbering, which
also is its progress token there. One of our own is a ``Query``.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from sandbox_agent import jsonrpc, mcp_protocol
from sandbox_agent.jsonrpc import Message
from sandbox_agent.mcp_protocol import Id, McpError

LONGEST_CALL_S = 6 * 3600.0
"""Agents have deadlines of their own; this one is for those that have none."""


class Gone(Exception):
    """The other side is gone, or the answer did not come in time."""


class Pending(ABC):
    """A request that waits for its answer."""

    @abstractmethod
    def settle(self, outcome: Message) -> None:
        """The answer is there; ``outcome`` holds ``result`` or ``error``."""

    @abstractmethod
    def fail(self, why: str) -> None:
        """There will be none."""


class Peer(ABC):
    """One side: a client's connection or a server."""

    def __init__(self) -> None:
        self.open: dict[int, Pending] = {}
        """What it was asked, by our ids; in the order in which it was asked."""
        self.asking: dict[Id, Crossing] = {}
        """What it asked of another peer, by its own ids."""
        self._last = 0

    @abstractmethod
    def send(self, message: Message) -> None:
        """Queues a message; never blocks, never raises."""

    def next_id(self) -> int:
        self._last += 1
        return self._last

    def answered(self, message: Message) -> None:
        """A response of this peer. One that nobody waits for is dropped: late, doubled or made up."""
        number = message.get("id")
        pending = self.open.pop(number, None) if isinstance(number, int) else None
        if pending is not None:
            pending.settle({name: message[name] for name in ("result", "error") if name in message})

    def progressed(self, params: dict[str, Any]) -> None:
        """This peer's ``notifications/progress``."""
        token = params.get("progressToken")
        crossing = self.open.get(token) if isinstance(token, int) else None
        if isinstance(crossing, Crossing) and crossing.token is not None:
            told = {**params, "progressToken": crossing.token}
            crossing.source.send(mcp_protocol.notification("notifications/progress", told))

    def cancelled(self, params: dict[str, Any]) -> None:
        """This peer's ``notifications/cancelled``."""
        request_id = params.get("requestId")
        crossing = self.asking.get(request_id) if jsonrpc.is_id(request_id) else None
        if crossing is not None:
            crossing.cancel(params)

    def lost(self, why: str) -> None:
        """The peer is gone: what it was asked fails, what it asked is cancelled."""
        self.unanswered(why)
        for crossing in list(self.asking.values()):
            crossing.cancel({"reason": why})

    def unanswered(self, why: str) -> None:
        """All that it was asked fails."""
        pending, self.open = self.open, {}
        for each in pending.values():
            each.fail(why)

    def query(self, method: str, params: dict[str, Any], timeout_s: float) -> asyncio.Future[Any]:
        """Asks the peer something of our own. The future raises ``McpError`` or ``Gone``."""
        query = Query(self, timeout_s)
        self.send(mcp_protocol.request(query.number, method, params))
        return query.future


class Query(Pending):
    """A request of our own."""

    def __init__(self, target: Peer, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        self.number = target.next_id()
        self.future: asyncio.Future[Any] = loop.create_future()
        self.future.add_done_callback(self._done)
        self._target = target
        self._timer = loop.call_later(timeout_s, self.fail, f"no answer within {timeout_s:g} s")
        target.open[self.number] = self

    def settle(self, outcome: Message) -> None:
        if self.future.done():
            return
        if "error" in outcome:
            error = jsonrpc.safe_error(outcome["error"])
            self.future.set_exception(McpError(error["code"], error["message"]))
        else:
            self.future.set_result(outcome["result"])

    def fail(self, why: str) -> None:
        if not self.future.done():
            self.future.set_exception(Gone(why))

    def _done(self, future: asyncio.Future[Any]) -> None:
        self._timer.cancel()
        self._target.open.pop(self.number, None)
        if not future.cancelled():
            future.exception()  # of one that nobody awaits, nothing is to be said


Finish = Callable[[Any], Any]
"""Makes of a result what the asker is to see."""


class Crossing(Pending):
    """A request of ``source`` that ``target`` works on. Made by ``cross``."""

    __slots__ = ("_finish", "_timer", "method", "number", "source", "source_id", "target", "token")

    def __init__(self, source: Peer, source_id: Id, method: str, target: Peer, finish: Finish | None) -> None:
        self.source = source
        self.source_id = source_id
        self.method = method
        self.target = target
        self.number = target.next_id()
        self.token: Any = None
        self._finish = finish
        self._timer = asyncio.get_running_loop().call_later(LONGEST_CALL_S, self._late)
        source.asking[source_id] = self
        target.open[self.number] = self

    def settle(self, outcome: Message) -> None:
        self._end()
        if "result" in outcome and self._finish is not None:
            outcome["result"] = self._finish(outcome["result"])
        elif "error" in outcome:
            outcome["error"] = jsonrpc.safe_error(outcome["error"])
        self.source.send({"jsonrpc": "2.0", "id": self.source_id, **outcome})

    def fail(self, why: str) -> None:
        self._end()
        self.source.send(mcp_protocol.failure(self.source_id, self.method, why))

    def cancel(self, params: dict[str, Any]) -> None:
        """The asker wants it no more; an answer that still comes is dropped."""
        self._end()
        told = {**params, "requestId": self.number}
        self.target.send(mcp_protocol.notification("notifications/cancelled", told))

    def _late(self) -> None:
        self.cancel({"reason": "no answer"})
        self.source.send(mcp_protocol.failure(self.source_id, self.method, f"no answer within {LONGEST_CALL_S:g} s"))

    def _end(self) -> None:
        self._timer.cancel()
        self.target.open.pop(self.number, None)
        self.source.asking.pop(self.source_id, None)


def cross(
    source: Peer, message: Message, target: Peer, params: dict[str, Any], *, finish: Finish | None = None
) -> Crossing:
    """Sends the request ``message`` of ``source`` on to ``target`` with ``params``."""
    crossing = Crossing(source, message["id"], message["method"], target, finish)
    token = mcp_protocol.token_of(params)
    if token is not None:
        crossing.token = token
        params = mcp_protocol.with_token(params, crossing.number)
    target.send(mcp_protocol.request(crossing.number, crossing.method, params))
    return crossing
