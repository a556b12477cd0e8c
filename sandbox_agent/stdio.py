"""The agent's standard streams on the event loop: lines out of stdout, a tail of stderr, a buffer to stdin."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable

from sandbox_agent.spawn import Child

READ_BYTES = 65_536
STDERR_TAIL = 4096
CONGESTED_BYTES = 2**20
CLOSED_GRACE_S = 5.0
"""How long an agent may live on with its input or output closed: nothing said to it would ever be answered."""
MAX_UNREAD_BYTES = 64 * 2**20
"""What may wait for an agent that does not read; over that it counts as hung."""


class LineBuffer:
    """Cuts a byte stream into lines. Pure. A line over ``limit`` bytes is dropped whole and counted."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pending = bytearray()
        self._skipping = False
        self.dropped = 0

    def feed(self, data: bytes) -> list[bytes]:
        """The lines completed by ``data``, without newline; empty ones are left out."""
        *whole, rest = data.split(b"\n")
        if whole:
            whole[0] = self._first(whole[0])
        lines = [line for line in whole if line and self._fits(line)]
        self._keep(rest)
        return lines

    def _first(self, end: bytes) -> bytes:
        if self._skipping:
            self._skipping = False
            return b""
        if self._pending:
            end = bytes(self._pending) + end
            self._pending = bytearray()
        return end

    def _fits(self, line: bytes) -> bool:
        if len(line) > self._limit:
            self.dropped += 1
            return False
        return True

    def _keep(self, rest: bytes) -> None:
        if self._skipping or not rest:
            return
        self._pending += rest
        if len(self._pending) > self._limit:
            self._pending = bytearray()
            self._skipping = True
            self.dropped += 1


class AgentStdio:
    """Satisfies ``port.AgentChannel``. ``on_lines`` gets stdout; ``on_hung`` is called once when stdin is stuck, or,
    if it ``must_talk``, when it lives on after it has closed stdin or stdout; ``on_dropped`` for lines too long."""

    def __init__(
        self,
        child: Child,
        *,
        max_line: int,
        on_lines: Callable[[list[bytes]], None],
        on_hung: Callable[[], None],
        must_talk: bool = True,
        on_dropped: Callable[[], None] | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._child = child
        self._lines = LineBuffer(max_line)
        self._on_lines = on_lines
        self._on_hung = on_hung
        self._on_dropped = on_dropped
        self._tail = bytearray()
        self._waiting: deque[memoryview] = deque()
        self._unread = 0
        self._open = {child.stdin, child.stdout, child.stderr}
        self._held = False
        self._must_talk = must_talk
        self._mute: asyncio.TimerHandle | None = None
        self._loop.add_reader(child.stdout, self._read_stdout)
        self._loop.add_reader(child.stderr, self._read_stderr)

    @property
    def congested(self) -> bool:
        return self._unread > CONGESTED_BYTES

    @property
    def dropped(self) -> int:
        """Lines that were too long."""
        return self._lines.dropped

    @property
    def last_words(self) -> str:
        """The end of standard error, at most 4 KiB."""
        return self._tail.decode(errors="replace").strip()

    def write(self, line: bytes) -> None:
        if self._child.stdin not in self._open:
            return
        rest = memoryview(line)
        if not self._waiting:
            rest = rest[self._put(rest) :]
            if not rest or self._child.stdin not in self._open:
                return
            self._loop.add_writer(self._child.stdin, self._flush)
        self._waiting.append(rest)
        self._unread += len(rest)
        if self._unread > MAX_UNREAD_BYTES:
            self._close(self._child.stdin)
            self._on_hung()

    def hold(self, held: bool) -> None:
        """Leaves the agent's output in its pipe, so that the agent waits, or takes it again."""
        if held == self._held or self._child.stdout not in self._open:
            return
        self._held = held
        if held:
            self._loop.remove_reader(self._child.stdout)
        else:
            self._loop.add_reader(self._child.stdout, self._read_stdout)

    def _put(self, data: memoryview) -> int:
        """Bytes taken; all of them when the agent has closed its end (its exit is on the way)."""
        try:
            return os.write(self._child.stdin, data)
        except BlockingIOError:
            return 0
        except OSError:
            self._close(self._child.stdin)
            self._half_closed()
            return len(data)

    def _flush(self) -> None:
        while self._waiting:
            data = self._waiting[0]
            taken = self._put(data)
            if self._child.stdin not in self._open:
                return
            self._unread -= taken
            if taken < len(data):
                self._waiting[0] = data[taken:]
                return
            self._waiting.popleft()
        self._loop.remove_writer(self._child.stdin)

    def _read_stdout(self) -> bool:
        """True when there was something."""
        data = self._read(self._child.stdout)
        dropped = self._lines.dropped
        lines = self._lines.feed(data) if data else []
        if lines:
            self._on_lines(lines)
        if self._lines.dropped > dropped and self._on_dropped is not None:
            self._on_dropped()
        return bool(data)

    def _read_stderr(self) -> None:
        self._tail += self._read(self._child.stderr)
        del self._tail[:-STDERR_TAIL]

    def _read(self, number: int) -> bytes:
        try:
            data = os.read(number, READ_BYTES)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data:
            self._close(number)
            if number == self._child.stdout:
                self._half_closed()
        return data

    def _half_closed(self) -> None:
        if self._must_talk and self._mute is None:
            self._mute = self._loop.call_later(CLOSED_GRACE_S, self._on_hung)

    def finish(self) -> None:
        """After the exit: takes what the pipes still hold (no more than they can) and closes them."""
        for _ in range(32):
            if self._child.stdout not in self._open or not self._read_stdout():
                break
        if self._child.stderr in self._open:
            self._read_stderr()
        for number in list(self._open):
            self._close(number)
        if self._mute is not None:
            self._mute.cancel()

    def _close(self, number: int) -> None:
        if number not in self._open:
            return
        self._open.discard(number)
        self._loop.remove_reader(number)
        if number == self._child.stdin:
            self._loop.remove_writer(number)
            self._waiting.clear()
            self._unread = 0
        os.close(number)
