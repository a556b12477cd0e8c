"""Takes a loopback listener from a sandbox and accepts on it, for as long as the sandbox lets it.

The sandbox keeps a descriptor of the same open file. It may change flags and options whenever it likes, and what
it sends may be no listener at all, so any call on it may block, ``close`` included (socket(7), SO_LINGER). A
thread of its own therefore makes all of them, and nobody waits for it; one that hangs may outlive even a SIGKILL
until the sandbox lets go. What is accepted is nobody else's, but inherits options, so those that could harm us are
set anew before the loop sees it.
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
from contextlib import suppress

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
_FACTS = (socket.SO_DOMAIN, socket.SO_TYPE, socket.SO_PROTOCOL, socket.SO_ACCEPTCONN)
_LISTENS = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, 1)
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

    ``accepted`` gets each connection, non-blocking, on the loop; ``ended`` is called there once no call on the
    sandbox's socket is under way and the other end of the channel is closed: so nobody leaves those ends unread.
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
        try:
            threading.Thread(target=self._shut, name=f"{self._name}.shut", daemon=True).start()
        except RuntimeError as error:
            log.warning("listener_not_shut", error=str(error))

    # -- in threads

    def _shut(self) -> None:
        with self._lock:
            # Each once: the descriptor may be another's by the next time.
            for sock in (self._listener, self._channel):
                if sock is not None and sock.fileno() >= 0:
                    _end(sock, socket.SHUT_RDWR)
            self._listener = None

    def _run(self) -> None:
        try:
            self._take()
        finally:
            _end(self._channel, socket.SHUT_WR)
            self._wait_for_hangup()
            with self._lock:
                self._channel.close()
            self._woken.close()
            self._tell(self._over)

    def _take(self) -> None:
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        poll.register(self._channel, select.POLLIN)
        poll.poll()
        listener = None if self._stopping.is_set() else _taken(self._channel)
        if listener is None:
            return
        with self._lock:
            self._listener = listener
        poll.register(listener, select.POLLIN)
        self._serve(poll, listener)
        if self._shutting:
            self._shut()
        with self._lock:
            self._listener = None
            listener.close()

    def _wait_for_hangup(self) -> None:
        """Or for anything that is said: whoever says it has the other end, so it is not unread."""
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        while (descriptors := _received(self._channel)) is None:
            poll.poll()
        _close_all(descriptors)

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
            log.debug("connection_not_owned", error=str(error))
            connection.close()
            self._room.release()
            return True
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


def _end(sock: socket.socket, how: int) -> None:
    try:
        sock.shutdown(how)
    except OSError as error:
        log.debug("not_shut", error=str(error))


def _taken(channel: socket.socket) -> socket.socket | None:
    """The listener that came by ``channel``; None when something else came, or nothing."""
    descriptors = _received(channel) or []
    listener = loopback_listener(descriptors.pop()) if len(descriptors) == 1 else None
    _close_all(descriptors)
    if listener is not None:
        with suppress(OSError):  # whoever is gone by now is seen to be gone
            channel.send(TAKEN, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    return listener


def _received(channel: socket.socket) -> list[int] | None:
    """The descriptors of what was said, or of its end; None while there is neither."""
    found: list[int] = []
    try:
        _, ancillary, _, _ = channel.recvmsg(64, _ROOM, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return None
    except OSError:
        return found
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found += memoryview(content[: len(content) // 4 * 4]).cast("i").tolist()
    return found


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def loopback_listener(descriptor: int) -> socket.socket | None:
    """The listening TCP socket that ``descriptor`` is; owns it from now on. None when it is none: it is closed then."""
    # Put in the place of one of ours: asked what it is, socket() would wait for the sandbox with the GIL in its hands.
    try:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        os.dup2(descriptor, sock.fileno(), inheritable=False)
    except OSError as error:
        log.warning("no_descriptor_left", error=str(error))
        return None
    finally:
        os.close(descriptor)
    try:
        facts = tuple(sock.getsockopt(socket.SOL_SOCKET, option) for option in _FACTS)
    except OSError:
        facts = ()
    if facts == _LISTENS:
        return sock
    sock.close()
    return None


def own(connection: socket.socket) -> None:
    """Sets what an accepted connection would otherwise have by its listener's owner. Raises ``OSError``."""
    connection.setblocking(False)
    for level, option, value in _OWN:
        connection.setsockopt(level, option, value)
