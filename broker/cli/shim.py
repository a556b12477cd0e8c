"""stdio on one side, a WebSocket that may break at any time on the other."""

from __future__ import annotations

import asyncio
import json
import random
import uuid
from collections.abc import Awaitable, Callable, Sequence

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from broker.cli import output
from broker.cli.acp_client import MAX_MESSAGE, dial, why_closed
from broker.cli.resume import Memory, Message
from broker.cli.stdio import LineReader, write_all
from broker.control.acp import parse_message
from broker.errors import Code, CortexError
from broker.host.tasks import TaskOwner

Where = Callable[[], Awaitable[tuple[str, str]]]
"""URL and token for the next connection."""

BACKOFF_MIN_S = 0.2
BACKOFF_MAX_S = 10.0
FIRST_TRY_S = 30.0
"""How long the first connection is tried for; later ones are for ever."""
RESUME_TIMEOUT_S = 120.0
LEAVE_S = 5.0
"""How long answers are awaited after the IDE has closed stdin."""
_FINAL = {Code.BAD_REQUEST, Code.FORBIDDEN, Code.HOST_FORBIDDEN, Code.ORIGIN_FORBIDDEN, Code.SUPERSEDED}
_FINAL |= {Code.WRONG_PROTOCOL, Code.BAD_CONFIG, Code.BAD_USER_ID, Code.UNKNOWN_AGENT, Code.SESSION_CONFLICT}
_FINAL |= {Code.ADMIN_REQUIRED, Code.TOKEN_MISSING, Code.FRAME_TOO_BIG, Code.NO_SESSION}
_FINAL |= {Code.BODY_TOO_LARGE}
_PARSE_ERROR: Message = {"jsonrpc": "2.0", "id": None}
_TOKEN = {Code.TOKEN_INVALID, Code.TOKEN_EXPIRED, Code.TOKEN_REVOKED}


class Shim:
    """Ties descriptors ``stdin`` and ``stdout`` to the session that ``where`` names."""

    def __init__(self, where: Where, stdin: int, stdout: int) -> None:
        self._where = where
        self._stdin = stdin
        self._stdout = stdout
        self._memory = Memory(lambda: uuid.uuid4().hex)
        self._held: Message | None = None
        """A notification that was read and perhaps not sent; the rest is in ``_memory``."""
        self._answered = asyncio.Event()

    async def run(self) -> int:
        """Until the IDE closes stdin (0) or the broker refuses for good (raises)."""
        lines = LineReader(self._stdin, limit=MAX_MESSAGE)
        first, refused, delay = True, 0, BACKOFF_MIN_S
        deadline = asyncio.get_running_loop().time() + FIRST_TRY_S
        while True:
            try:
                ws = await self._connect()
                first, refused, delay = False, 0, BACKOFF_MIN_S
                if await self._serve(ws, lines):
                    return 0
            except CortexError as error:
                refused += error.code in _TOKEN
                late = first and asyncio.get_running_loop().time() > deadline
                if error.code in _FINAL or refused > 1 or late:
                    await self._tell(self._memory.give_up(error))
                    raise
                output.say(f"cortex: {error}; connecting again")
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(BACKOFF_MAX_S, delay * 2)

    async def _connect(self) -> ClientConnection:
        """A connection that is where the last one was."""
        url, token = await self._where()
        ws = await dial(url, token)
        try:
            async with asyncio.timeout(RESUME_TIMEOUT_S):
                await self._resume(ws)
        except TimeoutError as error:
            await ws.close()
            raise CortexError(
                Code.BRINGUP_TIMEOUT, "the session did not resume in time", hint="connecting again"
            ) from error
        except ConnectionClosed as error:
            raise why_closed(error) from error
        return ws

    async def _resume(self, ws: ClientConnection) -> None:
        for request in self._memory.resume():
            await self._send(ws, [request])
            while True:
                raw = await ws.recv(decode=False)
                message = parse_message(raw)
                ours = self._memory.is_own(message) and message["id"] == request["id"]
                await self._take(ws, message, raw)
                if ours:
                    if "error" in message:
                        output.say(f"cortex: {request['method']} failed: {message['error'].get('message')}")
                    break
        resent, lost = self._memory.again()
        await self._send(ws, resent)
        await self._tell(lost)

    async def _serve(self, ws: ClientConnection, lines: LineReader) -> bool:
        """Both directions until one ends; True when it was the IDE. Raises why the connection ended."""
        tasks = TaskOwner("attach")
        up = tasks.start(self._up(ws, lines), "up", on_error=_told_below)
        down = tasks.start(self._down(ws), "down", on_error=_told_below)
        try:
            await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
            if up.done() and not down.done():
                up.result()
                return True
            down.result()
        except ConnectionClosed as error:
            raise why_closed(error) from error
        finally:
            await tasks.close()
            await ws.close()
        return False

    async def _up(self, ws: ClientConnection, lines: LineReader) -> None:
        """Messages of the IDE, until it closes stdin."""
        if self._held is not None:
            await self._send(ws, [self._held])
        while True:
            self._held = None
            line = await lines.next()
            if line is None:
                break
            if not line.strip():
                continue
            try:
                message = self._memory.from_ide(parse_message(line))
            except CortexError as error:
                await self._tell([_PARSE_ERROR | {"error": {"code": -32700, "message": str(error.cause)}}])
                continue
            if "method" in message and "id" not in message:
                self._held = message
            await self._send(ws, [message])
        await self._drain()

    async def _down(self, ws: ClientConnection) -> None:
        """Messages of the broker, until the connection ends."""
        while True:
            raw = await ws.recv(decode=False)
            await self._take(ws, parse_message(raw), raw)

    async def _take(self, ws: ClientConnection, message: Message, raw: bytes) -> None:
        told, answers = self._memory.from_broker(message)
        if told:
            await self._write(raw if b"\n" not in raw else _dumps(message))
        if not self._memory.waiting:
            self._answered.set()
        await self._send(ws, answers)

    async def _send(self, ws: ClientConnection, messages: Sequence[Message]) -> None:
        for message in messages:
            await ws.send(_dumps(message), text=True)

    async def _tell(self, messages: Sequence[Message]) -> None:
        for message in messages:
            await self._write(_dumps(message))

    async def _write(self, data: bytes) -> None:
        """In a thread: an IDE that does not read must not stop pings."""
        await asyncio.to_thread(write_all, self._stdout, data + b"\n")

    async def _drain(self) -> None:
        """Answers on their way still reach whoever reads stdout."""
        try:
            async with asyncio.timeout(LEAVE_S):
                while self._memory.waiting:
                    self._answered.clear()
                    await self._answered.wait()
        except TimeoutError:
            output.say("cortex: left with requests unanswered; the work goes on in the sandbox")


def _dumps(message: Message) -> bytes:
    return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode()


def _told_below(error: BaseException) -> None:
    """``_serve`` raises it."""
