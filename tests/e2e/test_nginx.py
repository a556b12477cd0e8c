"""The shipped nginx configuration before a real broker: TLS, WebSockets, events, the limit, what reaches the broker."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from tests.e2e.conftest import process_config, short_directory
from tests.e2e.harness import BrokerProcess, Client, connected, running, turn
from tests.e2e.tls_front import Front, front
from tests.integration.gateway.support import app_server

pytestmark = [pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]

ORIGIN = "https://app.example.org"
HANDSHAKE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


@dataclass(frozen=True)
class House:
    broker: BrokerProcess
    front: Front

    @property
    def url(self) -> str:
        return f"https://localhost:{self.front.port}"

    @property
    def admin(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.broker.admin_token}"}

    @asynccontextmanager
    async def client(self, address: str = "127.0.0.1") -> AsyncIterator[aiohttp.ClientSession]:
        """From a loopback address of its own: each has a limit of its own."""
        trusted = ssl.create_default_context(cafile=str(self.front.ca))
        connector = aiohttp.TCPConnector(ssl=trusted, local_addr=(address, 0), family=socket.AF_INET)
        timeout = aiohttp.ClientTimeout(total=30)
        async with aiohttp.ClientSession(self.url, connector=connector, timeout=timeout) as http:
            yield http


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house() -> AsyncIterator[House]:
    env = {"CORTEX_FRONT__ALLOWED_ORIGINS": ORIGIN}
    with short_directory() as directory, short_directory() as place:
        async with (
            running(directory, "process", process_config(), env=env) as broker,
            front(place, broker.front_port, broker.control_port) as nginx,
        ):
            yield House(broker, nginx)


async def test_a_whole_turn_over_a_websocket_through_tls(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(house.front.ca))
    made = await house.broker.session("ann")
    client = Client()
    async with connected(f"wss://localhost:{house.front.port}/acp", made["token"], client) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        running_turn = asyncio.ensure_future(turn(agent, session.session_id, "/slow 100000"))
        await client.until(lambda: len(client.updates) > 3)
        await agent.cancel(session_id=session.session_id)
        assert (await running_turn).stop_reason == "cancelled", "what it said came while it still spoke"
        # More frames than handshakes would be let through.
        for number in range(40):
            await turn(agent, session.session_id, f"word{number}")
    assert "word39" in client.text


@pytest.mark.parametrize("path", ["/", "/acp", "/acp/ws", "/message"])
async def test_every_path_of_the_front_door(house: House, path: str) -> None:
    made = await house.broker.session("bob")
    async with house.client("127.0.0.2") as http:
        headers = {"Authorization": f"Bearer {made['token']}", "Origin": ORIGIN}
        async with http.ws_connect(path, headers=headers) as ws:
            await ws.send_json({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {"protocolVersion": 1}})
            assert (await ws.receive_json())["id"] == 1


async def test_events_come_while_the_turn_runs(house: House) -> None:
    await house.broker.session("cal")
    async with house.client("127.0.0.3") as http:
        path = "/v1/sessions/cal/main/prompt"
        async with http.post(path, json={"text": "/slow 2 60000"}, headers=house.admin) as events:
            assert events.content_type == "text/event-stream"
            said = b""
            while b"agent_message_chunk" not in said:
                said += await asyncio.wait_for(events.content.readuntil(b"\n\n"), 20)
            # The next word comes a minute after the first.
            assert b"event: result" not in said


async def test_one_address_is_limited_and_another_is_not(house: House) -> None:
    async with house.client("127.0.0.4") as http:
        answers = await asyncio.gather(*(http.get("/livez") for _ in range(80)))
        limited = [answer for answer in answers if answer.status == 429]
        assert len(answers) - len(limited) >= 20, "a burst is let through"
        assert len(limited) >= 20
        problem = await limited[0].json(content_type="application/problem+json")
        assert (limited[0].headers["Retry-After"], problem["status"], problem["retryable"]) == ("1", 429, True)
        assert {"type", "title", "code", "hint"} <= set(problem)
        # Handshakes are counted apart.
        assert (await http.get("/acp", headers=HANDSHAKE)).status == 401
    async with house.client("127.0.0.5") as http:
        assert (await http.get("/livez")).status == 200


async def test_handshakes_are_limited(house: House) -> None:
    async with house.client("127.0.0.6") as http:
        statuses = [
            answer.status for answer in await asyncio.gather(*(http.get("/acp", headers=HANDSHAKE) for _ in range(80)))
        ]
    assert set(statuses) == {401, 429}
    assert statuses.count(401) >= 20


@pytest.mark.parametrize("path", ["/acp", "/v1/sessions"])
async def test_the_broker_still_checks_who_it_is_called(house: House, path: str) -> None:
    async with house.client("127.0.0.7") as http:
        headers = (HANDSHAKE if path == "/acp" else house.admin) | {"Host": "evil.example"}
        answer = await http.get(path, headers=headers)
        problem = await answer.json(content_type="application/problem+json")
    assert (problem["code"], problem["title"]) == ("host.forbidden", "the request names host 'evil.example'")


async def test_the_broker_still_checks_origins(house: House) -> None:
    made = await house.broker.session("dan")
    headers = HANDSHAKE | {"Authorization": f"Bearer {made['token']}", "Origin": "https://evil.example"}
    async with house.client("127.0.0.8") as http:
        answer = await http.get("/acp", headers=headers)
        assert (await answer.json(content_type="application/problem+json"))["code"] == "origin.forbidden"


async def test_the_size_of_bodies_is_the_brokers_matter(house: House) -> None:
    async with house.client("127.0.0.9") as http:
        for size, wanted in ((1_000_000, 422), (3_000_000, 413)):
            async with http.put(
                "/v1/users/eve/config/env", data=io.BytesIO(b'{"a":"' + b"x" * size + b'"}'), headers=house.admin
            ) as answer:
                problem = await answer.json(content_type="application/problem+json")
                assert (answer.status, problem["status"]) == (wanted, wanted), problem


async def test_what_else_there_is_is_not_passed_on(house: House) -> None:
    async with house.client("127.0.0.10") as http:
        for path in ("/metrics", "/anything", "/acp/other"):
            assert (await http.get(path)).status == 404
        assert (await http.get("/livez", headers={"X": "y"})).headers.get("Server") == "nginx"
        plain = await http.get(f"http://localhost:{house.front.plain_port}/acp?x=1", allow_redirects=False)
        assert (plain.status, plain.headers["Location"]) == (308, "https://localhost/acp?x=1")


async def test_tickets_are_in_no_log(house: House) -> None:
    made = await house.broker.api("POST", "/v1/sessions", {"user": "fay", "agent": "demo", "wait": "ready"})
    assert made
    minted = await house.broker.api("POST", "/v1/sessions/fay/main/tokens", {"kind": "ticket"})
    async with house.client("127.0.0.11") as http:
        async with http.ws_connect(f"/acp?ticket={minted['token']}", origin=ORIGIN) as ws:
            await ws.send_json({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {"protocolVersion": 1}})
            await ws.receive_json()
        many = await asyncio.gather(*(http.get(f"/acp?ticket={minted['token']}", headers=HANDSHAKE) for _ in range(60)))
    assert 429 in {answer.status for answer in many}
    assert '"GET /acp"' in house.front.log("access.log")
    assert minted["token"] not in house.front.log("access.log") + house.front.log("error.log")


async def _echo(request: web.Request) -> web.Response:
    return web.json_response([[name, value] for name, value in request.headers.items()])


FORGED: dict[str, str] = {
    "X-Forwarded-For": "6.6.6.6",
    "X-Forwarded-Proto": "gopher",
    "X-Forwarded-Host": "evil.example",
    "X-Forwarded-Port": "1",
    "X-Real-IP": "6.6.6.6",
    "Forwarded": "for=6.6.6.6",
    "Proxy": "evil.example",
}


@pytest.mark.parametrize("path", ["/v1/x", "/acp"])
async def test_what_a_client_says_of_where_it_comes_from_is_replaced(house: House, tmp_path: Path, path: str) -> None:
    async with (
        app_server(_echo) as port,
        front(tmp_path, port, port) as nginx,
        House(house.broker, nginx).client() as http,
    ):
        sent = FORGED | {"Authorization": "Bearer kept"}
        pairs: list[list[str]] = json.loads(await (await http.get(path, headers=sent)).text())
        seen: dict[str, Any] = {name.lower(): value for name, value in pairs}
        assert len(seen) == len(pairs)
        assert seen["x-forwarded-for"] == seen["x-real-ip"] == "127.0.0.1"
        assert (seen["x-forwarded-proto"], seen["x-forwarded-host"]) == ("https", "localhost")
        assert (seen["x-forwarded-port"], seen["host"]) == (str(nginx.port), "localhost")
        assert not {"forwarded", "proxy"} & set(seen)
        assert seen["authorization"] == "Bearer kept"


async def test_behind_another_proxy_each_of_its_users_has_a_limit(house: House, tmp_path: Path) -> None:
    changes = {
        "#set_real_ip_from 192.0.2.0/24;": "set_real_ip_from 127.0.0.0/8;",
        "#real_ip_header": "real_ip_header",
        "#real_ip_recursive": "real_ip_recursive",
        "#add_header Strict-Transport-Security": "add_header Strict-Transport-Security",
    }
    async with (
        app_server(_echo) as port,
        front(tmp_path, port, port, changes) as nginx,
        House(house.broker, nginx).client() as http,
    ):
        one, two = {"X-Forwarded-For": "198.51.100.1"}, {"X-Forwarded-For": "198.51.100.2"}
        many = await asyncio.gather(*(http.get("/v1/x", headers=one) for _ in range(60)))
        assert 429 in {answer.status for answer in many}
        answer = await http.get("/v1/x", headers=two)
        assert answer.status == 200
        assert answer.headers["Strict-Transport-Security"]
        assert dict(json.loads(await answer.text()))["X-Forwarded-For"] == "198.51.100.2"
