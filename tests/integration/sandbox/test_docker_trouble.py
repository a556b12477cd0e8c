"""Docker Engine down, hung, cut off, or without what it should have: clear errors in bounded time."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from broker.config import DockerConfig
from broker.errors import Code, CortexError
from broker.host.tasks import TaskOwner
from broker.sandbox.docker import DockerDriver, names_registry
from broker.sandbox.driver import SandboxDriver, SandboxSpec
from tests.integration.sandbox.kinds import DOCKER, IMAGE, docker_missing
from tests.integration.sandbox.rig import Rig
from tests.integration.sandbox.way import Way

SPEC = SandboxSpec("a", 1, Path("/s"), Path("/v"), Path("/p"), 64321)

# When the engine is not well


async def _refused(driver: SandboxDriver, code: Code, hint: str) -> CortexError:
    began = time.monotonic()
    with pytest.raises(CortexError) as caught:
        await driver.open()
    assert caught.value.code is code
    assert hint in caught.value.hint
    assert time.monotonic() - began < 8
    await driver.close()
    return caught.value


async def _docker_at(monkeypatch: pytest.MonkeyPatch, host: str, **changes: Any) -> DockerDriver:
    monkeypatch.setenv("DOCKER_HOST", host)
    config = DockerConfig(**{"image": IMAGE, "call_timeout_s": 0.5, **changes})
    return DockerDriver(config, installation="none", node="here", tasks=TaskOwner("docker"))


async def test_an_engine_that_is_down(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver = await _docker_at(monkeypatch, f"unix://{tmp_path}/none.sock")
    await _refused(driver, Code.ENGINE_DOWN, "systemctl start docker")
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / "dead.sock"))
    dead.close()
    await _refused(await _docker_at(monkeypatch, f"unix://{tmp_path}/dead.sock"), Code.ENGINE_DOWN, "Docker Engine")


async def test_an_engine_that_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as hung:
        hung.bind(str(tmp_path / "hung.sock"))
        hung.listen(8)
        driver = await _docker_at(monkeypatch, f"unix://{tmp_path}/hung.sock")
        await _refused(driver, Code.ENGINE_TIMEOUT, "docker version")
        for call in (driver.list(), driver.start("x"), driver.remove("x"), driver.stop("x", 0.1), driver.inspect("x")):
            began = time.monotonic()
            with pytest.raises(CortexError) as caught:
                await call
            assert caught.value.code is Code.ENGINE_TIMEOUT
            assert time.monotonic() - began < 4
        await driver.close()


async def test_an_engine_that_answers_rubbish(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def rubbish(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")
        writer.close()

    server = await asyncio.start_unix_server(rubbish, tmp_path / "ssh.sock")
    await _refused(await _docker_at(monkeypatch, f"unix://{tmp_path}/ssh.sock"), Code.ENGINE_DOWN, "Docker Engine")
    server.close()


@pytest.mark.parametrize("body", ["<html>", "[1, 2]", "{}", "null", '{"Id": 5, "Runtimes": 7}'])
async def test_something_else_that_speaks_http(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        writer.close()

    server = await asyncio.start_unix_server(answer, tmp_path / "web.sock")
    driver = await _docker_at(monkeypatch, f"unix://{tmp_path}/web.sock", runtime="runsc")
    with pytest.raises(CortexError) as caught:
        await driver.open()
    assert caught.value.code is Code.ENGINE_ERROR
    with pytest.raises(CortexError) as caught:
        await driver._engine.ended("x", lambda: None, lambda _: None)
    assert "DOCKER_HOST" in caught.value.hint
    for call in (driver.list(), driver.inspect("x"), driver.create(SPEC)):
        with pytest.raises(CortexError):
            await call
    await driver.close()
    server.close()


async def test_no_engine_address(monkeypatch: pytest.MonkeyPatch) -> None:
    await _refused(await _docker_at(monkeypatch, "gopher://x"), Code.BAD_CONFIG, "unix:///var/run/docker.sock")


class _Registry:
    """An engine that has the image once it was pulled. ``refusal``: what the registry says instead."""

    def __init__(self, refusal: str = "") -> None:
        self.refusal = refusal
        self.pulls = 0
        self.there = False
        self.given = asyncio.Event()

    async def serve(self, path: Path) -> web.AppRunner:
        app = web.Application()
        app.router.add_get("/version", self._version)
        app.router.add_get("/{v}/info", self._info)
        app.router.add_get("/{v}/images/{name:.+}/json", self._inspect)
        app.router.add_post("/{v}/images/create", self._pull)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.UnixSite(runner, str(path)).start()
        return runner

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"ApiVersion": "1.43"})

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response({"SystemTime": "2026-01-01T00:00:00Z", "Runtimes": {}})

    async def _inspect(self, request: web.Request) -> web.Response:
        if not self.there:
            return web.json_response({"message": "No such image"}, status=404)
        return web.json_response({"Id": "sha256:abc"})

    async def _pull(self, request: web.Request) -> web.Response:
        self.pulls += 1
        await self.given.wait()
        self.there = not self.refusal
        told = {"errorDetail": {"message": self.refusal}, "error": self.refusal} if self.refusal else {"status": "ok"}
        return web.json_response(told)


PULLED = "registry.example:5000/sandbox:1"


async def test_an_image_of_a_registry_is_pulled_once_for_all_who_wait(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    registry = _Registry()
    runner = await registry.serve(tmp_path / "engine.sock")
    driver = await _docker_at(monkeypatch, f"unix://{tmp_path}/engine.sock", image=PULLED)
    await driver.open()  # users are told meanwhile that it is missing
    with pytest.raises(CortexError) as caught:
        await driver.create(SPEC)
    assert caught.value.code is Code.IMAGE_MISSING
    assert "docker pull" in caught.value.hint
    waiting = [asyncio.ensure_future(driver.prepare_image()) for _ in range(3)]
    async with asyncio.timeout(5):
        while not registry.pulls:
            await asyncio.sleep(0.005)
    waiting.pop(0).cancel()  # the others do not depend on who asked first
    registry.given.set()
    assert await asyncio.gather(*waiting) == ["sha256:abc"] * 2
    assert registry.pulls == 1
    assert await driver.prepare_image() == "sha256:abc"
    assert registry.pulls == 1
    await driver.close()
    await runner.cleanup()


async def test_a_registry_that_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    registry = _Registry("denied: requested access to the resource is denied")
    registry.given.set()
    runner = await registry.serve(tmp_path / "engine.sock")
    driver = await _docker_at(monkeypatch, f"unix://{tmp_path}/engine.sock", image=PULLED)
    for pulls in (1, 2):
        with pytest.raises(CortexError) as caught:
            await driver.prepare_image()
        assert caught.value.code is Code.IMAGE_MISSING
        assert "denied" in str(caught.value.cause)
        assert PULLED in caught.value.hint
        assert registry.pulls == pulls
    await driver.close()
    await runner.cleanup()


async def test_an_image_that_is_built_here_is_never_pulled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    registry = _Registry()
    registry.given.set()
    runner = await registry.serve(tmp_path / "engine.sock")
    driver = await _docker_at(monkeypatch, f"unix://{tmp_path}/engine.sock", image="cortex-sandbox:latest")
    await _refused(driver, Code.IMAGE_MISSING, "make image")
    with pytest.raises(CortexError) as caught:
        await driver.prepare_image()
    assert caught.value.code is Code.IMAGE_MISSING
    assert registry.pulls == 0
    await driver.close()
    await runner.cleanup()


@pytest.mark.parametrize(
    ("image", "pulled"),
    [
        ("cortex-sandbox", False),
        ("cortex-sandbox:latest", False),
        ("someone/cortex-sandbox:1", False),
        ("ghcr.io/someone/cortex:1", True),
        ("localhost/cortex", True),
        ("registry:5000/cortex@sha256:ab", True),
    ],
)
def test_which_names_say_where_an_image_comes_from(image: str, pulled: bool) -> None:
    assert names_registry(image) is pulled


@pytest.mark.docker
@pytest.mark.skipif(bool(docker_missing()), reason=docker_missing())
async def test_image_and_runtime_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    host = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    driver = await _docker_at(monkeypatch, host, image="cortex-none:none", call_timeout_s=5)
    await _refused(driver, Code.IMAGE_MISSING, "make image")
    driver = await _docker_at(monkeypatch, host, runtime="no-such-runtime", call_timeout_s=5)
    await _refused(driver, Code.ENGINE_ERROR, "daemon.json")


@pytest.mark.parametrize("world", [DOCKER], indirect=True)
async def test_a_wait_outlasts_an_engine_that_is_away(world: Rig, tmp_path: Path, monkeypatch: Any) -> None:
    """The way to the engine is cut and comes back: the end of a sandbox in between is learned."""
    ref, _, _ = await world.up()
    way = Way(tmp_path / "way.sock")
    await way.open()
    monkeypatch.setenv("DOCKER_HOST", f"unix://{way.path}")
    driver = world.another()
    await driver.open()
    waiter = asyncio.ensure_future(driver.wait(ref))
    await asyncio.sleep(0.2)
    way.cut()
    await world.driver.stop(ref, 0.1)
    done, _ = await asyncio.wait([waiter], timeout=0.3)
    assert not done
    await way.open()
    assert (await asyncio.wait_for(waiter, 15)).code is not None
    await driver.close()
    way.cut()


@pytest.mark.parametrize("world", [DOCKER], indirect=True)
async def test_a_cancelled_create_leaves_nothing(world: Rig) -> None:
    for delay in (0, 0.002, 0.005):
        slot = await world.slot()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(world.driver.create(slot.spec), delay)
    async with asyncio.timeout(10):
        while len(world.tasks) > 1:  # all but the event stream
            await asyncio.sleep(0.01)
    assert await world.driver.list() == []
