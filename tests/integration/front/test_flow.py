"""Clients that are held, pushed back, pinged or cut off, over real sockets."""

from __future__ import annotations

import asyncio

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from broker.errors import Code, CortexError
from broker.front.frames import CLOSE, PING, PONG, TEXT, close_payload, frame
from broker.metrics import CLOSED
from tests.integration.front.fakes import Session, attached, house, masked, raw, request, settle

BEARER = {"Authorization": "Bearer good"}


# Before the sandbox is ready.


async def test_an_early_client_is_accepted_and_held() -> None:
    async with house() as here:
        here.session.ready.clear()
        async with raw(here, request() + masked(b"with the request")) as client:
            await client.head()
            client.send(masked(b"first") + masked(b"ping", PING))
            assert await client.frame() == (PONG, b"ping")
            here.session.ready.set()
            stream = await here.session.stream()
            assert [await stream.message(), await stream.message()] == [b"with the request", b"first"]
            stream.close()


async def test_only_cortex_clients_are_told_how_it_goes() -> None:
    async with house() as here:
        here.session.ready.clear()
        async with (
            connect(here.url, additional_headers=BEARER, subprotocols=["cortex.acp.v1"]) as cortex,  # type: ignore[list-item]
            connect(here.url, additional_headers=BEARER) as plain,
        ):
            first = await asyncio.wait_for(cortex.recv(), 5)
            assert '"_cortex/status"' in str(first)
            assert '"starting"' in str(first)
            await settle(lambda: len(here.session.clients) == 2)
            for client in here.session.clients:
                client.notify(b'{"from": "session"}')
            assert await asyncio.wait_for(cortex.recv(), 5) == '{"from": "session"}'
            here.session.ready.set()
            streams = [await here.session.stream(), await here.session.stream()]
            assert sorted(stream.attach.cortex for stream in streams) == [False, True]
            for stream in streams:
                stream.text(b"agent")
            assert await asyncio.wait_for(plain.recv(), 5) == "agent"
            for stream in streams:
                stream.close()


async def test_what_is_held_is_bounded() -> None:
    async with house(hold_bytes=100_000) as here:
        here.session.ready.clear()
        async with raw(here) as client:
            await client.head()
            message = masked(b"x" * 65_000)
            for _ in range(400):
                client.send(message)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.writer.drain(), 0.3)
            here.session.ready.set()
            stream = await here.session.stream()
            assert await stream.read(len(message) * 400) == message * 400
            stream.close()


async def test_a_bringup_that_fails_closes_with_code_and_hint() -> None:
    async with house() as here:
        here.session.ready.clear()
        here.session.error = CortexError(Code.IMAGE_MISSING, "no image", hint="make image")
        async with connect(here.url, additional_headers=BEARER, subprotocols=["cortex.acp.v1"]) as client:  # type: ignore[list-item]
            await asyncio.wait_for(client.recv(), 5)
            here.session.ready.set()
            assert '"sandbox.image_missing"' in str(await asyncio.wait_for(client.recv(), 5))
            with pytest.raises(ConnectionClosed) as caught:
                await asyncio.wait_for(client.recv(), 5)
            assert caught.value.rcvd is not None
            assert caught.value.rcvd.code == 1011
            assert caught.value.rcvd.reason == "sandbox.image_missing: make image"


async def test_a_bug_in_the_bringup_is_not_a_hang() -> None:
    async with house() as here:
        here.session.error = ZeroDivisionError()
        async with raw(here) as client:
            await client.head()
            code, reason = await client.closed()
            assert (code, reason.partition(":")[0]) == (1011, "broker.internal")


async def test_a_client_that_leaves_while_held_is_forgotten() -> None:
    async with house() as here:
        here.session.ready.clear()
        async with raw(here) as client:
            await client.head()
            client.send(masked(b"never mind"))
        await settle(lambda: not here.session.clients and not len(here.tasks) and not len(here.door))


# Hold, release, notify.


