"""The broker's side of the link to the gateway process: which slot is whose, and with what.

The broker listens, the gateway dials and redials. Every wish is kept here and told again, held
listeners included, to a gateway that comes anew; a call returns when the gateway has
acknowledged, so the broker knows that a slot is served, or no longer is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from broker.config import GatewayConfig
from broker.gateway.messages import Egress, Provider
from broker.host.tasks import TaskOwner

__all__ = ["Egress", "GatewayLink", "Provider"]

ACK_TIMEOUT = 5.0
"""Seconds a call waits for the gateway, a redial included."""


class GatewayLink:
    """One gateway process as the broker sees it.

    ``path``: where to listen (``gateway.link``); ``settings`` gives the current section;
    ``on_report`` hears what the gateway tells by itself (refused hosts; later usage) as JSON-safe
    facts with ``slot`` and ``kind``; it must not block.
    """

    def __init__(
        self,
        path: Path,
        tasks: TaskOwner,
        *,
        settings: Callable[[], GatewayConfig],
        on_report: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.path = path

    @property
    def connected(self) -> bool:
        """A gateway is there and has been told everything."""
        raise NotImplementedError

    async def start(self) -> None:
        """Listens (0600, a stale file replaced). Does not wait for a gateway."""

    async def wait_connected(self, timeout: float) -> None:
        """Returns when a gateway is there. Raises ``GATEWAY_DOWN`` after ``timeout`` seconds."""

    async def put_slot(
        self,
        slot: str,
        incarnation: int,
        identity: Mapping[str, str] | None,
        providers: Mapping[str, Provider],
        egress: Egress,
        fds: tuple[int, int] | None = None,
    ) -> None:
        """Serves a slot from now on, or changes how; returns when acknowledged.

        ``fds``: the listening gateway and egress sockets, needed the first time (and after a rebind);
        they are duplicated, the caller keeps its own. ``identity`` None: unclaimed, all requests get
        503. Same incarnation: connections stay; a higher one cuts those of the old.
        Raises ``GATEWAY_DOWN`` when there is no answer in time (the wish stands and is told to the next
        gateway; ``drop_slot`` takes it back) and ``BAD_CONFIG`` when the gateway refuses it.
        """

    async def drop_slot(self, slot: str) -> None:
        """Cuts a slot off: listeners closed, running calls and tunnels aborted; returns when
        acknowledged. Idempotent. Raises ``GATEWAY_DOWN``; then an old gateway may still serve it."""

    async def table_complete(self) -> None:
        """Call once after ``start``, when every slot of before the restart was put again: a gateway
        that outlived the last broker forgets the others only then. Does not wait for a gateway."""

    async def settings_changed(self) -> None:
        """Tells the gateway the settings of now. Does not wait."""

    def health(self) -> dict[str, Any]:
        """JSON-safe: connected, pid, slots, restarts, connections, requests."""
        raise NotImplementedError

    async def close(self) -> None:
        """Stops listening; the gateway goes on serving what it knows."""
