"""The web app's hook."""

from __future__ import annotations

import json

import pytest

from broker.errors import Code, CortexError
from tests.unit.broker.control.conftest import HOOK_KEY, Api, sign


async def test_a_signed_hook_creates_a_session(api: Api) -> None:
    status, told = await api.hook({"user": "alice"})
    assert (status, told["user"], told["acp_url"]) == (201, "alice", "ws://127.0.0.1:1/acp")
    assert (await api.access.verify(told["token"])).user == "alice"


async def test_a_replay_is_told_the_same_and_changes_nothing(api: Api) -> None:
    _, first = await api.hook({"user": "alice"})
    api.clock[0] += 120
    status, second = await api.hook({"user": "alice"})
    assert (status, second["token"], second["expires_at"]) == (200, first["token"], first["expires_at"])
    assert api.registry.creates == 1
    _, other = await api.hook({"user": "alice"}, hook_id="msg_2")
    assert other["token"] != first["token"]


async def test_a_replay_revives_neither_session_nor_token(api: Api) -> None:
    _, first = await api.hook({"user": "alice"})
    await api.call("DELETE", "/v1/sessions/alice/main/tokens")
    _, again = await api.hook({"user": "alice"})
    status, told = await api.call("GET", "/v1/sessions", headers={"Authorization": f"Bearer {again['token']}"})
    assert again["token"] == first["token"]
    with pytest.raises(Exception, match="revoked"):
        await api.access.verify(again["token"])
    await api.registry.delete("alice", "main")
    status, told = await api.hook({"user": "alice"})
    assert (status, told["code"]) == (404, "session.not_found")


async def test_an_id_used_again_for_another_body(api: Api) -> None:
    await api.hook({"user": "alice"})
    status, told = await api.hook({"user": "bob"})
    assert (status, told["code"]) == (409, "hook.id_reused")
    assert api.registry.held("bob", "main") is None


@pytest.mark.parametrize("seconds", [-301, 301])
async def test_outside_the_tolerance(api: Api, seconds: int) -> None:
    status, told = await api.hook({"user": "alice"}, at=api.clock[0] + seconds)
    assert (status, told["code"]) == (401, "hook.outside_tolerance")
    assert api.registry.creates == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"webhook-signature": ""},
        {"webhook-signature": "v1,"},
        {"webhook-signature": "v1a,AAAA"},
        {"webhook-id": "msg_2"},
        {"webhook-id": "msg.1"},
        {"webhook-id": ""},
        {"webhook-timestamp": "1e9"},
        {"webhook-timestamp": "-1"},
        {"webhook-timestamp": ""},
    ],
)
async def test_a_wrong_signature_has_no_effect(api: Api, changes: dict[str, str]) -> None:
    status, told = await api.hook({"user": "alice"}, **changes)
    assert (status, told["code"]) == (401, "hook.bad_signature")
    assert api.registry.creates == 0


async def test_another_key_does_not_sign(api: Api) -> None:
    raw = json.dumps({"user": "alice"}).encode()
    headers = sign(raw, "m", api.clock[0], key=HOOK_KEY + b"x")
    async with api.http.post(f"{api.url}/v1/hooks/session", data=raw, headers=headers) as response:
        assert response.status == 401


async def test_a_hook_pre_warms_and_stops(api: Api) -> None:
    for _ in range(2):
        assert (await api.hook({"user": "a", "action": "prewarm"}, hook_id="1"))[0] == 202
    session = api.registry.sessions["a", "main"]
    assert (session.announced, session.woken) == (1, 0)
    assert (await api.hook({"user": "a", "action": "stop"}, hook_id="2"))[0] == 202
    assert (await api.hook({"user": "a", "action": "stop"}, hook_id="2"))[0] == 202
    assert api.registry.sessions["a", "main"].stops == 1
    assert (await api.hook({"user": "a", "action": "delete"}, hook_id="3"))[0] == 400


async def test_a_hook_secret_opens_nothing_else(api: Api) -> None:
    raw = b"{}"
    headers = sign(raw, "m", api.clock[0])
    for method, path in (("GET", "/v1/sessions"), ("DELETE", "/v1/users/a"), ("GET", "/v1/users/a/config/env")):
        assert (await api.call(method, path, headers=headers))[0] == 401


@pytest.mark.parametrize("stranger", ["msg\udc80", "msg\u00e9"])
async def test_an_id_of_odd_bytes_does_not_pass_for_the_one_that_was_signed(api: Api, stranger: str) -> None:
    """Whatever replaces such bytes must not make a captured call a new one."""
    raw = json.dumps({"user": "alice"}).encode()
    for signed in (
        stranger.encode(errors="replace").decode(),
        stranger.encode(errors="surrogateescape").decode("latin-1"),
    ):
        headers = sign(raw, signed, api.clock[0]) | {"webhook-id": stranger}
        with pytest.raises(CortexError) as caught:
            api.access.verify_hook(headers, raw)
        assert caught.value.code is Code.HOOK_SIGNATURE
