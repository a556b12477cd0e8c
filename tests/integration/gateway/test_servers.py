"""Several servers of one provider, some of them unwell: probes, balance, and models that Ollama is to keep."""

from __future__ import annotations

import asyncio
import datetime
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from aiohttp import web

from broker.errors import CortexError
from broker.gateway import preload
from broker.gateway.balance import Balance
from broker.gateway.context import Context
from broker.gateway.fetch import fetch
from broker.gateway.preload import Preload
from broker.gateway.probes import Probes
from broker.gateway.routes import Origin
from broker.host.tasks import TaskOwner

REST = 0.2


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.002)


class Server:
    """One that can be stopped and come back on its port. ``mood``: "ok", "error" (500), "reset", "hang"."""

    def __init__(self) -> None:
        self.port = 0
        self.mood = "ok"
        self.calls = 0
        self.heads: list[bytes] = []
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def origin(self) -> Origin:
        return Origin("http", "127.0.0.1", self.port, "", True)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.partition(b"ontent-length: ")[2].partition(b"\r\n")[0] or 0))
                self.heads.append(head)
                self.calls += b" /call " in head
                if self.mood == "reset":
                    writer.transport.abort()
                elif self.mood != "hang":
                    status = b"500 No" if self.mood == "error" else b"200 OK"
                    writer.write(b"HTTP/1.1 %s\r\ncontent-length: 2\r\n\r\nok" % status)
        self._writers.discard(writer)
        writer.close()


class World:
    """Three servers, a balance and a pool; ``call`` is what a call does: the next server where one fails."""

    def __init__(self) -> None:
        self.context = Context(TaskOwner("test"))
        self.pool = self.context.pool
        self.servers = [Server() for _ in range(3)]
        self.balance = Balance(3, 2, REST)

    async def call(self) -> int | None:
        """The server that answered."""
        loop = asyncio.get_running_loop()
        failed: set[int] = set()
        while (index := self.balance.pick(loop.time(), failed)) is not None:
            ticket, start = self.balance.begun(index, loop.time()), loop.time()
            try:
                origin = self.servers[index].origin
                answer = await fetch(
                    self.pool, origin, b"POST", b"/call", b"host: h\r\n", b"x", timeout_s=0.3, max_bytes=100
                )
                good = answer.status < 500
            except CortexError:
                good = False
            now = loop.time()
            self.balance.ended(index, now, "ok" if good else "failed", now - start, ticket)
            if good:
                return index
            failed.add(index)
        return None

    def states(self) -> list[str]:
        return [each["state"] for each in self.balance.view(asyncio.get_running_loop().time())]


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    for server in made.servers:
        await server.start()
    yield made
    await made.context.close()
    await made.context.tasks.close()
    for server in made.servers:
        server.stop()


@asynccontextmanager
async def probes(world: World, interval_s: float = 0.02) -> AsyncIterator[None]:
    spots = [(server.origin, b"/base") for server in world.servers]
    made = Probes(
        world.balance, spots, "/health", interval_s, world.pool, world.context.tasks, b"authorization: Bearer k\r\n"
    )
    made.start()
    yield
    made.close()
    await until(lambda: len(world.context.tasks) == 0)


@pytest.mark.parametrize("fault", ["dead", "reset", "error", "hang"])
async def test_no_call_fails_while_one_of_three_is_unwell_and_it_is_used_again(world: World, fault: str) -> None:
    sick = world.servers[1]
    if fault == "dead":
        sick.stop()
    sick.mood = fault
    answered = [await world.call() for _ in range(6)]
    answered += await asyncio.gather(*(world.call() for _ in range(30)))
    assert set(answered) == {0, 2}
    assert world.states()[1] != "closed"
    tried = sick.calls
    assert await world.call() in (0, 2)
    assert sick.calls <= tried + 1
    sick.mood = "ok"
    if fault == "dead":
        await sick.start()
    async with asyncio.timeout(10):
        while await world.call() != 1:
            await asyncio.sleep(0)
    assert world.states() == ["closed"] * 3
    assert all(each["running"] == 0 for each in world.balance.view(0))


async def test_all_of_them_down_and_back(world: World) -> None:
    for server in world.servers:
        server.mood = "reset"
    for _ in range(2):
        assert await world.call() is None
    now = asyncio.get_running_loop().time()
    assert world.balance.pick(now) is None
    again = world.balance.retry_at(now)
    assert again is not None
    assert now < again <= now + REST
    for server in world.servers:
        server.mood = "ok"
    async with asyncio.timeout(10):
        while await world.call() is None:
            await asyncio.sleep(0)


async def test_probes_tell_of_a_server_that_nobody_calls(world: World) -> None:
    world.balance = Balance(3, 2, 3600)
    async with probes(world):
        world.servers[2].stop()
        await until(lambda: world.states() == ["closed", "closed", "open"])
        await world.servers[2].start()
        await until(lambda: world.states()[2] == "half_open")
        assert await world.call() == 2
        assert world.states() == ["closed"] * 3
        world.servers[0].mood = "error"
        world.servers[1].mood = "hang"
        await until(lambda: world.states() == ["open", "open", "closed"])
    assert world.servers[2].heads[0].startswith(b"GET /base/health HTTP/1.1\r\nhost: 127.0.0.1:")
    assert b"\r\nauthorization: Bearer k\r\n" in world.servers[2].heads[0]


