"""A sandbox hands its loopback listener over: calls then come here without a hop inside the sandbox.

The agent server would have to wake up for every token that passes. What the listener accepts belongs to the
slot on whose socket it came in, like a connection there; whoever is in the sandbox gains nothing by it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Protocol

from broker.errors import Code, CortexError
from broker.gateway.acceptor import Acceptor
from broker.gateway.heads import RequestHead
from sandbox_agent.wire.handover import SWITCHED, TARGET

MAX_LISTENERS = 4
"""A slot's at once, each with a thread. The agent server hands over one."""


def asked(head: RequestHead) -> bool:
    """Whether a request wants to hand a listener over."""
    return head.target == TARGET and head.method == b"GET"


class Doors:
    """The listeners that the sandbox of ``slot`` has handed over, or is about to."""

    def __init__(self, slot: str, accepted: Callable[[socket.socket], None]) -> None:
        self._slot = slot
        self._accepted = accepted
        self._open: set[Acceptor] = set()

    def open(self, channel: socket.socket, ended: Callable[[], None]) -> Acceptor:
        """Accepts on what comes by ``channel``, which is its own then. Raises ``CortexError`` or ``OSError``."""
        if len(self._open) >= MAX_LISTENERS:
            raise CortexError(Code.EGRESS_LIMIT, f"Over {MAX_LISTENERS} listeners", hint="close one of them")

        def over() -> None:
            self._open.discard(acceptor)
            ended()

        acceptor = Acceptor(channel, self._slot, self._accepted, over)
        self._open.add(acceptor)
        return acceptor

    def shut(self) -> None:
        """The sandbox is gone: none of them is of use to anybody any more."""
        for acceptor in self._open:
            acceptor.shut()


class Mouth(Protocol):
    """The sandbox's connection, as a handover sees it."""

    @property
    def descriptor(self) -> int:
        """Of its socket."""

    def hold(self, held: bool) -> None: ...
    def fail(self, error: CortexError) -> None: ...
    def cut(self) -> None:
        """Breaks it."""


class Handover:
    """One connection's. ``start`` once; the listener is served until ``abort``, or until the sandbox takes it back.

    Nothing more is read from the connection: descriptors come where only a thread receives and closes them.
    """

    def __init__(self, mouth: Mouth, doors: Doors) -> None:
        self._mouth = mouth
        self._doors = doors
        self._acceptor: Acceptor | None = None

    def start(self) -> None:
        self._mouth.hold(True)
        try:
            self._switch()
        except OSError as error:
            self.abort()
            self._mouth.fail(
                CortexError(Code.GATEWAY_DOWN, "The listener cannot be taken now", cause=error, hint="try again later")
            )
        except CortexError as error:
            self._mouth.fail(error)

    def _switch(self) -> None:
        """Raises ``OSError`` or ``CortexError``."""
        with socket.socket(fileno=os.dup(self._mouth.descriptor)) as near:
            if near.family != socket.AF_UNIX:
                hint = "connect to that"
                raise CortexError(Code.BAD_REQUEST, "A listener comes by the slot's own socket", hint=hint)
            ours, theirs = socket.socketpair()
            with theirs:
                try:
                    self._acceptor = self._doors.open(ours, self._over)
                except (OSError, CortexError):
                    ours.close()
                    raise
                socket.send_fds(near, [SWITCHED], [theirs.fileno()], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def from_sandbox(self, data: bytes) -> None:
        """Bytes before the answer are out of turn."""
        self._mouth.cut()

    def sandbox_eof(self) -> bool:
        return False

    def hold(self, held: bool) -> None:
        """What is said here is too little for that."""

    def abort(self) -> None:
        acceptor, self._acceptor = self._acceptor, None
        if acceptor is not None:
            acceptor.close()

    def _over(self) -> None:
        if self._acceptor is not None:
            self._acceptor = None
            self._mouth.cut()
