"""Clients and streams tied together, over real sockets."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from pathlib import Path

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from broker.front.frames import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, close_payload, frame
from broker.metrics import CLOSED, CONNECTIONS, FIRST_FRAME, RELAY_FRAMES
from tests.integration.front.fakes import Raw, attached, house, masked, raw, read_frame, request, settle

BEARER = {"Authorization": "Bearer good"}


# The way of a message.


async def test_a_foreign_client_talks_to_an_agent() -> None:
    async with house() as here, connect(here.url, additional_headers=BEARER, subprotocols=["acp.v1"]) as client:  # type: ignore[list-item]
        stream = await here.session.stream()
        assert client.subprotocol == "acp.v1"
        assert client.response is not None
        assert client.response.headers["Cortex-Session"] == "s-1"
        assert client.response.headers["Acp-Connection-Id"] == stream.attach.connection
        assert "Sec-WebSocket-Extensions" not in client.response.headers
        assert (stream.attach.protocol, stream.attach.cortex) == ("acp", False)
        for text in ("hello", "", "ä" * 40, "x" * 70_000):
            await client.send(text)
            assert (await stream.message()).decode() == text
            stream.text(text.encode())
            assert await asyncio.wait_for(client.recv(), 5) == text
        stream.close()


async def test_frames_pass_as_they_came() -> None:
    up = masked(b"one") + masked(b"be", fin=False) + masked(b"gin", CONTINUATION) + masked(b"\0" * 70_000, BINARY)
    down = frame(TEXT, b"x" * 300) + b"\x01\x02ab" + b"\x80\x01c" + frame(BINARY, b"\xff" * 66_000)
    async with house() as here, attached(here) as (client, stream):
        client.send(up)
        stream.send(down)
        assert await stream.read(len(up)) == up
        assert await asyncio.wait_for(client.reader.readexactly(len(down)), 5) == down


async def test_any_cut_of_the_bytes_gives_the_same_bytes() -> None:
    rng = random.Random(7)
    part = b"".join(masked(rng.randbytes(rng.choice([0, 3, 125, 126, 900]))) for _ in range(60))
    back = b"".join(frame(TEXT, b"y" * rng.choice([0, 3, 125, 126, 900])) for _ in range(60))
    async with house() as here, attached(here) as (client, stream):
        for cut in (1, 2, 3, 7, 64):
            for index in range(0, len(part), cut * 50):
                for start in range(index, min(index + cut * 50, len(part)), cut):
                    client.send(part[start : min(start + cut, index + cut * 50)])
                await client.writer.drain()
            for start in range(0, len(back), cut * 40):
                stream.send(back[start : start + cut * 40])
                await stream.drain()
            assert await stream.read(len(part)) == part
            assert await asyncio.wait_for(client.reader.readexactly(len(back)), 5) == back


async def test_pings_end_at_the_broker() -> None:
    async with house() as here, attached(here) as (client, stream):
        client.send(masked(b"are you there", PING) + masked(b"text") + masked(b"", PONG))
        assert await client.frame() == (PONG, b"are you there")
        assert await stream.message() == b"text"
        stream.send(frame(PING, b"agent") + frame(PONG, b"") + frame(TEXT, b"back"))
        assert await client.frame() == (TEXT, b"back")
        assert await read_frame(stream.reader) == (PONG, True, b"")


async def test_a_pong_waits_for_the_end_of_a_frame() -> None:
    async with house() as here, attached(here) as (client, stream):
        whole = frame(TEXT, b"z" * 100)
        stream.send(whole[:50])
        assert await asyncio.wait_for(client.reader.readexactly(50), 5) == whole[:50]
        client.send(masked(b"p", PING))
        client.send(masked(b"seen"))
        assert await stream.message() == b"seen"
        stream.send(whole[50:] + frame(TEXT, b"next"))
        assert await asyncio.wait_for(client.reader.readexactly(52), 5) == whole[50:]
        assert await client.frame() == (PONG, b"p")
        assert await client.frame() == (TEXT, b"next")


async def test_figures_are_kept() -> None:
    def figures() -> tuple[float, float, float]:
        up, down = (RELAY_FRAMES.labels(way)._value.get() for way in ("to_agent", "to_client"))
        return up, down, FIRST_FRAME.labels("demo")._sum.get()

    before, open_before = figures(), CONNECTIONS._value.get()
    async with house() as here:
        async with attached(here) as (client, stream):
            assert CONNECTIONS._value.get() == open_before + 1
            client.send(masked(b"a") + masked(b"b") + masked(b"", PING))
            await stream.read(len(masked(b"a")) * 2)
            stream.text(b"c")
            assert await client.frame() == (PONG, b"")
            assert await client.frame() == (TEXT, b"c")
        await settle(lambda: not len(here.door))
    after = figures()
    assert (after[0] - before[0], after[1] - before[1]) == (2, 1)
    assert after[2] > before[2]
    assert CONNECTIONS._value.get() == open_before


async def test_raw_agents_have_their_own_path() -> None:
    async with house() as here, raw(here, request("/raw", token="raw")) as client:
        assert (await client.head()).startswith(b"HTTP/1.1 101 ")
        stream = await here.sessions["rob"].stream()
        assert stream.attach.protocol == "raw"
        stream.close()


async def test_unix_sockets_and_adopted_ones_are_served_alike(tmp_path: Path) -> None:
    async with house() as here:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "front.sock"))
        await here.door.start([listener])
        ours, theirs = socket.socketpair()
        await here.door.adopt(ours)
        for opened in (
            await asyncio.open_unix_connection(str(tmp_path / "front.sock")),
            await asyncio.open_unix_connection(sock=theirs),
        ):
            client = Raw(*opened)
            client.send(request())
            assert (await client.head()).startswith(b"HTTP/1.1 101 ")
            stream = await here.session.stream()
            stream.text(b"hello")
            assert await client.frame() == (TEXT, b"hello")
            client.writer.close()
            stream.close()


# Bad frames.


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(TEXT, b"unmasked"), 1002),
        (masked(b"x", rsv=4), 1002),
        (masked(b"x", 3), 1002),
        (masked(b"x", PING, fin=False), 1002),
        (masked(b"x" * 126, PING), 1002),
        (masked(b"x", CONTINUATION), 1002),
        (masked(b"x", fin=False) + masked(b"x"), 1002),
        (masked(b"x" * 1001), 1009),
        (masked(b"x" * 800, fin=False) + masked(b"x" * 800, CONTINUATION), 1009),
        (bytes((0x81, 0xFF)) + struct.pack("!Q", 2**40) + b"1234", 1009),
        (masked(b"\x03", CLOSE), 1002),
        (masked(struct.pack("!H", 1005), CLOSE), 1002),
    ],
)
@pytest.mark.parametrize("ready", [True, False])
async def test_a_bad_frame_closes_with_its_code(data: bytes, code: int, ready: bool) -> None:
    async with house(max_message_bytes=1000) as here, raw(here) as client:
        if not ready:
            here.session.ready.clear()
        await client.head()
        stream = await here.session.stream() if ready else None
        client.send(masked(b"good"))
        assert stream is None or await stream.message() == b"good"
        client.send(masked(b"last") + data + b"\xff" * 5000)
        got, reason = await client.closed()
        assert got == code
        assert reason.startswith("frame.")
        assert await client.eof() == b""
        if stream is not None:
            sent = await stream.eof()
            assert sent.startswith(masked(b"last"))
            assert data not in sent
            stream.close()
        client.writer.close()
        await settle(lambda: not here.session.clients)


async def test_a_bad_frame_of_the_agent_closes_its_client_only() -> None:
    async with house() as here, attached(here) as (client, stream), attached(here) as (other, calm):
        stream.send(frame(TEXT, b"good") + masked(b"a server never masks"))
        assert await client.frame() == (TEXT, b"good")
        code, reason = await client.closed()
        assert code == 1011
        assert reason.startswith("sandbox.protocol_violation")
        calm.text(b"still here")
        assert await other.frame() == (TEXT, b"still here")


async def test_a_message_of_the_agent_over_the_limit_is_not_passed_on() -> None:
    async with house(max_message_bytes=1000) as here, attached(here) as (client, stream):
        stream.send(frame(TEXT, b"x" * 2000))
        assert (await client.closed())[0] == 1011


# Endings.


async def test_an_agent_closes_its_client_with_code_and_reason() -> None:
    async with house() as here, connect(here.url, additional_headers=BEARER) as client:
        stream = await here.session.stream()
        stream.send(frame(TEXT, b"last") + frame(CLOSE, close_payload(4408, "slow")))
        stream.close()
        assert await asyncio.wait_for(client.recv(), 5) == "last"
        with pytest.raises(ConnectionClosed) as caught:
            await asyncio.wait_for(client.recv(), 5)
        assert caught.value.rcvd is not None
        assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (4408, "slow")


async def test_a_stream_that_ends_without_a_close_is_an_agent_that_failed() -> None:
    async with house() as here, attached(here) as (client, stream):
        stream.close()
        code, reason = await client.closed()
        assert code == 1011
        assert reason.startswith("sandbox.died")


async def test_a_stream_that_ends_within_a_frame_ends_the_connection() -> None:
    async with house() as here, attached(here) as (client, stream):
        stream.send(frame(TEXT, b"12345")[:4])
        stream.close()
        assert await client.eof() == frame(TEXT, b"12345")[:4]


async def test_a_client_that_closes_gets_its_code_back_and_the_stream_ends() -> None:
    async with house() as here, attached(here) as (client, stream):
        before = CLOSED.labels("1001")._value.get()
        client.send(masked(b"last words") + masked(close_payload(1001, "bye"), CLOSE))
        assert await stream.eof() == masked(b"last words")
        assert await client.closed() == (1001, "")
        assert await client.eof() == b""
        await settle(lambda: here.session.detached == 1)
        assert CLOSED.labels("1001")._value.get() == before + 1


async def test_a_client_that_vanishes_is_counted_out() -> None:
    async with house() as here:
        async with attached(here) as (client, stream):
            client.writer.transport.abort()
            assert await stream.eof() == b""
        await settle(lambda: here.session.detached == 1 and not len(here.door))


async def test_codes_that_peers_make_up_share_one_label() -> None:
    async with house() as here, attached(here) as (client, stream):
        before = CLOSED.labels("other")._value.get()
        stream.send(frame(CLOSE, close_payload(4999, "")))
        assert (await client.closed())[0] == 4999
        client.send(masked(close_payload(4999, ""), CLOSE))
        await client.eof()
        await settle(lambda: CLOSED.labels("other")._value.get() == before + 1)


async def test_closing_the_door_says_1012_to_everybody() -> None:
    async with house() as here, connect(here.url, additional_headers=BEARER) as one, attached(here) as (two, _):
        closing = asyncio.get_running_loop().create_task(here.door.close(timeout=3))
        with pytest.raises(ConnectionClosed) as caught:
            await asyncio.wait_for(one.recv(), 5)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1012
        code, reason = await two.closed()
        assert code == 1012
        assert reason.startswith("broker.restarting")
        two.writer.close()
        await closing
        assert len(here.door) == 0


async def test_a_client_that_does_not_answer_a_close_is_cut_off() -> None:
    async with house() as here, attached(here) as (client, _):
        await here.door.close(timeout=0.2)
        assert len(here.door) == 0
        assert (await client.closed())[0] == 1012


async def test_a_revoked_client_is_gone_within_a_second_even_in_the_middle_of_a_frame() -> None:
    async with house() as here, attached(here) as (client, stream):
        stream.send(frame(TEXT, b"12345")[:4])
        await client.reader.readexactly(4)
        started = asyncio.get_running_loop().time()
        here.session.clients[0].close(4401, "token.revoked")
        assert await client.eof() == b""
        assert asyncio.get_running_loop().time() - started < 1.0


async def test_after_a_close_nothing_of_the_client_reaches_the_agent() -> None:
    async with house() as here, attached(here) as (client, stream):
        here.session.clients[0].close(4401, "token.revoked")
        assert (await client.closed())[0] == 4401
        client.send(masked(b"too late") + masked(close_payload(4401, ""), CLOSE))
        assert await stream.eof() == b""
        assert await client.eof() == b""
