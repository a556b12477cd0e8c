"""Accepts on a loopback listener of a sandbox, for as long as the sandbox lets it.

The sandbox has a descriptor of the same open file and may change its flags whenever it likes, so that any
call on it may block: a thread of its own makes them, and nobody waits for it. What is accepted is nobody
else's, but inherits the listener's options (tcp(7)), so those that could harm us are set anew.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
import struct
import threading
from collections.abc import Callable

import structlog

from broker.errors import Code, CortexError

AT_ONCE = 32
"""Accepted, and not yet looked at."""
RACE_PAUSE_S = 0.01
"""Another was quicker: only somebody in the sandbox can be."""
EXHAUSTED_PAUSE_S = 0.5
BUFFER_BYTES = 256 * 2**10
"""The kernel's, in each direction: what a client that does not read may hold here."""
_NO_LINGER = struct.pack("ii", 0, 0)
_EXHAUSTED = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
log = structlog.get_logger(__name__)


class Acceptor:
    """Owns ``listener``. ``accepted`` gets each connection, non-blocking, on the loop; ``ended`` is called there
    once no call on the listener is under way any more."""

    def __init__(
        self, listener: socket.socket, name: str, accepted: Callable[[socket.socket], None], ended: Callable[[], None]
    ) -> None:
        self._listener = listener
        self._accepted = accepted
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._room = threading.Semaphore(AT_ONCE)
        self._stopping = threading.Event()
        self._waker, self._woken = socket.socketpair()
        # Nothing can be done about one that hangs: it must not keep the process.
        threading.Thread(target=self._run, name=f"accept.{name}", daemon=True).start()

    def close(self) -> None:
        """Accepts no more; connections stay. Does not wait. Idempotent."""
        self._stopping.set()
        self._room.release()
        self._waker.close()

    def shut(self) -> None:
        """``close``, and the sandbox can use the listener no more either: a call that hangs on it returns."""
        self.close()
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            log.debug("listener_not_shut", error=str(error))

    # -- in the thread

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        while not self._stopping.is_set():
            poll.poll()
            self._room.acquire()
            if self._stopping.is_set() or not self._accept():
                break
        self._woken.close()
        self._tell(self._over)

    def _accept(self) -> bool:
        """False: the listener is no good any more."""
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            self._room.release()
            if error.errno in _EXHAUSTED:
                return not self._stopping.wait(EXHAUSTED_PAUSE_S)
            if error.errno in (errno.EAGAIN, errno.EINTR, errno.ECONNABORTED):
                return not self._stopping.wait(RACE_PAUSE_S)
            return False
        if not self._tell(lambda: self._took(connection)):
            connection.close()
            return False
        return True

    def _tell(self, call: Callable[[], None]) -> bool:
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the loop is closed: so is everything
            return False
        return True

    # -- on the loop

    def _took(self, connection: socket.socket) -> None:
        self._room.release()
        try:
            if self._stopping.is_set():
                raise OSError(errno.ECONNABORTED, "the listener is closed")
            own(connection)
        except OSError:
            connection.close()
        else:
            self._accepted(connection)

    def _over(self) -> None:
        self._listener.close()
        self._ended()


def own(connection: socket.socket) -> None:
    """Sets what an accepted connection would otherwise have by its listener's owner. Raises ``OSError``."""
    connection.setblocking(False)
    # close(2) waits for what lingers, even on a non-blocking socket.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def loopback_listener(descriptor: int) -> socket.socket:
    """The listening TCP socket that ``descriptor`` is; owns it from now on. Raises ``BAD_REQUEST``."""
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError as error:
        os.close(descriptor)
        raise _no_listener() from error
    good = (sock.family, sock.type, sock.proto) == (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if not good or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        sock.close()
        raise _no_listener()
    return sock


def _no_listener() -> CortexError:
    return CortexError(Code.BAD_REQUEST, "That is no listening TCP socket", hint="hand over a loopback listener")
