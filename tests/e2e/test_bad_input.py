"""What people and programs get wrong: each mistake has a clear answer, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from tests.e2e.conftest import process_config, short_directory
from tests.e2e.harness import BrokerProcess, Client, connected, running, turn
from tests.e2e.wire import frame, raw, request, rpc, upgraded

pytestmark = [pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]

ORIGIN = "https://app.example"
CONFIG = f"""
{process_config()}
[agents.ghost]
command = ["/no/such/agent", "--acp"]
[agents.quitter]
command = ["/bin/sh", "-c", "echo no licence found >&2; exit 3"]
max_restarts = 1
[agents.mute]
command = ["/bin/sleep", "1000"]
max_restarts = 0
[agents.babbler]
command = ["/bin/sh", "-c", "echo lost my key >&2; exec yes"]
max_restarts = 0
[session]
agent_init_timeout_s = 2
"""
FRONT = f'allowed_origins = ["{ORIGIN}"]\nhandshake_timeout_s = 1\nmax_message_bytes = 1_000_000\n'


class House(BrokerProcess):
    """The broker of this module, with a front door of its own."""

    def write_config(self, extra: str) -> None:
        super().write_config(extra)
        text = self.config_path.read_text().replace("[control]", f"{FRONT}[control]", 1)
        self.config_path.write_text(text)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house() -> AsyncIterator[BrokerProcess]:
    """One broker for all tests here."""
    with short_directory() as directory:
        async with running(directory, "process", CONFIG, kind=House) as broker:
            yield broker


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bystander(house: BrokerProcess) -> AsyncIterator[Any]:
    """Somebody else, who is in the middle of a conversation."""
    made = await house.session("bystander")
    async with connected(made["acp_url"], made["token"], Client()) as agent:
        session = await agent.new_session(cwd="/", mcp_servers=[])
        yield agent, session.session_id


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def nobody_else_notices(bystander: Any) -> AsyncIterator[None]:
    """After each test the bystander's conversation goes on."""
    yield
    agent, session_id = bystander
    assert (await turn(agent, session_id, "/slow 1 1", 10)).stop_reason == "end_turn"


# Settings


async def test_a_wrong_file_while_running_keeps_the_old_settings_and_says_so(house: BrokerProcess) -> None:
    refused = await house.metric('cortex_config_reloads_total{result="refused"}')
    applied = await house.metric('cortex_config_reloads_total{result="applied"}')
    house.write_config(CONFIG + '[agents.late]\ncommand = ["/bin/true"]\nprewram = "agent"\n')
    await until(lambda: house.metric('cortex_config_reloads_total{result="refused"}'), refused + 1)
    told = [event for event in house.log_events() if event["event"] == "reload_refused"][-1]
    assert "prewarm" in str(told)
    assert str(house.config_path) in str(told)
    problem = await house.refused("POST", "/v1/sessions", {"user": "ann", "agent": "late"})
    assert problem["code"] == "agent.unknown"
    assert "demo" in problem["hint"]
    house.write_config(CONFIG)
    await until(lambda: house.metric('cortex_config_reloads_total{result="applied"}'), applied + 1)


async def until(read: Any, wanted: float, limit_s: float = 10.0) -> None:
    """Waits for a figure to be reached."""
    async with asyncio.timeout(limit_s):
        while await read() < wanted:
            await asyncio.sleep(0.05)


# Bodies and names


