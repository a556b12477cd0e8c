"""A WebSocket to a provider (RFC 6455): the handshake is watched, frames pass untouched, half-closes too."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from broker.errors import Code, CortexError
from broker.gateway.dialer import Dialer
from broker.gateway.frames import TextListener
from broker.gateway.framing import Body, response_body
from broker.gateway.heads import END, RequestHead, ResponseHead, bad, parse_response
from broker.gateway.routes import Origin, response_head
from broker.gateway.stats import Stats
from broker.gateway.tunnel import MAX_EARLY, WRITE_HIGH, Mouth
from broker.host.tasks import TaskOwner

ANSWER_S = 30.0
"""Within this time after connecting, the answer to the handshake is there, its body too if it is a refusal."""
MAX_HEAD = 64 * 2**10
MAX_REFUSAL = 256 * 2**10
"""Largest body of an answer that is no 101."""
_HANDSHAKE = b"connection: Upgrade\r\nupgrade: websocket\r\n"
_NOT_THERE = frozenset((404, 405, 501))
"""Said by a server that knows no WebSocket at that path. Codex falls back to POST at once on 426, on these after six
retries."""
_WEBSOCKET = b"sec-websocket-"
_KEY_PROTOCOLS = (b"openai-insecure-api-key.", b"openai-organization.", b"openai-project.")
"""Browsers cannot set headers, so OpenAI takes a key as a subprotocol, and who pays."""


def upgrade_head(head: RequestHead, target: bytes, passed: bytes, put_in: bytes, *, own_keys: bool = False) -> bytes:
    """The head that goes upstream: ``put_in`` (Host, credential), then ``passed`` (lines of the sandbox's that may
    go on), each with CRLF. No extension is offered, so frames can be read in passing. Raises ``CortexError`` (400)."""
    if head.method != b"GET" or head.has_body or b"upgrade" not in head.hop_by_hop:
        raise bad("a WebSocket handshake is a GET without a body, with Connection: Upgrade")
    own = {name.lower(): value.strip() for name, value in head.headers if name.lower().startswith(_WEBSOCKET)}
    if not own.get(b"sec-websocket-key"):
        raise bad("a WebSocket handshake needs Sec-WebSocket-Key")
    offered = [value for name, value in head.headers if name.lower() == b"sec-websocket-protocol"]
    protocols = [each.strip() for each in b",".join(offered).split(b",")]
    kept = [each for each in protocols if each and (own_keys or not each.lower().startswith(_KEY_PROTOCOLS))]
    lines = [line for line in passed.splitlines(keepends=True) if not line.lower().startswith(_WEBSOCKET)]
    parts = [b"GET %s HTTP/1.1\r\n" % target, put_in, *lines, _HANDSHAKE]
    parts += [
        b"%s: %s\r\n" % (name, own[name]) for name in (b"sec-websocket-key", b"sec-websocket-version") if name in own
    ]
    if kept:
        parts.append(b"sec-websocket-protocol: %s\r\n" % b", ".join(kept))
    return b"".join([*parts, b"\r\n"])


class Upgrade(asyncio.Protocol):
    """The provider's side of a WebSocket. ``start`` once; ends by ``abort``, by a refusal, or when both sides have
    ended. Used like a ``Tunnel``.

    ``head`` goes upstream as it is; ``on_text`` hears text messages of the provider up to 1 MiB; ``on_open`` is
    called when the WebSocket stands; ``on_end`` is told once, when all is over, the status of the provider's answer
    (0: it gave none, None: the sandbox did not wait for it). ``name`` is for people.
    """

    def __init__(
        self, mouth: Mouth, origin: Origin, head: bytes, dialer: Dialer, stats: Stats, tasks: TaskOwner,
        on_text: Callable[[bytes], None] | None = None, *, on_open: Callable[[], None] | None = None,
        on_end: Callable[[int | None], None] | None = None, name: str = "The provider",
    ) -> None:  # fmt: skip
        self._mouth = mouth
        self._origin = origin
        self._head = head
        self._dialer = dialer
        self._stats = stats
        self._tasks = tasks
        self._on_text = on_text
        self._on_open = on_open
        self._on_end = on_end
        self._name = name
        self._listener = TextListener()
        self._task: asyncio.Task[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._answered = asyncio.Event()
        self._buffer = b""
        self._refusal: tuple[ResponseHead, Body] | None = None
        self._status = 0
        self._refused: list[bytes] = []
        self._refused_size = 0
        self._standing = False
        self._early: list[bytes] = []
        self._early_size = 0
        self._held = False
        self._near_eof = False
        self._far_eof = False
        self._over = False

    # -- the sandbox's side

    def start(self) -> None:
        self._task = self._tasks.start(self._shake_hands(), "upgrade")

    def from_sandbox(self, data: bytes) -> None:
        if self._standing:
            if self._transport is not None and not self._near_eof:
                self._transport.write(data)
            return
        self._early.append(data)
        self._early_size += len(data)
        if self._early_size > MAX_EARLY:
            self._mouth.hold(True)

    def sandbox_eof(self) -> bool:
        """The sandbox will send no more; True while the other direction is still open."""
        self._near_eof = True
        if not self._standing or self._far_eof:
            self.abort()
            return False
        if self._transport is not None and self._transport.can_write_eof():
            self._transport.write_eof()
        return True

    def hold(self, held: bool) -> None:
        """The sandbox is slow, or no longer."""
        if self._transport is None or self._transport.is_closing() or held == self._held:
            return
        self._held = held
        if held:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def abort(self) -> None:
        self._end(self._status or None)
        if self._task is not None:
            self._task.cancel()
        if self._transport is not None:
            self._transport.abort()

    # -- the handshake

    async def _shake_hands(self) -> None:
        try:
            await self._dialer.dial(self._origin, lambda: self)
        except CortexError as error:
            self._stats.upstream_failed += 1
            # Where a provider lives is no business of the sandbox.
            self._fail(CortexError(error.code, f"{self._name} cannot be reached", cause=error.cause, hint=error.hint))
            return
        if self._over or self._transport is None:
            self._lost("closed before it answered")
            return
        self._stats.upstream_new += 1
        self._transport.write(self._head)
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._answered.wait()
        except TimeoutError:
            self._fail(
                CortexError(
                    Code.UPSTREAM_TIMEOUT,
                    f"{self._name} did not answer the WebSocket handshake in time",
                    hint="retry; if it stays, send the request as a POST",
                )
            )

    def _fail(self, error: CortexError) -> None:
        """An answer of the gateway; nothing was sent before."""
        if self._over:
            return
        self._answered.set()
        self._end(self._status)
        if self._transport is not None:
            self._transport.abort()
        self._mouth.fail(error)

    def _lost(self, why: str) -> None:
        if not self._over:
            self._stats.upstream_cut += 1
        self._fail(
            CortexError(
                Code.UPSTREAM_FAILED, f"{self._name} broke off the WebSocket handshake", cause=why,
                hint="retry; if it stays, send the request as a POST",
            )
        )  # fmt: skip

    def _end(self, status: int | None) -> None:
        if not self._over:
            self._over = True
            if self._on_end is not None:
                self._on_end(status)

    def _take_answer(self, data: bytes) -> None:
        """Reads the provider's answer, interim ones dropped."""
        if self._refusal is not None:
            self._take_refusal(*self._refusal, data)
            return
        self._buffer += data
        while not self._standing and self._refusal is None:
            end = self._buffer.find(END)
            if end > MAX_HEAD or (end < 0 and len(self._buffer) > MAX_HEAD):
                self._lost("its response head is too large")
            if end < 0 or self._over:
                return
            raw, self._buffer = self._buffer[: end + 4], self._buffer[end + 4 :]
            head = parse_response(raw)
            if head.status == 101:
                self._accept(head)
            elif head.status >= 200:
                self._status = head.status
                self._refusal = head, response_body(head.status, b"GET", head.length, head.chunked)
        rest, self._buffer = self._buffer, b""
        if self._standing:
            if rest:
                self._pass(rest)
        elif self._refusal is not None:
            self._take_refusal(*self._refusal, rest)

    def _accept(self, head: ResponseHead) -> None:
        upgraded = [value.strip().lower() for name, value in head.headers if name.lower() == b"upgrade"]
        if upgraded != [b"websocket"] or self._transport is None:
            self._lost("it switched to another protocol")
            return
        self._status = 101
        self._stats.tunnels += 1
        self._answered.set()
        self._standing = True
        head.length, head.chunked = None, False
        self._mouth.send([response_head(head, chunked=False, close=False)[:-2] + _HANDSHAKE + b"\r\n"])
        if self._early:
            self._transport.writelines(self._early)
            self._early = []
        self.hold(self._mouth.congested)
        self._mouth.hold(False)
        if self._on_open is not None:
            self._on_open()

    def _take_refusal(self, head: ResponseHead, body: Body, data: bytes) -> None:
        if head.status in _NOT_THERE:
            self._fail(
                CortexError(
                    Code.NO_WEBSOCKET, f"{self._name} takes no WebSocket here", hint="send the request as a POST"
                )
            )
            return
        if data and not body.done:
            pieces, _ = body.feed(data)
            self._refused += pieces
            self._refused_size += sum(map(len, pieces))
            if self._refused_size > MAX_REFUSAL:
                self._lost("the body of its refusal is too large")
                return
        if body.done:
            self._refuse(head)

    def _refuse(self, head: ResponseHead) -> None:
        """Passes on an answer that is no 101, whole. What the sandbox sends next could be frames: it is not read."""
        self._answered.set()
        self._end(self._status)
        head.length, head.chunked = self._refused_size, False
        if head.status in (204, 304):
            head.length = None
        self._mouth.send([response_head(head, chunked=False, close=True), *self._refused])
        self._mouth.close()
        if self._transport is not None:
            self._transport.abort()

    # -- the provider's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH)

    def data_received(self, data: bytes) -> None:
        if self._over:
            return
        self._mouth.touch()
        if self._held and self._transport is not None:
            # uvloop starts reading after connection_made, whatever was asked for by then.
            self._transport.pause_reading()
        if self._standing:
            self._pass(data)
            return
        try:
            self._take_answer(data)
        except CortexError as error:
            self._lost(error.what)

    def _pass(self, data: bytes) -> None:
        self._mouth.send([data])
        if self._on_text is not None and not self._listener.deaf:
            for text in self._listener.feed(data):
                self._on_text(text)

    def eof_received(self) -> bool:
        self._far_eof = True
        if self._refusal is not None and self._refusal[1].ends_at_close and not self._over:
            self._refuse(self._refusal[0])
        if self._near_eof or not self._standing:
            return False
        self._mouth.send_eof()
        return True

    def pause_writing(self) -> None:
        self._mouth.hold(True)

    def resume_writing(self) -> None:
        self._mouth.touch()
        self._mouth.hold(False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._standing and not self._over:
            self._end(self._status)
            self._mouth.close()
        elif not self._over:
            self._lost("closed before it answered")
