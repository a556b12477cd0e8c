"""ACP over WebSocket, as any client would speak it: for `demo` and `attach`."""

from __future__ import annotations

import json
import ssl
from typing import Any
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.typing import Subprotocol

from broker.control.acp import AcpCaller, Message, parse_message
from broker.errors import Code, CortexError, code_of

MAX_MESSAGE = 32 * 2**20
OPEN_TIMEOUT_S = 15.0
CLOSE_TIMEOUT_S = 2.0
SUBPROTOCOLS = [Subprotocol("cortex.acp.v1"), Subprotocol("acp.v1")]
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


async def dial(url: str, token: str) -> ClientConnection:
    """A connection to the front door. Raises what the broker refuses with, or ``UNREACHABLE``."""
    proxy: Any = None if urlsplit(url).hostname in _LOOPBACK else True
    try:
        return await connect(
            url,
            subprotocols=SUBPROTOCOLS,
            additional_headers={"Authorization": f"Bearer {token}"},
            compression=None,
            max_size=MAX_MESSAGE,
            open_timeout=OPEN_TIMEOUT_S,
            close_timeout=CLOSE_TIMEOUT_S,
            proxy=proxy,
        )
    except InvalidStatus as error:
        raise _refusal(error) from error
    except (OSError, InvalidHandshake, InvalidURI, ConnectionClosed, TimeoutError, ssl.SSLError) as error:
        raise CortexError(
            Code.UNREACHABLE,
            f"no WebSocket at {url.partition('?')[0]}",
            cause=str(error) or type(error).__name__,
            hint="is the broker running (cortex serve), and is this its address?",
        ) from error


def _refusal(error: InvalidStatus) -> CortexError:
    try:
        problem = json.loads(bytes(error.response.body))
    except ValueError:
        problem = {"title": f"refused with HTTP {error.response.status_code}", "hint": "is this a Cortex broker?"}
    return CortexError.from_problem(problem)


def why_closed(error: ConnectionClosed) -> CortexError:
    """The close frame as the error that it tells of: its reason is ``code: hint``."""
    if error.rcvd is None:
        return CortexError(
            Code.UNREACHABLE, "the connection broke", hint="the work goes on in the sandbox; connect again"
        )
    slug, _, hint = error.rcvd.reason.partition(": ")
    code = code_of(slug, _by_close_code(error.rcvd.code))
    return CortexError(
        code, f"the broker closed the connection ({error.rcvd.code})", cause=slug or None, hint=hint or "connect again"
    )


def _by_close_code(number: int) -> Code:
    known = {1001: Code.RESTARTING, 1012: Code.RESTARTING, 1009: Code.FRAME_TOO_BIG, 4400: Code.BAD_REQUEST}
    known |= {4401: Code.TOKEN_INVALID, 4403: Code.FORBIDDEN, 4408: Code.SLOW_CONSUMER, 4409: Code.SUPERSEDED}
    return (known | {1011: Code.AGENT_FAILED, 4429: Code.SESSION_BUSY}).get(number, Code.UNREACHABLE)


class AcpClient(AcpCaller):
    """One conversation partner on ``ws``."""

    def __init__(self, ws: ClientConnection) -> None:
        super().__init__()
        self._ws = ws

    async def send(self, message: Message) -> None:
        """See ``AcpCaller``."""
        try:
            await self._ws.send(json.dumps(message, ensure_ascii=False, separators=(",", ":")))
        except ConnectionClosed as error:
            raise why_closed(error) from error

    async def receive(self) -> Message:
        """See ``AcpCaller``."""
        try:
            return parse_message(await self._ws.recv())
        except ConnectionClosed as error:
            raise why_closed(error) from error

    async def initialize(self) -> Message:
        """Introduces this client; returns the agent's answer."""
        info = {"name": "cortex-cli", "title": "Cortex", "version": "1"}
        capabilities = {"fs": {"readTextFile": False, "writeTextFile": False}, "terminal": False}
        params = {"protocolVersion": 1, "clientInfo": info, "clientCapabilities": capabilities}
        result: Message = (await self.call("initialize", params)).get("result", {})
        return result

    async def new_session(self, cwd: str) -> str:
        """A new conversation; returns its id."""
        answer = await self.call("session/new", {"cwd": cwd, "mcpServers": []})
        return str(answer.get("result", {}).get("sessionId", ""))
