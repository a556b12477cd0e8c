"""What a hostile sandbox does to its link: it is closed and counted, and nobody else notices."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from contextlib import suppress
from typing import Any

import pytest

from broker.errors import Code, CortexError
from broker.sandbox.limits import LinkLimits, TokenBucket
from broker.sandbox.sockets import SlotSockets
from sandbox_agent.wire.codec import MAX_PREAMBLE, pack
from sandbox_agent.wire.messages import MAX_CREDENTIAL_FILE, Built, Hello, Preamble, Refreshed, Status
from tests.unit.broker.sandbox.link_rig import ATTACH, hung_up, paired, served, soon
from tests.unit.broker.sandbox.scripted_agent import ScriptedAgent, read, say


async def garbage(agent: ScriptedAgent) -> socket.socket:
    sock = await agent.raw()
    await say(sock, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    return sock


async def oversized(agent: ScriptedAgent) -> socket.socket:
    sock = await agent.raw()
    await say(sock, (MAX_PREAMBLE + 1).to_bytes(4, "big"))
    return sock


async def not_a_map(agent: ScriptedAgent) -> socket.socket:
    sock = await agent.raw()
    await say(sock, b"\0\0\0\1\x01")
    return sock


async def silent(agent: ScriptedAgent) -> socket.socket:
    return await agent.raw()


async def half(agent: ScriptedAgent) -> socket.socket:
    sock = await agent.raw()
    await say(sock, pack(Preamble("stream", 1).encode())[:7])
    return sock


async def wrong_secret(agent: ScriptedAgent) -> socket.socket:
    sock: socket.socket = await agent.connect("stream", secret=b"x" * 32)
    return sock


async def no_secret(agent: ScriptedAgent) -> socket.socket:
    sock: socket.socket = await agent.connect("control", secret=b"")
    await say(sock, pack(Hello(pid=1).encode()))
    return sock


async def wrong_version(agent: ScriptedAgent) -> socket.socket:
    sock: socket.socket = await agent.connect("stream", version=99)
    return sock


async def unknown_kind(agent: ScriptedAgent) -> socket.socket:
    sock: socket.socket = await agent.connect("root-shell")
    return sock


@pytest.mark.parametrize(
    "attack",
    [garbage, oversized, not_a_map, silent, half, wrong_secret, no_secret, wrong_version, unknown_kind],
    ids=lambda attack: attack.__name__,
)
async def test_a_bad_connection_is_closed_and_counted_and_nobody_else_notices(
    sockets: SlotSockets, attack: Any
) -> None:
    async with paired(sockets, limits=LinkLimits(preamble_timeout_s=0.1)) as pair:
        await pair.agent.hello()
        sock = await attack(pair.agent)
        assert await hung_up(sock)
        assert pair.link.violations == 1
        await served(pair)
        assert pair.owner.lost.empty()
        assert len(pair.owner.hellos) == 1


@pytest.mark.parametrize(
    "message",
    [
        Hello(pid=1).encode(),
        {"t": "bound", "id": 99, "ok": True},
        {"t": "status", "agent": "exploded"},
        {"t": "status", "agent": "ready", "what": "x" * 70_000},
        {"t": "status", "agent": 5},
        {"t": "stop"},
        {"t": "built", "id": 1, "ok": True, "bins": {str(n): "x" for n in range(2000)}},
        {"t": "refreshed", "path": "p", "content": b"x" * (MAX_CREDENTIAL_FILE + 1)},
        {"t": "refreshed", "path": "p" * 70_000, "content": b"{}"},
        {"t": "refreshed", "path": "p", "content": "text"},
    ],
    ids=["second hello", "answer to nothing", "state", "long", "type", "ours", "many", "big", "long path", "no bytes"],
)
async def test_a_bad_message_on_control_ends_that_connection(sockets: SlotSockets, message: dict[str, Any]) -> None:
    async with paired(sockets) as pair:
        await pair.agent.hello()
        await pair.link.wait_hello(5)
        assert pair.agent.control is not None
        await say(pair.agent.control, pack(message))
        with pytest.raises(EOFError):
            await pair.agent.receive()
        assert pair.link.violations == 1
        assert pair.owner.statuses.empty()
        await pair.agent.hello()
        await served(pair)


async def test_a_flood_of_refreshed_files_is_counted_dropped_and_in_the_end_loses_the_sandbox(
    sockets: SlotSockets,
) -> None:
    heard: list[Refreshed] = []
    limits = LinkLimits(refreshed_burst=3, refreshed_per_s=0.001, max_violations=5)
    async with paired(sockets, limits=limits, on_refreshed=heard.append) as pair:
        await pair.agent.hello()
        for _ in range(3 + limits.max_violations):
            await pair.agent.send(Refreshed("p", b"{}"))
        await served(pair)
        assert (len(heard), pair.link.violations) == (3, 5)
        await pair.agent.send(Refreshed("p", b"{}"))
        assert "refreshed" in await soon(pair.owner.lost.get())


async def test_a_sandbox_without_credentials_cannot_send_any(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        await pair.agent.hello()
        await pair.agent.send(Refreshed("p", b"{}"))
        await served(pair)
        assert pair.link.violations == 1


async def test_an_answer_of_another_kind_is_a_violation(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        await pair.agent.hello()
        await pair.link.wait_hello(5)
        binding = asyncio.create_task(pair.link.bind({"mcp": []}, {"mcp": "h"}, 1))
        bind = await pair.agent.receive()
        await pair.agent.send(Built(bind.id, True))  # type: ignore[attr-defined]
        with pytest.raises(CortexError):
            await soon(binding)
        assert pair.link.violations == 1


async def test_an_oversized_message_is_refused_before_its_body(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        await pair.agent.hello()
        assert pair.agent.control is not None
        await say(pair.agent.control, (2**20).to_bytes(4, "big"))
        with pytest.raises(EOFError):
            await pair.agent.receive()
        assert pair.link.violations == 1


async def test_the_first_hello_is_accepted_once(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        socks = [await pair.agent.connect("control", secret=b"") for _ in range(2)]
        for sock in socks:
            await say(sock, pack(Hello(pid=1).encode()))
        answers = [await read(sock) for sock in socks]
        assert sorted(bool(answer) for answer in answers) == [False, True]
        assert pair.link.violations == 1
        assert len(pair.owner.hellos) == 1


async def test_a_flood_of_messages_loses_the_sandbox(sockets: SlotSockets) -> None:
    async with paired(sockets, limits=LinkLimits(message_burst=20, messages_per_s=1)) as pair:
        await pair.agent.hello()
        assert pair.agent.control is not None
        with suppress(ConnectionError):
            await say(pair.agent.control, pack(Status(agent="ready").encode()) * 200)
        assert "more messages" in await soon(pair.owner.lost.get())
        assert pair.owner.statuses.qsize() < 25


async def test_a_crowd_of_strangers_is_bounded_and_an_honest_stream_gets_through(sockets: SlotSockets) -> None:
    limits = LinkLimits(max_unauthenticated=4, max_violations=100)
    async with paired(sockets, limits=limits) as pair:
        await pair.agent.hello()
        crowd = [await pair.agent.raw() for _ in range(20)]
        far = await pair.agent.connect("stream")
        near = await soon(pair.link.take_stream(ATTACH))
        assert await read(far)
        near.close()
        assert await hung_up(crowd[0])
        assert pair.link.violations >= 16
        assert len(pair.link._gate._strangers) <= 4


async def test_idle_streams_are_bounded(sockets: SlotSockets) -> None:
    async with paired(sockets, limits=LinkLimits(max_idle_streams=3)) as pair:
        await pair.agent.hello()
        streams = [await pair.agent.connect("stream") for _ in range(5)]
        assert await hung_up(streams[3])
        assert await hung_up(streams[4])
        assert pair.link.violations == 2
        assert len(pair.link._streams) == 3


async def test_a_stream_that_speaks_before_its_attach_is_dropped(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        await pair.agent.hello()
        early = await pair.agent.connect("stream")
        await say(early, b"\x81\x05hello")
        while not pair.link._streams:
            await asyncio.sleep(0)
        taking = asyncio.create_task(pair.link.take_stream(ATTACH))
        assert await hung_up(early)
        await pair.agent.connect("stream")
        (await soon(taking)).close()
        assert pair.link.violations == 1


async def test_too_many_violations_lose_the_sandbox(sockets: SlotSockets) -> None:
    async with paired(sockets, limits=LinkLimits(max_violations=3)) as pair:
        await pair.agent.hello()
        for _ in range(4):
            sock = await garbage(pair.agent)
            await hung_up(sock)
        assert "broke the protocol 4 times" in await soon(pair.owner.lost.get())
        with pytest.raises(CortexError):
            await pair.link.probe()


async def test_another_version_says_so(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        await hung_up(await pair.agent.connect("control", version=99))
        assert "version 99" in await soon(pair.owner.lost.get())


async def test_a_sandbox_that_never_reads_is_cut_off(sockets: SlotSockets) -> None:
    async with paired(sockets, limits=LinkLimits(redial_timeout_s=0.01)) as pair:
        await pair.agent.hello()
        await pair.link.wait_hello(5)
        parts = {"files": [b"x" * 7_000_000]}
        binds = [asyncio.create_task(pair.link.bind(parts, {"files": "h"}, n, timeout=30)) for n in range(4)]
        for bind in binds:
            with pytest.raises(CortexError):
                await soon(bind)
        assert await soon(pair.owner.lost.get())


async def test_dials_are_throttled_and_served_in_the_end(sockets: SlotSockets) -> None:
    async with paired(sockets, limits=LinkLimits(accept_burst=2, accept_per_s=200)) as pair:
        await pair.agent.hello()
        for _ in range(10):
            (await pair.agent.connect("stream")).close()
        await pair.agent.connect("stream")
        (await soon(pair.link.take_stream(ATTACH))).close()
        assert pair.owner.lost.empty()


# -- sockets and bucket ------------------------------------------------------------------------


def test_sockets_replace_what_an_earlier_run_left(sockets: SlotSockets) -> None:
    again = SlotSockets(sockets.slot, gid=os.getegid())
    again.open()
    for name in ("agent", "gateway", "egress"):
        mode = (sockets.slot.sock_dir / name).stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o660
    client = socket.socket(socket.AF_UNIX)
    client.connect(os.fspath(sockets.slot.sock_dir / "gateway"))
    copy = socket.socket(fileno=os.dup(again.fds[0]))
    copy.accept()[0].close()
    copy.close()
    client.close()
    again.close()
    again.close()
    assert list(sockets.slot.sock_dir.iterdir()) == []


def test_a_bucket_gives_its_burst_then_its_rate() -> None:
    bucket = TokenBucket(3, 8)
    assert [bucket.take(100.0) for _ in range(4)] == [True, True, True, False]
    assert bucket.take(100.125)
    assert not bucket.take(100.1875)
    assert bucket.take(99.0) is False
    other = TokenBucket(1, 10)
    assert [round(other.reserve(5.0), 6) for _ in range(3)] == [0, 0.1, 0.2]


async def test_a_connection_whose_place_was_taken_cannot_lose_the_sandbox(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        await pair.agent.hello()
        slow, pair.owner.refuse = asyncio.Event(), CortexError(Code.STORE_ERROR, "slow", hint="-")
        pair.owner.pauses.append(slow)
        control = await pair.agent.connect("control")
        await say(control, pack(Hello(pid=7).encode()))
        while len(pair.owner.hellos) < 2:
            await asyncio.sleep(0.001)
        refuse, pair.owner.refuse = pair.owner.refuse, None
        await pair.agent.hello()
        pair.owner.refuse = refuse
        slow.set()
        assert await hung_up(control)
        assert pair.owner.lost.empty()
        await served(pair)


async def test_of_two_that_dialled_before_the_first_hello_one_is_welcomed(sockets: SlotSockets) -> None:
    async with paired(sockets) as pair:
        first, second = await pair.agent.connect("control"), await pair.agent.connect("control")
        # Both preambles are read, and both were right to have no secret, before either says Hello.
        for _ in range(20):
            await asyncio.sleep(0.001)
        await say(first, pack(Hello(pid=1).encode()))
        assert await read(first)
        await say(second, pack(Hello(pid=2).encode()))
        assert await hung_up(second)
        assert [hello.pid for hello in pair.owner.hellos] == [1]
        assert pair.link.violations == 1
        assert pair.link.connected
