"""One control connection: whole messages in and out of a plain socket, with bounds on both ways."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator

from broker.sandbox.limits import LinkLimits, TokenBucket
from sandbox_agent.wire.codec import MAX_MESSAGE, Decoder, WireError, pack
from sandbox_agent.wire.messages import FROM_SANDBOX, MAX_CREDENTIAL_FILE, MAX_TEXT, Message, parse

_READ = 65_536
_MAX_BUFFERED = 2 * MAX_MESSAGE
_MAX_ITEMS = 1024
_LONG = ("agent_info",)
_AGENT_STATES = ("stopped", "starting", "ready", "restarting", "failed")


class Flood(WireError):
    """The sandbox sends more messages than it may."""


class ControlChannel:
    """Owns no socket: whoever made it closes ``sock`` when ``messages`` has ended."""

    def __init__(self, sock: socket.socket, limits: LinkLimits) -> None:
        self._sock = sock
        self._decoder = Decoder(limit=limits.max_message_bytes)
        self._bucket = TokenBucket(limits.message_burst, limits.messages_per_s)
        self._out = bytearray()
        self.closed = False

    async def messages(self) -> AsyncGenerator[Message, None]:
        """What comes in, checked; ends when the connection does.

        Raises ``WireError`` for a message that breaks the protocol, ``Flood`` for too many.
        """
        loop = asyncio.get_running_loop()
        while not self.closed:
            try:
                data = await loop.sock_recv(self._sock, _READ)
            except OSError:
                return
            if not data:
                return
            for raw in self._decoder.feed(data):
                if not self._bucket.take(loop.time()):
                    raise Flood("more messages than a sandbox may send")
                yield checked(parse(raw, FROM_SANDBOX))

    def send(self, message: Message) -> None:
        """Sends, or buffers what the peer does not take. A peer that takes nothing is cut off.

        Raises ``WireError`` when the message is over the limit of the wire.
        """
        data = pack(message.encode())
        if self.closed:
            return
        if not self._out:
            data = data[self._send_now(data) :]
            if data and not self.closed:
                asyncio.get_running_loop().add_writer(self._sock.fileno(), self._flush)
        self._out += data
        if len(self._out) > _MAX_BUFFERED:
            self.close()

    def _send_now(self, data: bytes | bytearray) -> int:
        try:
            return self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            self.close()
            return len(data)

    def _flush(self) -> None:
        del self._out[: self._send_now(self._out)]
        if not self._out and not self.closed:
            asyncio.get_running_loop().remove_writer(self._sock.fileno())

    def close(self) -> None:
        """Ends the connection both ways, so that ``messages`` ends too. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._out.clear()
        try:
            asyncio.get_running_loop().remove_writer(self._sock.fileno())
            self._sock.shutdown(socket.SHUT_RDWR)
        except (OSError, ValueError):
            return


def checked(message: Message) -> Message:
    """Checks what the types do not say: lengths of texts, numbers of entries, the agent's state.

    Raises ``WireError``.
    """
    for name, value in vars(message).items():
        if isinstance(value, str) and len(value) > MAX_TEXT and name not in _LONG:
            raise WireError(f"{message.TYPE}.{name} is too long")
        if isinstance(value, (dict, list)) and len(value) > _MAX_ITEMS:
            raise WireError(f"{message.TYPE}.{name} has too many entries")
        if isinstance(value, bytes) and len(value) > MAX_CREDENTIAL_FILE:
            raise WireError(f"{message.TYPE}.{name} is too big")
    agent = getattr(message, "agent", None)
    if agent is not None and agent not in _AGENT_STATES:
        raise WireError(f"{message.TYPE}.agent is no state: {agent[:40]!r}")
    return message
