from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading

import pytest

from broker.errors import Code, CortexError
from broker.gateway.acceptor import BUFFER_BYTES, Acceptor, loopback_listener, own


def listening() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


class Taken:
    """What an acceptor tells."""

    def __init__(self) -> None:
        self.connections: asyncio.Queue[socket.socket] = asyncio.Queue()
        self.over = asyncio.Event()

    def acceptor(self, listener: socket.socket) -> Acceptor:
        return Acceptor(listener, "a", self.connections.put_nowait, self.over.set)

    async def next(self) -> socket.socket:
        return await asyncio.wait_for(self.connections.get(), 10)

    async def ended(self) -> None:
        await asyncio.wait_for(self.over.wait(), 10)


async def test_connections_come_one_by_one_until_it_is_closed() -> None:
    taken, listener = Taken(), listening()
    acceptor = taken.acceptor(listener)
    address = listener.getsockname()
    for _ in range(100):
        with socket.create_connection(address) as near, await taken.next() as far:
            assert far.getpeername() == near.getsockname()
            assert not far.getblocking()
    acceptor.close()
    acceptor.close()
    await taken.ended()
    assert listener.fileno() == -1


async def test_closing_leaves_the_listener_to_whoever_else_has_it() -> None:
    taken, listener = Taken(), listening()
    with listener.dup() as theirs:
        taken.acceptor(listener).close()
        await taken.ended()
        with socket.create_connection(theirs.getsockname()):
            theirs.accept()[0].close()


async def test_an_accept_that_hangs_ends_when_the_listener_is_shut() -> None:
    taken, listener = Taken(), listening()
    theirs = listener.dup()
    acceptor = taken.acceptor(listener)
    hung = threading.Event()

    class Hangs:
        """Readable for the acceptor, and then taken from under it."""

        def __getattr__(self, name: str) -> object:
            return getattr(listener, name)

        def accept(self) -> tuple[socket.socket, object]:
            listener.accept()[0].close()
            hung.set()
            return listener.accept()

    acceptor._listener = Hangs()  # type: ignore[assignment]
    with socket.create_connection(theirs.getsockname()):
        assert await asyncio.to_thread(hung.wait, 10)
    acceptor.close()
    assert not taken.over.is_set()
    acceptor.shut()
    await taken.ended()
    theirs.close()


async def test_more_than_the_loop_has_looked_at_are_left_in_the_queue() -> None:
    taken, listener = Taken(), socket.create_server(("127.0.0.1", 0), backlog=200)
    acceptor = taken.acceptor(listener)
    clients = [socket.create_connection(listener.getsockname()) for _ in range(100)]
    for _ in clients:
        (await taken.next()).close()
    acceptor.close()
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


@pytest.mark.parametrize("kind", [(socket.AF_UNIX, socket.SOCK_STREAM), (socket.AF_INET, socket.SOCK_STREAM)])
def test_what_does_not_listen_on_tcp_is_closed(kind: tuple[int, int]) -> None:
    descriptor = socket.socket(*kind).detach()
    with pytest.raises(CortexError) as caught:
        loopback_listener(descriptor)
    assert caught.value.code is Code.BAD_REQUEST
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(descriptor)