async def test_a_hold_takes_effect_at_a_frame_boundary_and_loses_nothing() -> None:
    async with house() as here, attached(here) as (client, stream):
        whole, later = masked(b"a" * 1000), masked(b"later")
        client.send(masked(b"start"))
        assert await stream.message() == b"start"
        client.send(whole[:500])
        assert await stream.read(500) == whole[:500]
        relay = here.session.clients[0]
        relay.hold()
        client.send(whole[500:] + later + masked(b"p", PING))
        assert await stream.read(508) == whole[500:]
        assert await client.frame() == (PONG, b"p")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stream.reader.read(1), 0.05)
        stream.text(b"the other way flows")
        assert await client.frame() == (TEXT, b"the other way flows")
        relay.release()
        assert await stream.message() == b"later"
        client.send(masked(b"on"))
        assert await stream.message() == b"on"


async def test_a_hold_between_frames_is_at_once() -> None:
    async with house() as here, attached(here) as (client, stream):
        client.send(masked(b"one"))
        assert await stream.message() == b"one"
        relay = here.session.clients[0]
        relay.hold()
        client.send(masked(b"two") + masked(b"three")[:5])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stream.reader.read(1), 0.05)
        relay.release()
        client.send(masked(b"three")[5:])
        assert [await stream.message(), await stream.message()] == [b"two", b"three"]


async def test_a_client_that_is_held_is_heard_of_once_it_has_something_to_say() -> None:
    async with house() as here, attached(here) as (client, stream):
        client.send(masked(b"one"))
        assert await stream.message() == b"one"
        heard: list[str] = []
        relay = here.session.clients[0]
        relay.hold(lambda: heard.append("spoke"))
        client.send(masked(b"p", PING) + masked(b"", PONG))
        assert await client.frame() == (PONG, b"p")
        assert heard == []
        client.send(masked(b"two"))
        client.send(masked(b"three"))
        client.send(masked(b"q", PING))
        assert await client.frame() == (PONG, b"q")
        assert heard == ["spoke"]
        relay.release()
        assert [await stream.message(), await stream.message()] == [b"two", b"three"]
        client.send(masked(b"four"))
        assert await stream.message() == b"four"
        assert heard == ["spoke"]


async def test_the_rest_of_a_frame_is_something_to_say() -> None:
    async with house() as here, attached(here) as (client, stream):
        whole = masked(b"a" * 1000)
        client.send(whole[:500])
        assert await stream.read(500) == whole[:500]
        heard: list[str] = []
        here.session.clients[0].hold(lambda: heard.append("spoke"))
        client.send(whole[500:])
        assert await stream.read(508) == whole[500:]
        assert heard == ["spoke"]


async def test_what_was_said_before_a_hold_and_not_passed_on_is_heard_of_at_once() -> None:
    async with house() as here:
        here.session.ready.clear()
        async with raw(here) as client:
            await client.head()
            client.send(masked(b"early") + masked(b"p", PING))
            assert await client.frame() == (PONG, b"p")
            heard: list[str] = []
            relay = here.session.clients[0]
            relay.hold(lambda: heard.append("spoke"))
            assert heard == ["spoke"]
            here.session.ready.set()
            stream = await here.session.stream()
            relay.release()
            assert await stream.message() == b"early"
            stream.close()


async def test_pings_do_not_count_as_speech() -> None:
    async with house() as here, attached(here) as (client, stream):
        relay = here.session.clients[0]
        client.send(masked(b"one"))
        assert await stream.message() == b"one"
        spoke = relay.spoke_at
        client.send(masked(b"p", PING))
        assert await client.frame() == (PONG, b"p")
        stream.text(b"the agent speaks")
        assert await client.frame() == (TEXT, b"the agent speaks")
        assert relay.spoke_at == spoke
        client.send(masked(b"two"))
        assert await stream.message() == b"two"
        assert relay.spoke_at > spoke


async def test_what_a_leaving_client_said_during_a_hold_still_arrives() -> None:
    async with house() as here, attached(here) as (client, stream):
        here.session.clients[0].hold()
        client.send(masked(b"remember this") + masked(close_payload(1000, ""), CLOSE))
        assert await stream.eof() == masked(b"remember this")


async def test_a_notice_never_splits_a_message() -> None:
    async with house() as here, attached(here, protocols="cortex.acp.v1") as (client, stream):
        relay = here.session.clients[0]
        stream.send(b"\x01\x04abcd" + b"\x00\x03e")
        assert await asyncio.wait_for(client.reader.readexactly(9), 5) == b"\x01\x04abcd\x00\x03e"
        relay.notify(b"{}")
        stream.send(b"fg" + b"\x80\x01h" + frame(TEXT, b"next"))
        assert await asyncio.wait_for(client.reader.readexactly(5), 5) == b"fg\x80\x01h"
        assert await client.frame() == (TEXT, b"{}")
        assert await client.frame() == (TEXT, b"next")