@pytest.mark.parametrize(
    ("body", "code", "word"),
    [
        ({"user": ".."}, "user.invalid_id", "letter"),
        ({"user": "../../etc"}, "user.invalid_id", "letter"),
        ({"user": "a/b"}, "user.invalid_id", "letter"),
        ({"user": ""}, "user.invalid_id", "letter"),
        ({"user": "-rf"}, "user.invalid_id", "letter"),
        ({"user": "a\n"}, "user.invalid_id", "letter"),
        ({"user": "a\u0000"}, "user.invalid_id", "letter"),
        ({"user": "\u00e4nn"}, "user.invalid_id", "letter"),
        ({"user": "a" * 129}, "user.invalid_id", "128"),
        ({"user": "ann", "workspace": ".."}, "user.invalid_id", "letter"),
        ({"user": "ann", "workspace": ""}, "user.invalid_id", "letter"),
        ({"user": 7}, "request.invalid", "openapi"),
        ({"user": ["ann"]}, "request.invalid", "openapi"),
        ({}, "request.invalid", ""),
        ({"usr": "ann"}, "request.invalid", "user"),
        ({"user": "ann", "agnet": "demo"}, "request.invalid", "agent"),
        ({"user": "ann", "agent": "dmeo"}, "agent.unknown", "demo"),
        ({"user": "ann", "agent": "../demo"}, "request.invalid", ""),
        ({"user": "ann", "wait": "forever"}, "request.invalid", ""),
        ([], "request.invalid", ""),
        (b"{", "request.invalid", ""),
        (b"\xff\xfe", "request.invalid", ""),
        (b"[" * 100_000, "request.invalid", ""),
        (b'{"user": "' + b"a" * 1_100_000 + b'"}', "request.too_large", "max_body_bytes"),
    ],
)
async def test_a_wrong_body_is_refused_with_what_to_change(
    house: BrokerProcess, body: Any, code: str, word: str
) -> None:
    problem = await house.refused("POST", "/v1/sessions", body)
    assert problem["code"] == code
    assert word in problem["hint"], problem


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/v1/sessions/../main", "user.invalid_id"),
        ("GET", "/v1/sessions/%2e%2e/main", "user.invalid_id"),
        ("DELETE", "/v1/sessions/ann/%2e%2e", "user.invalid_id"),
        ("DELETE", "/v1/users/%2e%2e", "user.invalid_id"),
        ("DELETE", "/v1/users/..%2f..%2fetc", "user.invalid_id"),
        ("PUT", "/v1/users/%2e%2e%2f/config/mcp", "user.invalid_id"),
        ("PUT", "/v1/users/ann/config/..%2f..", "config.unknown_section"),
        ("PUT", "/v1/users/ann/config/mpc", "config.unknown_section"),
        ("GET", "/v1/sessions/nobody/main", "session.not_found"),
        ("DELETE", "/v1/sessions/nobody/main", "session.not_found"),
        ("POST", "/v1/sessions/nobody/main/tokens", "session.not_found"),
        ("POST", "/v1/sessions/nobody/main/prompt", "request.invalid"),
        ("GET", "/v1/sessions?limit=0", "request.invalid"),
        ("GET", "/v1/sessions?limmit=5", "request.invalid"),
        ("GET", "/v2/sessions", "request.not_found"),
        ("PATCH", "/v1/sessions", "request.method_not_allowed"),
    ],
)
async def test_a_wrong_path_is_refused(house: BrokerProcess, method: str, path: str, code: str) -> None:
    assert (await house.refused(method, path, {}))["code"] == code


@pytest.mark.parametrize(
    ("section", "value", "field"),
    [
        ("settings", {"modle": "x"}, "modle"),
        ("settings", {"model": 7}, "model"),
        ("mcp", {"mcpServers": {"a": {"comand": "x"}}}, "comand"),
        ("mcp", {"mcpServers": {"a": {"command": "x", "args": "not a list"}}}, "args"),
        ("mcp", {"mcpServers": {"a": {"command": "x", "env": {"A": 1}}}}, "A"),
        ("mcp", {"mcpServers": []}, "mcpServers"),
        ("plugins", {"plugin": []}, "plugin"),
        ("providers", {"anthropic": {"base_url": "file:///etc/passwd"}}, "base_url"),
        ("env", {"A": 1}, "A"),
        ("workspace", {"path": "../../../etc"}, "path"),
        ("egress", {"hosts": ["exa mple.org/x"]}, "hosts"),
        ("limits", {"memory_bytes": -1}, "memory_bytes"),
        ("limits", {"cpus": "all"}, "cpus"),
        ("limits", [], ""),
        ("limits", "text", ""),
    ],
)
async def test_a_wrong_section_is_refused_and_the_stored_one_stays(
    house: BrokerProcess, section: str, value: Any, field: str
) -> None:
    before = await house.api("GET", f"/v1/users/ann/config/{section}")
    problem = await house.refused("PUT", f"/v1/users/ann/config/{section}", value)
    assert problem["code"] in ("config.invalid_section", "request.invalid")
    assert field in json.dumps(problem.get("details")) + problem["title"], problem
    assert await house.api("GET", f"/v1/users/ann/config/{section}") == before


