"""Loopback listeners handed over to a real gateway process, by the agent server's own code and by hostile sandboxes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import pytest

from broker.gateway.link import Provider
from sandbox_agent import boot
from sandbox_agent.handover import Handover
from sandbox_agent.wire.handover import GIVEN, REQUEST, SWITCHED, TAKEN
from tests.integration.gateway.support import KEY, Rig, SlotSockets, app_server, client, echo, rig

LONG, AT_ONCE = struct.pack("ii", 1, 3600), struct.pack("ii", 1, 0)


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
        self.sock.settimeout(10)
        self.channel = socket.socket()
        self._path = str(path)

    def switch(self) -> bytes:
        self.sock.connect(self._path)
        self.sock.sendall(REQUEST)
        answer, descriptors, _, _ = socket.recv_fds(self.sock, 4096, 1)
        if descriptors:
            self.channel.close()
            self.channel = socket.socket(fileno=descriptors[0])
            self.channel.settimeout(10)
        return answer

    async def give(self, *descriptors: int) -> bytes:
        """The answer: ``TAKEN``, or nothing."""
        assert await asyncio.to_thread(self.switch) == SWITCHED
        socket.send_fds(self.channel, [GIVEN], descriptors)
        return await self.answer()

    async def answer(self) -> bytes:
        try:
            return await asyncio.to_thread(self.channel.recv, 1)
        except ConnectionResetError:
            return b""

    def close(self) -> None:
        self.channel.close()
        self.sock.close()


@asynccontextmanager
async def hand(path: Path) -> AsyncIterator[Hand]:
    made = Hand(path)
    try:
        yield made
    finally:
        made.close()


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
        assert await given.answer() == b""
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


async def test_only_a_listening_tcp_socket_is_taken_and_nothing_else_is_kept(
    gw: Rig, providers: dict[str, Provider]
) -> None:
    slot = await gw.put(providers)
    assert gw.link.peer_pid is not None
    assert await by_socket(slot) == 200
    files = Path(f"/proc/{gw.link.peer_pid}/fd")
    good = boot.listen(0)
    async with hand(slot.gateway_path) as each:
        assert await each.give(good.fileno()) == TAKEN
    before = kinds(files)
    with good, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp, Path("/dev/null").open("rb") as null:
        for given in ([udp.fileno()], [null.fileno()], [good.fileno()] * 2, [good.fileno()] * 20, []):
            async with hand(slot.gateway_path) as each:
                assert await each.give(*given) == b""
    await reached(lambda: kinds(files) <= before, lambda: kinds(files) - before)


def kinds(files: Path) -> Counter[str]:
    """What a process has open, by kind."""
    found: Counter[str] = Counter()
    for each in files.iterdir():
        with suppress(FileNotFoundError):
            found[os.readlink(each).partition(":")[0]] += 1
    return found


async def reached(done: Callable[[], bool], why: Callable[[], object]) -> None:
    try:
        async with asyncio.timeout(10):
            while not done():
                await asyncio.sleep(0.01)
    except TimeoutError:
        pytest.fail(str(why()))


async def test_what_a_sandbox_sends_cannot_freeze_the_others(gw: Rig, providers: dict[str, Provider]) -> None:
    """A socket whose last close blocks: as a listener, and on a connection where nobody asked for one."""
    mine, other = await gw.put(providers, slot="mine"), await gw.put(providers, slot="other")
    for unasked in (False, True):
        near, far = lingering()
        async with hand(mine.gateway_path) as given:
            if unasked:
                given.sock.connect(str(mine.gateway_path))
                try:
                    socket.send_fds(given.sock, [b"GET /x"], [near.fileno()])
                except PermissionError:  # as it should be, from Linux 6.16 on
                    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
                else:
                    pytest.skip("this kernel lets descriptors through to whoever reads")
            else:
                assert await asyncio.to_thread(given.switch) == SWITCHED
                # Ours is not to be the last close, which blocks.
                assert gw.link.peer_pid is not None
                os.kill(gw.link.peer_pid, signal.SIGSTOP)
                socket.send_fds(given.channel, [GIVEN], [near.fileno()])
            near.close()
            os.kill(gw.link.peer_pid or 0, signal.SIGCONT)
            for _ in range(20):
                assert await asyncio.wait_for(by_socket(other), 10) == 200
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
        far.close()


def lingering() -> tuple[socket.socket, socket.socket]:
    """A connection whose first end waits an hour when it is closed, and the end that nobody reads."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LONG)
    near.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            near.send(bytes(65536))
    return near, far


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
            assert (await asyncio.to_thread(fifth.switch)).startswith(b"HTTP/1.1 429")
        hands.pop().close()
        async with asyncio.timeout(10):
            while True:
                async with hand(slot.gateway_path) as fifth:
                    if await asyncio.to_thread(fifth.switch) == SWITCHED:
                        break
        for each in hands:
            each.close()


async def test_answers_that_nobody_reads_hold_no_more_than_four_descriptors(gw: Rig) -> None:
    slot = await gw.put()
    unread = [Hand(slot.gateway_path) for _ in range(4)]
    for each in unread:
        each.sock.connect(str(slot.gateway_path))
        each.sock.sendall(REQUEST + b"x")  # out of turn: it is cut, with the answer on its way
    async with hand(slot.gateway_path) as fifth:
        assert (await asyncio.to_thread(fifth.switch)).startswith(b"HTTP/1.1 429")
    for each in unread:
        each.close()
    async with asyncio.timeout(10):
        while True:
            async with hand(slot.gateway_path) as next_one:
                if await asyncio.to_thread(next_one.switch) == SWITCHED:
                    break


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
