"""One whole small call to a server, over the pool: health probes, preloading, batches."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from broker.errors import Code, CortexError
from broker.gateway.framing import Body
from broker.gateway.heads import Headers, ResponseHead
from broker.gateway.routes import Origin
from broker.gateway.upstream import Pool, Upstream

_REPEATABLE = frozenset((b"GET", b"HEAD"))


@dataclass(frozen=True, slots=True)
class Fetched:
    """``body`` without its framing."""

    status: int
    headers: Headers
    body: bytes


class _Lost(Exception):
    """The connection broke."""


class _Gather:
    """A sink that puts a response together."""

    def __init__(self, max_bytes: int) -> None:
        self.over: asyncio.Future[Fetched] = asyncio.get_running_loop().create_future()
        self.begun = False
        self._max_bytes = max_bytes
        self._size = 0
        self._pieces: list[bytes] = []
        self._head: ResponseHead | None = None

    @property
    def whole(self) -> bool:
        """The connection is back in the pool, or closed."""
        return self.over.done() and not self.over.cancelled() and self.over.exception() is None

    def upstream_interim(self, head: ResponseHead) -> None:
        """None is waited for."""

    def upstream_head(self, head: ResponseHead, body: Body) -> None:
        self.begun = True
        self._head = head

    def upstream_body(self, pieces: list[bytes]) -> None:
        self._size += sum(map(len, pieces))
        if self._size > self._max_bytes:
            self._fail("its answer is too large")
        else:
            self._pieces += pieces

    def upstream_end(self) -> None:
        if self._head is not None and not self.over.done():
            self.over.set_result(Fetched(self._head.status, self._head.headers, b"".join(self._pieces)))

    def upstream_lost(self, why: str) -> None:
        self._fail(why)

    def upstream_flush(self) -> None:
        """Nothing goes on."""

    def upstream_congested(self, congested: bool) -> None:
        """The whole request is in memory anyway."""

    def _fail(self, why: str) -> None:
        if not self.over.done():
            self.over.set_exception(_Lost(why))


async def fetch(
    pool: Pool, origin: Origin, method: bytes, target: bytes, headers: bytes, body: bytes, *,
    timeout_s: float, max_bytes: int,
) -> Fetched:  # fmt: skip
    """``headers``: ready lines, each with CRLF, ``host`` among them, no ``content-length``; ``timeout_s``: for all of
    it; ``max_bytes``: of the answer's body. Raises ``CortexError``: unreachable, busy, 502 broken or too large, 504."""
    length = b"content-length: %d\r\n" % len(body) if body or method not in _REPEATABLE else b""
    request = [b"%s %s HTTP/1.1\r\n%s%s\r\n" % (method, target, headers, length), body]
    try:
        async with asyncio.timeout(timeout_s):
            upstream = pool.take(origin) or await pool.dial(origin, wait_s=timeout_s / 2)
            gather = _Gather(max_bytes)
            try:
                return await _ask(upstream, gather, method, request)
            except _Lost:
                # The server may have closed an idle connection just as it was used; asking again is harmless here.
                if upstream.fresh or gather.begun or method not in _REPEATABLE:
                    raise
            return await _ask(await pool.dial(origin, wait_s=timeout_s / 2), _Gather(max_bytes), method, request)
    except TimeoutError as error:
        raise CortexError(
            Code.UPSTREAM_TIMEOUT, f"{origin.host} did not answer in time", hint="check that the server is well"
        ) from error
    except _Lost as error:
        raise CortexError(
            Code.UPSTREAM_FAILED, f"{origin.host} gave no whole answer", cause=str(error), hint="check the server"
        ) from error


async def _ask(upstream: Upstream, gather: _Gather, method: bytes, request: list[bytes]) -> Fetched:
    upstream.begin(gather, method)
    upstream.write(request)
    upstream.request_done = True
    try:
        return await gather.over
    finally:
        if not gather.whole:
            upstream.abort()
