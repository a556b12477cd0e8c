from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from glob import glob
from pathlib import Path
from typing import Any

import pytest

from broker.gateway.acceptor import BUFFER_BYTES, Acceptor, own
from sandbox_agent.wire.handover import GIVEN, TAKEN


def listening(backlog: int = 100) -> socket.socket:
    return socket.create_server(("127.0.0.1", 0), backlog=backlog)


class Taken:
    """What an acceptor tells, and the sandbox's end of its channel."""

    def __init__(self) -> None:
        self.connections: asyncio.Queue[socket.socket] = asyncio.Queue()
        self.over = asyncio.Event()
        self.near, self.far = socket.socketpair()

    def start(self) -> Taken:
        self.acceptor = Acceptor(self.far, "a", self.connections.put_nowait, self.over.set)
        return self

    async def give(self, *descriptors: int) -> bytes:
        """The answer: ``TAKEN``, or nothing."""
        socket.send_fds(self.near, [GIVEN], descriptors)
        return await asyncio.wait_for(asyncio.to_thread(self.near.recv, 1), 10)

    async def next(self) -> socket.socket:
        return await asyncio.wait_for(self.connections.get(), 10)

    async def ended(self) -> None:
        self.near.close()
        await asyncio.wait_for(self.over.wait(), 10)


async def test_connections_come_one_by_one_until_it_is_closed() -> None:
    taken = Taken().start()
    with listening() as listener:
        assert await taken.give(listener.fileno()) == TAKEN
        for _ in range(100):
            with socket.create_connection(listener.getsockname()) as near, await taken.next() as far:
                assert far.getpeername() == near.getsockname()
                assert not far.getblocking()
        taken.acceptor.close()
        taken.acceptor.close()
        await taken.ended()
        with socket.create_connection(listener.getsockname()):
            listener.accept()[0].close()  # it is still theirs


async def test_it_is_given_back_when_the_channel_closes() -> None:
    taken = Taken().start()
    with listening() as listener:
        assert await taken.give(listener.fileno()) == TAKEN
        taken.near.close()
        await taken.ended()
        with socket.create_connection(listener.getsockname()):
            listener.accept()[0].close()


async def test_whoever_talks_on_has_ended_it() -> None:
    taken = Taken().start()
    with listening() as listener:
        assert await taken.give(listener.fileno()) == TAKEN
        taken.near.send(bytes(100_000), socket.MSG_DONTWAIT)
        await asyncio.wait_for(taken.over.wait(), 10)
        taken.near.close()


async def test_a_channel_that_closes_before_anything_came_ends_it() -> None:
    taken = Taken().start()
    taken.near.close()
    await taken.ended()


@pytest.mark.parametrize("kind", ["unix", "unheard", "datagram", "file", "two", "none"])
async def test_what_is_no_listener_on_tcp_is_closed(kind: str) -> None:
    taken = Taken().start()
    with ExitStack() as stack:
        given = [stack.enter_context(made) for made in made_for(kind)]
        before = len(os.listdir("/proc/self/fd"))
        assert await taken.give(*(each.fileno() for each in given)) == b""
        await taken.ended()
        assert len(os.listdir("/proc/self/fd")) <= before


def made_for(kind: str) -> list[Any]:
    if kind == "unix":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind("")  # a name of the kernel's choice
        sock.listen()
        return [sock]
    made: dict[str, Callable[[], list[Any]]] = {
        "unheard": lambda: [socket.socket(socket.AF_INET, socket.SOCK_STREAM)],
        "datagram": lambda: [socket.socket(socket.AF_INET, socket.SOCK_DGRAM)],
        "file": lambda: [open("/dev/null", "rb")],  # noqa: SIM115
        "two": lambda: [listening(), listening()],
        "none": list,
    }
    return made[kind]()


async def test_a_socket_whose_close_blocks_holds_up_the_thread_alone() -> None:
    taken = Taken()
    with listening() as server, socket.create_connection(server.getsockname()) as near:
        far, _ = server.accept()
        near.setblocking(False)
        fill(near)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 600))
        socket.send_fds(taken.near, [GIVEN], [near.fileno()])
        near.close()  # not the last of it, which blocks: that is in the channel
        taken.start()
        await asyncio.to_thread(hangs_in_close)
        assert not taken.over.is_set()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        far.close()  # resets it
        await taken.ended()


async def test_an_accept_that_hangs_ends_when_the_listener_is_shut() -> None:
    taken = Taken().start()
    with listening() as listener:
        assert await taken.give(listener.fileno()) == TAKEN
        listener.setblocking(True)  # of the open file, which is the acceptor's too
        acceptor, quicker = taken.acceptor, Quicker(listener)
        acceptor._room = quicker  # type: ignore[assignment]
        with socket.create_connection(listener.getsockname()):
            assert await asyncio.to_thread(quicker.was.wait, 10)
        acceptor.close()
        assert not taken.over.is_set()
        acceptor.shut()
        await asyncio.wait_for(taken.over.wait(), 10)  # whether or not the sandbox hangs up
        taken.near.close()


def fill(sock: socket.socket) -> None:
    """Sends until nothing more goes in."""
    with suppress(BlockingIOError):
        while True:
            sock.send(bytes(65536))


def hangs_in_close() -> None:
    """Returns when a thread of ours waits in the kernel for a socket to linger (proc(5))."""
    end = time.monotonic() + 10
    while not any(Path(task, "wchan").read_text() == "wait_woken" for task in glob("/proc/self/task/*")):
        assert time.monotonic() < end
        time.sleep(0.01)


class Quicker:
    """Takes the connection from under the acceptor, between its poll and its accept."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.was = threading.Event()

    def acquire(self) -> None:
        self.listener.accept()[0].close()
        self.was.set()

    def release(self) -> None:
        """As many as come."""


async def test_more_than_the_loop_has_looked_at_are_left_in_the_queue() -> None:
    taken = Taken().start()
    with listening(200) as listener:
        assert await taken.give(listener.fileno()) == TAKEN
        clients = [socket.create_connection(listener.getsockname()) for _ in range(100)]
        for _ in clients:
            (await taken.next()).close()
        taken.acceptor.close()
        await taken.ended()
        for each in clients:
            each.close()


def test_what_a_connection_inherits_is_set_anew() -> None:
    with listening() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 600))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**30)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1000)
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as far:
            own(far)
            assert struct.unpack("ii", far.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))[0] == 0
            # The kernel doubles what it is asked for (socket(7)).
            assert far.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 2 * BUFFER_BYTES
            assert far.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) <= 2 * BUFFER_BYTES
            assert far.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1
            assert far.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert not far.getblocking()
