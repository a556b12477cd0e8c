"""The link to the agent server of one sandbox incarnation: what the broker says to it and hears from it."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from broker.sandbox.journal_files import JournalFiles
from broker.sandbox.slots import Slot
from sandbox_agent.wire.messages import Attach, Bound, Built, Hello, Status, Welcome


class SlotSockets:
    """The three listeners of a slot: ``agent`` (the broker's), ``gateway`` and ``egress`` (for the gateway process).

    Files 0660 with the sandbox's gid; what an earlier run left is replaced atomically. They outlive a
    ``Link``: a new incarnation in the slot uses the same ones.
    """

    def __init__(self, slot: Slot, *, gid: int) -> None:
        raise NotImplementedError

    slot: Slot
    agent: socket.socket

    def open(self) -> None:
        """Binds and listens. Raises ``CortexError``."""
        raise NotImplementedError

    @property
    def fds(self) -> tuple[int, int]:
        """Descriptors of the gateway and the egress listener, still owned here."""
        raise NotImplementedError

    def close(self) -> None:
        """Closes the listeners and takes their files away. Idempotent."""
        raise NotImplementedError


@dataclass(frozen=True)
class LinkLimits:
    """What one sandbox may do on its agent socket. Durations in seconds."""

    preamble_timeout_s: float = 5.0
    welcome_timeout_s: float = 30.0
    """Longest that ``on_hello`` may take."""
    redial_timeout_s: float = 5.0
    """How long a lost control connection may stay away before the link counts as lost."""
    max_unauthenticated: int = 16
    max_idle_streams: int = 32
    max_violations: int = 64
    accept_burst: int = 256
    accept_per_s: float = 100.0
    message_burst: int = 1000
    messages_per_s: float = 200.0
    max_message_bytes: int = 256 * 2**10


def incarnation_secret(installation_key: bytes, slot: str, incarnation: int) -> bytes:
    """HMAC-SHA256 of ``slot|incarnation`` under the installation key; 32 bytes."""
    raise NotImplementedError


class Link:
    """One incarnation of one sandbox. Make it and ``start`` it before the sandbox is started.

    The first ``Hello`` without a secret is accepted once (never when ``welcomed``: the sandbox had its
    welcome from an earlier run of the broker and presents its secret). ``on_hello(link, hello)`` answers
    with the Welcome and must have made durable that this incarnation was welcomed; ``incarnation`` and
    ``secret`` in it are filled in here. It is called again when the agent server redials. ``on_status``
    hears each Status; ``on_lost(reason)`` is called once, when the sandbox has to be replaced: control
    gone for ``redial_timeout_s``, or too many violations. The three callables and ``journal`` may be
    replaced (a generic sandbox that is claimed).

    Every call raises ``CortexError`` (``SANDBOX_DIED``) once the link is closed or lost.
    """

    def __init__(
        self,
        sockets: SlotSockets,
        incarnation: int,
        *,
        installation_key: bytes,
        on_hello: Callable[[Link, Hello], Awaitable[Welcome]],
        on_status: Callable[[Status], None],
        on_lost: Callable[[str], None],
        journal: JournalFiles | None = None,
        welcomed: bool = False,
        limits: LinkLimits | None = None,
    ) -> None:
        raise NotImplementedError

    slot: str
    incarnation: int
    hello: Hello | None
    """The last Hello; None before the first."""
    status: Status | None
    """The last Status."""
    journal: JournalFiles | None

    @property
    def connected(self) -> bool:
        """A control connection is up and welcomed."""
        raise NotImplementedError

    def start(self) -> None:
        """Begins to accept connections."""
        raise NotImplementedError

    async def wait_hello(self, timeout: float) -> Hello:
        """Returns when a Hello was answered with its Welcome. Raises ``BRINGUP_TIMEOUT`` or ``SANDBOX_DIED``."""
        raise NotImplementedError

    async def bind(
        self, parts: dict[str, Any], hashes: dict[str, str], generation: int, *, timeout: float = 15.0
    ) -> Bound:
        """Sends the parts that differ; returns when they are applied. Raises ``CortexError``, with the
        sandbox's own code and hint when it refused."""
        raise NotImplementedError

    async def take_stream(self, attach: Attach, *, timeout: float = 10.0) -> socket.socket:
        """A stream with ``attach`` already written, non-blocking and now the caller's: a waiting one at
        once, without a suspension, else the next to come. Raises ``CortexError``."""
        raise NotImplementedError

    async def probe(self, *, timeout: float = 5.0) -> Status:
        """Asks for a Status. Raises ``CortexError``."""
        raise NotImplementedError

    async def stop(self, grace_s: float) -> None:
        """Asks the agent server to end; returns when its control connection is gone, or after ``grace_s``
        plus one second. Never fails; ``on_lost`` is not called for it."""
        raise NotImplementedError

    async def build(
        self, ecosystem: str, package: str, *, scripts: bool, registry: str = "", timeout: float = 180.0
    ) -> Built:
        """Has a builder install a package; ``Built.ok`` says how it went. Raises ``CortexError``."""
        raise NotImplementedError

    async def close(self, reason: str = "closed") -> None:
        """Fences the link: closes what it holds, fails what waits, accepts no more. Idempotent."""
        raise NotImplementedError
