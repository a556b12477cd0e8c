"""Token sets (OAuth 2.0): when one is renewed, and the one request that does it (RFC 6749, section 6)."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from broker.config import OAuthConfig
from broker.store.vault import Facts, Secret

MAX_ANSWER = 64 * 2**10
MAX_TOKEN = 16 * 2**10
SPREAD = 0.2
"""Renewals are spread over this part of ``refresh_ahead_s``, so that what was stored at once is not renewed at once."""
MIN_LIFE_S = 10.0
"""A token set is not renewed again before, however short the life that a provider gives it."""
BACKOFF_MIN_S = 5.0
BACKOFF_MAX_S = 900.0
REFUSED_S = 86_400.0
"""A token set that the provider has refused is tried again so much later: it needs its user."""
MAX_LIFE_S = 10 * 365 * 86_400.0
_WORD = re.compile(r"[a-z_]{1,40}")
_FINAL = frozenset(
    ("invalid_grant", "invalid_client", "unauthorized_client", "unsupported_grant_type", "invalid_scope")
)


class RefreshError(Exception):
    """Why a token set was not renewed, without a word of it. ``wait_s``: what the provider asks for, or None."""

    def __init__(self, why: str, *, final: bool = False, wait_s: float | None = None) -> None:
        super().__init__(why)
        self.final = final
        self.wait_s = wait_s


@dataclass(frozen=True)
class Schedule:
    """When a token set is renewed. Pure; times are seconds since the epoch."""

    ahead_s: float

    def due(self, facts: Facts) -> float:
        """So long before it expires, spread by its fingerprint; never before half of its life, nor all the time."""
        life = facts.expires_at - facts.updated_at
        if life <= 0:
            return facts.expires_at
        spread = int(facts.fingerprint[:4] or "0", 16) / 0x10000 * SPREAD
        return max(facts.expires_at - min(self.ahead_s * (1 - spread), life / 2), facts.updated_at + MIN_LIFE_S)

    def next_try(self, facts: Facts, now: float) -> float:
        """When to renew it: when it is due, and not before a failed renewal's pause is over."""
        # A pause that is too long to be one is of a clock that was wrong.
        paused = facts.retry_at if facts.retry_at <= now + REFUSED_S * 1.5 else 0.0
        return max(self.due(facts), paused)


def pause_s(failures: int, error: RefreshError, jitter: float) -> float:
    """How long to leave a provider alone after so many failures in a row; ``jitter`` from 0 to 1."""
    if error.final:
        return REFUSED_S
    longer = BACKOFF_MIN_S * 2.0 ** min(failures, 20)
    wait = max(error.wait_s or 0.0, min(longer, BACKOFF_MAX_S))
    return min(wait, BACKOFF_MAX_S) * (1 + jitter / 4)


def renewed(old: Secret, answer: Mapping[str, Any], now: float, life: float = 0.0) -> Secret:
    """The token set after a token endpoint's answer; what the answer leaves out stays. Raises ``RefreshError``.

    ``life``: how long the old access token was good, in seconds; an answer may leave that out too (RFC 6749, 5.1).
    """
    if str(answer.get("token_type", "bearer")).lower() != "bearer":
        raise RefreshError("the answer is of another token type")
    tokens = {name: answer[name] for name in ("access_token", "refresh_token") if answer.get(name) is not None}
    if "access_token" not in tokens or not all(is_token(value) for value in tokens.values()):
        raise RefreshError("the answer holds no usable token")
    assert isinstance(old.value, Mapping)
    expires_at = expiry(tokens["access_token"], answer.get("expires_in"), now) or (now + life if life > 0 else 0.0)
    return Secret("oauth", old.mode, {**old.value, **tokens}, expires_at=expires_at)


def expiry(token: str, expires_in: object, now: float) -> float:
    """When an access token expires: after ``expires_in`` seconds, else as it says itself (JWT); 0: not known."""
    if isinstance(expires_in, (int, float, str)):
        try:
            life = float(expires_in)
        except (ValueError, OverflowError):
            life = 0.0
        if 0 < life < MAX_LIFE_S:
            return now + life
    try:
        claims = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
        said = float(claims["exp"])
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, OverflowError):
        return 0.0
    return said if now - MAX_LIFE_S < said < now + MAX_LIFE_S else 0.0


def is_token(value: object) -> bool:
    """Whether it can be sent as a credential."""
    return isinstance(value, str) and 0 < len(value) <= MAX_TOKEN and value.isascii() and value.isprintable()


class TokenEndpoint:
    """Asks token endpoints over pooled connections; no answer is ever logged."""

    def __init__(self) -> None:
        self._http: aiohttp.ClientSession | None = None

    async def renew(self, oauth: OAuthConfig, refresh_token: str, timeout_s: float) -> dict[str, Any]:
        """The answer to a refresh request. Raises ``RefreshError``."""
        if self._http is None:
            self._http = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
        asked = {"grant_type": "refresh_token", "refresh_token": refresh_token}
        if oauth.client_id:
            asked["client_id"] = oauth.client_id
        try:
            if oauth.client_secret_file:
                text = await asyncio.to_thread(Path(oauth.client_secret_file).read_text)
                asked["client_secret"] = text.strip()
            async with self._http.post(
                oauth.token_url,
                **{"json" if oauth.body == "json" else "data": asked},  # type: ignore[arg-type]
                headers={"Accept": "application/json"},
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=timeout_s),
            ) as response:
                return _checked(response, await _body(response))
        except TimeoutError:
            raise RefreshError(f"no answer within {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError, RecursionError) as error:
            raise RefreshError(f"the token endpoint cannot be asked ({type(error).__name__})") from None

    async def close(self) -> None:
        """Closes pooled connections."""
        if self._http is not None:
            await self._http.close()
            self._http = None


async def _body(response: aiohttp.ClientResponse) -> dict[str, Any]:
    text = bytearray()
    async for chunk in response.content.iter_any():
        text += chunk
        if len(text) > MAX_ANSWER:
            raise RefreshError("the answer is too large")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def _checked(response: aiohttp.ClientResponse, body: dict[str, Any]) -> dict[str, Any]:
    if response.status == 200:
        return body
    # A description may quote the token; the code is one of a few words.
    word = str(body.get("error", ""))
    code = word if _WORD.fullmatch(word) else ""
    wait = response.headers.get("Retry-After", "")
    raise RefreshError(
        f"the provider answered {response.status} {code}".rstrip(),
        final=code in _FINAL,
        wait_s=float(wait) if wait.isdigit() and len(wait) < 8 else None,
    )
