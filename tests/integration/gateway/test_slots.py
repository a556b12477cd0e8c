"""Slots claimed, changed, taken back; the gateway killed, the broker killed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from broker.errors import Code, CortexError
from broker.gateway.link import Egress, Provider
from tests.integration.gateway.support import (
    KEY,
    ME,
    Rig,
    SlotSockets,
    app_server,
    ask,
    client,
    echo,
    problem,
    raw_server,
    rig,
)


@pytest.fixture
async def gw() -> AsyncIterator[Rig]:
    async with rig() as made:
        yield made


def openai(port: int, key: str = KEY) -> dict[str, Provider]:
    return {"openai": Provider("openai", f"http://127.0.0.1:{port}", key)}


async def status(path: Path) -> int:
    async with client(path) as http:
        return (await http.get("/openai/x")).status


async def test_unclaimed_is_503_until_claimed_on_the_same_connection(gw: Rig) -> None:
    async with app_server(echo) as port:
        slot = await gw.put(openai(port), identity=None)
        async with client(slot.gateway_path) as http:
            before = await http.get("/openai/x")
            assert before.status == 503
            assert (await before.json())["code"] == "gateway.unclaimed"
            await gw.put(openai(port))
            assert (await http.get("/openai/x")).status == 200


async def test_a_new_credential_holds_from_the_next_request_on(gw: Rig) -> None:
    async with app_server(echo) as port:
        slot = await gw.put(openai(port))
        async with client(slot.gateway_path) as http:
            for key in (KEY, "sk-second"):
                await gw.put(openai(port, key))
                headers = dict((await (await http.get("/openai/x")).json())["headers"])
                assert headers["Authorization"] == f"Bearer {key}"


async def test_a_dropped_slot_gets_503_on_a_kept_connection_and_its_calls_are_cut(gw: Rig) -> None:
    started = asyncio.Event()

    async def slow(request: web.Request) -> web.StreamResponse:
        if request.path == "/slow":
            started.set()
            await asyncio.sleep(30)
        return web.Response()

    async with app_server(slow) as port:
        slot = await gw.put(openai(port))
        reader, writer = await asyncio.open_unix_connection(str(slot.gateway_path))
        request = b"GET /openai/x HTTP/1.1\r\nHost: x\r\n\r\n"
        writer.write(request)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        cut, slow_writer = await asyncio.open_unix_connection(str(slot.gateway_path))
        slow_writer.write(b"GET /openai/slow HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.wait_for(started.wait(), 5)
        await gw.link.drop_slot("a")
        assert await asyncio.wait_for(cut.read(), 5) == b""
        slow_writer.close()
        writer.write(request)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 503")
        writer.close()
        await gw.link.drop_slot("a")


async def status_of(slot: SlotSockets, path: str) -> int:
    async with client(slot.gateway_path) as http:
        return (await http.get(path)).status


async def test_a_new_incarnation_cuts_off_connections_of_the_old(gw: Rig) -> None:
    async with app_server(echo) as port:
        slot = await gw.put(openai(port))
        async with client(slot.gateway_path) as http:
            assert (await http.get("/openai/x")).status == 200
            await gw.put(openai(port), incarnation=2)
            assert (await http.get("/openai/x")).status == 503
        assert await status(slot.gateway_path) == 200
        with pytest.raises(CortexError) as caught:
            await gw.put(openai(port), incarnation=1)
        assert caught.value.code is Code.BAD_CONFIG
        assert await status(slot.gateway_path) == 200


async def test_one_slot_does_not_see_the_other(gw: Rig) -> None:
    async with app_server(echo) as port:
        one = await gw.put(openai(port), slot="a")
        two = await gw.put({}, slot="b")
        assert await status(one.gateway_path) == 200
        assert await status(two.gateway_path) == 404


@pytest.mark.parametrize(
    "provider",
    [
        Provider("openai", "http://user:pass@host", KEY),
        Provider("openai", "ftp://host", KEY),
        Provider("openai", "http://host/?q", KEY),
        Provider("openai", "http://host", "sk\r\nx: y"),
        Provider("nobody", "http://host", KEY),  # type: ignore[arg-type]
    ],
)
async def test_a_provider_that_cannot_be_is_refused_and_the_old_one_stands(gw: Rig, provider: Provider) -> None:
    async with app_server(echo) as port:
        slot = await gw.put(openai(port))
        with pytest.raises(CortexError) as caught:
            await gw.put({"openai": provider})
        assert caught.value.code is Code.BAD_CONFIG
        assert "sk" not in str(caught.value)
        assert await status(slot.gateway_path) == 200


async def test_too_many_connections_are_told_so() -> None:
    async with rig(max_connections_per_sandbox=3) as gw, app_server(echo) as port:
        slot = await gw.put(openai(port))
        open_ones = [await asyncio.open_unix_connection(str(slot.gateway_path)) for _ in range(3)]
        for _, writer in open_ones:
            writer.write(b"GET /openai/x HTTP/1.1\r\nHost: x\r\n\r\n")
        for reader, _ in open_ones:
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        code, got = problem(await ask(slot.gateway_path, b""))
        assert (code, got["code"]) == (429, "gateway.too_many_connections")
        for _, writer in open_ones:
            writer.close()


async def test_a_silent_connection_is_closed() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(-1)

    async with rig(idle_timeout_s=1) as gw, raw_server(silent) as port:
        slot = await gw.put(openai(port))
        assert await ask(slot.gateway_path, b"") == b""
        async with client(slot.gateway_path) as http:
            answer = await http.get("/openai/x")
            assert (answer.status, (await answer.json())["code"]) == (504, "gateway.upstream_timeout")


async def test_a_killed_gateway_comes_back_with_what_it_knew(gw: Rig) -> None:
    async with app_server(echo) as port:
        slot = await gw.put(openai(port))
        pid = gw.link.peer_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        # Connects at once: the broker holds the listener, so the request waits for the next gateway.
        assert await asyncio.wait_for(status(slot.gateway_path), 10) == 200
        assert gw.link.peer_pid != pid
        assert gw.child.restarts == 1
        await gw.put(openai(port, "sk-new"))


async def test_drop_while_no_gateway_lives_does_not_wait(gw: Rig) -> None:
    await gw.put()
    assert gw.link.peer_pid is not None
    os.kill(gw.link.peer_pid, signal.SIGKILL)
    await gw.link.drop_slot("a")
    await gw.link.wait_connected(10)
    assert gw.link.health()["slots"] == 0


async def test_a_hanging_gateway_is_an_error_in_time(gw: Rig) -> None:
    assert gw.link.peer_pid is not None
    os.kill(gw.link.peer_pid, signal.SIGSTOP)
    try:
        with pytest.raises(CortexError) as caught:
            await gw.put()
        assert caught.value.code is Code.GATEWAY_DOWN
    finally:
        os.kill(gw.link.peer_pid, signal.SIGCONT)


async def test_streams_outlive_the_broker_and_the_next_one_takes_over(gw: Rig) -> None:
    step = asyncio.Event()

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(3):
            await response.write(b"x")
            await step.wait()
            step.clear()
        return response

    async with app_server(stream) as port:
        slot = await gw.put(openai(port))
        await gw.put(openai(port), slot="gone")
        pid = gw.link.peer_pid
        async with client(slot.gateway_path) as http:
            answer = await http.get("/openai/x")
            assert await answer.content.readexactly(1) == b"x"
            await gw.lose_broker()
            step.set()
            assert await asyncio.wait_for(answer.content.readexactly(1), 5) == b"x"
            await gw.new_broker()
            assert gw.link.peer_pid == pid
            slot = await gw.put(openai(port))
            await gw.link.table_complete()
            assert slot.gateway_path.exists()
            step.set()
            assert await asyncio.wait_for(answer.content.readexactly(1), 5) == b"x"
            step.set()
            assert await answer.read() == b""
            # The same connection and the new listener both serve on.
            again = await http.get("/openai/x")
            assert again.status == 200
            assert await again.content.readexactly(1) == b"x"
        async with client(slot.gateway_path) as http:
            assert (await http.get("/openai/x")).status == 200
        assert gw.child.restarts == 0


async def test_a_gateway_that_knows_too_much_forgets_once_the_table_is_whole(gw: Rig) -> None:
    async with app_server(echo) as port:
        slot = await gw.put(openai(port))
        async with client(slot.gateway_path) as http:
            assert (await http.get("/openai/x")).status == 200
            await gw.lose_broker()
            gw.slots.clear()
            await gw.new_broker()
            assert (await http.get("/openai/x")).status == 200
            await gw.link.table_complete()
            await gw.put(slot="b")
            assert (await http.get("/openai/x")).status == 503


async def test_two_brokers_side_by_side_do_not_share_a_gateway() -> None:
    async with rig() as one, rig() as two:
        assert one.link.peer_pid != two.link.peer_pid


async def test_stop_lets_a_running_call_end_first() -> None:
    started = asyncio.Event()
    go_on = asyncio.Event()

    async def slow(request: web.Request) -> web.StreamResponse:
        started.set()
        await go_on.wait()
        return web.Response(text="done")

    async with rig() as gw, app_server(slow) as port:
        slot = await gw.put(openai(port))
        running = asyncio.ensure_future(status_of(slot, "/openai/x"))
        await asyncio.wait_for(started.wait(), 5)
        stopping = asyncio.ensure_future(gw.child.stop(5.0))
        go_on.set()
        assert await asyncio.wait_for(running, 5) == 200
        await asyncio.wait_for(stopping, 5)


async def test_settings_change_while_running(gw: Rig) -> None:
    slot = await gw.put(openai(1))
    gw.config = gw.config.model_copy(update={"max_head_bytes": 200})
    await gw.link.settings_changed()
    await gw.put(openai(1))
    raw = b"GET /openai/x HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 200 + b"\r\n\r\n"
    assert problem(await ask(slot.gateway_path, raw))[0] == 431


async def test_more_than_a_packet_holds_is_refused(gw: Rig) -> None:
    with pytest.raises(CortexError) as caught:
        await gw.put({"x": Provider("openai", "https://h", KEY, ca="x" * 300_000)})
    assert caught.value.code is Code.BAD_CONFIG


async def test_many_slots_are_told_again(gw: Rig) -> None:
    async with app_server(echo) as port:
        providers = {f"p{n}": Provider("openai", f"http://127.0.0.1:{port}", KEY, ca="x" * 1000) for n in range(5)}
        for number in range(100):
            await gw.put(providers, Egress(("shop.example",)), slot=f"s{number}", identity=ME)
        assert gw.link.peer_pid is not None
        os.kill(gw.link.peer_pid, signal.SIGKILL)
        async with client(gw.slots["s99"].gateway_path) as http:
            assert (await http.get("/p4/x")).status == 200
