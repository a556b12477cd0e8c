"""One request of a sandbox and its response: bytes in, bytes out, each side held while the other is slow."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from broker.errors import Code, CortexError
from broker.gateway.answers import CONTINUE
from broker.gateway.framing import LAST_CHUNK, Body, chunk
from broker.gateway.heads import RequestHead, ResponseHead
from broker.gateway.routes import Route, request_head, response_head
from broker.gateway.stats import Stats
from broker.gateway.upstream import Pool, Upstream
from broker.host.tasks import TaskOwner

MAX_EARLY = 256 * 2**10
"""Body bytes kept while the provider is being dialled; then the sandbox is held."""
_REPEATABLE = frozenset((b"GET", b"HEAD", b"OPTIONS"))
Note = Callable[..., None]


class Downstream(Protocol):
    """The sandbox's connection, as an exchange sees it."""

    congested: bool
    closing_soon: bool
    """The connection will not carry another request; responses say so."""

    def send(self, parts: list[bytes]) -> None: ...
    def hold(self, held: bool) -> None: ...
    def touch(self) -> None:
        """Something moved."""

    def fail(self, error: CortexError) -> None:
        """Ends the exchange with an answer of the gateway; nothing was sent before."""

    def cut(self) -> None:
        """Breaks the connection, so that the client sees an error."""

    def finish(self, keep_alive: bool) -> None:
        """The response is complete."""


class Exchange:
    """``start`` once, then ``body`` as it comes; ends by exactly one of the downstream's ``fail``, ``cut``
    and ``finish``, or by ``abort`` when the sandbox's side is gone."""

    __slots__ = (
        "_chunked", "_down", "_early", "_early_size", "_ended", "_head", "_head_bytes", "_note", "_pool",
        "_request_done", "_responding", "_retried", "_route", "_stats", "_task", "_tasks", "_upstream",
    )  # fmt: skip

    def __init__(
        self, down: Downstream, head: RequestHead, route: Route, target: bytes, pool: Pool, stats: Stats,
        tasks: TaskOwner, note: Note,
    ) -> None:  # fmt: skip
        self._down = down
        self._head = head
        self._route = route
        self._head_bytes = request_head(route, head, target)
        self._pool = pool
        self._stats = stats
        self._tasks = tasks
        self._note = note
        self._task: asyncio.Task[None] | None = None
        self._upstream: Upstream | None = None
        self._early: list[bytes] = []
        self._early_size = 0
        self._request_done = not head.has_body
        self._responding = False
        self._chunked = False
        self._retried = False
        self._ended = False

    # -- the sandbox's side

    def start(self) -> None:
        """Takes an idle connection at once, or dials."""
        upstream = self._pool.take(self._route.origin)
        if upstream is not None:
            self._attach(upstream)
        else:
            self._task = self._tasks.start(self._dial(), "dial")

    def body(self, pieces: list[bytes], done: bool) -> None:
        """Body of the request; ``done``: this was the last of it."""
        self._request_done = done
        if self._ended:
            return
        upstream = self._upstream
        if upstream is None:
            self._early += pieces
            self._early_size += sum(map(len, pieces))
            if self._early_size > MAX_EARLY:
                self._down.hold(True)
            return
        upstream.write(self._framed(pieces, done))
        upstream.request_done = done

    def hold_response(self, held: bool) -> None:
        """The sandbox is slow, or no longer."""
        if self._upstream is not None:
            self._upstream.hold(held)

    def abort(self) -> None:
        """The sandbox is gone: nobody waits for the answer, so the provider need not go on."""
        if not self._ended:
            self._ended = True
            self._stats.client_gone += 1
        if self._task is not None:
            self._task.cancel()
        self._let_go()

    def time_out(self) -> None:
        """Nothing has moved for too long."""
        self._break(CortexError(
            Code.UPSTREAM_TIMEOUT,
            f"{self._route.name} has been silent for too long",
            hint="retry; gateway.idle_timeout_s sets how long is too long",
        ))  # fmt: skip

    def spoil(self, error: CortexError) -> None:
        """The request's body is malformed."""
        self._break(error)

    # -- dialling

    async def _dial(self) -> None:
        try:
            upstream = await self._pool.dial(self._route.origin)
        except CortexError as error:
            self._stats.upstream_failed += 1
            self._note("upstream_failed", provider=self._route.name, error=str(error), cause=str(error.__cause__ or ""))
            self._break(self._anonymous(error))
            return
        if self._ended:
            upstream.abort()
        else:
            self._attach(upstream)

    def _anonymous(self, error: CortexError) -> CortexError:
        """Where a provider lives is no business of the sandbox; a host that it named itself it knows."""
        if not self._route.origin.pooled:
            return error
        return CortexError(error.code, f"{self._route.name} cannot be reached", cause=error.cause, hint=error.hint)

    def _attach(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._task = None
        upstream.begin(self, self._head.method)
        early, self._early = self._early, []
        upstream.write([self._head_bytes, *self._framed(early, self._request_done)])
        upstream.request_done = self._request_done
        if self._down.congested:
            upstream.hold(True)
        self._down.hold(False)
        if self._head.expect_continue and not early and not self._request_done:
            self._down.send([CONTINUE])

    def _framed(self, pieces: list[bytes], done: bool) -> list[bytes]:
        if not self._head.chunked:
            return pieces
        parts = chunk(pieces)
        return [*parts, LAST_CHUNK] if done else parts

    # -- the provider's side

    def upstream_interim(self, head: ResponseHead) -> None:
        self._down.touch()
        # 100 was answered here; anything else (102, 103) is the client's to read.
        if head.status != 100:
            self._down.send([response_head(head, chunked=False, close=False)])

    def upstream_head(self, head: ResponseHead, body: Body) -> None:
        self._down.touch()
        self._responding = True
        self._chunked = not body.done and (head.chunked or body.ends_at_close)
        if head.status == 204:
            head.length, head.chunked = None, False
        chunked = self._chunked or (head.chunked and self._head.method == b"HEAD")
        self._down.send([response_head(head, chunked=chunked, close=self._down.closing_soon)])

    def upstream_body(self, pieces: list[bytes]) -> None:
        self._down.touch()
        self._down.send(chunk(pieces) if self._chunked else pieces)

    def upstream_end(self) -> None:
        if self._ended:
            return
        if self._chunked:
            self._down.send([LAST_CHUNK])
        self._ended = True
        self._upstream = None
        self._down.finish(not self._down.closing_soon)

    def upstream_lost(self, why: str) -> None:
        if self._ended:
            return
        upstream, self._upstream = self._upstream, None
        stale = upstream is not None and not upstream.fresh and not self._responding
        if stale and not self._retried and self._head.method in _REPEATABLE and not self._head.has_body:
            # The server closed an idle connection just as it was used; asking again is harmless here.
            self._retried = True
            self.start()
            return
        self._stats.upstream_cut += 1
        self._note("upstream_lost", provider=self._route.name, why=why, responding=self._responding)
        self._break(CortexError(
            Code.UPSTREAM_FAILED,
            f"{self._route.name} broke the connection",
            cause=why,
            hint="retry; if it stays, check the provider's status",
        ))  # fmt: skip

    def upstream_congested(self, congested: bool) -> None:
        self._down.touch()
        self._down.hold(congested)

    # -- ends

    def _break(self, error: CortexError) -> None:
        """An answer when nothing was sent yet; else a cut, so that no half response passes for a whole one."""
        if self._ended:
            return
        self._ended = True
        self._let_go()
        if self._responding:
            self._down.cut()
        else:
            self._down.fail(error)

    def _let_go(self) -> None:
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.abort()
