"""One conversation in the terminal."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from broker.cli import output
from broker.cli.acp_client import AcpClient
from broker.cli.stdio import LineReader
from broker.control.acp import Message, decide

TURN_SILENCE_S = 600.0


@dataclass
class Turn:
    """What came of one prompt."""

    reply: str
    stop_reason: str


class Chat:
    """One conversation in the terminal. ``lines``: where the person types; None when there is nobody to ask."""

    def __init__(self, client: AcpClient, acp_session: str, lines: LineReader | None, *, echo: bool) -> None:
        self._client = client
        self._acp_session = acp_session
        self._lines = lines
        self._echo = echo
        self._reply: list[str] = []
        self.busy = False

    async def turn(self, text: str) -> Turn:
        """Sends ``text`` and shows the reply as it comes."""
        self._reply = []
        content = [{"type": "text", "text": text}]
        params = {"sessionId": self._acp_session, "prompt": content}
        self.busy = True
        try:
            answer = await self._client.call("session/prompt", params, self._on_message, silence_s=TURN_SILENCE_S)
        finally:
            self.busy = False
            self._show("\n")
        return Turn("".join(self._reply), str(answer.get("result", {}).get("stopReason", "")))

    async def cancel(self) -> None:
        """Asks the agent to end the turn; the turn's answer then says cancelled."""
        params = {"sessionId": self._acp_session}
        await self._client.send({"jsonrpc": "2.0", "method": "session/cancel", "params": params})

    async def _on_message(self, message: Message) -> None:
        params = message.get("params", {})
        if message["method"] == "session/update":
            self._update(params.get("update", {}))
        elif message["method"] == "session/request_permission" and "id" in message:
            outcome = decide(params, await self._allowed(params))
            await self._client.send({"jsonrpc": "2.0", "id": message["id"], "result": {"outcome": outcome}})
        elif "id" in message:
            error = {"code": -32601, "message": "not offered by this client"}
            await self._client.send({"jsonrpc": "2.0", "id": message["id"], "error": error})

    def _update(self, update: Message) -> None:
        kind = update.get("sessionUpdate")
        content = update.get("content")
        if kind == "agent_message_chunk" and isinstance(content, dict) and content.get("type") == "text":
            self._reply.append(str(content.get("text", "")))
            self._show(str(content.get("text", "")))
        elif kind == "tool_call":
            output.say(output.styled(f"\n[{update.get('title', 'tool')}]", "2", sys.stderr))

    async def _allowed(self, params: Message) -> str:
        """Asks the person; without one the answer is no."""
        title = params.get("toolCall", {}).get("title") or "a tool"
        if self._lines is None:
            output.say(f"[denied: {title}; nobody to ask]")
            return "deny"
        output.say(f"\nThe agent asks to run: {title}. Allow? [y/N]")
        answer = await self._lines.next()
        return "allow" if (answer or b"").strip().lower() in (b"y", b"yes") else "deny"

    def _show(self, text: str) -> None:
        if self._echo:
            sys.stdout.write(text)
            sys.stdout.flush()
