"""A temporary broker with one session, and the chat with it.

It is talked to as by any client: control API over HTTP, front door over WebSocket.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from broker.app import Broker
from broker.cli import output
from broker.cli.acp_client import AcpClient, dial
from broker.cli.chat import Chat
from broker.cli.client import ControlClient
from broker.cli.findings import driver_problem
from broker.cli.options import settings
from broker.cli.stdio import LineReader
from broker.config import Config as Settings
from broker.errors import CortexError
from broker.host import logs
from broker.host.tasks import TaskOwner
from broker.settings import Loaded

USER = "demo"
MAX_LINE = 2**20
STOP_TIMEOUT_S = 30.0
GREETING = "Type a message; Ctrl-C cancels a turn; an empty line ends the demo. The built-in agent also runs: !ls /"

Driver = Literal["process", "docker"]


async def run(prompt: str | None, driver: Driver, agent: str, config: Path | None, as_json: bool) -> None:
    """One turn with ``prompt``, or a chat when there is none; leaves nothing behind. Raises ``CortexError``."""
    directory = Path(tempfile.mkdtemp(prefix="cortex-demo-"))
    try:
        overrides = await _overrides(directory, driver, settings(config).config)
        async with _broker(settings(config, overrides), overrides) as control:
            body = {"user": USER, "agent": agent or None}
            session = await control.call("POST", "sessions", body=body)
            try:
                told = await _converse(control, session, prompt, as_json)
            except CortexError:
                await _tell_reason(control)
                raise
            finally:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await control.call("DELETE", "sessions", USER, "main")
        if as_json:
            output.put_json(told)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def _overrides(directory: Path, driver: Driver, found: Settings) -> dict[str, Any]:
    """Settings of the temporary broker: nothing of it is shared with one that may run here."""
    values: dict[str, Any] = {
        "broker.state_dir": str(directory / "state"),
        "broker.runtime_dir": str(directory / "run"),
        "broker.users_dir": str(directory / "users"),
        "broker.log_level": "error",
        "front.listen": "127.0.0.1:0",
        "control.listen": "127.0.0.1:0",
        "control.admin_token_file": str(directory / "state" / "admin.token"),
        "control.hook_secrets_file": str(directory / "state" / "hook.secrets"),
        "vault.key_file": str(directory / "state" / "vault.key"),
        "control.public_ws_url": "",
        "gateway.mode": "child",
        "gateway.link": str(directory / "run" / "gateway.sock"),
        "sandbox.driver": driver,
    }
    if driver == "process" and (problem := await driver_problem(found, "process")) is not None:
        output.warn(f"{problem}\n  NO ISOLATION: the agent runs as a plain process with your own rights.")
        values["sandbox.process.allow_unisolated"] = True
    return values


@asynccontextmanager
async def _broker(loaded: Loaded, overrides: dict[str, Any]) -> AsyncIterator[ControlClient]:
    """A running broker, as a client of its control API sees it."""
    logs.setup(loaded.config.broker.log_level, "text")
    broker = Broker(loaded, overrides)
    try:
        await broker.start()
        async with ControlClient(broker.control_url, broker.admin_token) as control:
            yield control
    finally:
        await broker.stop()


async def _converse(
    control: ControlClient, session: dict[str, Any], prompt: str | None, as_json: bool
) -> dict[str, Any]:
    """The chat; returns what --json prints."""
    ws = await dial(session["acp_url"], session["token"])
    try:
        client = AcpClient(ws)
        await client.initialize()
        lines = LineReader(sys.stdin.fileno(), limit=MAX_LINE) if prompt is None else None
        chat = Chat(client, await client.new_session("/"), lines, echo=not as_json)
        if lines is not None:
            return await _terminal(chat, lines, control)
        turn = await chat.turn(prompt or "")
        found = await _timeline(control)
        if not as_json:
            output.put("\n" + output.timeline(found))
        return {"reply": turn.reply, "stop_reason": turn.stop_reason, "timeline": found}
    finally:
        await ws.close()


async def _terminal(chat: Chat, lines: LineReader, control: ControlClient) -> dict[str, Any]:
    """Prompts until the person has enough."""
    output.say(output.timeline(await _timeline(control)))
    output.say(f"\n{GREETING}")
    tasks = TaskOwner("demo")

    def interrupt() -> None:
        if chat.busy:
            tasks.start(chat.cancel(), "cancel")
        else:
            lines.end()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        await _chat(chat, lines)
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        await tasks.close()
    return {}


async def _chat(chat: Chat, lines: LineReader) -> None:
    while True:
        sys.stderr.write(output.styled("\nyou> ", "1", sys.stderr))
        sys.stderr.flush()
        line = await lines.next()
        text = (line or b"").decode(errors="replace").strip()
        if not text:
            return
        try:
            await chat.turn(text)
        except CortexError as error:
            output.report(error)


async def _tell_reason(control: ControlClient) -> None:
    """What the session says of itself; a close frame has room for a hint only."""
    reason = (await control.call("GET", "sessions", USER, "main")).get("reason")
    if reason:
        output.say(f"session: {reason}")


async def _timeline(control: ControlClient) -> dict[str, Any]:
    found: list[dict[str, Any]] = (await control.call("GET", "sessions", USER, "main", "timeline"))["bringups"]
    return found[0] if found else {"stages": [], "path": "unknown"}