async def test_a_wrong_file_of_the_users_directory_is_told_and_the_last_good_one_used(house: BrokerProcess) -> None:
    folder = house.state_dir / "users" / "fil"
    folder.mkdir(parents=True)
    (folder / "env.toml").write_text('GREETING = "from a file"\n')
    await house.session("fil")
    (folder / "env.toml").write_text('GREETING = "from\n')
    async with asyncio.timeout(10):
        while not (view := await house.api("GET", "/v1/sessions/fil/main"))["warnings"]:
            await asyncio.sleep(0.05)
    assert "fil/env.toml" in str(view["warnings"])
    assert view["state"] == "ready"
    assert view["origins"]["env"] == "files"


# Who may come in


async def test_the_control_api_is_for_operators(house: BrokerProcess) -> None:
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {house.admin_token}"}):
        async with aiohttp.ClientSession(headers=header) as http:
            for path in ("/v1/sessions", "/v1/users/ann/config/env", "/v1/sessions/bystander/main"):
                async with http.get(house.control_url + path) as response:
                    assert response.status == 401
                    assert (await response.json())["code"] == "access.admin_required"
    headers = {"Authorization": f"Bearer {house.admin_token}", "Host": "evil.example"}
    async with (
        aiohttp.ClientSession(headers=headers) as http,
        http.get(f"{house.control_url}/v1/sessions") as response,
    ):
        assert (response.status, (await response.json())["code"]) == (403, "host.forbidden")


async def test_tokens_that_are_wrong_expired_or_revoked(house: BrokerProcess) -> None:
    made = await house.session("tok")
    url, good = made["acp_url"], made["token"]
    short = (await house.api("POST", "/v1/sessions/tok/main/tokens", {"ttl_s": 1}))["token"]
    expires = time.time() + 1.1
    head, _, secret = good.rpartition(".")
    forged = {
        "": "token.missing",
        "x": "token.invalid",
        good[:-1]: "token.invalid",
        f"{head}.{'A' * len(secret)}": "token.invalid",
        (await house.session("eve"))["token"].rpartition(".")[0] + "." + secret: "token.invalid",
        house.admin_token: "token.invalid",
    }
    for token, code in forged.items():
        async with raw(url, request(token)) as client:
            assert (await client.refusal())["code"] == code, token
    await asyncio.sleep(max(0.0, expires - time.time()))
    async with raw(url, request(short)) as client:
        assert (await client.refusal())["code"] == "token.expired"
    await house.api("DELETE", "/v1/sessions/tok/main/tokens")
    async with raw(url, request(good)) as client:
        assert (await client.refusal())["code"] == "token.revoked"


async def test_a_token_opens_its_own_session_whatever_else_is_asked(house: BrokerProcess) -> None:
    mine, other = await house.session("own"), await house.session("other")
    path = "/acp?user=other&session=" + other["session"]
    async with raw(mine["acp_url"], request(mine["token"], path=path, Cortex_Session=other["session"])) as client:
        status, fields = await client.head()
    assert (status, fields["cortex-session"]) == (101, mine["session"])


async def test_wrong_origins_and_hosts(house: BrokerProcess) -> None:
    made = await house.session("web")
    url, token = made["acp_url"], made["token"]
    for origin in ("https://evil.example", ORIGIN + ".evil.example", "http://app.example", ORIGIN + "/", "null"):
        async with raw(url, request(token, Origin=origin)) as client:
            problem = await client.refusal()
        assert problem["code"] == "origin.forbidden"
        assert "allowed_origins" in problem["hint"]
    async with raw(url, request(token, host="evil.example")) as client:
        assert (await client.refusal())["code"] == "host.forbidden"
    async with raw(url, request(token, Origin=ORIGIN)) as client:
        assert (await client.head())[0] == 101
    protocols = f"acp.v1, bearer.{token}"
    async with raw(url, request(Origin="https://evil.example", Sec_WebSocket_Protocol=protocols)) as client:
        assert (await client.head())[0] == 101
        code, reason = await client.closed()
    assert (code, reason.partition(":")[0]) == (4403, "origin.forbidden")


