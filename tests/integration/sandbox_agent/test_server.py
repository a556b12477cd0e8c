"""A real agent server with the real demo agent; the broker's part is played on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox_agent.wire import codec
from sandbox_agent.wire.messages import AgentSpec, Build, Status, Stop
from tests import host
from tests.integration.sandbox_agent.harness import (
    DEMO,
    SECRET,
    Broker,
    Client,
    ControlConnection,
    Sandbox,
    children,
    open_files,
)


def shell(script: str, **changes: object) -> AgentSpec:
    """An agent that is a shell script."""
    return replace(DEMO, name="script", command=["sh", "-c", script], **changes)  # type: ignore[arg-type]


async def started(sandbox: Sandbox, broker: Broker) -> tuple[ControlConnection, Status]:
    """Starts the agent server; returns when its agent is ready."""
    await sandbox.start()
    control = await broker.control()
    return control, await control.status("ready")


def alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}") and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]


async def until_dead(pid: int) -> None:
    async with asyncio.timeout(10):
        while alive(pid):
            await asyncio.sleep(0.01)


async def test_hello_then_welcome_then_the_agent_is_ready(sandbox: Sandbox, broker: Broker) -> None:
    pid = await sandbox.start()
    control = await broker.control()
    assert control.preamble.secret == b""
    assert (control.hello.pid, control.hello.applied, control.hello.agent) == (pid, {}, "stopped")
    status = await control.status("ready")
    assert '"cortex-demo"' in status.agent_info
    assert children(pid) == [status.agent_pid]
    assert 0 < status.started_ms < 1000
    streams = [await broker.stream() for _ in range(2)]
    assert len(streams) == 2
    assert {p.secret for p in broker.preambles if p.kind == "stream"} == {SECRET}
    probed = await control.probe(7)
    assert probed.pss_bytes > 2**20


async def test_without_an_agent_in_the_welcome_the_first_bind_starts_it(sandbox: Sandbox, broker: Broker) -> None:
    assert broker.welcome is not None
    broker.welcome = replace(broker.welcome, agent_spec=None, agent_hash="")
    pid = await sandbox.start()
    control = await broker.control()
    assert (await control.probe(1)).agent == "stopped"
    assert children(pid) == []
    bound = await control.bind(2, {"process": DEMO.encode()}, {"process": "p1"})
    assert (bound.ok, bound.effect, bound.applied) == (True, {"process": "now"}, {"claim": "s1", "process": "p1"})
    await control.status("ready")


async def test_the_agent_has_its_three_pipes_open_and_nothing_else(sandbox: Sandbox, broker: Broker) -> None:
    """Neither the first agent nor one that is started beside sockets and journal inherits any of them."""
    control, first = await started(sandbox, broker)
    client = await Client.attach(broker)
    await broker.stream()
    os.kill(first.agent_pid, signal.SIGKILL)
    await control.status("restarting")
    second = await control.status("ready")
    assert second.agent_pid != first.agent_pid
    assert sandbox.process is not None
    host.need_sight_of(sandbox.process.pid)
    ours = open_files(sandbox.process.pid)
    assert sum(name.startswith("socket:") for name in ours.values()) >= 5
    theirs = open_files(second.agent_pid)
    assert sorted(theirs) == [0, 1, 2], theirs
    assert all(name.startswith("pipe:") for name in theirs.values())
    client.sock.close()


async def test_the_first_agent_has_nothing_else_open_either(sandbox: Sandbox, broker: Broker) -> None:
    _, status = await started(sandbox, broker)
    theirs = open_files(status.agent_pid)
    assert sorted(theirs) == [0, 1, 2], theirs


async def test_an_agent_that_is_killed_is_started_again(sandbox: Sandbox, broker: Broker) -> None:
    control, first = await started(sandbox, broker)
    os.kill(first.agent_pid, signal.SIGKILL)
    told = await control.status("restarting")
    assert told.code == "agent.failed"
    assert "killed by signal 9" in told.what
    again = await control.status("ready")
    assert again.agent_pid not in (0, first.agent_pid)
    assert again.code == ""


async def test_an_agent_that_keeps_dying_is_given_up_with_its_last_words(sandbox: Sandbox, broker: Broker) -> None:
    assert broker.welcome is not None
    broker.welcome = replace(broker.welcome, agent_spec=shell("echo no licence >&2; exit 3", max_restarts=1))
    await sandbox.start()
    control = await broker.control()
    failed = await control.status("failed")
    assert failed.code == "agent.failed"
    assert "exited with code 3" in failed.what
    assert "no licence" in failed.what
    assert failed.hint
    bound = await control.bind(1, {"process": DEMO.encode()}, {"process": "a1"})
    assert bound.ok
    await control.status("ready")


@pytest.mark.parametrize(
    "command", [["no-such-agent"], ["sh", "-c", "no-such-agent"], ["/usr/bin/env", "no-such-agent"]]
)
async def test_an_agent_that_is_not_in_the_image(sandbox: Sandbox, broker: Broker, command: list[str]) -> None:
    assert broker.welcome is not None
    broker.welcome = replace(broker.welcome, agent_spec=replace(DEMO, command=command))
    await sandbox.start()
    control = await broker.control()
    failed = await control.status("failed")
    assert failed.code == "agent.not_in_image"
    assert "no-such-agent" in failed.what
    assert failed.hint
    bound = await control.bind(1, {"process": replace(DEMO, command=["/gone"]).encode()}, {"process": "x"})
    assert (bound.ok, bound.code) == (False, "agent.not_in_image")
    assert (await control.bind(2, {"process": DEMO.encode()}, {"process": "y"})).ok
    await control.status("ready")


async def test_an_agent_that_never_answers_initialize(sandbox: Sandbox, broker: Broker) -> None:
    assert broker.welcome is not None
    spec = shell("exec sleep 60", init_timeout_s=0.3, max_restarts=0)
    broker.welcome = replace(broker.welcome, agent_spec=spec)
    await sandbox.start()
    failed = await (await broker.control()).status("failed")
    assert "did not answer initialize within 0.3 s" in failed.what
    assert failed.agent_pid == 0


async def test_a_broker_that_restarts_finds_everything_as_it_was(sandbox: Sandbox, broker: Broker) -> None:
    control, before = await started(sandbox, broker)
    await control.bind(1, {"mcp": [], "settings": {}}, {"mcp": "m", "settings": "s"})
    await broker.stop()
    await asyncio.sleep(0.3)
    await broker.start()
    again = await broker.control()
    assert again.preamble.secret == SECRET
    assert again.hello.agent == "ready"
    assert again.hello.applied == {"claim": "s1", "process": "a1", "mcp": "m", "settings": "s"}
    assert again.hello.agent_info == before.agent_info
    assert (await again.probe(1)).agent_pid == before.agent_pid
    for _ in range(2):
        await broker.stream()


async def test_a_sandbox_whose_slot_was_erased_ends_itself(sandbox: Sandbox, broker: Broker) -> None:
    _, before = await started(sandbox, broker)
    await broker.stop()
    shutil.rmtree(sandbox.socks)
    await sandbox.ended()
    assert not Path(f"/proc/{before.agent_pid}").exists(), "its agent ended too"


async def test_garbage_from_the_broker_is_survived(sandbox: Sandbox, broker: Broker) -> None:
    broker.greeting = b"\xff" * 64
    control, before = await started(sandbox, broker)
    loop = asyncio.get_running_loop()
    for garbage in (b"\xff\xff\xff\xff", codec.pack({"t": "no such thing"}), codec.pack({"t": "bind", "id": "x"})):
        await loop.sock_sendall(control.sock, garbage)
        control = await broker.control()
    for _ in range(2 * 5):  # the dead ones of each lost connection, and live ones
        with contextlib.suppress(BrokenPipeError):
            await loop.sock_sendall(await broker.stream(), b"\xff" * 16)
    assert (await control.probe(1)).agent_pid == before.agent_pid


async def test_a_process_part_that_changes_restarts_an_idle_agent(sandbox: Sandbox, broker: Broker) -> None:
    control, first = await started(sandbox, broker)
    same = await control.bind(1, {"process": DEMO.encode()}, {"process": "a1"})
    assert same.effect == {"process": "now"}
    assert (await control.probe(2)).agent_pid == first.agent_pid
    changed = replace(DEMO, env={"COLOUR": "green"})
    bound = await control.bind(3, {"process": changed.encode()}, {"process": "a2"})
    assert (bound.effect, bound.applied) == ({"process": "now"}, {"claim": "s1", "process": "a2"})
    await control.status("starting")
    second = await control.status("ready")
    assert not alive(first.agent_pid)
    assert b"COLOUR=green" in Path(f"/proc/{second.agent_pid}/environ").read_bytes()


async def test_the_agents_environment(sandbox: Sandbox, broker: Broker) -> None:
    assert broker.welcome is not None
    spec = replace(DEMO, env={"BASE": "{gateway}/anthropic"}, files={".demo/config": "url={gateway}"})
    broker.welcome = replace(broker.welcome, agent_spec=spec)
    _, status = await started(sandbox, broker)
    pairs = Path(f"/proc/{status.agent_pid}/environ").read_text().split("\0")
    env = dict(pair.split("=", 1) for pair in pairs if pair)
    assert env["HOME"] == str(sandbox.home)
    assert env["BASE"].startswith("http://127.0.0.1:")
    assert env["https_proxy"].startswith("http://127.0.0.1:")
    assert (sandbox.home / ".demo/config").read_text() == f"url={env['BASE'].removesuffix('/anthropic')}"
    assert os.readlink(f"/proc/{status.agent_pid}/cwd") == "/"
    assert SECRET.decode() not in str(env)


@pytest.mark.parametrize("how", ["message", "signal"])
async def test_stop_ends_the_agent_its_children_and_the_server(sandbox: Sandbox, broker: Broker, how: str) -> None:
    assert broker.welcome is not None
    deaf = shell("trap '' TERM; sleep 300 & exec {python} -I -S {sandbox_agent}/demo.py")
    broker.welcome = replace(broker.welcome, agent_spec=deaf)
    control, status = await started(sandbox, broker)
    group = [status.agent_pid, *children(status.agent_pid)]
    assert len(group) == 2
    assert sandbox.process is not None
    if how == "message":
        await control.send(Stop(grace_s=1.0))
    else:
        sandbox.process.send_signal(signal.SIGTERM)
    assert await sandbox.ended() == 0
    for pid in group:
        await until_dead(pid)


async def test_the_forwarder_reaches_the_slots_gateway_socket(sandbox: Sandbox, broker: Broker) -> None:
    assert broker.welcome is not None
    spec = shell("echo $GW > $HOME/port; exec {python} -I -S {sandbox_agent}/demo.py", env={"GW": "{gateway}"})
    broker.welcome = replace(broker.welcome, agent_spec=spec)
    await started(sandbox, broker)
    port = int((sandbox.home / "port").read_text().rpartition(":")[2])

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + await reader.readuntil(b"\r\n\r\n"))
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_unix_server(serve, str(sandbox.socks / "gateway")):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert await asyncio.wait_for(reader.read(-1), 10) == b"HTTP/1.1 200 OK\r\n\r\nGET / HTTP/1.1\r\n\r\n"
        writer.close()
        await writer.wait_closed()


async def test_the_wrong_kind_of_client_is_told(sandbox: Sandbox, broker: Broker) -> None:
    await started(sandbox, broker)
    client = await Client.attach(broker, "raw")
    frame = await client.receive()
    assert frame.data[:2] == (4400).to_bytes(2, "big")
    assert await client.receive() is None
    assert (await Client.attach(broker, "raw")).sock is not client.sock  # the used stream was replaced


@pytest.mark.skipif(os.geteuid() != 0, reason="a process namespace needs root")
async def test_as_process_1_it_takes_in_orphans_and_still_sees_its_agent_die(sandbox: Sandbox, broker: Broker) -> None:
    host.need_namespace("--pid")
    assert broker.welcome is not None
    leaves_orphans = shell("(sleep 1 & sleep 1.1 &) ; exec {python} -I -S {sandbox_agent}/demo.py")
    broker.welcome = replace(broker.welcome, agent_spec=leaves_orphans)
    outside = await sandbox.start("unshare", "--pid", "--fork", "--kill-child")
    control = await broker.control()
    assert control.hello.pid == 1
    await control.status("ready")
    (init,) = children(outside)
    assert len(children(init)) == 3
    async with asyncio.timeout(10):
        while len(children(init)) > 1:
            await asyncio.sleep(0.05)
    os.kill(children(init)[0], signal.SIGKILL)
    assert "killed by signal 9" in (await control.status("restarting")).what
    await control.status("ready")
    await control.send(Stop(grace_s=1.0))
    assert await sandbox.ended() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="a process namespace needs root")
async def test_as_process_1_it_still_sees_how_an_agent_ended_that_is_gone_at_once(
    sandbox: Sandbox, broker: Broker
) -> None:
    host.need_namespace("--pid")
    assert broker.welcome is not None
    broker.welcome = replace(broker.welcome, agent_spec=shell("exit 3", max_restarts=0))
    await sandbox.start("unshare", "--pid", "--fork", "--kill-child")
    assert "exited with code 3" in (await (await broker.control()).status("failed")).what


@pytest.mark.skipif(os.geteuid() != 0, reason="a process namespace needs root")
async def test_as_process_1_it_takes_in_orphans_during_and_after_a_build(
    sandbox: Sandbox, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.need_namespace("--pid")
    assert broker.welcome is not None
    bin_dir, home = sandbox.vol / "bin", sandbox.home
    bin_dir.mkdir()
    (bin_dir / "npm").write_text(f"#!/bin/sh\n: > {home}/building; until [ -e {home}/built ]; do sleep 0.05; done")
    (bin_dir / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_dir}:{os.environ['PATH']}")
    orphans = "".join(f"(until [ -e $HOME/{name} ]; do sleep 0.05; done & ) ; " for name in ("one", "two"))
    broker.welcome = replace(broker.welcome, agent_spec=shell(orphans + "exec {python} -I -S {sandbox_agent}/demo.py"))
    outside = await sandbox.start("unshare", "--pid", "--fork", "--kill-child")
    control = await broker.control()
    await control.status("ready")
    (init,) = children(outside)
    assert len(children(init)) == 3
    await control.send(Build(1, "npm", "any"))
    await reached(lambda: (home / "building").exists())
    (home / "one").touch()
    await reached(lambda: sum(not alive(pid) for pid in children(init)) == 1)
    (home / "built").touch()
    await control.built(1)
    await reached(lambda: len(children(init)) == 2)
    (home / "two").touch()
    await reached(lambda: len(children(init)) == 1)


async def reached(wanted: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not wanted():
            await asyncio.sleep(0.02)
