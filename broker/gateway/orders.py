"""The gateway process's side of the link: dials the broker, redials, carries out what it says."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from pathlib import Path
from typing import Any

import structlog

from broker.errors import CortexError
from broker.gateway.context import Context
from broker.gateway.messages import VERSION, MessageError, Settings, entry_from_wire
from broker.gateway.packets import PacketSocket
from broker.gateway.policy import Policy, cache_from_wire, policies_from_wire
from broker.gateway.table import Table

REDIAL_MIN_S = 0.02
REDIAL_MAX_S = 0.5
log = structlog.get_logger(__name__)


class Orders:
    """``run`` until cancelled. Without a broker the slots that are known are served on."""

    def __init__(self, path: Path, table: Table, context: Context) -> None:
        self._path = path
        self._table = table
        self._context = context
        self._link: PacketSocket | None = None
        self._lost: asyncio.Event = asyncio.Event()
        self._named: set[str] = set()
        self._policies: dict[str, Policy] = {}
        """Told, and to be taken up when the last one is."""
        self.alone_since: float | None = asyncio.get_running_loop().time()
        context.report = self.report

    async def run(self) -> None:
        """Dials for ever, with jitter."""
        delay = REDIAL_MIN_S
        while True:
            if self._dial():
                delay = REDIAL_MIN_S
                await self._lost.wait()
            # The wait between two attempts; nothing tells that a broker listens again.
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(REDIAL_MAX_S, delay * 2)

    def _dial(self) -> bool:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.setblocking(False)
        try:
            sock.connect(str(self._path))
        except OSError as error:
            sock.close()
            log.debug("broker_not_there", error=error.strerror)
            return False
        self._lost.clear()
        self._named.clear()
        self._policies.clear()
        self._link = PacketSocket(sock, self._received, self._gone)
        self.alone_since = None
        self._link.send({"type": "hello", "version": VERSION, "pid": os.getpid()})
        log.info("broker_found")
        self._context.usage.linked()
        return True

    def _gone(self, why: str) -> None:
        log.warning("broker_lost", why=why)
        self._link = None
        self.alone_since = asyncio.get_running_loop().time()
        self._lost.set()

    def report(self, facts: dict[str, Any]) -> bool:
        """Tells the broker; False: it is not there, or behind."""
        if self._link is None or self._link.congested:
            return False
        self._link.send({"type": "report", **facts})
        return True

    def _received(self, message: dict[str, Any], fds: list[int]) -> None:
        listeners = [socket.socket(fileno=fd) for fd in fds]
        answer: dict[str, Any] = {"type": "ack", "id": message.get("id")}
        try:
            answer |= self._carry_out(message, listeners)
        except CortexError as error:
            log.warning("order_refused", order=message["type"], slot=message.get("slot"), error=str(error))
            answer["error"] = {"what": error.what, "hint": error.hint}
        except (MessageError, KeyError, TypeError, ValueError) as error:
            answer["error"] = {"what": f"not understood: {error}", "hint": "broker and gateway differ in version"}
        if message["type"] != "put" or "error" in answer:
            for listener in listeners:
                listener.close()
        if self._link is not None:
            self._link.send(answer)

    def _carry_out(self, message: dict[str, Any], listeners: list[socket.socket]) -> dict[str, Any]:
        match message["type"]:
            case "put":
                entry = entry_from_wire(message)
                self._table.put(entry, (listeners[0], listeners[1]) if len(listeners) == 2 else None)
                self._named.add(entry.slot)
            case "drop":
                self._table.drop(str(message["slot"]))
                self._named.discard(str(message["slot"]))
            case "whole":
                self._table.keep_only(self._named)
            case "settings":
                self._context.settings = Settings.from_wire(message["settings"])
            case "policy":
                self._policies |= policies_from_wire({str(message["name"]): message["policy"]})
            case "policies":
                policies, self._policies = self._policies, {}
                self._context.treat(policies, cache_from_wire(message["cache"]))
            case "usage_seen":
                self._context.usage.seen(str(message["boot"]), int(message["upto"]))
            case "spent":
                until = asyncio.get_running_loop().time() + float(message["for_s"])
                self._context.plans.spent(list(message["users"]), list(message["teams"]), until)
            case "ping":
                now = asyncio.get_running_loop().time()
                view = {"stats": self._context.stats.view(), "slots": len(self._table)}
                return {**view, "providers": self._context.plans.view(now), "cache": self._context.responses.view()}
            case other:
                raise MessageError(other)
        return {}

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
