"""CONNECT (RFC 9110 section 9.3.6): two connections tied together, bytes untouched, half-closes passed on."""

from __future__ import annotations

import asyncio
from typing import Protocol, cast

from broker.errors import CortexError
from broker.gateway.answers import ESTABLISHED
from broker.gateway.dialer import Dialer
from broker.gateway.egress import Flow
from broker.gateway.routes import Origin
from broker.gateway.stats import Stats
from broker.host.tasks import TaskOwner

MAX_EARLY = 64 * 2**10
"""Bytes kept from a sandbox that speaks before the tunnel stands."""
WRITE_HIGH = 64 * 2**10


class Mouth(Protocol):
    """The sandbox's connection, as a tunnel sees it."""

    congested: bool

    def send(self, parts: list[bytes]) -> None: ...
    def send_eof(self) -> None: ...
    def hold(self, held: bool) -> None: ...
    def touch(self) -> None: ...
    def fail(self, error: CortexError) -> None: ...
    def close(self) -> None:
        """Closes once what was sent is out."""


class Tunnel(asyncio.Protocol):
    """The far side of a tunnel. ``start`` once; ends by ``abort`` or when both sides have ended. Closes ``flow``."""

    def __init__(
        self, mouth: Mouth, origin: Origin, flow: Flow, dialer: Dialer, stats: Stats, tasks: TaskOwner
    ) -> None:
        self._mouth = mouth
        self._origin = origin
        self._flow = flow
        self._dialer = dialer
        self._stats = stats
        self._tasks = tasks
        self._task: asyncio.Task[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._standing = False
        self._early: list[bytes] = []
        self._early_size = 0
        self._greeting: list[bytes] = []
        self._held = False
        self._near_eof = False
        self._far_eof = False
        self._over = False

    # -- the sandbox's side

    def start(self) -> None:
        self._task = self._tasks.start(self._dial(), "tunnel")

    def from_sandbox(self, data: bytes) -> None:
        self._flow.moved(len(data), 0)
        if self._over:
            return
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
        self._over = True
        self._flow.close()
        if self._task is not None:
            self._task.cancel()
        if self._transport is not None:
            self._transport.abort()

    # -- dialling

    async def _dial(self) -> None:
        try:
            await self._dialer.dial(self._origin, lambda: self)
        except CortexError as error:
            self._stats.tunnels_denied += error.code.http_status == 403
            self._flow.close(error)
            self._task = None
            if not self._over:
                self._over = True
                self._mouth.fail(error)
            return
        self._task = None
        if self._over or self._transport is None:
            self.abort()
            self._mouth.close()
            return
        self._stand(self._transport)

    def _stand(self, transport: asyncio.Transport) -> None:
        self._stats.tunnels += 1
        self._flow.stands()
        self._standing = True
        self._mouth.send([ESTABLISHED, *self._greeting])
        self._greeting = []
        if self._early:
            transport.writelines(self._early)
            self._early = []
        if self._far_eof:
            self._mouth.send_eof()
        self.hold(self._mouth.congested)
        self._mouth.hold(False)

    # -- the far side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH)

    def data_received(self, data: bytes) -> None:
        self._mouth.touch()
        self._flow.moved(0, len(data))
        if self._over:
            return
        if self._held and self._transport is not None:
            # uvloop starts reading after connection_made, whatever was asked for by then.
            self._transport.pause_reading()
        if self._standing:
            self._mouth.send([data])
        else:
            self._greeting.append(data)
            self.hold(True)

    def eof_received(self) -> bool:
        self._far_eof = True
        if self._near_eof:
            return False
        if self._standing:
            self._mouth.send_eof()
        return True

    def pause_writing(self) -> None:
        self._mouth.hold(True)

    def resume_writing(self) -> None:
        self._mouth.touch()
        self._mouth.hold(False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._flow.close()
        if self._standing and not self._over:
            self._over = True
            self._mouth.close()
