"""Loopback listeners handed over to a real gateway process, by the agent server's own code and by hostile sandboxes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from broker.gateway.link import Provider
from sandbox_agent import boot
from sandbox_agent.handover import Handover
from sandbox_agent.wire.handover import GIVEN, REQUEST, SWITCHED, TAKEN
from tests.integration.gateway.support import KEY, Rig, SlotSockets, app_server, client, echo, rig

LONG = struct.pack("ii", 1, 3600)


@pytest.fixture
async def gw() -> AsyncIterator[Rig]:
    async with rig() as made:
        yield made


@pytest.fixture
async def providers() -> AsyncIterator[dict[str, Provider]]:
    async with app_server(echo) as port:
        yield {"openai": Provider("openai", f"http://127.0.0.1:{port}", KEY)}


@asynccontextmanager
async def door(path: Path) -> AsyncIterator[Handover]:
    made = Handover(boot.listen(0), str(path), offer_s=1.0)
    await made.start()
    try:
        yield made
    finally:
        await made.close()


async def taken(handover: Handover) -> None:
    await asyncio.wait_for(handover.taken.wait(), 10)


async def given_back(handover: Handover) -> None:
    async with asyncio.timeout(10):
        while handover.taken.is_set():
            await asyncio.sleep(0.005)


async def status(port: int) -> int:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as http:
        return (await http.get(f"http://127.0.0.1:{port}/openai/x")).status


async def by_socket(slot: SlotSockets) -> int:
    async with client(slot.gateway_path) as http:
        return (await http.get("/openai/x")).status


class Hand:
    """A handover step by step."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.setblocking(False)
        self._path = str(path)

    async def switched(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self.sock, self._path)
        await loop.sock_sendall(self.sock, REQUEST)
        assert await self.answer(len(SWITCHED)) == SWITCHED

    async def give(self, *descriptors: int) -> bytes:
        """The answer: ``TAKEN``, or nothing."""
        await self.switched()
        socket.send_fds(self.sock, [GIVEN], descriptors)
        return await self.answer(1)

    async def answer(self, size: int) -> bytes:
        try:
            return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.sock, size), 10)
        except ConnectionResetError:
            return b""


@asynccontextmanager
async def hand(path: Path) -> AsyncIterator[Hand]:
    made = Hand(path)
    try:
        yield made
    finally:
        made.sock.close()


async def test_what_the_port_accepts_is_served_without_a_hop(gw: Rig, providers: dict[str, Provider]) -> None:
    slot = await gw.put(providers)
    async with door(slot.gateway_path) as handover:
        await taken(handover)
        assert await status(handover.port) == 200
        assert len(handover.forwarder) == 0


async def test_a_port_that_was_handed_over_before_the_claim_serves_after_it(
    gw: Rig, providers: dict[str, Provider]
) -> None:
    slot = await gw.put(providers, identity=None)
    async with door(slot.gateway_path) as handover:
        await taken(handover)
        assert await status(handover.port) == 503
        await gw.put(providers)
        assert await status(handover.port) == 200
        assert handover.taken.is_set()


async def test_a_gateway_that_was_killed_is_handed_the_port_again(gw: Rig, providers: dict[str, Provider]) -> None:
    slot = await gw.put(providers)
    async with door(slot.gateway_path) as handover:
        await taken(handover)
        assert gw.link.peer_pid is not None
        os.kill(gw.link.peer_pid, signal.SIGKILL)
        assert await status(handover.port) == 200
        await taken(handover)
        assert await status(handover.port) == 200


