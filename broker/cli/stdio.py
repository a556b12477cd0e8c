"""Standard input and output as whole lines, beside an event loop."""

from __future__ import annotations

import asyncio
import os
import threading

from broker.errors import Code, CortexError

CHUNK = 2**16


class LineReader:
    """Lines of a file descriptor, of any kind: a pipe, a file, a terminal, /dev/null.

    A daemon thread reads the bare descriptor, so that neither a blocked read nor the lock of
    ``sys.stdin`` keeps the process from ending. At most ``ahead`` lines are read ahead.
    """

    def __init__(self, fd: int, *, limit: int, ahead: int = 16) -> None:
        self._fd = fd
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._room = threading.Semaphore(ahead)
        self._lines: asyncio.Queue[bytes | CortexError | None] = asyncio.Queue()
        self._ended = False
        threading.Thread(target=self._read, name="stdin", daemon=True).start()

    async def next(self) -> bytes | None:
        """The next line without its newline; None at the end, and ever after. Raises ``BODY_TOO_LARGE``."""
        if self._ended:
            return None
        line = await self._lines.get()
        self._room.release()
        if isinstance(line, CortexError):
            self._ended = True
            raise line
        self._ended = line is None
        return line

    def end(self) -> None:
        """No more lines are wanted: a waiting ``next`` returns None."""
        if self._lines.empty():
            self._lines.put_nowait(None)

    def _read(self) -> None:
        buffer = bytearray()
        try:
            while data := os.read(self._fd, CHUNK):
                buffer += data
                *lines, rest = buffer.split(b"\n")
                for line in lines:
                    self._put(bytes(line))
                buffer = rest
                if len(buffer) > self._limit:
                    self._put(_too_long(self._limit))
                    return
            if buffer:
                self._put(bytes(buffer))
            self._put(None)
        except (RuntimeError, OSError):
            return  # the loop is closed, or the descriptor is

    def _put(self, item: bytes | CortexError | None) -> None:
        """Waits while as many lines are read ahead as may be."""
        self._room.acquire()
        self._loop.call_soon_threadsafe(self._lines.put_nowait, item)


def _too_long(limit: int) -> CortexError:
    return CortexError(
        Code.BODY_TOO_LARGE, f"a line on stdin is over {limit} bytes", hint="messages are at most 32 MiB; send less"
    )


def write_all(fd: int, data: bytes) -> None:
    """Writes all of ``data``; blocks while the reader is slow."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
