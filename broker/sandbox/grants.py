"""Hands journal files to an agent server: one descriptor with one message, then the connection ends."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable

import structlog

from broker.sandbox.journal_files import JournalFiles, Segment
from sandbox_agent.wire.codec import pack
from sandbox_agent.wire.messages import Grant

log = structlog.get_logger(__name__)

_MAX_AT_ONCE = 2


class Grants:
    """Grants of one sandbox; at most two files are being opened at a time."""

    def __init__(self, slot: str, violation: Callable[[str], None]) -> None:
        self._slot = slot
        self._violation = violation
        self._running = 0

    async def give(self, sock: socket.socket, files: JournalFiles, number: int) -> None:
        """Answers a journal connection. What cannot be granted is refused by hanging up."""
        if self._running >= _MAX_AT_ONCE:
            self._violation("journal")
            return
        self._running += 1
        try:
            segment = await _opened(files, number)
        except ValueError as error:
            log.warning("journal_segment_refused", slot=self._slot, error=str(error))
            self._violation("journal")
            return
        except OSError as error:
            log.error("journal_open_failed", slot=self._slot, error=str(error))
            return
        finally:
            self._running -= 1
        _send(sock, segment)


async def _opened(files: JournalFiles, number: int) -> Segment:
    """Opens a segment in a thread; nothing leaks when the wait is cancelled."""
    future = asyncio.get_running_loop().run_in_executor(None, files.open, number)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        future.add_done_callback(_dispose)
        raise


def _dispose(future: asyncio.Future[Segment]) -> None:
    if not future.cancelled() and future.exception() is None:
        os.close(future.result().fd)


def _send(sock: socket.socket, segment: Segment) -> None:
    grant = pack(Grant(segment.number, segment.first, segment.last).encode())
    try:
        socket.send_fds(sock, [grant], [segment.fd])
    except OSError as error:
        log.debug("journal_grant_lost", error=str(error))
    finally:
        os.close(segment.fd)
