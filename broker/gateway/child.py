"""The gateway process as a child of the broker: started, watched, restarted with backoff, stopped."""

from __future__ import annotations

from broker.gateway.link import GatewayLink
from broker.host.tasks import TaskOwner


class GatewayChild:
    """Keeps one gateway running behind ``link`` (``gateway.mode = "child"``).

    A gateway that outlived the last broker is taken over instead of starting a second one.
    """

    def __init__(self, link: GatewayLink, tasks: TaskOwner) -> None:
        self.link = link

    async def start(self) -> None:
        """Starts it; ``link.start()`` comes before. Returns at once; see ``link.wait_connected``."""

    async def stop(self, grace_s: float) -> None:
        """SIGTERM (it drains), after ``grace_s`` seconds SIGKILL; returns when it is dead."""