async def test_a_server_whose_connections_are_all_in_use_is_not_taken_for_dead(world: World) -> None:
    for server in world.servers:
        world.pool.configure(server.origin, keep_alive=True, prewarm=0, max_connections=1)
        await world.pool.dial(server.origin)
    waited = world.context.stats.upstream_waited
    async with probes(world):
        await until(lambda: world.context.stats.upstream_waited > waited + 12)
    assert world.states() == ["closed"] * 3


class Ollama:
    """What ``/api/ps``, ``/api/generate`` and ``/api/embed`` of one do; ``loads``: bodies by path."""

    def __init__(self) -> None:
        self.loaded: dict[str, str] = {}
        self.loads: list[tuple[str, dict[str, Any]]] = []
        self.there = {"gemma2:2b", "llama3:latest", "embedder:latest"}
        self.hang: asyncio.Event | None = None
        self.looks = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/base/api/ps":
            self.looks += 1
            models = [{"name": name, "model": name, "expires_at": until} for name, until in self.loaded.items()]
            return web.json_response({"models": models, "more": 1})
        body = json.loads(await request.read())
        self.loads.append((request.path, body))
        if self.hang is not None:
            await self.hang.wait()
        name = body["model"] if ":" in body["model"] else body["model"] + ":latest"
        if name not in self.there:
            return web.json_response({"error": f"model '{name}' not found"}, status=404)
        if name.startswith("embedder") and request.path != "/base/api/embed":
            return web.json_response({"error": f'"{name}" does not support generate'}, status=400)
        assert body.get("prompt", "") == ""
        self.loaded[name] = ahead(3600)
        return web.json_response({"model": body["model"], "done": True, "done_reason": "load"})


def ahead(seconds: float) -> str:
    """As Ollama writes times: nanoseconds, an offset."""
    at = datetime.datetime.now(datetime.timezone(datetime.timedelta(hours=2))) + datetime.timedelta(seconds=seconds)
    return at.strftime("%Y-%m-%dT%H:%M:%S.%f123+02:00")


@asynccontextmanager
async def ollama(
    world: World, *models: str, keep_alive: str = "24h", running: Ollama | None = None
) -> AsyncIterator[Ollama]:
    made = running or Ollama()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", made.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    origin = Origin("http", "127.0.0.1", runner.addresses[0][1], "", True)
    keeper = Preload([(origin, b"/base")], models, keep_alive, world.pool, world.context.tasks)
    keeper.start()
    try:
        yield made
    finally:
        keeper.close()
        await until(lambda: len(world.context.tasks) == 0)
        world.pool.sweep(float("inf"))
        await runner.cleanup()


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preload, "CHECK_S", 0.01)


@pytest.mark.usefixtures("often")
async def test_models_are_loaded_once_and_again_after_a_restart(world: World) -> None:
    async with ollama(world, "gemma2:2b", "llama3") as server:
        await until(lambda: server.looks > 3)
        assert server.loads == [
            ("/base/api/generate", {"model": "gemma2:2b", "keep_alive": "24h", "stream": False}),
            ("/base/api/generate", {"model": "llama3", "keep_alive": "24h", "stream": False}),
        ]
        server.loaded.clear()
        await until(lambda: len(server.loads) == 4)
        assert set(server.loaded) == {"gemma2:2b", "llama3:latest"}


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize(("configured", "sent"), [("-1", -1), ("300", 300), ("10m", "10m"), ("-1m", "-1m")])
async def test_how_long_they_are_kept(world: World, configured: str, sent: str | int) -> None:
    async with ollama(world, "llama3", keep_alive=configured) as server:
        await until(lambda: bool(server.loads))
    assert server.loads[0][1]["keep_alive"] == sent


@pytest.mark.usefixtures("often")
async def test_one_that_is_about_to_go_is_kept(world: World) -> None:
    """A call that names no time makes it the server's own, five minutes."""
    async with ollama(world, "llama3") as server:
        await until(lambda: server.looks > 2)
        server.loaded["llama3:latest"] = ahead(-1)
        await until(lambda: len(server.loads) == 2)


@pytest.mark.usefixtures("often")
async def test_one_that_only_embeds(world: World) -> None:
    async with ollama(world, "embedder") as server:
        await until(lambda: server.looks > 2)
        assert [path for path, _ in server.loads] == ["/base/api/generate", "/base/api/embed"]
        assert server.loads[1][1]["input"] == ""


@pytest.mark.usefixtures("often")
async def test_one_that_is_not_there_keeps_no_other_from_being_loaded(world: World) -> None:
    async with ollama(world, "missing", "llama3") as server:
        await until(lambda: "llama3:latest" in server.loaded)
        server.there.add("missing:latest")
        await until(lambda: "missing:latest" in server.loaded)


@pytest.mark.usefixtures("often")
async def test_a_load_that_takes_long_holds_up_no_call(world: World) -> None:
    server = Ollama()
    server.hang = asyncio.Event()
    async with ollama(world, "llama3", running=server):
        await until(lambda: bool(server.loads))
        assert await world.call() is not None
        server.hang.set()
        await until(lambda: bool(server.loaded))
