from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from broker.config import OAuthConfig
from broker.session.oauth import (
    BACKOFF_MAX_S,
    MAX_ANSWER,
    MIN_LIFE_S,
    REFUSED_S,
    RefreshError,
    Schedule,
    TokenEndpoint,
    expiry,
    is_token,
    pause_s,
    renewed,
)
from broker.store.vault import Facts, Secret
from tests.unit.broker.session.token_endpoint import TokenServer, token_server

NOW = 1_000_000.0
OLD = Secret("oauth", "gateway", {"access_token": "at", "refresh_token": "rt", "account_id": "acc"}, NOW + 60)
FACTS = Facts("ann", "p", 1, "oauth", "gateway", "0000abcd", NOW + 3600, "", 0, 0.0, NOW, NOW)
times = st.floats(0, 1e10)


def jwt(claims: Any) -> str:
    return f"h.{base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip('=')}.s"


# -- when ------------------------------------------------------------------------------------------


def test_renewed_so_long_before_it_expires_and_not_all_at_once() -> None:
    schedule = Schedule(300)
    assert schedule.due(FACTS) == NOW + 3300
    late = schedule.due(replace(FACTS, fingerprint="ffffabcd"))
    assert NOW + 3300 < late <= NOW + 3360


def test_a_short_life_is_used_by_half_and_no_shorter_than_can_be() -> None:
    schedule = Schedule(300)
    assert schedule.due(replace(FACTS, expires_at=NOW + 100)) == NOW + 50
    assert schedule.due(replace(FACTS, expires_at=NOW + 1)) == NOW + MIN_LIFE_S
    assert schedule.due(replace(FACTS, expires_at=NOW - 5)) == NOW - 5


@given(times, times, st.text("0123456789abcdef", min_size=4, max_size=4), st.floats(1, 1e6))
def test_what_was_just_stored_is_never_due_at_once_unless_it_has_expired(
    updated: float, expires: float, fingerprint: str, ahead: float
) -> None:
    facts = replace(FACTS, updated_at=updated, expires_at=expires, fingerprint=fingerprint)
    due = Schedule(ahead).due(facts)
    if expires > updated:
        assert updated + MIN_LIFE_S <= due <= max(expires, updated + MIN_LIFE_S)
    else:
        assert due == expires


def test_a_failed_renewal_pauses_unless_the_clock_was_wrong_then() -> None:
    schedule = Schedule(300)
    due = replace(FACTS, expires_at=NOW - 1)
    assert schedule.next_try(replace(due, retry_at=NOW + 60), NOW) == NOW + 60
    assert schedule.next_try(replace(due, retry_at=NOW + 30 * 86_400), NOW) == NOW - 1


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1e9) | st.none())
def test_pauses_grow_are_bounded_and_are_what_the_provider_asks(
    failures: int, jitter: float, asks: float | None
) -> None:
    pause = pause_s(failures, RefreshError("x", wait_s=asks), jitter)
    assert 5 <= pause <= BACKOFF_MAX_S * 1.25
    if asks is not None and asks < BACKOFF_MAX_S:
        assert pause >= asks
    assert pause_s(failures + 1, RefreshError("x", wait_s=asks), jitter) >= pause
    assert pause_s(failures, RefreshError("x", final=True), jitter) == REFUSED_S


# -- what ------------------------------------------------------------------------------------------


def test_what_the_answer_leaves_out_stays() -> None:
    fresh = renewed(OLD, {"access_token": "at2", "expires_in": 60}, NOW)
    assert fresh == Secret("oauth", "gateway", {**OLD.value, "access_token": "at2"}, NOW + 60)  # type: ignore[dict-item]
    fresh = renewed(OLD, {"access_token": "at2", "refresh_token": "rt2", "token_type": "BEARER"}, NOW)
    assert isinstance(fresh.value, dict)
    assert (fresh.value["refresh_token"], fresh.expires_at) == ("rt2", 0.0)


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"access_token": ""},
        {"access_token": 5},
        {"access_token": "a\nb"},
        {"access_token": "x" * 20_000},
        {"access_token": "at", "refresh_token": "r\x00"},
        {"access_token": "at", "token_type": "mac"},
    ],
)
def test_an_answer_without_a_usable_token_is_none(answer: dict[str, Any]) -> None:
    with pytest.raises(RefreshError):
        renewed(OLD, answer, NOW)


def test_a_life_beyond_all_numbers_loses_no_token() -> None:
    fresh = renewed(OLD, {"access_token": "at2", "refresh_token": "rt2", "expires_in": 10**400}, NOW)
    assert fresh.value == {**OLD.value, "access_token": "at2", "refresh_token": "rt2"}  # type: ignore[dict-item]


def test_a_life_that_the_answer_leaves_out_stays_too() -> None:
    assert renewed(OLD, {"access_token": "at2"}, NOW, 600).expires_at == NOW + 600
    assert renewed(OLD, {"access_token": "at2", "expires_in": 60}, NOW, 600).expires_at == NOW + 60
    assert renewed(OLD, {"access_token": "at2"}, NOW, -5).expires_at == 0


