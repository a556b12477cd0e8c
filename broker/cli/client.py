"""The control API, called from the command line."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import quote

import aiohttp

from broker.control.keyfiles import admin_token
from broker.errors import Code, CortexError

if TYPE_CHECKING:
    from broker.config import Config

T = TypeVar("T")

TIMEOUT = aiohttp.ClientTimeout(total=300, sock_connect=5)
TOKEN_ENV = "CORTEX_ADMIN_TOKEN"


class ControlClient:
    """A client of the control API at ``address`` (http(s)://… or unix:PATH); use with ``async with``."""

    def __init__(self, address: str, token: str = "") -> None:
        self.address = address
        path = address.removeprefix("unix:")
        unix = path != address
        self._base = "http://localhost" if unix else address.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._connector = (lambda: aiohttp.UnixConnector(path)) if unix else aiohttp.TCPConnector
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(connector=self._connector(), headers=self._headers, timeout=TIMEOUT)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._http is not None:
            await self._http.close()

    async def call(self, method: str, *path: str, body: Any = None, query: dict[str, str] | None = None) -> Any:
        """JSON of ``/v1/`` + ``path``, its parts quoted. Raises the ``CortexError`` that the broker answers,
        or ``UNREACHABLE``."""
        assert self._http is not None
        url = f"{self._base}/v1/" + "/".join(quote(part, safe="") for part in path)
        try:
            async with self._http.request(method, url, json=body, params=query) as response:
                told = await response.json(content_type=None)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise CortexError(
                Code.UNREACHABLE,
                f"the broker does not answer at {self.address}",
                cause=str(error) or type(error).__name__,
                hint="is it running (cortex serve), and is this its control.listen?",
            ) from error
        if response.status >= 400:
            raise CortexError.from_problem(told)
        return told


def locate(config: Path | None, url: str) -> ControlClient:
    """The client for ``url``, else for the broker of these settings."""
    if url:
        return ControlClient(url, os.environ.get(TOKEN_ENV, ""))
    from broker.settings import load

    settings = load(config, os.environ).config
    address = address_of(settings)
    given = os.environ.get(TOKEN_ENV, "")
    if address.startswith("unix:"):
        return ControlClient(address, given)
    return ControlClient(address, given or admin_token(Path(settings.control.admin_token_file)))


def address_of(settings: Config) -> str:
    """Where ``control.listen`` is reached from this host. Raises ``BAD_CONFIG`` for systemd's sockets."""
    listen = settings.control.listen
    if listen.startswith("unix:"):
        return listen
    if listen.startswith("systemd:"):
        raise CortexError(
            Code.BAD_CONFIG,
            f"control.listen is {listen}; only systemd knows its address",
            hint="say it with --control unix:PATH or CORTEX_CONTROL_URL (see ListenStream= of the socket unit)",
        )
    host, _, port = listen.rpartition(":")
    return f"http://{ {'0.0.0.0': '127.0.0.1', '[::]': '[::1]'}.get(host, host) }:{port}".replace(" ", "")


def ask(config: Path | None, url: str, work: Callable[[ControlClient], Awaitable[T]]) -> T:
    """Runs ``work`` with a connected client."""

    async def run() -> T:
        async with locate(config, url) as client:
            return await work(client)

    return asyncio.run(run())
