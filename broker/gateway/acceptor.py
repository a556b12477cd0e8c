"""Takes a loopback listener from a sandbox and accepts on it, for as long as the sandbox lets it.

The sandbox keeps a descriptor of the same open file. It may change flags and options whenever it likes, and what
it sends may be no listener at all, so any call on it may block, ``close`` included (socket(7), SO_LINGER). A
thread of its own therefore makes all of them, and nobody waits for it. What is accepted is nobody else's, but
inherits options, so those that could harm us are set anew before the loop sees it.
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

from sandbox_agent.wire.handover import TAKEN

AT_ONCE = 32
"""Accepted, and not yet looked at."""
RACE_PAUSE_S = 0.01
"""Another was quicker: only somebody in the sandbox can be."""
EXHAUSTED_PAUSE_S = 0.5
BUFFER_BYTES = 256 * 2**10
"""The kernel's, in each direction: what a client that does not read may hold here."""
_ROOM = socket.CMSG_SPACE(4 * 4)
"""Room for four descriptors, so that more than one is seen and closed, not lost."""
_NO_LINGER = struct.pack("ii", 0, 0)
_SO_TIMESTAMPING = 37
_IP_RECVERR = 11
_OWN = (
    # close(2) waits for what lingers, even on a non-blocking socket.
    (socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER),
    # Both fill a queue of errors that nobody reads, and so have the loop look without end.
    (socket.SOL_SOCKET, _SO_TIMESTAMPING, 0),
    (socket.IPPROTO_IP, _IP_RECVERR, 0),
    (socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES),
    (socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES),
    (socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)
_EXHAUSTED = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
log = structlog.get_logger(__name__)


class Acceptor:
    """Owns ``channel``, a Unix stream socket by which the listener comes; it is given back when the other end closes.

    ``accepted`` gets each connection, non-blocking, on the loop; ``ended`` is called there once nothing hangs on the
    sandbox's socket any more.
    """

    def __init__(
        self, channel: socket.socket, name: str, accepted: Callable[[socket.socket], None], ended: Callable[[], None]
    ) -> None:
        """Raises ``OSError``."""
        self._channel = channel
        self._accepted = accepted
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._room = threading.Semaphore(AT_ONCE)
        self._stopping = threading.Event()
        self._shutting = False
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self._name = f"accept.{name}"
        self._waker, self._woken = socket.socketpair()
        try:
            # Nothing can be done about one that hangs: it must not keep the process.
            threading.Thread(target=self._run, name=self._name, daemon=True).start()
        except RuntimeError as error:
            self._waker.close()
            self._woken.close()
            raise OSError(errno.EAGAIN, "no thread can be started") from error

    def close(self) -> None:
        """Accepts no more; connections stay. Does not wait. Idempotent."""
        self._stopping.set()
        self._room.release()
        self._waker.close()

    def shut(self) -> None:
        """``close``, and nobody can use the listener any more: a call that hangs on it returns."""
        self._shutting = True
        self.close()
        threading.Thread(target=self._shut, name=f"{self._name}.shut", daemon=True).start()

    # -- in threads

    def _shut(self) -> None:
        with self._lock:
            listener, self._listener = self._listener, None
            if listener is not None:
                try:
                    listener.shutdown(socket.SHUT_RDWR)
                except OSError as error:
                    log.debug("listener_not_shut", error=str(error))

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        poll.register(self._channel, select.POLLIN)
        poll.poll()
        listener = None if self._stopping.is_set() else _taken(self._channel)
        if listener is not None:
            with self._lock:
                self._listener = listener
            poll.register(listener, select.POLLIN)
            self._serve(poll, listener)
            if self._shutting:
                self._shut()
            with self._lock:
                self._listener = None
                listener.close()
        self._channel.close()
        self._woken.close()
        self._tell(self._over)

    def _serve(self, poll: select.poll, listener: socket.socket) -> None:
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            self._room.acquire()
            if self._stopping.is_set() or ready != {listener.fileno()} or not self._accept(listener):
                return

    def _accept(self, listener: socket.socket) -> bool:
        """False: the listener is no good any more."""
        try:
            connection, _ = listener.accept()
        except OSError as error:
            self._room.release()
            if error.errno in _EXHAUSTED:
                return not self._stopping.wait(EXHAUSTED_PAUSE_S)
            if error.errno in (errno.EAGAIN, errno.EINTR, errno.ECONNABORTED):
                return not self._stopping.wait(RACE_PAUSE_S)
            return False
        try:
            own(connection)
        except OSError as error:
            log.warning("connection_not_owned", error=str(error))
            connection.close()
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

    def _over(self) -> None:
        self._waker.close()
        self._ended()

    def _took(self, connection: socket.socket) -> None:
        self._room.release()
        if self._stopping.is_set():
            connection.close()
        else:
            self._accepted(connection)


def _taken(channel: socket.socket) -> socket.socket | None:
    """The listener that came by ``channel``; None when something else came, or nothing."""
    found: list[int] = []
    try:
        _, ancillary, _, _ = channel.recvmsg(64, _ROOM, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                found += memoryview(content[: len(content) // 4 * 4]).cast("i").tolist()
        listener = loopback_listener(found.pop()) if len(found) == 1 else None
        if listener is not None:
            channel.send(TAKEN, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        return listener
    except OSError as error:
        log.debug("no_listener_came", error=str(error))
        return None
    finally:
        for descriptor in found:
            os.close(descriptor)


def loopback_listener(descriptor: int) -> socket.socket | None:
    """The listening TCP socket that ``descriptor`` is; owns it from now on. None when it is none: it is closed then."""
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError:
        os.close(descriptor)
        return None
    good = (sock.family, sock.type, sock.proto) == (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if good and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return sock
    sock.close()
    return None


def own(connection: socket.socket) -> None:
    """Sets what an accepted connection would otherwise have by its listener's owner. Raises ``OSError``."""
    connection.setblocking(False)
    for level, option, value in _OWN:
        connection.setsockopt(level, option, value)