# Handshakes and frames


async def test_half_a_handshake_is_given_up_and_a_crowd_of_them_is_no_crowd(house: BrokerProcess) -> None:
    made = await house.session("half")
    crowd = [await asyncio.open_connection("127.0.0.1", house.front_port) for _ in range(200)]
    for _, writer in crowd:
        writer.write(request("x")[:50])
    async with connected(made["acp_url"], made["token"], Client()) as agent:
        await agent.new_session(cwd="/", mcp_servers=[])
    async with asyncio.timeout(10):
        answers = await asyncio.gather(*(reader.read() for reader, _ in crowd))
    for answer, (_, writer) in zip(answers, crowd, strict=True):
        assert answer.startswith(b"HTTP/1.1 408 ")
        writer.close()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        (b"GET /acp HTTP/1.1\r\nX: " + b"y" * 70_000, 431),
        (b"GET /acp\r\n\r\n", 400),
        (b"GET /acp HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 426),
        (b"POST /acp HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n{}", 400),
        (request("x", Sec_WebSocket_Version="7"), 400),
        (request("x", Sec_WebSocket_Key="short"), 400),
        (request("x", path="/../etc/passwd"), 404),
        (request("x\r\nX-Two: 1"), 401),
    ],
)
async def test_what_is_no_handshake_is_refused(house: BrokerProcess, data: bytes, status: int) -> None:
    async with raw(house.front_url, data) as client:
        assert (await client.refusal())["status"] == status


BIG = 1_000_000
TEXT, BINARY, CONTINUATION, CLOSE, PING = 1, 2, 0, 8, 9


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(b"x", length=BIG + 1), 1009),
        (frame(b"x", length=2**40), 1009),
        (frame(b"x", length=2**63 - 1), 1009),
        (frame(bytes(600_000), BINARY, fin=False) + frame(bytes(600_000), CONTINUATION), 1009),
        (frame(b"{}", rsv=4), 1002),
        (frame(b"{}", rsv=2), 1002),
        (frame(b"{}", rsv=1), 1002),
        (frame(b"{}", masked=False), 1002),
        (frame(b"{}", 3), 1002),
        (frame(b"{}", 11), 1002),
        (frame(b"{}", CONTINUATION), 1002),
        (frame(b"{", fin=False) + frame(b"}"), 1002),
        (frame(b"", PING, fin=False), 1002),
        (frame(bytes(126), PING), 1002),
        (frame(b"\x03", CLOSE), 1002),
        (frame(b"\x00\x00", CLOSE), 1002),
        (frame(b"\xff\xfe\xfd"), 1007),
    ],
)
async def test_a_frame_that_breaks_the_rules_ends_its_own_connection(
    house: BrokerProcess, data: bytes, code: int
) -> None:
    made = await house.session("frames")
    async with (
        upgraded(made["acp_url"], made["token"], initialize=True) as good,
        upgraded(made["acp_url"], made["token"]) as bad,
    ):
        await bad.send(data)
        got, reason = await bad.closed()
        assert got == code, reason
        await bad.send(frame(code.to_bytes(2, "big"), CLOSE))
        await bad.ended()
        await good.send(rpc("session/new", {"cwd": "/", "mcpServers": []}, "new"))
        assert (await good.answer("new"))["result"]["sessionId"]


