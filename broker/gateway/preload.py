"""Ollama: models are loaded ahead on each server and kept, also over restarts of the server.

https://github.com/ollama/ollama/blob/main/docs/api.md: ``/api/ps`` lists what is loaded and until when;
``/api/generate`` without a prompt loads a model, ``/api/embed`` without input one that only embeds.
"""

from __future__ import annotations

import asyncio
import datetime
import random
from collections.abc import Sequence
from typing import Any

import msgspec
import structlog

from broker.errors import Code, CortexError
from broker.gateway.fetch import Fetched, fetch
from broker.gateway.routes import Origin
from broker.gateway.upstream import Pool
from broker.host.tasks import TaskOwner

CHECK_S = 15.0
MAX_PAUSE_S = 300.0
ASK_TIMEOUT_S = 10.0
LOAD_TIMEOUT_S = 600.0
"""A large model from a slow disk."""
MAX_BYTES = 2**20
log = structlog.get_logger(__name__)


class _Loaded(msgspec.Struct):
    name: str = ""
    model: str = ""
    expires_at: str = ""


class _Running(msgspec.Struct):
    models: list[_Loaded] = []


class Preload:
    """``keep_alive``: as Ollama takes it, ``24h``, or seconds, negative for ever. One task a server, so that one that
    is down delays no other; calls never wait for any of this."""

    def __init__(
        self, spots: Sequence[tuple[Origin, bytes]], models: Sequence[str], keep_alive: str, pool: Pool,
        tasks: TaskOwner, headers: bytes = b"",
    ) -> None:  # fmt: skip
        self._spots = spots
        self._models = models
        # A bare number is one of seconds; as a string Ollama would want a unit.
        self._keep_alive: str | int = keep_alive if keep_alive[-1:].isalpha() else int(keep_alive)
        self._pool = pool
        self._owner = tasks
        self._headers = headers
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        for origin, base_path in self._spots:
            self._tasks.append(self._owner.start(self._keep(origin, base_path), "preload"))

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _keep(self, origin: Origin, base_path: bytes) -> None:
        pause = CHECK_S
        while True:
            try:
                await self._load_missing(origin, base_path)
                pause = CHECK_S
            except CortexError as error:
                log.warning("preload_failed", server=origin.authority, error=str(error), again_in_s=round(pause))
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(pause * 2, MAX_PAUSE_S)
                continue
            await asyncio.sleep(CHECK_S * random.uniform(0.8, 1.2))

    async def _load_missing(self, origin: Origin, base_path: bytes) -> None:
        """Each model that is not loaded, or would be let go before the next look. Raises ``CortexError`` for the first
        that fails, when all have been tried."""
        kept = _kept(await self._ask(origin, base_path, b"GET", b"/api/ps", None, ASK_TIMEOUT_S))
        failed: CortexError | None = None
        for model in self._models:
            if _full_name(model) in kept:
                continue
            try:
                await self._load(origin, base_path, model)
            except CortexError as error:
                failed = failed or error
            else:
                log.info("model_loaded", server=origin.authority, model=model)
        if failed is not None:
            raise failed

    async def _load(self, origin: Origin, base_path: bytes, model: str) -> None:
        order = {"model": model, "keep_alive": self._keep_alive, "stream": False}
        answer = await self._post(origin, base_path, b"/api/generate", order)
        if answer.status == 400:
            # "does not support generate": it only embeds.
            answer = await self._post(origin, base_path, b"/api/embed", {**order, "input": ""})
        if answer.status != 200:
            raise CortexError(
                Code.UPSTREAM_FAILED,
                f"{origin.authority} cannot load the model {model}",
                cause=f"HTTP {answer.status}: {answer.body[:200].decode(errors='replace')}",
                hint=f"run `ollama pull {model}` there",
            )

    async def _post(self, origin: Origin, base_path: bytes, path: bytes, order: dict[str, Any]) -> Fetched:
        return await self._ask(origin, base_path, b"POST", path, order, LOAD_TIMEOUT_S)

    async def _ask(
        self,
        origin: Origin,
        base_path: bytes,
        method: bytes,
        path: bytes,
        order: dict[str, Any] | None,
        timeout_s: float,
    ) -> Fetched:
        lines = b"host: %s\r\ncontent-type: application/json\r\n%s" % (origin.authority.encode(), self._headers)
        body = b"" if order is None else msgspec.json.encode(order)
        return await fetch(
            self._pool, origin, method, base_path + path, lines, body, timeout_s=timeout_s, max_bytes=MAX_BYTES
        )


def _full_name(model: str) -> str:
    """As ``/api/ps`` has it: with its tag."""
    return model if ":" in model.rpartition("/")[2] else f"{model}:latest"


def _kept(answer: Fetched) -> set[str]:
    """Models that stay loaded until the next look, by full name. An odd answer has none: then all are loaded anew,
    which does no harm."""
    try:
        running = msgspec.json.decode(answer.body, type=_Running)
    except msgspec.DecodeError:
        return set()
    until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=2 * CHECK_S)
    return {_full_name(each.name or each.model) for each in running.models if _lasts(each.expires_at, until)}


def _lasts(expires_at: str, until: datetime.datetime) -> bool:
    """Calls that name no ``keep_alive`` shorten it to the server's own; without a time it is taken to last."""
    try:
        ends = datetime.datetime.fromisoformat(expires_at)
    except ValueError:
        return True
    return ends.tzinfo is None or ends > until
