"""The clients of one session: counted, bounded, held while a configuration is applied."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from broker.errors import Code, CortexError
from broker.session.port import AttachedClient


class Clients:
    """``limit`` gives the largest number of now."""

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self._clients: dict[str, AttachedClient] = {}
        self._holding = False

    def __len__(self) -> int:
        return len(self._clients)

    def add(self, client: AttachedClient) -> None:
        """Raises ``SESSION_BUSY`` beyond the limit. A client that comes during a hold is held too."""
        if len(self._clients) >= self._limit():
            raise CortexError(
                Code.SESSION_BUSY,
                f"the session has {len(self._clients)} clients already",
                hint="close one, or raise front.max_clients_per_session",
            )
        self._clients[client.connection] = client
        if self._holding:
            client.hold()

    def discard(self, client: AttachedClient) -> None:
        """Idempotent."""
        self._clients.pop(client.connection, None)

    def close(self, code: int, reason: str) -> int:
        """Closes all; returns how many."""
        clients = list(self._clients.values())
        for client in clients:
            client.close(code, reason)
        return len(clients)

    @contextmanager
    def held(self, longest_s: float) -> Iterator[None]:
        """Client frames wait at their next boundary while this runs, ``longest_s`` seconds at most."""
        self._hold()
        timer = asyncio.get_running_loop().call_later(longest_s, self._release)
        try:
            yield
        finally:
            timer.cancel()
            self._release()

    def _hold(self) -> None:
        self._holding = True
        for client in self._clients.values():
            client.hold()

    def _release(self) -> None:
        if not self._holding:
            return
        self._holding = False
        for client in list(self._clients.values()):
            client.release()
