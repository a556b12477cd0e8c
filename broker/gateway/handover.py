"""A sandbox hands its loopback listener over: calls then come here without a hop inside the sandbox.

The agent server would have to wake up for every token that passes. What the listener accepts belongs to the
slot on whose socket it came in, like a connection there; whoever is in the sandbox gains nothing by it.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Protocol

import structlog

from broker.errors import Code, CortexError
from broker.gateway.acceptor import Acceptor, loopback_listener
from broker.gateway.heads import RequestHead
from sandbox_agent.wire.handover import SWITCHED, TAKEN, TARGET

MAX_LISTENERS = 4
"""A slot's at once, each with a thread. The agent server hands over one."""
_ROOM = socket.CMSG_SPACE(4 * 4)
"""Room for four descriptors, so that more than one is seen and closed, not lost."""
log = structlog.get_logger(__name__)


def asked(head: RequestHead) -> bool:
    """Whether a request wants to hand a listener over."""
    return head.target == TARGET and head.method == b"GET"


class Doors:
    """The listeners that the sandbox of ``slot`` has handed over."""

    def __init__(self, slot: str, accepted: Callable[[socket.socket], None]) -> None:
        self._slot = slot
        self._accepted = accepted
        self._open: set[Acceptor] = set()

    def __len__(self) -> int:
        return len(self._open)

    def open(self, descriptor: int) -> Acceptor:
        """Accepts on ``descriptor``, which it owns from now on. Raises ``CortexError``."""
        listener = loopback_listener(descriptor)
        if len(self._open) >= MAX_LISTENERS:
            listener.close()
            raise CortexError(Code.EGRESS_LIMIT, f"Over {MAX_LISTENERS} listeners", hint="close one of them")
        acceptor = Acceptor(listener, self._slot, self._accepted, lambda: self._open.discard(acceptor))
        self._open.add(acceptor)
        return acceptor

    def shut(self) -> None:
        """The slot is taken back: none of them is of use to anybody any more."""
        for acceptor in self._open:
            acceptor.shut()


class Mouth(Protocol):
    """The sandbox's connection, as a handover sees it."""

    @property
    def descriptor(self) -> int:
        """Of its socket."""

    def send(self, parts: list[bytes]) -> None: ...
    def hold(self, held: bool) -> None: ...
    def fail(self, error: CortexError) -> None: ...
    def cut(self) -> None:
        """Breaks it."""


class Handover:
    """One connection's. ``start`` once; the listener is served until ``abort``, or until the connection ends."""

    def __init__(self, mouth: Mouth, doors: Doors) -> None:
        self._mouth = mouth
        self._doors = doors
        self._loop = asyncio.get_running_loop()
        self._sock: socket.socket | None = None
        self._acceptor: Acceptor | None = None

    def start(self) -> None:
        sock = socket.socket(fileno=os.dup(self._mouth.descriptor))
        if sock.family != socket.AF_UNIX:
            sock.close()
            self._mouth.fail(
                CortexError(Code.BAD_REQUEST, "A listener comes by the slot's own socket", hint="connect to that")
            )
            return
        # Transports lose descriptors: from here on nothing but this reads.
        self._mouth.hold(True)
        self._sock = sock
        self._loop.add_reader(sock.fileno(), self._readable)
        self._mouth.send([SWITCHED])

    def from_sandbox(self, data: bytes) -> None:
        """Bytes before the answer are out of turn."""
        self._mouth.cut()

    def sandbox_eof(self) -> bool:
        return False

    def hold(self, held: bool) -> None:
        """What is said here is too little for that."""

    def abort(self) -> None:
        sock, self._sock = self._sock, None
        acceptor, self._acceptor = self._acceptor, None
        if sock is not None:
            self._loop.remove_reader(sock.fileno())
            sock.close()
        if acceptor is not None:
            acceptor.close()

    def _readable(self) -> None:
        assert self._sock is not None
        try:
            descriptors = _received(self._sock)
        except BlockingIOError:
            return
        except OSError:
            descriptors = []
        if len(descriptors) != 1 or self._acceptor is not None:
            for descriptor in descriptors:
                os.close(descriptor)
            self._mouth.cut()
            return
        try:
            self._acceptor = self._doors.open(descriptors[0])
        except CortexError as error:
            log.warning("listener_refused", error=str(error))
            self._mouth.cut()
            return
        self._mouth.send([TAKEN])


def _received(sock: socket.socket) -> list[int]:
    """The descriptors that came, of one message. Raises ``OSError``."""
    found: list[int] = []
    _, ancillary, _, _ = sock.recvmsg(64, _ROOM, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found += memoryview(content[: len(content) // 4 * 4]).cast("i").tolist()
    return found