def test_a_token_may_say_itself_when_it_expires() -> None:
    assert expiry("at", 60, NOW) == expiry("at", "60", NOW) == NOW + 60
    assert expiry(jwt({"exp": NOW + 7}), None, NOW) == NOW + 7
    assert expiry(jwt({"exp": NOW + 7}), 60, NOW) == NOW + 60
    for life in (None, 0, -1, "soon", float("nan"), float("inf"), [1], 1e300):
        assert expiry("at", life, NOW) == 0.0


@given(st.text(), st.none() | st.booleans() | st.floats() | st.text() | st.lists(st.integers()))
def test_any_token_and_any_life_have_an_expiry(token: str, life: Any) -> None:
    at = expiry(token, life, NOW)
    assert at == 0.0 or at == at < float("inf")


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner), max_leaves=5))
def test_any_claims_have_an_expiry(claims: Any) -> None:
    for said in (claims, {"exp": claims}):
        at = expiry(jwt(said), None, NOW)
        assert at == 0.0 or abs(at - NOW) < 1e9


@given(st.text())
def test_a_token_can_be_sent_in_a_header(text: str) -> None:
    if is_token(text):
        assert "\r" not in text
        assert "\n" not in text
        assert text.isascii()


# -- asking ----------------------------------------------------------------------------------------


@pytest.fixture
async def server() -> AsyncIterator[TokenServer]:
    async with token_server() as made:
        yield made


@pytest.fixture
async def endpoint() -> AsyncIterator[TokenEndpoint]:
    made = TokenEndpoint()
    yield made
    await made.close()


async def test_it_is_asked_as_the_standard_says(server: TokenServer, endpoint: TokenEndpoint, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("cs\n")
    oauth = OAuthConfig(token_url=server.url, client_id="c", client_secret_file=str(secret))
    answer = await endpoint.renew(oauth, "rt-0", 5)
    assert answer["access_token"] == "at-1"
    assert server.kinds == ["application/x-www-form-urlencoded"]
    asked = {"grant_type": "refresh_token", "refresh_token": "rt-0", "client_id": "c"}
    assert server.asked == [asked | {"client_secret": "cs"}]
    await endpoint.renew(OAuthConfig(token_url=server.url, client_id="c", body="json"), "rt-1", 5)
    assert server.kinds[1] == "application/json"
    assert server.asked[1] == asked | {"refresh_token": "rt-1"}


@pytest.mark.parametrize(
    ("answer", "final", "wait"),
    [
        (web.json_response({"error": "invalid_grant", "error_description": "rt-secret"}, status=400), True, None),
        (web.json_response({"error": "invalid_client"}, status=401), True, None),
        (web.json_response({"error": "rt-secret"}, status=400), False, None),
        (web.json_response({"error": {"type": "rt-secret"}}, status=400), False, None),
        (web.Response(status=429, headers={"Retry-After": "77"}), False, 77.0),
        (web.Response(status=503, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}), False, None),
        (web.Response(status=500, text="rt-secret"), False, None),
        (web.Response(status=302, headers={"Location": "http://127.0.0.1:1/rt-secret"}), False, None),
    ],
)
async def test_a_refusal_is_told_without_a_word_of_the_token(
    server: TokenServer, endpoint: TokenEndpoint, answer: web.Response, final: bool, wait: float | None
) -> None:
    server.answer = lambda: answer
    with pytest.raises(RefreshError) as caught:
        await endpoint.renew(OAuthConfig(token_url=server.url), "rt-secret", 5)
    assert (caught.value.final, caught.value.wait_s) == (final, wait)
    assert str(answer.status) in str(caught.value)
    assert "rt-secret" not in str(caught.value)
    assert len(server.asked) == 1


async def test_an_answer_that_is_too_large_or_no_json(server: TokenServer, endpoint: TokenEndpoint) -> None:
    server.answer = lambda: web.Response(text="x" * (MAX_ANSWER + 1))
    with pytest.raises(RefreshError, match="too large"):
        await endpoint.renew(OAuthConfig(token_url=server.url), "rt", 5)
    server.answer = lambda: web.Response(text="[" * 5000)
    assert await endpoint.renew(OAuthConfig(token_url=server.url), "rt", 5) == {}


async def test_an_endpoint_that_hangs_or_is_not_there(server: TokenServer, endpoint: TokenEndpoint) -> None:
    server.gate.clear()
    with pytest.raises(RefreshError, match="no answer within"):
        await endpoint.renew(OAuthConfig(token_url=server.url), "rt-secret", 0.05)
    with pytest.raises(RefreshError, match="cannot be asked") as caught:
        await endpoint.renew(OAuthConfig(token_url="http://127.0.0.1:1/t"), "rt-secret", 5)
    assert "secret" not in str(caught.value)
    with pytest.raises(RefreshError, match="FileNotFoundError"):
        await endpoint.renew(OAuthConfig(token_url=server.url, client_secret_file="/nowhere"), "rt", 5)
