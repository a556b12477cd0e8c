"""Agents that speak WebSocket themselves."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

from sandbox_agent.wire.messages import AgentSpec
from tests.integration.sandbox_agent.harness import Broker, Client, Sandbox

AGENT = Path(__file__).with_name("raw_agent.py")
RAW = AgentSpec(name="raw", protocol="websocket", command=["{python}", str(AGENT), "{port}"])


async def test_frames_pass_untouched_both_ways(sandbox: Sandbox, broker: Broker) -> None:
    assert broker.welcome is not None
    broker.welcome = replace(broker.welcome, agent_spec=RAW)
    await sandbox.start()
    control = await broker.control()
    status = await control.status("ready")
    assert status.agent_pid
    clients = [await Client.attach(broker, "raw", f"c{number}") for number in range(2)]
    for client in clients:
        assert await client.text() == b"early"
    big = os.urandom(600_000).hex().encode()
    for number, client in enumerate(clients):
        sending = asyncio.get_running_loop().create_task(client.send(big + b"%d" % number))
        assert await client.text() == big + b"%d" % number
        await sending
    assert (await control.probe(1)).clients == 2
    clients[0].sock.close()
    await control.expect(type(status), clients=1)
    await clients[1].send(b"bye")
    assert await clients[1].receive() is None
    await control.expect(type(status), clients=0)


async def test_a_client_that_comes_while_the_agent_is_away_is_told(sandbox: Sandbox, broker: Broker) -> None:
    assert broker.welcome is not None
    broker.welcome = replace(broker.welcome, agent_spec=replace(RAW, command=["no-such", "{port}"]))
    await sandbox.start()
    await (await broker.control()).status("failed")
    client = await Client.attach(broker, "raw")
    frame = await client.receive()
    assert frame.data[:2] == (1011).to_bytes(2, "big")


async def test_an_agent_that_never_listens_fails(sandbox: Sandbox, broker: Broker) -> None:
    assert broker.welcome is not None
    spec = replace(RAW, command=["sh", "-c", "exec sleep 60 # {port}"], init_timeout_s=0.3, max_restarts=0)
    broker.welcome = replace(broker.welcome, agent_spec=spec)
    await sandbox.start()
    failed = await (await broker.control()).status("failed")
    assert "did not listen on its port within 0.3 s" in failed.what