@pytest.mark.parametrize(
    "text",
    [
        b"\x00\x01\x02",
        b"no json",
        b"",
        b"null",
        b"[]",
        b"{}",
        b'"text"',
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b'{"jsonrpc":"2.0","id":1}',
        b'{"jsonrpc":"2.0","id":{"a":1},"method":"session/new"}',
        b'{"jsonrpc":"2.0","id":1,"method":7}',
        b'{"jsonrpc":"2.0","id":1,"method":"session/new","params":[]}',
        b'{"jsonrpc":"2.0","id":1,"method":"session/new","params":{"cwd":7}}',
        b'{"jsonrpc":"2.0","id":1,"method":"session/prompt","params":{"sessionId":"../../x","prompt":[]}}',
        b'{"jsonrpc":"2.0","id":1,"method":"session/prompt","params":{"sessionId":[1],"prompt":7}}',
        b'{"jsonrpc":"2.0","id":1,"method":"session/load","params":{"sessionId":"../../../etc","cwd":"/"}}',
        b'{"jsonrpc":"2.0","id":1,"method":"session/cancel","params":null}',
        b'{"jsonrpc":"2.0","id":1,"method":"no/such","params":{}}',
        b'{"jsonrpc":"2.0","id":1,"method":"authenticate","params":{"methodId":"x"}}',
        b'{"jsonrpc":"2.0","id":1,"method":"_cortex/nothing","params":{"epoch":"x"}}',
        b'{"jsonrpc":"2.0","id":1,"method":"session/new","params":{"cwd":"\\ud800","mcpServers":[]}}',
        b'{"jsonrpc":"2.0","id":1e400,"method":"session/new","params":{}}',
        b'{"jsonrpc":"2.0","id":NaN,"method":"session/list","params":{}}',
        b'{"jsonrpc":"2.0","id":' + b"9" * 5000 + b',"method":"session/list","params":{}}',
        b'{"jsonrpc":"2.0","id":1,"method":"' + b"m" * 500_000 + b'","params":{}}',
        b'{"jsonrpc":"2.0","method":"session/prompt","params":{}}',
        b'{"jsonrpc":"2.0","id":4711,"result":{}}',
        b'{"jsonrpc":"2.0","id":4711,"error":"none"}',
    ],
    ids=lambda text: text[:48].decode(),
)
async def test_a_message_that_makes_no_sense_hurts_only_its_sender(house: BrokerProcess, text: bytes) -> None:
    made = await house.session("messages")
    pid = (await house.api("GET", "/v1/sessions/messages/main"))["sandbox"]["agent_pid"]
    async with upgraded(made["acp_url"], made["token"], initialize=True) as client:
        await client.send(frame(text, BINARY if text.startswith(b"\0") else TEXT))
        await client.send(rpc("session/new", {"cwd": "/", "mcpServers": []}, "after"))
        try:
            assert (await client.answer("after"))["result"]["sessionId"]
        except (AssertionError, asyncio.IncompleteReadError):
            pytest.fail("the connection ended")
    after = await house.api("GET", "/v1/sessions/messages/main")
    assert (after["state"], after["sandbox"]["agent_pid"]) == ("ready", pid)


# Agents that do not work


@pytest.mark.parametrize(
    ("agent", "code", "words"),
    [
        ("ghost", "agent.not_in_image", ["/no/such/agent"]),
        ("quitter", "agent.failed", ["no licence found"]),
        ("mute", "agent.failed", ["initialize"]),
        ("babbler", "agent.failed", ["initialize", "lost my key"]),
    ],
)
async def test_an_agent_that_does_not_work_is_told_to_all_who_look(
    house: BrokerProcess, agent: str, code: str, words: list[str]
) -> None:
    user = f"user-{agent}"
    problem = await house.refused("POST", "/v1/sessions", {"user": user, "agent": agent, "wait": "ready"})
    assert problem["code"] == code
    assert all(word in json.dumps(problem) for word in words), problem
    async with asyncio.timeout(10):
        while (view := await house.api("GET", f"/v1/sessions/{user}/main"))["state"] == "stopping":
            await asyncio.sleep(0.05)
    assert view["state"] == "failed"
    assert all(word in view["reason"] for word in words)
    token = (await house.api("POST", f"/v1/sessions/{user}/main/tokens", {}))["token"]
    async with upgraded(f"{house.front_url}/acp", token) as client:
        close, reason = await client.closed()
    assert (close, reason.partition(":")[0]) == (1011, code)
