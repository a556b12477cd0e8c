"""Gets journal files from the broker: one connection, one question, exactly one descriptor."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import stat
from collections.abc import Callable

from sandbox_agent.journal import GrantFn
from sandbox_agent.wire import codec
from sandbox_agent.wire.codec import WireError
from sandbox_agent.wire.messages import Grant, Preamble

TIMEOUT_S = 5.0
_ROOM = socket.CMSG_SPACE(4 * 4)
"""Room for four descriptors, so that more than one is seen and closed, not lost."""


def ask(path: str, secret: bytes, segment: int, *, timeout_s: float = TIMEOUT_S) -> tuple[int, Grant]:
    """Asks for ``segment`` on the slot's ``agent`` socket at ``path``. Blocks, ``timeout_s`` a step at most.

    Returns the descriptor (close-on-exec, read, write, append) and the grant. Raises ``OSError``,
    ``EOFError`` (refused) or ``WireError``.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        sock.connect(path)
        preamble = Preamble(kind="journal", version=codec.VERSION, secret=secret, segment=segment)
        sock.sendall(codec.pack(preamble.encode(), limit=codec.MAX_PREAMBLE))
        return receive(sock)


def receive(sock: socket.socket) -> tuple[int, Grant]:
    """Reads a ``Grant`` and its descriptor. A plain socket only: event loop transports drop descriptors."""
    decoder = codec.Decoder(limit=codec.MAX_PREAMBLE)
    files: list[int] = []
    try:
        messages: list[dict[str, object]] = []
        while not messages:
            data, ancillary, flags, _ = sock.recvmsg(codec.MAX_PREAMBLE, _ROOM, socket.MSG_CMSG_CLOEXEC)
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    files += memoryview(content[: len(content) // 4 * 4]).cast("i").tolist()
            if not data:
                raise EOFError("the broker gave no journal file")
            if flags & socket.MSG_CTRUNC:
                raise WireError("more than one descriptor came")
            messages = decoder.feed(data)
        return _checked(files), Grant.decode(messages[0])
    except BaseException:
        for fd in files:
            os.close(fd)
        raise


def _checked(files: list[int]) -> int:
    if len(files) != 1:
        raise WireError(f"{len(files)} descriptors came instead of one")
    if not stat.S_ISREG(os.fstat(files[0]).st_mode):
        raise WireError("the descriptor is no regular file")
    flags = fcntl.fcntl(files[0], fcntl.F_GETFL)
    if flags & os.O_ACCMODE != os.O_RDWR or not flags & os.O_APPEND:
        raise WireError("the file is not open for reading and appending")
    return files[0]


def granter(path: Callable[[], str], secret: Callable[[], bytes]) -> GrantFn:
    """A ``GrantFn`` that dials in a thread; path and secret are asked for each time."""

    async def grant(segment: int) -> tuple[int, Grant]:
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(None, ask, path(), secret(), segment)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(_close_late)
            raise

    return grant


def _close_late(done: asyncio.Future[tuple[int, Grant]]) -> None:
    if not done.cancelled() and done.exception() is None:
        os.close(done.result()[0])
