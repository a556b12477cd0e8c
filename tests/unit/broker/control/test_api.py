"""The control API as its clients see it."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest

from broker.control import requests
from broker.errors import Code, CortexError
from tests.unit.broker.control.conftest import ADMIN, Api


async def test_create_is_idempotent_and_lets_a_client_attach(api: Api) -> None:
    status, first = await api.call("POST", "/v1/sessions", {"user": "alice"})
    again, second = await api.call("POST", "/v1/sessions", {"user": "alice", "workspace": "main", "agent": "demo"})
    assert (status, again) == (201, 200)
    assert first["session"] == second["session"]
    assert (first["user"], first["workspace"], first["agent"]) == ("alice", "main", "demo")
    assert first["acp_url"] == "ws://127.0.0.1:1/acp"
    grant = await api.access.verify(first["token"])
    assert (grant.user, grant.workspace) == ("alice", "main")
    assert first["token"] != second["token"]


async def test_create_brings_the_session_up_without_waiting(api: Api) -> None:
    session, _ = await api.registry.create("alice", "main", None)
    session.gate.clear()
    session.woken = 0
    _, told = await api.call("POST", "/v1/sessions", {"user": "alice"})
    assert (told["state"], session.woken) == ("stopped", 1)
    session.gate.set()
    _, told = await api.call("POST", "/v1/sessions", {"user": "alice", "wait": "ready"})
    assert told["state"] == "ready"


async def test_waiting_for_a_session_that_fails_says_why(api: Api) -> None:
    session, _ = await api.registry.create("alice", "main", None)
    session.broken = CortexError(Code.IMAGE_MISSING, "no image", hint="make image")
    status, told = await api.call("POST", "/v1/sessions", {"user": "alice", "wait": "ready"})
    assert (status, told["code"], told["hint"]) == (503, "sandbox.image_missing", "make image")
    status, _ = await api.call("POST", "/v1/sessions", {"user": "alice"})
    assert status == 200


async def test_a_websocket_agent_is_attached_at_raw(api: Api) -> None:
    _, told = await api.call("POST", "/v1/sessions", {"user": "alice", "agent": "raw"})
    assert told["acp_url"] == "ws://127.0.0.1:1/raw"


@pytest.mark.parametrize(
    ("body", "code", "where"),
    [
        ({}, "request.invalid", "user"),
        ({"user": ".."}, "user.invalid_id", "user"),
        ({"user": "a" * 129}, "user.invalid_id", "user"),
        ({"user": "a\n"}, "user.invalid_id", "user"),
        ({"user": "a", "workspace": "a/b"}, "user.invalid_id", "workspace"),
        ({"user": "a", "wrkspace": "b"}, "request.invalid", 'did you mean "workspace"?'),
        ({"user": 7}, "request.invalid", "user"),
        ([], "request.invalid", ""),
    ],
)
async def test_a_wrong_body_is_refused_by_name(api: Api, body: object, code: str, where: str) -> None:
    status, told = await api.call("POST", "/v1/sessions", body)
    assert (status, told["code"]) == (400, code)
    assert where in told["title"] + told["hint"]
    assert api.registry.creates == 0


async def test_unknown_agent_and_other_agent(api: Api) -> None:
    status, told = await api.call("POST", "/v1/sessions", {"user": "a", "agent": "nope"})
    assert (status, told["code"]) == (422, "agent.unknown")
    await api.call("POST", "/v1/sessions", {"user": "a"})
    status, told = await api.call("POST", "/v1/sessions", {"user": "a", "agent": "other"})
    assert (status, told["code"]) == (409, "session.conflict")


async def test_body_over_the_limit_and_body_that_is_not_json(api: Api) -> None:
    headers = {"Authorization": f"Bearer {ADMIN}"}
    async with api.http.post(
        f"{api.url}/v1/sessions", data=io.BytesIO(b" " * (2**20 + 1)), headers=headers
    ) as response:
        assert (response.status, (await response.json(content_type=None))["code"]) == (413, "request.too_large")
    async with api.http.post(f"{api.url}/v1/sessions", data=b"{", headers=headers) as response:
        assert (response.status, (await response.json(content_type=None))["code"]) == (400, "request.invalid")


async def test_pages_of_sessions(api: Api) -> None:
    for user in ("a", "b", "c"):
        await api.registry.create(user, "main", None)
    _, first = await api.call("GET", "/v1/sessions?limit=2")
    _, second = await api.call("GET", f"/v1/sessions?limit=2&after={first['next']}")
    assert [one["user"] for one in first["sessions"] + second["sessions"]] == ["a", "b", "c"]
    assert second["next"] == ""
    status, _ = await api.call("GET", "/v1/sessions?limit=0")
    assert status == 400


async def test_show_stop_timeline_delete(api: Api) -> None:
    path = "/v1/sessions/alice/main"
    status, told = await api.call("GET", path)
    assert (status, told["code"]) == (404, "session.not_found")
    created = (await api.call("POST", "/v1/sessions", {"user": "alice", "wait": "ready"}))[1]
    assert (await api.call("GET", path))[1]["state"] == "ready"
    assert (await api.call("POST", f"{path}/stop"))[1]["state"] == "stopped"
    assert (await api.call("GET", f"{path}/timeline"))[1]["bringups"][0]["stages"][0]["ms"] == 12.5
    assert (await api.call("DELETE", path))[1]["deleted"] is True
    assert (await api.call("DELETE", path))[0] == 404
    with pytest.raises(CortexError, match="revoked"):
        await api.access.verify(created["token"])


async def test_prewarm_says_that_somebody_comes_and_is_no_use(api: Api) -> None:
    status, told = await api.call("POST", "/v1/sessions/alice/main/prewarm")
    assert (status, told["accepted"]) == (202, True)
    session = api.registry.sessions["alice", "main"]
    assert (session.announced, session.woken) == (1, 0)


async def test_tokens_tickets_and_revoking(api: Api) -> None:
    await api.registry.create("alice", "main", None)
    path = "/v1/sessions/alice/main/tokens"
    status, token = await api.call("POST", path, {"ttl_s": 60})
    assert status == 201
    assert (await api.access.verify(token["token"])).expires_at == pytest.approx(api.clock[0] + 60, abs=1)
    _, ticket = await api.call("POST", path, {"kind": "ticket"})
    assert (await api.access.redeem(ticket["token"])).user == "alice"
    await api.call("POST", path, {"kind": "ticket"})
    _, told = await api.call("DELETE", path)
    assert told == {"revoked": 2, "closed": 0}
    assert api.registry.sessions["alice", "main"].closed[0][0] == 4401
    with pytest.raises(CortexError) as caught:
        await api.access.verify(token["token"])
    assert caught.value.code is Code.TOKEN_REVOKED


async def test_section_round_trip_says_when_it_takes_effect(api: Api) -> None:
    path = "/v1/users/alice/config/mcp"
    assert (await api.call("GET", path))[1] == {"user": "alice", "section": "mcp", "value": {}, "version": 0}
    value = {"mcpServers": {"everything": {"command": "npx", "args": ["-y", "pkg"]}}}
    status, told = await api.call("PUT", path, value)
    assert (status, told["version"], told["effect"], told["applied"]) == (200, 1, "next_start", [])
    await api.call("POST", "/v1/sessions", {"user": "alice", "wait": "ready"})
    _, told = await api.call("PUT", path, value)
    assert (told["version"], told["effect"]) == (2, "next_session")
    assert told["applied"] == [
        {"workspace": "main", "state": "applied", "effect": {"mcp": "next_session"}, "error": None}
    ]
    assert (await api.call("GET", path))[1]["value"] == value


async def test_wrong_section_stores_nothing(api: Api) -> None:
    status, told = await api.call("PUT", "/v1/users/alice/config/mpc", {})
    assert (status, told["code"]) == (404, "config.unknown_section")
    assert "mcp" in told["hint"]
    status, told = await api.call("PUT", "/v1/users/alice/config/mcp", {"mcpServers": {"x": {"comand": "y"}}})
    assert (status, told["code"]) == (422, "config.invalid_section")
    assert (await api.call("PUT", "/v1/users/alice/config/mcp", [1]))[0] == 400
    assert (await api.call("GET", "/v1/users/alice/config/mcp"))[1]["version"] == 0


async def test_erasing_a_user(api: Api) -> None:
    _, created = await api.call("POST", "/v1/sessions", {"user": "alice"})
    await api.call("PUT", "/v1/users/alice/config/env", {"A": "b"})
    await api.call("PUT", "/v1/users/bob/config/env", {"A": "b"})
    assert (await api.call("DELETE", "/v1/users/alice"))[1] == {"user": "alice", "sessions": 1}
    assert (await api.call("GET", "/v1/users/alice/config/env"))[1]["version"] == 0
    assert (await api.call("GET", "/v1/users/bob/config/env"))[1]["version"] == 1
    with pytest.raises(CortexError) as caught:
        await api.access.verify(created["token"])
    assert caught.value.code is Code.TOKEN_INVALID


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer"}, {"Authorization": f"Basic {ADMIN}"}, {"Authorization": f"Bearer {ADMIN}x"}],
)
async def test_only_operators_may_call(api: Api, headers: dict[str, str]) -> None:
    for method, path in (("GET", "/v1/sessions"), ("DELETE", "/v1/users/alice"), ("POST", "/v1/sessions")):
        status, told = await api.call(method, path, headers=headers)
        assert (status, told["code"]) == (401, "access.admin_required")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "", "localhost@evil.example"])
async def test_a_rebound_host_is_refused_everywhere(api: Api, host: str) -> None:
    for path in ("/livez", "/metrics", "/v1/sessions"):
        status, told = await api.call("GET", path, headers={"Host": host, "Authorization": f"Bearer {ADMIN}"})
        assert (status, told["code"]) == (403, "host.forbidden")


async def test_the_unix_socket_needs_no_token(api: Api, tmp_path: Path) -> None:
    connector = aiohttp.UnixConnector(str(tmp_path / "c.sock"))
    async with (
        aiohttp.ClientSession(connector=connector) as http,
        http.get("http://anything/v1/sessions") as response,
    ):
        assert response.status == 200


async def test_the_unix_socket_trusts_nobody_else(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.control.middleware.trusted_uids", lambda: frozenset({4_000_000}))
    connector = aiohttp.UnixConnector(str(tmp_path / "c.sock"))
    async with aiohttp.ClientSession(connector=connector) as http:
        async with http.get("http://x/v1/sessions") as response:
            assert response.status == 401
        async with http.get("http://x/v1/sessions", headers={"Authorization": f"Bearer {ADMIN}"}) as response:
            assert response.status == 200


async def raw_request(url: str, head: str) -> bytes:
    """Sends a request as it is written, which client libraries would tidy up."""
    host = urlsplit(url)
    reader, writer = await asyncio.open_connection(host.hostname, host.port)
    writer.write(head.encode())
    async with asyncio.timeout(5):
        data = await reader.read()
    writer.close()
    return data


@pytest.mark.parametrize("user", ["..", "%2e%2e", ".hidden", "a%2Fb", "a%00"])
async def test_a_path_that_climbs_names_no_user(api: Api, user: str) -> None:
    head = f"GET /v1/users/{user}/config/env HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    answer = await raw_request(api.url, f"{head}Authorization: Bearer {ADMIN}\r\n\r\n")
    assert b" 400 " in answer.split(b"\r\n")[0] or b" 404 " in answer.split(b"\r\n")[0]
    assert b'"value"' not in answer


async def test_no_route_wrong_method_and_crash_are_problems(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    status, told = await api.call("GET", "/nope")
    assert (status, told["status"], told["code"]) == (404, 404, "request.not_found")
    status, told = await api.call("PATCH", "/v1/sessions")
    assert (status, told["status"], told["code"]) == (405, 405, "request.method_not_allowed")

    async def crash(**_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(api.registry, "list", crash)
    status, told = await api.call("GET", "/v1/sessions")
    assert (status, told["code"]) == (500, "broker.internal")
    assert "secret" not in str(told)


async def test_health_and_metrics(api: Api) -> None:
    assert (await api.call("GET", "/livez", headers={}))[0] == 200
    assert (await api.call("GET", "/readyz", headers={})) == (200, {"status": "ok", "checks": {}})
    assert (await api.call("GET", "/readyz?verbose", headers={}))[1]["checks"] == {"store": "ok"}
    api.health["gateway"] = "not connected"
    status, told = await api.call("GET", "/readyz", headers={})
    assert (status, told["checks"]) == (503, {"store": "ok", "gateway": "not connected"})
    assert (await api.call("GET", "/livez", headers={}))[0] == 200
    async with api.http.get(f"{api.url}/metrics") as response:
        assert "cortex_store_reads_total" in await response.text()


async def test_a_body_that_does_not_come_is_not_waited_for(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "BODY_TIMEOUT_S", 0.1)
    head = f"POST /v1/sessions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {ADMIN}\r\n"
    host = urlsplit(api.url)
    reader, writer = await asyncio.open_connection(host.hostname, host.port)
    writer.write(f"{head}Content-Length: 10\r\n\r\n{{".encode())
    async with asyncio.timeout(5):
        assert b" 400 " in await reader.readline()
        await reader.readuntil(b"did not arrive")
    writer.transport.abort()
