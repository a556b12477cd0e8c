"""ACP clients driven by one coroutine; one of them sits on a stream of a session, for turns over plain HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

from broker.errors import Code, CortexError, code_of

Message = dict[str, Any]
OnMessage = Callable[[Message], Awaitable[None]]

CALL_TIMEOUT_S = 60.0
SEND_TIMEOUT_S = 30.0
TURN_SILENCE_S = 3600.0
"""Longest silence in a turn; agents run long commands."""


class AcpCaller(ABC):
    """Calls an agent server: sends a request and hands on what comes until the answer is there."""

    def __init__(self) -> None:
        self._next_id = 0

    @abstractmethod
    async def send(self, message: Message) -> None:
        """Sends one JSON-RPC message. Raises ``CortexError``."""

    @abstractmethod
    async def receive(self) -> Message:
        """The next JSON-RPC message. Raises ``CortexError``."""

    async def call(
        self, method: str, params: Message, on_message: OnMessage | None = None, *, silence_s: float = CALL_TIMEOUT_S
    ) -> Message:
        """Sends a request and returns the whole answer (``result`` in it); notifications and requests of
        the agent go to ``on_message``.

        Raises ``CortexError``: the agent's error, a connection that ended, or ``silence_s`` without a message.
        """
        self._next_id += 1
        wanted = self._next_id
        await self.send({"jsonrpc": "2.0", "id": wanted, "method": method, "params": params})
        while True:
            try:
                async with asyncio.timeout(silence_s):
                    message = await self.receive()
            except TimeoutError as error:
                raise CortexError(
                    Code.AGENT_FAILED,
                    f"no word from the agent for {silence_s:.0f} s in {method}",
                    hint="stop the session and try again: cortex session stop",
                ) from error
            if "method" in message:
                if on_message is not None:
                    await on_message(message)
            elif message.get("id") == wanted:
                return _checked(message, method)


class AcpStream(AcpCaller):
    """Owns ``sock``, a stream whose attach header is written. Client frames are masked (RFC 6455)."""

    def __init__(self, sock: socket.socket, *, max_message_bytes: int) -> None:
        super().__init__()
        self._sock = sock
        self._ws = ClientProtocol(parse_uri("ws://session/"), state=State.OPEN, max_size=max_message_bytes)
        self._max = max_message_bytes
        self._text = bytearray()
        self._waiting: deque[Message] = deque()
        self.ended: CortexError | None = None
        """Why it was closed from this side."""

    async def send(self, message: Message) -> None:
        """Sends one message as a text frame."""
        self._ws.send_text(dump(message))
        await self._flush()

    def close(self, why: CortexError | None = None) -> None:
        """Closes the stream; never an agent's turn. ``why`` is what a pending call raises."""
        self.ended = self.ended or why
        with contextlib.suppress(OSError):  # the other side may have been first
            self._sock.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Frees the socket; only when no call is pending."""
        self._sock.close()

    async def receive(self) -> Message:
        """The next message; control frames are answered here."""
        while not self._waiting:
            self._ws.receive_data(await self._read())
            for event in self._ws.events_received():
                if isinstance(event, Frame):
                    self._frame(event)
            await self._flush()
            if self._ws.parser_exc is not None:
                # From here on it would swallow whatever comes.
                raise _broken(str(self._ws.parser_exc))
        return self._waiting.popleft()

    async def _read(self) -> bytes:
        if self.ended is not None:
            raise self.ended
        try:
            data = await asyncio.get_running_loop().sock_recv(self._sock, 65_536)
        except OSError as error:
            raise self.ended or _broken(error.strerror or "the stream broke") from error
        if not data:
            raise self.ended or _broken("the stream ended")
        return data

    def _frame(self, frame: Frame) -> None:
        if frame.opcode is Opcode.CLOSE:
            code = int.from_bytes(frame.data[:2], "big")
            raise _broken(f"closed with {code} {bytes(frame.data[2:]).decode(errors='replace')}")
        if frame.opcode not in (Opcode.TEXT, Opcode.CONT):
            return
        # One buffer: fragments without content may come for ever, and must cost nothing.
        self._text += frame.data
        if len(self._text) > self._max:
            raise _broken("a message is too big")
        if frame.fin:
            text, self._text = bytes(self._text), bytearray()
            self._waiting.append(parse_message(text))

    async def _flush(self) -> None:
        data = b"".join(self._ws.data_to_send())
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await asyncio.get_running_loop().sock_sendall(self._sock, data)
        except TimeoutError as error:
            raise _broken("the agent server takes no more") from error
        except OSError as error:
            raise self.ended or _broken(error.strerror or "the stream broke") from error


def decide(params: Message, policy: str) -> dict[str, str]:
    """The ACP outcome of a permission request under ``policy`` (allow or deny), once rather than for always."""
    kinds = ("allow_once", "allow_always") if policy == "allow" else ("reject_once", "reject_always")
    given = params.get("options")
    options = [option for option in given if isinstance(option, dict)] if isinstance(given, list) else []
    for kind in kinds:
        for option in options:
            if option.get("kind") == kind and isinstance(option.get("optionId"), str):
                return {"outcome": "selected", "optionId": option["optionId"]}
    return {"outcome": "cancelled"}


def dump(value: Any) -> bytes:
    """JSON in UTF-8. Half a surrogate pair, which agents in JavaScript cut out of emojis, stays escaped."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


def part(message: Message, name: str) -> Message:
    """The object under ``name``; an empty one where there is none: what a sandbox sends has any shape."""
    found = message.get(name)
    return found if isinstance(found, dict) else {}


def parse_message(text: bytes | str) -> Message:
    """One JSON-RPC message. Raises ``AGENT_FAILED``."""
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken("a message is not JSON") from error
    if not isinstance(message, dict):
        raise _broken("a message is not an object")
    return message


def _checked(message: Message, method: str) -> Message:
    error = message.get("error")
    if error is None:
        return message
    facts = part(message, "error")
    data = part(facts, "data")
    raise CortexError(
        code_of(str(data.get("code")), Code.AGENT_FAILED),
        f"the agent refused {method}: {str(facts.get('message'))[:500]}",
        hint=str(data.get("hint") or "see the agent's documentation"),
        details={"jsonrpc_code": facts.get("code")},
    )


def _broken(why: str) -> CortexError:
    return CortexError(
        Code.AGENT_FAILED,
        "the connection to the agent ended",
        cause=why,
        hint="the work goes on in the sandbox; attach or prompt again with acp_session",
    )
