"""Which node owns a user. Today there is one: every user is here."""

from __future__ import annotations

from typing import Protocol


class Directory(Protocol):
    """Asked by the registry; ``held`` is the warm path and does no I/O."""

    def held(self, user: str) -> bool:
        """This node owns the user now."""

    async def locate(self, user: str) -> str:
        """The owner's node id; "" when nobody owns the user."""

    async def claim(self, user: str) -> bool:
        """Makes this node the owner; False when another one is."""

    async def release(self, user: str) -> None:
        """Gives the user up."""


class Solo:
    """The directory of a single node."""

    def __init__(self, node: str) -> None:
        self.node = node

    def held(self, user: str) -> bool:
        return True

    async def locate(self, user: str) -> str:
        return self.node

    async def claim(self, user: str) -> bool:
        return True

    async def release(self, user: str) -> None:
        return None