async def test_where_no_gateway_takes_it_the_port_is_forwarded(tmp_path: Path) -> None:
    async def old(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
        await reader.read()

    path = tmp_path / "gateway"
    async with await asyncio.start_unix_server(old, path), door(path) as handover:
        assert await status(handover.port) == 404
        assert not handover.taken.is_set()


async def test_a_slot_that_is_taken_back_leaves_no_port_behind(gw: Rig, providers: dict[str, Provider]) -> None:
    slot = await gw.put(providers)
    listener = boot.listen(0)
    async with hand(slot.gateway_path) as given:
        assert await given.give(listener.fileno()) == TAKEN
        await gw.link.drop_slot("a")
        assert await given.answer(1) == b""
        with pytest.raises(OSError, match="Connect call failed"):
            await asyncio.wait_for(asyncio.open_connection("127.0.0.1", listener.getsockname()[1]), 10)
    listener.close()


async def test_a_gateway_that_drains_leaves_the_port_to_the_next(gw: Rig, providers: dict[str, Provider]) -> None:
    slot = await gw.put(providers)
    async with door(slot.gateway_path) as handover:
        await taken(handover)
        assert gw.link.peer_pid is not None
        os.kill(gw.link.peer_pid, signal.SIGTERM)
        await given_back(handover)
        await taken(handover)
        assert await status(handover.port) == 200


async def test_only_a_listening_tcp_socket_is_taken_and_nothing_else_is_kept(gw: Rig) -> None:
    slot = await gw.put()
    assert gw.link.peer_pid is not None
    files = Path(f"/proc/{gw.link.peer_pid}/fd")
    unix, tcp, udp = (
        socket.socket(*kind)
        for kind in (
            (socket.AF_UNIX, socket.SOCK_STREAM),
            (socket.AF_INET, socket.SOCK_STREAM),
            (socket.AF_INET, socket.SOCK_DGRAM),
        )
    )
    unix.bind(str(gw.directory / "own"))
    unix.listen()
    good = boot.listen(0)
    before = len(list(files.iterdir()))
    with unix, tcp, udp, good, Path("/dev/null").open("rb") as null:
        for given in (
            [unix.fileno()],
            [tcp.fileno()],
            [udp.fileno()],
            [null.fileno()],
            [good.fileno(), good.fileno()],
            [good.fileno()] * 20,
        ):
            async with hand(slot.gateway_path) as each:
                assert await each.give(*given) == b""
        async with hand(slot.gateway_path) as each:
            await each.switched()
            await asyncio.get_running_loop().sock_sendall(each.sock, GIVEN)  # and no descriptor
            assert await each.answer(1) == b""
    async with asyncio.timeout(10):
        while len(list(files.iterdir())) > before:
            await asyncio.sleep(0.01)


async def test_a_listener_comes_by_the_slots_own_socket_only(gw: Rig, providers: dict[str, Provider]) -> None:
    slot = await gw.put(providers)
    async with door(slot.gateway_path) as handover:
        await taken(handover)
        reader, writer = await asyncio.open_connection("127.0.0.1", handover.port)
        writer.write(REQUEST)
        assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 400")
        writer.close()
        assert await status(handover.port) == 200


async def test_a_fifth_listener_is_refused_until_one_is_given_back(gw: Rig) -> None:
    slot = await gw.put()
    with boot.listen(0) as listener:
        hands = [Hand(slot.gateway_path) for _ in range(4)]
        for each in hands:
            assert await each.give(listener.fileno()) == TAKEN
        async with hand(slot.gateway_path) as fifth:
            assert await fifth.give(listener.fileno()) == b""
        hands.pop().sock.close()
        async with asyncio.timeout(10):
            while True:
                async with hand(slot.gateway_path) as fifth:
                    if await fifth.give(listener.fileno()) == TAKEN:
                        break
        for each in hands:
            each.sock.close()


async def test_a_listener_that_is_made_to_block_holds_up_nobody(gw: Rig, providers: dict[str, Provider]) -> None:
    mine, other = await gw.put(providers, slot="mine"), await gw.put(providers, slot="other")
    with boot.listen(0) as listener:
        async with hand(mine.gateway_path) as given:
            assert await given.give(listener.fileno()) == TAKEN
            os.set_blocking(listener.fileno(), True)  # of the open file, which is the gateway's too
            for _ in range(3):
                assert await status(listener.getsockname()[1]) == 200
                assert await by_socket(other) == 200
            assert await by_socket(mine) == 200
        assert await by_socket(mine) == 200


async def test_a_client_with_the_listeners_worst_options_holds_up_nobody(
    gw: Rig, providers: dict[str, Provider]
) -> None:
    mine, other = await gw.put(providers, slot="mine"), await gw.put(providers, slot="other")
    with boot.listen(0) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LONG)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**30)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 2**20)
        async with hand(mine.gateway_path) as given:
            assert await given.give(listener.fileno()) == TAKEN
            for _ in range(5):
                # Answers that nobody reads are on their way when the slot is cut.
                client_side = socket.create_connection(listener.getsockname())
                client_side.setblocking(False)
                request = b"POST /openai/x HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n" + bytes(1_000_000)
                await asyncio.wait_for(asyncio.get_running_loop().sock_sendall(client_side, request), 10)
            await gw.link.drop_slot("mine")
            assert await by_socket(other) == 200
