"""Agents that speak WebSocket themselves: readiness of their port, and clients tied to it.

Client frames arrive masked and agent frames unmasked on both sides of us, so after the handshake
with the agent bytes pass untouched.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable

from sandbox_agent import tie
from sandbox_agent.tasks import TaskOwner, log
from sandbox_agent.wire.messages import Attach

HANDSHAKE_TIMEOUT_S = 10.0
MAX_HEAD = 16_384
RETRY_PAUSE_S = (0.02, 0.25)


class HandshakeError(Exception):
    """The agent's port does not answer as a WebSocket."""


def close_frame(code: int, reason: str) -> bytes:
    """An unmasked close frame, RFC 6455 section 5.5.1; the reason is cut at 123 bytes."""
    body = struct.pack("!H", code) + reason.encode()[:123].decode(errors="ignore").encode()
    return bytes((0x88, len(body))) + body


async def port_ready(port: int, timeout_s: float, given_up: Callable[[], bool]) -> bool:
    """Whether 127.0.0.1:``port`` accepts within ``timeout_s``; the one place that polls, as there is no event."""
    loop = asyncio.get_running_loop()
    end, pause = loop.time() + timeout_s, RETRY_PAUSE_S[0]
    while not given_up() and loop.time() < end:
        with contextlib.suppress(OSError):
            sock = await _connect(port)
            sock.close()
            return True
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, RETRY_PAUSE_S[1])
    return False


async def _connect(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    except BaseException:
        sock.close()
        raise
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


async def shake_hands(sock: socket.socket, port: int) -> bytes:
    """The client's handshake on a connected socket; returns what came after the answer's head.

    No Origin (codex refuses any), no extension. Raises ``HandshakeError``, ``OSError``, ``TimeoutError``.
    """
    from websockets.client import ClientProtocol  # only these agents need it
    from websockets.protocol import State
    from websockets.uri import parse_uri

    protocol = ClientProtocol(parse_uri(f"ws://127.0.0.1:{port}/"))
    protocol.send_request(protocol.connect())
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
        await loop.sock_sendall(sock, b"".join(protocol.data_to_send()))
        head = b""
        while b"\r\n\r\n" not in head:
            data = await loop.sock_recv(sock, 4096)
            head += data
            if not data or len(head) > MAX_HEAD:
                raise HandshakeError("the agent's port closed or did not answer as HTTP")
    head, _, rest = head.partition(b"\r\n\r\n")
    protocol.receive_data(head + b"\r\n\r\n")
    if protocol.state is not State.OPEN:
        raise HandshakeError(f"the agent refused the WebSocket: {protocol.handshake_exc}")
    return rest


class RawClients:
    """Clients tied to the agent's own port. ``port``: 0 while there is none."""

    def __init__(self, *, port: Callable[[], int], on_change: Callable[[], None]) -> None:
        self._port = port
        self._on_change = on_change
        self._tasks = TaskOwner("raw")
        self.count = 0

    def serve(self, sock: socket.socket, attach: Attach) -> None:
        """Takes over a client's stream, a non-blocking socket."""
        self.count += 1
        self._on_change()
        self._tasks.start(self._serve(sock), attach.connection)

    async def close(self) -> None:
        await self._tasks.close()

    async def _serve(self, sock: socket.socket) -> None:
        agent: socket.socket | None = None
        try:
            port = self._port()
            if port == 0:
                raise HandshakeError("the agent does not run")
            agent = await _connect(port)
            rest = await shake_hands(agent, port)
            await tie.join(sock, agent, to_stream=rest, on_lost=self._gone)
        except (HandshakeError, OSError, TimeoutError) as error:
            log.warning("raw client: %s", error)
            refuse(sock, 1011, "agent.failed: the agent's WebSocket does not answer; try again")
            if agent is not None:
                agent.close()
            self._gone()

    def _gone(self) -> None:
        self.count -= 1
        self._on_change()


def refuse(sock: socket.socket, code: int, reason: str) -> None:
    """Closes a stream that nobody serves, with a close frame."""
    with contextlib.suppress(OSError):
        sock.send(close_frame(code, reason))
    sock.close()
