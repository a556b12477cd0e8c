from __future__ import annotations

import asyncio
import os
import shutil
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator

import pytest
import uvloop

from sandbox_agent import boot, forward
from sandbox_agent.forward import Forwarder

Scenario = Callable[[Forwarder, str], Awaitable[None]]
Run = Callable[[Scenario], None]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Runs a scenario with a forwarder to ``gateway`` in a directory with a short name."""
    place = tempfile.mkdtemp(prefix="cx")
    path = os.path.join(place, "gateway")

    async def whole(scenario: Scenario) -> None:
        forwarder = Forwarder(boot.listen(0), path, retry_for_s=0.3)
        await forwarder.start()
        try:
            async with asyncio.timeout(10):
                await scenario(forwarder, path)
        finally:
            await forwarder.close()

    with asyncio.Runner(loop_factory=request.param) as runner:
        yield lambda scenario: runner.run(whole(scenario))
    shutil.rmtree(place)


async def emptied(forwarder: Forwarder) -> None:
    while len(forwarder):
        await asyncio.sleep(0.005)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Echoes; after EOF says ``bye``."""
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()
    writer.write(b"bye")
    writer.close()
    await writer.wait_closed()


def test_bytes_pass_both_ways_and_so_does_a_half_close(run: Run) -> None:
    async def scenario(forwarder: Forwarder, place: str) -> None:
        async with await asyncio.start_unix_server(echo, place):
            reader, writer = await asyncio.open_connection("127.0.0.1", forwarder.port)
            data = os.urandom(3_000_000)
            writer.write(data)
            writer.write_eof()
            assert await asyncio.wait_for(reader.read(-1), 10) == data + b"bye"
            writer.close()
            await writer.wait_closed()
        await emptied(forwarder)

    run(scenario)


def test_while_it_pauses_connections_stay_and_new_ones_wait(run: Run) -> None:
    async def scenario(forwarder: Forwarder, place: str) -> None:
        async with await asyncio.start_unix_server(echo, place):
            reader, writer = await asyncio.open_connection("127.0.0.1", forwarder.port)
            writer.write(b"before")
            assert await asyncio.wait_for(reader.readexactly(6), 5) == b"before"
            forwarder.pause()
            forwarder.pause()
            late_reader, late_writer = await asyncio.open_connection("127.0.0.1", forwarder.port)
            late_writer.write(b"late")
            writer.write(b"after")
            assert await asyncio.wait_for(reader.readexactly(5), 5) == b"after"
            assert len(forwarder) == 1
            await forwarder.start()
            assert await asyncio.wait_for(late_reader.readexactly(4), 5) == b"late"
            for each in (writer, late_writer):
                each.close()
                await each.wait_closed()

    run(scenario)


def test_a_gateway_that_restarts_is_waited_for(run: Run) -> None:
    async def scenario(forwarder: Forwarder, place: str) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", forwarder.port)
        writer.write(b"early")
        await asyncio.sleep(0.1)
        async with await asyncio.start_unix_server(echo, place):
            assert await asyncio.wait_for(reader.readexactly(5), 5) == b"early"
            writer.close()
            await writer.wait_closed()

    run(scenario)


def test_a_gateway_that_is_gone_is_told_as_an_error(run: Run) -> None:
    async def scenario(forwarder: Forwarder, place: str) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", forwarder.port)
        writer.write(b"POST /v1/messages HTTP/1.1\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(-1), 5)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b'"code":"gateway.down"' in answer
        writer.close()
        await writer.wait_closed()

    run(scenario)


def test_too_many_connections_are_refused(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    async def scenario(forwarder: Forwarder, place: str) -> None:
        monkeypatch.setattr(forward, "MAX_CONNECTIONS", 2)
        async with await asyncio.start_unix_server(echo, place):
            pairs = [await asyncio.open_connection("127.0.0.1", forwarder.port) for _ in range(3)]
            assert (await asyncio.wait_for(pairs[2][0].read(-1), 5)).startswith(b"HTTP/1.1 503 ")
            pairs[0][1].write(b"x")
            assert await asyncio.wait_for(pairs[0][0].readexactly(1), 5) == b"x"
            for _, writer in pairs:
                writer.close()
                await writer.wait_closed()

    run(scenario)


def test_a_reader_that_stops_stops_the_writer(run: Run) -> None:
    """What is in flight stays bounded by buffers, whatever the sender has."""

    async def scenario(forwarder: Forwarder, place: str) -> None:
        taken = 0

        async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal taken
            writer.transport.set_write_buffer_limits(high=65_536)
            try:
                for _ in range(1000):
                    writer.write(bytes(65_536))
                    await writer.drain()
                    taken += 65_536
            except (ConnectionError, asyncio.CancelledError):
                return

        async with await asyncio.start_unix_server(pour, place):
            sock = socket.create_connection(("127.0.0.1", forwarder.port))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
            seen = -1
            while seen != taken:
                seen = taken
                await asyncio.sleep(0.2)
            assert 0 < taken < 30_000_000
            sock.close()
            await emptied(forwarder)

    run(scenario)


def test_the_far_end_going_away_closes_the_near_one(run: Run) -> None:
    async def scenario(forwarder: Forwarder, place: str) -> None:
        async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"half an answer")
            writer.close()
            await writer.wait_closed()

        async with await asyncio.start_unix_server(hang_up, place):
            reader, writer = await asyncio.open_connection("127.0.0.1", forwarder.port)
            assert await asyncio.wait_for(reader.read(-1), 5) == b"half an answer"
            writer.close()
            await writer.wait_closed()
        await emptied(forwarder)

    run(scenario)
