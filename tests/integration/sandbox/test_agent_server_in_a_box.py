"""The real agent server, as each driver starts it by default, says hello."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from broker.config import DockerConfig, ProcessConfig
from broker.host.tasks import TaskOwner
from broker.sandbox.docker import DockerDriver
from broker.sandbox.driver import SandboxDriver, SandboxSpec
from broker.sandbox.process import ProcessDriver
from sandbox_agent.wire import codec
from sandbox_agent.wire.messages import FROM_SANDBOX, Hello, Preamble, parse
from tests.integration.sandbox.kinds import DOCKER, IMAGE, bwrap_missing, docker_missing
from tests.integration.sandbox.rig import UID


async def _read(reader: asyncio.StreamReader) -> dict[str, object]:
    head = await asyncio.wait_for(reader.readexactly(codec.HEADER), 20)
    return codec.unpack(await reader.readexactly(codec.length(head)))


@pytest.mark.parametrize("kind", [DOCKER, "process"])
async def test_it_says_hello(kind: str, tmp_path: Path) -> None:
    if missing := docker_missing() if kind == "docker" else bwrap_missing():
        pytest.skip(missing)
    for name in ("sock", "vol/home", "packages"):
        (tmp_path / name).mkdir(parents=True)
    hello: asyncio.Future[tuple[Preamble, object]] = asyncio.get_running_loop().create_future()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello.set_result((Preamble.decode(await _read(reader)), parse(await _read(reader), FROM_SANDBOX)))
        await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(connected, tmp_path / "sock/agent")
    os.chmod(tmp_path / "sock/agent", 0o666)
    tasks = TaskOwner("box")
    driver: SandboxDriver = (
        DockerDriver(DockerConfig(image=IMAGE), installation=f"box{os.getpid()}", node="here", tasks=tasks)
        if kind == "docker"
        else ProcessDriver(ProcessConfig(), installation="box", state_dir=tmp_path / "state", tasks=tasks)
    )
    await driver.open()
    paths = (tmp_path / "sock", tmp_path / "vol", tmp_path / "packages")
    ref = await driver.create(SandboxSpec(f"box{os.getpid()}", 1, *paths, UID))
    try:
        await driver.start(ref)
        preamble, message = await asyncio.wait_for(hello, 20)
        assert (preamble.kind, preamble.secret) == ("control", b"")
        assert isinstance(message, Hello)
        assert (message.applied, message.agent) == ({}, "stopped")
    finally:
        await driver.remove(ref)
        server.close()
        await driver.close()
        await tasks.close()
