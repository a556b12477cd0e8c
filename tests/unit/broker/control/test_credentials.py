"""Credentials through the control API: in, never out."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from broker.config import Config
from broker.control.openapi import document
from broker.control.table import ROUTES
from broker.store.vault import Vault
from tests.unit.broker.control.conftest import Api

CANARY = "sk-canary-4f1d9a"
P = "/v1/users/ann/credentials"


@pytest.fixture
def told(api: Api, monkeypatch: pytest.MonkeyPatch) -> Api:
    """The API with two providers, of which one takes token sets."""
    config = Config.model_validate(
        {
            "gateway": {
                "providers": {
                    "anthropic": {"kind": "anthropic", "base_url": "https://a.example"},
                    "openai": {
                        "kind": "openai",
                        "base_url": "https://o.example",
                        "oauth": {"token_url": "https://auth.example/token", "client_id": "c"},
                    },
                }
            }
        }
    )
    # The handlers ask for the settings of the moment.
    object.__setattr__(api.control, "config", lambda: config)
    return api


def vault(api: Api) -> Vault:
    assert api.control.keeper is not None
    return api.control.keeper.vault


async def stored(api: Api, provider: str) -> Any:
    entry = await vault(api).get("ann", provider)
    assert entry is not None
    return entry.secret


async def test_what_goes_in_never_comes_out(told: Api) -> None:
    with capture_logs() as logs:
        status, put = await told.call("PUT", f"{P}/anthropic", {"value": f" {CANARY}\n"})
        assert status == 200
        assert (await stored(told, "anthropic")).value == CANARY
        _, shown = await told.call("GET", f"{P}/anthropic")
        _, listed = await told.call("GET", P)
    assert (put["kind"], put["mode"], put["user"], put["provider"]) == ("api_key", "gateway", "ann", "anthropic")
    assert put["effect"] == "next_start"
    assert len(put["fingerprint"]) == 16
    assert shown == listed["credentials"][0]
    assert {key: put[key] for key in shown} == shown
    assert shown["expires_at"] is None
    assert shown["created_at"].startswith("20")
    assert CANARY not in json.dumps([put, shown, listed, logs])


async def test_running_sessions_have_it_when_it_is_answered(told: Api) -> None:
    session, _ = await told.registry.create("ann", "main", None)
    await session.wait_ready()
    _, put = await told.call("PUT", f"{P}/anthropic", {"value": CANARY})
    assert put["applied"] == [
        {"workspace": "main", "state": "applied", "effect": {"credentials": "next_session"}, "error": None}
    ]
    _, deleted = await told.call("DELETE", f"{P}/anthropic")
    assert (deleted["deleted"], deleted["effect"]) == (True, "next_session")
    assert deleted["applied"][0]["state"] == "applied"


async def test_a_credential_that_is_not_there(told: Api) -> None:
    for method in ("GET", "DELETE"):
        status, problem = await told.call(method, f"{P}/anthropic")
        assert (status, problem["code"]) == (404, "credential.not_found")
    assert (await told.call("GET", P))[1] == {"credentials": []}


async def test_one_of_a_provider_that_left_the_settings_can_still_be_seen_and_erased(told: Api) -> None:
    await told.call("PUT", f"{P}/anthropic", {"value": CANARY})
    object.__setattr__(told.control, "config", lambda: Config())
    assert (await told.call("GET", f"{P}/anthropic"))[0] == 200
    status, problem = await told.call("PUT", f"{P}/anthropic", {"value": CANARY})
    assert (status, problem["code"]) == (404, "gateway.unknown_provider")
    assert (await told.call("DELETE", f"{P}/anthropic"))[0] == 200


async def test_a_provider_that_is_misspelt_is_told_its_name(told: Api) -> None:
    status, problem = await told.call("PUT", f"{P}/antropic", {"value": CANARY})
    assert (status, problem["hint"]) == (404, 'did you mean "anthropic"?')


async def test_token_sets_keep_what_is_needed_and_when_they_expire(told: Api) -> None:
    value = {"access_token": "at", "refresh_token": "rt", "expires_at": 2e9, "scopes": ["a"], "account_id": "acc"}
    _, put = await told.call("PUT", f"{P}/openai", {"kind": "oauth", "value": value})
    assert put["expires_at"] == "2033-05-18T03:33:20Z"
    assert (await stored(told, "openai")).value == {"access_token": "at", "refresh_token": "rt", "account_id": "acc"}


async def test_a_credential_file_is_kept_byte_for_byte(told: Api) -> None:
    text = '{ "claudeAiOauth": {"accessToken": "x"},\n "n": 1.10 }\n'
    _, put = await told.call("PUT", f"{P}/anthropic", {"kind": "file", "value": text})
    assert put["mode"] == "file"
    assert (await stored(told, "anthropic")).value == text
    await told.call("PUT", f"{P}/anthropic", {"kind": "file", "value": {"a": 1}})
    assert json.loads((await stored(told, "anthropic")).value) == {"a": 1}


BAD: list[tuple[str, Any, str]] = [
    ("anthropic", {"value": ""}, "one line"),
    ("anthropic", {"value": f"{CANARY}\n{CANARY}"}, "one line"),
    ("anthropic", {"value": f"{CANARY}ü"}, "printable"),
    ("anthropic", {"value": CANARY * 2000}, "one line"),
    ("anthropic", {"value": {"key": CANARY}}, "one line"),
    ("anthropic", {"value": CANARY, "mode": "file"}, "mode gateway"),
    ("anthropic", {"kind": "file", "value": {"a": CANARY}, "mode": "gateway"}, "mode file"),
    ("anthropic", {"kind": "file", "value": CANARY}, "JSON object"),
    ("anthropic", {"kind": "file", "value": f'["{CANARY}"]'}, "JSON object"),
    ("anthropic", {"kind": "file", "value": {}}, "JSON object"),
    ("anthropic", {"kind": "file", "value": {"a": CANARY + "x" * 200_000}}, "bytes at most"),
    ("anthropic", {"kind": "oauth", "value": {"access_token": CANARY}}, "takes no token sets"),
    ("openai", {"kind": "oauth", "value": CANARY}, "not valid"),
    ("openai", {"kind": "oauth", "value": {"acess_token": CANARY}}, "not valid"),
    ("openai", {"kind": "oauth", "value": {"access_token": CANARY + "\n"}}, "one line"),
    ("openai", {"kind": "oauth", "value": {"access_token": CANARY, "refresh_token": ""}}, "one line"),
    ("openai", {"kind": "oauth", "value": {"access_token": CANARY, "token_type": "mac"}}, "bearer"),
    ("openai", {"kind": "oauth", "value": {"access_token": CANARY, "expires_at": 2e12}}, "expires_at"),
    ("openai", {"kind": "oauth", "value": {"access_token": CANARY, "account_id": "a\nb"}}, "account_id"),
]


@pytest.mark.parametrize(("provider", "sent", "why"), BAD)
async def test_what_can_be_no_credential_is_refused_and_not_quoted(
    told: Api, provider: str, sent: dict[str, Any], why: str
) -> None:
    with capture_logs() as logs:
        status, problem = await told.call("PUT", f"{P}/{provider}", sent)
    assert (status, problem["code"]) == (422, "credential.invalid")
    assert why in problem["title"]
    assert problem["hint"]
    assert CANARY not in json.dumps([problem, logs])
    assert await vault(told).list("ann") == []


@pytest.mark.parametrize("sent", [{}, {"value": None}, {"value": CANARY, "kind": CANARY}, {"valeu": CANARY}, [CANARY]])
async def test_a_malformed_body_is_refused_and_not_quoted(told: Api, sent: Any) -> None:
    status, problem = await told.call("PUT", f"{P}/anthropic", sent)
    assert (status, problem["code"]) == (400, "request.invalid")
    assert CANARY not in json.dumps(problem)


async def test_credentials_are_operators_business(told: Api) -> None:
    for method, path in (("GET", P), ("PUT", f"{P}/anthropic"), ("GET", "/v1/vault"), ("POST", "/v1/vault/rotate")):
        status, problem = await told.call(method, path, headers={})
        assert (status, problem["code"]) == (401, "access.admin_required")


async def test_erasing_a_user_erases_the_credentials(told: Api) -> None:
    for user in ("ann", "bob"):
        await told.call("PUT", f"/v1/users/{user}/credentials/anthropic", {"value": CANARY})
        assert len(await vault(told).list(user)) == 1
    assert (await told.call("DELETE", "/v1/users/ann"))[0] == 200
    assert await vault(told).list("ann") == []
    assert len(await vault(told).list("bob")) == 1


async def test_keys_are_shown_by_id_and_rotated(told: Api, tmp_path: Path) -> None:
    await told.call("PUT", f"{P}/anthropic", {"value": CANARY})
    _, before = await told.call("GET", "/v1/vault")
    assert [key["sealed"] for key in before["keys"]] == [1]
    _, done = await told.call("POST", "/v1/vault/rotate")
    assert (done["sealed"], done["refused"], done["dropped"]) == (1, 0, [before["keys"][0]["id"]])
    _, after = await told.call("GET", "/v1/vault")
    assert after["keys"] == [{"id": done["key"], "sealed": 1}]
    assert (await stored(told, "anthropic")).value == CANARY
    file = tmp_path / "state" / "vault.key"
    assert after["key_file"] == str(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    secret = file.read_text().splitlines()[-1]
    assert secret not in json.dumps([before, done, after])


async def test_there_is_no_vault_without_isolation(told: Api) -> None:
    object.__setattr__(told.control, "keeper", None)
    for method, path in (("GET", P), ("GET", f"{P}/anthropic"), ("GET", "/v1/vault"), ("POST", "/v1/vault/rotate")):
        status, problem = await told.call(method, path)
        assert (status, problem["code"]) == (503, "sandbox.isolation_missing")
    assert (await told.call("PUT", f"{P}/anthropic", {"value": CANARY}))[0] == 503
    assert (await told.call("DELETE", "/v1/users/ann"))[0] == 200


def test_no_answer_of_the_document_has_a_value() -> None:
    schemas = document(ROUTES)["components"]["schemas"]
    for name in ("Credential", "CredentialStored", "Credentials", "CredentialDeleted"):
        assert "value" not in schemas[name]["properties"]
