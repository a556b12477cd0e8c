"""The sandbox's connection, as a call sees it."""

from __future__ import annotations

from typing import Protocol

from broker.errors import CortexError


class Downstream(Protocol):
    """Where an answer goes."""

    congested: bool
    closing_soon: bool
    """The connection will not carry another request; responses say so."""

    def send(self, parts: list[bytes]) -> None: ...
    def hold(self, held: bool) -> None: ...
    def touch(self) -> None:
        """Something moved."""

    def fail(self, error: CortexError) -> None:
        """Ends the call with an answer of the gateway; nothing was sent before."""

    def cut(self) -> None:
        """Breaks the connection, so that the client sees an error."""

    def finish(self, keep_alive: bool) -> None:
        """The response is complete."""


class Nobody:
    """Takes the place of a sandbox that has gone while others wait for the same answer."""

    congested = False
    closing_soon = True

    def send(self, parts: list[bytes]) -> None: ...
    def hold(self, held: bool) -> None: ...
    def touch(self) -> None: ...
    def fail(self, error: CortexError) -> None: ...
    def cut(self) -> None: ...
    def finish(self, keep_alive: bool) -> None: ...
