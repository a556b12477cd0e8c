"""One turn over plain HTTP."""

from __future__ import annotations

import asyncio
import json
import socket
import tracemalloc
from typing import Any

import aiohttp
import pytest

from broker.config import Config
from broker.control.acp import AcpStream, decide
from broker.control.prompt import MAX_EVENTS
from broker.errors import Code, CortexError
from tests.unit.broker.control.conftest import ADMIN, Api

PATH = "/v1/sessions/alice/main/prompt"


async def events(response: aiohttp.ClientResponse) -> list[tuple[str, str, Any]]:
    """Name, id and data of each event until the stream ends."""
    async with asyncio.timeout(10):
        text = (await response.read()).decode()
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append((fields["event"], fields.get("id", ""), json.loads(fields["data"])))
    return found


async def turn(api: Api, **body: Any) -> list[tuple[str, str, Any]]:
    await api.registry.create("alice", "main", None)
    headers = {"Authorization": f"Bearer {ADMIN}"}
    async with api.http.post(api.url + PATH, json=body, headers=headers) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        return await events(response)


async def test_updates_come_then_the_result(api: Api) -> None:
    found = await turn(api, text="one two")
    assert [name for name, _, _ in found] == ["session", "update", "update", "result"]
    assert found[0][2] == {"acp_session": "s1"}
    assert [data["update"]["content"]["text"] for name, _, data in found if name == "update"] == ["one", "two"]
    assert [ident for _, ident, _ in found] == ["", "e:1", "e:2", "e:9"]
    assert found[-1][2]["stopReason"] == "end_turn"
    assert found[-1][2]["acp_session"] == "s1"
    assert api.registry.sessions["alice", "main"].clients == []


async def test_each_update_is_flushed_as_it_comes(api: Api) -> None:
    session, _ = await api.registry.create("alice", "main", None)
    session.step.clear()
    headers = {"Authorization": f"Bearer {ADMIN}"}
    async with api.http.post(api.url + PATH, json={"text": "one two"}, headers=headers) as response:
        seen = b""
        async with asyncio.timeout(10):
            while b'"one"' not in seen:
                seen += await response.content.readany()
        assert b'"two"' not in seen
        session.step.set()
        assert (await events(response))[-1][0] == "result"


async def test_a_conversation_goes_on(api: Api) -> None:
    await turn(api, text="x", acp_session="s1")
    methods = [message["method"] for message in api.registry.sessions["alice", "main"].heard]
    assert methods == ["initialize", "session/resume", "session/prompt"]


async def test_content_blocks_are_passed_on(api: Api) -> None:
    content = [{"type": "text", "text": "x"}, {"type": "image", "data": "AA==", "mimeType": "image/png"}]
    await turn(api, content=content)
    assert api.registry.sessions["alice", "main"].heard[-1]["params"]["prompt"] == content


@pytest.mark.parametrize(("policy", "chosen"), [("ask", "n"), ("deny", "n"), ("allow", "y")])
async def test_permission_is_answered_by_the_policy(api: Api, policy: str, chosen: str) -> None:
    session, _ = await api.registry.create("alice", "main", None)
    session.policy = policy
    found = await turn(api, text="ask")
    assert found[1][0] == "permission"
    assert found[1][2]["outcome"] == {"outcome": "selected", "optionId": chosen}
    assert json.loads(found[2][2]["update"]["content"]["text"])["outcome"]["optionId"] == chosen
    assert found[-1][0] == "result"


def test_without_a_fitting_option_the_request_is_cancelled() -> None:
    assert decide({"options": [{"optionId": "y", "kind": "allow_once"}]}, "deny") == {"outcome": "cancelled"}
    assert decide({}, "allow") == {"outcome": "cancelled"}
    assert decide({"options": [{"optionId": 1, "kind": "allow_once"}, "x"]}, "allow") == {"outcome": "cancelled"}


async def test_the_agents_error_ends_the_stream_with_its_code(api: Api) -> None:
    found = await turn(api, text="fail")
    assert found[-1][0] == "error"
    assert (found[-1][2]["code"], found[-1][2]["hint"]) == ("agent.failed", "give it one")


async def test_a_stream_that_dies_is_an_error_not_a_hang(api: Api) -> None:
    found = await turn(api, text="die")
    assert (found[-1][0], found[-1][2]["code"]) == ("error", "agent.failed")


async def test_a_stream_that_breaks_the_framing_is_an_error_not_a_hang(api: Api) -> None:
    found = await turn(api, text="bad-frame")
    assert (found[-1][0], found[-1][2]["code"]) == ("error", "agent.failed")


@pytest.mark.parametrize("odd", [None, 1, "x", []])
async def test_messages_of_any_shape_end_in_a_result(api: Api, odd: Any) -> None:
    asked = {"id": 7, "method": "session/request_permission", "params": {"options": odd}}
    said = [{"method": "session/update", "params": odd}, {"method": "session/update", "params": {"_meta": odd}}, asked]
    found = await turn(api, text=json.dumps({"say": said, "result": odd}))
    assert [name for name, _, _ in found] == ["session", "update", "update", "permission", "result"]
    assert found[-1][2] == {"acp_session": "s1"}


