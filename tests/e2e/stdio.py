"""JSON-RPC with an agent on its standard streams."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ANSWER_S = 60.0


class RpcError(Exception):
    """The agent's error answer."""


class Rpc:
    """JSON-RPC by lines. ``seen``: notifications with their arrival (``time.monotonic``); permissions are granted."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.seen: list[tuple[float, dict[str, Any]]] = []
        self.asks: list[dict[str, Any]] = []
        self._process = process
        self._open: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._number = 0
        self._news = asyncio.Event()
        self._reader = asyncio.get_running_loop().create_task(self._read())

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            if line.startswith(b"{"):
                self._take(json.loads(line), time.monotonic())
            self._news.set()
        for waiting in self._open.values():
            if not waiting.done():
                waiting.set_exception(RpcError("the agent ended"))

    def _take(self, message: dict[str, Any], at: float) -> None:
        if "method" not in message:
            waiting = self._open.pop(message.get("id", 0), None)
            if waiting is not None and not waiting.done():
                waiting.set_result(message)
        elif "id" in message:
            self.asks.append(message)
            self._send({"id": message["id"], "result": granted(message)})
        else:
            self.seen.append((at, message))

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")

    def notify(self, method: str, params: dict[str, Any]) -> None:
        self._send({"method": method, "params": params})

    async def call(self, method: str, params: dict[str, Any], limit_s: float = ANSWER_S) -> dict[str, Any]:
        """The result. Raises ``RpcError``."""
        self._number += 1
        waiting = self._open[self._number] = asyncio.get_running_loop().create_future()
        self._send({"id": self._number, "method": method, "params": params})
        async with asyncio.timeout(limit_s):
            message = await waiting
        if "error" in message:
            raise RpcError(json.dumps(message["error"]))
        result: dict[str, Any] = message.get("result") or {}
        return result

    async def until(self, what: Callable[[], bool], limit_s: float = 20.0) -> None:
        """Waits for lines until ``what()`` holds."""
        async with asyncio.timeout(limit_s):
            while not what():
                self._news.clear()
                await self._news.wait()

    async def close(self) -> None:
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader


def granted(message: dict[str, Any]) -> dict[str, Any]:
    """Yes to a permission request."""
    options = message.get("params", {}).get("options", [])
    chosen = next((option for option in options if option.get("kind") == "allow_once"), options[0] if options else {})
    return {"outcome": {"outcome": "selected", "optionId": chosen.get("optionId")}}


def words(update: dict[str, Any], kinds: tuple[str, ...] = ("agent_message_chunk",)) -> str:
    """The text of a ``session/update`` notification of these kinds, else ""."""
    found = update.get("params", {}).get("update", {})
    if found.get("sessionUpdate") not in kinds:
        return ""
    return str(found.get("content", {}).get("text", ""))


@dataclass
class Turn:
    """One prompt: ``first_s`` from ``since`` to the first word of the model."""

    text: str
    first_s: float
    result: dict[str, Any]
