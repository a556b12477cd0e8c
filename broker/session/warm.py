"""Warm sandboxes of nobody: how one is made, and by what it is told from a stale one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from broker.session.sandbox import Sandbox


class Warmer(Protocol):
    """Makes generic warm sandboxes; ``session.pool`` decides how many and when."""

    def recipe(self, agent: str) -> str:
        """Hash of what a warm sandbox of ``agent`` would be made with now. Raises ``CortexError``."""

    async def make(self, agent: str, on_lost: Callable[[Sandbox, str], None]) -> Sandbox:
        """A new one, its agent ready (and its conversation opened ahead, where the agent has that) and unclaimed.

        ``on_lost(box, reason)`` is called once when it dies before it is claimed. All or nothing: raises
        ``CortexError`` when it cannot be made, and has put away what there was.
        """