async def test_half_a_surrogate_pair_reaches_the_client(api: Api) -> None:
    said = [{"method": "session/update", "params": {"text": "\ud83d"}}, {"id": "\ud83d", "method": "fs/read"}]
    found = await turn(api, text=json.dumps({"say": said, "result": {}}))
    assert found[1][2] == {"text": "\ud83d"}
    assert found[-1][0] == "result"


async def test_a_sandbox_cannot_write_events_of_its_own(api: Api) -> None:
    meta = {"cortex": {"epoch": "1\nevent: permission\ndata: {}\n\n", "seq": 1}}
    said = [{"method": "session/update", "params": {"_meta": meta}}]
    found = await turn(api, text=json.dumps({"say": said, "result": {}}))
    assert [(name, ident) for name, ident, _ in found] == [("session", ""), ("update", ""), ("result", "")]


async def test_fragments_without_content_cost_no_memory() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    stream = AcpStream(ours, max_message_bytes=1000)
    receiving = asyncio.ensure_future(stream.receive())
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(theirs, b"\x01\x01{")
    tracemalloc.start()
    try:
        for _ in range(20):
            await loop.sock_sendall(theirs, b"\x00\x00" * 5000)
            await asyncio.sleep(0)
        await loop.sock_sendall(theirs, b"\x89\x00")
        assert await asyncio.wait_for(loop.sock_recv(theirs, 100), 10), "a pong"
        assert tracemalloc.get_traced_memory()[0] < 200_000
        await loop.sock_sendall(theirs, b"\x80\x01}")
        assert await asyncio.wait_for(receiving, 10) == {}
    finally:
        tracemalloc.stop()
        stream.release()
        theirs.close()


async def test_closing_the_sessions_clients_ends_the_turn(api: Api) -> None:
    session, _ = await api.registry.create("alice", "main", None)
    headers = {"Authorization": f"Bearer {ADMIN}"}
    async with api.http.post(api.url + PATH, json={"text": "hang"}, headers=headers) as response:
        status, told = await api.call("DELETE", "/v1/sessions/alice/main/tokens")
        assert (status, told["closed"]) == (200, 1)
        found = await events(response)
    assert (found[-1][0], found[-1][2]["code"]) == ("error", "session.stopped")
    assert session.clients == []


async def test_the_turn_goes_on_when_the_http_client_leaves(api: Api) -> None:
    session, _ = await api.registry.create("alice", "main", None)
    session.step.clear()
    headers = {"Authorization": f"Bearer {ADMIN}"}
    session.extra = [{"method": "session/update", "params": {}}] * (MAX_EVENTS * 2)
    text = json.dumps({"say": [], "result": {}})
    response = await api.http.post(api.url + PATH, json={"text": text}, headers=headers)
    response.close()
    session.step.set()
    async with asyncio.timeout(10):
        await session.turns_done.wait()
        while session.clients:
            await asyncio.sleep(0)


async def test_a_client_that_does_not_read_is_let_go(api: Api) -> None:
    config = Config.model_validate({"front": {"stall_timeout_s": 0.5}})
    object.__setattr__(api.control, "config", lambda: config)
    session, _ = await api.registry.create("alice", "main", None)
    # More than the queue and what the kernel takes.
    session.extra = [{"method": "session/update", "params": {"text": "x" * 50_000}}] * (MAX_EVENTS + 150)
    raw = json.dumps({"text": json.dumps({"say": [], "result": {}})}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {ADMIN}\r\n"
    _, writer = await asyncio.open_connection(*api.url.removeprefix("http://").split(":"), limit=1000)
    writer.write(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
    async with asyncio.timeout(20):
        await session.turns_done.wait()
        while session.clients:
            await asyncio.sleep(0.01)
    writer.close()


async def test_held_frames_wait_for_release(api: Api) -> None:
    session, _ = await api.registry.create("alice", "main", None)
    session.gate.clear()
    headers = {"Authorization": f"Bearer {ADMIN}"}
    request = asyncio.ensure_future(api.http.post(api.url + PATH, json={"text": "x"}, headers=headers))
    async with asyncio.timeout(10):
        while not session.clients:
            await asyncio.sleep(0.001)
        heard: list[str] = []
        session.clients[0].hold(lambda: heard.append("waits"))
        assert heard
        session.gate.set()
        response = await request
        first = await response.content.readuntil(b"\n\n")
    assert b"event: session" in first
    assert [message["method"] for message in session.heard] == ["initialize", "session/new"]
    session.clients[0].release()
    assert (await events(response))[-1][0] == "result"


async def test_what_fails_before_the_prompt_is_an_http_error(api: Api) -> None:
    status, told = await api.call("POST", PATH, {"text": "x"})
    assert (status, told["code"]) == (404, "session.not_found")
    session, _ = await api.registry.create("alice", "main", None)
    session.broken = CortexError(Code.ENGINE_DOWN, "docker is down", hint="start it")
    status, told = await api.call("POST", PATH, {"text": "x"})
    assert (status, told["code"], session.clients) == (503, "sandbox.engine_down", [])
    await api.registry.create("bob", "main", "raw")
    status, told = await api.call("POST", "/v1/sessions/bob/main/prompt", {"text": "x"})
    assert (status, told["code"]) == (409, "session.wrong_protocol")
    for body in ({}, {"text": "x", "content": []}, {"text": ""}, {"text": "x", "content": [{"type": "text"}]}):
        assert (await api.call("POST", PATH, body))[0] == 400
