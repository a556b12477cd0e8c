"""The clients of one session: counted, bounded, held while a configuration is applied or the sandbox is paused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf

from broker.errors import Code, CortexError
from broker.session.port import AttachedClient


class Clients:
    """``limit`` gives the largest number of now."""

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self._clients: dict[str, AttachedClient] = {}
        self._served: set[str] = set()
        self._holding = False
        self._resting = False
        self._on_speech: Callable[[], None] | None = None

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
        if self._holding or self._resting:
            client.hold(self._on_speech)

    def discard(self, client: AttachedClient) -> None:
        """Idempotent."""
        self._clients.pop(client.connection, None)
        self._served.discard(client.connection)

    def serve(self, connection: str) -> None:
        """It has a stream of the agent server of now."""
        if connection in self._clients:
            self._served.add(connection)

    @property
    def spoke_at(self) -> float:
        """When one of them last had something for the agent; monotonic seconds, -inf: never."""
        return max((client.spoke_at for client in self._clients.values()), default=-inf)

    def close(self, code: int, reason: str, *, served: bool = False) -> int:
        """Closes all, or those alone that are ``served``; returns how many."""
        clients = [client for name, client in self._clients.items() if not served or name in self._served]
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

    def rest(self, on_speech: Callable[[], None]) -> None:
        """Client frames wait until ``rouse``; ``on_speech`` is called when there are any."""
        self._resting, self._on_speech = True, on_speech
        for client in list(self._clients.values()):
            client.hold(on_speech)

    def rouse(self) -> None:
        """Undoes ``rest``. Idempotent."""
        if self._resting:
            self._resting, self._on_speech = False, None
            self._let_go()

    def _hold(self) -> None:
        self._holding = True
        for client in self._clients.values():
            client.hold()

    def _release(self) -> None:
        if self._holding:
            self._holding = False
            self._let_go()

    def _let_go(self) -> None:
        if self._holding or self._resting:
            return
        for client in list(self._clients.values()):
            client.release()
