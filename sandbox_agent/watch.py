"""Watches names in directories by inotify(7), on the event loop: no thread, nothing that polls.

watchfiles would do it too, with 5 MiB and a thread that wakes up every 50 ms: 0.15 % of a processor
for each sandbox that idles.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
from collections.abc import Callable, Mapping

PAUSE_S = 0.05
"""After events have been read, later ones wait so long: a flood of them is one look now and then."""

_MODIFY, _CLOSE_WRITE, _MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x2, 0x8, 0x40, 0x80, 0x100, 0x200
_OVERFLOW, _IGNORED = 0x4000, 0x8000
_ONLYDIR, _DONT_FOLLOW = 0x0100_0000, 0x0200_0000
_WANTED = _MODIFY | _CLOSE_WRITE | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE | _ONLYDIR | _DONT_FOLLOW
_EVENT = struct.Struct("iIII")
_BUFFER = 65_536
_ABSENT = (2, 13, 20, 40)
"""ENOENT, EACCES, ENOTDIR, ELOOP: no directory to watch there, now."""


class Watch:
    """Calls ``on_change`` when something may have happened to a watched name."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = -1
        self._names: dict[int, frozenset[str]] = {}
        self._pause: asyncio.TimerHandle | None = None

    def set(self, wanted: Mapping[str, frozenset[str]]) -> None:
        """Watches these names in these directories and no others; a directory that is not there is left out.

        To be called again when one of them has changed: it may be another directory by now. Raises
        ``OSError`` when the host has no more watches to give.
        """
        if self._fd < 0:
            if not wanted:
                return
            self._fd = self._check(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
            asyncio.get_running_loop().add_reader(self._fd, self._readable)
        names: dict[int, frozenset[str]] = {}
        for directory, inside in wanted.items():
            try:
                number = self._check(self._libc.inotify_add_watch(self._fd, os.fsencode(directory), _WANTED))
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise
                continue
            names[number] = names.get(number, frozenset()) | inside
        gone, self._names = self._names.keys() - names.keys(), names
        for number in gone:
            self._libc.inotify_rm_watch(self._fd, number)  # fails for one that ended by itself

    def close(self) -> None:
        """Idempotent."""
        if self._pause is not None:
            self._pause.cancel()
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
        self._fd, self._pause, self._names = -1, None, {}

    def _check(self, result: int) -> int:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result

    def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._fd)
        self._pause = loop.call_later(PAUSE_S, self._resume)
        try:
            data = os.read(self._fd, _BUFFER)
        except BlockingIOError:
            return
        if self._concerns(data):
            self._on_change()

    def _resume(self) -> None:
        self._pause = None
        asyncio.get_running_loop().add_reader(self._fd, self._readable)

    def _concerns(self, data: bytes) -> bool:
        at = 0
        while at < len(data):
            number, mask, _, length = _EVENT.unpack_from(data, at)
            at += _EVENT.size + length
            if mask & _OVERFLOW:
                return True
            names = self._names.get(number)
            if names is None:
                continue
            name = os.fsdecode(data[at - length : at].rstrip(b"\0"))
            if mask & _IGNORED or name in names:
                return True
        return False
