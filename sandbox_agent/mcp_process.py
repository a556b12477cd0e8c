"""The process of an MCP server: messages in and out, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Mapping

from sandbox_agent import jsonrpc, mcp_protocol, spawn
from sandbox_agent.jsonrpc import Message
from sandbox_agent.mcp_budget import Budget
from sandbox_agent.mcp_spec import ServerSpec
from sandbox_agent.process import ExitWatch
from sandbox_agent.stdio import AgentStdio

END_GRACE_S = 2.0
MAX_GARBAGE = 1000
"""Lines in a row that are no messages; a banner may be more than one."""


class ServerProcess:
    """Running from the start on. ``on_message`` gets a kind (as ``jsonrpc.kind``) and a message; ``on_dropped``: one
    was too long; ``on_over``, once: ``over`` says why it has ended, or has to be ended."""

    def __init__(
        self,
        spec: ServerSpec,
        env: Mapping[str, str],
        directory: str,
        *,
        on_message: Callable[[str, Message], None],
        on_dropped: Callable[[], None],
        on_over: Callable[[], None],
    ) -> None:
        """Raises ``SpawnError`` or ``OSError``."""
        os.makedirs(directory, mode=0o755, exist_ok=True)
        child = spawn.spawn([spec.command, *spec.args], {**env, **dict(spec.env)}, directory)
        self.pid = child.pid
        self.over = ""
        self._on_message = on_message
        self._on_over = on_over
        self._loop = asyncio.get_running_loop()
        self._budget = Budget()
        self._garbage = 0
        self._resume: asyncio.TimerHandle | None = None
        self._gone = asyncio.Event()
        self._stdio = AgentStdio(
            child,
            max_line=mcp_protocol.MAX_LINE,
            on_lines=self._lines,
            on_hung=lambda: self.give_up("stopped reading its input, or closed its input or output"),
            on_dropped=on_dropped,
        )
        self._watch = ExitWatch(child, self._exited)

    def send(self, message: Message) -> None:
        self._stdio.write(jsonrpc.dumps(message) + b"\n")

    def give_up(self, why: str) -> None:
        """It is no good any more; ``end`` is to follow."""
        if not self.over:
            said = self._stdio.last_words
            self.over = f"{why}: {said}" if said else why
            self._on_over()

    async def end(self) -> None:
        """Ends it and what it has started; returns when it is gone or could not be killed in time."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._gone.is_set():
                break
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(END_GRACE_S):
                    await self._gone.wait()
        self._close()

    def _close(self) -> None:
        self._watch.close()
        self._stdio.finish()
        if self._resume is not None:
            self._resume.cancel()

    def _exited(self, status: int) -> None:
        self._stdio.finish()  # what it has said last counts
        self._gone.set()
        self.give_up(f"was killed by signal {-status}" if status < 0 else f"exited with code {status}")

    def _lines(self, lines: list[bytes]) -> None:
        for line in lines:
            if self.over:
                return
            try:
                found = [(jsonrpc.kind(message), message) for message in mcp_protocol.messages(line)]
            except ValueError:
                self._garbage += 1
                if self._garbage > MAX_GARBAGE:
                    self.give_up("prints what is no message of MCP")
                continue
            self._garbage = 0
            for kind, message in found:
                self._on_message(kind, message)
        pause = self._budget.spend(self._loop.time(), len(lines), sum(map(len, lines)))
        if pause > 0 and self._resume is None:
            self._stdio.hold(True)
            self._resume = self._loop.call_later(pause, self._go_on)

    def _go_on(self) -> None:
        self._resume = None
        self._stdio.hold(False)
