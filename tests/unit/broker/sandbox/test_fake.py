from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode

from broker.errors import Code, CortexError
from broker.sandbox.driver import SandboxSpec
from broker.sandbox.fake import FakeDriver, FakeEngine, Script, frame, read_frame
from sandbox_agent.wire import codec
from sandbox_agent.wire.messages import (
    FROM_SANDBOX,
    AgentSpec,
    Attach,
    Bind,
    Bound,
    Hello,
    Message,
    Preamble,
    Probe,
    Status,
    Stop,
    Welcome,
    parse,
)


class Wire:
    """The broker's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def read(self) -> dict[str, object]:
        head = await asyncio.wait_for(self.reader.readexactly(codec.HEADER), 5)
        return codec.unpack(await self.reader.readexactly(codec.length(head)))

    async def message(self) -> Message:
        return parse(await self.read(), FROM_SANDBOX)

    def send(self, message: Message) -> None:
        self.writer.write(codec.pack(message.encode()))


class Host:
    """Listens on the slot's agent socket."""

    def __init__(self) -> None:
        self.wires: asyncio.Queue[Wire] = asyncio.Queue(16)
        self.all: list[Wire] = []

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.all.append(Wire(reader, writer))
        await self.wires.put(self.all[-1])

    async def wire(self, kind: str) -> tuple[Wire, Preamble]:
        wire = await asyncio.wait_for(self.wires.get(), 5)
        preamble = Preamble.decode(await wire.read())
        assert preamble.kind == kind
        return wire, preamble


@asynccontextmanager
async def _up(tmp_path: Path, script: Script) -> AsyncIterator[tuple[FakeDriver, str, Host]]:
    host = Host()
    (tmp_path / "sock").mkdir()
    server = await asyncio.start_unix_server(host.connected, tmp_path / "sock/agent")
    driver = FakeDriver(FakeEngine(script))
    await driver.open()
    ref = await driver.create(SandboxSpec("a", 1, tmp_path / "sock", tmp_path, tmp_path, 1))
    await driver.start(ref)
    try:
        yield driver, ref, host
    finally:
        await driver.engine.close()
        server.close()
        for wire in host.all:
            wire.writer.close()
        await asyncio.sleep(0)


WELCOME = Welcome(1, b"s" * 32, agent_spec=AgentSpec("demo", "acp", ["x"]), agent_hash="h", streams=1)


async def test_hello_welcome_bind_probe_and_a_stream(tmp_path: Path) -> None:
    async with _up(tmp_path, Script(effect={"mcp": "next_session"})) as (driver, ref, host):
        control, preamble = await host.wire("control")
        assert preamble.secret == b""
        hello = await control.message()
        assert isinstance(hello, Hello)
        assert hello.applied == {}
        control.send(WELCOME)
        status = await control.message()
        assert isinstance(status, Status)
        assert status.agent == "ready"
        assert "protocolVersion" in status.agent_info
        control.send(Bind(7, 1, {"mcp": []}, {"mcp": "m1"}))
        bound = await control.message()
        assert isinstance(bound, Bound)
        assert (bound.id, bound.ok, bound.applied) == (7, True, {"process": "h", "mcp": "m1"})
        assert bound.effect == {"mcp": "next_session"}
        control.send(Probe(3))
        assert (await control.message()).encode()["id"] == 3

        stream, preamble = await host.wire("stream")
        assert preamble.secret == b"s" * 32
        stream.send(Attach("c1", "acp"))
        stream.writer.write(Frame(Opcode.TEXT, b"hello").serialize(mask=True))
        assert await read_frame(stream.reader) == (0x81, b"hello")
        await host.wire("stream")
        assert [attach.connection for attach in driver.engine.sandboxes[ref].attached] == ["c1"]


async def test_it_dials_again_with_the_secret_and_says_what_it_has(tmp_path: Path) -> None:
    async with _up(tmp_path, Script()) as (_, _, host):
        control, _ = await host.wire("control")
        await control.message()
        control.send(WELCOME)
        await control.message()
        await host.wire("stream")
        control.writer.close()
        control, preamble = await host.wire("control")
        assert preamble.secret == b"s" * 32
        hello = await control.message()
        assert isinstance(hello, Hello)
        assert (hello.applied, hello.agent) == ({"process": "h"}, "ready")


async def test_failures_can_be_switched_on(tmp_path: Path) -> None:
    script = Script(agent_fails="agent.not_in_image", bind_error="agent.failed")
    async with _up(tmp_path, script) as (driver, ref, host):
        control, _ = await host.wire("control")
        await control.message()
        control.send(WELCOME)
        status = await control.message()
        assert isinstance(status, Status)
        assert (status.agent, status.code) == ("failed", "agent.not_in_image")
        control.send(Bind(1, 1, {"mcp": []}, {"mcp": "x"}))
        bound = await control.message()
        assert isinstance(bound, Bound)
        assert (bound.ok, bound.code) == (False, "agent.failed")
        control.send(Stop())
        assert (await asyncio.wait_for(driver.wait(ref), 5)).code == 0


async def test_it_can_die_say_hello_twice_or_nothing(tmp_path: Path) -> None:
    async with _up(tmp_path, Script(hellos=2, die_after_hello=9)) as (driver, ref, host):
        control, _ = await host.wire("control")
        assert isinstance(await control.message(), Hello)
        assert isinstance(await control.message(), Hello)
        assert (await asyncio.wait_for(driver.wait(ref), 5)).code == 9
        assert await driver.inspect(ref) == "exited"
        driver.engine.sandboxes[ref].script.hello = False
        await driver.start(ref)
        await asyncio.sleep(0.05)
        assert host.wires.empty()


async def test_an_engine_that_is_down_raises_at_every_call(tmp_path: Path) -> None:
    driver = FakeDriver()
    driver.engine.error = CortexError(Code.ENGINE_DOWN, "down", hint="start it")
    spec = SandboxSpec("a", 1, tmp_path, tmp_path, tmp_path, 1)
    for call in (driver.open(), driver.create(spec), driver.start("x"), driver.remove("x"), driver.list()):
        with pytest.raises(CortexError, match="down"):
            await call
    assert [name for name, _ in driver.engine.calls] == ["open", "create", "start", "remove", "list"]


@given(st.sampled_from([0x81, 0x82, 0x01]), st.binary(max_size=70_000), st.booleans())
def test_frames_are_those_of_the_rfc(head: int, payload: bytes, mask: bool) -> None:
    sent = Frame(Opcode(head & 0xF), payload, fin=bool(head & 0x80)).serialize(mask=mask)

    async def read() -> tuple[int, bytes]:
        reader = asyncio.StreamReader()
        reader.feed_data(sent)
        return await read_frame(reader)

    assert asyncio.run(read()) == (head, payload)
    assert frame(head, payload) == Frame(Opcode(head & 0xF), payload, fin=bool(head & 0x80)).serialize(mask=False)