# Peers that do not take what is sent.


async def test_backpressure_reaches_the_agent_and_nothing_is_lost() -> None:
    async with house(write_high_bytes=65_536) as here, attached(here) as (client, stream):
        message, count = frame(TEXT, b"x" * 60_000), 600
        client.reader._transport.pause_reading()  # type: ignore[attr-defined]
        for _ in range(count):
            stream.send(message)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stream.writer.drain(), 0.3)
        client.reader._transport.resume_reading()  # type: ignore[attr-defined]
        assert await asyncio.wait_for(client.reader.readexactly(len(message) * count), 20) == message * count


async def test_backpressure_reaches_the_client_and_nothing_is_lost() -> None:
    async with house(write_high_bytes=65_536) as here, attached(here) as (client, stream):
        message, count = masked(b"x" * 60_000), 600
        for _ in range(count):
            client.send(message)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.writer.drain(), 0.3)
        assert await asyncio.wait_for(stream.reader.readexactly(len(message) * count), 20) == message * count


async def test_a_client_that_takes_nothing_is_cut_off_and_others_do_not_notice() -> None:
    before = CLOSED.labels("4408")._value.get()
    async with (
        house(stall_timeout_s=0.3, write_high_bytes=65_536) as here,
        attached(here) as (client, stream),
        attached(here) as (other, calm),
    ):
        client.reader._transport.pause_reading()  # type: ignore[attr-defined]
        for _ in range(400):
            stream.send(frame(TEXT, b"x" * 60_000))
        await settle(lambda: len(here.session.clients) == 1)
        calm.text(b"fine")
        assert await other.frame() == (TEXT, b"fine")
        assert CLOSED.labels("4408")._value.get() == before + 1
        client.reader._transport.resume_reading()  # type: ignore[attr-defined]


async def test_an_agent_server_that_takes_nothing_is_cut_off() -> None:
    async with house(stall_timeout_s=0.3, write_high_bytes=65_536) as here, attached(here) as (client, stream):
        stream.reader._transport.pause_reading()  # type: ignore[attr-defined]
        for _ in range(100):
            client.send(masked(b"x" * 60_000))
        code, reason = await client.closed()
        assert (code, reason.partition(":")[0]) == (1011, "sandbox.died")


async def test_pings_from_a_client_that_reads_no_pongs_do_not_pile_up() -> None:
    async with house(write_high_bytes=65_536) as here, attached(here) as (client, stream):
        client.reader._transport.pause_reading()  # type: ignore[attr-defined]
        for _ in range(400):
            stream.send(frame(TEXT, b"x" * 60_000))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stream.writer.drain(), 0.3)
        for number in range(2000):
            client.send(masked(b"%d" % number + b"." * 100, PING))
        client.send(masked(b"done"))
        assert await stream.message() == b"done"
        client.reader._transport.resume_reading()  # type: ignore[attr-defined]
        seen = [await client.frame() for _ in range(401)]
        assert [payload for opcode, payload in seen if opcode == PONG] == [b"1999" + b"." * 100]


async def test_a_silent_client_is_pinged_and_then_closed() -> None:
    async with house(ping_interval_s=0.2, ping_timeout_s=0.2) as here, attached(here) as (client, _):
        assert await client.frame() == (PING, b"")
        assert (await client.closed())[0] == 4408


async def test_a_client_that_answers_pings_stays() -> None:
    async with (
        house(ping_interval_s=0.1, ping_timeout_s=0.1) as here,
        connect(here.url, additional_headers=BEARER) as client,
    ):
        stream = await here.session.stream()
        await asyncio.sleep(0.8)
        stream.text(b"still here")
        assert await asyncio.wait_for(client.recv(), 5) == "still here"
        stream.close()


async def test_a_loaded_session_is_only_asked_for_when_not_in_memory() -> None:
    async with house() as here:
        here.sessions["rob"] = Session("websocket")
        async with attached(here):
            assert here.door._registry.loads == 0  # type: ignore[attr-defined]
        async with raw(here, request("/raw", token="raw")) as client:
            await client.head()
            (await here.sessions["rob"].stream()).close()
        assert here.door._registry.loads == 1  # type: ignore[attr-defined]
